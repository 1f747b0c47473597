// GEMMs of weights with many rows of inputs on ARM: of 8- and 4-bit weights with int8 inputs by SDOT or SMMLA, and of bf16
// weights (uncompressed, or in 12 bits) with bf16 inputs by BFMMLA. As gemm_int8.hpp and gemm_bf16.hpp. Part of matrix.hpp.
//
// A chunk is 64 bits of a row: 8 integers or 4 bf16. A thread packs a panel of 64 rows of weights as (chunks, PANEL), so that
// a vector holds a chunk of two rows, and the inputs of a few rows likewise. SMMLA and BFMMLA multiply the chunks of two rows
// of inputs by those of two rows of weights, and add to the 2 x 2 sums of a vector. SDOT multiplies a chunk of one row of
// inputs by those of two rows of weights, and each sum is in two lanes.
#pragma once

#if defined(__aarch64__) && defined(MB_INT8_DOT)

namespace matrices {

constexpr int PANEL = 64;   // rows of weights of a panel
constexpr int ACROSS = 8;   // rows of weights of a register tile: four vectors
constexpr int CHUNK_BYTES = 8;

// sums (ROWS, ACROSS) = the products of `chunks` chunks of ROWS rows of inputs, x (chunks, ROWS), and of ACROSS rows of
// weights, w (chunks, PANEL): four sums of a row to a vector.
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int TOKENS = 8;  // rows of inputs of a register tile: 16 vectors of sums

INLINE void int8_tile(const uint64_t* w, const uint64_t* x, int chunks, int32x4_t (&sums)[TOKENS][2]) {
  int32x4_t own[TOKENS / 2][4] = {};
  for (int c = 0; c < chunks; ++c) {
    int8x16_t weights[4];
    UNROLL for (int i = 0; i < 4; ++i) weights[i] = vld1q_s8((const int8_t*)(w + c * PANEL + 2 * i));
    UNROLL for (int t = 0; t < TOKENS / 2; ++t) {
      const int8x16_t two = vld1q_s8((const int8_t*)(x + c * TOKENS + 2 * t));
      UNROLL for (int i = 0; i < 4; ++i) own[t][i] = vmmlaq_s32(own[t][i], two, weights[i]);
    }
  }
  UNROLL for (int t = 0; t < TOKENS; ++t)
    UNROLL for (int i = 0; i < 2; ++i) {
      const int64x2_t a = (int64x2_t)own[t / 2][2 * i], b = (int64x2_t)own[t / 2][2 * i + 1];
      sums[t][i] = (int32x4_t)(t % 2 ? vtrn2q_s64(a, b) : vtrn1q_s64(a, b));
    }
}
#else
constexpr int TOKENS = 4;

INLINE void int8_tile(const uint64_t* w, const uint64_t* x, int chunks, int32x4_t (&sums)[TOKENS][2]) {
  int32x4_t own[TOKENS][4] = {};
  for (int c = 0; c < chunks; ++c) {
    int8x16_t weights[4];
    UNROLL for (int i = 0; i < 4; ++i) weights[i] = vld1q_s8((const int8_t*)(w + c * PANEL + 2 * i));
    UNROLL for (int t = 0; t < TOKENS; ++t) {
      const int8x16_t same = (int8x16_t)vdupq_n_u64(x[c * TOKENS + t]);
      UNROLL for (int i = 0; i < 4; ++i) own[t][i] = vdotq_s32(own[t][i], weights[i], same);
    }
  }
  UNROLL for (int t = 0; t < TOKENS; ++t)
    UNROLL for (int i = 0; i < 2; ++i) sums[t][i] = vpaddq_s32(own[t][2 * i], own[t][2 * i + 1]);
}
#endif

// A packed panel: chunks of codes (padded / 8, PANEL), those of INT8 less 128, those of INT4 without a low less 8; scale, and
// low if the matrix has it (groups, PANEL), which stands for a code of 0 here; bias (PANEL).
struct PackedPanel {
  uint64_t* codes;
  float *scale, *low, *bias;

  static int64_t bytes(int64_t inputs, int64_t group) {
    const int64_t padded = round_up(inputs, RUN);
    return PANEL * (padded + padded / group * 8 + 4) + 64;
  }

  PackedPanel(void* scratch, const Matrix& m) {
    const int64_t padded = round_up(m.inputs, RUN), scales = PANEL * padded / m.group;
    codes = (uint64_t*)round_up((int64_t)scratch, 64);
    scale = (float*)(codes + PANEL * padded / CHUNK_BYTES);
    low = scale + scales;
    bias = low + scales;
  }
};

// Packs the rows [first, first + PANEL) of the matrix; the last row stands in for rows beyond its end.
inline void pack_panel(const Matrix& m, int64_t first, const PackedPanel& to) {
  const int64_t padded = round_up(m.inputs, RUN);
  const uint8_t* rows[PANEL];
  for (int r = 0; r < PANEL; ++r) {
    const int64_t row = first + r < m.outputs ? first + r : m.outputs - 1;
    rows[r] = (const uint8_t*)m.data + row * row_bytes(m);
    to.bias[r] = bias_of(m, row);
    RowScales(m, row).for_each([&](int64_t g, float scale, float low) {
      to.scale[g * PANEL + r] = scale;
      if (m.low) to.low[g * PANEL + r] = low + (m.format == INT8 ? 128 * scale : 0);
    });
  }
  typedef uint8_t Codes __attribute__((vector_size(CHUNK_BYTES)));
  const uint8_t zero = m.low ? 0 : 8;  // of INT4
  for (int side = 0; side < PANEL; side += ACROSS)
    for (int64_t k = 0; k < padded; k += CHUNK_BYTES) {
      uint64_t* chunk = to.codes + k / CHUNK_BYTES * PANEL + side;
      if (m.format == INT8) {
        UNROLL for (int r = 0; r < ACROSS; ++r) chunk[r] = load<uint64_t>(rows[side + r] + k) ^ 0x8080808080808080u;
      } else {  // the low nibbles of a run of 128 are its first 64 codes, the high nibbles the others
        const int64_t at = k / RUN * BLOCK + k % BLOCK;
        const int shift = k % RUN / BLOCK * 4;
        UNROLL for (int r = 0; r < ACROSS; ++r)
          chunk[r] = (uint64_t)((Codes)(load<uint64_t>(rows[side + r] + at) >> shift & 0x0f0f0f0f0f0f0f0fu) - zero);
      }
    }
}

// Packs `bytes` bytes of `rows` rows of inputs, which are `step` bytes apart, as (chunks, SIDE), padded with zeros to a whole
// chunk and to SIDE rows.
template <int SIDE>
inline void pack_inputs(const void* from, int64_t step, int rows, int64_t bytes, uint64_t* to) {
  const int64_t whole = bytes / CHUNK_BYTES, rest = bytes % CHUNK_BYTES;
  for (int t = 0; t < SIDE; ++t) {
    const char* row = (const char*)from + t * step;
    for (int64_t c = 0; c < whole; ++c) to[c * SIDE + t] = t < rows ? load<uint64_t>(row + c * CHUNK_BYTES) : 0;
    if (!rest) continue;
    uint64_t last = 0;
    if (t < rows) memcpy(&last, row + whole * CHUNK_BYTES, rest);
    to[whole * SIDE + t] = last;
  }
}

// sums (TOKENS, PANEL) += up to TOKENS rows of inputs times a packed panel.
inline void multiply_panel(const Matrix& m, const PackedPanel& w, const Prepared& p, int64_t row, int rows, float* sums) {
  uint64_t x[RUN / CHUNK_BYTES * TOKENS];
  const int chunks = m.group / CHUNK_BYTES;
  for (int64_t g = 0; g < p.padded / m.group; ++g) {
    pack_inputs<TOKENS>(p.q + row * p.padded + g * m.group, p.padded, rows, m.group, x);
    for (int side = 0; side < PANEL; side += ACROSS) {
      int32x4_t dots[TOKENS][2];
      int8_tile(w.codes + g * chunks * PANEL + side, x, chunks, dots);
      UNROLL for (int i = 0; i < 2; ++i) {
        const int64_t at = g * PANEL + side + 4 * i;
        const float32x4_t scale = vld1q_f32(w.scale + at);
        for (int t = 0; t < rows; ++t) {
          const int64_t own = (row + t) * p.blocks + g;
          float* to = sums + t * PANEL + side + 4 * i;
          float32x4_t sum = vld1q_f32(to) + vcvtq_f32_s32(dots[t][i]) * (scale * p.q_scale[own]);
          if (m.low) sum += vld1q_f32(w.low + at) * p.q_sum[own];
          vst1q_f32(to, sum);
        }
      }
    }
  }
}

// y[row, first ...) = sums (rows, PANEL) + bias
inline void store_panel(const Matrix& m, const float* sums, const float* bias, int64_t first, int64_t rows, char* y,
                        int32_t y_format, int64_t ldy) {
  const int64_t count = first + PANEL < m.outputs ? PANEL : m.outputs - first;
  for (int64_t row = 0; row < rows; ++row, sums += PANEL) {
    const int64_t at = row * ldy + first;
    for (int64_t o = 0; o < count; ++o) {
      const float sum = sums[o] + bias[o];
      y_format == BF16 ? write1((uint16_t*)y + at + o, sum) : write1((float*)y + at + o, sum);
    }
  }
}

// Outputs [first, first + PANEL) of all rows, for a packed panel.
inline void packed_rows(const Matrix& m, const PackedPanel& w, int64_t first, const Prepared& p, int64_t rows, void* y,
                        int32_t y_format, int64_t ldy) {
  for (int64_t row = 0; row < rows; row += TOKENS) {
    const int here = rows - row < TOKENS ? int(rows - row) : TOKENS;
    float sums[TOKENS * PANEL] = {};
    multiply_panel(m, w, p, row, here, sums);
    store_panel(m, sums, w.bias, first, here, (char*)y + row * ldy * (y_format == BF16 ? 2 : 4), y_format, ldy);
  }
}

// The same, after packing the panel.
inline void int8_panel(const Matrix& m, const PackedPanel& w, int64_t first, const Prepared& p, int64_t rows, void* y,
                       int32_t y_format, int64_t ldy, WeightPrefetch = {}) {
  pack_panel(m, first, w);
  packed_rows(m, w, first, p, rows, y, y_format, ldy);
}

#if defined(MB_BF16_DOT)
constexpr int64_t K_BLOCK = 2048;   // inputs of a K block: 256 KB with its 64 rows, in L2
constexpr int64_t ROW_BLOCK = 512;  // rows of inputs whose sums a thread holds: 128 KB
constexpr int DEPTH = 256;          // inputs that are packed at once, in L1
constexpr int PAIR_ROWS = 8;        // rows of inputs of a register tile: 16 vectors of 2 x 2 sums

// One thread's scratch.
struct PackedBlock {
  uint64_t* weights;  // (K_BLOCK / 4, PANEL) chunks
  float* sums;        // (ROW_BLOCK, PANEL)
  uint16_t* rows;     // (ACROSS, K_BLOCK), weights decompressed from 12 bits

  static constexpr int64_t BYTES = K_BLOCK * PANEL * 2 + ROW_BLOCK * PANEL * 4 + ACROSS * K_BLOCK * 2;

  explicit PackedBlock(char* scratch) {
    weights = (uint64_t*)scratch;
    sums = (float*)(scratch + K_BLOCK * PANEL * 2);
    rows = (uint16_t*)(sums + ROW_BLOCK * PANEL);
  }
};

// Packs the weights [k, k + count) of the rows [first, first + PANEL), padded with zeros to a whole chunk; the last row stands
// in for rows beyond the end.
inline void pack_k_block(const Matrix& m, int64_t first, int64_t k, int64_t count, const PackedBlock& to) {
  for (int side = 0; side < PANEL; side += ACROSS) {
    const uint16_t* rows[ACROSS];
    for (int r = 0; r < ACROSS; ++r) {
      const int64_t output = first + side + r;
      rows[r] = bf16_weights(m, output < m.outputs ? output : m.outputs - 1, k, count, to.rows + r * K_BLOCK);
    }
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
      UNROLL for (int r = 0; r < ACROSS; ++r) to.weights[i / 4 * PANEL + side + r] = load<uint64_t>(rows[r] + i);
    for (int r = 0; i < count && r < ACROSS; ++r) {
      uint64_t chunk = 0;
      memcpy(&chunk, rows[r] + i, (count - i) * 2);
      to.weights[i / 4 * PANEL + side + r] = chunk;
    }
  }
}

// sums (PAIR_ROWS, ACROSS of PANEL) += the products of `chunks` chunks, as in int8_tile. BFMMLA rounds as BFDOT does.
INLINE void bf16_tile(const uint64_t* w, const uint64_t* x, int64_t chunks, float* sums) {
  float32x4_t own[PAIR_ROWS / 2][4];
  const auto transposed = [](float32x4_t a, float32x4_t b, bool second) {
    const float64x2_t c = (float64x2_t)a, d = (float64x2_t)b;
    return (float32x4_t)(second ? vtrn2q_f64(c, d) : vtrn1q_f64(c, d));
  };
  UNROLL for (int t = 0; t < PAIR_ROWS / 2; ++t)
    UNROLL for (int i = 0; i < 2; ++i) {
      const float32x4_t a = vld1q_f32(sums + 2 * t * PANEL + 4 * i), b = vld1q_f32(sums + (2 * t + 1) * PANEL + 4 * i);
      own[t][2 * i] = transposed(a, b, false), own[t][2 * i + 1] = transposed(a, b, true);
    }
  for (int64_t c = 0; c < chunks; ++c) {
    bfloat16x8_t weights[4];
    UNROLL for (int i = 0; i < 4; ++i) weights[i] = (bfloat16x8_t)vld1q_u64(w + c * PANEL + 2 * i);
    UNROLL for (int t = 0; t < PAIR_ROWS / 2; ++t) {
      const bfloat16x8_t two = (bfloat16x8_t)vld1q_u64(x + c * PAIR_ROWS + 2 * t);
      UNROLL for (int i = 0; i < 4; ++i) own[t][i] = vbfmmlaq_f32(own[t][i], two, weights[i]);
    }
  }
  UNROLL for (int t = 0; t < PAIR_ROWS / 2; ++t)
    UNROLL for (int i = 0; i < 2; ++i) {
      vst1q_f32(sums + 2 * t * PANEL + 4 * i, transposed(own[t][2 * i], own[t][2 * i + 1], false));
      vst1q_f32(sums + (2 * t + 1) * PANEL + 4 * i, transposed(own[t][2 * i], own[t][2 * i + 1], true));
    }
}

// sums += all rows of inputs (at most ROW_BLOCK) times the packed K block of `count` inputs, at which x points. Prefetches a
// line of later weights with each tile.
inline void multiply_k_block(const PackedBlock& w, const uint16_t* x, int64_t ldx, int64_t rows, int64_t count,
                             WeightPrefetch& prefetch) {
  uint64_t packed[DEPTH / 4 * PAIR_ROWS];
  for (int64_t row = 0; row < rows; row += PAIR_ROWS) {
    const int here = rows - row < PAIR_ROWS ? int(rows - row) : PAIR_ROWS;
    for (int64_t k = 0; k < count; k += DEPTH) {
      const int64_t depth = count - k < DEPTH ? count - k : DEPTH;
      pack_inputs<PAIR_ROWS>(x + row * ldx + k, ldx * 2, here, depth * 2, packed);
      for (int side = 0; side < PANEL; side += ACROSS) {
        prefetch.step();
        bf16_tile(w.weights + k / 4 * PANEL + side, packed, (depth + 3) / 4, w.sums + row * PANEL + side);
      }
    }
  }
}

// Outputs [first, first + PANEL) of all rows. The weights of a later panel are prefetched meanwhile.
inline void bf16_panel(const Matrix& m, const PackedBlock& w, int64_t first, const uint16_t* x, int64_t ldx, int64_t rows, char* y,
                       int32_t y_format, int64_t ldy, WeightPrefetch prefetch = {}) {
  const int64_t k_blocks = (m.inputs + K_BLOCK - 1) / K_BLOCK;
  const int64_t each = round_up((m.inputs + k_blocks - 1) / k_blocks, RUN);
  float bias[PANEL] = {};
  for (int64_t o = 0; o < PANEL && first + o < m.outputs; ++o) bias[o] = bias_of(m, first + o);
  for (int64_t row = 0; row < rows; row += ROW_BLOCK) {
    const int64_t count = rows - row < ROW_BLOCK ? rows - row : ROW_BLOCK;
    memset(w.sums, 0, round_up(count, PAIR_ROWS) * PANEL * 4);
    for (int64_t k = 0; k < m.inputs; k += each) {
      const int64_t here = m.inputs - k < each ? m.inputs - k : each;
      if (!row || k_blocks > 1) pack_k_block(m, first, k, here, w);
      multiply_k_block(w, x + row * ldx + k, ldx, count, here, prefetch);
    }
    store_panel(m, w.sums, bias, first, count, y + row * ldy * (y_format == BF16 ? 2 : 4), y_format, ldy);
  }
}
#endif

}  // namespace matrices

#endif
