// Inputs in the form that the kernels read: as they are, reordered, in bf16, or quantised. Part of matrix.hpp.
#pragma once

namespace matrices {

// Whether inputs are rounded to bf16 pairs for bf16 weights. For one row fp32 inputs cost nothing, because the memory is
// slower than the arithmetic; four rows of fp32 would take 1.5 times as long.
INLINE bool by_pairs(int rows) {
#if defined(__AVX512BF16__)
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

// In every run of 2 * LANES inputs, those of even index before those of odd index.
inline void part(const float* x, int64_t inputs, float* to, int64_t padded) {
  for (int64_t k = 0; k < padded; k += 2 * LANES)
    for (int i = 0; i < LANES; ++i) {
      const int64_t at = k + 2 * i;
      to[k + i] = at < inputs ? x[at] : 0;
      to[k + LANES + i] = at + 1 < inputs ? x[at + 1] : 0;
    }
}

inline void narrow(const float* x, int64_t inputs, uint16_t* to, int64_t padded) {
  int64_t k = 0;
  for (; k + LANES <= inputs; k += LANES) store(to + k, to_bf16(load<Floats>(x + k)));
  for (; k < padded; ++k) to[k] = k < inputs ? to_bf16(x[k]) : 0;
}

// The least magnitude that is quantised: below it, 127 / max|x| is infinite.
constexpr float LEAST = 1e-36f;

// One group: q = round(x * 127 / max|x|). NaN and infinity make the scale NaN, so that they are not lost.
INLINE void quantise(const float* x, int group, int8_t* q, float* scale, float* total) {
  Floats top = {}, strange = {};
  for (int k = 0; k < group; k += LANES) {
    Floats v = load<Floats>(x + k);
    top = largest(magnitude(v), top);
    strange += v * 0.0f;
  }
  float most = largest(top), inverse = most > LEAST ? 127 / most : 0, odd = sum(strange);
  if (odd != odd) {
    memset(q, 0, group);
    *scale = *total = odd;
    return;
  }
  Ints whole = {};
  for (int k = 0; k < group; k += LANES) {
    Ints n = nearest(load<Floats>(x + k) * inverse);
    store(q + k, __builtin_convertvector(n, SignedBytes));
    whole += n;
  }
  *scale = most / 127;
  *total = sum(__builtin_convertvector(whole, Floats)) * *scale;
}

inline void quantise_row(const float* x, int64_t row, const Matrix& m, Prepared& p) {
  float rest[RUN], *scale = p.q_scale + row * p.blocks, *total = p.q_sum + row * p.blocks;
  memset(scale, 0, p.blocks * 4);
  memset(total, 0, p.blocks * 4);
  for (int64_t g = 0, k = 0; k < p.padded; ++g, k += m.group) {
    const float* from = x + k;
    if (k + m.group > m.inputs) {
      pad(from, m.inputs > k ? m.inputs - k : 0, rest, m.group);
      from = rest;
    }
    quantise(from, m.group, p.q + row * p.padded + k, scale + g, total + g);
  }
}

// Exact inputs for packed weights: only the sums of the blocks are needed beside them.
inline void block_sums(const float* x, float* to, int64_t blocks) {
  for (int64_t b = 0; b < blocks; ++b) {
    Floats s = {};
    for (int k = 0; k < BLOCK; k += LANES) s += load<Floats>(x + b * BLOCK + k);
    to[b] = sum(s);
  }
}

// Fills what a product of `m` with these rows (row i at x + i * ldx) needs; one thread's work. The rows must stay
// where they are until the product is done.
inline void prepare(const Matrix& m, const float* x, int64_t ldx, int rows, Prepared& p) {
  p.padded = round_up(m.inputs, RUN), p.blocks = round_up(p.padded / BLOCK, 16);
  p.x = x, p.ldx = ldx;
  for (int row = 0; row < rows && (m.format == BF16 || m.format == LOSSLESS); ++row)
    if (by_pairs(rows))
      narrow(x + row * ldx, m.inputs, p.bf + row * p.padded, p.padded);
    else
      part(x + row * ldx, m.inputs, p.f + row * p.padded, p.padded);
  if (m.format != INT8 && m.format != INT4) return;
#if defined(__AVX512VNNI__)
  for (int row = 0; row < rows; ++row) quantise_row(x + row * ldx, row, m, p);
#else
  if (m.inputs != p.padded) {
    for (int row = 0; row < rows; ++row) pad(x + row * ldx, m.inputs, p.f + row * p.padded, p.padded);
    p.x = p.f, p.ldx = p.padded;
  }
  for (int row = 0; row < rows; ++row) block_sums(p.x + row * p.ldx, p.q_sum + row * p.blocks, p.padded / BLOCK);
#endif
}

}  // namespace matrices
