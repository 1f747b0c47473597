// Register tiles of R rows of weights times T rows of inputs, for each weight format. Part of matrix.hpp.
//
// The rows of a tile are `gap` rows apart, and the next tile takes the rows that follow them, so that each of the R streams
// is sequential and the hardware prefetcher follows it; with adjacent rows each stream would end after one row. The hardware
// prefetcher does best with few streams: four are 10% faster than eight and, for 8-bit codes with their many cache lines,
// two are 25% faster. For bf16, two are 15% faster than three with long rows and fast memory; with eight rows of inputs,
// three rows of weights just fit the registers and are 25% faster than two.
#pragma once

#include "read_plan.hpp"

namespace matrices {

// Rows of weights of a tile: its sums, R * T vectors, must stay in registers. With VNNI, codes of all rows share T sums.
template <class Tile, int STREAMS, int T>
constexpr int rows_of() {
#if defined(__AVX512VNNI__)
  if (Tile::FORMAT == INT8 || Tile::FORMAT == INT4) return STREAMS;
#endif
  if (STREAMS == 3) return REGISTERS == 32 || T <= 4 ? 3 : 1;
  constexpr int fit = REGISTERS == 32 ? (T <= 4 ? 4 : 2) : (T <= 2 ? 4 : T <= 4 ? 2 : 1);
  return fit < STREAMS ? fit : STREAMS;
}

// float32 weights.
struct FloatTile {
  static constexpr int32_t FORMAT = F32;

  template <Hint HINT, int R, int T>
  static INLINE void run(const Matrix& m, const Prepared& p, int64_t output, int64_t gap, int row, int64_t ahead,
                         float (&out)[R][T]) {
    const float *w = (const float*)m.data + output * m.inputs, *x = p.x + row * p.ldx;
    Floats sums[R][T] = {};
    int64_t k = 0;
    for (; k + LANES <= m.inputs; k += LANES) step<HINT, R, T>(w + k, gap * m.inputs, x + k, p.ldx, ahead, sums);
    if (int64_t rest = m.inputs - k) {
      float last_w[R][LANES] = {}, last_x[T][LANES] = {};
      for (int r = 0; r < R; ++r) memcpy(last_w[r], w + r * gap * m.inputs + k, rest * 4);
      for (int t = 0; t < T; ++t) memcpy(last_x[t], x + t * p.ldx + k, rest * 4);
      step<HINT, R, T>(last_w[0], LANES, last_x[0], LANES, ahead, sums);
    }
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int t = 0; t < T; ++t) out[r][t] = sum(sums[r][t]);
  }

  template <Hint HINT, int R, int T>
  static INLINE void step(const float* w, int64_t ldw, const float* x, int64_t ldx, int64_t ahead,
                          Floats (&sums)[R][T]) {
    Floats weights[R];
    UNROLL for (int r = 0; r < R; ++r) {
      prefetch_ahead<HINT>(w + r * ldw, ahead);
      weights[r] = load<Floats>(w + r * ldw);
    }
    UNROLL for (int t = 0; t < T; ++t) {
      Floats v = load<Floats>(x + t * ldx);
      UNROLL for (int r = 0; r < R; ++r) sums[r][t] += weights[r] * v;
    }
  }
};

// bf16 weights, 2 * LANES of a row at a time. The derived tile provides `multiply` and chooses its `inputs`.
template <class Tile>
struct BfloatTile {
  static constexpr int32_t FORMAT = BF16;

  template <Hint HINT, int R, int T>
  static INLINE void run(const Matrix& m, const Prepared& p, int64_t output, int64_t gap, int row, int64_t ahead,
                         float (&out)[R][T]) {
    constexpr int STEP = 2 * LANES;
    const uint16_t* w = (const uint16_t*)m.data + output * m.inputs;
    const int64_t ldx = Tile::stride(p);
    const auto* x = Tile::inputs(p) + row * ldx;
    Floats sums[R][T] = {};
    int64_t k = 0;
    for (; k + STEP <= m.inputs; k += STEP) step<HINT, R, T>(w + k, gap * m.inputs, x + k, ldx, ahead, sums);
    if (int64_t rest = m.inputs - k) {
      uint16_t last[R][STEP] = {};
      for (int r = 0; r < R; ++r) memcpy(last[r], w + r * gap * m.inputs + k, rest * 2);
      step<HINT, R, T>(last[0], STEP, x + k, ldx, ahead, sums);
    }
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int t = 0; t < T; ++t) out[r][t] = sum(sums[r][t]);
  }

  template <Hint HINT, int R, int T, class X>
  static INLINE void step(const uint16_t* w, int64_t ldw, const X* x, int64_t ldx, int64_t ahead,
                          Floats (&sums)[R][T]) {
    Shorts weights[R];
    UNROLL for (int r = 0; r < R; ++r) prefetch_ahead<HINT>(w + r * ldw, ahead), weights[r] = in_register(load<Shorts>(w + r * ldw));
    Tile::template multiply<R, T>(weights, x, ldx, sums);
  }
};

// float32 inputs, deinterleaved by `prepare`. A 32-bit word holds two bf16 weights, which are widened to floats separately:
// the even columns are multiplied by one vector of inputs, the odd ones by the next.
struct WideTile : BfloatTile<WideTile> {
  static INLINE const float* inputs(const Prepared& p) { return p.f; }
  static INLINE int64_t stride(const Prepared& p) { return p.padded; }

  template <int R, int T>
  static INLINE void multiply(const Shorts (&weights)[R], const float* x, int64_t ldx, Floats (&sums)[R][T]) {
    Floats even[T], odd[T];
    UNROLL for (int t = 0; t < T; ++t) even[t] = load<Floats>(x + t * ldx), odd[t] = load<Floats>(x + t * ldx + LANES);
    UNROLL for (int r = 0; r < R; ++r) {
      const Words pair = bits<Words>(weights[r]);
      Floats first = bits<Floats>(pair << 16), second = bits<Floats>(pair & 0xffff0000u);
      UNROLL for (int t = 0; t < T; ++t) sums[r][t] += first * even[t];
      UNROLL for (int t = 0; t < T; ++t) sums[r][t] += second * odd[t];
    }
  }
};

#if defined(MB_BF16_DOT)
// bf16 inputs: one instruction (VDPBF16PS, BFDOT) multiplies LANES pairs and adds them in pairs to LANES floats.
struct PairTile : BfloatTile<PairTile> {
  static INLINE const uint16_t* inputs(const Prepared& p) { return p.bf; }
  static INLINE int64_t stride(const Prepared& p) { return p.bf_stride(); }

  template <int R, int T>
  static INLINE void multiply(const Shorts (&weights)[R], const uint16_t* x, int64_t ldx, Floats (&sums)[R][T]) {
    UNROLL for (int t = 0; t < T; ++t) {
      const Shorts v = load<Shorts>(x + t * ldx);
      UNROLL for (int r = 0; r < R; ++r)
        sums[r][t] = dot_pairs(sums[r][t], v, weights[r]);
    }
  }
};
#endif

#if defined(__AVX512VNNI__)
// Quantised weights with int8 inputs: one instruction (VPDPBUSD) multiplies 64 codes by 64 inputs and adds them in fours to
// 16 integers. With x = q * q_scale in a group,
//   sum(w x) = scale * q_scale * (sum(code * q) - zero * sum(q)) + low * q_scale * sum(q),
// where zero is the group's zero point, or without zero points 128 in INT8, and in INT4 8 if the matrix has no `low`, else 0; `low`
// is the weight of that code.
//
// The integer sum of a group is exact. Groups are added to four sums, group g to sum g % 4, and the four in pairs at the end.
// gemm_int8.hpp adds in the same order: a row's result has the same bits for any number of rows.
template <int32_t CODES>
struct CodeTile {
  static constexpr int32_t FORMAT = CODES;
  static constexpr int SETS = 4;  // groups of a row whose sums are found together
  enum Kind { NEITHER, LOWS, POINTS };  // what `low` of the matrix has: nothing, lows or zero points

  template <Hint HINT, int R, int T>
  static INLINE void run(const Matrix& m, const Prepared& p, int64_t output, int64_t gap, int row, int64_t ahead,
                         float (&out)[R][T]) {
    switch (m.group) {
      case RUN: return sum_of<HINT, R, T, RUN>(m, p, output, gap, row, ahead, out);
      case 64: return sum_of<HINT, R, T, 64>(m, p, output, gap, row, ahead, out);
      case 32: return sum_of<HINT, R, T, 32>(m, p, output, gap, row, ahead, out);
      default: return sum_of<HINT, R, T, LEAST_GROUP>(m, p, output, gap, row, ahead, out);
    }
  }

  template <Hint HINT, int R, int T, int GROUP>
  static INLINE void sum_of(const Matrix& m, const Prepared& p, int64_t output, int64_t gap, int row, int64_t ahead,
                            float (&out)[R][T]) {
    const int64_t groups = p.padded / GROUP;
    const TileScales<R, GROUP> stored(m, output, gap);
    const int kind = stored.has_lows() ? LOWS : stored.has_zero_points() ? POINTS : NEITHER;
    Floats sums[T] = {};  // lane 4 * r + g % 4 belongs to row r of the weights
    Floats scales[LANES / SETS], lows[LANES / SETS];  // of SETS groups of the rows; zero points as the bits of integers
    for (int64_t first = 0; first < groups; first += LANES) {
      const int count = groups - first < LANES ? int(groups - first) : LANES;
      read_scales<R>(stored, first, count, scales, lows);
      int i = 0;
      for (; i + SETS <= count; i += SETS)
        add_groups<HINT, R, T, GROUP, true>(m, p, output, gap, row, ahead, first + i, SETS, scales[i / SETS], lows[i / SETS], kind,
                                            sums);
      if (GROUP >= 64 && i < count)
        add_groups<HINT, R, T, GROUP, false>(m, p, output, gap, row, ahead, first + i, count - i, scales[i / SETS],
                                             lows[i / SETS], kind, sums);
    }
    UNROLL for (int t = 0; t < T; ++t) {
      const Floats pairs = sums[t] + (Floats)_mm512_permute_ps((__m512)sums[t], 0x4e);
      const Floats all = pairs + (Floats)_mm512_permute_ps((__m512)pairs, 0xb1);
      UNROLL for (int r = 0; r < R; ++r) out[r][t] = all[4 * r];
    }
  }

  // sums += the products of the groups [g, g + count); WHOLE: count is SETS.
  template <Hint HINT, int R, int T, int GROUP, bool WHOLE>
  static INLINE void add_groups(const Matrix& m, const Prepared& p, int64_t output, int64_t gap, int row, int64_t ahead,
                                int64_t g, int count, Floats scale, Floats low, int kind, Floats (&sums)[T]) {
    constexpr int VECTORS = SETS * GROUP / 64, TOKENS = T < 2 ? T : 2;
    const int64_t bytes = FORMAT == INT8 ? p.padded : p.padded / 2;
    const uint8_t* w = (const uint8_t*)m.data + output * bytes;
    const Stored<HINT> stored = {w, gap * bytes, g * GROUP / 64, ahead};
    if constexpr (FORMAT == INT8 || T == 1) {
      add_rows<R, TOKENS, GROUP, WHOLE>(stored, p, row, g, count, scale, low, kind, sums);
      if constexpr (T > 2) {
        const Stored<HINT, false> again = {w, gap * bytes, g * GROUP / 64, ahead};
        add_rest<R, T, TOKENS, GROUP, WHOLE>(again, p, row, g, count, scale, low, kind, sums);
      }
    } else {
      alignas(64) uint8_t unpacked[R * VECTORS * 64];
      UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int i = 0; i < VECTORS; ++i)
          if (WHOLE || i < count * GROUP / 64) _mm512_store_si512(unpacked + (r * VECTORS + i) * 64, stored.at(r, i));
      add_rest<R, T, 0, GROUP, WHOLE>(Unpacked<VECTORS>{unpacked}, p, row, g, count, scale, low, kind, sums);
    }
  }

  // `add_rows` for the rows of inputs from BEGIN on, two at a time.
  template <int R, int T, int BEGIN, int GROUP, bool WHOLE, class Codes>
  static INLINE void add_rest(const Codes& codes, const Prepared& p, int row, int64_t g, int count, Floats scale, Floats low,
                              int kind, Floats (&sums)[T]) {
    if constexpr (BEGIN + 2 <= T) {
      add_rows<R, 2, GROUP, WHOLE>(codes, p, row + BEGIN, g, count, scale, low, kind, sums + BEGIN);
      add_rest<R, T, BEGIN + 2, GROUP, WHOLE>(codes, p, row, g, count, scale, low, kind, sums);
    } else if constexpr (BEGIN < T) {
      add_rows<R, 1, GROUP, WHOLE>(codes, p, row + BEGIN, g, count, scale, low, kind, sums + BEGIN);
    }
  }

  // sums += the products of R rows of codes and T rows of inputs. `low`: lows or zero points, by `kind`.
  template <int R, int T, int GROUP, bool WHOLE, class Codes>
  static INLINE void add_rows(const Codes& codes, const Prepared& p, int row, int64_t g, int count, Floats scale, Floats low,
                              int kind, Floats* sums) {
    Ints dots[T];
    integer_sums<R, T, GROUP, WHOLE>(codes, p.q + row * p.padded + g * GROUP, p.padded, count, dots);
    UNROLL for (int t = 0; t < T; ++t) {
      const int64_t own = (row + t) * p.blocks + g;
      if (FORMAT == INT8 || kind != LOWS) {  // less the zero point, or the middle, times the sum of the inputs
        const Ints total = (Ints)_mm512_broadcast_i32x4(load<__m128i>(p.q_total + own));
        if (kind == POINTS)  // both factors fit in 16 bits
          dots[t] -= (Ints)_mm512_madd_epi16((__m512i)total, (__m512i)low);
        else
          dots[t] -= total << (FORMAT == INT8 ? 7 : 3);
      }
      const Floats factor = scale * (Floats)_mm512_broadcast_f32x4(_mm_loadu_ps(p.q_scale + own));
      sums[t] = fused(__builtin_convertvector(dots[t], Floats), factor, sums[t]);
      if (kind == LOWS) sums[t] = fused(low, (Floats)_mm512_broadcast_f32x4(_mm_loadu_ps(p.q_sum + own)), sums[t]);
    }
  }

  // Vectors of 64 codes of R rows, from vector `start` of each row on; `apart`: bytes between rows.
  template <Hint HINT, bool PREFETCH = true>
  struct Stored {
    const uint8_t* rows;
    int64_t apart, start, ahead;

    INLINE __m512i at(int r, int i) const {
      const uint8_t* from = rows + r * apart + (FORMAT == INT8 ? start + i : (start + i) / 2) * 64;
      if (PREFETCH && (FORMAT == INT8 || i % 2 == 0)) prefetch_ahead<HINT>(from, ahead);
      const __m512i codes = _mm512_loadu_si512(from);
      if (FORMAT == INT8) return codes;
      // The low nibbles of 64 bytes are one vector, the high nibbles the next.
      return _mm512_and_si512((start + i) % 2 ? _mm512_srli_epi16(codes, 4) : codes, _mm512_set1_epi8(15));
    }
  };

  template <int VECTORS>
  struct Unpacked {
    const uint8_t* rows;

    INLINE __m512i at(int r, int i) const { return _mm512_load_si512(rows + (r * VECTORS + i) * 64); }
  };

  // to[t], lane 4 * r + j: the sum of the products of group j of row r and row t of inputs.
  template <int R, int T, int GROUP, bool WHOLE, class Codes>
  static INLINE void integer_sums(const Codes& codes, const int8_t* x, int64_t padded, int count, Ints (&to)[T]) {
    constexpr int EACH = GROUP < 64 ? 64 / GROUP : 1;  // groups of a vector of codes
    Ints sums[T][SETS];
    UNROLL for (int j = 0; j < SETS; j += EACH) {
      if (!WHOLE && j >= count) {
        UNROLL for (int t = 0; t < T; ++t) sums[t][j] = Ints{};
        continue;
      }
      __m512i dots[T][R];
      multiply<R, T>(codes, x, padded, GROUP == RUN ? 2 * j : j / EACH, dots);
      if (GROUP == RUN) add_products<R, T>(codes, x, padded, 2 * j + 1, dots);
      UNROLL for (int t = 0; t < T; ++t)
        FORMAT == INT4 ? rows_in_lanes<R>(dots[t], sums[t] + j) : rows_in_parts<R, EACH>(dots[t], sums[t] + j);
    }
    UNROLL for (int t = 0; t < T; ++t) to[t] = FORMAT == INT4 ? groups_of_parts<EACH>(sums[t]) : groups_of_lanes(sums[t]);
  }

  // INT4. A vector's parts, of 128 bits, become: in lane r the sum of row r's part. The sums fit in 16 bits until the last
  // addition: 16 * 15 * 127 < 2^15.
  template <int R>
  static INLINE void rows_in_lanes(const __m512i (&rows)[R], Ints* to) {
    const Ints first = words_added(of<R, 0>(rows), of<R, 1>(rows));
    *to = words_added(first, R > 2 ? words_added(of<R, 2>(rows), of<R, 3>(rows)) : first);
  }

  // Then the parts of each group are added.
  template <int EACH>
  static INLINE Ints groups_of_parts(const Ints (&sums)[SETS]) {
    Ints all = sums[0];
    if (EACH == 1) all = parts_added(sums[0], sums[1], sums[2], sums[3]);
    if (EACH == 2) all = pick<0x88>(sums[0], sums[2]) + pick<0xdd>(sums[0], sums[2]);
    const __m512i transposed = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return (Ints)_mm512_permutexvar_epi32(transposed, (__m512i)all);
  }

  // INT8. The vectors of R rows become: in part r four sums of row r, for each of their EACH groups.
  template <int R, int EACH>
  static INLINE void rows_in_parts(const __m512i (&rows)[R], Ints* to) {
    const Ints a = of<R, 0>(rows), b = of<R, 1>(rows), c = of<R, 2>(rows), d = of<R, 3>(rows);
    if (EACH == 1) {
      to[0] = parts_added(a, b, c, d);
    } else if (EACH == 2) {
      const Ints ab = neighbours_added(a, b), cd = R > 2 ? neighbours_added(c, d) : ab;
      to[0] = pick<0x44>(ab, cd), to[1] = pick<0xee>(ab, cd);
    } else {
      const Ints lower_ab = pick<0x44>(a, b), lower_cd = pick<0x44>(c, d);
      const Ints upper_ab = pick<0xee>(a, b), upper_cd = pick<0xee>(c, d);
      to[0] = pick<0x88>(lower_ab, lower_cd), to[1] = pick<0xdd>(lower_ab, lower_cd);
      to[2] = pick<0x88>(upper_ab, upper_cd), to[3] = pick<0xdd>(upper_ab, upper_cd);
    }
  }

  // Then the lanes of each part are added.
  static INLINE Ints groups_of_lanes(const Ints (&sums)[SETS]) {
    const __m512i first = lanes_added(sums[0], sums[1]), second = lanes_added(sums[2], sums[3]);
    return (Ints)_mm512_unpacklo_epi64(first, second) + (Ints)_mm512_unpackhi_epi64(first, second);
  }

  // The additions of parts need one shuffle across them for two vectors: blends and additions have more units.

  // In the parts: the sums of the four parts of a, of b, of c and of d.
  static INLINE Ints parts_added(Ints a, Ints b, Ints c, Ints d) {
    return neighbours_added(halves_added(a, c), halves_added(b, d));
  }

  // Parts 0 + 2 and 1 + 3 of a, then of b.
  static INLINE Ints halves_added(Ints a, Ints b) {
    return (Ints)_mm512_mask_blend_epi64(0xf0, (__m512i)a, (__m512i)b) + pick<0x4e>(a, b);
  }

  // Parts a0 + a1, b0 + b1, a2 + a3, b2 + b3.
  static INLINE Ints neighbours_added(Ints a, Ints b) {
    const __m512i others = _mm512_set_epi64(13, 12, 7, 6, 9, 8, 3, 2);
    return (Ints)_mm512_mask_blend_epi64(0xcc, (__m512i)a, (__m512i)b) +
           (Ints)_mm512_permutex2var_epi64((__m512i)a, others, (__m512i)b);
  }

  // In each part: a0 + a2, b0 + b2, a1 + a3, b1 + b3.
  static INLINE __m512i lanes_added(Ints a, Ints b) {
    return (__m512i)((Ints)_mm512_unpacklo_epi32((__m512i)a, (__m512i)b) + (Ints)_mm512_unpackhi_epi32((__m512i)a, (__m512i)b));
  }

  // In each part: a0 + a1, a2 + a3, b0 + b1, b2 + b3, of integers that fit in 16 bits.
  static INLINE Ints words_added(Ints a, Ints b) {
    return (Ints)_mm512_madd_epi16(_mm512_packs_epi32((__m512i)a, (__m512i)b), _mm512_set1_epi16(1));
  }

  template <int R, int T, class Codes>
  static INLINE void multiply(const Codes& codes, const int8_t* x, int64_t padded, int i, __m512i (&to)[T][R]) {
    UNROLL for (int t = 0; t < T; ++t) UNROLL for (int r = 0; r < R; ++r) to[t][r] = __m512i{};
    add_products<R, T>(codes, x, padded, i, to);
  }

  // to += the products of vector i of the codes and of the inputs.
  template <int R, int T, class Codes>
  static INLINE void add_products(const Codes& codes, const int8_t* x, int64_t padded, int i, __m512i (&to)[T][R]) {
    __m512i inputs[T];
    UNROLL for (int t = 0; t < T; ++t) inputs[t] = _mm512_loadu_si512(x + t * padded + i * 64);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m512i own = codes.at(r, i);
      UNROLL for (int t = 0; t < T; ++t) to[t][r] = _mm512_dpbusd_epi32(to[t][r], own, inputs[t]);
    }
  }

  // Row r; with fewer rows, any.
  template <int R, int r>
  static INLINE Ints of(const __m512i (&rows)[R]) { return (Ints)rows[r % R]; }

  // Two of the four 128-bit parts of a, then two of b.
  template <int PARTS>
  static INLINE Ints pick(Ints a, Ints b) { return (Ints)_mm512_shuffle_i64x2((__m512i)a, (__m512i)b, PARTS); }

  // The scales of up to LANES groups of R rows, and their lows or zero points, if any: SETS groups of all rows to a vector. Not inlined:
  // as fast, and with some hundred register tiles a quarter of the library.
  template <int R, class Scales>
  static __attribute__((noinline)) void read_scales(const Scales& stored, int64_t first, int count, Floats (&scales)[SETS],
                                 Floats (&lows)[SETS]) {
    Floats scale[SETS] = {}, low[SETS] = {};
    stored.scales(first, count, [&](int r, Floats own) { scale[r] = own; });
    transpose_parts(scale, scales);
    if (stored.has_lows()) {
      stored.lows(first, count, [&](int r, Floats own) { low[r] = FORMAT == INT8 ? own + scale[r] * 128.0f : own; });
      transpose_parts(low, lows);
    } else if (stored.has_zero_points()) {
      __m128i rows[SETS];
      UNROLL for (int r = 0; r < SETS; ++r) rows[r] = stored.zeros(r % R, first, count);
      expand_zeros(rows, lows);
    }
  }

  // Bytes of four rows as integers: in part r of to[b] the bytes 4 b to 4 b + 3 of rows[r].
  static INLINE void expand_zeros(const __m128i (&rows)[SETS], Floats (&to)[SETS]) {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi32(int(0x80808000), int(0x80808001), int(0x80808002), int(0x80808003)));
    const __m512i all = _mm512_loadu_si512(rows);
    UNROLL for (int b = 0; b < SETS; ++b)
      to[b] = (Floats)_mm512_shuffle_epi8(all, _mm512_add_epi32(bytes, _mm512_set1_epi32(SETS * b)));
  }

  // to[b], part r: part b of rows[r].
  static INLINE void transpose_parts(const Floats (&rows)[SETS], Floats (&to)[SETS]) {
    const Ints a = bits<Ints>(rows[0]), b = bits<Ints>(rows[1]), c = bits<Ints>(rows[2]), d = bits<Ints>(rows[3]);
    const Ints lower_ab = pick<0x44>(a, b), lower_cd = pick<0x44>(c, d);
    const Ints upper_ab = pick<0xee>(a, b), upper_cd = pick<0xee>(c, d);
    to[0] = bits<Floats>(pick<0x88>(lower_ab, lower_cd)), to[1] = bits<Floats>(pick<0xdd>(lower_ab, lower_cd));
    to[2] = bits<Floats>(pick<0x88>(upper_ab, upper_cd)), to[3] = bits<Floats>(pick<0xdd>(upper_ab, upper_cd));
  }
};
#elif defined(MB_INT8_DOT)
}  // namespace matrices

#include "arm_tiles.hpp"

namespace matrices {
#else
// Quantised weights with float32 inputs: codes are converted to floats, and each group's sum is scaled once.
template <int32_t CODES>
struct CodeTile {
  static constexpr int32_t FORMAT = CODES;
  template <Hint HINT, int R, int T>
  static INLINE void run(const Matrix& m, const Prepared& p, int64_t output, int64_t gap, int row, int64_t ahead,
                         float (&out)[R][T]) {
    switch (part_of(m)) {
      case BLOCK: return sum_of<HINT, R, T, BLOCK>(m, p, output, gap, row, ahead, out);
      case 32: return sum_of<HINT, R, T, 32>(m, p, output, gap, row, ahead, out);
      default: return sum_of<HINT, R, T, LEAST_GROUP>(m, p, output, gap, row, ahead, out);
    }
  }

  // PART: inputs of one group whose products are scaled at once.
  template <Hint HINT, int R, int T, int PART>
  static INLINE void sum_of(const Matrix& m, const Prepared& p, int64_t output, int64_t gap, int row, int64_t ahead, float (&out)[R][T]) {
    const int64_t bytes = FORMAT == INT8 ? p.padded : p.padded / 2;
    RowScales stored[R];
    for (int r = 0; r < R; ++r) stored[r] = RowScales(m, output + r * gap);
    const uint8_t* w = (const uint8_t*)m.data + output * bytes;
    const float *x = p.x + row * p.ldx, *block = p.q_sum + row * p.blocks;
    Floats sums[R][T] = {};
    float lows[R][T] = {};
    for (int64_t b = 0; b < p.padded / PART; ++b) {
      const int64_t start = b * PART, group = start / m.group;
      int64_t at = FORMAT == INT8 ? start : start / RUN * BLOCK + start % BLOCK;
      int shift = FORMAT == INT8 ? 0 : start % RUN / BLOCK * 4;
      for (int r = 0; r < R; ++r) {
        prefetch_ahead<HINT>(w + r * gap * bytes + at, ahead);
        const float scale = stored[r].scale(group), low = stored[r].low(group, scale);
        Floats part[T] = {};
        for (int k = 0; k < PART; k += LANES) {
          Words codes = widen(load<Bytes>(w + r * gap * bytes + at + k));
          if (FORMAT == INT4) codes = codes >> shift & 15;
          Floats weights = __builtin_convertvector(bits<Ints>(codes), Floats);
          UNROLL for (int t = 0; t < T; ++t) part[t] += weights * load<Floats>(x + t * p.ldx + start + k);
        }
        UNROLL for (int t = 0; t < T; ++t) {
          sums[r][t] += part[t] * scale;
          lows[r][t] += low * block[t * p.blocks + b];
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) out[r][t] = sum(sums[r][t]) + lows[r][t];
  }
};
#endif

template <Hint HINT, class Tile, int R, int T>
INLINE void tile_by(const Matrix& m, const Prepared& x, int64_t output, int64_t gap, int row, int64_t ahead, float* y,
                    int64_t ldy) {
  float out[R][T];
  Tile::template run<HINT, R, T>(m, x, output, gap, row, ahead, out);
  for (int r = 0; r < R; ++r) {
    float bias = bias_of(m, output + r * gap);
    for (int t = 0; t < T; ++t) y[(row + t) * ldy + output + r * gap] = out[r][t] + bias;
  }
}

template <class Tile, int R, int T>
INLINE void tile(const Matrix& m, const Prepared& x, int64_t output, int64_t gap, int row, float* y, int64_t ldy) {
  const ReadPlan plan = read_plans.get(Tile::FORMAT, T);
  if (plan.hint)
    tile_by<Hint::non_temporal, Tile, R, T>(m, x, output, gap, row, plan.distance, y, ldy);
  else
    tile_by<Hint::temporal, Tile, R, T>(m, x, output, gap, row, plan.distance, y, ldy);
}

// The tiles of STREAMS rows of weights, `gap` apart; of a single row if `gap` is 0.
template <class Tile, int STREAMS, int T>
inline void strip(const Matrix& m, const Prepared& x, int row, float* y, int64_t ldy, int64_t first, int64_t gap) {
  constexpr int R = rows_of<Tile, STREAMS, T>();
  static_assert(STREAMS % R == 0, "STREAMS must be a multiple of R");
  if (!gap) return tile<Tile, 1, T>(m, x, first, 0, row, y, ldy);
  for (int r = 0; r < STREAMS; r += R) tile<Tile, R, T>(m, x, first + r * gap, gap, row, y, ldy);
}

// Calls `strip(output, gap)` for all outputs: `streams` at a time, `gap` apart, and the remainder (gap 0) one by one.
template <class F>
INLINE void by_strips(int streams, int64_t first, int64_t last, F strip) {
  const int64_t gap = (last - first) / streams;
  for (int64_t output = first; output < first + gap; ++output) strip(output, gap);
  for (int64_t output = first + gap * streams; output < last; ++output) strip(output, 0);
}

// All rows of inputs are multiplied by a strip of weights before the next strip, so that the weights are read from DRAM once.
// MORE: there may be more than SMALL_BATCH rows.
template <class Tile, int STREAMS, bool MORE>
inline void by_streams(const Matrix& m, const Prepared& x, int rows, float* y, int64_t ldy, int64_t first, int64_t last) {
  by_strips(STREAMS, first, last, [&](int64_t output, int64_t gap) {
    int row = 0;
    if constexpr (MORE)
      for (; row + FEW <= rows; row += FEW) strip<Tile, STREAMS, FEW>(m, x, row, y, ldy, output, gap);
    if (row + 4 <= rows) strip<Tile, STREAMS, 4>(m, x, row, y, ldy, output, gap), row += 4;
    switch (rows - row) {
      case 3: strip<Tile, STREAMS, 3>(m, x, row, y, ldy, output, gap); break;
      case 2: strip<Tile, STREAMS, 2>(m, x, row, y, ldy, output, gap); break;
      case 1: strip<Tile, STREAMS, 1>(m, x, row, y, ldy, output, gap); break;
    }
  });
}

template <class Tile>
inline void over_tiles(const Matrix& m, const Prepared& x, int rows, float* y, int64_t ldy, int64_t first, int64_t last) {
  if (rows > SMALL_BATCH)
    return by_streams<Tile, streams_of(Tile::FORMAT, true), true>(m, x, rows, y, ldy, first, last);
  read_plans.get(Tile::FORMAT, rows).streams == 2 ? by_streams<Tile, 2, false>(m, x, rows, y, ldy, first, last)
                                                  : by_streams<Tile, 4, false>(m, x, rows, y, ldy, first, last);
}

}  // namespace matrices
