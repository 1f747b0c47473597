// Rows of weights in any format as float32. Part of matrix.hpp.
#pragma once

namespace matrices {

// Converts a row of bf16 to float.
inline void convert_to_float(const uint16_t* x, int64_t inputs, float* to) {
  int64_t k = 0;
  for (; k + LANES <= inputs; k += LANES) store(to + k, from_bf16(load<Halves>(x + k)));
  for (; k < inputs; ++k) to[k] = from_bf16(x[k]);
}

// The weights [k, k + count) of an output as float32, in `to` unless they are float32 already. k is a multiple of RUN.
inline const float* float_weights(const Matrix& m, int64_t output, int64_t k, int64_t count, float* to) {
  switch (m.format) {
    case F32: return (const float*)m.data + output * m.inputs + k;
    case BF16: return convert_to_float((const uint16_t*)m.data + output * m.inputs + k, count, to), to;
    case LOSSLESS: {
      const LosslessRow row(m, output);
      for (int64_t i = 0; i < count; i += RUN) {
        uint16_t run[RUN];
        row.decompress(k + i, run);
        convert_to_float(run, count - i < RUN ? count - i : RUN, to + i);
      }
      row.outliers([&](int column, uint16_t value) {
        if (column >= k && column < k + count) to[column - k] = from_bf16(value);
      });
      return to;
    }
  }
  const uint8_t* codes = (const uint8_t*)m.data + output * row_bytes(m);
  for (int64_t start = k; start < k + count; start += BLOCK) {  // both group sizes are multiples of BLOCK
    const int64_t group = output * groups_of(m) + start / m.group;
    const float scale = from_half(m.scale[group]), low = m.low ? from_half(m.low[group]) : 0.0f;
    const uint8_t* block = m.format == INT8 ? codes + start : codes + start / RUN * BLOCK;
    const int shift = start % RUN / BLOCK * 4;
    for (int i = 0; i < BLOCK; i += LANES) {
      const Bytes bytes = load<Bytes>(block + i);
      const Words code = __builtin_convertvector(bytes, Words);
      if (m.format == INT8)
        store(to + start - k + i, (__builtin_convertvector((Ints)code, Floats) - 128.0f) * scale);
      else
        store(to + start - k + i, __builtin_convertvector((Ints)(code >> shift & 15u), Floats) * scale + low);
    }
  }
  return to;
}

}  // namespace matrices
