// Layer normalisation over the channels of blocks [blocks, side, side, C], whose result is laid out in tiles
// [blocks, side / tile, side / tile, tile, tile, C]: one row for each window of a tile x tile convolution of that stride.

#include "layer_norm.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t RUN = 64;  // positions whose sums are taken by themselves: one running total would lose digits

struct Tiles {
  int64_t side, tile;

  // Where position i of the blocks is found in the tiles.
  INLINE int64_t operator()(int64_t i) const {
    const int64_t block = i / (side * side), row = i / side % side, column = i % side;
    const int64_t window = (block * (side / tile) + row / tile) * (side / tile) + column / tile;
    return (window * tile + row % tile) * tile + column % tile;
  }
};

template <class E, class O>
void forward(const E* x, const float* weight, const float* bias, const Tiles& tiles, int64_t positions, int64_t C,
             O* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < positions; ++i) normalise(x + i * C, weight, bias, C, out + tiles(i) * C);
}

template <class E, class G>
void backward(const E* x, const G* grad, const float* weight, const Tiles& tiles, int64_t positions, int64_t C,
              E* grad_x, float* sums, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> run(2 * C);
#pragma omp for schedule(static)
    for (int part = 0; part < threads; ++part) {
      float* const own_sums = sums + part * 2 * C;
      const int64_t last = positions * (part + 1) / threads;
      for (int64_t begin = positions * part / threads; begin < last; begin += RUN) {
        std::fill(run.begin(), run.end(), 0.0f);
        for (int64_t i = begin; i < std::min(begin + RUN, last); ++i)
          normalise_backward(x + i * C, grad + tiles(i) * C, weight, C, grad_x + i * C, run.data(), run.data() + C);
        for (int64_t c = 0; c < 2 * C; ++c) own_sums[c] += run[c];
      }
    }
  }
}

}  // namespace

// x is bfloat16 where x_is_bf16, out where out_is_bf16, both else float32; weight and bias [C] are float32.
extern "C" void sparse_fcmae_layer_norm(const void* x, int x_is_bf16, const float* weight, const float* bias,
                                       int64_t blocks, int side, int64_t channels, int tile, void* out, int out_is_bf16,
                                       int threads) {
  with_type(x, x_is_bf16, [&](auto* x) {
    with_type(out, out_is_bf16, [&](auto* out) {
      forward(x, weight, bias, Tiles{side, tile}, blocks * side * side, channels, out, threads);
    });
  });
}

// grad_x is as x, and may be x; grad as out. Adds to sums [threads, 2, C]: over the threads, the gradients of weight and
// bias.
extern "C" void sparse_fcmae_layer_norm_backward(const void* x, int x_is_bf16, const void* grad, int grad_is_bf16,
                                                const float* weight, int64_t blocks, int side, int64_t channels,
                                                int tile, void* grad_x, float* sums, int threads) {
  with_type(x, x_is_bf16, [&]<class E>(const E* x) {
    with_type(grad, grad_is_bf16, [&](auto* grad) {
      backward(x, grad, weight, Tiles{side, tile}, blocks * side * side, channels, static_cast<E*>(grad_x), sums,
               threads);
    });
  });
}
