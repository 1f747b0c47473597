// A decode step of a transformer: a few new tokens through embedding, blocks and head, over KV caches. The architecture is
// described by ModelWeights; activations are float32 from the embedding to the logits.
//
// One parallel region runs the step. Its phases are dynamic parallel loops, each with a barrier: qkv | RoPE and cache |
// attention | out + residual | up with activation | down + residual; before a matrix with adapters, their A x. Cheap results
// that all threads need (norms of a few rows, inputs in the weights' format) are computed redundantly by each thread, in its
// own memory.
#pragma once

#include <algorithm>

#include "kv_cache.hpp"
#include "model.hpp"
#include "thread_team.hpp"

namespace decode {

constexpr int MAX_KEY_CHUNKS = 16;  // chunks that one row's keys are divided into at most
constexpr int64_t MAX_PREFETCH = 256 << 10;  // bytes prefetched at most, which must stay in L2 until they are read

class Run {
 public:
  Run(const ModelWeights& model, const DecodeStep& step, Arena& arena)
      : m(model), s(step), count(step.rows * step.tokens), layout(model) {
    h_stride = padded_stride(m.width), wide_stride = padded_stride(m.heads * m.head_dim);
    qkv = arena.take<float>(count * layout.size);
    x = arena.take<float>(count * m.width);
    y = arena.take<float>(count * m.width);
    inner = arena.take<float>(count * (inner_stride = padded_stride(m.mlp_width * (m.gated ? 2 : 1))));
    cos = arena.take<float>(count * m.rotary_dim);
    ranks = largest_rank(m);
    low = arena.take<float>(count * ranks);
    divide_keys();
    parts = arena.take<float>(s.rows * m.kv_heads * key_chunks * part_size);
    mine = arena.take<char>(s.threads * own_bytes());
  }

  ThreadTeam team;

  // Whether all token ids and positions are within their tables.
  bool in_range() const {
    for (int64_t t = 0; t < count; ++t) {
      if (s.ids[t] < 0 || s.ids[t] >= m.embed.outputs) return false;
      if (s.type_ids && (s.type_ids[t] < 0 || s.type_ids[t] >= m.embed.outputs)) return false;
      if (m.position_table && (position_of(t) < 0 || position_of(t) >= m.position_rows)) return false;
    }
    return true;
  }

  // One thread's share of the step; all threads of the region call it together.
  void run(int thread) {
    Arena arena(mine + thread * own_bytes());
    Own own(*this, thread, arena);
    own.next = first_weights(entry(0), thread);
    embed(own);
    const NormWeights none = {};
    for (int64_t i = 0; i < m.layers; ++i) {
      const LayerWeights& layer = m.blocks[i];
      norm_input(m.pre_norm ? layer.norm1 : i ? m.blocks[i - 1].norm2 : none, own);
      own.next = first_weights(layer.out, thread);
      linear(layer.qkv, layer.qkv_adapters, own.h, h_stride, qkv, layout.size, own);
      finish_tokens(layer, s.caches[i], own);
      s.cache_bf16 ? attend<uint16_t>(layer, s.caches[i], own) : attend<float>(layer, s.caches[i], own);
      gather_heads(own);
      own.next = first_weights(layer.up, thread, m.gated ? 2 : 1);
      residual(layer.out, layer.out_adapters, own.wide, wide_stride, own);
      norm_input(m.pre_norm ? layer.norm2 : layer.norm1, own);
      own.next = first_weights(layer.down, thread);
      m.gated ? mlp_gated_up(layer.up, layer.up_adapters, own) : mlp_up(layer.up, layer.up_adapters, own);
      own.next = first_weights(entry(i + 1), thread);
      residual(layer.down, layer.down_adapters, inner, inner_stride, own);
    }
    norm_input(m.pre_norm ? none : m.blocks[m.layers - 1].norm2, own);
    for (int64_t t = 0; t < count; ++t) {
      float* h = own.h + t * h_stride;
      normed(m.final_norm, m.bf16, h, m.width, h);
    }
    own.next = WeightPrefetch();
    logits(own);
  }

 private:
  // A thread's private memory: the sub-layer's input, the prepared inputs of a matrix, and attention's scratch.
  struct Own {
    Own(const Run& run, int number, Arena& arena) : thread(number) {
      const ModelWeights& m = run.m;
      h = arena.take<float>(run.count * run.h_stride);
      wide = arena.take<float>(run.count * run.wide_stride);
      const int64_t queries = run.queries();
      query = arena.take<float>(queries * run.padded());
      scores = arena.take<float>(queries * KEYS);
      block = arena.take<float>(KEYS * run.padded());
      const int64_t most = std::max(std::max(m.width, m.mlp_width), m.heads * m.head_dim);
      char* scratch = arena.take<char>(prepared_bytes(most, run.count));
      if (arena.base) prepared = prepared_in(scratch, most, run.count);
#if defined(__AMX_TILE__)
      inputs = arena.take<char>(matrices::AmxInputs::bytes(most, run.count));
      tiles = arena.take<char>(matrices::AmxScratch::BYTES);
#endif
    }
    const int thread;
    float *h, *wide, *query, *scores, *block;
    Prepared prepared;
#if defined(__AMX_TILE__)
    matrices::AmxInputs operands;
    char *inputs, *tiles;  // of `operands`; AmxScratch
#endif
    WeightPrefetch next;
  };

  int64_t own_bytes() const {
    Arena measure(nullptr);
    Own own(*this, 0, measure);
    return measure.used;
  }
  int64_t padded() const { return round_up(m.head_dim, 16); }
  int64_t queries() const { return s.tokens * (m.heads / m.kv_heads); }

  // Where rows x heads do not divide evenly among the threads, the keys are divided into chunks too.
  void divide_keys() {
    const int64_t tasks = s.rows * m.kv_heads, keys = s.past + s.tokens;
    key_chunks = 1;
    if (tasks % s.threads && tasks < 4 * s.threads)
      key_chunks = std::min<int64_t>({MAX_KEY_CHUNKS, (4 * s.threads + tasks - 1) / tasks, 1 + keys / (2 * KEYS)});
    part_size = queries() * (2 + padded());
  }

  // A phase: `work` for 0 .. n - 1. Threads at the barrier prefetch the weights of the next phase.
  template <class F>
  void phase(Own& own, int64_t n, F work) {
    team.parallel_for(own.thread, n, work, [&] { return own.next.step(); });
  }

  // Token, type and position embeddings; cos and sin for RoPE.
  void embed(Own& own) {
    phase(own, count, [&](int64_t t) {
      const int64_t position = position_of(t);
      embed_token(m, s.ids[t], s.type_ids ? s.type_ids[t] : -1, position, x + t * m.width);
      rope_angles(m, position, cos + t * m.rotary_dim);
    });
  }

  // The position of a token: as given, or the number of tokens before it that are not padding.
  int64_t position_of(int64_t t) const {
    const int64_t row = t / s.tokens, token = t % s.tokens;
    if (s.positions) return s.positions[row * s.position_stride + token];
    int64_t before = s.past + token;
    if (s.valid) {
      const uint8_t* valid = s.valid + row * s.valid_stride;
      int64_t count = 0;
      for (int64_t k = 0; k < before; ++k) count += valid[k] != 0;
      before = count;
    }
    return before + m.position_offset;
  }

  // The input of the next sub-layer.
  void norm_input(const NormWeights& norm, Own& own) {
    for (int64_t t = 0; t < count; ++t) normed(norm, m.bf16, x + t * m.width, m.width, own.h + t * h_stride);
  }

  // Calls `work(first, last)` for chunks of the outputs of W, or of the first of the matrices that W consists of. A thread that
  // has finished its chunks prefetches the next matrix.
  template <class F>
  void for_outputs(const Matrix& w, int64_t outputs, Own& own, F work) {
    const int64_t chunk = chunk_of(w, outputs, count, s.threads);
    phase(own, (outputs + chunk - 1) / chunk, [&](int64_t i) { work(i * chunk, std::min((i + 1) * chunk, outputs)); });
  }

  // The first matrix of a layer, or the head after the last layer.
  const Matrix& entry(int64_t layer) const { return layer < m.layers ? m.blocks[layer].qkv : m.head; }

  // Prefetch of the chunk of W that a thread reads first. `parts`: W is that many fused matrices, of which the first is read.
  WeightPrefetch first_weights(const Matrix& w, int thread, int parts = 1) const {
    const int64_t outputs = w.outputs / parts;
    const int64_t chunk = chunk_of(w, outputs, count, s.threads), first = std::min(thread * chunk, outputs);
    const int streams = read_plans.get(w.format, count).streams;
    return WeightPrefetch(w, first, std::min(first + chunk, outputs), streams, MAX_PREFETCH / streams);
  }

  // Prepares the inputs of W in its format, after low = A x of its adapters; threads at the barrier of the latter prefetch W
  // (`parts` as in `first_weights`).
  void inputs_of(const Matrix& w, const Adapters& adapters, const float* from, int64_t step, Own& own, int parts = 1) {
    if (adapters.count) {
      const WeightPrefetch later = own.next;
      own.next = first_weights(w, own.thread, parts);
      project(adapters, from, step, own);
      own.next = later;
    }
#if defined(__AMX_TILE__)
    if (by_tiles(w)) {
      own.operands.place(own.inputs, w, count, false);
      for (int64_t block = 0; block * LANES < count; ++block) own.operands.prepare(w, from, step, count, block);
      return;
    }
#endif
    prepare(w, from, step, count, own.prepared);
  }

  // Whether the product with W uses AMX: with fewer rows, tiles of registers are as fast.
  bool by_tiles([[maybe_unused]] const Matrix& w) const {
#if defined(__AMX_TILE__)
    return w.format == matrices::BF16 && count >= matrices::amx_rows(w);
#else
    return false;
#endif
  }

  // low (tokens, ranks) = A x of all adapters, concatenated.
  void project(const Adapters& adapters, const float* from, int64_t step, Own& own) {
    prepare(adapters.terms[0].a, from, step, count, own.prepared);
    const int64_t chunk = 8, most = (total_rank(adapters) + chunk - 1) / chunk + adapters.count;
    phase(own, most, [&](int64_t task) {
      int64_t column = 0;
      for (const LowRank* term = adapters.terms; term < adapters.terms + adapters.count; ++term) {
        const int64_t rank = term->a.outputs, chunks = (rank + chunk - 1) / chunk;
        if (task < chunks)
          return multiply(term->a, own.prepared, count, low + column, ranks, task * chunk,
                          std::min((task + 1) * chunk, rank));
        task -= chunks, column += rank;
      }
    });
  }

  // y = W x + adapters for the outputs [first, last), after `inputs_of`.
  void product(const Matrix& w, const Adapters& adapters, float* y, int64_t y_stride, int64_t first, int64_t last,
               Own& own) {
#if defined(__AMX_TILE__)
    if (by_tiles(w)) {
      const matrices::AmxScratch scratch(own.tiles);
      const int64_t ld = round_up(count, LANES) + LANES;
      const int64_t part = matrices::AMX_SUMS / ld / 32 * 32;  // outputs whose sums fit the scratch
      for (int64_t o = first; o < last; o += part) {
        const int64_t outputs = std::min(part, last - o);
        matrices::amx_sums(w, o, outputs, own.operands, 0, (count + LANES - 1) / LANES, scratch, ld, w.outputs);
        matrices::amx_store(w, o, outputs, scratch.sums, ld, count, y, y_stride);
      }
      return add_low_rank(adapters, low, ranks, count, y, y_stride, first, last);
    }
#endif
    multiply(w, own.prepared, count, y, y_stride, first, last);
    add_low_rank(adapters, low, ranks, count, y, y_stride, first, last);
  }

  void linear(const Matrix& w, const Adapters& adapters, const float* from, int64_t step, float* to, int64_t to_stride,
              Own& own) {
    inputs_of(w, adapters, from, step, own);
    for_outputs(w, w.outputs, own, [&](int64_t first, int64_t last) {
      product(w, adapters, to, to_stride, first, last, own);
    });
  }

  // x = state before the sub-layer + its output.
  void residual(const Matrix& w, const Adapters& adapters, const float* from, int64_t step, Own& own) {
    inputs_of(w, adapters, from, step, own);
    const float* before = m.pre_norm ? x : own.h;
    const int64_t before_stride = m.pre_norm ? m.width : h_stride;
    for_outputs(w, m.width, own, [&](int64_t first, int64_t last) {
      product(w, adapters, y, m.width, first, last, own);
      for (int64_t t = 0; t < count; ++t)
        for (int64_t i = first; i < last; ++i) x[t * m.width + i] = before[t * before_stride + i] + y[t * m.width + i];
    });
  }

  void mlp_up(const Matrix& w, const Adapters& adapters, Own& own) {
    inputs_of(w, adapters, own.h, h_stride, own);
    for_outputs(w, m.mlp_width, own, [&](int64_t first, int64_t last) {
      product(w, adapters, inner, inner_stride, first, last, own);
      for (int64_t t = 0; t < count; ++t) activate(m.activation, inner + t * inner_stride + first, last - first);
    });
  }

  void mlp_gated_up(const Matrix& w, const Adapters& adapters, Own& own) {
    inputs_of(w, adapters, own.h, h_stride, own, 2);
    for_outputs(w, m.mlp_width, own, [&](int64_t first, int64_t last) {
      product(w, adapters, inner, inner_stride, first, last, own);
      product(w, adapters, inner, inner_stride, m.mlp_width + first, m.mlp_width + last, own);
      for (int64_t t = 0; t < count; ++t) {
        float *gates = inner + t * inner_stride, *ups = gates + m.mlp_width;
        activate(m.activation, gates + first, last - first);
        for (int64_t i = first; i < last; ++i) gates[i] *= ups[i];
      }
    });
  }

  void logits(Own& own) {
    inputs_of(m.head, m.head_adapters, own.h, h_stride, own);
    for_outputs(m.head, m.head.outputs, own, [&](int64_t first, int64_t last) {
      product(m.head, m.head_adapters, s.logits, m.head.outputs, first, last, own);
      for (int64_t t = 0; t < count; ++t)
        if (m.logit_scale != 1 || m.logit_softcap != 0)
          each(s.logits + t * m.head.outputs + first, last - first, [&](Floats v) {
            v *= m.logit_scale;
            return m.logit_softcap != 0 ? m.logit_softcap * tanh(v / m.logit_softcap) : v;
          });
    });
  }

  // Finishes queries and keys, and stores keys and values in the cache.
  void finish_tokens(const LayerWeights& layer, const LayerCache& cache, Own& own) {
    phase(own, count, [&](int64_t t) {
      float* row = qkv + t * layout.size;
      finish_qkv(m, layer, layout, row, cos + t * m.rotary_dim, own.wide);
      s.cache_bf16 ? store_kv<uint16_t>(cache, t, row) : store_kv<float>(cache, t, row);
    });
  }

  template <class T>
  void store_kv(const LayerCache& cache, int64_t t, const float* qkv_row) const {
    const int64_t row = t / s.tokens, index = cache.index + t % s.tokens;
    for (int64_t g = 0; g < m.kv_heads; ++g) {
      const float *keys = qkv_row + layout.keys + g * layout.stride, *values = qkv_row + layout.values + g * layout.stride;
      const int64_t *k = cache.key_strides, *v = cache.value_strides;
      T* key = (T*)cache.keys + row * k[0] + g * k[1] + index * k[2];
      T* value = (T*)cache.values + row * v[0] + g * v[1] + index * v[2];
      for (int64_t c = 0; c < m.head_dim; ++c) write1(key + c, keys[c]), write1(value + c, values[c]);
    }
  }

  template <class T>
  void attend(const LayerWeights& layer, const LayerCache& cache, Own& own) {
    const int64_t shared = m.heads / m.kv_heads, total = s.past + s.tokens, dropped = s.past - cache.index;
    const int64_t oldest = std::max(dropped, layer.window ? s.past - layer.window + 1 : 0);
    const int64_t each = round_up((total - oldest + key_chunks - 1) / key_chunks, KEYS);
    phase(own, s.rows * m.kv_heads * key_chunks, [&](int64_t task) {
      const int64_t row = task / key_chunks / m.kv_heads, g = task / key_chunks % m.kv_heads;
      const int64_t first = oldest + task % key_chunks * each;
      for (int64_t i = 0; i < queries(); ++i) {
        const float* from = qkv + (row * s.tokens + i / shared) * layout.size + (g * shared + i % shared) * layout.stride;
        for (int64_t c = 0; c < padded(); ++c) own.query[i * padded() + c] = c < m.head_dim ? from[c] * m.scale : 0;
      }
      const int64_t *k = cache.key_strides, *v = cache.value_strides;
      KeyChunk chunk = {(const T*)cache.keys + row * k[0] + g * k[1] - dropped * k[2],
                        (const T*)cache.values + row * v[0] + g * v[1] - dropped * v[2],
                        k[2],
                        v[2],
                        first,
                        std::min(first + each, total),
                        s.valid ? s.valid + row * s.valid_stride : nullptr};
      Queries q = {own.query, int(queries()), int(shared), int(m.head_dim), int(padded()), s.past, layer.window,
                   m.alibi_slopes ? m.alibi_slopes + g * shared : nullptr, m.softcap};
      attend_chunk<T>(q, chunk, part(task), own.block, own.scores);
    });
  }

  PartialSoftmax part(int64_t task) const {
    float* at = parts + task * part_size;
    return {at, at + queries(), at + 2 * queries()};
  }

  // Concatenates the outputs of all heads, in this thread's memory.
  void gather_heads(Own& own) const {
    const int64_t shared = m.heads / m.kv_heads;
    for (int64_t row = 0; row < s.rows; ++row)
      for (int64_t g = 0; g < m.kv_heads; ++g)
        for (int64_t i = 0; i < queries(); ++i)
          combine(part((row * m.kv_heads + g) * key_chunks), part_size, int(key_chunks), int(i), int(m.head_dim),
                  int(padded()),
                  own.wide + (row * s.tokens + i / shared) * wide_stride + (g * shared + i % shared) * m.head_dim);
  }

  const ModelWeights& m;
  const DecodeStep& s;
  const int64_t count;  // tokens of all rows
  const HeadLayout layout;
  int64_t h_stride, wide_stride, inner_stride, key_chunks, part_size;
  int64_t ranks;  // the largest total rank of a matrix's adapters
  float *qkv, *x, *y, *inner, *cos, *parts, *low;
  char* mine;
};

// As `run_in_scratch`.
inline int64_t step(const ModelWeights& model, const DecodeStep& step) {
  return run_in_scratch<Run>(model, step);
}

}  // namespace decode
