// Vectors as wide as the instruction set at hand has them, and the small number formats, without intrinsics: GCC's and
// Clang's vector extensions become SSE2, AVX2, AVX-512 or NEON. Part of matrix.hpp.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512VNNI__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace matrices {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint16_t Shorts __attribute__((vector_size(LANES * 4)));  // two for each lane
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef int8_t SignedBytes __attribute__((vector_size(LANES)));

INLINE Floats all(float x) { return Floats{} + x; }

template <class Vector, class Scalar>
INLINE Vector load(const Scalar* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class Vector, class Scalar>
INLINE void store(Scalar* to, Vector v) {
  memcpy(to, &v, sizeof v);
}

// The same bits as another type.
template <class To, class From>
INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Keeps a vector in a register. Without this, compilers read it from memory again for each use, which costs nothing only
// where it lies within a line of the cache; the tensors of a file lie anywhere.
template <class Vector>
INLINE Vector once(Vector v) {
#if defined(__AVX2__)
  asm("" : "+v"(v));
#endif
  return v;
}

// The sum of all lanes; halving keeps it in registers, where a loop over lanes would be a chain of scalar sums.
INLINE float sum(Floats v) {
  typedef float Four __attribute__((vector_size(16)));
  Four four[LANES / 4];
  memcpy(four, &v, sizeof v);
  for (int half = LANES / 8; half; half /= 2)
    for (int i = 0; i < half; ++i) four[i] += four[i + half];
  return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

INLINE Floats largest(Floats a, Floats b) { return a > b ? a : b; }

// The largest lane, by halves too.
INLINE float largest(Floats v) {
  typedef float Four __attribute__((vector_size(16)));
  Four four[LANES / 4];
  memcpy(four, &v, sizeof v);
  for (int half = LANES / 8; half; half /= 2)
    for (int i = 0; i < half; ++i) four[i] = four[i] > four[i + half] ? four[i] : four[i + half];
  const float a = four[0][0] > four[0][2] ? four[0][0] : four[0][2], b = four[0][1] > four[0][3] ? four[0][1] : four[0][3];
  return a > b ? a : b;
}

INLINE Floats magnitude(Floats v) { return bits<Floats>(bits<Words>(v) & 0x7fffffffu); }

// bf16 is the upper half of a float.
INLINE Floats from_bf16(Halves v) { return bits<Floats>(__builtin_convertvector(v, Words) << 16); }

INLINE float from_bf16(uint16_t v) { return bits<float>(uint32_t(v) << 16); }

// To the nearest bf16, ties to even; NaN stays NaN (rounding up could make it infinite).
INLINE uint16_t to_bf16(float v) {
  uint32_t u = bits<uint32_t>(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t(u >> 16 | 0x40);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

INLINE Halves to_bf16(Floats v) {
  Words u = bits<Words>(v);
  Words rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  Words nan = bits<Words>((u & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector((nan & (u >> 16 | 0x40u)) | (~nan & rounded), Halves);
}

// Numbers from, and to, either type: a vector of them, or one.
INLINE Floats read(const float* from) { return load<Floats>(from); }
INLINE Floats read(const uint16_t* from) { return from_bf16(load<Halves>(from)); }
INLINE void write(float* to, Floats x) { store(to, x); }
INLINE void write(uint16_t* to, Floats x) {
#if defined(__AVX512BF16__)
  store(to, _mm512_cvtneps_pbh((__m512)x));
#else
  store(to, to_bf16(x));
#endif
}
INLINE float read1(const float* from) { return *from; }
INLINE float read1(const uint16_t* from) { return from_bf16(*from); }
INLINE void write1(float* to, float x) { *to = x; }
INLINE void write1(uint16_t* to, float x) { *to = to_bf16(x); }

// IEEE half precision: exponent and mantissa are shifted into a float's bits, and 2^112 corrects the exponent bias.
INLINE float from_half(uint16_t v) {
  float size = bits<float>(uint32_t(v & 0x7fff) << 13) * 0x1p112f;
  return bits<float>(bits<uint32_t>(size) | uint32_t(v & 0x8000) << 16);
}

// To the nearest whole number, ties to even, for |v| < 2^22: the sum has no bits left for a fraction. Other numbers and
// NaN give some number; unsigned, as they would overflow.
INLINE Ints nearest(Floats v) {
  const float magic = 0x1.8p23f;
  return bits<Ints>(bits<Words>(v + magic) - bits<uint32_t>(magic));
}

}  // namespace matrices
