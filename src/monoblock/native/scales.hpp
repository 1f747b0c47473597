// How the scales and lows of quantised weights are stored, and how they are read. Part of matrix.hpp.
//
// A row of a matrix has one scale for each group of its weights, and one low where the format needs it. Both are stored alike:
//   HALF, FLOAT  a number per group, (outputs, groups)
//   TWO_LEVEL    of each row first an int8 factor per group, then an fp16 number per super-block of 256 weights; the value of a
//                group is their product, which float32 holds exactly (11 by 8 bits)
// With ZERO_POINTS, `low` holds instead the code of 0 of each group, a byte, (outputs, groups): the low is -scale * zero.
#pragma once

namespace matrices {

enum ScaleFormat : int32_t { HALF = 0, FLOAT = 1, TWO_LEVEL = 2 };
constexpr int32_t ZERO_POINTS = 4;  // added to HALF or FLOAT

constexpr int SUPER_BLOCK = 256;  // weights that share an fp16 number in TWO_LEVEL

INLINE ScaleFormat scales_of(const Matrix& m) { return ScaleFormat(m.scale_format & (ZERO_POINTS - 1)); }
INLINE bool has_zero_points(const Matrix& m) { return m.scale_format & ZERO_POINTS; }
INLINE bool has_lows(const Matrix& m) { return m.low && !has_zero_points(m); }

INLINE int64_t groups_of(const Matrix& m) { return round_up(m.inputs, RUN) / m.group; }

// Bytes of a row's scales, or lows that are no zero points.
INLINE int64_t scale_bytes(const Matrix& m) {
  const int64_t groups = groups_of(m);
  if (scales_of(m) == TWO_LEVEL) return groups + round_up(m.inputs, RUN) / SUPER_BLOCK * 2;
  return groups * (scales_of(m) == FLOAT ? 4 : 2);
}

// The code of 0 in the formats without `low`.
INLINE int zero_of(const Matrix& m) { return m.format == INT8 ? 128 : 8; }

// The scales and lows of a row of weights, one at a time.
class RowScales {
 public:
  RowScales() = default;
  // Not inlined: there are many register tiles, each of which reads several rows.
  __attribute__((noinline)) RowScales(const Matrix& m, int64_t output)
      : stored(scales_of(m)), constant(zero_of(m)), groups(groups_of(m)), each(SUPER_BLOCK / m.group) {
    scales = (const char*)m.scale + output * scale_bytes(m);
    if (matrices::has_lows(m)) lows = (const char*)m.low + output * scale_bytes(m);
    if (has_zero_points(m)) zeros = (const uint8_t*)m.low + output * groups;
  }

  // The scale of a group, and what is added to its products of this scale and the codes.
  INLINE float scale(int64_t group) const { return value(scales, group); }
  INLINE float low(int64_t group, float scale) const { return lows ? value(lows, group) : -zero(group) * scale; }

  // Whether lows are stored; if not, a weight is scale * (code - zero(group)).
  INLINE bool has_lows() const { return lows; }
  INLINE float zero(int64_t group) const { return zeros ? zeros[group] : constant; }

  // Calls `use(group, scale, low)` for all groups.
  template <class F>
  INLINE void for_each(F use) const {
    if (stored != TWO_LEVEL) {
      for (int64_t g = 0; g < groups; ++g) {
        const float own_scale = scale(g);
        use(g, own_scale, low(g, own_scale));
      }
      return;
    }
    for (int64_t first = 0; first < groups; first += each) {  // a super-block's number is converted once
      const float of_scales = number(scales, first), of_lows = lows ? number(lows, first) : 0;
      for (int64_t g = first; g < first + each; ++g) {
        const float scale = of_scales * factor(scales, g);
        use(g, scale, lows ? of_lows * factor(lows, g) : -zero(g) * scale);
      }
    }
  }

 private:
  INLINE float value(const char* row, int64_t group) const {
    if (stored == FLOAT) return load<float>(row + group * 4);
    if (stored == HALF) return from_half(load<uint16_t>(row + group * 2));
    return number(row, group) * factor(row, group);
  }
  // Of TWO_LEVEL.
  INLINE float number(const char* row, int64_t group) const { return from_half(load<uint16_t>(row + groups + group / each * 2)); }
  INLINE float factor(const char* row, int64_t group) const { return ((const int8_t*)row)[group]; }

  const char *scales, *lows = nullptr;
  const uint8_t* zeros = nullptr;
  ScaleFormat stored;
  int constant;  // the code of 0 of all groups
  int64_t groups;
  int each;  // groups of a super-block
};

#if defined(MB_INT8_DOT)
constexpr int SCALES_AHEAD = 128;  // groups that are prefetched: hardware prefetchers do not follow so few bytes a row

// The numbers of up to LANES groups of a row of scales or lows, from a multiple of LANES on, padded with zeros. GROUP: the
// matrix's group; `groups`: those of a row; AHEAD: with software prefetch.
template <int GROUP, ScaleFormat STORED, bool AHEAD>
INLINE Floats stored_scales(const char* row, int64_t groups, int64_t group, int64_t count) {
  constexpr int BYTES = STORED == FLOAT ? 4 : STORED == HALF ? 2 : 1, EACH = SUPER_BLOCK / GROUP;
  const char* at = row + group * BYTES;
  [[maybe_unused]] const char* numbers = row + groups + group / EACH * 2;  // of TWO_LEVEL
  if (AHEAD) __builtin_prefetch(at + SCALES_AHEAD * BYTES);
#if defined(__AVX512VNNI__)
  const __mmask16 mask = count >= LANES ? 0xffff : (1u << count) - 1;
  if constexpr (STORED == HALF) return (Floats)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, at));
  if constexpr (STORED == FLOAT) return (Floats)_mm512_maskz_loadu_ps(mask, at);
  if constexpr (STORED == TWO_LEVEL) {  // LANES groups are in one super-block, or in two
    static_assert(EACH * 2 >= LANES, "TWO_LEVEL has groups of 16 or 32");
    __m256i number = _mm256_set1_epi16(load<int16_t>(numbers));
    if (EACH < LANES && count > EACH)
      number = _mm256_inserti128_si256(number, _mm_set1_epi16(load<int16_t>(numbers + 2)), 1);
    const __m512i factors = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, at));
    return (Floats)_mm512_cvtph_ps(number) * (Floats)_mm512_cvtepi32_ps(factors);
  }
#else
  if (count >= LANES) {
    if constexpr (STORED == FLOAT) return load<Floats>(at);
    if constexpr (STORED == HALF) return arm::from_half(load<Halves>(at));
    if constexpr (STORED == TWO_LEVEL) {
      static_assert(EACH % LANES == 0, "LANES groups must be in one super-block");
      const Ints factors = (Ints)(widen(load<Bytes>(at)) << 24) >> 24;
      return __builtin_convertvector(factors, Floats) * from_half(load<uint16_t>(numbers));
    }
  }
  float some[LANES] = {};
  for (int i = 0; i < count && i < LANES; ++i) {
    if (STORED == FLOAT) some[i] = load<float>(at + i * 4);
    if (STORED == HALF) some[i] = from_half(load<uint16_t>(at + i * 2));
    if (STORED == TWO_LEVEL) some[i] = from_half(load<uint16_t>(numbers)) * ((const int8_t*)at)[i];
  }
  return load<Floats>(some);
#endif
}

// The scales and lows, or zero points, of R rows of weights, `gap` apart, at the same groups.
template <int R, int GROUP>
class TileScales {
 public:
  TileScales(const Matrix& m, int64_t output, int64_t gap)
      : groups(round_up(m.inputs, RUN) / GROUP), stored(scales_of(m)), points(matrices::has_zero_points(m)) {
    const int64_t bytes = scale_bytes(m), low_bytes = points ? groups : bytes;
    scale_rows = (const char*)m.scale + output * bytes, low_rows = m.low ? (const char*)m.low + output * low_bytes : nullptr;
    apart = gap * bytes, lows_apart = gap * low_bytes;
  }

  INLINE bool has_lows() const { return low_rows && !points; }
  INLINE bool has_zero_points() const { return points; }

  // Calls `use(r, scale)` with the scales of the groups [group, group + count), at most LANES; `lows` likewise, if there are any.
  template <class F>
  INLINE void scales(int64_t group, int64_t count, F use) const {
    read<true>(scale_rows, apart, group, count, use);
  }
  template <class F>
  INLINE void lows(int64_t group, int64_t count, F use) const {
    // With large groups a third prefetched stream for each row of weights costs more than it saves: 5% of int4.
    read<GROUP <= 32>(low_rows, lows_apart, group, count, use);
  }

  // The zero points of row r, of the same groups: the first bytes, or as numbers.
#if defined(__AVX512VNNI__)
  INLINE __m128i zeros(int r, int64_t group, int64_t count) const {
    const __mmask16 mask = count >= LANES ? 0xffff : (1u << count) - 1;
    return _mm_maskz_loadu_epi8(mask, low_rows + r * lows_apart + group);
  }
#else
  INLINE Floats zeros(int r, int64_t group, int64_t count) const {
    const uint8_t* at = (const uint8_t*)low_rows + r * lows_apart + group;
    if (count >= LANES) return __builtin_convertvector((Ints)widen(load<Bytes>(at)), Floats);
    float some[LANES] = {};
    for (int i = 0; i < count && i < LANES; ++i) some[i] = at[i];
    return load<Floats>(some);
  }
#endif

 private:
  template <bool AHEAD, class F>
  INLINE void read(const char* rows, int64_t step, int64_t group, int64_t count, F use) const {
    switch (stored) {
      case HALF: return read_as<HALF, AHEAD>(rows, step, group, count, use);
      case FLOAT: return read_as<FLOAT, AHEAD>(rows, step, group, count, use);
      case TWO_LEVEL:
        if constexpr (GROUP <= 32) read_as<TWO_LEVEL, AHEAD>(rows, step, group, count, use);
    }
  }

  template <ScaleFormat STORED, bool AHEAD, class F>
  INLINE void read_as(const char* rows, int64_t step, int64_t group, int64_t count, F use) const {
    UNROLL for (int r = 0; r < R; ++r) use(r, stored_scales<GROUP, STORED, AHEAD>(rows + r * step, groups, group, count));
  }

  const char *scale_rows, *low_rows;
  int64_t apart, lows_apart, groups;
  ScaleFormat stored;
  bool points;
};
#endif

}  // namespace matrices
