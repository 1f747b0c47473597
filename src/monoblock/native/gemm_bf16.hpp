// GEMM of bf16 weights (uncompressed, or in 12 bits) with many rows of bf16 inputs. Part of matrix.hpp.
//
// As in gemm_int8.hpp, a thread packs a panel of 64 rows of weights, here so that a vector holds two consecutive weights of
// each of 16 rows, and multiplies it by six rows of inputs at a time. A packed K block stays in L2 for all rows of inputs,
// while the rows that are packed next are prefetched. Packing the weights once and caching them would be 1 to 3% faster, but
// needs a second copy of the model; oneDNN also reorders the weights in each product, which takes 5% of its time.
#pragma once

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)

namespace matrices {

constexpr int64_t K_BLOCK = 3072;     // inputs of a K block: 384 KB with its 64 rows
constexpr int64_t ROW_BLOCK = 512;    // rows of inputs whose sums a thread holds: 128 KB
constexpr int ACROSS = PANEL / SIDE;  // vectors across a panel's rows

// One thread's scratch.
struct PackedBlock {
  uint32_t* weights;  // (K_BLOCK / 2, PANEL), pairs of consecutive weights of a row
  float* sums;        // (ROW_BLOCK, PANEL)
  uint16_t* rows;     // (SIDE, K_BLOCK), weights decompressed from 12 bits

  static constexpr int64_t BYTES = K_BLOCK * PANEL * 2 + ROW_BLOCK * PANEL * 4 + SIDE * K_BLOCK * 2;

  explicit PackedBlock(char* scratch) {
    weights = (uint32_t*)scratch;
    sums = (float*)(scratch + K_BLOCK * PANEL * 2);
    rows = (uint16_t*)(sums + ROW_BLOCK * PANEL);
  }
};

// Packs the weights [k, k + count) of the rows [first, first + PANEL); the last row stands in for rows beyond the end.
inline void pack_k_block(const Matrix& m, int64_t first, int64_t k, int64_t count, const PackedBlock& to) {
  for (int side = 0; side < ACROSS; ++side) {
    const uint16_t* rows[SIDE];
    for (int r = 0; r < SIDE; ++r) {
      const int64_t output = first + side * SIDE + r;
      rows[r] = bf16_weights(m, output < m.outputs ? output : m.outputs - 1, k, count, to.rows + r * K_BLOCK);
    }
    for (int64_t i = 0; i < count; i += 32) {
      const __mmask32 mask = count - i >= 32 ? 0xffffffffu : (1u << (count - i)) - 1;
      Words v[SIDE];
      UNROLL for (int r = 0; r < SIDE; ++r) v[r] = (Words)_mm512_maskz_loadu_epi16(mask, rows[r] + i);
      transpose(v);
      UNROLL for (int p = 0; p < SIDE; ++p) store(to.weights + (i / 2 + p) * PANEL + side * SIDE, v[p]);
    }
  }
}

// sums (T, PANEL) += T rows of inputs times a packed K block; `first`: the sums begin at 0.
template <int T>
inline void multiply_k_block(const uint32_t* weights, const uint16_t* x, int64_t ldx, int64_t pairs, float* sums,
                             bool first, WeightPrefetch& prefetch) {
  constexpr int64_t PREFETCH_INTERVAL = 16;  // pairs between two prefetched cache lines
  Floats own[T][ACROSS] = {};
  if (!first)
    UNROLL for (int t = 0; t < T; ++t)
      UNROLL for (int i = 0; i < ACROSS; ++i) own[t][i] = load<Floats>(sums + t * PANEL + i * SIDE);
  for (int64_t start = 0; start < pairs; start += PREFETCH_INTERVAL) {
    prefetch.step();
    const int64_t end = start + PREFETCH_INTERVAL < pairs ? start + PREFETCH_INTERVAL : pairs;
    _Pragma("GCC unroll 2") for (int64_t p = start; p < end; ++p) {
      __m512bh two[ACROSS];
      UNROLL for (int i = 0; i < ACROSS; ++i) two[i] = (__m512bh)_mm512_loadu_si512(weights + p * PANEL + i * SIDE);
      UNROLL for (int t = 0; t < T; ++t) {
        const __m512bh same = (__m512bh)in_register(Words{} + load<uint32_t>(x + t * ldx + 2 * p));
        UNROLL for (int i = 0; i < ACROSS; ++i)
          own[t][i] = (Floats)_mm512_dpbf16_ps((__m512)own[t][i], two[i], same);
      }
    }
  }
  UNROLL for (int t = 0; t < T; ++t)
    UNROLL for (int i = 0; i < ACROSS; ++i) store(sums + t * PANEL + i * SIDE, own[t][i]);
}

// All rows of inputs (at most ROW_BLOCK) times the packed K block that begins at input k.
inline void multiply_rows(const PackedBlock& w, const uint16_t* x, int64_t ldx, int64_t rows, int64_t k, int64_t count,
                      WeightPrefetch& prefetch) {
  const int64_t pairs = (count + 1) / 2;
  x += k;
  for (int64_t row = 0; row < rows; row += TOKENS, x += TOKENS * ldx) {
    float* sums = w.sums + row * PANEL;
    switch (rows - row) {
      case 1: multiply_k_block<1>(w.weights, x, ldx, pairs, sums, !k, prefetch); break;
      case 2: multiply_k_block<2>(w.weights, x, ldx, pairs, sums, !k, prefetch); break;
      case 3: multiply_k_block<3>(w.weights, x, ldx, pairs, sums, !k, prefetch); break;
      case 4: multiply_k_block<4>(w.weights, x, ldx, pairs, sums, !k, prefetch); break;
      case 5: multiply_k_block<5>(w.weights, x, ldx, pairs, sums, !k, prefetch); break;
      default: multiply_k_block<TOKENS>(w.weights, x, ldx, pairs, sums, !k, prefetch);
    }
  }
}

// The bias of SIDE outputs; 0 for those beyond the end.
inline Floats biases_of(const Matrix& m, int64_t first) {
  Floats bias = {};
  if (m.bias)
    for (int o = 0; o < SIDE && first + o < m.outputs; ++o) bias[o] = bias_of(m, first + o);
  return bias;
}

// y[row, first ...) = sums + bias
inline void store_panel(const Matrix& m, const float* sums, int64_t first, int64_t rows, char* y, int32_t y_format,
                      int64_t ldy) {
  const int64_t count = first + PANEL < m.outputs ? PANEL : m.outputs - first;
  Floats bias[ACROSS];
  for (int side = 0; side < ACROSS; ++side) bias[side] = biases_of(m, first + side * SIDE);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t o = 0; o < count; o += SIDE) {
      const int64_t left = count - o, at = row * ldy + first + o;
      const Floats sum = load<Floats>(sums + row * PANEL + o) + bias[o / SIDE];
      const __mmask16 mask = left < SIDE ? (1u << left) - 1 : 0xffffu;
      if (y_format == F32)
        _mm512_mask_storeu_ps(y + at * 4, mask, (__m512)sum);
      else
        _mm256_mask_storeu_epi16(y + at * 2, mask, (__m256i)_mm512_cvtneps_pbh((__m512)sum));
    }
}

// Outputs [first, first + PANEL) of all rows. The weights of a later panel are prefetched meanwhile.
inline void bf16_panel(const Matrix& m, const PackedBlock& w, int64_t first, const uint16_t* x, int64_t ldx, int64_t rows, char* y,
                       int32_t y_format, int64_t ldy, WeightPrefetch prefetch = {}) {
  const int64_t k_blocks = (m.inputs + K_BLOCK - 1) / K_BLOCK;
  const int64_t each = round_up((m.inputs + k_blocks - 1) / k_blocks, RUN);
  for (int64_t row = 0; row < rows; row += ROW_BLOCK) {
    const int64_t count = rows - row < ROW_BLOCK ? rows - row : ROW_BLOCK;
    for (int64_t k = 0; k < m.inputs; k += each) {
      const int64_t here = m.inputs - k < each ? m.inputs - k : each;
      if (!row || k_blocks > 1) pack_k_block(m, first, k, here, w);
      multiply_rows(w, x + row * ldx, ldx, count, k, here, prefetch);
    }
    store_panel(m, w.sums, first, count, y + row * ldy * (y_format == BF16 ? 2 : 4), y_format, ldy);
  }
}

}  // namespace matrices

#endif
