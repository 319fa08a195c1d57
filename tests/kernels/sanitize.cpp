// Runs every kernel on odd shapes, in memory that ends where the data ends: `make test-sanitize` builds this without torch
// and with the address and undefined-behaviour sanitizers. Results start as NaN and have to end as numbers.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

extern "C" {
void sparse_fcmae_block_dwconv(const void*, int, const float*, const float*, const float*, const float*, const void*,
                               const int32_t*, const int64_t*, int64_t, int64_t, int64_t, int64_t, int, int64_t, float*,
                               void*, int, int);
void sparse_fcmae_block_dwconv_weight(const void*, int, const float*, const int32_t*, const int64_t*, int64_t, int64_t,
                                      int64_t, int64_t, int, int64_t, float*, int);
void sparse_fcmae_layer_norm(const void*, int, const float*, const float*, int64_t, int, int64_t, int, void*, int, int);
void sparse_fcmae_layer_norm_backward(const void*, int, const void*, int, const float*, int64_t, int, int64_t, int,
                                      void*, float*, int);
void sparse_fcmae_gelu_grn(const void*, int, const float*, const float*, const float*, const int64_t*, int64_t, int64_t,
                           void*, float*, int);
void sparse_fcmae_gelu_grn_backward(const void*, const void*, int, const float*, const float*, const float*,
                                    const int64_t*, const float*, int64_t, int64_t, void*, void*, void*, float*, float*,
                                    float*, int);
void sparse_fcmae_patch_errors(const void*, int, const int64_t*, const double*, const int64_t*, int64_t, int,
                               const void*, int, float*, int);
void sparse_fcmae_patch_errors_backward(const float*, const void*, int, const int64_t*, const double*, const int64_t*,
                                        int64_t, int, const void*, int, void*, int);
void sparse_fcmae_patch_windows(const void*, int, const int64_t*, const double*, const int64_t*, int64_t, int64_t, void*,
                                int, int);
int sparse_fcmae_abi();
int sparse_fcmae_one_mask(const int32_t*, const int64_t*, int64_t, int64_t, int64_t, int64_t, const int64_t*, int64_t, int);
}

namespace {

// as in the kernels that are tested, by the same flag (see kernels/constants.py)
constexpr int64_t WINDOW = SPARSE_FCMAE_WINDOW, HALO = WINDOW / 2, TAPS = WINDOW * WINDOW;

// `size` numbers in float32 or bfloat16, in a heap block of exactly their size.
struct Numbers {
  std::unique_ptr<char[]> memory;
  int64_t size;
  int is_bf16;

  Numbers(int64_t size, int is_bf16, bool poisoned) : memory(new char[size * width(is_bf16)]), size(size), is_bf16(is_bf16) {
    for (int64_t i = 0; i < size; ++i)
      set(i, poisoned ? std::numeric_limits<float>::quiet_NaN() : 4.0f * std::rand() / RAND_MAX - 2.0f);
  }
  static int64_t width(int is_bf16) { return is_bf16 ? 2 : 4; }
  void set(int64_t i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (is_bf16) bits >>= 16;
    std::memcpy(memory.get() + i * width(is_bf16), &bits, width(is_bf16));
  }
  float get(int64_t i) const {
    uint32_t bits = 0;
    std::memcpy(&bits, memory.get() + i * width(is_bf16), width(is_bf16));
    if (is_bf16) bits <<= 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  float* floats() { return reinterpret_cast<float*>(memory.get()); }
  void* data() { return memory.get(); }
};

Numbers random(int64_t size, int is_bf16 = 0) { return {size, is_bf16, false}; }
Numbers poisoned(int64_t size, int is_bf16 = 0) { return {size, is_bf16, true}; }
Numbers zeros(int64_t size) {
  Numbers n{size, 0, false};
  for (int64_t i = 0; i < size; ++i) n.set(i, 0.0f);
  return n;
}

void require_numbers(const Numbers& n, const char* what) {
  for (int64_t i = 0; i < n.size; ++i)
    if (!std::isfinite(n.get(i))) {
      std::fprintf(stderr, "%s: element %ld of %ld was not written\n", what, long(i), long(n.size));
      std::exit(1);
    }
}

// Three images of rows x cols patches, the first of them with none visible.
struct Visible {
  int64_t rows, cols;
  std::vector<int32_t> patch_to_row;
  std::vector<int64_t> row_to_patch, offsets{0};

  Visible(int64_t rows, int64_t cols)
      : rows(rows), cols(cols), patch_to_row(3 * (rows + 2 * HALO) * (cols + 2 * HALO), -1) {
    for (int64_t b = 0; b < 3; ++b) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < cols; ++c)
          if (b && (b == 2 || std::rand() % 5 < 2)) {
            patch_to_row[(b * (rows + 2 * HALO) + r + HALO) * (cols + 2 * HALO) + c + HALO] = row_to_patch.size();
            row_to_patch.push_back((b * rows + r) * cols + c);
          }
      offsets.push_back(row_to_patch.size());
    }
  }
};

void run(int side, int64_t channels, int is_bf16, int threads) {
  const Visible v(3, 2);
  const int64_t blocks = v.row_to_patch.size(), first = v.offsets[2], positions = blocks * side * side;
  if (!sparse_fcmae_one_mask(v.patch_to_row.data(), v.row_to_patch.data(), 3, v.rows, v.cols, blocks, v.offsets.data(), 4,
                             threads)) {
    std::fputs("one_mask refuses a mask\n", stderr);
    std::exit(1);
  }
  auto taps = random(TAPS * channels), bias = random(channels), weight = random(channels), shift = random(channels);

  auto x = random(positions * channels, is_bf16), residual = random(positions * channels, is_bf16);
  auto convolved = poisoned(positions * channels), out = poisoned(positions * channels, is_bf16);
  sparse_fcmae_block_dwconv(x.data(), is_bf16, taps.floats(), bias.floats(), weight.floats(), shift.floats(), nullptr,
                            v.patch_to_row.data(), v.row_to_patch.data(), 0, blocks, v.rows, v.cols, side, channels,
                            convolved.floats(), out.data(), is_bf16, threads);
  require_numbers(convolved, "block_dwconv's convolution");
  require_numbers(out, "block_dwconv with norm");

  // the last image apart, so that what lies before it is out of bounds
  const int64_t part = (blocks - first) * side * side * channels;
  auto x_part = random(part, is_bf16), residual_part = random(part, is_bf16), out_part = poisoned(part, is_bf16);
  sparse_fcmae_block_dwconv(x_part.data(), is_bf16, taps.floats(), nullptr, nullptr, nullptr, residual_part.data(),
                            v.patch_to_row.data(), v.row_to_patch.data(), first, blocks - first, v.rows, v.cols, side,
                            channels, nullptr, out_part.data(), is_bf16, threads);
  require_numbers(out_part, "block_dwconv of one image");

  auto grad = random(positions * channels), sums = zeros(threads * (TAPS + 1) * channels);
  sparse_fcmae_block_dwconv_weight(x.data(), is_bf16, grad.floats(), v.patch_to_row.data(),
                                   v.row_to_patch.data(), 0, blocks, v.rows, v.cols, side, channels, sums.floats(), threads);
  require_numbers(sums, "block_dwconv_weight");

  for (int tile = 1; tile <= 2 && side % tile == 0; ++tile) {
    auto tiles = poisoned(positions * channels, !is_bf16), grad_x = poisoned(positions * channels, is_bf16);
    auto norm_sums = zeros(threads * 2 * channels);
    sparse_fcmae_layer_norm(x.data(), is_bf16, weight.floats(), shift.floats(), blocks, side, channels, tile,
                            tiles.data(), !is_bf16, threads);
    require_numbers(tiles, "layer_norm");
    sparse_fcmae_layer_norm_backward(x.data(), is_bf16, tiles.data(), !is_bf16, weight.floats(), blocks, side, channels,
                                     tile, grad_x.data(), norm_sums.floats(), threads);
    require_numbers(grad_x, "layer_norm_backward");
    require_numbers(norm_sums, "layer_norm_backward's sums");
  }

  std::vector<int64_t> offsets;
  for (int64_t patches : v.offsets) offsets.push_back(patches * side * side);
  auto norm = poisoned(3 * channels), hidden = poisoned(positions * channels, is_bf16);
  auto derivative = poisoned(positions * channels, is_bf16), grad_h = random(positions * channels, is_bf16);
  auto wide_sums = zeros(3 * channels);
  sparse_fcmae_gelu_grn(x.data(), is_bf16, bias.floats(), weight.floats(), shift.floats(), offsets.data(), 3, channels,
                        hidden.data(), norm.floats(), threads);
  require_numbers(hidden, "gelu_grn");
  require_numbers(norm, "gelu_grn's norm");
  sparse_fcmae_gelu_grn_backward(grad_h.data(), x.data(), is_bf16, nullptr, weight.floats(), nullptr, offsets.data(),
                                 norm.floats(), 3, channels, grad_h.data(), hidden.data(), derivative.data(),
                                 wide_sums.floats(), wide_sums.floats() + channels, wide_sums.floats() + 2 * channels,
                                 threads);
  require_numbers(grad_h, "gelu_grn_backward");
  require_numbers(wide_sums, "gelu_grn_backward's sums");
}

// Two images of 2 x 3 patches, 8 k pixels a side, in a type of so many bytes, of any bits, with channels last or first.
void run_on_pixels(int type, int64_t k, int64_t channels, bool channels_last, int is_bf16, int threads) {
  constexpr int64_t BYTES[] = {1, 2, 2, 4, 2, 4}, ROWS = 2, COLS = 3;
  const int64_t side = 8 * k, height = ROWS * side, width = COLS * side, size = channels * height * width;
  std::unique_ptr<char[]> pixels(new char[2 * size * BYTES[type]]);
  for (int64_t i = 0; i < 2 * size * BYTES[type]; ++i) pixels[i] = std::rand();
  std::vector<int64_t> layout{size, channels_last ? 1 : height * width, channels_last ? width * channels : width,
                              channels_last ? channels : 1, channels, side, COLS, ROWS * COLS};
  std::vector<double> statistics;
  for (int64_t i = 0; i < 2 * channels; ++i) statistics.push_back(1e9 + i);
  const std::vector<int64_t> rows{0, 2, 3, 11};
  const int64_t patches = rows.size(), values = patches * side * side * channels;

  auto windows = poisoned(values, is_bf16);
  sparse_fcmae_patch_windows(pixels.get(), type, layout.data(), statistics.data(), rows.data(), patches, k, windows.data(),
                             is_bf16, threads);
  require_numbers(windows, "patch_windows");

  auto prediction = random(values, is_bf16), grad = poisoned(values, is_bf16);
  auto errors = poisoned(patches), grad_errors = random(patches);
  for (int normalised : {0, 1}) {
    sparse_fcmae_patch_errors(pixels.get(), type, layout.data(), statistics.data(), rows.data(), patches, normalised,
                              prediction.data(), is_bf16, errors.floats(), threads);
    sparse_fcmae_patch_errors_backward(grad_errors.floats(), pixels.get(), type, layout.data(), statistics.data(),
                                       rows.data(), patches, normalised, prediction.data(), is_bf16, grad.data(), threads);
    if (type == 5) continue;  // bits at random may be numbers whose square no float32 can hold
    require_numbers(errors, "patch_errors");
    require_numbers(grad, "patch_errors_backward");
  }
}

}  // namespace

int main() {
  if (!sparse_fcmae_abi()) return 0;
  for (int side : {8, 4, 2, 1})
    for (int64_t channels : {1, 3, 4, 7, 16, 31, 40, 67, 130})
      for (int is_bf16 : {0, 1})
        for (int threads : {1, 2, 5}) run(side, channels, is_bf16, threads);
  for (int type = 0; type < 6; ++type)
    for (int64_t k : {1, 2, 4})
      for (int64_t channels : {1, 3, 13})
        for (bool channels_last : {true, false})
          for (int is_bf16 : {0, 1})
            for (int threads : {1, 5}) run_on_pixels(type, k, channels, channels_last, is_bf16, threads);
  std::puts("clean");
}
