// GEMM of 8- and 4-bit weights with many rows of int8 inputs, by integer (VNNI) dot products. Part of matrix.hpp.
//
// A thread multiplies panels of 64 rows of weights. It packs a block of their codes, so that a vector holds four consecutive
// codes of 16 rows, and multiplies it by all rows of inputs, up to six at a time, four consecutive inputs of which are broadcast
// to all lanes. The block has all inputs and stays in L2, or a run of 128 and stays in L1 if there are few rows. The sums of a group stay integers in registers, no
// horizontal sums are needed, and each group is scaled once for 16 outputs.
//
// The instruction multiplies unsigned codes by signed inputs. Where codes stand for themselves less 128 or 8, the integer sums of
// a group start at that many times the sum of its inputs, negated. The order of the additions is that of CodeTile in gemv_tiles.hpp.
#pragma once

#if defined(__AVX512VNNI__)

namespace matrices {

constexpr int SIDE = 16;               // rows of weights in a vector
constexpr int PANEL = 64;              // rows of weights of a panel
constexpr int VECTORS = PANEL / SIDE;  // vectors of a register tile
constexpr int SETS = 4;                // sums of an output, to which groups are added in turn
constexpr int TOKENS = 6;              // rows of inputs of a register tile: their integer sums fill 24 registers
constexpr int64_t FEW_INT8_ROWS = 24;  // rows of inputs up to which a packed block has 128 inputs, for L1: it is read so seldom
                                       // that moving it to L2 takes as long as multiplying it

// A thread's scratch.
struct PackedPanel {
  uint8_t* codes;               // (padded / 4, VECTORS, SIDE, 4)
  float *scale, *low, *bias;    // (groups, PANEL), (groups, PANEL) if the matrix has it, (PANEL); low is that of the middle, or
                                // the bits of int32 zero points
  float* sums;                  // (FEW_INT8_ROWS, SETS, PANEL)

  static int64_t bytes(int64_t inputs, int64_t group) {
    const int64_t padded = round_up(inputs, RUN);
    return PANEL * (padded + padded / group * 8 + 4 + FEW_INT8_ROWS * SETS * 4) + 64;
  }

  PackedPanel(void* scratch, const Matrix& m) {
    codes = (uint8_t*)round_up((int64_t)scratch, 64);
    scale = (float*)(codes + PANEL * round_up(m.inputs, RUN));
    low = scale + PANEL * groups_of(m);
    bias = low + PANEL * groups_of(m);
    sums = bias + PANEL;
  }
};

// The rows [first, first + PANEL) of the matrix; the last row stands in for rows beyond its end.
struct PanelRows {
  int64_t row[PANEL];

  PanelRows(const Matrix& m, int64_t first) {
    for (int r = 0; r < PANEL; ++r) row[r] = first + r < m.outputs ? first + r : m.outputs - 1;
  }
};

template <int GROUP>
inline void pack_scales_of(const Matrix& m, const PanelRows& rows, const PackedPanel& to) {
  const int64_t groups = groups_of(m);
  for (int side = 0; side < PANEL; side += SIDE)
    for (int64_t g = 0; g < groups; g += SIDE) {
      const int64_t left = groups - g < SIDE ? groups - g : SIDE;
      Floats scale[SIDE], low[SIDE];
      for (int r = 0; r < SIDE; ++r) {
        const TileScales<1, GROUP> stored(m, rows.row[side + r], 0);
        stored.scales(g, left, [&](int, Floats own) { scale[r] = own; });
        if (stored.has_lows())
          stored.lows(g, left, [&](int, Floats own) { low[r] = m.format == INT8 ? own + scale[r] * 128.0f : own; });
        if (stored.has_zero_points()) low[r] = (Floats)_mm512_cvtepu8_epi32(stored.zeros(0, g, left));
      }
      transpose(scale);
      for (int i = 0; i < left; ++i) store(to.scale + (g + i) * PANEL + side, scale[i]);
      if (!m.low) continue;
      transpose(low);
      for (int i = 0; i < left; ++i) store(to.low + (g + i) * PANEL + side, low[i]);
    }
}

inline void pack_scales(const Matrix& m, const PanelRows& rows, const PackedPanel& to) {
  for (int r = 0; r < PANEL; ++r) to.bias[r] = bias_of(m, rows.row[r]);
  switch (m.group) {
    case RUN: return pack_scales_of<RUN>(m, rows, to);
    case 64: return pack_scales_of<64>(m, rows, to);
    case 32: return pack_scales_of<32>(m, rows, to);
    default: return pack_scales_of<LEAST_GROUP>(m, rows, to);
  }
}

// Packs the codes of the run that begins at input k.
inline void pack_run(const Matrix& m, const PanelRows& rows, int64_t k, uint8_t* to) {
  const int64_t bytes = row_bytes(m), each = m.format == INT8 ? RUN : RUN / 2;
  for (int side = 0; side < PANEL; side += SIDE)
    for (int64_t at = 0; at < each; at += 64) {
      Words v[SIDE];
      UNROLL for (int r = 0; r < SIDE; ++r)
        v[r] = load<Words>((const uint8_t*)m.data + rows.row[side + r] * bytes + k * each / RUN + at);
      transpose(v);
      uint8_t* codes = to + at * PANEL + side * 4;
      for (int i = 0; i < SIDE; ++i, codes += PANEL * 4)
        if (m.format == INT8) {
          store(codes, v[i]);
        } else {  // the low nibbles are the first 64 codes of the run, the high nibbles the others
          store(codes, v[i] & 0x0f0f0f0fu);
          store(codes + 64 * PANEL, v[i] >> 4 & 0x0f0f0f0fu);
        }
    }
}

// What does not change from one group to the next.
struct PanelProduct {
  const Matrix& m;
  const PackedPanel& w;
  const Prepared& p;
  int middle;     // the code that stands for `low`, or for 0; 0 with zero points
  bool zeros;     // `low` has zero points
  int lines;      // cache lines that are prefetched for each 16 inputs of a register tile
  WeightPrefetch& prefetch;
};

// `multiply_codes` for six rows of inputs, whose 24 vectors of sums leave eight registers: GCC 12 would move sums to the stack.
// Registers: zmm24 to zmm27 hold the codes, zmm28 and zmm29 the inputs of two rows; rdx and rcx are rows 0 and 3.
#define MB_ROW(x, a, b, c, d)                                                            \
  "vpdpbusd %%zmm" #x ", %%zmm24, %" #a "\n\tvpdpbusd %%zmm" #x ", %%zmm25, %" #b "\n\t" \
  "vpdpbusd %%zmm" #x ", %%zmm26, %" #c "\n\tvpdpbusd %%zmm" #x ", %%zmm27, %" #d "\n\t"
#define MB_FOUR(k, at0, at1, at2, at3)                                                                    \
  "vmovdqa64 " #at0 "(%%rax), %%zmm24\n\tvmovdqa64 " #at1 "(%%rax), %%zmm25\n\t"                          \
  "vmovdqa64 " #at2 "(%%rax), %%zmm26\n\tvmovdqa64 " #at3 "(%%rax), %%zmm27\n\t"                          \
  "vpbroadcastd " #k "(%%rdx), %%zmm28\n\tvpbroadcastd " #k "(%%rdx,%26), %%zmm29\n\t"                    \
  MB_ROW(28, 0, 1, 2, 3) MB_ROW(29, 4, 5, 6, 7)                                                           \
  "vpbroadcastd " #k "(%%rdx,%26,2), %%zmm28\n\tvpbroadcastd " #k "(%%rcx), %%zmm29\n\t"                  \
  MB_ROW(28, 8, 9, 10, 11) MB_ROW(29, 12, 13, 14, 15)                                                     \
  "vpbroadcastd " #k "(%%rcx,%26), %%zmm28\n\tvpbroadcastd " #k "(%%rcx,%26,2), %%zmm29\n\t"              \
  MB_ROW(28, 16, 17, 18, 19) MB_ROW(29, 20, 21, 22, 23)
#define MB_START(at, a, b, c, d)                                                                       \
  "vpbroadcastd " #at "(%27), %" #a "\n\tvmovdqa64 %" #a ", %" #b "\n\tvmovdqa64 %" #a ", %" #c "\n\t" \
  "vmovdqa64 %" #a ", %" #d "\n\t"

template <int GROUP>
INLINE void multiply_codes_of_six(const uint8_t* codes, const int8_t* q, int64_t padded, const int32_t (&start)[TOKENS],
                                  __m512i (&dot)[TOKENS][VECTORS]) {
  asm(MB_START(0, 0, 1, 2, 3) MB_START(4, 4, 5, 6, 7) MB_START(8, 8, 9, 10, 11)
      MB_START(12, 12, 13, 14, 15) MB_START(16, 16, 17, 18, 19) MB_START(20, 20, 21, 22, 23)
      "movq %24, %%rax\n\tmovq %25, %%rdx\n\t"
      "leaq (%25,%26,2), %%rcx\n\taddq %26, %%rcx\n\t"
      "movl %28, %%esi\n\t"
      ".p2align 5\n1:\n\t"
      MB_FOUR(0, 0, 64, 128, 192) MB_FOUR(4, 256, 320, 384, 448)
      MB_FOUR(8, 512, 576, 640, 704) MB_FOUR(12, 768, 832, 896, 960)
      "addq $1024, %%rax\n\taddq $16, %%rdx\n\taddq $16, %%rcx\n\t"
      "subl $1, %%esi\n\tjnz 1b\n\t"
      : "=&v"(dot[0][0]), "=&v"(dot[0][1]), "=&v"(dot[0][2]), "=&v"(dot[0][3]), "=&v"(dot[1][0]), "=&v"(dot[1][1]),
        "=&v"(dot[1][2]), "=&v"(dot[1][3]), "=&v"(dot[2][0]), "=&v"(dot[2][1]), "=&v"(dot[2][2]), "=&v"(dot[2][3]),
        "=&v"(dot[3][0]), "=&v"(dot[3][1]), "=&v"(dot[3][2]), "=&v"(dot[3][3]), "=&v"(dot[4][0]), "=&v"(dot[4][1]),
        "=&v"(dot[4][2]), "=&v"(dot[4][3]), "=&v"(dot[5][0]), "=&v"(dot[5][1]), "=&v"(dot[5][2]), "=&v"(dot[5][3])
      : "r"(codes), "r"(q), "r"(padded), "r"(start), "i"(GROUP / 16)
      : "rax", "rcx", "rdx", "rsi", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "cc", "memory");
}
#undef MB_ROW
#undef MB_FOUR
#undef MB_START

// dot = start + T rows of inputs times the codes of one group.
template <int T, int GROUP>
INLINE void multiply_codes(const uint8_t* codes, const int8_t* q, int64_t padded, const int32_t (&start)[T], int lines,
                           WeightPrefetch& prefetch, __m512i (&dot)[T][VECTORS]) {
  if constexpr (T == TOKENS) {
    for (int line = 0; line < lines * GROUP / LEAST_GROUP; ++line) prefetch.step();
    return multiply_codes_of_six<GROUP>(codes, q, padded, start, dot);
  }
  WeightPrefetch own = prefetch;  // in registers
  UNROLL for (int t = 0; t < T; ++t)
    UNROLL for (int i = 0; i < VECTORS; ++i) dot[t][i] = _mm512_set1_epi32(start[t]);
  for (int k = 0; k < GROUP; k += LEAST_GROUP) {
    for (int line = 0; line < lines; ++line) own.step();
    UNROLL for (int j = k; j < k + LEAST_GROUP; j += 4) {
      __m512i four[VECTORS];
      UNROLL for (int i = 0; i < VECTORS; ++i) four[i] = _mm512_load_si512(codes + j * PANEL + i * 64);
      UNROLL for (int t = 0; t < T; ++t) {
        int32_t same;
        memcpy(&same, q + t * padded + j, 4);
        const __m512i x = _mm512_set1_epi32(same);
        // Not the intrinsic: GCC 12 keeps its sums in memory when there are many.
        UNROLL for (int i = 0; i < VECTORS; ++i) asm("vpdpbusd %2, %1, %0" : "+v"(dot[t][i]) : "v"(four[i]), "v"(x));
      }
    }
  }
  prefetch = own;
}

// sums (T, SETS, PANEL) += T rows of inputs times the codes of one group; BEGIN: the group is the first of its set of sums.
template <int T, int GROUP, bool LOW, bool BEGIN>
INLINE void multiply_int8_group(const PanelProduct& of, const uint8_t* codes, int64_t g, int64_t row, float* sums) {
  // Copies: the compiler must assume that stores of sums change what is behind `of`.
  const int64_t blocks = of.p.blocks, padded = of.p.padded, own = row * blocks + g;
  const float *x_scale = of.p.q_scale + own, *x_sum = of.p.q_sum + own;
  const float *scales = of.w.scale + g * PANEL, *lows = of.w.low + g * PANEL;
  const int32_t *totals = of.p.q_total + own, middle = of.middle;
  const bool zeros = LOW && of.zeros;
  const int8_t* q = of.p.q + row * padded + g * GROUP;
  int32_t start[T];
  UNROLL for (int t = 0; t < T; ++t) start[t] = -middle * totals[t * blocks];
  __m512i dot[T][VECTORS];
  multiply_codes<T, GROUP>(codes, q, padded, start, of.lines, of.prefetch, dot);
  sums += g % SETS * PANEL;
  UNROLL for (int i = 0; i < VECTORS; ++i) {
    const Floats scale = load<Floats>(scales + i * SIDE);
    UNROLL for (int t = 0; t < T; ++t) {
      float* to = sums + t * SETS * PANEL + i * SIDE;
      const Floats before = BEGIN ? Floats{} : load<Floats>(to);
      if (zeros) {  // both factors fit in 16 bits
        const __m512i total = _mm512_set1_epi32(totals[t * blocks]);
        dot[t][i] = _mm512_sub_epi32(dot[t][i], _mm512_madd_epi16(total, load<__m512i>(lows + i * SIDE)));
      }
      Floats sum = fused(__builtin_convertvector((Ints)dot[t][i], Floats), scale * x_scale[t * blocks], before);
      if (LOW && !zeros) sum = fused(load<Floats>(lows + i * SIDE), all(x_sum[t * blocks]), sum);
      store(to, sum);
    }
  }
}

// The same for the packed groups [begin, end). The sums must be 0 before the first, but with TOKENS rows only those of sets without
// a group.
template <int T, int GROUP, bool LOW>
__attribute__((noinline)) void multiply_int8_groups(const PanelProduct& of, int64_t begin, int64_t end, int64_t row, float* sums) {
  const uint8_t* codes = of.w.codes;
  if (T == TOKENS)  // the usual number of rows
    for (; begin < end && begin < SETS; ++begin, codes += GROUP * PANEL)
      multiply_int8_group<T, GROUP, LOW, T == TOKENS>(of, codes, begin, row, sums);
  for (; begin < end; ++begin, codes += GROUP * PANEL) multiply_int8_group<T, GROUP, LOW, false>(of, codes, begin, row, sums);
}

template <int T, bool LOW>
inline void multiply_int8_rows(const PanelProduct& of, int64_t begin, int64_t end, int64_t row, float* sums) {
  switch (of.m.group) {
    case RUN: return multiply_int8_groups<T, RUN, LOW>(of, begin, end, row, sums);
    case 64: return multiply_int8_groups<T, 64, LOW>(of, begin, end, row, sums);
    case 32: return multiply_int8_groups<T, 32, LOW>(of, begin, end, row, sums);
    default: return multiply_int8_groups<T, LEAST_GROUP, LOW>(of, begin, end, row, sums);
  }
}

template <int T>
inline void multiply_int8_rows(const PanelProduct& of, int64_t begin, int64_t end, int64_t row, float* sums) {
  of.m.low ? multiply_int8_rows<T, true>(of, begin, end, row, sums) : multiply_int8_rows<T, false>(of, begin, end, row, sums);
}

// y[row, first ...) = sums (rows, SETS, PANEL) + bias, for rows from `row` on.
inline void store_sums(const Matrix& m, const PackedPanel& w, const float* sums, int64_t first, int64_t row, int64_t rows, char* y,
                       int32_t y_format, int64_t ldy) {
  for (int i = 0; i < PANEL && first + i < m.outputs; i += SIDE) {
    const int64_t left = m.outputs - first - i;
    const __mmask16 mask = left < SIDE ? (1u << left) - 1 : 0xffffu;
    const Floats bias = load<Floats>(w.bias + i);
    for (int64_t r = 0; r < rows; ++r) {
      Floats set[SETS];
      UNROLL for (int j = 0; j < SETS; ++j) set[j] = load<Floats>(sums + (r * SETS + j) * PANEL + i);
      const Floats sum = (set[0] + set[2]) + (set[1] + set[3]) + bias;
      const int64_t at = (row + r) * ldy + first + i;
      if (y_format == BF16)
        _mm256_mask_storeu_epi16(y + at * 2, mask, (__m256i)to_bf16(sum));
      else
        _mm512_mask_storeu_ps(y + at * 4, mask, (__m512)sum);
    }
  }
}

// Calls tile(row, T) where T, up to MOST, is `count`.
template <int MOST, class F>
INLINE void one_row_tile(int64_t row, int count, F tile) {
  if (count == MOST) return tile(row, std::integral_constant<int, MOST>());
  if constexpr (MOST > 1) one_row_tile<MOST - 1>(row, count, tile);
}

// Calls tile(row, T) for all rows, up to MOST at a time, in tiles of about the same size.
template <int MOST = TOKENS, class F>
inline void over_row_tiles(int64_t rows, F tile) {
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row, tiles = (left + MOST - 1) / MOST, count = (left + tiles - 1) / tiles;
    one_row_tile<MOST>(row, int(count), tile);
    row += count;
  }
}

// Outputs [first, first + PANEL) of all rows. The weights of a later panel are prefetched meanwhile.
inline void int8_panel(const Matrix& m, const PackedPanel& w, int64_t first, const Prepared& p, int64_t rows, void* y,
                       int32_t y_format, int64_t ldy, WeightPrefetch prefetch = {}) {
  const PanelRows own(m, first);
  pack_scales(m, own, w);
  const int64_t tiles = (rows + TOKENS - 1) / TOKENS, lines = m.format == INT8 ? 16 : 8;  // of 64 rows, for 16 inputs
  const int middle = !m.low || (m.format == INT8 && has_lows(m)) ? zero_of(m) : 0;
  const PanelProduct product = {m, w, p, middle, has_zero_points(m), int((lines + tiles - 1) / tiles), prefetch};
  const int64_t groups = groups_of(m), each = RUN / m.group;
  if (rows <= FEW_INT8_ROWS) {
    memset(w.sums, 0, rows * SETS * PANEL * sizeof(float));
    for (int64_t g = 0; g < groups; g += each) {
      pack_run(m, own, g * m.group, w.codes);
      over_row_tiles(rows, [&](int64_t row, auto count) {
        multiply_int8_rows<count()>(product, g, g + each, row, w.sums + row * SETS * PANEL);
      });
    }
    return store_sums(m, w, w.sums, first, 0, rows, (char*)y, y_format, ldy);
  }
  for (int64_t k = 0; k < p.padded; k += RUN) pack_run(m, own, k, w.codes + k * PANEL);
  over_row_tiles(rows, [&](int64_t row, auto count) {
    alignas(64) float sums[count() * SETS * PANEL];
    if (count() != TOKENS || groups < SETS) memset(sums, 0, sizeof sums);
    multiply_int8_rows<count()>(product, 0, groups, row, sums);
    store_sums(m, w, sums, first, row, count(), (char*)y, y_format, ldy);
  });
}

}  // namespace matrices

#endif
