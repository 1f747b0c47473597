// Products of bf16 weights with any number of rows of inputs, whose sums are those of gemm_bf16.hpp: one chain of
// multiplications and additions of pairs for each output, in the order of the inputs. Part of matrix.hpp.
//
// 32 inputs of 16 rows of weights are transposed in registers, so that a vector holds a pair of each row, and multiplied by
// pairs of inputs that are broadcast: nothing is packed in memory, and no horizontal sums are needed. Transposing takes as
// long as multiplying 4 rows of inputs; from MANY_BF16_ROWS on, packing the weights for all rows is faster.
#pragma once

#if defined(__AVX512BF16__) && !defined(__AMX_TILE__)
#define MB_BF16_ROWS

namespace matrices {

constexpr int SIDE_ROWS = 12;            // rows of inputs whose sums fit the registers beside 16 vectors of weights
constexpr int64_t MANY_BF16_ROWS = 33;   // rows of inputs from which on panels are packed
constexpr int64_t ALONE_DISTANCE = 256;  // bytes: the prefetch for few rows of inputs

// The next 32 (or `left`) weights of SIDE rows: pairs[p] holds pair p of each row.
template <bool PREFETCH>
INLINE void load_pairs(const uint16_t* w, int64_t ldw, int64_t left, Words (&pairs)[SIDE]) {
  if (left >= 32) {
    UNROLL for (int r = 0; r < SIDE; ++r) {
      if (PREFETCH) __builtin_prefetch((const char*)(w + r * ldw) + ALONE_DISTANCE, 0, 2);
      pairs[r] = load<Words>(w + r * ldw);
    }
  } else {
    UNROLL for (int r = 0; r < SIDE; ++r) pairs[r] = (Words)_mm512_maskz_loadu_epi16((1u << left) - 1, w + r * ldw);
  }
  transpose(pairs);
}

// sums (T) += 32 inputs of T rows times pairs of weights.
template <int T>
INLINE void multiply_pairs(const Words (&pairs)[SIDE], const uint16_t* x, int64_t ldx, Floats (&sums)[T]) {
  UNROLL for (int p = 0; p < SIDE; ++p)
    UNROLL for (int t = 0; t < T; ++t) {
      const __m512bh same = (__m512bh)(Words{} + load<uint32_t>(x + t * ldx + 2 * p));
      sums[t] = (Floats)_mm512_dpbf16_ps((__m512)sums[t], (__m512bh)pairs[p], same);
    }
}

// y (T, S * SIDE) = T rows of inputs times S * SIDE rows of weights, with the bias. With one row of inputs S chains of sums
// hide the latency of the additions.
template <int T, int S>
inline void multiply_sides(const Matrix& m, const Prepared& in, int64_t first, float* y, int64_t ldy) {
  const uint16_t *w = (const uint16_t*)m.data + first * m.inputs, *x = in.bf;
  Floats sums[S][T] = {};
  for (int64_t k = 0; k < m.inputs; k += 32)
    UNROLL for (int s = 0; s < S; ++s) {
      Words pairs[SIDE];
      load_pairs<true>(w + s * SIDE * m.inputs + k, m.inputs, m.inputs - k, pairs);
      multiply_pairs(pairs, x + k, in.bf_stride(), sums[s]);
    }
  for (int s = 0; s < S; ++s) {
    const Floats bias = biases_of(m, first + s * SIDE);
    UNROLL for (int t = 0; t < T; ++t) store(y + t * ldy + s * SIDE, sums[s][t] + bias);
  }
}

// As `multiply_sides<T, 1>` for up to MANY_BF16_ROWS - 1 rows, in tiles of about the same size.
inline void multiply_side(const Matrix& m, const Prepared& in, int64_t rows, int64_t first, float* y, int64_t ldy) {
  const uint16_t* w = (const uint16_t*)m.data + first * m.inputs;
  const int64_t tiles = (rows + SIDE_ROWS - 1) / SIDE_ROWS, each = (rows + tiles - 1) / tiles;
  Floats sums[MANY_BF16_ROWS] = {};
  for (int64_t k = 0; k < m.inputs; k += 32) {
    Words pairs[SIDE];
    load_pairs<false>(w + k, m.inputs, m.inputs - k, pairs);
    for (int64_t row = 0; row < rows; row += each)
      one_row_tile<SIDE_ROWS>(row, int(rows - row < each ? rows - row : each), [&](int64_t row, auto count) {
        Floats own[count()];
        UNROLL for (int t = 0; t < count(); ++t) own[t] = sums[row + t];
        multiply_pairs<count()>(pairs, in.bf + row * in.bf_stride() + k, in.bf_stride(), own);
        UNROLL for (int t = 0; t < count(); ++t) sums[row + t] = own[t];
      });
  }
  const Floats bias = biases_of(m, first);
  for (int64_t t = 0; t < rows; ++t) store(y + t * ldy, sums[t] + bias);
}

// y[row * ldy + output] for all rows and the outputs [first, last), whose number is a multiple of SIDE unless they are the
// matrix's last.
inline void over_bf16_rows(const Matrix& m, const Prepared& x, int64_t rows, float* y, int64_t ldy, int64_t first, int64_t last,
                           char* scratch, WeightPrefetch prefetch) {
  if (rows < MANY_BF16_ROWS) {
    for (; rows == 1 && last - first >= 4 * SIDE; first += 4 * SIDE) multiply_sides<1, 4>(m, x, first, y + first, ldy);
    for (; last - first >= SIDE; first += SIDE) {
      if (rows > SIDE_ROWS)
        multiply_side(m, x, rows, first, y + first, ldy);
      else
        over_row_tiles<SIDE_ROWS>(rows, [&](int64_t, auto count) { multiply_sides<count(), 1>(m, x, first, y + first, ldy); });
    }
  }
  const PackedBlock packed((char*)round_up((int64_t)scratch, 64));
  for (; first < last; first += PANEL) bf16_panel(m, packed, first, x.bf, x.bf_stride(), rows, (char*)y, F32, ldy, prefetch);
}

}  // namespace matrices

#endif
