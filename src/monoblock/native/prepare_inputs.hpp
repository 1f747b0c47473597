// Converts rows of inputs to the form that the kernels read: float32, deinterleaved float32, bf16 or int8. Part of matrix.hpp.
#pragma once

namespace matrices {

// Whether inputs are rounded to bf16 for bf16 weights (dot products of pairs). With one row, fp32 inputs cost nothing,
// because the product is bound by memory bandwidth; four rows in fp32 would take 1.5 times as long.
INLINE bool by_pairs(int rows) {
#if defined(MB_BF16_DOT)
  return rows > 1;
#else
  return rows < 0;
#endif
}

// Copies a row and pads it with zeros.
inline void pad(const float* x, int64_t inputs, float* to, int64_t padded) {
  memcpy(to, x, inputs * sizeof(float));
  memset(to + inputs, 0, (padded - inputs) * sizeof(float));
}

// Deinterleaves every run of 2 * LANES inputs: those of even index, then those of odd index.
inline void deinterleave(const float* x, int64_t inputs, float* to, int64_t padded) {
  for (int64_t k = 0; k < padded; k += 2 * LANES)
    for (int i = 0; i < LANES; ++i) {
      const int64_t even = k + 2 * i;
      to[k + i] = even < inputs ? x[even] : 0;
      to[k + LANES + i] = even + 1 < inputs ? x[even + 1] : 0;
    }
}

// Rounds a row to bf16 and pads it with zeros.
inline void round_to_bf16(const float* x, int64_t inputs, uint16_t* to, int64_t padded) {
  int64_t k = 0;
  for (; k + LANES <= inputs; k += LANES) store(to + k, to_bf16(load<Floats>(x + k)));
  for (; k < padded; ++k) to[k] = k < inputs ? to_bf16(x[k]) : 0;
}

// Groups with a smaller max|x| quantise to 0: 127 / max|x| would overflow. With 16 bits the limit is 1000 times as large.
constexpr float MIN_MAGNITUDE = 1e-36f;

// One group: q = round(x * LARGEST / max|x|), in 8 or 16 bits, the sums of q * scale and of q. NaN and infinity make the scale
// NaN, so that they propagate to the outputs.
template <class Code>
INLINE void quantise(const float* x, int group, Code* q, float* scale, float* total, int32_t* integers = nullptr) {
  constexpr bool BYTE = sizeof(Code) == 1;
  constexpr float LARGEST = BYTE ? 127 : 32767, LEAST = BYTE ? MIN_MAGNITUDE : 1e3f * MIN_MAGNITUDE;
  Floats top = {}, nonfinite = {};
  for (int k = 0; k < group; k += LANES) {
    Floats v = load<Floats>(x + k);
    top = largest(magnitude(v), top);
    nonfinite += v * 0.0f;  // NaN if v is NaN or infinite
  }
  float most = largest(top), inverse = most > LEAST ? LARGEST / most : 0, nan = sum(nonfinite);
  if (nan != nan) {
    memset(q, 0, group * sizeof(Code));
    *scale = *total = nan;
    if (integers) *integers = 0;
    return;
  }
  Ints q_sum = {};
  for (int k = 0; k < group; k += LANES) {
    Ints n = nearest(load<Floats>(x + k) * inverse);
    store_narrow(q + k, n);
    q_sum += n;
  }
  *scale = most / LARGEST;
  const float exact = sum(__builtin_convertvector(q_sum, Floats));
  if (integers) *integers = int32_t(exact);
  *total = exact * *scale;
}

// How a product's inputs are rounded to 8 bits; all null: by the largest magnitude of each group.
//
// A few channels of a transformer's activations are many times as large as the others, in every token, and would make the steps of
// their groups coarse. These `channels` are left out of the rounding and multiplied in float32, as LLM.int8() does
// (arXiv:2208.07339). With `scale` and `low`, groups are rounded about the middle of their range, x = q * step + middle, where
// activations have values of mostly one sign; `low` is then what the product adds for each `middle`.
struct InputRounding {
  const int32_t* channels;  // (count,), ascending
  const float* columns;     // (count, outputs rounded up to 64): their weights
  const float *scale, *low;  // (outputs, groups), in place of the matrix's: low is the sum of the group's weights, less 128 * scale
  int64_t count;             // at most MOST_CHANNELS
};

constexpr int64_t MOST_CHANNELS = 16;

// One group about the middle of its range, which becomes `middle`; otherwise as `quantise`.
INLINE void quantise_centred(const float* x, int group, int8_t* q, float* scale, float* middle, int32_t* integers) {
  Floats top = load<Floats>(x), bottom = -top, nonfinite = {};
  for (int k = 0; k < group; k += LANES) {
    const Floats v = load<Floats>(x + k);
    top = largest(v, top), bottom = largest(-v, bottom);
    nonfinite += v * 0.0f;
  }
  const float high = largest(top) * 0.5f, low = largest(bottom) * 0.5f, nan = sum(nonfinite);
  const float half = high + low, mid = high - low, inverse = half > MIN_MAGNITUDE ? 127 / half : 0;
  if (nan != nan) {
    memset(q, 0, group);
    *scale = *middle = nan, *integers = 0;
    return;
  }
  Ints q_sum = {};
  for (int k = 0; k < group; k += LANES) {
    // A range that is small beside its middle is not exact: the limits keep its codes in 8 bits.
    const Floats steps = (load<Floats>(x + k) - mid) * inverse;
    const Ints n = nearest(largest(-largest(-steps, all(-127.0f)), all(-127.0f)));
    store_narrow(q + k, n);
    q_sum += n;
  }
  *scale = half / 127, *middle = mid, *integers = int32_t(sum(__builtin_convertvector(q_sum, Floats)));
}

// One row; with `how` as that says.
inline void quantise_row(const float* x, int64_t row, const Matrix& m, Prepared& p, const InputRounding& how = {}) {
  float rest[RUN], *scale = p.q_scale + row * p.blocks, *total = p.q_sum + row * p.blocks;
  int32_t* integers = p.q_total + row * p.blocks;
  memset(scale, 0, p.blocks * 4);
  memset(total, 0, p.blocks * 4);
  memset(integers, 0, p.blocks * 4);
  for (int64_t g = 0, k = 0, c = 0; k < p.padded; ++g, k += m.group) {
    const float* from = x + k;
    const int64_t inside = m.inputs - k < 0 ? 0 : m.inputs - k < m.group ? m.inputs - k : m.group;
    const bool without = c < how.count && how.channels[c] < k + m.group;
    if (inside < m.group || without) {
      pad(from, inside, rest, m.group);
      for (; c < how.count && how.channels[c] < k + m.group; ++c) rest[how.channels[c] - k] = 0;
      from = rest;
    }
    int8_t* q = p.q + row * p.padded + k;
    how.low ? quantise_centred(from, m.group, q, scale + g, total + g, integers + g)
            : quantise(from, m.group, q, scale + g, total + g, integers + g);
  }
}

// For float32 inputs and quantised weights: the sum of each part of inputs, by which `low` is multiplied.
inline void part_sums(const Matrix& m, const float* x, float* to, int64_t padded) {
  const int part = part_of(m);
  for (int64_t b = 0; b < padded / part; ++b) {
    Floats s = {};
    for (int k = 0; k < part; k += LANES) s += load<Floats>(x + b * part + k);
    to[b] = sum(s);
  }
}

// Prepares `rows` rows of inputs (row i at x + i * ldx) for `multiply` with m, on the calling thread. `p` may point to x,
// which must stay valid until the product is done.
inline void prepare(const Matrix& m, const float* x, int64_t ldx, int rows, Prepared& p) {
  p.padded = round_up(m.inputs, RUN), p.blocks = blocks_of(m);
  p.x = x, p.ldx = ldx;
  for (int row = 0; row < rows && (m.format == BF16 || m.format == LOSSLESS); ++row)
    if (by_pairs(rows))
      round_to_bf16(x + row * ldx, m.inputs, p.bf + row * p.bf_stride(), p.padded);
    else
      deinterleave(x + row * ldx, m.inputs, p.f + row * p.padded, p.padded);
  if (m.format != INT8 && m.format != INT4) return;
#if defined(MB_INT8_DOT)
  for (int row = 0; row < rows; ++row) quantise_row(x + row * ldx, row, m, p);
#else
  if (m.inputs != p.padded) {
    for (int row = 0; row < rows; ++row) pad(x + row * ldx, m.inputs, p.f + row * p.padded, p.padded);
    p.x = p.f, p.ldx = p.padded;
  }
  for (int row = 0; row < rows; ++row) part_sums(m, p.x + row * p.ldx, p.q_sum + row * p.blocks, p.padded);
#endif
}

}  // namespace matrices
