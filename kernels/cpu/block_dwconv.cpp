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

// The visible patches that a patch sees, by their column offsets. They are found once for all rows and channels: which
// patches are visible is as good as random, so that each question is a branch that no processor foresees. With one
// position a patch the column offset needs not be known when the code is compiled, and one list has them all.
template <int S, class E>
struct Neighbours {
  static constexpr int SPAN = 2 * REACH<S> + 1, COLUMNS = S == 1 ? 1 : SPAN;

  struct Neighbour {
    const E* x;  // its first row of positions
    int dr, dc;
  } list[COLUMNS][SPAN * SPAN / COLUMNS + 1];  // with room for one that is written behind all others, and not kept
  int count[COLUMNS] = {};

  INLINE void look(const Geometry& g, int64_t t, const E* x) {
    const int32_t* const here = g.at(t);
    for (int dr = -REACH<S>; dr <= REACH<S>; ++dr)
      UNROLL for (int dc = -REACH<S>; dc <= REACH<S>; ++dc) {
        const int32_t row = here[dr * (g.cols + 2 * HALO) + dc];
        const int column = S == 1 ? 0 : dc + REACH<S>;
        // written in any case, and kept if it is visible
        list[column][count[column]] = {x + std::max<int64_t>(row - g.first, 0) * S * S * g.channels, dr, dc};
        count[column] += row >= 0;
      }
  }
};

// tile [S, C]: the row oy of a patch's outputs in channels [c, c + V * U), in registers.
template <int S, int V, int U, class E>
INLINE void forward_chunk(const Neighbours<S, E>& visible, int oy, int64_t C, int64_t c, const float* weight,
                          const float* bias, float* tile) {
  fvec<V> acc[S][U];
  UNROLL for (int ox = 0; ox < S; ++ox)
    UNROLL for (int u = 0; u < U; ++u) acc[ox][u] = bias ? load<V>(bias + c + u * V) : fvec<V>{};
  each_column<S>([&](auto column) ALWAYS_INLINE {
    constexpr int DC = decltype(column)::value;
    if constexpr (S == 1 && DC != 0) return;
    constexpr int place = S == 1 ? 0 : DC + REACH<S>;
    for (int i = 0; i < visible.count[place]; ++i) {
      const auto& neighbour = visible.list[place][i];
      const int down = neighbour.dr * S - oy + HALO;  // the window's row in which the neighbour's first row is
      const int first = S == 1 ? 0 : std::max(0, -down), last = S == 1 ? 1 : std::min(S, WINDOW - down);
      for (int iy = first; iy < last; ++iy) {
        const E* const row = neighbour.x + iy * S * C + c;
        const float* const w = weight + ((down + iy) * WINDOW + (S == 1 ? neighbour.dc : 0)) * C + c;
        UNROLL for (int ix = 0; ix < S; ++ix) {
          if (!reaches<S, DC>(ix)) continue;
          UNROLL for (int u = 0; u < U; ++u) {
            const fvec<V> in = load<V>(row + ix * C + u * V);
            UNROLL for (int ox = 0; ox < S; ++ox) {
              const int kx = DC * S + ix - ox + HALO;
              if (kx >= 0 && kx < WINDOW) acc[ox][u] += in * load<V>(w + kx * C + u * V);
            }
          }
        }
      }
    }
  });
  UNROLL for (int ox = 0; ox < S; ++ox)
    UNROLL for (int u = 0; u < U; ++u) store<V>(tile + ox * C + c + u * V, acc[ox][u]);
}

// What one row of the window joins in a few blocks: visible rows of input positions, each with a row of gradients.
template <int S>
constexpr int TILE = 64 / (S * S);  // blocks whose sums stay in registers together

template <class E>
struct Pair {
  const E* x;
  const float* grad;
};

template <int S, class E>
struct Pairs {
  Pair<E> pair[2 * REACH<S> + 1][TILE<S> * S + 1];  // with room for one that is not kept, as above
  int count[2 * REACH<S> + 1];

  // at: the addresses of blocks [begin, end) in patch_to_row.
  INLINE void look(const Geometry& g, const int32_t* const* at, int64_t begin, int64_t end, int ky, const E* x,
                   const float* grad) {
    const int64_t C = g.channels, stride = g.cols + 2 * HALO;
    for (int& number : count) number = 0;
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* const here = at[t - begin];
      for (int oy = 0; oy < S; ++oy) {
        const int iy = oy + ky - HALO, dr = floor_div<S>(iy);
        UNROLL for (int dc = -REACH<S>; dc <= REACH<S>; ++dc) {
          const int32_t neighbour = here[dr * stride + dc];
          const int64_t row = (std::max<int64_t>(neighbour - g.first, 0) * S + iy - dr * S) * S;
          pair[dc + REACH<S>][count[dc + REACH<S>]] = {x + row * C, grad + (t * S + oy) * S * C};
          count[dc + REACH<S>] += neighbour >= 0;
        }
      }
    }
  }
};

// Adds to taps [7, C] the gradients of a row of the window in channels [c, c + V * U). What is added is summed by itself
// first: one running total over all positions would lose digits.
template <int S, int V, int U, class E>
INLINE void weight_chunk(const Pairs<S, E>& pairs, int64_t C, int64_t c, float* taps) {
  fvec<V> acc[WINDOW][U] = {};
  each_column<S>([&](auto column) ALWAYS_INLINE {
    constexpr int dc = decltype(column)::value;
    for (int i = 0; i < pairs.count[dc + REACH<S>]; ++i) {
      const E* const row = pairs.pair[dc + REACH<S>][i].x + c;
      const float* const go = pairs.pair[dc + REACH<S>][i].grad + c;
      UNROLL for (int ix = 0; ix < S; ++ix) {
        if (!reaches<S, dc>(ix)) continue;
        UNROLL for (int u = 0; u < U; ++u) {
          const fvec<V> in = load<V>(row + ix * C + u * V);
          UNROLL for (int ox = 0; ox < S; ++ox) {
            const int kx = dc * S + ix - ox + HALO;
            if (kx >= 0 && kx < WINDOW) acc[kx][u] += in * load<V>(go + ox * C + u * V);
          }
        }
      }
    }
  });
  UNROLL for (int kx = 0; kx < WINDOW; ++kx)
    UNROLL for (int u = 0; u < U; ++u) {
      float* const tap = taps + kx * C + c + u * V;
      store<V>(tap, load<V>(tap) + acc[kx][u]);
    }
}

// Adds to bias [C] the gradients of blocks [begin, end), summed by themselves first.
template <int S>
void bias_gradient(int64_t begin, int64_t end, int64_t C, const float* grad, float* bias) {
  each_chunk<WIDTH, 1>(0, C, [&]<int V>(Chunk<V, 1>, int64_t c) ALWAYS_INLINE {
    fvec<V> acc = {};
    for (int64_t i = begin * S * S; i < end * S * S; ++i) acc += load<V>(grad + i * C + c);
    store<V>(bias + c, load<V>(bias + c) + acc);
  });
}

// Vectors a chunk: enough independent sums to hide the latency of a multiply-add, few enough for the registers.
template <int S>
constexpr int FORWARD_CHUNK = S == 8 ? 1 : S == 4 ? 2 : 4;
template <int S>
constexpr int WEIGHT_CHUNK = S == 8 || WIDTH < 16 ? 1 : 2;

// Blocks whose outputs are computed together, so that a chunk's weights are read for all of them from the first cache.
template <int S>
constexpr int GROUP = S == 8 ? 1 : S == 4 ? 2 : S == 2 ? 8 : 16;

// tile: the outputs of blocks [begin, end).
template <int S, class E>
void forward_group(const Geometry& g, int64_t begin, int64_t end, const E* x, const float* weight, const float* bias,
                   float* tile) {
  const int64_t C = g.channels;
  Neighbours<S, E> visible[GROUP<S>];
  for (int64_t t = begin; t < end; ++t) visible[t - begin].look(g, t, x);
  each_chunk<WIDTH, FORWARD_CHUNK<S>>(0, C, [&]<int V, int U>(Chunk<V, U>, int64_t c) ALWAYS_INLINE {
    for (int64_t row = 0; row < (end - begin) * S; ++row)
      forward_chunk<S, V, U>(visible[row / S], row % S, C, c, weight, bias, tile + row * S * C);
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
    std::vector<float> scratch(convolved ? 0 : GROUP<S> * size);
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < g.blocks; begin += GROUP<S>) {
      const int64_t end = std::min(begin + GROUP<S>, g.blocks);
      prefetch(x + std::min(begin + AHEAD, g.blocks - 1) * size, size);
      float* const tile = convolved ? convolved + begin * size : scratch.data();
      forward_group<S>(g, begin, end, x, weight, bias, tile);
      finish(tile, (end - begin) * S * S, g.channels, norm, residual ? residual + begin * size : nullptr,
             out + begin * size);
    }
  }
}

// Every thread adds its share of the blocks to its own sums[50, C].
template <int S, class E>
void weight_gradient(const Geometry& g, const E* x, const float* grad, float* sums, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int part = 0; part < threads; ++part) {
    float* const own_sums = sums + part * (TAPS + 1) * g.channels;
    const int64_t last = g.blocks * (part + 1) / threads;
    Pairs<S, E> pairs;
    for (int64_t begin = g.blocks * part / threads; begin < last; begin += TILE<S>) {
      const int64_t end = std::min(begin + TILE<S>, last);
      const int32_t* at[TILE<S>];
      for (int64_t t = begin; t < end; ++t) at[t - begin] = g.at(t);
      for (int ky = 0; ky < WINDOW; ++ky) {
        pairs.look(g, at, begin, end, ky, x, grad);
        each_chunk<WIDTH, WEIGHT_CHUNK<S>>(0, g.channels, [&]<int V, int U>(Chunk<V, U>, int64_t c) ALWAYS_INLINE {
          weight_chunk<S, V, U>(pairs, g.channels, c, own_sums + ky * WINDOW * g.channels);
        });
      }
      bias_gradient<S>(begin, end, g.channels, grad, own_sums + TAPS * g.channels);
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
