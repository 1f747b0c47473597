// Lossless 12-bit compression of bf16 weights: almost all exponents of a row lie in a window of 15 consecutive values, which
// 4 bits can encode. Part of matrix.hpp; quantization/bf12.py of the PyTorch backend writes the format.
//
// A row is a header and its runs. The header: the highest exponent of the window, the number of outliers (weights with an
// exponent outside it), and for each outlier its column and its bf16 bits (16 bits each). A run of 128 weights: 128 bytes,
// sign and mantissa of each weight; then 32 words of 16 bits, where bits [4 j, 4 j + 4) of word w are the difference between
// the highest exponent and that of weight 32 j + w; 15 stands for exponent 0 (zeros and subnormals). Outliers are zeros in
// the runs.
#pragma once

namespace matrices {

typedef int16_t SignedShorts __attribute__((vector_size(LANES * 4)));
typedef int8_t HalfBytes __attribute__((vector_size(LANES * 2)));

// A row's header and runs.
struct LosslessRow {
  LosslessRow(const Matrix& m, int64_t output) : head((const uint16_t*)((const uint8_t*)m.data + output * row_bytes(m))) {
    runs = (const uint8_t*)head + head_bytes(m);
    highest = load<uint16_t>(head) << 7;
    columns = m.inputs;
    const int slots = int(head_bytes(m) / 4) - 1, stored = load<uint16_t>(head + 1);
    count = stored < slots ? stored : slots;  // the file may be corrupt
  }

  // Calls f(column, value) for each outlier.
  template <class F>
  INLINE void outliers(F f) const {
    for (int i = 1; i <= count; ++i)
      if (const int column = load<uint16_t>(head + 2 * i); column < columns) f(column, load<uint16_t>(head + 2 * i + 1));
  }

  // The weights [k, k + RUN) as bf16, with zeros for outliers.
  void decompress(int64_t k, uint16_t* to) const;

  const uint16_t* head;
  const uint8_t* runs;
  int64_t columns;
  int count;         // number of outliers
  uint16_t highest;  // the highest exponent, in the exponent bits of a bf16
};

INLINE Shorts widen(HalfBytes v) {
#if defined(__aarch64__)
  return arm::widen(v);
#else
  return bits<Shorts>(__builtin_convertvector(v, SignedShorts));
#endif
}

// A vector of bf16 weights of a run, from weight 32 * J + word on; `lower`: the run's words from `word` on.
template <int J>
INLINE Shorts decompressed(const uint8_t* run, Shorts lower, int word, uint16_t highest) {
  constexpr int shift = 7 - 4 * J;
  const Shorts by = (shift > 0 ? lower << (shift > 0 ? shift : 0) : lower >> (shift > 0 ? 0 : -shift)) & 0x780;
  const Shorts exponent = bits<Shorts>(by != 0x780) & (highest - by);
  const HalfBytes rest = load<HalfBytes>(run + 32 * J + word);
  return (widen(rest) & 0x807f) | exponent;
}

inline void LosslessRow::decompress(int64_t k, uint16_t* to) const {
  const uint8_t* run = runs + k / RUN * RUN_BYTES;
  UNROLL for (int word = 0; word < 32; word += 2 * LANES) {
    const Shorts lower = load<Shorts>(run + RUN + 2 * word);
    store(to + word, decompressed<0>(run, lower, word, highest));
    store(to + word + 32, decompressed<1>(run, lower, word, highest));
    store(to + word + 64, decompressed<2>(run, lower, word, highest));
    store(to + word + 96, decompressed<3>(run, lower, word, highest));
  }
}

// Decompresses the whole matrix to bf16 (outputs, inputs).
inline void decompress(const Matrix& m, uint16_t* to, int threads) {
  parallel::static_for(threads, m.outputs, [&](int64_t output) {
    const LosslessRow row(m, output);
    uint16_t* weights = to + output * m.inputs;
    for (int64_t k = 0; k < m.inputs; k += RUN) {
      if (k + RUN <= m.inputs) {
        row.decompress(k, weights + k);
        continue;
      }
      uint16_t last[RUN];
      row.decompress(k, last);
      memcpy(weights + k, last, (m.inputs - k) * 2);
    }
    row.outliers([&](int column, uint16_t value) { weights[column] = value; });
  });
}

// Decompresses in registers; then multiplies as WideTile or PairTile (`Step`) does.
template <class Step>
struct LosslessTile {
  static constexpr int32_t FORMAT = LOSSLESS;

  template <Hint HINT, int R, int T>
  static INLINE void run(const Matrix& m, const Prepared& p, int64_t output, int64_t gap, int row, int64_t ahead,
                         float (&out)[R][T]) {
    const int64_t ldx = Step::stride(p);
    const auto* x = Step::inputs(p) + row * ldx;
    const int64_t bytes = row_bytes(m), head = head_bytes(m);
    const uint8_t* first = (const uint8_t*)m.data + output * bytes + head;
    Floats sums[R][T] = {};
    uint16_t highest[R];
    UNROLL for (int r = 0; r < R; ++r) highest[r] = LosslessRow(m, output + r * gap).highest;
    for (int64_t k = 0; k < m.inputs; k += RUN) {
      const uint8_t* runs = first + k / RUN * RUN_BYTES;
      for (int at = 0; at < RUN_BYTES; at += 64)
        UNROLL for (int r = 0; r < R; ++r) prefetch_ahead<HINT>(runs + r * gap * bytes + at, ahead);
      UNROLL for (int word = 0; word < 32; word += 2 * LANES) {
        Shorts lower[R];
        UNROLL for (int r = 0; r < R; ++r) lower[r] = load<Shorts>(runs + r * gap * bytes + RUN + 2 * word);
        part<0>(runs, gap * bytes, lower, word, highest, x + k, ldx, sums);
        part<1>(runs, gap * bytes, lower, word, highest, x + k, ldx, sums);
        part<2>(runs, gap * bytes, lower, word, highest, x + k, ldx, sums);
        part<3>(runs, gap * bytes, lower, word, highest, x + k, ldx, sums);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) out[r][t] = sum(sums[r][t]);
      LosslessRow(m, output + r * gap).outliers([&](int column, uint16_t value) {
        for (int t = 0; t < T; ++t) out[r][t] += from_bf16(value) * p.x[(row + t) * p.ldx + column];
      });
    }
  }

  template <int J, int R, int T, class X>
  static INLINE void part(const uint8_t* runs, int64_t step, const Shorts (&lower)[R], int word,
                          const uint16_t (&highest)[R], const X* x, int64_t ldx, Floats (&sums)[R][T]) {
    Shorts weights[R];
    UNROLL for (int r = 0; r < R; ++r) weights[r] = decompressed<J>(runs + r * step, lower[r], word, highest[r]);
    Step::template multiply<R, T>(weights, x + 32 * J + word, ldx, sums);
  }
};

}  // namespace matrices
