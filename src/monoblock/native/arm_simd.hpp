// Conversions and dot products of the vector types by NEON or SVE instructions, where compilers go through the lanes one by
// one or have no operator. Part of simd.hpp.
#pragma once

namespace matrices {

typedef int8_t SignedHalf __attribute__((vector_size(LANES * 2)));
typedef int8_t Quads __attribute__((vector_size(LANES * 4)));  // four signed 8-bit integers per 32-bit lane

namespace arm {

#if defined(MB_SVE)

INLINE svbool_t every() { return svptrue_b8(); }

INLINE Words widen(Halves v) {
#if defined(__clang__)
  return __builtin_convertvector(v, Words);
#else
  // A NEON register is the lower half of an SVE register of 256 bits. The instruction extends the elements of the lower half.
  Words wide;
  asm("uunpklo %0.s, %0.h" : "=w"(wide) : "0"(v));
  return wide;
#endif
}
INLINE Words widen(Bytes v) { return widen((Halves)vmovl_u8((uint8x8_t)v)); }
INLINE Shorts widen(SignedHalf v) {
#if defined(__clang__)
  typedef int16_t Signed __attribute__((vector_size(LANES * 4)));
  return (Shorts)__builtin_convertvector(v, Signed);
#else
  Shorts wide;
  asm("sunpklo %0.h, %0.b" : "=w"(wide) : "0"(v));
  return wide;
#endif
}

INLINE Halves narrow(Words v) { return __builtin_shufflevector((Shorts)v, (Shorts)v, 0, 2, 4, 6, 8, 10, 12, 14); }
INLINE void store_narrow(int16_t* to, Ints v) { svst1h_s32(every(), to, (svint32_t)v); }
INLINE void store_narrow(int8_t* to, Ints v) { svst1b_s32(every(), to, (svint32_t)v); }

// Half precision to float.
INLINE Floats from_half(Halves v) { return (Floats)svcvt_f32_f16_x(every(), svreinterpret_f16_u32((svuint32_t)widen(v))); }

// sums + the dot products of four pairs of integers in each lane.
INLINE Ints dot_quads(Ints sums, Quads a, Quads b) { return (Ints)svdot_s32((svint32_t)sums, (svint8_t)a, (svint8_t)b); }

INLINE Halves to_bf16(Floats v) { return narrow((Words)svreinterpret_u32_bf16(svcvt_bf16_f32_x(every(), (svfloat32_t)v))); }

// As below.
INLINE Floats dot_pairs(Floats sums, Shorts a, Shorts b) {
  return (Floats)svbfdot_f32((svfloat32_t)sums, svreinterpret_bf16_u16((svuint16_t)a), svreinterpret_bf16_u16((svuint16_t)b));
}

#else

INLINE Words widen(Halves v) { return (Words)vmovl_u16((uint16x4_t)v); }
INLINE Shorts widen(SignedHalf v) { return (Shorts)vmovl_s8((int8x8_t)v); }
INLINE Words widen(Bytes v) {
  uint32_t four;
  memcpy(&four, &v, 4);
  return (Words)vmovl_u16(vget_low_u16(vmovl_u8((uint8x8_t)vdup_n_u32(four))));
}

INLINE Halves narrow(Words v) { return (Halves)vmovn_u32((uint32x4_t)v); }
INLINE void store_narrow(int16_t* to, Ints v) { vst1_s16(to, vmovn_s32((int32x4_t)v)); }
INLINE void store_narrow(int8_t* to, Ints v) {
  const int16x4_t words = vmovn_s32((int32x4_t)v);
  const int32x2_t four = (int32x2_t)vmovn_s16(vcombine_s16(words, words));
  memcpy(to, &four, 4);
}

// Half precision to float.
INLINE Floats from_half(Halves v) { return (Floats)vcvt_f32_f16((float16x4_t)v); }

#if defined(MB_INT8_DOT)
// sums + the dot products of four pairs of integers in each lane.
INLINE Ints dot_quads(Ints sums, Quads a, Quads b) { return (Ints)vdotq_s32((int32x4_t)sums, (int8x16_t)a, (int8x16_t)b); }
#endif

#if defined(MB_BF16_DOT)
INLINE Halves to_bf16(Floats v) { return (Halves)vcvt_bf16_f32((float32x4_t)v); }

// BFDOT: both products are exact; their sum, and the sum with the lane, are rounded to odd, and subnormal numbers are zeros.
// BFMLALB and BFMLALT round each product's sum to nearest, but are two instructions for as many products.
INLINE Floats dot_pairs(Floats sums, Shorts a, Shorts b) {
  return (Floats)vbfdotq_f32((float32x4_t)sums, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
#endif

#endif

}  // namespace arm
}  // namespace matrices
