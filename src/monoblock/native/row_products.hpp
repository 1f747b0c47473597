// Products of weights in any format with any number of rows of inputs, by the register tiles of gemv_tiles.hpp: a row's
// result has the same bits whatever other rows there are. Part of matrix.hpp.
#pragma once

namespace matrices {

constexpr int64_t ROWS_BYTES = 256 << 10;  // inputs that are multiplied by a chunk of weights at a time, which stay in L2

// Sets `p`, whose arrays have room for the rows, to these inputs of m; then `prepare_row` converts each row.
inline void place_rows(const Matrix& m, const float* x, int64_t ldx, Prepared& p) {
  p.padded = round_up(m.inputs, RUN), p.blocks = blocks_of(m);
  p.x = x, p.ldx = ldx;
#if !defined(MB_INT8_DOT)
  if ((m.format == INT8 || m.format == INT4) && m.inputs != p.padded) p.x = p.f, p.ldx = p.padded;
#endif
}

// Converts a row of inputs to the form that `multiply_rows` reads. Unlike `prepare`, the form does not depend on the number of
// rows. `x` is the whole input, as in `place_rows`.
inline void prepare_row(const Matrix& m, const float* x, int64_t ldx, int64_t row, Prepared& p) {
  const float* from = x + row * ldx;
  if (m.format == BF16 || m.format == LOSSLESS) {
#if defined(MB_BF16_DOT)
    round_to_bf16(from, m.inputs, p.bf + row * p.bf_stride(), p.padded);
#else
    deinterleave(from, m.inputs, p.f + row * p.padded, p.padded);
#endif
  }
  if (m.format != INT8 && m.format != INT4) return;
#if defined(MB_INT8_DOT)
  quantise_row(from, row, m, p);
#else
  if (p.x != x) pad(from, m.inputs, p.f + row * p.padded, p.padded);
  part_sums(m, p.x + row * p.ldx, p.q_sum + row * p.blocks, p.padded);
#endif
}

// R outputs, `gap` apart, of the rows [row, end), T rows at a time. The weights stay in L2 for the next rows: the hint is the
// temporal one.
template <class Tile, int R, int T>
inline void row_tiles(const Matrix& m, const Prepared& x, int64_t row, int64_t end, float* y, int64_t ldy, int64_t output,
                      int64_t gap) {
  const int64_t ahead = read_plans.get(Tile::FORMAT, FEW).distance;
  for (; row + T <= end; row += T) tile_by<Hint::temporal, Tile, R, T>(m, x, output, gap, int(row), ahead, y, ldy);
  if constexpr (T > 1)
    if (row < end) row_tiles<Tile, R, T / 2>(m, x, row, end, y, ldy, output, gap);
}

template <class Tile, int R, int T>
inline void over_rows(const Matrix& m, const Prepared& x, int64_t rows, float* y, int64_t ldy, int64_t first, int64_t last) {
  if (rows <= FEW) return over_tiles<Tile>(m, x, int(rows), y, ldy, first, last);
  const int64_t each = round_up(ROWS_BYTES / (m.inputs * 4) + 1, T);
  for (int64_t row = 0; row < rows; row += each) {
    const int64_t end = row + each < rows ? row + each : rows;
    by_strips(R, first, last, [&](int64_t output, int64_t gap) {
      gap ? row_tiles<Tile, R, T>(m, x, row, end, y, ldy, output, gap)
          : row_tiles<Tile, 1, T>(m, x, row, end, y, ldy, output, 0);
    });
  }
}

#if defined(__AVX512VNNI__)
constexpr int64_t MANY_CODE_ROWS = 13;  // from so many on, the GEMM is faster than the tiles

// Quantised weights: the GEMM adds in the order of the tiles.
template <int32_t FORMAT>
inline void over_code_rows(const Matrix& m, const Prepared& x, int64_t rows, float* y, int64_t ldy, int64_t first, int64_t last,
                           char* scratch, WeightPrefetch prefetch) {
  if (rows < MANY_CODE_ROWS) return over_tiles<CodeTile<FORMAT>>(m, x, int(rows), y, ldy, first, last);
  const PackedPanel panel(scratch, m);
  for (; first < last; first += PANEL) int8_panel(m, panel, first, x, rows, y, F32, ldy, prefetch);
}
#endif

#if defined(__AVX512BF16__)
constexpr int64_t PAIR_DEPTH = 2048;  // inputs of six rows that stay in L1: 24 KB
constexpr int PAIR_ROWS = 6, PAIR_OUTPUTS = 4, PAIR_STRIPS = 8;  // a register tile; strips whose sums stay in L1: 12 KB

// sums (PAIR_OUTPUTS, T) of vectors += `count` inputs of T rows times as many weights of PAIR_OUTPUTS rows; `begin`: from 0 on.
// `lines`: cache lines that are prefetched for 32 inputs.
template <int T>
inline void pair_tile(const uint16_t* w, int64_t ldw, const uint16_t* x, int64_t ldx, int64_t count, bool begin, Floats* sums,
                      int lines, WeightPrefetch& prefetch) {
  Floats own[PAIR_OUTPUTS][T] = {};
  if (!begin)
    UNROLL for (int r = 0; r < PAIR_OUTPUTS; ++r) UNROLL for (int t = 0; t < T; ++t) own[r][t] = sums[r * T + t];
  WeightPrefetch next = prefetch;  // in registers
  int64_t k = 0;
  for (; k + 2 * LANES <= count; k += 2 * LANES) {
    next.step();
    for (int line = 1; line < lines; ++line) next.step();
    Shorts weights[PAIR_OUTPUTS];
    UNROLL for (int r = 0; r < PAIR_OUTPUTS; ++r) weights[r] = in_register(load<Shorts>(w + r * ldw + k));
    PairTile::multiply<PAIR_OUTPUTS, T>(weights, x + k, ldx, own);
  }
  prefetch = next;
  if (k < count) {
    const __mmask32 mask = (1u << (count - k)) - 1;
    Shorts weights[PAIR_OUTPUTS];
    UNROLL for (int r = 0; r < PAIR_OUTPUTS; ++r) weights[r] = (Shorts)_mm512_maskz_loadu_epi16(mask, w + r * ldw + k);
    PairTile::multiply<PAIR_OUTPUTS, T>(weights, x + k, ldx, own);
  }
  UNROLL for (int r = 0; r < PAIR_OUTPUTS; ++r) UNROLL for (int t = 0; t < T; ++t) sums[r * T + t] = own[r][t];
}

// In 128 bits each: the sums of four vectors, added as by `sum`.
INLINE Floats four_sums(Floats a, Floats b, Floats c, Floats d) {
  const auto parts = [](Floats v, Floats w) {
    return (Floats)_mm512_shuffle_f32x4((__m512)v, (__m512)w, 0x44) + (Floats)_mm512_shuffle_f32x4((__m512)v, (__m512)w, 0xee);
  };
  const __m512 ab = (__m512)parts(a, b), cd = (__m512)parts(c, d);
  return (Floats)_mm512_shuffle_f32x4(ab, cd, 0x88) + (Floats)_mm512_shuffle_f32x4(ab, cd, 0xdd);
}

// y[t * ldy + r] = sum(sums[r][t]) + bias[r]
template <int T>
inline void store_pairs(const Floats* sums, __m128 bias, float* y, int64_t ldy) {
  UNROLL for (int t = 0; t < T; t += 4) {
    __m512 outputs[PAIR_OUTPUTS];  // row t + i in the 128 bits i
    UNROLL for (int r = 0; r < PAIR_OUTPUTS; ++r) {
      const Floats* own = sums + r * T + t;
      outputs[r] = (__m512)four_sums(own[0], own[t + 1 < T ? 1 : 0], own[t + 2 < T ? 2 : 0], own[t + 3 < T ? 3 : 0]);
    }
    const Floats first = (Floats)_mm512_unpacklo_ps(outputs[0], outputs[1]) + (Floats)_mm512_unpackhi_ps(outputs[0], outputs[1]);
    const Floats second = (Floats)_mm512_unpacklo_ps(outputs[2], outputs[3]) + (Floats)_mm512_unpackhi_ps(outputs[2], outputs[3]);
    const Floats all = (Floats)_mm512_unpacklo_pd((__m512d)first, (__m512d)second) +
                       (Floats)_mm512_unpackhi_pd((__m512d)first, (__m512d)second) + (Floats)_mm512_broadcast_f32x4(bias);
    _mm_storeu_ps(y + t * ldy, _mm512_castps512_ps128((__m512)all));
    if (t + 1 < T) _mm_storeu_ps(y + (t + 1) * ldy, _mm512_extractf32x4_ps((__m512)all, 1));
    if (t + 2 < T) _mm_storeu_ps(y + (t + 2) * ldy, _mm512_extractf32x4_ps((__m512)all, 2));
    if (t + 3 < T) _mm_storeu_ps(y + (t + 3) * ldy, _mm512_extractf32x4_ps((__m512)all, 3));
  }
}

// T rows of inputs times the rows [first, first + strips * PAIR_OUTPUTS) of bf16 weights.
template <int T>
inline void pair_rows(const uint16_t* w, int64_t ldw, const Matrix& m, const Prepared& x, int64_t row, int64_t first, int64_t strips,
                      float* y, int64_t ldy, int lines, WeightPrefetch& prefetch) {
  Floats sums[PAIR_STRIPS][PAIR_OUTPUTS * T];
  for (int64_t k = 0; k < m.inputs; k += PAIR_DEPTH) {
    const int64_t count = m.inputs - k < PAIR_DEPTH ? m.inputs - k : PAIR_DEPTH;
    for (int64_t strip = 0; strip < strips; ++strip)
      pair_tile<T>(w + strip * PAIR_OUTPUTS * ldw + k, ldw, x.bf + row * x.bf_stride() + k, x.bf_stride(), count, !k, sums[strip], lines,
                   prefetch);
  }
  for (int64_t strip = 0; strip < strips; ++strip) {
    float bias[PAIR_OUTPUTS];
    for (int r = 0; r < PAIR_OUTPUTS; ++r) bias[r] = bias_of(m, first + strip * PAIR_OUTPUTS + r);
    store_pairs<T>(sums[strip], _mm_loadu_ps(bias), y + row * ldy + first + strip * PAIR_OUTPUTS, ldy);
  }
}

// bf16 weights and many rows. The sums are those of PairTile; a few rows of inputs stay in L1, and the weights of the outputs in
// L2, while those of the next outputs are prefetched.
inline void over_pair_rows(const Matrix& m, const Prepared& x, int64_t rows, float* y, int64_t ldy, int64_t first, int64_t last,
                           WeightPrefetch prefetch) {
  const int64_t tiles = (rows + PAIR_ROWS - 1) / PAIR_ROWS;
  const int lines = int((PAIR_OUTPUTS + tiles - 1) / tiles);  // as many in all as the weights have
  while (last - first >= PAIR_OUTPUTS) {
    const int64_t whole = (last - first) / PAIR_OUTPUTS, strips = whole < PAIR_STRIPS ? whole : PAIR_STRIPS;
    const uint16_t* w = (const uint16_t*)m.data + first * m.inputs;
    over_row_tiles(rows, [&](int64_t row, auto count) {
      pair_rows<count()>(w, m.inputs, m, x, row, first, strips, y, ldy, lines, prefetch);
    });
    first += strips * PAIR_OUTPUTS;
  }
  for (; first < last; ++first) row_tiles<PairTile, 1, PAIR_ROWS>(m, x, 0, rows, y, ldy, first, 0);
}
#endif

// Outputs of one call of `multiply_rows` with many rows: their weights and those that are prefetched stay in L2.
inline int64_t row_chunk(const Matrix& m) { return m.format == BF16 && m.inputs > 3072 ? 32 : 64; }

// Bytes of scratch that `multiply_rows` needs for matrices of up to `inputs` inputs.
inline int64_t row_scratch_bytes([[maybe_unused]] int64_t inputs) {
#if defined(__AVX512VNNI__)
  return PackedPanel::bytes(inputs, LEAST_GROUP);
#else
  return 0;
#endif
}

// y[row * ldy + output] for all rows, which `prepare_row` has prepared, and the outputs [first, last), on the calling thread.
// `prefetch`: weights that the thread will need next.
inline void multiply_rows(const Matrix& m, const Prepared& x, int64_t rows, float* y, int64_t ldy, int64_t first, int64_t last,
                          [[maybe_unused]] char* scratch, [[maybe_unused]] WeightPrefetch prefetch) {
  constexpr int R = REGISTERS == 32 ? 4 : 2;
#if defined(MB_BF16_DOT)
  typedef PairTile Bfloat;
  constexpr int PAIRS = 6;
#else
  typedef WideTile Bfloat;
  constexpr int PAIRS = 4;
#endif
#if defined(__AVX512BF16__)
  if (m.format == BF16 && rows > FEW) return over_pair_rows(m, x, rows, y, ldy, first, last, prefetch);
#endif
  switch (m.format) {
    case F32: return over_rows<FloatTile, R, REGISTERS == 32 ? 6 : 4>(m, x, rows, y, ldy, first, last);
    case BF16: return over_rows<Bfloat, R, PAIRS>(m, x, rows, y, ldy, first, last);
    case LOSSLESS: return over_rows<LosslessTile<Bfloat>, R, 4>(m, x, rows, y, ldy, first, last);
#if defined(__AVX512VNNI__)
    case INT8: return over_code_rows<INT8>(m, x, rows, y, ldy, first, last, scratch, prefetch);
    case INT4: return over_code_rows<INT4>(m, x, rows, y, ldy, first, last, scratch, prefetch);
#else
    case INT8: return over_rows<CodeTile<INT8>, R, 4>(m, x, rows, y, ldy, first, last);
    case INT4: return over_rows<CodeTile<INT4>, R, 4>(m, x, rows, y, ldy, first, last);
#endif
  }
}

}  // namespace matrices
