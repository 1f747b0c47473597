// Weight matrices in five formats, and their product with a few rows of inputs: y[row] = W x[row] + bias.
//
// With few rows of inputs the product is bound by memory bandwidth: each thread reads several rows of weights in parallel
// (several streams), and the arithmetic overlaps with the loads.
#pragma once

#include <type_traits>

#include "parallel.hpp"
#include "simd.hpp"

namespace matrices {

enum Format : int32_t { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3, LOSSLESS = 4 };

// W is (outputs, inputs), row-major. In the quantised formats and LOSSLESS a row is padded to a multiple of 128 inputs
// ("padded"). Each group of 16, 32, 64 or 128 weights of a row has a number of `scale` and of `low`, stored as scales.hpp
// describes; value = scale * code + low, and without `low` scale * (code - zero), where zero is 128 in INT8 and 8 in INT4. `low`
// may hold the zeros of the groups in place of lows.
//   INT8: one byte per weight.
//   INT4: 64 bytes per run of 128 weights, byte j = code[j] | code[j + 64] << 4.
//   LOSSLESS: bf16 in 12 bits, without scales; see lossless.hpp.
struct Matrix {
  const void* data;
  const void* scale;  // INT8 and INT4, else null
  const void* low;    // lows or zero points; null where one code stands for 0 in all groups
  const void* bias;       // (outputs,) or null
  int64_t outputs, inputs;
  int32_t format, group;
  int32_t bias_format;   // F32 or BF16
  int32_t scale_format;  // a ScaleFormat, of scale and low; ZERO_POINTS added if `low` holds those
};

constexpr int RUN = 128;   // rows of quantised formats are padded to a multiple of this many inputs
constexpr int BLOCK = 64;  // codes of a run that have the same half of their bytes in INT4
constexpr int LEAST_GROUP = 16;
constexpr int FEW = 8;     // rows of inputs of the largest tile

// Rows of inputs in the form that `multiply` reads. `prepare` fills only the arrays that the matrix's format needs.
struct Prepared {
  float* f;        // (rows, padded)
  uint16_t* bf;    // (rows, padded), bf_stride() apart
  int8_t* q;       // (rows, padded), integers in [-127, 127]
  float* q_scale;  // (rows, blocks): x = q * q_scale in each group of the weights
  float* q_sum;    // (rows, blocks): the sum of q * q_scale in each group
  int32_t* q_total;  // (rows, blocks): the sum of q in each group
  int64_t padded, blocks;
  const float* x;  // float32 inputs that are read in place: the caller's, or `f`
  int64_t ldx;

  // Not a power of two, where rows would share the same few sets of L1.
  INLINE int64_t bf_stride() const { return padded + 32; }
};

// Bytes of scratch for `rows` rows of up to `inputs` inputs.
inline int64_t prepared_bytes(int64_t inputs, int64_t rows) {
  int64_t padded = round_up(inputs, RUN), blocks = round_up(padded / LEAST_GROUP, 16);
  return 64 + rows * (padded * (4 + 2 + 1) + 64 + blocks * 12);
}

// Divides scratch of `prepared_bytes(inputs, rows)` bytes into the arrays.
inline Prepared prepared_in(void* scratch, int64_t inputs, int64_t rows) {
  char* at = (char*)round_up((int64_t)scratch, 64);
  Prepared p = {};
  p.padded = round_up(inputs, RUN), p.blocks = round_up(p.padded / LEAST_GROUP, 16);
  p.f = (float*)at, at += rows * p.padded * 4;
  p.q_scale = (float*)at, at += rows * p.blocks * 4;
  p.q_sum = (float*)at, at += rows * p.blocks * 4;
  p.q_total = (int32_t*)at, at += rows * p.blocks * 4;
  p.bf = (uint16_t*)at, at += rows * p.bf_stride() * 2;
  p.q = (int8_t*)at;
  return p;
}

// LOSSLESS rows: bytes of the header, and of each run.
INLINE int64_t head_bytes(const Matrix& m) { return round_up(m.inputs, 2048) / 64; }
constexpr int RUN_BYTES = RUN / 2 * 3;

// Bytes of a row of W.
INLINE int64_t row_bytes(const Matrix& m) {
  const int64_t padded = round_up(m.inputs, RUN);
  switch (m.format) {
    case F32: return m.inputs * 4;
    case BF16: return m.inputs * 2;
    case INT8: return padded;
    case INT4: return padded / 2;
    default: return head_bytes(m) + padded / RUN * RUN_BYTES;
  }
}

// Inputs whose sum is stored once: those of a group, or of a part of a larger one.
INLINE int part_of(const Matrix& m) { return m.group && m.group < BLOCK ? m.group : BLOCK; }

// The stride of a row's scales and sums of inputs.
INLINE int64_t blocks_of(const Matrix& m) { return round_up(round_up(m.inputs, RUN) / part_of(m), 16); }

INLINE float bias_of(const Matrix& m, int64_t output) {
  if (!m.bias) return 0;
  return m.bias_format == BF16 ? from_bf16(((const uint16_t*)m.bias)[output]) : ((const float*)m.bias)[output];
}

}  // namespace matrices

#include "scales.hpp"
#include "prepare_inputs.hpp"
#include "gemv_tiles.hpp"
#include "lossless.hpp"
#include "float_weights.hpp"
#include "weight_prefetch.hpp"

namespace matrices {

// y[row * ldy + output] for all rows and the outputs [first, last), on the calling thread.
inline void multiply(const Matrix& m, const Prepared& x, int rows, float* y, int64_t ldy, int64_t first, int64_t last) {
  switch (m.format) {
    case F32: return over_tiles<FloatTile>(m, x, rows, y, ldy, first, last);
#if defined(MB_BF16_DOT)
    case BF16:
      return by_pairs(rows) ? over_tiles<PairTile>(m, x, rows, y, ldy, first, last)
                            : over_tiles<WideTile>(m, x, rows, y, ldy, first, last);
    case LOSSLESS:
      return by_pairs(rows) ? over_tiles<LosslessTile<PairTile>>(m, x, rows, y, ldy, first, last)
                            : over_tiles<LosslessTile<WideTile>>(m, x, rows, y, ldy, first, last);
#else
    case BF16: return over_tiles<WideTile>(m, x, rows, y, ldy, first, last);
    case LOSSLESS: return over_tiles<LosslessTile<WideTile>>(m, x, rows, y, ldy, first, last);
#endif
    case INT8: return over_tiles<CodeTile<INT8>>(m, x, rows, y, ldy, first, last);
    case INT4: return over_tiles<CodeTile<INT4>>(m, x, rows, y, ldy, first, last);
  }
}

}  // namespace matrices

#include "gemm_int8.hpp"
#include "gemm_bf16.hpp"
#include "bf16_rows.hpp"
#include "row_products.hpp"
#include "arm_gemm.hpp"
#include "amx.hpp"
#include "linear.hpp"

using matrices::InputRounding;
using matrices::Matrix;
using matrices::Prepared;
using matrices::ReadPlan;
