// Rows of weights in any format as float32, and quantised ones as bf16. Part of matrix.hpp.
#pragma once

namespace matrices {

// Converts a row of bf16 to float.
inline void convert_to_float(const uint16_t* x, int64_t inputs, float* to) {
  int64_t k = 0;
  for (; k + LANES <= inputs; k += LANES) store(to + k, from_bf16(load<Halves>(x + k)));
  for (; k < inputs; ++k) to[k] = from_bf16(x[k]);
}

// As `dequantise`, for one of the formats and parts of PART weights of a group: the loop has no choices left.
template <Format FORMAT, int PART, class T>
inline void dequantise_as(const Matrix& m, int64_t output, int64_t k, int64_t count, T* to) {
  const uint8_t* codes = (const uint8_t*)m.data + output * row_bytes(m);
  const RowScales stored(m, output);
  for (int64_t start = k; start < k + count; start += PART, to += PART) {
    const int64_t group = start / m.group;
    // Where a code stands for 0, it is subtracted first: then the product is rounded once.
    const float scale = stored.scale(group), zero = stored.has_lows() ? 0.0f : stored.zero(group);
    const float low = stored.has_lows() ? stored.low(group, scale) : 0.0f;
    // The low nibbles of a run are its first 64 codes, the high nibbles the others.
    const bool high = start % RUN >= BLOCK;
    const uint8_t* block = FORMAT == INT8 ? codes + start : codes + start / RUN * BLOCK + start % BLOCK;
    UNROLL for (int i = 0; i < PART; i += LANES) {
      const Words code = widen(load<Bytes>(block + i));
      const Words own = FORMAT == INT8 ? code : high ? code >> 4 : code & 15u;
      write(to + i, (__builtin_convertvector((Ints)own, Floats) - zero) * scale + low);
    }
  }
}

template <Format FORMAT, class T>
inline void dequantise_as(const Matrix& m, int64_t output, int64_t k, int64_t count, T* to) {
  switch (part_of(m)) {
    case BLOCK: return dequantise_as<FORMAT, BLOCK>(m, output, k, count, to);
    case 32: return dequantise_as<FORMAT, 32>(m, output, k, count, to);
    default: return dequantise_as<FORMAT, LEAST_GROUP>(m, output, k, count, to);
  }
}

// Quantised weights [k, k + count) of an output as T, float or uint16_t (bf16). k is a multiple of RUN, and `to` has room for
// whole blocks.
template <class T>
inline void dequantise(const Matrix& m, int64_t output, int64_t k, int64_t count, T* to) {
  m.format == INT8 ? dequantise_as<INT8>(m, output, k, count, to) : dequantise_as<INT4>(m, output, k, count, to);
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

// The weights [k, k + count) of a row as bf16; `to` is used where they are stored in another format.
inline const uint16_t* bf16_weights(const Matrix& m, int64_t output, int64_t k, int64_t count, uint16_t* to) {
  if (m.format == BF16) return (const uint16_t*)m.data + output * m.inputs + k;
  if (m.format != LOSSLESS) return dequantise(m, output, k, count, to), to;
  const LosslessRow row(m, output);
  for (int64_t i = 0; i < count; i += RUN) row.decompress(k + i, to + i);
  row.outliers([&](int column, uint16_t value) {
    if (column >= k && column < k + count) to[column - k] = value;
  });
  return to;
}

}  // namespace matrices
