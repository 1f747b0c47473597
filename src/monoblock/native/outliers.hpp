// Inputs that are much larger than the others of their run, as some channels of a transformer always are, and activations of the
// MLP sometimes. Rounded to 8 bits together with them, the others would lose most of their precision. They are replaced by 0,
// and their products with the weights are added in float32. Part of panel_gemm.hpp.
//
// Which inputs are taken depends on their own row only, and so do its sums, to the bit.
#pragma once

#include <algorithm>

namespace matrices {

// An outlier is as many times as large as the lower quartile of the largest magnitudes of its row's runs. Normed channels are
// nearly Gaussian but for a few, which are the same in all rows. Other activations have long tails: there, a limit of 2 would be
// exceeded by several inputs of each row, in other channels.
constexpr float NORMED_OUTLIER = 2, OUTLIER = 8;
constexpr int64_t RUN_OUTLIERS = 4;       // at most, of a run
constexpr int64_t ROW_OUTLIERS = 64;      // at most, of a row
constexpr int64_t OUTLIER_COLUMNS = 128;  // columns of weights that are unpacked at a time

struct Outliers {
  int32_t *count, *channel;  // (rows,), (rows, most)
  float *value, *tops;       // (rows, most); (rows, runs): the largest magnitude of each run
  int64_t most;              // of a row

  static int64_t most_of(int64_t inputs) {
    const int64_t all = round_up(inputs, RUN) / RUN * RUN_OUTLIERS;
    return all < ROW_OUTLIERS ? all : ROW_OUTLIERS;
  }

  static int64_t bytes(int64_t inputs, int64_t rows) {
    return rows * (4 + most_of(inputs) * 8 + round_up(inputs, RUN) / RUN * 4);
  }

  void place(void* scratch, int64_t inputs, int64_t rows) {
    most = most_of(inputs);
    count = (int32_t*)scratch, channel = count + rows;
    value = (float*)(channel + rows * most), tops = value + rows * most;
  }

  // The largest magnitude of each run of a row, `tops`, and the magnitude above which its inputs are outliers: `times` the lower
  // quartile of the first RUN tops.
  static float limit(const float* x, int64_t inputs, float times, float* tops) {
    float run[RUN], sorted[RUN];
    int64_t runs = 0;
    for (int64_t k = 0; k < inputs; k += RUN) {
      const bool whole = inputs - k >= RUN;
      if (!whole) pad(x + k, inputs - k, run, RUN);
      tops[runs++] = top(whole ? x + k : run);
    }
    if (runs > RUN) runs = RUN;
    memcpy(sorted, tops, runs * sizeof(float));
    std::nth_element(sorted, sorted + runs / 4, sorted + runs);
    return times * sorted[runs / 4];
  }

  // Moves the inputs above the limit, which are finite, to the list of the row; `run` holds RUN inputs from k on, whose largest
  // magnitude is `highest`.
  void take(int64_t row, int64_t k, float limit, float highest, float* run) {
    for (int i = 0; i < RUN_OUTLIERS && count[row] < most; ++i, highest = top(run)) {
      if (!(highest > limit && highest < __builtin_inff())) return;
      int at = 0;
      while (__builtin_fabsf(run[at]) != highest) ++at;
      const int64_t own = row * most + count[row]++;
      channel[own] = int32_t(k + at), value[own] = run[at], run[at] = 0;
    }
  }

 private:
  static float top(const float* run) {
    Floats found = {};
    for (int i = 0; i < RUN; i += LANES) found = largest(magnitude(load<Floats>(run + i)), found);
    return largest(found);
  }
};

// Weights of input k in the rows [first, first + PANEL_OUTPUTS) of a quantised matrix; the last one stands in for those beyond.
inline void unpack_column(const Matrix& m, int64_t first, int64_t k, float* to) {
  const int64_t bytes = row_bytes(m), last = m.outputs - first - 1;
  const bool nibbles = m.format == INT4;
  const uint8_t* codes = (const uint8_t*)m.data + first * bytes + (nibbles ? k / RUN * BLOCK + k % BLOCK : k);
  const int shift = nibbles && k % RUN >= BLOCK ? 4 : 0, mask = nibbles ? 15 : 255, zero = m.low ? 0 : zero_of(m);
  float scale[PANEL_OUTPUTS], low[PANEL_OUTPUTS];
  for (int64_t r = 0; r < PANEL_OUTPUTS; ++r) {
    const RowScales stored(m, first + (r < last ? r : last));
    scale[r] = stored.scale(k / m.group), low[r] = m.low ? stored.low(k / m.group) : 0;
  }
  for (int64_t r = 0; r < PANEL_OUTPUTS; ++r)
    to[r] = float((codes[(r < last ? r : last) * bytes] >> shift & mask) - zero) * scale[r] + low[r];
}

// The columns of weights of a panel that are unpacked, and where.
struct OutlierColumns {
  float* weights;     // (OUTLIER_COLUMNS, PANEL_OUTPUTS)
  int32_t* channels;  // (OUTLIER_COLUMNS,)
  int32_t* slots;     // (inputs,): column of a channel, if its entry of `channels` is the channel

  template <class Arena>
  OutlierColumns(Arena& arena, int64_t inputs)
      : weights(arena.template take<float>(OUTLIER_COLUMNS * PANEL_OUTPUTS)),
        channels(arena.template take<int32_t>(OUTLIER_COLUMNS)),
        slots(arena.template take<int32_t>(inputs)) {}

  // sums (rows, PANEL_OUTPUTS) += outliers of the rows [row, row + rows) times their weights.
  void add(const Matrix& m, const Outliers& of, int64_t first, int64_t row, int64_t rows, float* sums) {
    constexpr int VECTORS = PANEL_OUTPUTS / LANES;
    int32_t used = 0;
    for (int64_t r = row; r < row + rows; ++r, sums += PANEL_OUTPUTS) {
      if (!of.count[r]) continue;
      Floats own[VECTORS];
      UNROLL for (int i = 0; i < VECTORS; ++i) own[i] = load<Floats>(sums + i * LANES);
      for (int32_t j = 0; j < of.count[r]; ++j) {
        const int32_t k = of.channel[r * of.most + j];
        int32_t slot = slots[k];
        if (uint32_t(slot) >= uint32_t(used) || channels[slot] != k) {
          if (used == OUTLIER_COLUMNS) used = 0;  // begins again: the oldest are overwritten
          slot = slots[k] = used++, channels[slot] = k;
          unpack_column(m, first, k, weights + slot * PANEL_OUTPUTS);
        }
        const float x = of.value[r * of.most + j], *w = weights + slot * PANEL_OUTPUTS;
        UNROLL for (int i = 0; i < VECTORS; ++i) own[i] += x * load<Floats>(w + i * LANES);
      }
      UNROLL for (int i = 0; i < VECTORS; ++i) store(sums + i * LANES, own[i]);
    }
  }
};

}  // namespace matrices
