// Layer normalisation of one position's channels; float32 or bfloat16 storage, float32 arithmetic.
#pragma once

#include <cmath>

#include "vector.h"

namespace {

constexpr float NORM_EPS = SPARSE_FCMAE_EPS;

struct Moments {
  float mean, inverse_deviation;
};

template <class E>
INLINE Moments moments(const E* x, int64_t C) {
  const float mean = sum_channels(C, [&]<int V>(Chunk<V, 1>, int64_t c) ALWAYS_INLINE { return load<V>(x + c); }) / C;
  const float squares = sum_channels(C, [&]<int V>(Chunk<V, 1>, int64_t c) ALWAYS_INLINE {
    const fvec<V> d = load<V>(x + c) - mean;
    return d * d;
  });
  return {mean, 1.0f / std::sqrt(squares / C + NORM_EPS)};
}

template <class E, class O>
INLINE void normalise(const E* x, const float* weight, const float* bias, int64_t C, O* out) {
  const Moments m = moments(x, C);
  each_chunk<WIDTH, 1>(0, C, [&]<int V>(Chunk<V, 1>, int64_t c) ALWAYS_INLINE {
    store<V>(out + c, (load<V>(x + c) - m.mean) * m.inverse_deviation * load<V>(weight + c) + load<V>(bias + c));
  });
}

// With n = (x - mean) / deviation and w = grad * weight, all over the C channels:
//
//   grad x = (w - mean of w - n * mean of w * n) / deviation
//
// Adds grad * n and grad, the gradients of weight and bias, to grad_weight and grad_bias. grad_x may be x.
template <class E, class G>
INLINE void normalise_backward(const E* x, const G* grad, const float* weight, int64_t C, E* grad_x, float* grad_weight,
                               float* grad_bias) {
  const Moments m = moments(x, C);
  const float mean = sum_channels(C, [&]<int V>(Chunk<V, 1>, int64_t c) ALWAYS_INLINE {
                       return load<V>(grad + c) * load<V>(weight + c);
                     }) / C;
  const float projection = sum_channels(C, [&]<int V>(Chunk<V, 1>, int64_t c) ALWAYS_INLINE {
                        const fvec<V> n = (load<V>(x + c) - m.mean) * m.inverse_deviation;
                        return load<V>(grad + c) * load<V>(weight + c) * n;
                      }) / C;
  each_chunk<WIDTH, 1>(0, C, [&]<int V>(Chunk<V, 1>, int64_t c) ALWAYS_INLINE {
    const fvec<V> g = load<V>(grad + c), n = (load<V>(x + c) - m.mean) * m.inverse_deviation;
    store<V>(grad_weight + c, load<V>(grad_weight + c) + g * n);
    store<V>(grad_bias + c, load<V>(grad_bias + c) + g);
    store<V>(grad_x + c, (g * load<V>(weight + c) - mean - n * projection) * m.inverse_deviation);
  });
}

}  // namespace
