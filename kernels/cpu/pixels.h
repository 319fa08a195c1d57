// The pixels of one patch, in whatever type and order they are stored, as float32 in the order (row, column, channel).
//
// Normalised, a value is (pixel - mean) / deviation of its channel. There, a pixel that is not finite is missing: it counts
// as its channel's mean, which is 0, and `recorded` is 0 for it and 1 for all others.
#pragma once

#include <cmath>
#include <type_traits>
#include <vector>

#include "vector.h"

namespace {

struct half {
  uint16_t bits;
};

INLINE float as_float(half h) {
  const uint32_t magnitude = (h.bits & 0x7fffu) << 13, sign = (h.bits & 0x8000u) << 16;
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;  // the exponent's bias is 127 in place of 15
  const uint32_t finite = bit_cast<uint32_t>(scaled);
  return bit_cast<float>(((h.bits & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : finite) | sign);
}
template <class T>
INLINE T as_float(T value) {
  return value;
}

// Calls f with the pixels as what `type` says, the number of their dtype in PIXEL_DTYPES of parameters.py.
template <class F>
void with_pixel_type(const void* p, int type, F f) {
  switch (type) {
    case 0: return f(static_cast<const uint8_t*>(p));
    case 1: return f(static_cast<const uint16_t*>(p));
    case 2: return f(static_cast<const int16_t*>(p));
    case 3: return f(static_cast<const int32_t*>(p));
    case 4: return f(static_cast<const half*>(p));
    default: return f(static_cast<const float*>(p));
  }
}

// How far apart an image's neighbours are in memory, in pixels, and what an image is divided into.
struct Layout {
  int64_t image, channel, row, column, channels, side, cols, patches;

  int64_t values() const { return side * side * channels; }  // of a patch
  int64_t offset(int64_t flat) const {                       // of the patch at this flat position in [B, rows, cols]
    const int64_t place = flat % patches;
    return flat / patches * image + place / cols * side * row + place % cols * side * column;
  }
};

template <class P>
class PatchReader {
  // a float32 can't hold an int32
  using Real = std::conditional_t<std::is_same_v<P, int32_t>, double, float>;
  static constexpr bool CAN_BE_MISSING = std::is_same_v<P, half> || std::is_same_v<P, float>;

 public:
  // statistics: mean and deviation of each channel, [2, C], or null where the pixels are normalised already.
  PatchReader(const P* pixels, const Layout& layout, const double* statistics) : pixels(pixels), layout(layout) {
    if (!statistics) return;
    for (int64_t i = 0; i < layout.side * layout.channels; ++i) {
      mean.push_back(static_cast<Real>(statistics[i % layout.channels]));
      deviation.push_back(static_cast<Real>(statistics[layout.channels + i % layout.channels]));
    }
  }

  // Whether values may be missing, so that `recorded` is written.
  bool can_miss() const { return CAN_BE_MISSING && !mean.empty(); }

  // values and recorded: [side, side, channels].
  void read(int64_t flat, float* values, float* recorded) const {
    const P* const patch = pixels + layout.offset(flat);
    const int64_t line = layout.side * layout.channels;
    for (int64_t row = 0; row < layout.side; ++row) {
      const P* const from = patch + row * layout.row;
      float* const to = values + row * line;
      if (layout.channel == 1 && layout.column == layout.channels)
        read_values(from, 1, line, 0, 1, to);
      else
        for (int64_t c = 0; c < layout.channels; ++c)
          read_values(from + c * layout.channel, layout.column, layout.side, c, layout.channels, to);
      if (can_miss()) note_missing(from, to, recorded + row * line);
    }
  }

 private:
  // Of `count` pixels that are `step` apart, values that are `apart` from each other, beginning with number c of a line.
  INLINE void read_values(const P* from, int64_t step, int64_t count, int64_t c, int64_t apart, float* to) const {
    if (mean.empty())
      for (int64_t i = 0; i < count; ++i) to[c + i * apart] = static_cast<float>(as_float(from[i * step]));
    else
      for (int64_t i = 0; i < count; ++i)
        to[c + i * apart] = static_cast<float>((static_cast<Real>(as_float(from[i * step])) - mean[c + i * apart]) /
                                               deviation[c + i * apart]);
  }

  void note_missing(const P* from, float* to, float* recorded) const {
    for (int64_t x = 0; x < layout.side; ++x)
      for (int64_t c = 0; c < layout.channels; ++c) {
        const int64_t i = x * layout.channels + c;
        recorded[i] = std::isfinite(static_cast<float>(as_float(from[x * layout.column + c * layout.channel])));
        if (!std::isfinite(to[i])) to[i] = 0.0f;
      }
  }

  const P* pixels;
  Layout layout;
  std::vector<Real> mean, deviation;  // of a line of a patch
};

}  // namespace
