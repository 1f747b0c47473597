// Products of weights in any format with many rows of float32 inputs, one panel of 64 outputs at a time, on the calling
// thread. A row's sums are added in one order, whatever the number of rows: a row's result does not depend on the others.
//
// Weights are packed so that a vector holds one input's weights of LANES outputs. In general they become float32. With AVX-512
// VNNI or BF16, the kernels of gemm_int8.hpp and gemm_bf16.hpp multiply inputs in 8 bits or in bf16 (`prepare_rows`).
#pragma once

#include "matrix.hpp"

namespace matrices {

constexpr int64_t PANEL_OUTPUTS = 64;
constexpr int64_t PANEL_DEPTH = 768;  // inputs of a packed block: 192 KB as float32, which stays in L2 beside the sums
constexpr int64_t PANEL_ROWS = 384;   // rows whose sums a thread holds: 96 KB

constexpr int TILE_ROWS = 6, TILE_VECTORS = LANES == 16 ? 4 : 2;  // a register tile
constexpr int TILE_OUTPUTS = TILE_VECTORS * LANES;

// Whether products with this matrix read inputs in 8 bits, or in bf16.
inline bool reads_int8(const Matrix& m) {
#if defined(__AVX512VNNI__)
  return m.format == INT8 || m.format == INT4;
#else
  return m.format < 0;
#endif
}

inline bool reads_bf16(const Matrix& m) {
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
  return (m.format == BF16 || m.format == LOSSLESS) && m.inputs % 2 == 0;
#else
  return m.format < 0;
#endif
}

// Rows of inputs of one product: float32, and what `prepare_rows` makes of them.
struct PanelInputs {
  const float* x;
  int64_t ldx, rows;
  Prepared codes = {};       // for reads_int8
  uint16_t* bf16 = nullptr;  // (rows, inputs), for reads_bf16

  // Bytes of scratch for `rows` rows of up to `inputs` inputs.
  static int64_t bytes(int64_t inputs, int64_t rows) {
    const int64_t padded = round_up(inputs, RUN), blocks = round_up(padded / BLOCK, 16);
    return rows * (padded * 2 + blocks * 8) + 256;
  }

  // Divides the scratch; codes and bf16 values are never needed together.
  void place(void* scratch, const Matrix& m) {
    char* at = (char*)round_up((int64_t)scratch, 64);
    bf16 = (uint16_t*)at;
    codes = {};
    codes.padded = round_up(m.inputs, RUN), codes.blocks = round_up(codes.padded / BLOCK, 16);
    codes.q_scale = (float*)at, at += rows * codes.blocks * 4;
    codes.q_sum = (float*)at, at += rows * codes.blocks * 4;
    codes.q = (int8_t*)at;
  }

  // Converts one row to the form that the product reads.
  void prepare_row(const Matrix& m, int64_t row) {
    if (reads_int8(m)) quantise_row(x + row * ldx, row, m, codes);
    if (reads_bf16(m)) round_to_bf16(x + row * ldx, m.inputs, bf16 + row * m.inputs, m.inputs);
  }
};

// A thread's scratch: packed weights, unpacked rows of weights, and the sums (PANEL_ROWS, PANEL_OUTPUTS).
struct PanelScratch {
  float *weights, *rows, *sums;
  char* other;  // of the kernels for int8 and bf16
  const Matrix* packed = nullptr;
  int64_t packed_first = -1, packed_k = -1;  // what `weights` holds

  static int64_t other_bytes(int64_t inputs) {
    int64_t bytes = 64;
#if defined(__AVX512VNNI__)
    const int64_t padded = round_up(inputs, RUN);
    bytes = PANEL_OUTPUTS * (padded + padded / BLOCK * 8) + 128;
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
    if (bytes < PackedBlock::BYTES + 64) bytes = PackedBlock::BYTES + 64;
#endif
    return bytes + 0 * inputs;
  }

  // Takes the scratch for matrices of up to `inputs` inputs from an arena.
  template <class Arena>
  PanelScratch(Arena& arena, int64_t inputs) {
    weights = arena.template take<float>(PANEL_OUTPUTS * PANEL_DEPTH);
    rows = arena.template take<float>(LANES * PANEL_DEPTH);
    sums = arena.template take<float>(PANEL_ROWS * PANEL_OUTPUTS);
    other = arena.template take<char>(other_bytes(inputs));
  }
};

// The weights [k, k + count) of an output as float32, in `to` unless they are float32 already. k is a multiple of RUN.
inline const float* float_weights(const Matrix& m, int64_t output, int64_t k, int64_t count, float* to) {
  switch (m.format) {
    case F32: return (const float*)m.data + output * m.inputs + k;
    case BF16: return convert_to_float((const uint16_t*)m.data + output * m.inputs + k, count, to), to;
    case LOSSLESS: {
      const LosslessRow row(m, output);
      for (int64_t i = 0; i < count; i += RUN) {
        uint16_t run[RUN];
        row.decompress(k + i, run);
        convert_to_float(run, count - i < RUN ? count - i : RUN, to + i);
      }
      row.outliers([&](int column, uint16_t value) {
        if (column >= k && column < k + count) to[column - k] = from_bf16(value);
      });
      return to;
    }
  }
  const uint8_t* codes = (const uint8_t*)m.data + output * row_bytes(m);
  for (int64_t start = k; start < k + count; start += BLOCK) {  // both group sizes are multiples of BLOCK
    const int64_t group = output * groups_of(m) + start / m.group;
    const float scale = from_half(m.scale[group]), low = m.low ? from_half(m.low[group]) : 0.0f;
    const uint8_t* block = m.format == INT8 ? codes + start : codes + start / RUN * BLOCK;
    const int shift = start % RUN / BLOCK * 4;
    for (int i = 0; i < BLOCK; i += LANES) {
      const Bytes bytes = load<Bytes>(block + i);
      const Words code = __builtin_convertvector(bytes, Words);
      if (m.format == INT8)
        store(to + start - k + i, (__builtin_convertvector((Ints)code, Floats) - 128.0f) * scale);
      else
        store(to + start - k + i, __builtin_convertvector((Ints)(code >> shift & 15u), Floats) * scale + low);
    }
  }
  return to;
}

// Packs the weights [k, k + count) of a panel's outputs: (PANEL_OUTPUTS / TILE_OUTPUTS, count, TILE_OUTPUTS). The last
// output stands in for those beyond the end.
inline void pack_floats(const Matrix& m, int64_t first, int64_t k, int64_t count, const PanelScratch& scratch) {
  for (int64_t side = 0; side < PANEL_OUTPUTS; side += LANES) {
    const float* rows[LANES];
    for (int r = 0; r < LANES; ++r) {
      const int64_t output = first + side + r < m.outputs ? first + side + r : m.outputs - 1;
      rows[r] = float_weights(m, output, k, count, scratch.rows + r * PANEL_DEPTH);
    }
    float* to = scratch.weights + side / TILE_OUTPUTS * count * TILE_OUTPUTS + side % TILE_OUTPUTS;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
      Floats v[LANES];
      UNROLL for (int r = 0; r < LANES; ++r) v[r] = load<Floats>(rows[r] + i);
      transpose(v);
      UNROLL for (int j = 0; j < LANES; ++j) store(to + (i + j) * TILE_OUTPUTS, v[j]);
    }
    for (; i < count; ++i)
      for (int r = 0; r < LANES; ++r) to[i * TILE_OUTPUTS + r] = rows[r][i];
  }
}

// sums (T, PANEL_OUTPUTS) += T rows of inputs times packed weights (depth, TILE_OUTPUTS); `first`: the sums begin at 0.
template <int T>
inline void multiply_tile(const float* weights, const float* x, int64_t ldx, int64_t depth, float* sums, bool first) {
  Floats own[T][TILE_VECTORS] = {};
  if (!first)
    UNROLL for (int t = 0; t < T; ++t)
      UNROLL for (int i = 0; i < TILE_VECTORS; ++i) own[t][i] = load<Floats>(sums + t * PANEL_OUTPUTS + i * LANES);
  _Pragma("GCC unroll 2") for (int64_t k = 0; k < depth; ++k) {
    Floats w[TILE_VECTORS];
    UNROLL for (int i = 0; i < TILE_VECTORS; ++i) w[i] = load<Floats>(weights + k * TILE_OUTPUTS + i * LANES);
    UNROLL for (int t = 0; t < T; ++t) {
      const float same = x[t * ldx + k];
      UNROLL for (int i = 0; i < TILE_VECTORS; ++i) own[t][i] += same * w[i];
    }
  }
  UNROLL for (int t = 0; t < T; ++t)
    UNROLL for (int i = 0; i < TILE_VECTORS; ++i) store(sums + t * PANEL_OUTPUTS + i * LANES, own[t][i]);
}

inline void multiply_tiles(const float* weights, const float* x, int64_t ldx, int64_t rows, int64_t depth, float* sums,
                           bool first) {
  for (int64_t row = 0; row < rows; row += TILE_ROWS, x += TILE_ROWS * ldx, sums += TILE_ROWS * PANEL_OUTPUTS)
    for (int64_t side = 0; side < PANEL_OUTPUTS; side += TILE_OUTPUTS) {
      const float* w = weights + side * depth;
      switch (rows - row) {
        case 1: multiply_tile<1>(w, x, ldx, depth, sums + side, first); break;
        case 2: multiply_tile<2>(w, x, ldx, depth, sums + side, first); break;
        case 3: multiply_tile<3>(w, x, ldx, depth, sums + side, first); break;
        case 4: multiply_tile<4>(w, x, ldx, depth, sums + side, first); break;
        case 5: multiply_tile<5>(w, x, ldx, depth, sums + side, first); break;
        default: multiply_tile<TILE_ROWS>(w, x, ldx, depth, sums + side, first);
      }
    }
}

// scratch.sums = the outputs [first, first + PANEL_OUTPUTS) of `count` (at most PANEL_ROWS) rows of inputs from `row` on,
// with the bias. Columns beyond the last output are undefined.
inline void panel_sums(const Matrix& m, const PanelInputs& in, int64_t first, int64_t row, int64_t count,
                       PanelScratch& scratch) {
#if defined(__AVX512VNNI__)
  if (reads_int8(m)) {
    const PackedPanel packed(scratch.other, m);
    if (scratch.packed != &m || scratch.packed_first != first) pack_panel(m, first, packed);
    scratch.packed = &m, scratch.packed_first = first, scratch.packed_k = 0;
    Prepared own = in.codes;
    own.q += row * own.padded, own.q_scale += row * own.blocks, own.q_sum += row * own.blocks;
    return packed_rows(m, packed, first, own, count, scratch.sums - first, F32, PANEL_OUTPUTS);
  }
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
  if (reads_bf16(m)) {
    const PackedBlock packed((char*)round_up((int64_t)scratch.other, 64));
    scratch.packed = nullptr;
    return bf16_panel(m, packed, first, m.outputs, in.bf16 + row * m.inputs, m.inputs, count,
                      (char*)(scratch.sums - first), F32, PANEL_OUTPUTS);
  }
#endif
  for (int64_t k = 0; k < m.inputs; k += PANEL_DEPTH) {
    const int64_t depth = m.inputs - k < PANEL_DEPTH ? m.inputs - k : PANEL_DEPTH;
    if (scratch.packed != &m || scratch.packed_first != first || scratch.packed_k != k)
      pack_floats(m, first, k, depth, scratch);
    scratch.packed = &m, scratch.packed_first = first, scratch.packed_k = k;
    multiply_tiles(scratch.weights, in.x + row * in.ldx + k, in.ldx, count, depth, scratch.sums, k == 0);
  }
  if (!m.bias) return;
  float bias[PANEL_OUTPUTS] = {};
  for (int64_t o = 0; o < PANEL_OUTPUTS && first + o < m.outputs; ++o) bias[o] = bias_of(m, first + o);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t o = 0; o < PANEL_OUTPUTS; o += LANES) {
      float* at = scratch.sums + r * PANEL_OUTPUTS + o;
      store(at, load<Floats>(at) + load<Floats>(bias + o));
    }
}

}  // namespace matrices
