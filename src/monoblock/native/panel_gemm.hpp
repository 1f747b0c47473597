// Products of weights in any format with many rows of float32 inputs, one panel of 64 outputs at a time, on the calling
// thread. A row's sums are added in one order, whatever the number of rows: a row's result does not depend on the others.
//
// Weights are packed so that a vector holds one input's weights of LANES outputs. In general they become float32. Quantised
// weights become 16-bit integers with AVX2, where a multiply-add of pairs does twice the work of a float32 one; inputs are
// rounded to 16 bits for each group. With dot products, the kernels of gemm_int8.hpp, gemm_bf16.hpp and arm_gemm.hpp multiply
// inputs in 8 bits or in bf16. With AMX, quantised weights become bf16 too, for the sake of accuracy: see amx_forward.hpp.
#pragma once

#include "matrix.hpp"

namespace matrices {

constexpr int64_t PANEL_OUTPUTS = 64;
constexpr int64_t PANEL_DEPTH = 768;  // inputs of a packed block: 192 KB as float32, which stays in L2 beside the sums
constexpr int64_t PANEL_ROWS = 384;   // rows whose sums a thread holds: 96 KB

constexpr int TILE_ROWS = 6, TILE_VECTORS = REGISTERS == 32 ? 4 : 2;  // a register tile
constexpr int TILE_OUTPUTS = TILE_VECTORS * LANES;

// Whether products with this matrix read inputs in 8 bits, in 16 bits, or in bf16.
inline bool reads_int8(const Matrix& m) {
#if defined(MB_INT8_DOT) && !defined(__AMX_TILE__)
  return m.format == INT8 || m.format == INT4;
#else
  return m.format < 0;
#endif
}

inline bool reads_int16(const Matrix& m) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  return m.format == INT8 || m.format == INT4;
#else
  return m.format < 0;
#endif
}

inline bool reads_bf16(const Matrix& m) {
#if defined(MB_BF16_DOT)
  return m.format != F32 && !reads_int8(m) && m.inputs % 2 == 0;
#else
  return m.format < 0;
#endif
}

// Rows of inputs of one product: float32, and what `prepare_rows` makes of them.
struct PanelInputs {
  const float* x;
  int64_t ldx, rows;
  InputRounding how = {};    // for reads_int8
  float* channels = nullptr;  // (rows, MOST_CHANNELS): the inputs of the channels that are not rounded
  Prepared codes = {};       // for reads_int8; for reads_int16 only its scales and sums
  int16_t* words = nullptr;  // (rows, padded), for reads_int16
  uint16_t* bf16 = nullptr;  // (rows, inputs), for reads_bf16

  // Bytes of scratch for `rows` rows of up to `inputs` inputs.
  static int64_t bytes(int64_t inputs, int64_t rows) {
    const int64_t padded = round_up(inputs, RUN), blocks = round_up(padded / LEAST_GROUP, 16);
    return rows * (padded * 2 + blocks * 12) + 256;
  }

  // Divides the scratch; integers and bf16 values are never needed together.
  void place(void* scratch, const Matrix& m) {
    char* at = (char*)round_up((int64_t)scratch, 64);
    bf16 = (uint16_t*)at;
    codes = {};
    codes.padded = round_up(m.inputs, RUN), codes.blocks = blocks_of(m);
    codes.q_scale = (float*)at, at += rows * codes.blocks * 4;
    codes.q_sum = (float*)at, at += rows * codes.blocks * 4;
    codes.q_total = (int32_t*)at, at += rows * codes.blocks * 4;
    codes.q = (int8_t*)at, words = (int16_t*)at;
    channels = (float*)(at + rows * codes.padded);  // codes take half of what words would
  }

  // Whether `prepare_row` must be called for each row.
  static bool needed(const Matrix& m) { return reads_int8(m) || reads_int16(m) || reads_bf16(m); }

  // Converts one row to the form that the product reads.
  void prepare_row(const Matrix& m, int64_t row) {
    if (reads_int8(m)) {
      quantise_row(x + row * ldx, row, m, codes, how);
      for (int64_t c = 0; c < how.count; ++c) channels[row * MOST_CHANNELS + c] = x[row * ldx + how.channels[c]];
    }
    if (reads_int16(m)) round_row(m, row);
    if (reads_bf16(m)) round_to_bf16(x + row * ldx, m.inputs, bf16 + row * m.inputs, m.inputs);
  }

 private:
  // 16-bit integers for each group: round(x * 32767 / max|x|), a relative error of 2^-16 of the group's largest.
  void round_row(const Matrix& m, int64_t row) {
    float group[RUN];
    for (int64_t k = 0, g = 0; k < codes.padded; k += m.group, ++g) {
      const int64_t left = m.inputs - k, inside = left < 0 ? 0 : left < m.group ? left : m.group;
      pad(x + row * ldx + k, inside, group, m.group);
      quantise(group, m.group, words + row * codes.padded + k, codes.q_scale + row * codes.blocks + g,
               codes.q_sum + row * codes.blocks + g);
    }
  }
};

// A thread's scratch: packed weights and the scales of their groups, unpacked rows of weights, and the sums (PANEL_ROWS,
// PANEL_OUTPUTS).
struct PanelScratch {
  float *weights, *scales, *lows, *rows, *sums;
  char* other;  // of the kernels for int8 and bf16
  const Matrix* packed = nullptr;
  int64_t packed_first = -1, packed_k = -1;  // what `weights` holds

  static int64_t other_bytes([[maybe_unused]] int64_t inputs) {
    int64_t bytes = 64;
#if defined(MB_INT8_DOT)
    bytes = PackedPanel::bytes(inputs, LEAST_GROUP) + 64;
#endif
#if defined(MB_BF16_DOT)
    if (bytes < PackedBlock::BYTES + 64) bytes = PackedBlock::BYTES + 64;
#endif
    return bytes;
  }

  // Takes the scratch for matrices of up to `inputs` inputs from an arena.
  template <class Arena>
  PanelScratch(Arena& arena, int64_t inputs) {
    weights = arena.template take<float>(PANEL_OUTPUTS * PANEL_DEPTH);
    scales = arena.template take<float>(PANEL_OUTPUTS * PANEL_DEPTH / LEAST_GROUP);
    lows = arena.template take<float>(PANEL_OUTPUTS * PANEL_DEPTH / LEAST_GROUP);
    rows = arena.template take<float>(LANES * PANEL_DEPTH);
    sums = arena.template take<float>(PANEL_ROWS * PANEL_OUTPUTS);
    other = arena.template take<char>(other_bytes(inputs));
  }
};

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

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
// As `pack_floats`, pairs of 16-bit integers in words: (PANEL_OUTPUTS / TILE_OUTPUTS, count / 2, TILE_OUTPUTS); with scales and
// lows (groups, PANEL_OUTPUTS). `count` is a multiple of RUN, with the row's padding.
inline void pack_words(const Matrix& m, int64_t first, int64_t k, int64_t count, const PanelScratch& scratch) {
  for (int64_t side = 0; side < PANEL_OUTPUTS; side += LANES) {
    int16_t* rows = (int16_t*)scratch.rows;
    for (int r = 0; r < LANES; ++r) {
      const int64_t output = first + side + r < m.outputs ? first + side + r : m.outputs - 1;
      const uint8_t* codes = (const uint8_t*)m.data + output * row_bytes(m);
      int16_t* to = rows + r * PANEL_DEPTH - k;
      const RowScales stored(m, output);
      const int16_t zero = m.low ? 0 : zero_of(m);
      for (int64_t g = k / m.group, i = 0; i < count; ++g, i += m.group) {
        const int64_t at = i / m.group * PANEL_OUTPUTS + side + r;
        const float scale = stored.scale(g);
        scratch.scales[at] = scale;
        scratch.lows[at] = m.low ? stored.low(g, scale) : 0.0f;
      }
      for (int64_t start = k; start < k + count; start += BLOCK) {
        const uint8_t* block = m.format == INT8 ? codes + start : codes + start / RUN * BLOCK;
        const int shift = start % RUN / BLOCK * 4;
        for (int i = 0; i < BLOCK; i += LANES) {
          const HalfInts code = widen_to_16(load<Bytes>(block + i));
          store(to + start + i, (m.format == INT8 ? code : code >> shift & 15) - zero);
        }
      }
    }
    uint32_t* to = (uint32_t*)scratch.weights + side / TILE_OUTPUTS * count / 2 * TILE_OUTPUTS + side % TILE_OUTPUTS;
    for (int64_t i = 0; i < count / 2; i += LANES) {
      Words v[LANES];
      UNROLL for (int r = 0; r < LANES; ++r) v[r] = load<Words>(rows + r * PANEL_DEPTH + 2 * i);
      transpose(v);
      UNROLL for (int j = 0; j < LANES; ++j) store(to + (i + j) * TILE_OUTPUTS, v[j]);
    }
  }
}

// Adds the products of pairs of 16-bit integers to 32-bit sums.
INLINE Ints add_pairs(Ints sums, Words a, Words b) {
#if defined(__AVX512BW__)
  return sums + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
  return sums + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

// As `multiply_tile`, for one group of `depth` inputs; sums += integer sums * scales + lows * the sum of the inputs.
template <int T>
inline void multiply_group(const uint32_t* weights, const float* scales, const float* lows, const int16_t* x, int64_t ldx,
                           int depth, const float* x_scale, const float* x_sum, int64_t blocks, float* sums, bool first) {
  Ints own[T][TILE_VECTORS] = {};
  _Pragma("GCC unroll 2") for (int k = 0; k < depth / 2; ++k) {
    Words w[TILE_VECTORS];
    UNROLL for (int i = 0; i < TILE_VECTORS; ++i) w[i] = load<Words>(weights + k * TILE_OUTPUTS + i * LANES);
    UNROLL for (int t = 0; t < T; ++t) {
      const Words same = in_register(Words{} + load<uint32_t>(x + t * ldx + 2 * k));
      UNROLL for (int i = 0; i < TILE_VECTORS; ++i) own[t][i] = add_pairs(own[t][i], w[i], same);
    }
  }
  UNROLL for (int i = 0; i < TILE_VECTORS; ++i) {
    const Floats scale = load<Floats>(scales + i * LANES), low = load<Floats>(lows + i * LANES);
    UNROLL for (int t = 0; t < T; ++t) {
      float* at = sums + t * PANEL_OUTPUTS + i * LANES;
      Floats sum = first ? Floats{} : load<Floats>(at);
      sum = fused(__builtin_convertvector(own[t][i], Floats), scale * x_scale[t * blocks], sum);
      store(at, fused(low, all(x_sum[t * blocks]), sum));
    }
  }
}

// The product with a packed block of `depth` inputs from k on.
inline void multiply_words(const Matrix& m, const PanelInputs& in, int64_t row, int64_t rows, int64_t k, int64_t depth,
                           const PanelScratch& scratch) {
  const int64_t padded = in.codes.padded, blocks = in.codes.blocks;
  for (int64_t r = 0; r < rows; r += TILE_ROWS)
    for (int64_t side = 0; side < PANEL_OUTPUTS; side += TILE_OUTPUTS)
      for (int64_t i = 0; i < depth; i += m.group) {
        const uint32_t* w = (const uint32_t*)scratch.weights + side * depth / 2 + i / 2 * TILE_OUTPUTS;
        const int64_t g = i / m.group, own = (row + r) * blocks + k / m.group + g;
        const float *scales = scratch.scales + g * PANEL_OUTPUTS + side, *lows = scratch.lows + g * PANEL_OUTPUTS + side;
        const int16_t* x = in.words + (row + r) * padded + k + i;
        const float *x_scale = in.codes.q_scale + own, *x_sum = in.codes.q_sum + own;
        float* sums = scratch.sums + r * PANEL_OUTPUTS + side;
        const bool first = k + i == 0;
        const int count = int(rows - r < TILE_ROWS ? rows - r : TILE_ROWS);
#define ROWS(T) \
  case T: multiply_group<T>(w, scales, lows, x, padded, m.group, x_scale, x_sum, blocks, sums, first); break;
        switch (count) {
          ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
        }
#undef ROWS
      }
}
#endif

// sums (count, PANEL_OUTPUTS) += the inputs of the channels that are not rounded times their weights, in float32.
inline void add_channels(const Matrix& m, const PanelInputs& in, int64_t first, int64_t row, int64_t count, float* sums) {
  const float* columns = in.how.columns + first;
  const int64_t stride = round_up(m.outputs, PANEL_OUTPUTS);
  for (int64_t r = 0; r < count; ++r, sums += PANEL_OUTPUTS) {
    const float* x = in.channels + (row + r) * MOST_CHANNELS;
    for (int64_t o = 0; o < PANEL_OUTPUTS; o += LANES) {
      Floats sum = load<Floats>(sums + o);
      for (int64_t c = 0; c < in.how.count; ++c) sum = fused(all(x[c]), load<Floats>(columns + c * stride + o), sum);
      store(sums + o, sum);
    }
  }
}

// scratch.sums = the outputs [first, first + PANEL_OUTPUTS) of `count` (at most PANEL_ROWS) rows of inputs from `row` on,
// with the bias. Columns beyond the last output are undefined.
inline void panel_sums(const Matrix& m, const PanelInputs& in, int64_t first, int64_t row, int64_t count,
                       PanelScratch& scratch) {
#if defined(MB_INT8_DOT)
  if (reads_int8(m)) {
    scratch.packed = nullptr;
    Prepared own = in.codes;
    own.q += row * own.padded, own.q_scale += row * own.blocks, own.q_sum += row * own.blocks;
    own.q_total += row * own.blocks;
    Matrix read = m;
    if (in.how.low) read.scale = in.how.scale, read.low = in.how.low, read.scale_format = FLOAT;
    int8_panel(read, PackedPanel(scratch.other, m), first, own, count, scratch.sums - first, F32, PANEL_OUTPUTS);
    if (in.how.count) add_channels(m, in, first, row, count, scratch.sums);
    return;
  }
#endif
#if defined(MB_BF16_DOT)
  if (reads_bf16(m)) {
    const PackedBlock packed((char*)round_up((int64_t)scratch.other, 64));
    scratch.packed = nullptr;
    return bf16_panel(m, packed, first, in.bf16 + row * m.inputs, m.inputs, count, (char*)(scratch.sums - first), F32,
                      PANEL_OUTPUTS);
  }
#endif
  const bool words = reads_int16(m);
  const int64_t inputs = words ? round_up(m.inputs, RUN) : m.inputs;
  for (int64_t k = 0; k < inputs; k += PANEL_DEPTH) {
    const int64_t depth = inputs - k < PANEL_DEPTH ? inputs - k : PANEL_DEPTH;
    const bool packed = scratch.packed == &m && scratch.packed_first == first && scratch.packed_k == k;
    scratch.packed = &m, scratch.packed_first = first, scratch.packed_k = k;
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
    if (words) {
      if (!packed) pack_words(m, first, k, depth, scratch);
      multiply_words(m, in, row, count, k, depth, scratch);
      continue;
    }
#endif
    if (!packed) pack_floats(m, first, k, depth, scratch);
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
