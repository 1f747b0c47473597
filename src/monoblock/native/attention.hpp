// Attention of a prompt: softmax(scale * q.k + bias) v, over blocks of queries and keys with an online softmax (flash
// attention).
//
// A task is a block of queries of all heads that share a key/value head. For each KV block it packs the keys (transposed, so
// that vectors run along keys) and the values once, and computes scores, weights and sums for small tiles of queries while
// the block is in L2. Scores are scaled by log2(e), so that the softmax needs only 2^x. A word is the operand of one
// multiply-add in a lane: a float, or a pair of bfloat16.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "matrix.hpp"
#include "prompt_ops.hpp"

namespace prompt {

// Strides (batch, head, token) are in elements; channels have stride 1. The queries are at the last positions of the keys.
struct AttentionCall {
  const void *q, *k, *v;
  void* out;
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3];
  const float* alibi_slopes;  // (heads,) or null
  const float* relative;      // (heads, relative_stride), biases by distance, or null; see below
  const uint8_t* valid;       // (batch, keys), 0 for padding, or null
  const int32_t* segments;    // (batch, keys), document ids: a query attends to keys of its own document; or null
  int64_t valid_stride, segments_stride;
  int64_t batch, heads, kv_heads, queries, keys, head_dim;
  int64_t window;        // 0: none
  // The bias of head h for a key `d` positions after the query (or before, d < 0) is relative[h][relative_center + d]. Rows
  // are readable for LANES elements more than the distances need.
  int64_t relative_stride, relative_center;
  float scale, softcap;  // softcap 0: none
  int32_t bf16, causal, threads;
};

constexpr int ROWS = 6, COLUMNS = matrices::REGISTERS == 32 ? 4 : 2;  // a register tile: rows, and vectors per row
constexpr int PANEL = COLUMNS * LANES;                               // keys of a packed panel
// Queries and keys of a tile of scores. The queries are a multiple of a register tile's rows, and of an AMX tile's.
#if defined(__AMX_TILE__)
constexpr int TILE = 48;
#else
constexpr int TILE = 24;
#endif
constexpr int KEYS = 256;
constexpr float MASKED = -INFINITY;

struct Plain {  // float32; also bfloat16 without dot products of pairs
  static constexpr int PER_WORD = 1, ROWS = prompt::ROWS, WORDS = 1;
  static Floats dot(Floats sum, float a, Floats b) { return sum + a * b; }
};

#if defined(MB_BF16_DOT)
struct Pairs {
  static constexpr int PER_WORD = 2, ROWS = prompt::ROWS, WORDS = 1;
  static Floats dot(Floats sum, float a, Floats b) {
    return matrices::dot_pairs(sum, bits<matrices::Shorts>(all(a)), bits<matrices::Shorts>(b));
  }
};
#else
typedef Plain Pairs;
#endif

#if defined(__AMX_TILE__)
// Pairs of bfloat16 in tiles of 16 rows and 16 words. Channels are padded to a multiple of 32.
struct Tiles : Pairs {
  static constexpr int ROWS = 16, WORDS = 16;
};
#else
typedef Pairs Tiles;
#endif

// c (ROWS, N vectors) = factor[row] * c + a (ROWS, depth words) b (depth, N vectors); a null factor is 0.
template <class Dot, int N>
inline void tile(const float* a, int64_t lda, const float* b, int64_t ldb, int depth, float* c, int64_t ldc,
                 const float* factor) {
  Floats sums[ROWS][N];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < N; ++j) sums[i][j] = factor ? load<Floats>(c + i * ldc + j * LANES) * factor[i] : Floats{};
  for (int w = 0; w < depth; ++w) {
    Floats row[N];
    for (int j = 0; j < N; ++j) row[j] = load<Floats>(b + w * ldb + j * LANES);
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < N; ++j) sums[i][j] = Dot::dot(sums[i][j], a[i * lda + w], row[j]);
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < N; ++j) store(c + i * ldc + j * LANES, sums[i][j]);
}

template <class Dot>
inline void tiles(const float* a, int64_t lda, const float* b, int64_t ldb, int depth, float* c, int64_t ldc,
                  int vectors, const float* factor) {
  int done = 0;
  for (; vectors - done >= COLUMNS; done += COLUMNS)
    tile<Dot, COLUMNS>(a, lda, b + done * LANES, ldb, depth, c + done * LANES, ldc, factor);
  for (; done < vectors; ++done) tile<Dot, 1>(a, lda, b + done * LANES, ldb, depth, c + done * LANES, ldc, factor);
}

// The same for `rows` rows and any number of vectors of keys or channels.
template <class Dot>
inline void products(const float* a, int64_t lda, const float* b, int64_t ldb, int depth, float* c, int64_t ldc, int rows,
                     int vectors, const float* factor) {
#if defined(__AMX_TILE__)
  if constexpr (std::is_same_v<Dot, Tiles>) {
    using namespace matrices;
    AmxPrefetch none;
    if (factor)
      for (int r = 0; r < rows; ++r)
        for (int j = 0; j < vectors; ++j) store(c + r * ldc + j * LANES, load<Floats>(c + r * ldc + j * LANES) * factor[r]);
    for (int r = 0; r < rows; r += 32)
      for (int j = 0; j < vectors; j += 2) {
        const AmxOperand x = {(const char*)(a + r * lda), 64, 16 * lda * 4, lda * 4};
        const AmxOperand y = {(const char*)(b + j * LANES), 16 * ldb * 4, 64, ldb * 4};
        float* to = c + r * ldc + j * LANES;
        const bool two = r + 16 < rows, wide = j + 1 < vectors;
        if (two)
          wide ? amx_floats<2, 2>(x, y, depth / 16, to, ldc, !factor, none)
               : amx_floats<2, 1>(x, y, depth / 16, to, ldc, !factor, none);
        else
          wide ? amx_floats<1, 2>(x, y, depth / 16, to, ldc, !factor, none)
               : amx_floats<1, 1>(x, y, depth / 16, to, ldc, !factor, none);
      }
    return;
  }
#endif
  for (int r = 0; r < rows; r += ROWS)
    tiles<Dot>(a + r * lda, lda, b, ldb, depth, c + r * ldc, ldc, vectors, factor ? factor + r : nullptr);
}

// ---------------------------------------------------------------------------- packing

template <class Dot, class T>
inline float word(const T* x, int64_t at, int64_t step, bool second) {
  if constexpr (Dot::PER_WORD == 1) return read1(x + at);
  const uint32_t low = x[at], high = second ? x[at + step] : 0, both = low | high << 16;
  return bits<float>(both);
}

// Whether a word is the bits of one or two adjacent channels as they lie in memory.
template <class Dot, class T>
constexpr bool in_words = sizeof(T) * Dot::PER_WORD == sizeof(float);

// Packs rows of channels as rows of words.
template <class Dot, class T>
void pack_rows(const T* from, int64_t stride, int rows, int dim, int words, float* to) {
  if (in_words<Dot, T> && dim == words * Dot::PER_WORD) {
    for (int r = 0; r < rows; ++r) memcpy(to + r * words, from + r * stride, words * sizeof(float));
    return;
  }
  for (int r = 0; r < rows; ++r)
    for (int w = 0; w < words; ++w) {
      const int c = w * Dot::PER_WORD;
      to[r * words + w] = c < dim ? word<Dot>(from + r * stride, c, 1, c + 1 < dim) : 0.0f;
    }
}

// Packs keys as panels (words, PANEL keys), padded with zeros after the last key.
template <class Dot, class T>
void pack_keys(const T* from, int64_t stride, int keys, int dim, int words, float* to) {
  for (int first = 0; first < keys; first += PANEL, to += words * PANEL) {
    int done = 0;
    if (in_words<Dot, T> && words % LANES == 0 && dim == words * Dot::PER_WORD)
      for (; done + LANES <= PANEL && first + done + LANES <= keys; done += LANES)
        for (int w = 0; w < words; w += LANES) {
          matrices::Words v[LANES];
          UNROLL for (int j = 0; j < LANES; ++j)
            v[j] = load<matrices::Words>(from + (first + done + j) * stride + w * Dot::PER_WORD);
          matrices::transpose(v);
          UNROLL for (int j = 0; j < LANES; ++j) store(to + (w + j) * PANEL + done, v[j]);
        }
    for (int j = done; j < PANEL; ++j) {
      const bool inside = first + j < keys;
      const T* key = from + (first + j) * stride;
      for (int w = 0; w < words; ++w) {
        const int c = w * Dot::PER_WORD;
        to[w * PANEL + j] = inside && c < dim ? word<Dot>(key, c, 1, c + 1 < dim) : 0.0f;
      }
    }
  }
}

// Packs values as rows of words, each of one channel of PER_WORD keys, padded with zeros after the last key.
template <class Dot, class T>
void pack_values(const T* from, int64_t stride, int keys, int dim, int padded, float* to) {
  int key = 0;
  for (; key < keys; key += Dot::PER_WORD, to += padded) {
    for (int c = 0; c < dim; ++c) to[c] = word<Dot>(from + key * stride, c, stride, key + 1 < keys);
    for (int c = dim; c < padded; ++c) to[c] = 0.0f;
  }
  for (; key < round_up(keys, Dot::PER_WORD * Dot::WORDS); key += Dot::PER_WORD, to += padded)
    std::fill(to, to + padded, 0.0f);
}

// ---------------------------------------------------------------------------- scores to weights

// One row of scores; `position` and `first` are the indices of its query and of the row's first key in the sequence.
struct ScoreRow {
  float* scores;
  int count;  // keys, a multiple of LANES
  int64_t position, first;
  int unmasked_from, unmasked_to;  // the range left by the causal mask, the window and the end of the sequence
};

inline void mask_scores(const ScoreRow& row, const AttentionCall& a, float slope, const float* relative,
                        const uint8_t* valid, const int32_t* segments) {
  const float scale = (a.softcap ? 1.0f : a.scale) * LOG2E, ramp = slope * LOG2E;
  for (int c = 0; c < row.count; c += LANES) {
    Floats s = load<Floats>(row.scores + c);
    if (a.softcap) s = a.softcap * tanh(s * (a.scale / a.softcap));
    const int64_t distance = row.first + c - row.position;
    if (relative)
      s = s * scale + load<Floats>(relative + distance) * LOG2E;
    else
      s = s * scale + (float(distance) + iota()) * ramp;
    store(row.scores + c, s);
  }
  for (int c = 0; c < row.unmasked_from; ++c) row.scores[c] = MASKED;
  for (int c = row.unmasked_to; c < row.count; ++c) row.scores[c] = MASKED;
  for (int c = row.unmasked_from; valid && c < row.unmasked_to; ++c)
    if (!valid[row.first + c]) row.scores[c] = MASKED;
  for (int c = row.unmasked_from; segments && c < row.unmasked_to; ++c)
    if (segments[row.first + c] != segments[row.position]) row.scores[c] = MASKED;
}

// Scores become weights relative to the running maximum; returns the factor for the earlier sums (online softmax). NaN is
// ignored in the maximum, but its weight is NaN.
template <class Dot>
float exponentiate(const ScoreRow& row, float& most, float& total) {
  Floats highest = all(MASKED);
  for (int c = 0; c < row.count; c += LANES) highest = matrices::largest(load<Floats>(row.scores + c), highest);
  const float now = std::max(most, matrices::largest(highest));
  float reference = 0.0f, factor = 1.0f;  // for while all keys so far are masked: their weights are 0
  if (now != MASKED) reference = now, factor = exp2(all(most - now))[0];
  Floats sums{};
  for (int c = 0; c < row.count; c += LANES) {
    const Floats weight = exp2(load<Floats>(row.scores + c) - reference);
    sums += weight;
    // bf16 weights overwrite scores that have been read: they take half the space.
    if constexpr (Dot::PER_WORD == 2)
      write((uint16_t*)row.scores + c, weight);
    else
      store(row.scores + c, weight);
  }
  most = now;
  total = total * factor + sum(sums);
  return factor;
}

// ---------------------------------------------------------------------------- one task

// T: the type of queries, keys and values; Out: that of the result.
template <class Dot, class T, class Out = T>
class Task {
 public:
  Task(const AttentionCall& a, int64_t block)
      : a(a),
        words(int(round_up(a.head_dim, Dot::PER_WORD * Dot::WORDS) / Dot::PER_WORD)),
        padded(int(round_up(a.head_dim, LANES))),
        rows(int(round_up(block, TILE))),
        queries(rows * (a.heads / a.kv_heads) * words),
        keys(KEYS * words),
        values(KEYS * padded),
        scores(TILE * KEYS),
        sums(rows * (a.heads / a.kv_heads) * padded),
        most(rows * (a.heads / a.kv_heads)),
        total(most.size()) {}

  // Queries [begin, end) of batch row b and the heads of group g.
  void run(int64_t b, int64_t g, int64_t begin, int64_t end) {
#if defined(__AMX_TILE__)
    std::optional<matrices::AmxTiles> configured;
    if constexpr (Dot::ROWS == matrices::SIDE) configured.emplace();
#endif
    const int64_t shared = a.heads / a.kv_heads, past = a.keys - a.queries;
    for (int64_t h = 0; h < shared; ++h)
      pack_rows<Dot>(at<const T>(a.q, a.q_strides, b, g * shared + h, begin), a.q_strides[2], int(end - begin),
                     int(a.head_dim), words, queries.data() + h * rows * words);
    mean.clear();
    std::fill(sums.begin(), sums.end(), 0.0f);
    std::fill(most.begin(), most.end(), MASKED);
    std::fill(total.begin(), total.end(), 0.0f);
    const int64_t last = a.causal ? past + end : a.keys;
    int64_t first = a.window ? std::max<int64_t>(0, past + begin - a.window + 1) : 0;
    for (; first < last; first += KEYS) {
      const int count = int(std::min<int64_t>(KEYS, last - first));
      pack_keys<Dot>(at<const T>(a.k, a.k_strides, b, g, first), a.k_strides[2], count, int(a.head_dim), words,
                     keys.data());
      pack_values<Dot>(at<const T>(a.v, a.v_strides, b, g, first), a.v_strides[2], count, int(a.head_dim), padded,
                       values.data());
      for (int64_t h = 0; h < shared; ++h)
        for (int64_t q = begin; q < end; q += TILE)
          attend_tile(b, g * shared + h, h * rows + q - begin, q, int(std::min<int64_t>(TILE, end - q)), first, count);
    }
    for (int64_t h = 0; h < shared; ++h)
      for (int64_t q = begin; q < end; ++q) finish(b, g, g * shared + h, q, h * rows + q - begin);
  }

 private:
  template <class P>
  static P* at(const void* data, const int64_t* stride, int64_t b, int64_t h, int64_t t) {
    return (P*)data + b * stride[0] + h * stride[1] + t * stride[2];
  }

  // A tile of queries (packed from `row` on) with the packed keys [first, first + count).
  void attend_tile(int64_t b, int64_t head, int64_t row, int64_t q, int queries_here, int64_t first, int count) {
    const int64_t position = a.keys - a.queries + q;
    int from = 0, to = count;
    if (a.causal) to = int(std::min<int64_t>(to, position + queries_here - first));
    if (a.window) from = int(std::max<int64_t>(0, position - a.window + 1 - first));
    if (from >= to) return;
    from = from / PANEL * PANEL;
    constexpr int STEP = Dot::PER_WORD * Dot::WORDS;  // keys of a step of the products with values
    const int width = int(round_up(to - from, std::max(LANES, STEP))), used = int(round_up(queries_here, Dot::ROWS));
    float factors[TILE];
    for (int c = from; c < to; c += PANEL)
      products<Dot>(queries.data() + row * words, words, keys.data() + c * words, PANEL, words, scores.data() + c - from,
                    KEYS, used, std::min(COLUMNS, (width - (c - from)) / LANES), nullptr);
    for (int r = 0; r < used; ++r) {
      const int64_t mine = position + std::min(r, queries_here - 1);
      ScoreRow line{scores.data() + r * KEYS, width, mine, first + from, 0, to - from};
      if (a.causal) line.unmasked_to = int(std::min<int64_t>(line.unmasked_to, mine + 1 - line.first));
      if (a.window) line.unmasked_from = int(std::max<int64_t>(0, mine - a.window + 1 - line.first));
      line.unmasked_to = std::max(line.unmasked_to, 0);
      line.unmasked_from = std::min(line.unmasked_from, line.unmasked_to);
      mask_scores(line, a, a.alibi_slopes ? a.alibi_slopes[head] : 0.0f,
                  a.relative ? a.relative + head * a.relative_stride + a.relative_center : nullptr,
                  a.valid ? a.valid + b * a.valid_stride : nullptr,
                  a.segments ? a.segments + b * a.segments_stride : nullptr);
      factors[r] = exponentiate<Dot>(line, most[row + r], total[row + r]);
    }
    products<Dot>(scores.data(), KEYS, values.data() + from / Dot::PER_WORD * padded, padded,
                  int(round_up(to - from, STEP)) / Dot::PER_WORD, sums.data() + row * padded, padded, used, padded / LANES,
                  factors);
  }

  // Normalises the sums. The output of a fully masked query is the mean of all values, as for equal scores.
  void finish(int64_t b, int64_t g, int64_t head, int64_t q, int64_t row) {
    Out* out = at<Out>(a.out, a.out_strides, b, head, q);
    const bool fully_masked = total[row] == 0.0f;
    if (fully_masked && mean.empty()) find_mean(b, g);
    const float* of = fully_masked ? mean.data() : sums.data() + row * padded;
    const float all = fully_masked ? float(a.keys) : total[row];
    for (int64_t c = 0; c < a.head_dim; ++c) write1(out + c, of[c] / all);
  }

  void find_mean(int64_t b, int64_t g) {
    mean.assign(a.head_dim, 0.0f);
    for (int64_t k = 0; k < a.keys; ++k) {
      const T* value = at<const T>(a.v, a.v_strides, b, g, k);
      for (int64_t c = 0; c < a.head_dim; ++c) mean[c] += read1(value + c);
    }
  }

  const AttentionCall& a;
  const int words, padded, rows;
  std::vector<float> queries, keys, values, scores, sums, most, total;
  std::vector<float> mean;  // the sum of all values of the task's key/value head, if it was needed
};

template <class Dot, class T>
void run_tasks(const AttentionCall& a) {
  const int64_t shared = a.heads / a.kv_heads, pairs = a.batch * a.kv_heads;
  // About 384 packed rows of queries share each packed KV block; fewer where threads would have no work.
  int64_t block = std::max<int64_t>(TILE, 384 / shared / TILE * TILE);
  while (block > TILE && pairs * ((a.queries + block - 1) / block) < 4 * a.threads) block = round_up(block / 2, TILE);
  const int64_t blocks = (a.queries + block - 1) / block;
  parallel::region(a.threads, [&](parallel::Region& own) {
    Task<Dot, T> task(a, block);
    // The last queries attend to the most keys: they come first, so that the longest tasks do not come last.
    own.loop(pairs * blocks, 1, [&](int64_t i) {
      const int64_t begin = (blocks - 1 - i / pairs) * block, pair = i % pairs;
      task.run(pair / a.kv_heads, pair % a.kv_heads, begin, std::min(begin + block, a.queries));
    });
  });
}

inline int attention(const AttentionCall& a) {
  a.bf16 ? run_tasks<Tiles, uint16_t>(a) : run_tasks<Plain, float>(a);
  return 0;
}

}  // namespace prompt
