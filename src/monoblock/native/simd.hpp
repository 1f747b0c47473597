// Vector types of the target's register width, and conversions of bf16 and fp16, without intrinsics: the vector extensions
// of GCC and Clang compile to SSE2, AVX2, AVX-512 or NEON. Part of matrix.hpp.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__ARM_FEATURE_SVE_BITS) && __ARM_FEATURE_SVE_BITS == 256
#include <arm_sve.h>
#define MB_SVE
#endif

// Dot products of 8-bit integers, and of pairs of bf16; with each goes a GEMM for many rows of inputs.
#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
#define MB_INT8_DOT
#endif
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define MB_BF16_DOT
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace matrices {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__) || defined(MB_SVE)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// Vector registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint16_t Shorts __attribute__((vector_size(LANES * 4)));  // two per 32-bit lane
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef int8_t SignedBytes __attribute__((vector_size(LANES)));
typedef int16_t HalfInts __attribute__((vector_size(LANES * 2)));

INLINE Floats all(float x) { return x - Floats{}; }  // no arithmetic: x - 0 is x, also for the bits of two bf16

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

// Bit cast.
template <class To, class From>
INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "types of equal size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace matrices

#if defined(__aarch64__)
#include "arm_simd.hpp"
#endif

namespace matrices {

// Conversions between sizes of integers. GCC 12 compiles them to several instructions, or goes through the lanes one by one.
INLINE Words widen(Bytes v) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu8_epi32((__m128i)v);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)v));
#elif defined(__aarch64__)
  return arm::widen(v);
#else
  return __builtin_convertvector(v, Words);
#endif
}

INLINE Words widen(Halves v) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)v);
#elif defined(__aarch64__)
  return arm::widen(v);
#else
  return __builtin_convertvector(v, Words);
#endif
}

INLINE HalfInts widen_to_16(Bytes v) {
#if defined(__AVX512BW__)
  return (HalfInts)_mm256_cvtepu8_epi16((__m128i)v);
#elif defined(__AVX2__)
  return (HalfInts)_mm_cvtepu8_epi16(_mm_cvtsi64_si128((int64_t)v));
#else
  return __builtin_convertvector(v, HalfInts);
#endif
}

// Integers that fit as bytes or 16 bits.
INLINE void store_narrow(int8_t* to, Ints v) {
#if defined(__AVX512F__)
  store(to, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packs_epi16(words, words));
#elif defined(__aarch64__)
  arm::store_narrow(to, v);
#else
  store(to, __builtin_convertvector(v, SignedBytes));
#endif
}

INLINE void store_narrow(int16_t* to, Ints v) {
#if defined(__AVX512F__)
  store(to, _mm512_cvtepi32_epi16((__m512i)v));
#elif defined(__AVX2__)
  store(to, _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1)));
#elif defined(__aarch64__)
  arm::store_narrow(to, v);
#else
  store(to, __builtin_convertvector(v, HalfInts));
#endif
}

// Forces a vector into a register. Otherwise compilers use it as a memory operand of several instructions, and each load
// crosses cache lines where the tensor is unaligned, as tensors mapped from a file are.
template <class Vector>
INLINE Vector in_register(Vector v) {
#if defined(__AVX2__)
  asm("" : "+v"(v));
#elif defined(__aarch64__) && !(defined(MB_SVE) && defined(__clang__))
  asm("" : "+w"(v));
#endif
  return v;
}

// The horizontal sum by pairwise reduction, which stays in registers; a loop over lanes would be a chain of scalar additions.
INLINE float sum(Floats v) {
  typedef float Four __attribute__((vector_size(16)));
  Four four[LANES / 4];
  memcpy(four, &v, sizeof v);
  for (int half = LANES / 8; half; half /= 2)
    for (int i = 0; i < half; ++i) four[i] += four[i + half];
  return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

#if defined(__AVX512F__)
// Transposes 16 x 16 elements of 32 bits. Half of the shuffles stay within 128 bits, which have twice the throughput of others.
template <class Vector>
INLINE void transpose(Vector (&v)[LANES]) {
  __m512i part[4][4];  // [a][c]: in the 128 bits L, column 4 L + c of the rows 4 a to 4 a + 3
  UNROLL for (int a = 0; a < 4; ++a) {
    const __m512i r0 = (__m512i)v[4 * a], r1 = (__m512i)v[4 * a + 1], r2 = (__m512i)v[4 * a + 2], r3 = (__m512i)v[4 * a + 3];
    const __m512i lower01 = _mm512_unpacklo_epi32(r0, r1), upper01 = _mm512_unpackhi_epi32(r0, r1);
    const __m512i lower23 = _mm512_unpacklo_epi32(r2, r3), upper23 = _mm512_unpackhi_epi32(r2, r3);
    part[a][0] = _mm512_unpacklo_epi64(lower01, lower23), part[a][1] = _mm512_unpackhi_epi64(lower01, lower23);
    part[a][2] = _mm512_unpacklo_epi64(upper01, upper23), part[a][3] = _mm512_unpackhi_epi64(upper01, upper23);
  }
  UNROLL for (int c = 0; c < 4; ++c) {
    const __m512i even01 = _mm512_shuffle_i64x2(part[0][c], part[1][c], 0x88), odd01 = _mm512_shuffle_i64x2(part[0][c], part[1][c], 0xdd);
    const __m512i even23 = _mm512_shuffle_i64x2(part[2][c], part[3][c], 0x88), odd23 = _mm512_shuffle_i64x2(part[2][c], part[3][c], 0xdd);
    v[c] = (Vector)_mm512_shuffle_i64x2(even01, even23, 0x88), v[4 + c] = (Vector)_mm512_shuffle_i64x2(odd01, odd23, 0x88);
    v[8 + c] = (Vector)_mm512_shuffle_i64x2(even01, even23, 0xdd), v[12 + c] = (Vector)_mm512_shuffle_i64x2(odd01, odd23, 0xdd);
  }
}
#else
// One step of an in-register transpose: a and b, rows D apart, exchange their off-diagonal blocks of D x D lanes.
template <int D, class Vector, size_t... L>
INLINE void exchange(Vector& a, Vector& b, std::index_sequence<L...>) {
  const Vector low = __builtin_shufflevector(a, b, (L & D ? LANES + L - D : L)...);
  b = __builtin_shufflevector(a, b, (L & D ? LANES + L : L + D)...);
  a = low;
}

// Transposes LANES x LANES elements of 32 bits: blocks of half the size are exchanged, then of a quarter, and so on.
template <int D = LANES / 2, class Vector>
INLINE void transpose(Vector (&v)[LANES]) {
  UNROLL for (int i = 0; i < LANES; ++i)
    if (!(i & D)) exchange<D>(v[i], v[i + D], std::make_index_sequence<LANES>());
  if constexpr (D > 1) transpose<D / 2>(v);
}
#endif

// a * b + c, on x86 with one rounding where there are such instructions. Compilers choose whether to fuse such expressions,
// and may do so differently in each instantiation of a template.
#if defined(__AVX512F__)
INLINE Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX2__)
INLINE Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
INLINE Floats fused(Floats a, Floats b, Floats c) { return a * b + c; }
#endif

INLINE Floats largest(Floats a, Floats b) { return a > b ? a : b; }

// The largest lane, also by pairwise reduction.
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

// bf16 is the upper 16 bits of a float.
INLINE Floats from_bf16(Halves v) { return bits<Floats>(widen(v) << 16); }

INLINE float from_bf16(uint16_t v) { return bits<float>(uint32_t(v) << 16); }

// Rounds to the nearest bf16, ties to even. NaN stays NaN: plain rounding could carry into the exponent.
INLINE uint16_t to_bf16(float v) {
  uint32_t u = bits<uint32_t>(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t(u >> 16 | 0x40);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

INLINE Halves to_bf16(Floats v) {
#if defined(__aarch64__) && defined(MB_BF16_DOT)
  return arm::to_bf16(v);
#endif
  Words u = bits<Words>(v);
  Words rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  Words nan = bits<Words>((u & 0x7fffffffu) > 0x7f800000u);
#if defined(__aarch64__)
  return arm::narrow((nan & (u >> 16 | 0x40u)) | (~nan & rounded));
#else
  return __builtin_convertvector((nan & (u >> 16 | 0x40u)) | (~nan & rounded), Halves);
#endif
}

// Loads and stores of float or bf16: a vector (read, write) or one element (read1, write1).
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

// IEEE half precision to float: exponent and mantissa are shifted into place, and the factor 2^112 corrects the exponent bias.
INLINE float from_half(uint16_t v) {
#if defined(__aarch64__)
  return float(bits<__fp16>(v));
#endif
  float size = bits<float>(uint32_t(v & 0x7fff) << 13) * 0x1p112f;
  return bits<float>(bits<uint32_t>(size) | uint32_t(v & 0x8000) << 16);
}

#if defined(MB_BF16_DOT)
// sums + a * b of pairs of bf16, two to a lane.
INLINE Floats dot_pairs(Floats sums, Shorts a, Shorts b) {
#if defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
  return arm::dot_pairs(sums, a, b);
#endif
}
#endif

// Rounds to the nearest integer, ties to even, for |v| < 2^22: the sum has no bits left for a fraction. The result is
// arbitrary for other values and NaN; the subtraction is unsigned because they would overflow.
INLINE Ints nearest(Floats v) {
  const float magic = 0x1.8p23f;
  return bits<Ints>(bits<Words>(v + magic) - bits<uint32_t>(magic));
}

}  // namespace matrices
