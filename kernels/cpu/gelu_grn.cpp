// GELU, global response normalisation and its scale in one op; float32 or bfloat16 storage, float32 accumulation.
//
// x is [N, H]: the positions of all images, image b's from offsets[b] to offsets[b + 1], H channels. With h = gelu(x),
// G[b, c] = sqrt(sum of h^2 over the image's positions) and M[b] = mean of G[b, :] + eps (ConvNeXt V2, section 3.2):
//
//   out = h * s,   s[b, c] = 1 + gamma[c] * G[b, c] / M[b]
//
// and, with g the gradient of out and A[b, c] = sum of g * h over the image's positions:
//
//   grad gamma[c] = sum over b of A * G / M
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

constexpr float EPS = 1e-6f;
constexpr int64_t TILE = 256;  // positions a tile

template <int V>
INLINE fvec<V> splat(float a) {
  return fvec<V>{} + a;
}

// exp(-a) for a >= 0, relative error below 2e-7; a from 87 on counts as 87, so that the result stays a normal number.
template <int V>
INLINE fvec<V> exp_minus(fvec<V> a) {
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const fvec<V> y = (a < 87.0f ? a : splat<V>(87.0f)) * -1.44269504f;
  const fvec<V> shifted = y + MAGIC;
  const fvec<V> f = y - (shifted - MAGIC);
  // 2^f on [-1/2, 1/2], least maximum relative error
  fvec<V> p = f * 0.00132764651f + 0.00967554222f;
  p = p * f + 0.0555071330f;
  p = p * f + 0.240221197f;
  p = p * f + 0.693146967f;
  p = p * f + 1.00000007f;
  return bit_cast<fvec<V>>(bit_cast<uvec<V>>(p) + (bit_cast<uvec<V>>(shifted) << 23));
}

// Standard normal distribution function and density, absolute error below 1e-7. The lower tail is exp(-x^2 / 2) times a
// polynomial in t = 1 / (1 + 0.28 |x|), fitted to it, and thus free of cancellation.
template <int V>
INLINE void normal(fvec<V> x, fvec<V>& cdf, fvec<V>& pdf) {
  const fvec<V> magnitude = x < 0.0f ? -x : x;
  const fvec<V> e = exp_minus<V>(x * x * 0.5f);
  const fvec<V> t = 1.0f / (magnitude * 0.28f + 1.0f);
  fvec<V> p = t * -0.105816306f + 0.389907406f;
  p = p * t - 0.237048404f;
  p = p * t + 0.268955011f;
  p = p * t + 0.0674785840f;
  p = p * t + 0.116523700f;
  const fvec<V> tail = p * t * e;
  cdf = x < 0.0f ? tail : 1.0f - tail;
  pdf = e * 0.398942280f;
}

struct Tile {
  int64_t image, begin, end;  // positions
};

std::vector<Tile> tiles_of(const int64_t* offsets, int64_t images) {
  std::vector<Tile> tiles;
  for (int64_t b = 0; b < images; ++b)
    for (int64_t i = offsets[b]; i < offsets[b + 1]; i += TILE) tiles.push_back({b, i, std::min(i + TILE, offsets[b + 1])});
  return tiles;
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
void forward(const E* x, const float* gamma, const int64_t* offsets, int64_t images, int64_t H, E* out, float* norm,
             int threads) {
  const std::vector<Tile> tiles = tiles_of(offsets, images);
  const int64_t count = tiles.size();
  std::vector<float> partial(count * H), scale(images * H);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    float* const squares = partial.data() + i * H;
    for (int64_t n = tiles[i].begin; n < tiles[i].end; ++n)
      each_chunk<WIDTH, 1>(0, H, [&]<int V, int U>(Chunk<V, U>, int64_t c) ALWAYS_INLINE {
        const fvec<V> a = load<V>(x + n * H + c);
        fvec<V> cdf, pdf;
        normal<V>(a, cdf, pdf);
        store<V>(out + n * H + c, a * cdf);
        const fvec<V> h = load<V>(out + n * H + c);
        store<V>(squares + c, load<V>(squares + c) + h * h);
      });
  }
  add_tiles(tiles, partial.data(), H, images, norm);
  for (int64_t b = 0; b < images; ++b) {
    float* const G = norm + b * H;
    for (int64_t c = 0; c < H; ++c) G[c] = std::sqrt(G[c]);
    const float inverse = inverse_mean(G, H);
    for (int64_t c = 0; c < H; ++c) scale[b * H + c] = 1.0f + gamma[c] * (G[c] * inverse);
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    const float* const s = scale.data() + tiles[i].image * H;
    for (int64_t n = tiles[i].begin; n < tiles[i].end; ++n)
      each_chunk<WIDTH, 1>(0, H, [&]<int V, int U>(Chunk<V, U>, int64_t c) ALWAYS_INLINE {
        store<V>(out + n * H + c, load<V>(out + n * H + c) * load<V>(s + c));
      });
  }
}

template <class E>
void backward(const E* grad, const E* x, const float* gamma, const int64_t* offsets, const float* norm, int64_t images,
              int64_t H, E* grad_x, float* grad_gamma, int threads) {
  const std::vector<Tile> tiles = tiles_of(offsets, images);
  const int64_t count = tiles.size();
  std::vector<float> partial(count * H), sums(images * H), scale(images * H), pull(images * H);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    float* const products = partial.data() + i * H;
    for (int64_t n = tiles[i].begin; n < tiles[i].end; ++n)
      each_chunk<WIDTH, 1>(0, H, [&]<int V, int U>(Chunk<V, U>, int64_t c) ALWAYS_INLINE {
        const fvec<V> a = load<V>(x + n * H + c);
        fvec<V> cdf, pdf;
        normal<V>(a, cdf, pdf);
        store<V>(products + c, load<V>(products + c) + load<V>(grad + n * H + c) * (a * cdf));
      });
  }
  add_tiles(tiles, partial.data(), H, images, sums.data());
  std::fill(grad_gamma, grad_gamma + H, 0.0f);
  for (int64_t b = 0; b < images; ++b) {
    const float* const G = norm + b * H;
    const float* const A = sums.data() + b * H;
    const float inverse = inverse_mean(G, H);
    double through_mean = 0;
    for (int64_t c = 0; c < H; ++c) {
      grad_gamma[c] += A[c] * (G[c] * inverse);
      through_mean += static_cast<double>(gamma[c]) * A[c] * G[c];
    }
    const float shared = static_cast<float>(through_mean / H) * inverse * inverse;
    for (int64_t c = 0; c < H; ++c) {
      scale[b * H + c] = 1.0f + gamma[c] * (G[c] * inverse);
      // the norm's gradient at zero is taken as zero; `!=` lets NaN through
      pull[b * H + c] = G[c] != 0.0f ? (gamma[c] * A[c] * inverse - shared) / G[c] : 0.0f;
    }
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    const float* const s = scale.data() + tiles[i].image * H;
    const float* const r = pull.data() + tiles[i].image * H;
    for (int64_t n = tiles[i].begin; n < tiles[i].end; ++n)
      each_chunk<WIDTH, 1>(0, H, [&]<int V, int U>(Chunk<V, U>, int64_t c) ALWAYS_INLINE {
        const fvec<V> a = load<V>(x + n * H + c);
        fvec<V> cdf, pdf;
        normal<V>(a, cdf, pdf);
        const fvec<V> grad_h = load<V>(grad + n * H + c) * load<V>(s + c) + a * cdf * load<V>(r + c);
        store<V>(grad_x + n * H + c, grad_h * (cdf + a * pdf));
      });
  }
}

}  // namespace

// x and out [N, H] are bfloat16 where is_bf16, else float32; gamma [H] and norm [images, H] (the G above, kept for the
// backward pass) are float32.
extern "C" void sparse_fcmae_gelu_grn(const void* x, const float* gamma, const int64_t* offsets, int64_t images,
                                      int64_t channels, int is_bf16, void* out, float* norm, int threads) {
  if (is_bf16)
    forward(static_cast<const bf16*>(x), gamma, offsets, images, channels, static_cast<bf16*>(out), norm, threads);
  else
    forward(static_cast<const float*>(x), gamma, offsets, images, channels, static_cast<float*>(out), norm, threads);
}

// grad and grad_x as x; grad_gamma [H] float32.
extern "C" void sparse_fcmae_gelu_grn_backward(const void* grad, const void* x, const float* gamma,
                                               const int64_t* offsets, const float* norm, int64_t images,
                                               int64_t channels, int is_bf16, void* grad_x, float* grad_gamma,
                                               int threads) {
  if (is_bf16)
    backward(static_cast<const bf16*>(grad), static_cast<const bf16*>(x), gamma, offsets, norm, images, channels,
             static_cast<bf16*>(grad_x), grad_gamma, threads);
  else
    backward(static_cast<const float*>(grad), static_cast<const float*>(x), gamma, offsets, norm, images, channels,
             static_cast<float*>(grad_x), grad_gamma, threads);
}
