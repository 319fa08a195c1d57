// Whether patch_to_row and row_to_patch (see block_dwconv.cpp) describe one mask, so that no kernel can be led out of
// bounds by them.

#include <cstdint>

// offsets [count], which ascend from 0 to `blocks`, or null: whether none of them divides the patches of an image.
extern "C" int sparse_fcmae_one_mask(const int32_t* patch_to_row, const int64_t* row_to_patch, int64_t images,
                                    int64_t rows, int64_t cols, int64_t blocks, const int64_t* offsets, int64_t count,
                                    int) {
  constexpr int64_t HALO = SPARSE_FCMAE_WINDOW / 2;  // the width of the border of patch_to_row, see constants.py
  const int64_t area = rows * cols, size = images * (rows + 2 * HALO) * (cols + 2 * HALO);
  int64_t visible = 0;
  for (int64_t i = 0; i < size; ++i) visible += patch_to_row[i] >= 0;
  if (visible != blocks) return false;
  for (int64_t t = 0; t < blocks; ++t) {
    const int64_t flat = row_to_patch[t];
    if (flat < (t ? row_to_patch[t - 1] + 1 : 0) || flat >= images * area) return false;
    const int64_t row = flat / area * (rows + 2 * HALO) + flat / cols % rows + HALO;
    if (patch_to_row[row * (cols + 2 * HALO) + flat % cols + HALO] != t) return false;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = offsets[i];
    if (t > 0 && t < blocks && row_to_patch[t - 1] / area == row_to_patch[t] / area) return false;
  }
  return true;
}
