// GEMM of 8- and 4-bit weights with many rows of int8 inputs, by integer (VNNI) dot products. Part of matrix.hpp.
//
// A thread packs a panel of 64 rows of weights, so that a vector holds four consecutive codes of each of 16 rows. It then
// multiplies the panel by six rows of inputs at a time, four consecutive inputs of which are broadcast to all lanes. The
// sums of a group stay integers in registers, no horizontal sums are needed, and each group is scaled once for 16 outputs.
#pragma once

#if defined(__AVX512VNNI__)

namespace matrices {

constexpr int SIDE = 16;    // rows of weights in a vector
constexpr int PANEL = 64;   // rows of weights of a panel
constexpr int PAIR = 2;     // vectors of a register tile
constexpr int TOKENS = 6;   // rows of inputs of a register tile: TOKENS * PAIR integer and as many float sums fit the registers

// A packed panel: codes (PANEL / 32, padded / 4, 2, SIDE, 4); scale and low (groups, PANEL).
struct PackedPanel {
  uint8_t* codes;
  float *scale, *low;

  static int64_t bytes(const Matrix& m) {
    const int64_t padded = round_up(m.inputs, RUN);
    return PANEL * (padded + padded / m.group * 8) + 64;
  }

  PackedPanel(void* scratch, const Matrix& m) {
    const int64_t padded = round_up(m.inputs, RUN);
    codes = (uint8_t*)round_up((int64_t)scratch, 64);
    scale = (float*)(codes + PANEL * padded);
    low = scale + PANEL * padded / m.group;
  }
};

// Packs the rows [first, first + PANEL) of the matrix; the last row stands in for rows beyond its end.
inline void pack_panel(const Matrix& m, int64_t first, const PackedPanel& to) {
  const int64_t padded = round_up(m.inputs, RUN), groups = padded / m.group;
  const int64_t bytes = row_bytes(m);
  const uint8_t* rows[PANEL];
  for (int r = 0; r < PANEL; ++r) {
    const int64_t row = first + r < m.outputs ? first + r : m.outputs - 1;
    rows[r] = (const uint8_t*)m.data + row * bytes;
    for (int64_t g = 0; g < groups; ++g) {
      const float scale = from_half(m.scale[row * groups + g]);
      to.scale[g * PANEL + r] = scale;
      to.low[g * PANEL + r] = m.format == INT8 ? -128 * scale : from_half(m.low[row * groups + g]);
    }
  }
  for (int64_t k = 0; k < padded; k += 64)
    for (int side = 0; side < PANEL / SIDE; ++side) {
      Words v[SIDE];
      UNROLL for (int r = 0; r < SIDE; ++r) {
        const uint8_t* row = rows[side * SIDE + r];
        if (m.format == INT8)
          v[r] = load<Words>(row + k);
        else  // the low nibbles of a run of 128 are its first 64 codes, the high nibbles the others
          v[r] = load<Words>(row + k / RUN * 64) >> (k % RUN ? 4 : 0) & 0x0f0f0f0fu;
      }
      transpose(v);
      uint8_t* at = to.codes + ((side / PAIR * padded / 4 + k / 4) * PAIR + side % PAIR) * 64;
      UNROLL for (int i = 0; i < SIDE; ++i) store(at + i * PAIR * 64, v[i]);
    }
}

// sums += T rows of inputs times 32 rows of weights, the half `part` of a panel.
template <int T, int GROUP>
inline void multiply_half_panel(const PackedPanel& w, int part, const Prepared& p, int64_t row,
                                Floats (&sums)[T][PAIR]) {
  const int64_t groups = p.padded / GROUP;
  const uint8_t* codes = w.codes + part * PAIR * SIDE * p.padded;
  const int8_t* q = p.q + row * p.padded;
  for (int64_t g = 0; g < groups; ++g) {
    __m512i dot[T][PAIR] = {};
    UNROLL for (int k = 0; k < GROUP; k += 4, codes += PAIR * 64, q += 4) {
      __m512i four[PAIR];
      UNROLL for (int i = 0; i < PAIR; ++i) four[i] = _mm512_loadu_si512(codes + i * 64);
      UNROLL for (int t = 0; t < T; ++t) {
        int32_t same;
        memcpy(&same, q + t * p.padded, 4);
        const __m512i x = _mm512_set1_epi32(same);
        UNROLL for (int i = 0; i < PAIR; ++i) dot[t][i] = _mm512_dpbusd_epi32(dot[t][i], four[i], x);
      }
    }
    UNROLL for (int i = 0; i < PAIR; ++i) {
      const int64_t at = g * PANEL + (part * PAIR + i) * SIDE;
      const Floats scale = load<Floats>(w.scale + at), low = load<Floats>(w.low + at);
      UNROLL for (int t = 0; t < T; ++t) {
        const int64_t own = (row + t) * p.blocks + g;
        sums[t][i] += __builtin_convertvector((Ints)dot[t][i], Floats) * (scale * p.q_scale[own]);
        sums[t][i] += low * p.q_sum[own];
      }
    }
  }
}

template <int T>
inline void multiply_panel(const Matrix& m, const PackedPanel& w, int64_t first, const Prepared& p, int64_t row, char* y,
                     int32_t y_format, int64_t ldy) {
  for (int part = 0; part < PANEL / SIDE / PAIR; ++part) {
    const int64_t start = first + part * PAIR * SIDE;
    if (start >= m.outputs) return;
    Floats sums[T][PAIR] = {};
    m.group == RUN ? multiply_half_panel<T, RUN>(w, part, p, row, sums)
                   : multiply_half_panel<T, RUN / 2>(w, part, p, row, sums);
    for (int i = 0; i < PAIR; ++i) {
      const int64_t output = start + i * SIDE, left = m.outputs - output;
      if (left <= 0) break;
      const int count = left < SIDE ? int(left) : SIDE;
      Floats bias = {};
      for (int lane = 0; lane < count; ++lane) bias[lane] = bias_of(m, output + lane);
      for (int t = 0; t < T; ++t) {
        const Floats sum = sums[t][i] + bias;
        const int64_t at = (row + t) * ldy + output;
        const Halves half = to_bf16(sum);
        if (y_format == BF16)
          memcpy(y + at * 2, &half, count * 2);
        else
          memcpy(y + at * 4, &sum, count * 4);
      }
    }
  }
}

// Outputs [first, first + PANEL) of all rows, for a packed panel.
inline void packed_rows(const Matrix& m, const PackedPanel& w, int64_t first, const Prepared& p, int64_t rows, void* y,
                        int32_t y_format, int64_t ldy) {
  int64_t row = 0;
  char* to = (char*)y;
  for (; row + TOKENS <= rows; row += TOKENS) multiply_panel<TOKENS>(m, w, first, p, row, to, y_format, ldy);
  switch (rows - row) {
    case 5: return multiply_panel<5>(m, w, first, p, row, to, y_format, ldy);
    case 4: return multiply_panel<4>(m, w, first, p, row, to, y_format, ldy);
    case 3: return multiply_panel<3>(m, w, first, p, row, to, y_format, ldy);
    case 2: return multiply_panel<2>(m, w, first, p, row, to, y_format, ldy);
    case 1: return multiply_panel<1>(m, w, first, p, row, to, y_format, ldy);
  }
}

// The same, after packing the panel.
inline void int8_panel(const Matrix& m, const PackedPanel& w, int64_t first, const Prepared& p, int64_t rows, void* y,
                       int32_t y_format, int64_t ldy) {
  pack_panel(m, first, w);
  packed_rows(m, w, first, p, rows, y, y_format, ldy);
}

}  // namespace matrices

#endif
