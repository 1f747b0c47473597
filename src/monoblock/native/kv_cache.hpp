// Attention of a few new tokens over a cache of keys and values, which are read once for all heads that share them.
#pragma once

#include <math.h>

#include "vector_math.hpp"

namespace decode {

constexpr int KEYS = 64;  // at a time: as floats, a block of keys or values stays in L1

// Some keys of one row of the batch and one key/value head. Pointers are those of key 0 of the sequence, though the cache
// may have dropped it; strides are elements from one token to the next.
struct KeyChunk {
  const void *keys, *values;
  int64_t key_stride, value_stride;
  int64_t first, last;
  const uint8_t* valid;  // a byte for each key of the sequence, 0 for padding; or null
};

// The queries of the group's heads: new tokens x heads, token by token, after RoPE and scaling, each padded with zeros to
// whole vectors.
struct Queries {
  const float* data;
  int count, shared;    // shared: heads of the group
  int dim, padded;
  int64_t position;     // of the first new token in the sequence
  int64_t window;       // keys that a query attends to; 0: all
  const float* slopes;  // ALiBi's, of the group's heads; or null
  float softcap;        // 0: none
};

// A softmax over some keys, not yet divided by its sum: the largest score, the sum, the weighted values.
struct PartialSoftmax {
  float *most, *total;  // (queries,)
  float* values;        // (queries, padded)
};

// A block of keys or values as floats, (count, padded). The next block is prefetched, if there is one.
template <class T>
INLINE void widen_block(const T* from, int64_t stride, int count, bool more, int dim, int padded, float* to) {
  for (int j = 0; j < count; ++j, from += stride, to += padded) {
    for (int c = 0; more && c < dim; c += 64 / int(sizeof(T))) __builtin_prefetch(from + KEYS * stride + c);
    int c = 0;
    for (; c + LANES <= dim; c += LANES) store(to + c, read(from + c));
    for (; c < dim; ++c) to[c] = read1(from + c);
    for (; c < padded; ++c) to[c] = 0;
  }
}

// The dot products of one query and LANES keys.
INLINE Floats products(const float* query, const float* keys, int padded) {
  Floats found[LANES] = {};
  for (int c = 0; c < padded; c += LANES) {
    Floats q = read(query + c);
    UNROLL for (int j = 0; j < LANES; ++j) found[j] += q * read(keys + j * padded + c);
  }
  return sums(found);
}

// For Q queries: to (W vectors) += the sum of weight * row.
template <int W, int Q>
INLINE void add_rows(const float* weights, const float* rows, int count, int padded, float* to) {
  Floats sum[Q][W];
  UNROLL for (int q = 0; q < Q; ++q)
    UNROLL for (int w = 0; w < W; ++w) sum[q][w] = read(to + q * padded + w * LANES);
  for (int j = 0; j < count; ++j, rows += padded)
    UNROLL for (int w = 0; w < W; ++w) {
      Floats row = read(rows + w * LANES);
      UNROLL for (int q = 0; q < Q; ++q) sum[q][w] += weights[q * KEYS + j] * row;
    }
  UNROLL for (int q = 0; q < Q; ++q)
    UNROLL for (int w = 0; w < W; ++w) store(to + q * padded + w * LANES, sum[q][w]);
}

template <int Q>
INLINE void add_values(const float* weights, const float* rows, int count, int padded, float* to) {
  int c = 0;
  for (; c + 4 * LANES <= padded; c += 4 * LANES) add_rows<4, Q>(weights, rows + c, count, padded, to + c);
  for (; c < padded; c += LANES) add_rows<1, Q>(weights, rows + c, count, padded, to + c);
}

// Scores of query m with `count` keys from key `first` on: with softcap, ALiBi and the attention mask.
// Returns the largest.
inline float mask_scores(const Queries& q, int m, const KeyChunk& s, int64_t first, int count, float* scores) {
  const float slope = q.slopes ? q.slopes[m % q.shared] : 0;
  const int behind = int(q.position + m / q.shared - first);  // this query's position, relative to the first key
  const int window = q.window && q.window < (1 << 30) ? int(q.window) : 1 << 30;
  Ints key;
  for (int i = 0; i < LANES; ++i) key[i] = i;
  for (int j = 0; j < count; j += LANES, key += LANES) {
    Floats x = read(scores + j);
    if (q.softcap != 0) x = q.softcap * tanh(x / q.softcap);
    Ints away = key - behind;
    x += slope * __builtin_convertvector(away, Floats);
    x = (away <= 0) & (away > -window) & (key < count) ? x : Floats{} - INFINITY;
    store(scores + j, x);
  }
  for (int j = 0; s.valid && j < count; ++j)
    if (!s.valid[first + j]) scores[j] = -INFINITY;
  Floats most = Floats{} - INFINITY;
  for (int j = 0; j < count; j += LANES) most = largest(read(scores + j), most);
  return largest(most);
}

// Scores become weights relative to the largest so far, which is `most`; returns their sum.
INLINE float exponentiate(float* scores, int count, float most) {
  Floats total = {};
  for (int j = 0; j < count; j += LANES) {
    Floats x = read(scores + j);
    Floats weight = x == -INFINITY ? Floats{} : exp(x - most);
    store(scores + j, weight);
    total += weight;
  }
  return sum(total);
}

// Makes what query m has so far relative to the new largest score.
INLINE void rescale(const Queries& q, int m, float most, PartialSoftmax& part) {
  const float kept = expf(part.most[m] - most);
  float* values = part.values + m * q.padded;
  part.most[m] = most, part.total[m] *= kept;
  for (int c = 0; c < q.padded; c += LANES) store(values + c, kept * read(values + c));
}

// `block` and `scores` are scratch of (KEYS, padded) and of KEYS floats for each query.
template <class T>
inline void attend_chunk(const Queries& q, const KeyChunk& s, PartialSoftmax part, float* block, float* scores) {
  for (int m = 0; m < q.count; ++m) part.most[m] = -INFINITY, part.total[m] = 0;
  memset(part.values, 0, sizeof(float) * q.count * q.padded);
  for (int64_t first = s.first; first < s.last; first += KEYS) {
    const int count = s.last - first < KEYS ? int(s.last - first) : KEYS;
    const bool more = s.last - first >= 2 * KEYS;
    widen_block((const T*)s.keys + first * s.key_stride, s.key_stride, count, more, q.dim, q.padded, block);
    for (int m = 0; m < q.count; ++m) {
      float* row = scores + m * KEYS;
      for (int j = 0; j < count; j += LANES)
        store(row + j, products(q.data + m * q.padded, block + j * q.padded, q.padded));
      const float most = mask_scores(q, m, s, first, count, row);
      if (most > part.most[m]) rescale(q, m, most, part);
      part.total[m] += exponentiate(row, count, part.most[m]);
    }
    widen_block((const T*)s.values + first * s.value_stride, s.value_stride, count, more, q.dim, q.padded, block);
    int m = 0;
    for (; m + 2 <= q.count; m += 2) add_values<2>(scores + m * KEYS, block, count, q.padded, part.values + m * q.padded);
    if (m < q.count) add_values<1>(scores + m * KEYS, block, count, q.padded, part.values + m * q.padded);
  }
}

// One query's result from all chunks of its keys, `next` floats apart: softmax weights that sum to 1. A fully masked row
// (padding) gets zeros: its values must stay finite, since they are multiplied by 0 later.
inline void combine(const PartialSoftmax& first, int64_t next, int parts, int m, int dim, int padded, float* to) {
  float most = -INFINITY, total = 0;
  for (int i = 0; i < parts; ++i) most = fmaxf(most, first.most[i * next + m]);
  memset(to, 0, sizeof(float) * dim);
  for (int i = 0; i < parts; ++i) {
    const float own = first.total[i * next + m];
    if (own == 0) continue;
    const float factor = expf(first.most[i * next + m] - most);
    const float* values = first.values + i * next + int64_t(m) * padded;
    total += factor * own;
    for (int c = 0; c < dim; ++c) to[c] += factor * values[c];
  }
  for (int c = 0; total != 0 && c < dim; ++c) to[c] /= total;
}

}  // namespace decode
