// 7x7 depthwise convolution over visible blocks, with layer normalisation behind it if asked for; float32 or bfloat16
// storage, float32 accumulation.
//
// Features are [T, S, S, C]: T visible patches, S x S positions each (S = 8, 4, 2 or 1), channels last. `patch_to_row`
// [B, rows + 6, cols + 6] is the row in T of every patch, -1 where it is masked or outside. `row_to_patch[t]` is patch
// t's flat position in [B, rows, cols]. Masked neighbours are skipped, so only taps between visible positions are
// computed. Whole images can be computed apart: features then hold the `blocks` patches of the batch from `first` on.
//
// Built once per instruction set (see setup.py); no Python and no PyTorch header is needed.

#include <algorithm>
#include <utility>
#include <vector>

#include "layer_norm.h"
#include "vector.h"

namespace {

constexpr int WINDOW = SPARSE_FCMAE_WINDOW, HALO = WINDOW / 2, TAPS = WINDOW * WINDOW;  // see constants.py

struct Geometry {
  const int32_t* patch_to_row;
  const int64_t* row_to_patch;
  int64_t first, blocks, rows, cols, channels;

  // Address in patch_to_row of patch first + t; neighbours are at (dr * (cols + 6) + dc) from it.
  INLINE const int32_t* at(int64_t t) const {
    const int64_t flat = row_to_patch[first + t], image = flat / (rows * cols), r = flat / cols % rows, c = flat % cols;
    return patch_to_row + (image * (rows + 2 * HALO) + r + HALO) * (cols + 2 * HALO) + c + HALO;
  }
};

// Patches on either side that a 7-tap window can reach.
template <int S>
constexpr int REACH = (HALO + S - 1) / S;

template <int S>
INLINE int floor_div(int a) {
  return (a + S * HALO) / S - HALO;
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
  return DC * S + ix - (S - 1) + HALO < WINDOW && DC * S + ix + HALO >= 0;
}

// tile [S * S, C]: outputs of block t in channels [c, c + V * U), a row of S positions at a time in registers.
template <int S, int V, int U, class E>
INLINE void forward_chunk(const Geometry& g, int64_t t, int64_t c, const E* x, const float* weight, const float* bias,
                          float* tile) {
  const int64_t C = g.channels, stride = g.cols + 2 * HALO;
  const int32_t* here = g.at(t);
  for (int oy = 0; oy < S; ++oy) {
    fvec<V> acc[S][U];
    UNROLL for (int ox = 0; ox < S; ++ox)
      UNROLL for (int u = 0; u < U; ++u) acc[ox][u] = bias ? load<V>(bias + c + u * V) : fvec<V>{};
    for (int ky = 0; ky < WINDOW; ++ky) {
      const int iy = oy + ky - HALO, dr = floor_div<S>(iy);
      const float* w = weight + ky * WINDOW * C + c;
      each_column<S>([&](auto column) ALWAYS_INLINE {
        constexpr int dc = decltype(column)::value;
        const int32_t neighbour = here[dr * stride + dc];
        if (neighbour < 0) return;
        const E* row = x + ((neighbour - g.first) * S + iy - dr * S) * S * C + c;
        UNROLL for (int ix = 0; ix < S; ++ix) {
          if (!reaches<S, dc>(ix)) continue;
          UNROLL for (int u = 0; u < U; ++u) {
            const fvec<V> in = load<V>(row + ix * C + u * V);
            UNROLL for (int ox = 0; ox < S; ++ox) {
              const int kx = dc * S + ix - ox + HALO;
              if (kx >= 0 && kx < WINDOW) acc[ox][u] += in * load<V>(w + kx * C + u * V);
            }
          }
        }
      });
    }
    UNROLL for (int ox = 0; ox < S; ++ox)
      UNROLL for (int u = 0; u < U; ++u) store<V>(tile + (oy * S + ox) * C + c + u * V, acc[ox][u]);
  }
}

// Adds to sum[50, C] the 49 taps' and the bias's gradients of blocks [begin, end) in channels [c, c + V * U), a kernel
// row of 7 taps at a time in registers. What is added is summed by itself first: one running total over all positions
// would lose digits.
template <int S, int V, int U, class E>
INLINE void weight_chunk(const Geometry& g, int64_t begin, int64_t end, int64_t c, const E* x, const float* grad,
                         float* sum) {
  const int64_t C = g.channels, stride = g.cols + 2 * HALO;
  for (int ky = 0; ky < WINDOW; ++ky) {
    fvec<V> acc[WINDOW][U] = {};
    float* const taps = sum + ky * WINDOW * C + c;
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* here = g.at(t);
      for (int oy = 0; oy < S; ++oy) {
        const int iy = oy + ky - HALO, dr = floor_div<S>(iy);
        fvec<V> go[S][U];
        UNROLL for (int ox = 0; ox < S; ++ox)
          UNROLL for (int u = 0; u < U; ++u) go[ox][u] = load<V>(grad + ((t * S + oy) * S + ox) * C + c + u * V);
        each_column<S>([&](auto column) ALWAYS_INLINE {
          constexpr int dc = decltype(column)::value;
          const int32_t neighbour = here[dr * stride + dc];
          if (neighbour < 0) return;
          const E* row = x + ((neighbour - g.first) * S + iy - dr * S) * S * C + c;
          UNROLL for (int ix = 0; ix < S; ++ix) {
            if (!reaches<S, dc>(ix)) continue;
            UNROLL for (int u = 0; u < U; ++u) {
              const fvec<V> in = load<V>(row + ix * C + u * V);
              UNROLL for (int ox = 0; ox < S; ++ox) {
                const int kx = dc * S + ix - ox + HALO;
                if (kx >= 0 && kx < WINDOW) acc[kx][u] += in * go[ox][u];
              }
            }
          }
        });
      }
    }
    UNROLL for (int kx = 0; kx < WINDOW; ++kx)
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
void forward_block(const Geometry& g, int64_t t, const E* x, const float* weight, const float* bias, float* tile) {
  each_chunk<WIDTH, FORWARD_CHUNK<S>>(0, g.channels, [&]<int V, int U>(Chunk<V, U>, int64_t c) ALWAYS_INLINE {
    forward_chunk<S, V, U>(g, t, c, x, weight, bias, tile);
  });
}

// Blocks ahead of the one at work that are fetched: its neighbours in the next row of patches are a few further on.
constexpr int64_t AHEAD = 8;

template <class E>
INLINE void prefetch(const E* p, int64_t size) {
  for (int64_t i = 0; i < size; i += 64 / sizeof(E)) __builtin_prefetch(p + i);
}

struct Norm {
  const float *weight, *bias;
};

template <class O>
void finish(const float* tile, int64_t positions, int64_t C, const Norm& norm, const O* residual, O* out) {
  if (norm.weight) {
    for (int64_t i = 0; i < positions; ++i) normalise(tile + i * C, norm.weight, norm.bias, C, out + i * C);
  } else {
    each_chunk<WIDTH, 1>(0, positions * C, [&]<int V>(Chunk<V, 1>, int64_t i) ALWAYS_INLINE {
      const fvec<V> a = load<V>(tile + i);
      store<V>(out + i, residual ? load<V>(residual + i) + a : a);
    });
  }
}

template <int S, class E, class O>
void forward(const Geometry& g, const E* x, const float* weight, const float* bias, const Norm& norm, const O* residual,
             float* convolved, O* out, int threads) {
  const int64_t size = S * S * g.channels;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scratch(convolved ? 0 : size);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < g.blocks; ++t) {
      prefetch(x + std::min(t + AHEAD, g.blocks - 1) * size, size);
      float* const tile = convolved ? convolved + t * size : scratch.data();
      forward_block<S>(g, t, x, weight, bias, tile);
      finish(tile, S * S, g.channels, norm, residual ? residual + t * size : nullptr, out + t * size);
    }
  }
}

// Every thread adds its share of the blocks to its own sums[50, C].
template <int S, class E>
void weight_gradient(const Geometry& g, const E* x, const float* grad, float* sums, int threads) {
  constexpr int64_t TILE = 64 / (S * S);  // blocks whose sums stay in registers together
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int part = 0; part < threads; ++part) {
    float* const own_sums = sums + part * (TAPS + 1) * g.channels;
    const int64_t last = g.blocks * (part + 1) / threads;
    for (int64_t begin = g.blocks * part / threads; begin < last; begin += TILE)
      each_chunk<WIDTH, WEIGHT_CHUNK<S>>(0, g.channels, [&]<int V, int U>(Chunk<V, U>, int64_t c) ALWAYS_INLINE {
        weight_chunk<S, V, U>(g, begin, std::min(begin + TILE, last), c, x, grad, own_sums);
      });
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

// x is bfloat16 where x_is_bf16, else float32; out and residual (may be null) where out_is_bf16; all else is float32:
// weight [49, C], bias [C] (may be null). Without norm_weight, out = convolution + residual; with it, out is the
// normalised convolution, and the convolution itself is left in `convolved`, unless that is null. The gradient of the
// input is the same convolution with the taps reversed and no bias.
extern "C" void sparse_fcmae_block_dwconv(const void* x, int x_is_bf16, const float* weight, const float* bias,
                                         const float* norm_weight, const float* norm_bias, const void* residual,
                                         const int32_t* patch_to_row, const int64_t* row_to_patch, int64_t first,
                                         int64_t blocks, int64_t rows, int64_t cols, int side, int64_t channels,
                                         float* convolved, void* out, int out_is_bf16, int threads) {
  const Geometry g{patch_to_row, row_to_patch, first, blocks, rows, cols, channels};
  const Norm norm{norm_weight, norm_bias};
  with_side(side, [&](auto S) {
    with_type(x, x_is_bf16, [&](auto* x) {
      with_type(out, out_is_bf16, [&]<class O>(O* out) {
        forward<S>(g, x, weight, bias, norm, static_cast<const O*>(residual), convolved, out, threads);
      });
    });
  });
}

// Adds to sums [threads, 50, C]: over the threads, the gradients of the 49 taps, then of the bias. grad is float32.
extern "C" void sparse_fcmae_block_dwconv_weight(const void* x, int x_is_bf16, const float* grad,
                                                const int32_t* patch_to_row, const int64_t* row_to_patch, int64_t first,
                                                int64_t blocks, int64_t rows, int64_t cols, int side, int64_t channels,
                                                float* sums, int threads) {
  const Geometry g{patch_to_row, row_to_patch, first, blocks, rows, cols, channels};
  with_side(side, [&](auto S) {
    with_type(x, x_is_bf16, [&](auto* x) { weight_gradient<S>(g, x, grad, sums, threads); });
  });
}
