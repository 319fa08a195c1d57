// The windows of the stem's convolution, which tile the patches, as rows of a matrix: pixels of any stored type become
// [patches, S, S, k * k * C], float32 or bfloat16, S = P / k windows along a patch's side, each in the order (row, column,
// channel), normalised as pixels.h says.

#include "pixels.h"

namespace {

template <class P, class O>
void windows(const P* pixels, const Layout& layout, const double* statistics, const int64_t* rows, int64_t patches,
             int64_t k, O* out, int threads) {
  const PatchReader<P> reader(pixels, layout, statistics);
  const int64_t line = layout.side * layout.channels, piece = k * layout.channels, along = layout.side / k;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> values(layout.values()), recorded(reader.can_miss() ? layout.values() : 0);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < patches; ++t) {
      reader.read(rows[t], values.data(), recorded.data());
      O* to = out + t * layout.values();
      for (int64_t y = 0; y < along; ++y)
        for (int64_t x = 0; x < along; ++x)
          for (int64_t row = 0; row < k; ++row, to += piece) {
            const float* const from = values.data() + (y * k + row) * line + x * piece;
            each_chunk<WIDTH, 1>(0, piece, [&]<int V>(Chunk<V, 1>, int64_t i) ALWAYS_INLINE {
              store<V>(to + i, load<V>(from + i));
            });
          }
    }
  }
}

}  // namespace

// layout: the numbers of `Layout`. statistics [2, C] or null. rows [patches]: each patch's flat position in [B, rows, cols].
extern "C" void sparse_fcmae_patch_windows(const void* pixels, int type, const int64_t* layout, const double* statistics,
                                           const int64_t* rows, int64_t patches, int64_t k, void* out, int out_is_bf16,
                                           int threads) {
  const Layout& shape = *reinterpret_cast<const Layout*>(layout);
  with_pixel_type(pixels, type, [&](auto* pixels) {
    with_type(out, out_is_bf16, [&](auto* out) { windows(pixels, shape, statistics, rows, patches, k, out, threads); });
  });
}
