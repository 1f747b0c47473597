// Products of weights in any format with any number of rows of inputs, by the register tiles of gemv_tiles.hpp or bf16_rows.hpp: a row's
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

// Outputs of one call of `multiply_rows` with many rows: their weights and those that are prefetched stay in L2.
constexpr int64_t ROW_CHUNK = 64;

// Bytes of scratch that `multiply_rows` needs for matrices of up to `inputs` inputs.
inline int64_t row_scratch_bytes([[maybe_unused]] int64_t inputs) {
  int64_t bytes = 0;
#if defined(__AVX512VNNI__)
  bytes = PackedPanel::bytes(inputs, LEAST_GROUP);
#endif
#if defined(MB_BF16_ROWS)
  if (bytes < PackedBlock::BYTES + 64) bytes = PackedBlock::BYTES + 64;
#endif
  return bytes;
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
  switch (m.format) {
    case F32: return over_rows<FloatTile, R, REGISTERS == 32 ? 6 : 4>(m, x, rows, y, ldy, first, last);
#if defined(MB_BF16_ROWS)
    case BF16: return over_bf16_rows(m, x, rows, y, ldy, first, last, scratch, prefetch);
#else
    case BF16: return over_rows<Bfloat, R, PAIRS>(m, x, rows, y, ldy, first, last);
#endif
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
