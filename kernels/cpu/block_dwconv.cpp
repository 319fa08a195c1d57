// 7x7 depthwise convolution over visible blocks, float32 or bfloat16 storage, float32 accumulation.
//
// Features are [T, S, S, C]: T visible patches, S x S positions each (S = 8, 4, 2 or 1), channels last. `slot` is
// [B, rows + 6, cols + 6]: the row in T of every patch, -1 where it is masked or outside. `index[t]` is patch t's flat
// position in [B, rows, cols]. Masked neighbours are skipped, so only taps between visible positions are computed.
//
// Built once per instruction set (see setup.py); no Python and no PyTorch header is needed.

#include <algorithm>
#include <utility>

#include "vector.h"

namespace {

constexpr int K = 7, PAD = 3, TAPS = K * K;

struct Geometry {
  const int32_t* slot;
  const int64_t* index;
  int64_t blocks, rows, cols, channels;

  // Address in the slot map of patch t itself; neighbours are at (dr * (cols + 6) + dc) from it.
  INLINE const int32_t* at(int64_t t) const {
    const int64_t flat = index[t], image = flat / (rows * cols), r = flat / cols % rows, c = flat % cols;
    return slot + (image * (rows + 2 * PAD) + r + PAD) * (cols + 2 * PAD) + c + PAD;
  }
};

// Patches on either side that a 7-tap window can reach.
template <int S>
constexpr int REACH = (PAD + S - 1) / S;

template <int S>
INLINE int floor_div(int a) {
  return (a + S * PAD) / S - PAD;
}

// Calls f(std::integral_constant<int, d>) for d = -REACH .. REACH: column offsets are compile-time constants in f.
template <int S, class F, int... D>
INLINE void each_column(F f, std::integer_sequence<int, D...>) {
  (f(std::integral_constant<int, D - REACH<S>>{}), ...);
}
template <int S, class F>
INLINE void each_column(F f) {
  each_column<S>(f, std::make_integer_sequence<int, 2 * REACH<S> + 1>{});
}

// Whether any tap joins input column ix of the patch at column offset DC with an output column.
template <int S, int DC>
constexpr bool reaches(int ix) {
  return DC * S + ix - (S - 1) + PAD < K && DC * S + ix + PAD >= 0;
}

// Outputs of block t in channels [c, c + V * U), a row of S positions at a time in registers.
template <int S, int V, int U, class E>
INLINE void forward_block(const Geometry& g, int64_t t, int64_t c, const E* x, const float* weight, const float* bias,
                          E* out) {
  const int64_t C = g.channels, stride = g.cols + 2 * PAD;
  const int32_t* here = g.at(t);
  for (int oy = 0; oy < S; ++oy) {
    fvec<V> acc[S][U];
    UNROLL for (int ox = 0; ox < S; ++ox)
      UNROLL for (int u = 0; u < U; ++u) acc[ox][u] = bias ? load<V>(bias + c + u * V) : fvec<V>{};
    for (int ky = 0; ky < K; ++ky) {
      const int iy = oy + ky - PAD, dr = floor_div<S>(iy);
      const float* w = weight + ky * K * C + c;
      each_column<S>([&](auto column) ALWAYS_INLINE {
        constexpr int dc = decltype(column)::value;
        const int64_t n = here[dr * stride + dc];
        if (n < 0) return;
        const E* row = x + (n * S + iy - dr * S) * S * C + c;
        UNROLL for (int ix = 0; ix < S; ++ix) {
          if (!reaches<S, dc>(ix)) continue;
          UNROLL for (int u = 0; u < U; ++u) {
            const fvec<V> in = load<V>(row + ix * C + u * V);
            UNROLL for (int ox = 0; ox < S; ++ox) {
              const int kx = dc * S + ix - ox + PAD;
              if (kx >= 0 && kx < K) acc[ox][u] += in * load<V>(w + kx * C + u * V);
            }
          }
        }
      });
    }
    UNROLL for (int ox = 0; ox < S; ++ox)
      UNROLL for (int u = 0; u < U; ++u) store<V>(out + ((t * S + oy) * S + ox) * C + c + u * V, acc[ox][u]);
  }
}

// Adds to sum[50, C] the 49 taps' and the bias's gradients of blocks [begin, end) in channels [c, c + V * U), a kernel
// row of 7 taps at a time in registers. What is added is summed by itself first: one running total over all positions
// would lose digits.
template <int S, int V, int U, class E>
INLINE void weight_blocks(const Geometry& g, int64_t begin, int64_t end, int64_t c, const E* x, const E* grad,
                          float* sum) {
  const int64_t C = g.channels, stride = g.cols + 2 * PAD;
  for (int ky = 0; ky < K; ++ky) {
    fvec<V> acc[K][U] = {};
    float* const taps = sum + ky * K * C + c;
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* here = g.at(t);
      for (int oy = 0; oy < S; ++oy) {
        const int iy = oy + ky - PAD, dr = floor_div<S>(iy);
        fvec<V> go[S][U];
        UNROLL for (int ox = 0; ox < S; ++ox)
          UNROLL for (int u = 0; u < U; ++u) go[ox][u] = load<V>(grad + ((t * S + oy) * S + ox) * C + c + u * V);
        each_column<S>([&](auto column) ALWAYS_INLINE {
          constexpr int dc = decltype(column)::value;
          const int64_t n = here[dr * stride + dc];
          if (n < 0) return;
          const E* row = x + (n * S + iy - dr * S) * S * C + c;
          UNROLL for (int ix = 0; ix < S; ++ix) {
            if (!reaches<S, dc>(ix)) continue;
            UNROLL for (int u = 0; u < U; ++u) {
              const fvec<V> in = load<V>(row + ix * C + u * V);
              UNROLL for (int ox = 0; ox < S; ++ox) {
                const int kx = dc * S + ix - ox + PAD;
                if (kx >= 0 && kx < K) acc[kx][u] += in * go[ox][u];
              }
            }
          }
        });
      }
    }
    UNROLL for (int kx = 0; kx < K; ++kx)
      UNROLL for (int u = 0; u < U; ++u) {
        float* const tap = taps + kx * C + u * V;
        store<V>(tap, load<V>(tap) + acc[kx][u]);
      }
  }
  UNROLL for (int u = 0; u < U; ++u) {
    float* const bias = sum + TAPS * C + c + u * V;
    fvec<V> acc = {};
    for (int64_t i = begin * S * S; i < end * S * S; ++i) acc += load<V>(grad + i * C + c + u * V);
    store<V>(bias, load<V>(bias) + acc);
  }
}

// Vectors a chunk: enough independent sums to hide the latency of a multiply-add, few enough for the registers.
template <int S>
constexpr int FORWARD_CHUNK = S == 8 ? 1 : S == 4 ? 2 : 4;
template <int S>
constexpr int WEIGHT_CHUNK = S == 8 || WIDTH < 16 ? 1 : 2;

template <int S, class E>
void forward(const Geometry& g, const E* x, const float* weight, const float* bias, E* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < g.blocks; ++t)
    each_chunk<WIDTH, FORWARD_CHUNK<S>>(0, g.channels, [&]<int V, int U>(Chunk<V, U>, int64_t c) ALWAYS_INLINE {
      forward_block<S, V, U>(g, t, c, x, weight, bias, out);
    });
}

// Every thread sums its share of the blocks into partial[thread, 50, C]; the shares are added in a fixed order.
template <int S, class E>
void weight_gradient(const Geometry& g, const E* x, const E* grad, float* partial, float* sum, int threads) {
  constexpr int64_t TILE = 64 / (S * S);  // blocks whose sums stay in registers together
  const int64_t size = (TAPS + 1) * g.channels;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int part = 0; part < threads; ++part) {
      float* const mine = partial + part * size;
      std::fill(mine, mine + size, 0.0f);
      const int64_t last = g.blocks * (part + 1) / threads;
      for (int64_t begin = g.blocks * part / threads; begin < last; begin += TILE)
        each_chunk<WIDTH, WEIGHT_CHUNK<S>>(0, g.channels, [&]<int V, int U>(Chunk<V, U>, int64_t c) ALWAYS_INLINE {
          weight_blocks<S, V, U>(g, begin, std::min(begin + TILE, last), c, x, grad, mine);
        });
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < size; ++i) {
      float total = 0.0f;
      for (int part = 0; part < threads; ++part) total += partial[part * size + i];
      sum[i] = total;
    }
  }
}

// Calls f(std::integral_constant<int, S>) for the run-time side 8, 4, 2 or 1.
template <class F>
void with_side(int side, F f) {
  switch (side) {
    case 8: return f(std::integral_constant<int, 8>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 1: return f(std::integral_constant<int, 1>{});
  }
}

}  // namespace

// weight [49, C] and bias [C] (may be null) are float32; x and out [blocks, side, side, C] are bfloat16 where
// is_bf16, else float32. The input's gradient is the same convolution with the taps reversed and no bias.
extern "C" void sparse_fcmae_block_dwconv(const void* x, const float* weight, const float* bias, const int32_t* slot,
                                         const int64_t* index, int64_t blocks, int64_t rows, int64_t cols, int side,
                                         int64_t channels, int is_bf16, void* out, int threads) {
  const Geometry g{slot, index, blocks, rows, cols, channels};
  with_side(side, [&](auto S) {
    if (is_bf16)
      forward<S>(g, static_cast<const bf16*>(x), weight, bias, static_cast<bf16*>(out), threads);
    else
      forward<S>(g, static_cast<const float*>(x), weight, bias, static_cast<float*>(out), threads);
  });
}

// sum [50, C]: the gradients of the 49 taps, then of the bias. partial [threads, 50, C] is scratch. Both float32.
extern "C" void sparse_fcmae_block_dwconv_weight(const void* x, const void* grad, const int32_t* slot,
                                                const int64_t* index, int64_t blocks, int64_t rows, int64_t cols,
                                                int side, int64_t channels, int is_bf16, float* partial, float* sum,
                                                int threads) {
  const Geometry g{slot, index, blocks, rows, cols, channels};
  with_side(side, [&](auto S) {
    if (is_bf16)
      weight_gradient<S>(g, static_cast<const bf16*>(x), static_cast<const bf16*>(grad), partial, sum, threads);
    else
      weight_gradient<S>(g, static_cast<const float*>(x), static_cast<const float*>(grad), partial, sum, threads);
  });
}
