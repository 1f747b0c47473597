// bf16 weights in 12 bits, without loss: almost all exponents of a row are among 15 neighbours, which 4 bits can name.
// Part of matrix.hpp.
//
// A row is a head and its runs. The head: the highest of the row's 15 exponents, how many weights have none of them, and
// for each of those its column and its value (16 bits each). A run of 128 weights: 128 bytes, the sign and the mantissa of
// each; and 32 words, of which word w has in bits [4 j, 4 j + 4) by how much weight 32 j + w's exponent is lower than the
// highest; 15 stands for exponent 0, that is for zero and what is next to it. Weights of the head are zeros in the runs.
#pragma once

namespace matrices {

typedef int16_t SignedShorts __attribute__((vector_size(LANES * 4)));
typedef int8_t HalfBytes __attribute__((vector_size(LANES * 2)));

// A row's head, and where its runs begin.
struct Row {
  Row(const Matrix& m, int64_t output) : head((const uint16_t*)((const uint8_t*)m.data + output * row_bytes(m))) {
    runs = (const uint8_t*)head + head_bytes(m);
    highest = load<uint16_t>(head) << 7;
    columns = m.inputs;
    const int slots = int(head_bytes(m) / 4) - 1, stored = load<uint16_t>(head + 1);
    count = stored < slots ? stored : slots;  // files may say anything
  }

  // Calls f(column, value) for the weights that are not in the runs.
  template <class F>
  INLINE void others(F f) const {
    for (int i = 1; i <= count; ++i)
      if (const int column = load<uint16_t>(head + 2 * i); column < columns) f(column, load<uint16_t>(head + 2 * i + 1));
  }

  // The weights [k, k + RUN) as bf16, zeros where they are in the head.
  void unfold(int64_t k, uint16_t* to) const;

  const uint16_t* head;
  const uint8_t* runs;
  int64_t columns;
  int count;         // of weights in the head
  uint16_t highest;  // in the exponent's bits
};

// The weights from 32 * J + word on of a run, as many as a vector of bf16 holds; `lower` is the run's words from `word` on.
template <int J>
INLINE Shorts unfolded(const uint8_t* run, Shorts lower, int word, uint16_t highest) {
  constexpr int shift = 7 - 4 * J;
  const Shorts by = (shift > 0 ? lower << (shift > 0 ? shift : 0) : lower >> (shift > 0 ? 0 : -shift)) & 0x780;
  const Shorts exponent = bits<Shorts>(by != 0x780) & (highest - by);
  const HalfBytes rest = load<HalfBytes>(run + 32 * J + word);
  return (bits<Shorts>(__builtin_convertvector(rest, SignedShorts)) & 0x807f) | exponent;
}

inline void Row::unfold(int64_t k, uint16_t* to) const {
  const uint8_t* run = runs + k / RUN * RUN_BYTES;
  UNROLL for (int word = 0; word < 32; word += 2 * LANES) {
    const Shorts lower = load<Shorts>(run + RUN + 2 * word);
    store(to + word, unfolded<0>(run, lower, word, highest));
    store(to + word + 32, unfolded<1>(run, lower, word, highest));
    store(to + word + 64, unfolded<2>(run, lower, word, highest));
    store(to + word + 96, unfolded<3>(run, lower, word, highest));
  }
}

// The whole matrix as bf16 (outputs, inputs).
inline void unfold(const Matrix& m, uint16_t* to, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t output = 0; output < m.outputs; ++output) {
    const Row row(m, output);
    uint16_t* weights = to + output * m.inputs;
    for (int64_t k = 0; k < m.inputs; k += RUN) {
      if (k + RUN <= m.inputs) {
        row.unfold(k, weights + k);
        continue;
      }
      uint16_t last[RUN];
      row.unfold(k, last);
      memcpy(weights + k, last, (m.inputs - k) * 2);
    }
    row.others([&](int column, uint16_t value) { weights[column] = value; });
  }
}

// As HalfTile and PairTile, which multiply the weights once they are bf16.
template <class Step>
struct LosslessTile {
  static constexpr int32_t FORMAT = LOSSLESS;

  template <Hint HINT, int R, int T>
  static INLINE void run(const Matrix& m, const Prepared& p, int64_t output, int64_t gap, int row,
                         float (&out)[R][T]) {
    const auto* x = Step::inputs(p) + row * p.padded;
    const int64_t bytes = row_bytes(m), head = head_bytes(m);
    const uint8_t* first = (const uint8_t*)m.data + output * bytes + head;
    Floats sums[R][T] = {};
    uint16_t highest[R];
    UNROLL for (int r = 0; r < R; ++r) highest[r] = Row(m, output + r * gap).highest;
    for (int64_t k = 0; k < m.inputs; k += RUN) {
      const uint8_t* runs = first + k / RUN * RUN_BYTES;
      for (int at = 0; at < RUN_BYTES; at += 64)
        UNROLL for (int r = 0; r < R; ++r) ahead<HINT, T>(runs + r * gap * bytes + at);
      UNROLL for (int word = 0; word < 32; word += 2 * LANES) {
        Shorts lower[R];
        UNROLL for (int r = 0; r < R; ++r) lower[r] = load<Shorts>(runs + r * gap * bytes + RUN + 2 * word);
        part<0>(runs, gap * bytes, lower, word, highest, x + k, p.padded, sums);
        part<1>(runs, gap * bytes, lower, word, highest, x + k, p.padded, sums);
        part<2>(runs, gap * bytes, lower, word, highest, x + k, p.padded, sums);
        part<3>(runs, gap * bytes, lower, word, highest, x + k, p.padded, sums);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) out[r][t] = sum(sums[r][t]);
      Row(m, output + r * gap).others([&](int column, uint16_t value) {
        for (int t = 0; t < T; ++t) out[r][t] += from_bf16(value) * p.x[(row + t) * p.ldx + column];
      });
    }
  }

  template <int J, int R, int T, class X>
  static INLINE void part(const uint8_t* runs, int64_t step, const Shorts (&lower)[R], int word,
                          const uint16_t (&highest)[R], const X* x, int64_t ldx, Floats (&sums)[R][T]) {
    Shorts weights[R];
    UNROLL for (int r = 0; r < R; ++r) weights[r] = unfolded<J>(runs + r * step, lower[r], word, highest[r]);
    Step::template multiply<R, T>(weights, x + 32 * J + word, ldx, sums);
  }
};

}  // namespace matrices
