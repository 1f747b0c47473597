// Products of weights in any quantised or 16-bit format with rows of inputs by AMX: tiles of 16 rows of 64 bytes, multiplied
// by one instruction. Part of matrix.hpp.
//
// Weights are the first operand: a tile is 64 consecutive bytes of 16 outputs, as they lie in memory. Inputs are the second
// one, which is stored by words of 4 bytes, the words of 16 rows beside each other; they are converted once for each
// product. The sums (outputs, rows) have one float32 accumulator per output and row, or one 32-bit integer per group of
// weights, which is then scaled: a row's result does not depend on the others. Numbers in bf16 are accumulated in the order
// of the instruction, and subnormal ones count as 0.
#pragma once

#if defined(__AMX_TILE__)

namespace matrices {

constexpr int64_t AMX_STEP = 64;           // bytes of a row of a tile: 32 weights in bf16, 64 codes
constexpr int64_t AMX_TILE = SIDE * 64;    // bytes of a tile
constexpr int64_t AMX_DEPTH = 8;           // steps of a block of weights: 16 KB for 32 outputs, in L1
constexpr int64_t AMX_ROWS = 512;          // rows of inputs of a task
constexpr int64_t AMX_OUTPUTS = 256;       // outputs of a task, at most
constexpr int64_t AMX_SUMS = AMX_OUTPUTS * (AMX_ROWS + SIDE);  // 528 KB, in L2
constexpr int64_t AMX_STREAMED_ROWS = 32;  // rows up to which weights are read where they are

// The compiler's intrinsics do not say that they read or write memory; these do.
#define AMX_LOAD(tile, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(int64_t(stride)) : "memory")
#define AMX_STORE(tile, to, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"(int64_t(stride)) : "memory")
#define AMX_ZERO(tile) asm volatile("tilezero %tmm" #tile)
#define AMX_BF16(sums, a, b) asm volatile("tdpbf16ps %tmm" #b ", %tmm" #a ", %tmm" #sums)
#define AMX_BYTES(sums, a, b) asm volatile("tdpbusd %tmm" #b ", %tmm" #a ", %tmm" #sums)

// Configures the thread's tiles as 16 rows of 64 bytes, and releases them.
class AmxTiles {
 public:
  AmxTiles() {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  ~AmxTiles() { asm volatile("tilerelease"); }
  AmxTiles(const AmxTiles&) = delete;
};

inline bool by_codes(const Matrix& m) { return m.format == INT8 || m.format == INT4; }

// Whether a tile can multiply codes: its rows of 64 codes must belong to one group. Others are dequantised to bf16.
inline bool amx_by_codes(const Matrix& m) { return by_codes(m) && m.group >= AMX_STEP; }

// Rows of inputs from which the products use AMX: with fewer, tiles of registers read quantised weights faster.
inline int64_t amx_rows(const Matrix& m) { return m.format == F32 ? INT64_MAX : m.format == BF16 ? 4 : 9; }

// Words of two values each, rounded to bf16.
INLINE Words amx_pair(Floats low, Floats high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                         4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Words)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

// Rows of inputs as second operands: (blocks of 16 rows, steps, 16 words, 16 rows), padded with zeros; for codes with a
// scale, the sum of the inputs, and the first value of the integer sums, each (blocks, groups, 16).
struct AmxInputs {
  char* tiles;
  float *scale, *total;
  int32_t* start;
  int64_t inputs, steps, groups;
  bool codes;  // 8-bit integers, for quantised weights; else bf16

  // Bytes of scratch for `rows` rows of up to `inputs` inputs.
  static int64_t bytes(int64_t inputs, int64_t rows) {
    const int64_t padded = round_up(inputs, RUN);
    return round_up(rows, SIDE) * (padded * 2 + padded / BLOCK * 12) + 128;
  }

  // `integers`: for quantised weights, whether inputs are 8-bit integers. They are the faster ones; products with bf16, for
  // which weights are rounded to bf16 too, are the more accurate ones.
  void place(void* scratch, const Matrix& m, int64_t rows, bool integers) {
    const int64_t blocks = (rows + SIDE - 1) / SIDE;
    char* at = (char*)round_up((int64_t)scratch, 64);
    codes = integers && amx_by_codes(m), inputs = m.inputs;
    steps = codes ? round_up(m.inputs, RUN) / AMX_STEP : (m.inputs * 2 + AMX_STEP - 1) / AMX_STEP;
    groups = codes ? groups_of(m) : 0;
    tiles = at, at += blocks * steps * AMX_TILE;
    scale = (float*)at, at += blocks * groups * SIDE * 4;
    total = (float*)at, at += blocks * groups * SIDE * 4;
    start = (int32_t*)at;
  }

  // Converts the 16 rows of a block, or as many as there are; X is float or uint16_t (bf16).
  template <class X>
  void prepare(const Matrix& m, const X* x, int64_t ldx, int64_t rows, int64_t block) const {
    const int count = int(rows - block * SIDE < SIDE ? rows - block * SIDE : SIDE);
    x += block * SIDE * ldx;
    if (codes) return prepare_codes(m, x, ldx, count, block);
    char* to = tiles + block * steps * AMX_TILE;
    for (int64_t k = 0; k < m.inputs; k += 2 * SIDE, to += AMX_TILE) {
      const int64_t left = m.inputs - k < 2 * SIDE ? m.inputs - k : 2 * SIDE;
      Words v[SIDE];
      UNROLL for (int r = 0; r < SIDE; ++r) v[r] = r < count ? pairs(x + r * ldx + k, left) : Words{};
      transpose(v);
      UNROLL for (int r = 0; r < SIDE; ++r) store(to + r * 64, v[r]);
    }
  }

  // Converts the channels [first, first + count) of a block of rows to bf16. They are given as vectors, one channel of the 16
  // rows each, `ld` elements apart. `first` is even, and so is `count` unless they are the last channels.
  void convert(const float* x, int64_t ld, int64_t block, int64_t first, int64_t count) const {
    char* to = tiles + (block * steps * 2 * SIDE + first) * 2 * SIDE;
    int64_t k = 0;
    for (; k + 2 <= count; k += 2, to += 64) store(to, amx_pair(load<Floats>(x + k * ld), load<Floats>(x + (k + 1) * ld)));
    if (k < count) store(to, amx_pair(load<Floats>(x + k * ld), Floats{})), k += 2, to += 64;
    if (first + k >= inputs)
      for (; (first + k) % (2 * SIDE); k += 2, to += 64) store(to, Words{});
  }

 private:
  static INLINE Words pairs(const uint16_t* x, int64_t count) {
    return (Words)_mm512_maskz_loadu_epi16(uint32_t((uint64_t(1) << count) - 1), x);
  }
  static INLINE Words pairs(const float* x, int64_t count) {
    const uint32_t mask = uint32_t((uint64_t(1) << count) - 1);
    return (Words)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(mask >> 16, x + 16), _mm512_maskz_loadu_ps(mask & 0xffff, x));
  }

  template <class X>
  void prepare_codes(const Matrix& m, const X* x, int64_t ldx, int count, int64_t block) const {
    const __m512i zero = _mm512_set1_epi8(char(zero_of(m)));
    char* to = tiles + block * steps * AMX_TILE;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t k = g * m.group, at = (block * groups + g) * SIDE, left = m.inputs - k;
      const int64_t inside = left < 0 ? 0 : left < m.group ? left : m.group;
      alignas(64) int8_t q[SIDE][RUN];
      float group[RUN];
      for (int r = 0; r < SIDE; ++r) {
        if (r >= count) {
          memset(q[r], 0, m.group), scale[at + r] = total[at + r] = 0;
          continue;
        }
        const float* from = floats(x + r * ldx + k, inside, group, m.group);
        quantise(from, m.group, q[r], scale + at + r, total + at + r);
      }
      __m512i sums = {};
      for (int64_t i = 0; i < m.group; i += AMX_STEP, to += AMX_TILE) {
        Words v[SIDE];
        UNROLL for (int r = 0; r < SIDE; ++r) v[r] = load<Words>(q[r] + i);
        transpose(v);
        UNROLL for (int r = 0; r < SIDE; ++r) {
          store(to + r * 64, v[r]);
          sums = _mm512_dpbusd_epi32(sums, zero, (__m512i)v[r]);
        }
      }
      // Without `low`, a code stands for itself less that of 0.
      store(start + at, m.low ? Ints{} : Ints{} - (Ints)sums);
    }
  }

  // The inputs of a group as float32; `to` where they must be converted or padded.
  static const float* floats(const float* x, int64_t inside, float* to, int64_t group) {
    if (inside == group) return x;
    return pad(x, inside, to, group), to;
  }
  static const float* floats(const uint16_t* x, int64_t inside, float* to, int64_t group) {
    for (int64_t k = 0; k < group; ++k) to[k] = k < inside ? from_bf16(x[k]) : 0;
    return to;
  }
};

// One thread's scratch.
struct AmxScratch {
  char* weights;       // (AMX_DEPTH, 2, 16 outputs, 64 bytes)
  float* sums;         // (outputs, rows) of a task
  float *scale, *low;  // (groups of a block, 32 outputs)
  int32_t* integers;   // (2, 4 tiles): sums of two groups
  uint16_t* row;       // weights of an output in bf16

  static constexpr int64_t BYTES =
      AMX_DEPTH * 2 * AMX_TILE + AMX_SUMS * 4 + 2 * AMX_DEPTH * 32 * 4 + 8 * AMX_TILE + AMX_DEPTH * AMX_STEP;

  explicit AmxScratch(char* at) {
    weights = at, at += AMX_DEPTH * 2 * AMX_TILE;
    sums = (float*)at, at += AMX_SUMS * 4;
    scale = (float*)at, at += AMX_DEPTH * 32 * 4;
    low = (float*)at, at += AMX_DEPTH * 32 * 4;
    integers = (int32_t*)at, at += 8 * AMX_TILE;
    row = (uint16_t*)at;
  }
};

// Prefetch into L2 of the steps [from, from + steps) of 32 outputs, over as many steps for `blocks` blocks of rows.
class AmxPrefetch {
 public:
  AmxPrefetch() = default;
  AmxPrefetch(const Matrix& m, bool codes, int64_t output, int64_t from, int64_t steps, int64_t blocks) : bytes(row_bytes(m)) {
    int64_t step = AMX_STEP;  // bytes of a row that become 64
    if (m.format == LOSSLESS) step = AMX_STEP * 3 / 4;
    if (by_codes(m)) step = AMX_STEP / (codes ? 1 : 2) / (m.format == INT4 ? 2 : 1);
    row = (const char*)m.data + output * bytes + (m.format == LOSSLESS ? head_bytes(m) : 0) + from * step;
    width = steps * step / 64;
    rows = m.outputs - output < 2 * SIDE ? m.outputs - output : 2 * SIDE;
    each = int(2 * 2 * SIDE / blocks + 1);
  }
  INLINE void step() {
    for (int i = 0; i < each && rows > 0; ++i) {
      __builtin_prefetch(row + at * 64, 0, 2);
      if (++at == width) at = 0, --rows, row += bytes;
    }
  }

 private:
  const char* row = nullptr;
  int64_t bytes = 0, width = 0, rows = 0, at = 0;
  int each = 0;
};

// Operands: tile i of a step at data + step * by_step + i * by_tile, with rows `by_row` bytes apart.
struct AmxOperand {
  const char* data;
  int64_t by_step, by_tile, by_row;
};

// The sums in tiles 0 to 3 += the product of A tiles of the first operand and B tiles of the second, over `steps` steps.
template <bool CODES, int A, int B>
INLINE void amx_multiply(AmxOperand a, AmxOperand b, int64_t steps, AmxPrefetch& prefetch) {
#define AMX_PRODUCT(sums, a, b) \
  if constexpr (CODES)          \
    AMX_BYTES(sums, a, b);      \
  else                          \
    AMX_BF16(sums, a, b);
  for (; steps > 0; --steps, a.data += a.by_step, b.data += b.by_step) {
    AMX_LOAD(4, a.data, a.by_row);
    AMX_LOAD(6, b.data, b.by_row);
    AMX_PRODUCT(0, 4, 6)
    if constexpr (B > 1) {
      AMX_LOAD(7, b.data + b.by_tile, b.by_row);
      AMX_PRODUCT(1, 4, 7)
    }
    if constexpr (A > 1) {
      AMX_LOAD(5, a.data + a.by_tile, a.by_row);
      AMX_PRODUCT(2, 5, 6)
      if constexpr (B > 1) { AMX_PRODUCT(3, 5, 7) }
    }
    prefetch.step();
  }
#undef AMX_PRODUCT
}

// sums (A * 16, B * 16) += products of bf16; `first`: they begin at 0.
template <int A, int B>
inline void amx_floats(const AmxOperand& a, const AmxOperand& b, int64_t steps, float* sums, int64_t ld, bool first,
                       AmxPrefetch& prefetch) {
  if (first) {
    AMX_ZERO(0);
    if constexpr (B > 1) AMX_ZERO(1);
    if constexpr (A > 1) AMX_ZERO(2);
    if constexpr (A > 1 && B > 1) AMX_ZERO(3);
  } else {
    AMX_LOAD(0, sums, ld * 4);
    if constexpr (B > 1) AMX_LOAD(1, sums + SIDE, ld * 4);
    if constexpr (A > 1) AMX_LOAD(2, sums + SIDE * ld, ld * 4);
    if constexpr (A > 1 && B > 1) AMX_LOAD(3, sums + SIDE * ld + SIDE, ld * 4);
  }
  amx_multiply<false, A, B>(a, b, steps, prefetch);
  AMX_STORE(0, sums, ld * 4);
  if constexpr (B > 1) AMX_STORE(1, sums + SIDE, ld * 4);
  if constexpr (A > 1) AMX_STORE(2, sums + SIDE * ld, ld * 4);
  if constexpr (A > 1 && B > 1) AMX_STORE(3, sums + SIDE * ld + SIDE, ld * 4);
}

// sums (A * 16, B * 16) += the integer sums of a group, scaled.
template <int A, int B>
INLINE void amx_scale(const int32_t* integers, const float* scale, const float* low, const float* x_scale,
                      const float* x_total, int64_t x_block, float* sums, int64_t ld, bool first) {
  UNROLL for (int b = 0; b < B; ++b) {
    const Floats own = load<Floats>(x_scale + b * x_block), total = load<Floats>(x_total + b * x_block);
    UNROLL for (int a = 0; a < A; ++a) {
      const int32_t* tile = integers + (2 * a + b) * SIDE * SIDE;
      float* to = sums + a * SIDE * ld + b * SIDE;
      _Pragma("GCC unroll 16") for (int o = 0; o < SIDE; ++o) {
        Floats sum = first ? Floats{} : load<Floats>(to + o * ld);
        sum += __builtin_convertvector(load<Ints>(tile + o * SIDE), Floats) * (own * scale[a * SIDE + o]);
        if (low) sum += total * low[a * SIDE + o];
        store(to + o * ld, sum);
      }
    }
  }
}

// The same for codes, by groups; `block`: the inputs' first block of rows, `group`: the first group.
template <int A, int B>
inline void amx_codes(const Matrix& m, const AmxOperand& w, const AmxInputs& in, int64_t block, int64_t group, int64_t groups,
                      const AmxScratch& s, float* sums, int64_t ld, AmxPrefetch& prefetch) {
  const int64_t each = m.group / AMX_STEP, by_block = in.steps * AMX_TILE, x_block = in.groups * SIDE;
  const int64_t at = block * x_block + group * SIDE;
  const auto scaled = [&](int64_t g) {
    const int64_t own = at + g * SIDE;
    const int32_t* integers = s.integers + g % 2 * 4 * SIDE * SIDE;
    amx_scale<A, B>(integers, s.scale + g * 2 * SIDE, m.low ? s.low + g * 2 * SIDE : nullptr, in.scale + own,
                    in.total + own, x_block, sums, ld, group + g == 0);
  };
  // The sums of a group are scaled while the tiles multiply the next one.
  for (int64_t g = 0; g < groups; ++g) {
    const int32_t* start = in.start + at + g * SIDE;
    int32_t* integers = s.integers + g % 2 * 4 * SIDE * SIDE;
    AMX_LOAD(0, start, 0);
    if constexpr (B > 1) AMX_LOAD(1, start + x_block, 0);
    if constexpr (A > 1) AMX_LOAD(2, start, 0);
    if constexpr (A > 1 && B > 1) AMX_LOAD(3, start + x_block, 0);
    const AmxOperand own = {w.data + g * each * w.by_step, w.by_step, w.by_tile, w.by_row};
    const AmxOperand x = {in.tiles + block * by_block + (group + g) * each * AMX_TILE, AMX_TILE, by_block, AMX_STEP};
    amx_multiply<true, A, B>(own, x, each, prefetch);
    AMX_STORE(0, integers, 64);
    if constexpr (B > 1) AMX_STORE(1, integers + SIDE * SIDE, 64);
    if constexpr (A > 1) AMX_STORE(2, integers + 2 * SIDE * SIDE, 64);
    if constexpr (A > 1 && B > 1) AMX_STORE(3, integers + 3 * SIDE * SIDE, 64);
    if (g) scaled(g - 1);
  }
  scaled(groups - 1);
}

// Copies the steps [from, from + steps) of 16 outputs from `output` on to tiles `apart` bytes apart. The last output stands in
// for those beyond the end.
inline void amx_pack(const Matrix& m, bool codes, int64_t output, int64_t from, int64_t steps, char* to, int64_t apart,
                     uint16_t* row) {
  const int64_t bytes = row_bytes(m);
  for (int r = 0; r < SIDE; ++r) {
    const int64_t own = output + r < m.outputs ? output + r : m.outputs - 1;
    const char* weights = (const char*)m.data + own * bytes;
    char* at = to + r * AMX_STEP;
    if (codes && m.format == INT4) {  // the low nibbles of a run of 128 are its first 64 codes, the high nibbles the others
      for (int64_t s = from; s < from + steps; s += 2, at += 2 * apart) {
        const Words both = load<Words>(weights + s / 2 * 64);
        store(at, both & 0x0f0f0f0fu);
        store(at + apart, both >> 4 & 0x0f0f0f0fu);
      }
      continue;
    }
    int64_t whole = steps;
    if (!codes && m.format != BF16) {
      const int64_t k = from * SIDE * 2, count = steps * SIDE * 2;
      weights = (const char*)bf16_weights(m, own, k, m.inputs - k < count ? m.inputs - k : count, row);
    } else {
      weights += from * AMX_STEP;
    }
    if (!codes && (from + steps) * AMX_STEP > m.inputs * 2) --whole;
    for (int64_t s = 0; s < whole; ++s, at += apart) store(at, load<Words>(weights + s * AMX_STEP));
    if (whole < steps) {
      const int64_t left = m.inputs - (from + whole) * SIDE * 2;
      store(at, (Words)_mm512_maskz_loadu_epi16(uint32_t((uint64_t(1) << left) - 1), weights + whole * AMX_STEP));
    }
  }
}

// The scales or lows of a group, of at least AMX_STEP weights, of 32 outputs as float32. The last output stands in for those beyond the end.
inline void amx_values(const Matrix& m, const void* values, int64_t output, int64_t groups, int64_t group, float* to) {
  if (scales_of(m) == FLOAT) {
    for (int o = 0; o < 2 * SIDE; ++o)
      to[o] = ((const float*)values)[(output + o < m.outputs ? output + o : m.outputs - 1) * groups + group];
    return;
  }
  alignas(64) uint16_t half[2 * SIDE];
  const uint16_t* from = (const uint16_t*)values + output * groups + group;
  if (output + 2 * SIDE <= m.outputs) {
    UNROLL for (int o = 0; o < 2 * SIDE; ++o, from += groups) half[o] = *from;
  } else {
    for (int o = 0; o < 2 * SIDE; ++o) {
      half[o] = *from;
      if (output + o + 1 < m.outputs) from += groups;
    }
  }
  for (int i = 0; i < 2; ++i) store(to + i * SIDE, _mm512_cvtph_ps(load<__m256i>(half + i * SIDE)));
}

// The lows of a group, as `amx_values`, whose scales are `scale`.
inline void amx_lows(const Matrix& m, int64_t output, int64_t groups, int64_t group, const float* scale, float* to) {
  if (!has_zero_points(m)) return amx_values(m, m.low, output, groups, group, to);
  const uint8_t* zeros = (const uint8_t*)m.low;
  for (int o = 0; o < 2 * SIDE; ++o)
    to[o] = -scale[o] * zeros[(output + o < m.outputs ? output + o : m.outputs - 1) * groups + group];
}

// Whether tiles of these weights can be loaded from where they are, for a block of 32 outputs: where lines of several rows
// share a set of L1, they evict each other before the next rows of inputs need them.
inline bool amx_in_place(const Matrix& m, bool codes, int64_t rows) {
  const bool as_stored = m.format == BF16 || (m.format == INT8 && codes);
  const bool aligned = row_bytes(m) % AMX_STEP == 0 && (int64_t)m.data % AMX_STEP == 0;
  return as_stored && aligned && (rows <= AMX_STREAMED_ROWS || row_bytes(m) / AMX_STEP % 16);
}

// s.sums (count, ld) = the outputs [first, first + count), a multiple of 32, of `blocks` blocks of 16 rows from `block` on,
// without the bias. Outputs beyond the last one are undefined. `next`: the output whose weights are prefetched at the end.
inline void amx_sums(const Matrix& m, int64_t first, int64_t count, const AmxInputs& in, int64_t block, int64_t blocks,
                     const AmxScratch& s, int64_t ld, int64_t next) {
  const AmxTiles configured;
  const bool codes = in.codes, in_place = amx_in_place(m, codes, blocks * SIDE);
  const int64_t depth_blocks = (in.steps + AMX_DEPTH - 1) / AMX_DEPTH;
  // A multiple of 128 codes.
  const int64_t each = round_up((in.steps + depth_blocks - 1) / depth_blocks, 4), bytes = row_bytes(m);
  const int64_t last = first + count < m.outputs ? first + count : m.outputs;
  const auto multiply = [&](int64_t output, int64_t k) {
    const int64_t steps = in.steps - k < each ? in.steps - k : each;
    AmxOperand w = {s.weights, 2 * AMX_TILE, AMX_TILE, AMX_STEP};
    if (in_place && output + 2 * SIDE <= m.outputs) {
      w = {(const char*)m.data + output * bytes + k * AMX_STEP, AMX_STEP, SIDE * bytes, bytes};
    } else {
      amx_pack(m, codes, output, k, steps, s.weights, 2 * AMX_TILE, s.row);
      amx_pack(m, codes, output + SIDE, k, steps, s.weights + AMX_TILE, 2 * AMX_TILE, s.row);
    }
    const int64_t group = codes ? k * AMX_STEP / m.group : 0, groups = codes ? steps * AMX_STEP / m.group : 0;
    for (int64_t g = 0; g < groups; ++g) {
      float* scale = s.scale + g * 2 * SIDE;
      amx_values(m, m.scale, output, in.groups, group + g, scale);
      if (m.low) amx_lows(m, output, in.groups, group + g, scale, s.low + g * 2 * SIDE);
    }
    // The weights that are multiplied next are prefetched.
    AmxPrefetch prefetch;
    if (blocks > 2) {
      if (output + 2 * SIDE < last)
        prefetch = AmxPrefetch(m, codes, output + 2 * SIDE, k, steps, blocks);
      else if (k + each < in.steps)
        prefetch = AmxPrefetch(m, codes, first, k + each, each, blocks);
      else if (next < m.outputs)
        prefetch = AmxPrefetch(m, codes, next, 0, each, blocks);
    }
    for (int64_t b = 0; b < blocks; b += 2) {
      float* sums = s.sums + (output - first) * ld + b * SIDE;
      const AmxOperand x = {in.tiles + ((block + b) * in.steps + k) * AMX_TILE, AMX_TILE, in.steps * AMX_TILE, AMX_STEP};
      if (codes)
        b + 1 < blocks ? amx_codes<2, 2>(m, w, in, block + b, group, groups, s, sums, ld, prefetch)
                       : amx_codes<2, 1>(m, w, in, block + b, group, groups, s, sums, ld, prefetch);
      else
        b + 1 < blocks ? amx_floats<2, 2>(w, x, steps, sums, ld, !k, prefetch)
                       : amx_floats<2, 1>(w, x, steps, sums, ld, !k, prefetch);
    }
  };
  // Many rows read a block of weights from L1. For few rows weights are read in the order of memory.
  if (blocks * SIDE > AMX_STREAMED_ROWS)
    for (int64_t k = 0; k < in.steps; k += each)
      for (int64_t output = first; output < last; output += 2 * SIDE) multiply(output, k);
  else
    for (int64_t output = first; output < last; output += 2 * SIDE)
      for (int64_t k = 0; k < in.steps; k += each) multiply(output, k);
}

// The tasks of a product of m with `inputs` rows of inputs by AMX.
class AmxTasks {
 public:
  struct Part {
    int64_t row, end, first, last;  // rows [row, end), outputs [first, last)
  };

  int64_t ld;  // from the sums of one output to those of the next

  AmxTasks(const Matrix& m, int64_t inputs, int threads) : m(m), inputs(inputs), threads(threads) {
    row_blocks = (inputs + AMX_ROWS - 1) / AMX_ROWS;
    rows = inputs ? round_up((inputs + row_blocks - 1) / row_blocks, 2 * SIDE) : 2 * SIDE;
    ld = rows + SIDE;
    // Wide panels read the inputs less often, where they do not fit L2; there are at least four for each thread.
    outputs = AMX_OUTPUTS;
    while (outputs > 32 && row_blocks * ((m.outputs + outputs - 1) / outputs) < 4 * threads) outputs /= 2;
    panels = (m.outputs + outputs - 1) / outputs;
  }
  int64_t count() const { return row_blocks * panels; }

  // Computes the sums of a task in the scratch, while the weights of a later one are prefetched.
  Part multiply(int64_t index, const AmxInputs& in, const AmxScratch& scratch) const {
    const int64_t first = index % panels * outputs, row = index / panels * rows;
    const int64_t end = row + rows < inputs ? row + rows : inputs;
    amx_sums(m, first, outputs, in, row / SIDE, (end - row + SIDE - 1) / SIDE, scratch, ld, first + threads * outputs);
    return {row, end, first, first + outputs < m.outputs ? first + outputs : m.outputs};
  }

 private:
  const Matrix& m;
  int64_t inputs, threads, rows, outputs, row_blocks, panels;
};

// y (rows, outputs) from `first` on = the transposed sums (count, ld) + bias; Y is float or uint16_t (bf16).
template <class Y>
inline void amx_store(const Matrix& m, int64_t first, int64_t count, const float* sums, int64_t ld, int64_t rows, Y* y,
                      int64_t ldy) {
  const int64_t end = first + count < m.outputs ? first + count : m.outputs;
  for (int64_t row = 0; row < rows; row += SIDE) {
    const int here = int(rows - row < SIDE ? rows - row : SIDE);
    for (int64_t output = first; output < end; output += SIDE) {
      Floats v[SIDE];
      UNROLL for (int i = 0; i < SIDE; ++i) v[i] = load<Floats>(sums + (output - first + i) * ld + row);
      transpose(v);
      const int64_t left = end - output;
      Floats bias = {};
      for (int i = 0; m.bias && i < SIDE && i < left; ++i) bias[i] = bias_of(m, output + i);
      for (int r = 0; r < here; ++r) {
        Y* to = y + (row + r) * ldy + output;
        if (left >= SIDE) {
          write(to, v[r] + bias);
        } else {
          Y last[SIDE];
          write(last, v[r] + bias);
          memcpy(to, last, left * sizeof(Y));
        }
      }
    }
  }
}

}  // namespace matrices

#endif
