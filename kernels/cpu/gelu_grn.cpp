// GELU, global response normalisation and its scale in one op; float32 or bfloat16 storage, float32 accumulation.
//
// x is [N, H]: the positions of all images, image b's from offsets[b] to offsets[b + 1] (less offsets[0]), H channels.
// With h = gelu(x + bias), G[b, c] = sqrt(sum of h^2 over the image's positions) and M[b] = mean of G[b, :] + eps (ConvNeXt V2,
// section 3.2):
//
//   out = h * s + beta,   s[b, c] = 1 + gamma[c] * G[b, c] / M[b]
//
// and, with g the gradient of out and A[b, c] = sum of g * h over the image's positions:
//
//   grad gamma[c] = sum over b of A * G / M,   grad beta[c] = sum of g over all positions
//   grad G[b, c]  = gamma[c] * A[b, c] / M[b] - mean over channels of (gamma * A * G) / M[b]^2
//   grad x        = (g * s + h * grad G / G) * gelu'(x)
//
// Sums are taken tile by tile and the tiles of an image added in order, so that an image's results depend on neither
// the other images nor the number of threads.

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector.h"

namespace {

constexpr float EPS = SPARSE_FCMAE_EPS;
constexpr int64_t TILE = 256;  // positions a tile

// exp(-a) * sqrt(1 / (2 pi)) for a in [0, 87], relative error below 2e-7.
template <int V>
INLINE fvec<V> exp_minus(fvec<V> a) {
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const fvec<V> y = a * -1.44269504f;
  const fvec<V> shifted = y + MAGIC;
  const fvec<V> f = y - (shifted - MAGIC);
  // 2^f / sqrt(2 pi) on [-1/2, 1/2], least maximum relative error of 2^f
  fvec<V> p = f * 0.000529654324f + 0.00385998283f;
  p = p * f + 0.0221441425f;
  p = p * f + 0.0958343893f;
  p = p * f + 0.276525646f;
  p = p * f + 0.398942322f;
  return bit_cast<fvec<V>>(bit_cast<uvec<V>>(p) + (bit_cast<uvec<V>>(shifted) << 23));
}

// Standard normal distribution function and density, absolute error below 2e-7. The lower tail is the density times a
// polynomial, fitted to Mills' ratio with the density as weight, and thus free of cancellation.
template <int V>
INLINE void normal(fvec<V> x, fvec<V>& cdf, fvec<V>& pdf) {
  constexpr float FAR = 13.0f;  // both are 0 beyond, where exponent and polynomial would overflow; NaN is not beyond
  const fvec<V> size = x < 0.0f ? -x : x;
  const fvec<V> a = size > FAR ? fvec<V>{} + FAR : size;
  pdf = size > FAR ? fvec<V>{} : exp_minus<V>(a * a * 0.5f);
  fvec<V> p = a * 4.09004315e-06f - 8.82528766e-05f;
  p = p * a + 0.00085159833f;
  p = p * a - 0.00494965818f;
  p = p * a + 0.0199011043f;
  p = p * a - 0.0609459877f;
  p = p * a + 0.153292567f;
  p = p * a - 0.332162827f;
  p = p * a + 0.626448512f;
  p = p * a - 0.999985576f;
  p = p * a + 1.25331402f;
  const fvec<V> tail = p * pdf;
  cdf = x < 0.0f ? tail : 1.0f - tail;
}

struct Tile {
  int64_t image, begin, end;  // positions
};

std::vector<Tile> tiles_of(const int64_t* offsets, int64_t images) {
  std::vector<Tile> tiles;
  for (int64_t b = 0; b < images; ++b)
    for (int64_t i = offsets[b]; i < offsets[b + 1]; i += TILE)
      tiles.push_back({b, i - offsets[0], std::min(i + TILE, offsets[b + 1]) - offsets[0]});
  return tiles;
}

// Calls f(Chunk<V, 1>, std::integral_constant<int, R>, c, n) for R positions from n on at a time, so that what belongs to
// the channels alone is loaded and stored once for R.
template <class F>
INLINE void each_position(const Tile& tile, int64_t H, F f) {
  constexpr int R = 4;
  int64_t n = tile.begin;
  for (; n + R <= tile.end; n += R)
    each_chunk<WIDTH, 1>(0, H, [&]<int V, int U>(Chunk<V, U> chunk, int64_t c) ALWAYS_INLINE {
      f(chunk, std::integral_constant<int, R>{}, c, n);
    });
  for (; n < tile.end; ++n)
    each_chunk<WIDTH, 1>(0, H, [&]<int V, int U>(Chunk<V, U> chunk, int64_t c) ALWAYS_INLINE {
      f(chunk, std::integral_constant<int, 1>{}, c, n);
    });
}

// total[images, H] = the sum of an image's rows of partial[tiles, H], in order.
void add_tiles(const std::vector<Tile>& tiles, const float* partial, int64_t H, int64_t images, float* total) {
  std::fill(total, total + images * H, 0.0f);
  for (size_t i = 0; i < tiles.size(); ++i)
    for (int64_t c = 0; c < H; ++c) total[tiles[i].image * H + c] += partial[i * H + c];
}

float inverse_mean(const float* norm, int64_t H) {
  double sum = 0;
  for (int64_t c = 0; c < H; ++c) sum += norm[c];
  return 1.0f / (static_cast<float>(sum / H) + EPS);
}

template <class E>
void forward(const E* x, const float* bias, const float* gamma, const float* beta, const int64_t* offsets,
             int64_t images, int64_t H, E* out, float* norm, int threads) {
  const std::vector<Tile> tiles = tiles_of(offsets, images);
  const int64_t count = tiles.size();
  std::vector<float> partial(count * H), scale(images * H);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    float* const squares = partial.data() + i * H;
    each_position(tiles[i], H, [&]<int V, int R>(Chunk<V, 1>, std::integral_constant<int, R>, int64_t c, int64_t n)
                                   ALWAYS_INLINE {
      const fvec<V> shift = load_or_zero<V>(bias, c);
      fvec<V> sum = load<V>(squares + c);
      UNROLL for (int r = 0; r < R; ++r) {
        const fvec<V> a = load<V>(x + (n + r) * H + c) + shift;
        fvec<V> cdf, pdf;
        normal<V>(a, cdf, pdf);
        const fvec<V> h = a * cdf;
        store<V>(out + (n + r) * H + c, h);
        sum += h * h;
      }
      store<V>(squares + c, sum);
    });
  }
  add_tiles(tiles, partial.data(), H, images, norm);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < images; ++b) {
    float* const G = norm + b * H;
    for (int64_t c = 0; c < H; ++c) G[c] = std::sqrt(G[c]);
    const float inverse = inverse_mean(G, H);
    for (int64_t c = 0; c < H; ++c) scale[b * H + c] = 1.0f + gamma[c] * (G[c] * inverse);
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    const float* const s = scale.data() + tiles[i].image * H;
    each_position(tiles[i], H, [&]<int V, int R>(Chunk<V, 1>, std::integral_constant<int, R>, int64_t c, int64_t n)
                                   ALWAYS_INLINE {
      const fvec<V> factor = load<V>(s + c), shift = load_or_zero<V>(beta, c);
      UNROLL for (int r = 0; r < R; ++r) {
        E* const h = out + (n + r) * H + c;
        store<V>(h, load<V>(h) * factor + shift);
      }
    });
  }
}

// The first pass leaves h in `out` and gelu' in `derivative`, so that the second computes neither again.
template <class E>
void backward(const E* grad, const E* x, const float* bias, const float* gamma, const float* beta,
              const int64_t* offsets, const float* norm, int64_t images, int64_t H, E* grad_x, E* out, E* derivative,
              float* grad_bias, float* grad_gamma, float* grad_beta, int threads) {
  const std::vector<Tile> tiles = tiles_of(offsets, images);
  const int64_t count = tiles.size();
  std::vector<float> of_products(count * H), of_grad(count * H), of_grad_x(count * H);
  std::vector<float> sums(images * H), scale(images * H), coupling(images * H);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    float* const products = of_products.data() + i * H;
    float* const grads = of_grad.data() + i * H;
    each_position(tiles[i], H, [&]<int V, int R>(Chunk<V, 1>, std::integral_constant<int, R>, int64_t c, int64_t n)
                                   ALWAYS_INLINE {
      const fvec<V> shift = load_or_zero<V>(bias, c);
      fvec<V> product = load<V>(products + c), sum = load<V>(grads + c);
      UNROLL for (int r = 0; r < R; ++r) {
        const int64_t at = (n + r) * H + c;
        const fvec<V> a = load<V>(x + at) + shift, g = load<V>(grad + at);
        fvec<V> cdf, pdf;
        normal<V>(a, cdf, pdf);
        const fvec<V> h = a * cdf;
        store<V>(derivative + at, cdf + a * pdf);
        store<V>(out + at, h);
        product += g * h;
        sum += g;
      }
      store<V>(products + c, product);
      store<V>(grads + c, sum);
    });
  }
  add_tiles(tiles, of_products.data(), H, images, sums.data());
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < images; ++b) {
    const float* const G = norm + b * H;
    float* const A = sums.data() + b * H;
    const float inverse = inverse_mean(G, H);
    double through_mean = 0;
    for (int64_t c = 0; c < H; ++c) through_mean += static_cast<double>(gamma[c]) * A[c] * G[c];
    const float shared = static_cast<float>(through_mean / H) * inverse * inverse;
    for (int64_t c = 0; c < H; ++c) {
      scale[b * H + c] = 1.0f + gamma[c] * (G[c] * inverse);
      // the norm's gradient at zero is taken as zero; `!=` lets NaN through
      coupling[b * H + c] = G[c] != 0.0f ? (gamma[c] * A[c] * inverse - shared) / G[c] : 0.0f;
      A[c] *= G[c] * inverse;  // the image's part of gamma's gradient
    }
  }
  for (int64_t b = 0; b < images; ++b)
    for (int64_t c = 0; c < H; ++c) grad_gamma[c] += sums[b * H + c];
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    const float* const s = scale.data() + tiles[i].image * H;
    const float* const p = coupling.data() + tiles[i].image * H;
    float* const grads = of_grad_x.data() + i * H;
    each_position(tiles[i], H, [&]<int V, int R>(Chunk<V, 1>, std::integral_constant<int, R>, int64_t c, int64_t n)
                                   ALWAYS_INLINE {
      const fvec<V> factor = load<V>(s + c), coupled = load<V>(p + c), shift = load_or_zero<V>(beta, c);
      fvec<V> sum = load<V>(grads + c);
      UNROLL for (int r = 0; r < R; ++r) {
        const int64_t at = (n + r) * H + c;
        const fvec<V> h = load<V>(out + at);
        const fvec<V> g = (load<V>(grad + at) * factor + h * coupled) * load<V>(derivative + at);
        store<V>(out + at, h * factor + shift);
        store<V>(grad_x + at, g);
        sum += g;
      }
      store<V>(grads + c, sum);
    });
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < H; ++c) {
      grad_beta[c] += of_grad[i * H + c];
      grad_bias[c] += of_grad_x[i * H + c];
    }
}

}  // namespace

// x and out [N, H] are bfloat16 where is_bf16, else float32, and may be the same; bias and beta (may be null), gamma [H] and
// norm [images, H] (the G above, kept for the backward pass) are float32.
extern "C" void sparse_fcmae_gelu_grn(const void* x, int is_bf16, const float* bias, const float* gamma,
                                      const float* beta, const int64_t* offsets, int64_t images, int64_t channels,
                                      void* out, float* norm, int threads) {
  with_type(x, is_bf16, [&]<class E>(const E* x) {
    forward(x, bias, gamma, beta, offsets, images, channels, static_cast<E*>(out), norm, threads);
  });
}

// grad, grad_x, out and derivative are as x. grad_x may be grad; derivative is scratch and may be x; out is computed
// again. Added to: grad_bias, grad_gamma, grad_beta [H].
extern "C" void sparse_fcmae_gelu_grn_backward(const void* grad, const void* x, int is_bf16, const float* bias,
                                               const float* gamma, const float* beta, const int64_t* offsets,
                                               const float* norm, int64_t images, int64_t channels, void* grad_x,
                                               void* out, void* derivative, float* grad_bias, float* grad_gamma,
                                               float* grad_beta, int threads) {
  with_type(x, is_bf16, [&]<class E>(const E* x) {
    backward(static_cast<const E*>(grad), x, bias, gamma, beta, offsets, norm, images, channels,
             static_cast<E*>(grad_x), static_cast<E*>(out), static_cast<E*>(derivative), grad_bias, grad_gamma,
             grad_beta, threads);
  });
}
