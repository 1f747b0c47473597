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

// Rows of weights of a tile: its sums, R * T vectors, must stay in registers.
template <int STREAMS, int T>
constexpr int rows_of() {
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
    const auto* x = Tile::inputs(p) + row * p.padded;
    Floats sums[R][T] = {};
    int64_t k = 0;
    for (; k + STEP <= m.inputs; k += STEP) step<HINT, R, T>(w + k, gap * m.inputs, x + k, p.padded, ahead, sums);
    if (int64_t rest = m.inputs - k) {
      uint16_t last[R][STEP] = {};
      for (int r = 0; r < R; ++r) memcpy(last[r], w + r * gap * m.inputs + k, rest * 2);
      step<HINT, R, T>(last[0], STEP, x + k, p.padded, ahead, sums);
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
//   sum(w x) = scale * q_scale * sum(code * q) + low * q_scale * sum(q),
// where low is -128 * scale (INT8) or -8 * scale (INT4) if the matrix has none.
// With groups of 32 or 16, a vector of 64 products has several groups, each in some of its lanes.
template <int32_t CODES>
struct CodeTile {
  static constexpr int32_t FORMAT = CODES;
  typedef uint8_t Codes __attribute__((vector_size(64)));

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
    constexpr int EACH = RUN / GROUP;
    const int64_t bytes = FORMAT == INT8 ? p.padded : p.padded / 2, groups = p.padded / GROUP;
    const uint8_t* w = (const uint8_t*)m.data + output * bytes;
    const int8_t* x = p.q + row * p.padded;
    const TileScales<R, GROUP> stored(m, output, gap);
    Floats sums[R][T] = {};
    for (int64_t first = 0; first < groups; first += LANES) {
      const int count = groups - first < LANES ? int(groups - first) : LANES;
      // scale * q_scale of LANES groups; the terms of `low` are added to the sums. A vector of products has one group's scale,
      // which is broadcast from memory, or several, which are permuted in registers.
      alignas(64) std::conditional_t<(GROUP < 64), Floats, float[LANES]> scales[R][T];
      stored.read(first, count, [&](int r, Floats scale, Floats low) {
        UNROLL for (int t = 0; t < T; ++t) {
          const int64_t own = (row + t) * p.blocks + first;
          const Floats product = scale * load<Floats>(p.q_scale + own);
          memcpy(&scales[r][t], &product, sizeof product);
          sums[r][t] += low * load<Floats>(p.q_sum + own);
        }
      });
      Ints at = first_groups<GROUP>();
      for (int g = 0; g < count; g += EACH) {
        const Ints next = at + EACH / 2;
        const int64_t k = (first + g) * GROUP;
        Codes codes[R][2];
        UNROLL for (int r = 0; r < R; ++r)
          unpack<HINT>(w + r * gap * bytes + (FORMAT == INT8 ? k : k >> 1), ahead, codes[r]);
        UNROLL for (int t = 0; t < T; ++t) {
          const int8_t* q = x + t * p.padded + k;
          const __m512i low = _mm512_loadu_si512(q), high = _mm512_loadu_si512(q + 64), none = {};
          UNROLL for (int r = 0; r < R; ++r) {
            __m512i a = _mm512_dpbusd_epi32(none, (__m512i)codes[r][0], low);
            __m512i b = _mm512_dpbusd_epi32(EACH == 1 ? a : none, (__m512i)codes[r][1], high);
            if (EACH > 1) sums[r][t] += floats(a) * by_lane(scales[r][t], at, g);
            sums[r][t] += floats(b) * by_lane(scales[r][t], next, g + EACH / 2);
          }
        }
        at += EACH;
      }
    }
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int t = 0; t < T; ++t) out[r][t] = sum(sums[r][t]);
  }

  static INLINE Floats floats(__m512i v) { return __builtin_convertvector((Ints)v, Floats); }

  // The groups of the lanes of the first 64 products.
  template <int GROUP>
  static INLINE Ints first_groups() {
    if constexpr (GROUP == 32) return (Ints)_mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    if constexpr (GROUP == 16) return (Ints)_mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return Ints{};
  }

  // The scales of 64 products: those of `groups`, or of one group.
  static INLINE Floats by_lane(Floats scales, Ints groups, int) {
    return (Floats)_mm512_permutexvar_ps((__m512i)groups, (__m512)scales);
  }
  static INLINE Floats by_lane(const float (&scales)[LANES], Ints, int group) { return all(scales[group]); }

  // The codes of 128 weights.
  template <Hint HINT>
  static INLINE void unpack(const uint8_t* from, int64_t ahead, Codes (&codes)[2]) {
    codes[0] = load<Codes>(from);
    prefetch_ahead<HINT>(from, ahead);
    if (FORMAT == INT8) {
      codes[1] = load<Codes>(from + 64);
      prefetch_ahead<HINT>(from + 64, ahead);
    } else {
      codes[1] = codes[0] >> 4;
      codes[0] &= 15;
    }
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
        const float scale = stored[r].scale(group), low = stored[r].low(group);
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
  constexpr int R = rows_of<STREAMS, T>();
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
