// Attention of a few new tokens over a KV cache (flash decoding). Keys and values are read once for all heads of a group.
#pragma once

#include <math.h>

#include "vector_math.hpp"

namespace decode {

constexpr int KEYS = 64;  // keys of a block: as floats, a block of keys or values stays in L1

// A range of keys [first, last) of one row of the batch and one key/value head. Pointers are to key 0 of the sequence, even
// if the cache no longer holds it; strides are elements from one token to the next.
struct KeyChunk {
  const void *keys, *values;
  int64_t key_stride, value_stride;
  int64_t first, last;
  const uint8_t* valid;  // a byte for each key of the sequence, 0 for padding; or null
};

// The queries of a group's heads, (tokens, heads, padded), after RoPE and scaling, each padded with zeros to a multiple of
// the vector length.
struct Queries {
  const float* data;
  int count, shared;    // tokens * heads; heads of the group
  int dim, padded;
  int64_t position;     // index of the first new token in the sequence
  int64_t window;       // keys that a query attends to; 0: all
  const float* slopes;  // ALiBi slopes of the group's heads; or null
  float softcap;        // 0: none
};

// A partial softmax over some keys, not yet normalised: the largest score, the sum of the weights, the weighted values.
struct PartialSoftmax {
  float *most, *total;  // (queries,)
  float* values;        // (queries, padded)
};

// Converts a block of keys or values to floats, (count, padded), and prefetches the next block if there is one (`more`).
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

// The dot products of one query with LANES keys.
INLINE Floats products(const float* query, const float* keys, int padded) {
  Floats found[LANES] = {};
  for (int c = 0; c < padded; c += LANES) {
    Floats q = read(query + c);
    UNROLL for (int j = 0; j < LANES; ++j) found[j] += q * read(keys + j * padded + c);
  }
  return sums(found);
}

// For Q queries: to (W vectors) += sum over j of weights[j] * rows[j].
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

// Applies softcap, ALiBi and the attention mask to the scores of query m with the keys [first, first + count); returns the
// largest score.
inline float mask_scores(const Queries& q, int m, const KeyChunk& s, int64_t first, int count, float* scores) {
  const float slope = q.slopes ? q.slopes[m % q.shared] : 0;
  const int behind = int(q.position + m / q.shared - first);  // this query's position, relative to the first key
  const int window = q.window && q.window < (1 << 30) ? int(q.window) : 1 << 30;
  Ints key;
  for (int i = 0; i < LANES; ++i) key[i] = i;
  for (int j = 0; j < count; j += LANES, key += LANES) {
    Floats x = read(scores + j);
    if (q.softcap != 0) x = q.softcap * tanh(x / q.softcap);
    Ints distance = key - behind;
    x += slope * __builtin_convertvector(distance, Floats);
    x = (distance <= 0) & (distance > -window) & (key < count) ? x : Floats{} - INFINITY;
    store(scores + j, x);
  }
  for (int j = 0; s.valid && j < count; ++j)
    if (!s.valid[first + j]) scores[j] = -INFINITY;
  Floats most = Floats{} - INFINITY;
  for (int j = 0; j < count; j += LANES) most = largest(read(scores + j), most);
  return largest(most);
}

// scores[j] = e^(scores[j] - most), where `most` is the running maximum; returns the sum.
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

// Rescales the partial softmax of query m to a new maximum (online softmax).
INLINE void rescale(const Queries& q, int m, float most, PartialSoftmax& part) {
  const float factor = expf(part.most[m] - most);
  float* values = part.values + m * q.padded;
  part.most[m] = most, part.total[m] *= factor;
  for (int c = 0; c < q.padded; c += LANES) store(values + c, factor * read(values + c));
}

// Attention of all queries over one chunk of keys. `block` and `scores` are scratch: (KEYS, padded) and (queries, KEYS).
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

// Combines the partial softmaxes of one query over all chunks, which are `next` floats apart. The output of a fully masked
// row (padding) is 0: it must be finite, since it is multiplied by 0 later.
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
