// The structures that describe a model and a decode step, and helpers of the step: scratch memory, norms, embedding lookup.
#pragma once

#include <math.h>

#include <algorithm>

#include "vector_math.hpp"
#include "matrix.hpp"

namespace decode {

// A norm's weights, in the model's dtype (float32 or bfloat16).
struct NormWeights {
  const void *weight, *bias;  // bias may be null
  float eps;
  int32_t kind;  // 0: none; 1: layer norm; 2: RMS norm
};

// A low-rank adapter (LoRA, arXiv:2106.09685) of a range of a matrix's outputs: y[first + o] += scale * (B A x)[o].
struct LowRank {
  Matrix a, b;  // (rank, inputs) and (outputs, rank), F32 or BF16, without biases
  int64_t first;
  float scale;
  int32_t reserved;
};

// The adapters of one matrix; all `a` have the same format.
struct Adapters {
  const LowRank* terms;
  int64_t count;
};

struct LayerWeights {
  Matrix qkv, out, up, down;  // qkv: [q|k|v] (but see qkv_by_head); up: [gate|up] where gated
  Adapters qkv_adapters, out_adapters, up_adapters, down_adapters;
  NormWeights norm1, norm2, q_norm, k_norm;
  InputRounding qkv_inputs, out_inputs, up_inputs, down_inputs;  // for packed_forward.hpp
  int64_t window;  // keys that a query attends to; 0: all
};

struct ModelWeights {
  const LayerWeights* blocks;
  Matrix embed, head;
  Adapters head_adapters;
  const void* position_table;        // learned positions (position_rows, width), or null
  const float* inverse_frequencies;  // of RoPE (rotary_dim / 2,), or null
  const float* alibi_slopes;         // (heads,) or null
  NormWeights embed_norm, final_norm;
  int64_t layers, width, heads, kv_heads, head_dim, mlp_width;
  int64_t position_rows, position_offset;     // position_offset: the table's row for the first token
  int32_t activation, gated, pre_norm;        // pre_norm: norms come before sub-layers, else after them
  int32_t qk_norm_by_head, bf16, rotary_dim;  // rotary_dim: channels of a head that RoPE rotates
  int32_t qkv_by_head;  // 0: rows of qkv are [q|k|v]; 1: (heads, 3, head_dim), where heads = kv_heads
  float scale, clip, softcap, rotary_scale, logit_scale, logit_softcap;  // clip and softcaps: 0 if not used
};

// A layer's KV cache: buffers with strides (batch, head, token) in elements; new tokens are stored from `index` on.
struct LayerCache {
  void *keys, *values;
  int64_t key_strides[3], value_strides[3];
  int64_t index;
};

struct DecodeStep {
  const LayerCache* caches;
  const int64_t *ids, *type_ids;  // (rows, tokens); type_ids: ids whose embeddings are added, or null
  const int64_t* positions;       // (rows or 1, tokens), or null: computed from `valid`
  const uint8_t* valid;           // (rows, past + tokens), 0 for padding; or null
  float* logits;                  // (rows, tokens, vocabulary)
  void* scratch;
  int64_t scratch_bytes, rows, tokens, past, position_stride, valid_stride;
  int32_t threads, cache_bf16;
};

// A bump allocator for a step's scratch; with a null base it only measures the size.
class Arena {
 public:
  explicit Arena(void* memory) : base((char*)memory) {}
  template <class T>
  T* take(int64_t count) {
    T* start = (T*)(base + used);
    used += round_up(count * sizeof(T), 64);
    return start;
  }
  char* base;
  int64_t used = 0;
};

// A padded row stride, in elements: with a power of two all rows would map to the same few sets of L1.
constexpr int64_t padded_stride(int64_t width) { return round_up(width, 16) + 16; }

template <class F>
INLINE void typed(int32_t bf16, const void* data, F f) {
  bf16 ? f((const uint16_t*)data) : f((const float*)data);
}

template <class W>
INLINE void scaled(const float* x, int64_t width, const W* weight, float shift, float factor, float* y) {
  for (int64_t i = 0; i < width; ++i) y[i] = (x[i] - shift) * factor * read1(weight + i);
}

// y = norm(x); may be in place.
inline void normed(const NormWeights& n, int32_t bf16, const float* x, int64_t width, float* y) {
  if (!n.kind) {
    if (x != y) memcpy(y, x, width * sizeof(float));
    return;
  }
  float mean = 0, square = 0;
  if (n.kind == 1) {
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < width; ++i) mean += x[i];
    mean /= width;
  }
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < width; ++i) square += (x[i] - mean) * (x[i] - mean);
  const float factor = 1 / sqrtf(square / width + n.eps);
  typed(bf16, n.weight, [&](auto* weight) { scaled(x, width, weight, mean, factor, y); });
  if (n.bias)
    typed(bf16, n.bias, [&](auto* bias) {
      for (int64_t i = 0; i < width; ++i) y[i] += read1(bias + i);
    });
}

// The sum of the ranks of the adapters.
inline int64_t total_rank(const Adapters& adapters) {
  int64_t rank = 0;
  for (int64_t i = 0; i < adapters.count; ++i) rank += adapters.terms[i].a.outputs;
  return rank;
}

template <class W>
INLINE float dot(const W* weight, const float* x, int64_t n) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += read1(weight + i) * x[i];
  return total;
}

// y += row `index` of a matrix in any format (embedding lookup).
inline void add_row(const Matrix& m, int64_t index, float* y) {
  const int64_t n = m.inputs;
  if (m.format == F32 || m.format == BF16) {
    typed(m.format == BF16, m.data, [&](auto* table) {
      for (int64_t i = 0; i < n; ++i) y[i] += read1(table + index * n + i);
    });
    return;
  }
  if (m.format == LOSSLESS) {
    const LosslessRow row(m, index);
    for (int64_t k = 0; k < n; k += RUN) {
      uint16_t run[RUN];
      row.decompress(k, run);
      for (int64_t i = k; i < n && i < k + RUN; ++i) y[i] += from_bf16(run[i - k]);
    }
    return row.outliers([&](int column, uint16_t value) { y[column] += from_bf16(value); });
  }
  const uint8_t* codes = (const uint8_t*)m.data + index * row_bytes(m);
  const matrices::RowScales stored(m, index);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t group = i / m.group;
    const int code = m.format == INT8 ? codes[i] : codes[i / RUN * BLOCK + i % BLOCK] >> (i % RUN / BLOCK * 4) & 15;
    const float scale = stored.scale(group);
    y[i] += stored.has_lows() ? scale * code + stored.low(group, scale) : scale * (code - stored.zero(group));
  }
}

// The largest total rank of a matrix's adapters.
inline int64_t largest_rank(const ModelWeights& m) {
  int64_t rank = total_rank(m.head_adapters);
  for (int64_t i = 0; i < m.layers; ++i)
    for (const Adapters* adapters : {&m.blocks[i].qkv_adapters, &m.blocks[i].out_adapters, &m.blocks[i].up_adapters,
                                     &m.blocks[i].down_adapters})
      rank = std::max(rank, total_rank(*adapters));
  return rank;
}

// y += scale * B low for the outputs [first, last) of a matrix; `y` points to output 0, and `low` (rows, ranks) holds A x of
// all adapters, concatenated.
inline void add_low_rank(const Adapters& adapters, const float* low, int64_t ranks, int64_t rows, float* y, int64_t y_stride,
                         int64_t first, int64_t last) {
  for (const LowRank* term = adapters.terms; term < adapters.terms + adapters.count; ++term) {
    const int64_t rank = term->a.outputs, from = std::max(first, term->first);
    const int64_t to = std::min(last, term->first + term->b.outputs);
    typed(term->b.format == matrices::BF16, term->b.data, [&](auto* weight) {
      for (int64_t o = from; o < to; ++o)
        for (int64_t t = 0; t < rows; ++t)
          y[t * y_stride + o] += term->scale * dot(weight + (o - term->first) * rank, low + t * ranks, rank);
    });
    low += rank;
  }
}

// Runs a call by a class `Run`, whose threads are its `team`. Returns 0 after it; else it was not run: -1 if a number is
// outside of its table (`in_range`), or the bytes of scratch that it needs.
template <class Run, class Call>
int64_t run_in_scratch(const ModelWeights& model, const Call& call) {
  Arena measure(nullptr);
  const Run measured(model, call, measure);
  if (measure.used + 64 > call.scratch_bytes) return measure.used + 64;
  if (!measured.in_range()) return -1;
  Arena arena((void*)round_up((int64_t)call.scratch, 64));
  Run run(model, call, arena);
  run.team.run(call.threads, [&](int thread) { run.run(thread); });
  return 0;
}

// How the queries, keys and values of a token lie in its row of qkv.
struct HeadLayout {
  explicit HeadLayout(const ModelWeights& m)
      : size((m.heads + 2 * m.kv_heads) * m.head_dim),
        stride(m.qkv_by_head ? 3 * m.head_dim : m.head_dim),
        keys(m.qkv_by_head ? m.head_dim : m.heads * m.head_dim),
        values(m.qkv_by_head ? 2 * m.head_dim : (m.heads + m.kv_heads) * m.head_dim) {}
  const int64_t size, stride;  // of the row, and from one head to the next
  const int64_t keys, values;  // offsets of the first head's key and value
};

// cos and sin of RoPE for a position: (2, rotary_dim / 2).
inline void rope_angles(const ModelWeights& m, int64_t position, float* to) {
  const int32_t half = m.rotary_dim / 2;
  for (int32_t c = 0; c < half; ++c) {
    const float angle = float(position) * m.inverse_frequencies[c];
    to[c] = cosf(angle) * m.rotary_scale;
    to[half + c] = sinf(angle) * m.rotary_scale;
  }
}

inline void apply_rope(const ModelWeights& m, float* head, const float* angles) {
  const int32_t half = m.rotary_dim / 2;
  for (int32_t c = 0; c < half; ++c) {
    const float a = head[c], b = head[c + half];
    head[c] = a * angles[c] - b * angles[half + c];
    head[c + half] = b * angles[c] + a * angles[half + c];
  }
}

// One norm over all heads, which may not be adjacent; `together` is scratch for all of them.
inline void norm_together(const ModelWeights& m, const NormWeights& norm, float* first, int64_t stride, int64_t heads,
                          float* together) {
  const int64_t dim = m.head_dim;
  if (stride == dim) return normed(norm, m.bf16, first, heads * dim, first);
  for (int64_t h = 0; h < heads; ++h) memcpy(together + h * dim, first + h * stride, dim * sizeof(float));
  normed(norm, m.bf16, together, heads * dim, together);
  for (int64_t h = 0; h < heads; ++h) memcpy(first + h * stride, together + h * dim, dim * sizeof(float));
}

// Queries or keys of a token: norm (per head or over all heads), then RoPE.
inline void finish_heads(const ModelWeights& m, const NormWeights& norm, float* first, int64_t stride, int64_t heads,
                         const float* angles, float* together) {
  if (norm.kind && !m.qk_norm_by_head) norm_together(m, norm, first, stride, heads, together);
  for (int64_t h = 0; h < heads; ++h) {
    float* head = first + h * stride;
    if (m.qk_norm_by_head) normed(norm, m.bf16, head, m.head_dim, head);
    apply_rope(m, head, angles);
  }
}

// Clips, norms and rotates the queries and keys of a token's row of qkv.
inline void finish_qkv(const ModelWeights& m, const LayerWeights& layer, const HeadLayout& layout, float* row,
                       const float* angles, float* together) {
  for (int64_t i = 0; m.clip != 0 && i < layout.size; ++i) row[i] = std::min(std::max(row[i], -m.clip), m.clip);
  finish_heads(m, layer.q_norm, row, layout.stride, m.heads, angles, together);
  finish_heads(m, layer.k_norm, row + layout.keys, layout.stride, m.kv_heads, angles, together);
}

// The embedding of a token: its id, type id (if not negative) and position; normed.
inline void embed_token(const ModelWeights& m, int64_t id, int64_t type, int64_t position, float* to) {
  memset(to, 0, m.width * sizeof(float));
  add_row(m.embed, id, to);
  if (type >= 0) add_row(m.embed, type, to);
  if (m.position_table)
    typed(m.bf16, m.position_table, [&](auto* table) {
      for (int64_t i = 0; i < m.width; ++i) to[i] += read1(table + position * m.width + i);
    });
  normed(m.embed_norm, m.bf16, to, m.width, to);
}

}  // namespace decode
