// Rows of weights in any format as float32, and quantised ones as bf16. Part of matrix.hpp.
#pragma once

namespace matrices {

// Converts a row of bf16 to float.
inline void convert_to_float(const uint16_t* x, int64_t inputs, float* to) {
  int64_t k = 0;
  for (; k + LANES <= inputs; k += LANES) store(to + k, from_bf16(load<Halves>(x + k)));
  for (; k < inputs; ++k) to[k] = from_bf16(x[k]);
}

// Quantised weights [k, k + count) of an output as T, float or uint16_t (bf16). k is a multiple of RUN, and `to` has room for
// whole blocks.
template <class T>
inline void dequantise(const Matrix& m, int64_t output, int64_t k, int64_t count, T* to) {
  const uint8_t* codes = (const uint8_t*)m.data + output * row_bytes(m);
  const uint16_t *scales = m.scale + output * groups_of(m), *lows = m.low ? m.low + output * groups_of(m) : nullptr;
  for (int64_t start = k; start < k + count; start += BLOCK, to += BLOCK) {  // both group sizes are multiples of BLOCK
    const int64_t group = start / m.group;
    const float scale = from_half(scales[group]), low = lows ? from_half(lows[group]) : 0.0f;
    // The low nibbles of a run are its first 64 codes, the high nibbles the others.
    const uint8_t* block = m.format == INT8 ? codes + start : codes + start / RUN * BLOCK;
    const int shift = m.format == INT8 ? 0 : start % RUN / BLOCK * 4, offset = m.format == INT8 ? 128 : 0;
    const uint32_t mask = m.format == INT8 ? 255u : 15u;
    UNROLL for (int i = 0; i < BLOCK; i += LANES) {
      const Words code = __builtin_convertvector(load<Bytes>(block + i), Words) >> shift & mask;
      write(to + i, __builtin_convertvector((Ints)code - offset, Floats) * scale + low);
    }
  }
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
  return dequantise(m, output, k, count, to), to;
}

}  // namespace matrices
