// The mean squared error of each masked patch's prediction; pixels of any stored type, float32 or bfloat16 predictions,
// float32 arithmetic.
//
// With t the patch's n recorded values, normalised as pixels.h says, and p its prediction [P * P * C] (ConvNeXt V2, section 3.1):
//
//   error = mean of (p - u)^2,   u = t, or with targets normalised by their own patch (t - mean of t) / sqrt(variance of t + eps)
//
// and grad p = grad error * 2 / n * (p - u), 0 where no value is recorded. The variance is the unbiased one.
//
// A patch's values are read and kept in the caches for all passes over them, forward and backward alike: nothing but the
// pixels and the predictions is read from memory.

#include <algorithm>

#include "pixels.h"

namespace {

constexpr float TARGET_EPS = SPARSE_FCMAE_EPS;

// Values of a patch: the targets u, then 1 for each that is recorded. Where none can be missing the latter is null.
struct Target {
  std::vector<float> memory;
  float *values, *recorded;
  float count = 0;

  Target(int64_t size, bool can_miss)
      : memory((can_miss ? 2 : 1) * size), values(memory.data()), recorded(can_miss ? values + size : nullptr) {}

  template <class P>
  void read(const PatchReader<P>& reader, int64_t flat, int64_t size, bool normalised) {
    reader.read(flat, values, recorded);
    count = recorded ? sum(size, [&]<int V>(int64_t i) ALWAYS_INLINE { return load<V>(recorded + i); }) : size;
    if (!normalised) return;
    const float mean =
        sum(size, [&]<int V>(int64_t i) ALWAYS_INLINE { return load<V>(values + i); }) / std::max(count, 1.0f);
    const float squares = sum(size, [&]<int V>(int64_t i) ALWAYS_INLINE {
      const fvec<V> d = deviation<V>(i, mean);
      return d * d;
    });
    const float scale = 1.0f / std::sqrt(squares / std::max(count - 1.0f, 1.0f) + TARGET_EPS);
    each_chunk<WIDTH, 1>(0, size, [&]<int V>(Chunk<V, 1>, int64_t i) ALWAYS_INLINE {
      store<V>(values + i, deviation<V>(i, mean) * scale);
    });
  }

  // p - u, 0 where no value is recorded.
  template <int V, class E>
  INLINE fvec<V> difference(const E* prediction, int64_t i) const {
    const fvec<V> d = load<V>(prediction + i) - load<V>(values + i);
    return recorded ? d * load<V>(recorded + i) : d;
  }

 private:
  template <int V>
  INLINE fvec<V> deviation(int64_t i, float mean) const {
    const fvec<V> d = load<V>(values + i) - mean;
    return recorded ? d * load<V>(recorded + i) : d;
  }

 public:
  template <class F>
  static INLINE float sum(int64_t size, F f) {
    return sum_channels(size, [&]<int V>(Chunk<V, 1>, int64_t i) ALWAYS_INLINE { return f.template operator()<V>(i); });
  }
};

// Calls f(the patch's number, its targets) for all patches, on all threads.
template <class P, class F>
void each_patch(const P* pixels, const Layout& layout, const double* statistics, const int64_t* rows, int64_t patches,
                bool normalised, int threads, F f) {
  const PatchReader<P> reader(pixels, layout, statistics);
#pragma omp parallel num_threads(threads)
  {
    Target target(layout.values(), reader.can_miss());
#pragma omp for schedule(static)
    for (int64_t t = 0; t < patches; ++t) {
      target.read(reader, rows[t], layout.values(), normalised);
      f(t, target);
    }
  }
}

}  // namespace

// layout: the numbers of `Layout`. statistics [2, C] or null. rows [patches]: each patch's flat position in [B, rows, cols].
// prediction [patches, P * P * C] is bfloat16 where is_bf16, else float32. errors [patches].
extern "C" void sparse_fcmae_patch_errors(const void* pixels, int type, const int64_t* layout, const double* statistics,
                                          const int64_t* rows, int64_t patches, int normalised, const void* prediction,
                                          int is_bf16, float* errors, int threads) {
  const Layout& shape = *reinterpret_cast<const Layout*>(layout);
  const int64_t size = shape.values();
  with_pixel_type(pixels, type, [&](auto* pixels) {
    with_type(prediction, is_bf16, [&](auto* prediction) {
      each_patch(pixels, shape, statistics, rows, patches, normalised, threads, [&](int64_t t, const Target& target) {
        const auto* const p = prediction + t * size;
        const float squares = Target::sum(size, [&]<int V>(int64_t i) ALWAYS_INLINE {
          const fvec<V> d = target.template difference<V>(p, i);
          return d * d;
        });
        errors[t] = squares / std::max(target.count, 1.0f);
      });
    });
  });
}

// grad_errors [patches]; grad is as the prediction.
extern "C" void sparse_fcmae_patch_errors_backward(const float* grad_errors, const void* pixels, int type,
                                                   const int64_t* layout, const double* statistics, const int64_t* rows,
                                                   int64_t patches, int normalised, const void* prediction, int is_bf16,
                                                   void* grad, int threads) {
  const Layout& shape = *reinterpret_cast<const Layout*>(layout);
  const int64_t size = shape.values();
  with_pixel_type(pixels, type, [&](auto* pixels) {
    with_type(prediction, is_bf16, [&]<class E>(const E* prediction) {
      each_patch(pixels, shape, statistics, rows, patches, normalised, threads, [&](int64_t t, const Target& target) {
        const E* const p = prediction + t * size;
        E* const out = static_cast<E*>(grad) + t * size;
        const float factor = 2.0f * grad_errors[t] / std::max(target.count, 1.0f);
        each_chunk<WIDTH, 1>(0, size, [&]<int V>(Chunk<V, 1>, int64_t i) ALWAYS_INLINE {
          store<V>(out + i, target.template difference<V>(p, i) * factor);
        });
      });
    });
  });
}
