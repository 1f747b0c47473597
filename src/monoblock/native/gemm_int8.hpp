// GEMM of 8- and 4-bit weights with many rows of int8 inputs, by integer (VNNI) dot products. Part of matrix.hpp.
//
// A thread packs a panel of 64 rows of weights, so that a vector holds four consecutive codes of each of 16 rows. It then
// multiplies the panel by six rows of inputs at a time, four consecutive inputs of which are broadcast to all lanes. The
// sums of a group stay integers in registers, no horizontal sums are needed, and each group is scaled once for 16 outputs.
//
// The instruction multiplies unsigned by signed bytes: inputs become unsigned by adding 128, and the integer sums of a group
// start at -128 times the sum of its codes, which makes them exact.
#pragma once

#if defined(__AVX512VNNI__)

namespace matrices {

constexpr int SIDE = 16;               // rows of weights in a vector
constexpr int PANEL = 64;              // rows of weights of a panel
constexpr int VECTORS = PANEL / SIDE;  // vectors of a register tile
constexpr int TOKENS = 6;              // rows of inputs of a register tile: their integer sums fill 24 registers

// A packed panel: codes (padded / 4, VECTORS, SIDE, 4), those of INT8 less 128, those of INT4 without a low less 8; scale,
// start, and low if the matrix has it (groups, PANEL), which stands for a code of 0 here; bias (PANEL).
struct PackedPanel {
  uint8_t* codes;
  float *scale, *low, *bias;
  int32_t* start;

  static int64_t bytes(int64_t inputs, int64_t group) {
    const int64_t padded = round_up(inputs, RUN);
    return PANEL * (padded + padded / group * 12 + 4) + 64;
  }

  PackedPanel(void* scratch, const Matrix& m) {
    const int64_t padded = round_up(m.inputs, RUN), scales = PANEL * padded / m.group;
    codes = (uint8_t*)round_up((int64_t)scratch, 64);
    scale = (float*)(codes + PANEL * padded);
    low = scale + scales;
    start = (int32_t*)(low + scales);
    bias = (float*)(start + scales);
  }
};

// Packs the rows [first, first + PANEL) of the matrix; the last row stands in for rows beyond its end.
inline void pack_panel(const Matrix& m, int64_t first, const PackedPanel& to) {
  const int64_t padded = round_up(m.inputs, RUN);
  const int64_t bytes = row_bytes(m);
  const uint8_t* rows[PANEL];
  for (int r = 0; r < PANEL; ++r) {
    const int64_t row = first + r < m.outputs ? first + r : m.outputs - 1;
    rows[r] = (const uint8_t*)m.data + row * bytes;
    to.bias[r] = bias_of(m, row);
    RowScales(m, row).for_each([&](int64_t g, float scale, float low) {
      to.scale[g * PANEL + r] = scale;
      if (m.low) to.low[g * PANEL + r] = low + (m.format == INT8 ? 128 * scale : 0);
    });
  }
  typedef uint8_t Codes __attribute__((vector_size(64)));
  const uint8_t zero = m.low ? 0 : 8;  // of INT4
  const __m512i ones = _mm512_set1_epi8(1);
  for (int side = 0; side < VECTORS; ++side) {
    __m512i sums = {};
    for (int64_t k = 0; k < padded; k += 64) {
      Words v[SIDE];
      UNROLL for (int r = 0; r < SIDE; ++r) {
        const uint8_t* row = rows[side * SIDE + r];
        if (m.format == INT8)
          v[r] = load<Words>(row + k) ^ 0x80808080u;
        else  // the low nibbles of a run of 128 are its first 64 codes, the high nibbles the others
          v[r] = (Words)((Codes)(load<Words>(row + k / RUN * 64) >> (k % RUN ? 4 : 0) & 0x0f0f0f0fu) - zero);
      }
      transpose(v);
      UNROLL for (int i = 0; i < SIDE; ++i) {
        store(to.codes + (k / 4 + i) * PANEL * 4 + side * 64, v[i]);
        sums = _mm512_dpbusd_epi32(sums, ones, (__m512i)v[i]);
        if ((k + 4 * i + 4) % m.group == 0) {
          store(to.start + (k + 4 * i) / m.group * PANEL + side * SIDE, (Ints)sums * -128);
          sums = __m512i{};
        }
      }
    }
  }
}

// sums (T, PANEL) += T rows of inputs times a packed panel, for one group of inputs.
template <int T, int GROUP, bool LOW>
inline void multiply_int8_group(const PackedPanel& w, int64_t g, const Prepared& p, int64_t row, float* sums) {
  const uint8_t* codes = w.codes + g * GROUP * PANEL;
  const int8_t* q = p.q + row * p.padded + g * GROUP;
  __m512i dot[T][VECTORS];
  UNROLL for (int i = 0; i < VECTORS; ++i) {
    dot[0][i] = _mm512_loadu_si512(w.start + g * PANEL + i * SIDE);
    UNROLL for (int t = 1; t < T; ++t) dot[t][i] = dot[0][i];
  }
  _Pragma("GCC unroll 4") for (int k = 0; k < GROUP; k += 4) {
    __m512i four[VECTORS];
    UNROLL for (int i = 0; i < VECTORS; ++i) four[i] = _mm512_loadu_si512(codes + k * PANEL + i * 64);
    UNROLL for (int t = 0; t < T; ++t) {
      int32_t same;
      memcpy(&same, q + t * p.padded + k, 4);
      const __m512i x = _mm512_xor_si512(_mm512_set1_epi32(same), _mm512_set1_epi32(int(0x80808080u)));
      // Not the intrinsic: GCC 12 keeps its sums in memory when there are as many as these.
      UNROLL for (int i = 0; i < VECTORS; ++i) asm("vpdpbusd %2, %1, %0" : "+v"(dot[t][i]) : "v"(x), "v"(four[i]));
    }
  }
  UNROLL for (int i = 0; i < VECTORS; ++i) {
    const Floats scale = load<Floats>(w.scale + g * PANEL + i * SIDE);
    UNROLL for (int t = 0; t < T; ++t) {
      const int64_t own = (row + t) * p.blocks + g;
      float* at = sums + t * PANEL + i * SIDE;
      Floats sum = load<Floats>(at) + __builtin_convertvector((Ints)dot[t][i], Floats) * (scale * p.q_scale[own]);
      if (LOW) sum += load<Floats>(w.low + g * PANEL + i * SIDE) * p.q_sum[own];
      store(at, sum);
    }
  }
}

template <int T, int GROUP, bool LOW>
__attribute__((noinline)) void multiply_int8_groups(const PackedPanel& w, const Prepared& p, int64_t row, float* sums) {
  for (int64_t g = 0; g < p.padded / GROUP; ++g) multiply_int8_group<T, GROUP, LOW>(w, g, p, row, sums);
}

template <int T, bool LOW>
inline void multiply_int8_rows(const Matrix& m, const PackedPanel& w, const Prepared& p, int64_t row, float* sums) {
  switch (m.group) {
    case RUN: return multiply_int8_groups<T, RUN, LOW>(w, p, row, sums);
    case 64: return multiply_int8_groups<T, 64, LOW>(w, p, row, sums);
    case 32: return multiply_int8_groups<T, 32, LOW>(w, p, row, sums);
    default: return multiply_int8_groups<T, LEAST_GROUP, LOW>(w, p, row, sums);
  }
}

// Outputs of T rows of inputs for a packed panel.
template <int T>
inline void multiply_panel(const Matrix& m, const PackedPanel& w, int64_t first, const Prepared& p, int64_t row, char* y,
                           int32_t y_format, int64_t ldy) {
  alignas(64) float sums[T * PANEL] = {};
  m.low ? multiply_int8_rows<T, true>(m, w, p, row, sums) : multiply_int8_rows<T, false>(m, w, p, row, sums);
  for (int i = 0; i < VECTORS; ++i) {
    const int64_t output = first + i * SIDE, left = m.outputs - output;
    if (left <= 0) break;
    const __mmask16 mask = left < SIDE ? (1u << left) - 1 : 0xffffu;
    const Floats bias = load<Floats>(w.bias + i * SIDE);
    for (int t = 0; t < T; ++t) {
      const Floats sum = load<Floats>(sums + t * PANEL + i * SIDE) + bias;
      const int64_t at = (row + t) * ldy + output;
      if (y_format == BF16)
        _mm256_mask_storeu_epi16(y + at * 2, mask, (__m256i)to_bf16(sum));
      else
        _mm512_mask_storeu_ps(y + at * 4, mask, (__m512)sum);
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
