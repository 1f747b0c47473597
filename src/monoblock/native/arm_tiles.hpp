// The register tile of quantised weights and int8 inputs by the integer dot products of Armv8.2 (SDOT): as CodeTile of
// gemv_tiles.hpp for AVX-512 VNNI, with vectors of any length. Part of gemv_tiles.hpp.
#pragma once

namespace matrices {

// One instruction multiplies LANES * 4 codes by as many inputs and adds them in fours to LANES integers. It multiplies signed
// integers, so codes of 8 bits are taken less 128. With x = q * q_scale in a group,
//   sum(w x) = scale * q_scale * sum(code * q) + low * q_scale * sum(q),
// where `low` is 0 if INT8 has none, and has 128 * scale added if it has one, and is -8 * scale if INT4 has none.
template <int32_t CODES>
struct CodeTile {
  static constexpr int32_t FORMAT = CODES;
  static constexpr int PANEL = 64;        // groups whose scales are converted at once
  static constexpr int STEP = LANES * 4;  // codes of a vector

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
    constexpr int EACH = RUN / GROUP;  // groups of a run
    const int64_t bytes = FORMAT == INT8 ? p.padded : p.padded / 2, groups = p.padded / GROUP;
    const uint8_t* w = (const uint8_t*)m.data + output * bytes;
    const int8_t* x = p.q + row * p.padded;
    const TileScales<R, GROUP> stored(m, output, gap);
    Floats sums[R][T] = {};
    for (int64_t first = 0; first < groups; first += PANEL) {
      const int count = groups - first < PANEL ? int(groups - first) : PANEL;
      float scales[R][T][PANEL];
      // scale * q_scale of each group; the terms of `low` are added to the sums.
      for (int g = 0; g < count; g += LANES) {
        Floats scale[R], low[R];  // low: of the codes of 0 here
        stored.scales(first + g, count - g, [&](int r, Floats own) { scale[r] = own; });
        if (stored.has_lows())
          stored.lows(first + g, count - g, [&](int r, Floats own) { low[r] = FORMAT == INT8 ? own + scale[r] * 128.0f : own; });
        else
          UNROLL for (int r = 0; r < R; ++r) {
            const Floats zero = stored.has_zero_points() ? stored.zeros(r, first + g, count - g) : all(zero_of(m));
            low[r] = scale[r] * ((FORMAT == INT8 ? 128.0f : 0.0f) - zero);
          }
        UNROLL for (int r = 0; r < R; ++r)
          UNROLL for (int t = 0; t < T; ++t) {
            const int64_t own = (row + t) * p.blocks + first + g;
            store(scales[r][t] + g, scale[r] * load<Floats>(p.q_scale + own));
            if (FORMAT == INT4 || m.low) sums[r][t] += low[r] * load<Floats>(p.q_sum + own);
          }
      }
      for (int g = 0; g < count; g += EACH) {
        const int64_t k = (first + g) * GROUP;
        run_of<HINT, R, T, GROUP>(w + (FORMAT == INT8 ? k : k / 2), gap * bytes, x + k, p.padded, scales, g, ahead, sums);
      }
    }
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int t = 0; t < T; ++t) out[r][t] = sum(sums[r][t]);
  }

  // A run of 128 weights, whose groups begin at index g of `scales`. Both halves of the run go together: they share the bytes of
  // INT4.
  template <Hint HINT, int R, int T, int GROUP>
  static INLINE void run_of(const uint8_t* w, int64_t ldw, const int8_t* x, int64_t ldx, const float (&scales)[R][T][PANEL],
                            int g, int64_t ahead, Floats (&sums)[R][T]) {
    constexpr bool WHOLE = GROUP == RUN;  // the halves have one group
    constexpr int PART = GROUP > BLOCK ? BLOCK : GROUP < STEP ? STEP : GROUP;  // codes of a half that are added as integers
    UNROLL for (int r = 0; r < R; ++r) {
      prefetch_ahead<HINT>(w + r * ldw, ahead);
      if (FORMAT == INT8) prefetch_ahead<HINT>(w + r * ldw + BLOCK, ahead);
    }
    UNROLL for (int at = 0; at < BLOCK; at += PART) {
      Ints low[R][T] = {}, high[R][T] = {};
      UNROLL for (int j = at; j < at + PART; j += STEP) {
        Quads codes[R][2];
        UNROLL for (int r = 0; r < R; ++r) unpack(w + r * ldw + j, codes[r]);
        UNROLL for (int t = 0; t < T; ++t) {
          const Quads a = load<Quads>(x + t * ldx + j), b = load<Quads>(x + t * ldx + j + BLOCK);
          UNROLL for (int r = 0; r < R; ++r) {
            low[r][t] = arm::dot_quads(low[r][t], codes[r][0], a);
            Ints& rest = WHOLE ? low[r][t] : high[r][t];
            rest = arm::dot_quads(rest, codes[r][1], b);
          }
        }
      }
      UNROLL for (int t = 0; t < T; ++t)
        UNROLL for (int r = 0; r < R; ++r) {
          const float* own = scales[r][t] + g + at / GROUP;
          sums[r][t] += floats(low[r][t]) * by_lane<GROUP>(own);
          if (!WHOLE) sums[r][t] += floats(high[r][t]) * by_lane<GROUP>(own + BLOCK / GROUP);
        }
    }
  }

  static INLINE Floats floats(Ints v) { return __builtin_convertvector(v, Floats); }

  // The scales of the groups of a vector of codes, in the lanes of their sums.
  template <int GROUP>
  static INLINE Floats by_lane(const float* scales) {
    Floats v = all(*scales);
    if constexpr (GROUP < STEP)
      UNROLL for (int lane = GROUP / 4; lane < LANES; ++lane) v[lane] = scales[lane / (GROUP / 4)];
    return v;
  }

  // STEP codes of each half of a run, as signed integers.
  static INLINE void unpack(const uint8_t* from, Quads (&codes)[2]) {
    typedef uint8_t Unsigned __attribute__((vector_size(STEP)));
    const Unsigned first = load<Unsigned>(from);
    if (FORMAT == INT8) {
      codes[0] = (Quads)(first ^ 128), codes[1] = (Quads)(load<Unsigned>(from + BLOCK) ^ 128);
    } else {
      codes[0] = (Quads)(first & 15), codes[1] = (Quads)(first >> 4);
    }
  }
};

}  // namespace matrices
