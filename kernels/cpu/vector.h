// Vectors of float, loaded from and stored to float32 or bfloat16, for whichever instruction set this is built for.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE inline ALWAYS_INLINE
#define UNROLL _Pragma("GCC unroll 16")

struct bf16 {
  uint16_t bits;
};

// Calls f with p as a pointer to bf16 or float.
template <class F>
INLINE void with_type(void* p, int is_bf16, F f) {
  is_bf16 ? f(static_cast<bf16*>(p)) : f(static_cast<float*>(p));
}
template <class F>
INLINE void with_type(const void* p, int is_bf16, F f) {
  is_bf16 ? f(static_cast<const bf16*>(p)) : f(static_cast<const float*>(p));
}

template <class E, int V>
struct vec {
  typedef E type __attribute__((vector_size(sizeof(E) * V)));
};
template <class E>
struct vec<E, 1> {
  typedef E type;
};
template <int V>
using fvec = typename vec<float, V>::type;
template <int V>
using uvec = typename vec<uint32_t, V>::type;
template <int V>
using hvec = typename vec<uint16_t, V>::type;

template <class To, class From>
INLINE To bit_cast(const From& from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class To, int V, class From>
INLINE To convert(From from) {
  if constexpr (V == 1)
    return static_cast<To>(from);
  else
    return __builtin_convertvector(from, To);
}

template <int V>
INLINE fvec<V> load(const float* p) {
  fvec<V> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <int V>
INLINE fvec<V> load(const bf16* p) {
  hvec<V> v;
  std::memcpy(&v, p, sizeof v);
  return bit_cast<fvec<V>>(convert<uvec<V>, V>(v) << 16);
}

template <int V>
INLINE fvec<V> load_or_zero(const float* p, int64_t c) {
  return p ? load<V>(p + c) : fvec<V>{};
}

template <int V>
INLINE void store(float* p, fvec<V> v) {
  std::memcpy(p, &v, sizeof v);
}

template <int V>
INLINE void store(bf16* p, fvec<V> v) {
#ifdef __AVX512BF16__
  if constexpr (V == 16) {
    const __m256bh h = _mm512_cvtneps_pbh(v);
    std::memcpy(p, &h, sizeof h);
    return;
  }
#endif
  const uvec<V> u = bit_cast<uvec<V>>(v);
  const uvec<V> even = u + 0x7fffu + ((u >> 16) & 1u);
  // Rounding could carry a NaN's mantissa into infinity: keep its high half and set the quiet bit instead.
  const uvec<V> rounded = (v == v) ? even : (u | 0x400000u);
  const hvec<V> h = convert<hvec<V>, V>(rounded >> 16);
  std::memcpy(p, &h, sizeof h);
}

template <int V>
INLINE float sum_lanes(fvec<V> v) {
  if constexpr (V == 1) {
    return v;
  } else {
    struct Halves {
      fvec<V / 2> low, high;
    };
    const Halves halves = bit_cast<Halves>(v);
    return sum_lanes<V / 2>(halves.low + halves.high);
  }
}

template <int V, int U>
struct Chunk {};

// Covers channels [c, C) with the widest chunks first, so that any width ends exactly: f(Chunk<V, U>, first channel).
template <int V, int U, class F>
INLINE void each_chunk(int64_t c, int64_t C, F f) {
  for (; c + V * U <= C; c += V * U) f(Chunk<V, U>{}, c);
  if (c == C) return;
  if constexpr (U > 1)
    each_chunk<V, 1>(c, C, f);
  else if constexpr (V > 4)
    each_chunk<V / 2, 1>(c, C, f);
  else if constexpr (V > 1)
    each_chunk<1, 1>(c, C, f);
}

// The sum of f(Chunk<V, 1>, first channel), a vector, over all channels.
template <class F>
INLINE float sum_channels(int64_t C, F f) {
  fvec<WIDTH> wide = {};
  float rest = 0.0f;
  each_chunk<WIDTH, 1>(0, C, [&]<int V, int U>(Chunk<V, U> chunk, int64_t c) ALWAYS_INLINE {
    if constexpr (V == WIDTH)
      wide += f(chunk, c);
    else
      rest += sum_lanes<V>(f(chunk, c));
  });
  return rest + sum_lanes<WIDTH>(wide);
}

}  // namespace
