// Attention over a paged KV cache, for any number of queries of one sequence. A query's result has the same bits whichever
// other queries are computed with it: blocks of keys begin at multiples of BLOCK_TOKENS, and a block that a query does not
// attend to leaves its sums unchanged.
//
// A block holds BLOCK_TOKENS tokens of one key/value head of one layer: keys transposed (head_dim, BLOCK_TOKENS), so that
// vectors run along keys, then values (BLOCK_TOKENS, padded).
#pragma once

#include "kv_cache.hpp"

namespace decode {

constexpr int BLOCK_TOKENS = KEYS;

// The queries of some consecutive tokens of a sequence for one key/value head: (tokens, heads of the group), after scaling.
struct PagedQueries {
  Queries rows;            // `position` is that of the first token; `data` is (count, head_dim)
  const int32_t* table;    // the sequence's blocks
  const void* cache;       // this layer's first block of the head
  int64_t block_stride;    // elements from a block to the next
};

// Converts `count` elements to floats; float32 is read in place.
INLINE const float* as_floats(const float* from, int64_t, float*) { return from; }
INLINE const float* as_floats(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += LANES) store(to + i, read(from + i));
  return to;
}

// scores (R, BLOCK_TOKENS) of R queries with a block of keys (dim, BLOCK_TOKENS).
template <int R>
INLINE void block_scores(const float* query, int dim, const float* keys, float* scores) {
  constexpr int COLUMNS = REGISTERS == 32 ? 4 : 2, WIDTH = COLUMNS * LANES;
  for (int at = 0; at < BLOCK_TOKENS; at += WIDTH) {
    Floats found[R][COLUMNS] = {};
    for (int c = 0; c < dim; ++c) {
      Floats key[COLUMNS];
      UNROLL for (int i = 0; i < COLUMNS; ++i) key[i] = read(keys + c * BLOCK_TOKENS + at + i * LANES);
      UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int i = 0; i < COLUMNS; ++i) found[r][i] += query[r * dim + c] * key[i];
    }
    UNROLL for (int r = 0; r < R; ++r)
      UNROLL for (int i = 0; i < COLUMNS; ++i) store(scores + r * KEYS + at + i * LANES, found[r][i]);
  }
}

// Attention of all queries, not yet normalised, in `part`. Scratch: `block`, the keys or values of a block, and `scores`
// (count, KEYS).
template <class T>
inline void attend_paged(const PagedQueries& a, PartialSoftmax part, float* block, float* scores) {
  const Queries& q = a.rows;
  for (int m = 0; m < q.count; ++m) part.most[m] = -INFINITY, part.total[m] = 0;
  memset(part.values, 0, sizeof(float) * q.count * q.padded);
  const int64_t end = q.position + (q.count - 1) / q.shared + 1;  // after the last visible key
  const int64_t oldest = q.window ? std::max<int64_t>(0, q.position - q.window + 1) : 0;
  KeyChunk chunk = {};
  for (int64_t first = oldest / BLOCK_TOKENS * BLOCK_TOKENS; first < end; first += BLOCK_TOKENS) {
    const T* from = (const T*)a.cache + a.table[first / BLOCK_TOKENS] * a.block_stride;
    const int count = int(std::min<int64_t>(BLOCK_TOKENS, end - first));
    const float* keys = as_floats(from, int64_t(q.dim) * BLOCK_TOKENS, block);
    int m = 0;
    for (; m + 4 <= q.count; m += 4) block_scores<4>(q.data + m * q.dim, q.dim, keys, scores + m * KEYS);
    for (; m < q.count; ++m) block_scores<1>(q.data + m * q.dim, q.dim, keys, scores + m * KEYS);
    for (m = 0; m < q.count; ++m) {
      float* row = scores + m * KEYS;
      const float most = mask_scores(q, m, chunk, first, count, row);
      if (most == -INFINITY) {
        memset(row, 0, sizeof(float) * KEYS);
        continue;
      }
      if (most > part.most[m]) rescale(q, m, most, part);
      part.total[m] += exponentiate(row, count, part.most[m]);
    }
    const float* values = as_floats(from + int64_t(q.dim) * BLOCK_TOKENS, int64_t(count) * q.padded, block);
    for (m = 0; m + 4 <= q.count; m += 4)
      add_values<4>(scores + m * KEYS, values, count, q.padded, part.values + m * q.padded);
    for (; m < q.count; ++m) add_values<1>(scores + m * KEYS, values, count, q.padded, part.values + m * q.padded);
  }
}

// Stores a token's key and value, of `dim` channels, in a block.
template <class T>
inline void store_paged(T* block, int64_t slot, int64_t dim, int64_t padded, const float* key, const float* value) {
  for (int64_t c = 0; c < dim; ++c) write1(block + c * BLOCK_TOKENS + slot, key[c]);
  T* to = block + dim * BLOCK_TOKENS + slot * padded;
  for (int64_t c = 0; c < dim; ++c) write1(to + c, value[c]);
}

}  // namespace decode
