// One step of an engine: the next tokens of any number of sequences through the model, over a paged KV cache. A sequence
// may have one token (decoding) or many (a chunk of its prompt). A token's results have the same bits whatever the other
// tokens of the step are and however the sequence is divided into steps: products and attention add in an order that
// depends on the model alone.
//
// One parallel region runs the step. Its phases are dynamic parallel loops, each with a barrier, as in packed_forward.hpp.
#pragma once

#include <algorithm>

#include "model.hpp"
#include "paged_attention.hpp"
#include "thread_team.hpp"

namespace paged {

using namespace decode;

constexpr int64_t QUERY_ROWS = 32;     // queries of an attention task, which share converted keys and values

struct PagedStep {
  const int64_t *ids, *positions;  // (tokens,)
  const int64_t* starts;           // (sequences + 1,): the first token of each sequence, and the end
  const int64_t* past;             // (sequences,): tokens of the sequence in the cache
  const int32_t* tables;           // (sequences, table_stride): blocks of the cache
  const int64_t* wanted;           // (outputs,): tokens whose logits are computed
  const float* embeds;             // (any, width): embeddings that replace those of tokens, or null
  const int64_t* embed_rows;       // (tokens,): a row of `embeds`, or -1
  void* cache;                     // (layers, blocks, kv_heads, block_size) elements
  float* logits;                   // (outputs, vocabulary)
  void* scratch;
  int64_t scratch_bytes, sequences, outputs, table_stride, blocks;
  int32_t threads, cache_bf16;
};

// Elements of a block of one head and layer.
inline int64_t block_size(const ModelWeights& m) {
  return (m.head_dim + round_up(m.head_dim, 16)) * BLOCK_TOKENS;
}

class PagedRun {
 public:
  PagedRun(const ModelWeights& model, const PagedStep& step, Arena& arena)
      : m(model),
        s(step),
        count(step.starts[step.sequences]),
        layout(model),
        inner_width(m.heads * m.head_dim),
        padded(round_up(m.head_dim, 16)) {
    wide_stride = padded_stride(m.mlp_width * (m.gated ? 2 : 1)), h_stride = padded_stride(m.width);
    heads_stride = padded_stride(inner_width);
    x = arena.take<float>(count * m.width);
    h = arena.take<float>(count * h_stride);
    y = arena.take<float>(count * m.width);
    qkv = arena.take<float>(count * layout.size);
    attended = arena.take<float>(count * heads_stride);
    inner = arena.take<float>(count * wide_stride);
    angles = arena.take<float>(count * m.rotary_dim);
    most_inputs = std::max(std::max(m.width, m.mlp_width), inner_width);
    int64_t bytes = prepared_bytes(most_inputs, count);
#if defined(__AMX_TILE__)
    bytes = std::max(bytes, matrices::AmxInputs::bytes(most_inputs, count));
#endif
    inputs = arena.take<char>(bytes);
    ranks = largest_rank(m);
    low = arena.take<float>(count * ranks);
    own = arena.take<char>(s.threads * own_bytes());
  }

  ThreadTeam team;

  // Whether all token ids and positions are within their tables.
  bool in_range() const {
    for (int64_t t = 0; t < count; ++t) {
      if (s.ids[t] < 0 || s.ids[t] >= m.embed.outputs) return false;
      if (m.position_table && (s.positions[t] < 0 || s.positions[t] >= m.position_rows)) return false;
    }
    for (int64_t i = 0; i < s.sequences; ++i)
      for (int64_t t = 0; t < s.past[i] + s.starts[i + 1] - s.starts[i]; t += BLOCK_TOKENS)
        if (const int32_t block = s.tables[i * s.table_stride + t / BLOCK_TOKENS]; block < 0 || block >= s.blocks) return false;
    return true;
  }

  // One thread's share of the step; all threads of the region call it together.
  void run(int thread) {
    Arena arena(own + thread * own_bytes());
    Own mine(*this, thread, arena);
    mine.prepared = prepared_in(inputs, most_inputs, count);
    phase(mine, count, [&](int64_t t) { embed(t); });
    for (int64_t i = 0; i < m.layers; ++i) {
      const LayerWeights& layer = m.blocks[i];
      // Without norms before them, the sub-layers read h, which holds the state.
      product(layer.qkv, layer.qkv_adapters, m.pre_norm ? layer.norm1 : NormWeights(), qkv, layout.size, mine);
      phase(mine, count, [&](int64_t t) { finish_token(layer, i, t, mine); });
      s.cache_bf16 ? attend<uint16_t>(layer, i, mine) : attend<float>(layer, i, mine);
      add(layer.out, layer.out_adapters, attended, heads_stride, m.pre_norm ? NormWeights() : layer.norm1, mine);
      up(layer, m.pre_norm ? layer.norm2 : NormWeights(), mine);
      add(layer.down, layer.down_adapters, inner, wide_stride, m.pre_norm ? NormWeights() : layer.norm2, mine);
    }
    phase(mine, s.outputs, [&](int64_t i) {
      normed(m.final_norm, m.bf16, x + s.wanted[i] * m.width, m.width, h + i * h_stride);
    });
    head(mine);
  }

 private:
  // A thread's private memory.
  struct Own {
    Own(const PagedRun& run, int number, Arena& arena) : thread(number) {
      const int64_t rows = run.query_rows();
      query = arena.take<float>(rows * run.m.head_dim);
      scores = arena.take<float>(rows * KEYS);
      values = arena.take<float>(rows * (run.padded + 2));
      block = arena.take<float>(BLOCK_TOKENS * run.padded);
      together = arena.take<float>(run.inner_width);
      panel = arena.take<char>(matrices::row_scratch_bytes(run.most_inputs));
#if defined(__AMX_TILE__)
      tiles = arena.take<char>(matrices::AmxScratch::BYTES);
#endif
    }
    const int thread;
    float *query, *scores, *values, *block, *together;
    char* panel;  // of multiply_rows
    Prepared prepared;
#if defined(__AMX_TILE__)
    matrices::AmxInputs operands;
    char* tiles;  // AmxScratch
#endif
  };

  int64_t own_bytes() const {
    Arena measure(nullptr);
    Own mine(*this, 0, measure);
    return measure.used;
  }

  int64_t shared() const { return m.heads / m.kv_heads; }
  int64_t query_tokens() const { return std::max<int64_t>(1, QUERY_ROWS / shared()); }
  int64_t query_rows() const { return query_tokens() * shared(); }

  template <class F>
  void phase(Own& mine, int64_t n, F work) {
    team.parallel_for(mine.thread, n, work, [] { return false; });
  }

  void embed(int64_t t) {
    float* to = x + t * m.width;
    if (s.embeds && s.embed_rows[t] >= 0) {
      memcpy(to, s.embeds + s.embed_rows[t] * m.width, m.width * sizeof(float));
      normed(m.embed_norm, m.bf16, to, m.width, to);
    } else {
      embed_token(m, s.ids[t], -1, s.positions[t], to);
    }
    rope_angles(m, s.positions[t], angles + t * m.rotary_dim);
  }

  // Converts rows of inputs for W, after `before` has written each, and computes low = A x of the adapters.
  template <class F>
  void inputs_of(const Matrix& w, const Adapters& adapters, const float* from, int64_t step, int64_t rows, Own& mine, F before) {
    place_rows(w, from, step, mine.prepared);
    Prepared& p = mine.prepared;
    phase(mine, rows, [&](int64_t t) {
      before(t);
      if (!by_tiles(w)) prepare_row(w, from, step, t, p);
      float* to = low + t * ranks;
      for (const LowRank* term = adapters.terms; term < adapters.terms + adapters.count; ++term)
        typed(term->a.format == matrices::BF16, term->a.data, [&](auto* weight) {
          for (int64_t r = 0; r < term->a.outputs; ++r)
            *to++ = dot(weight + r * term->a.inputs, from + t * step, term->a.inputs);
        });
    });
#if defined(__AMX_TILE__)
    if (!by_tiles(w)) return;
    mine.operands.place(inputs, w, rows, false);
    phase(mine, (rows + LANES - 1) / LANES, [&](int64_t block) { mine.operands.prepare(w, from, step, rows, block); });
#endif
  }

  // Whether products with W use AMX, for any number of rows: their sums have an order of their own.
  static bool by_tiles([[maybe_unused]] const Matrix& w) {
#if defined(__AMX_TILE__)
    return w.format == matrices::BF16;
#else
    return false;
#endif
  }

  // to = W x + adapters; calls `work(row, end, first, last)` for parts of the rows and outputs when they are computed.
  template <class F>
  void multiply(const Matrix& w, const Adapters& adapters, int64_t rows, float* to, int64_t to_stride, Own& mine, F work) {
    const auto finish = [&](int64_t row, int64_t end, int64_t first, int64_t last) {
      add_low_rank(adapters, low + row * ranks, ranks, end - row, to + row * to_stride, to_stride, first, last);
      work(row, end, first, last);
    };
#if defined(__AMX_TILE__)
    if (by_tiles(w)) {
      const matrices::AmxTasks tasks(w, rows, s.threads);
      const matrices::AmxScratch scratch(mine.tiles);
      return phase(mine, tasks.count(), [&](int64_t index) {
        const auto [row, end, first, last] = tasks.multiply(index, mine.operands, scratch);
        matrices::amx_store(w, first, last - first, scratch.sums, tasks.ld, end - row, to + row * to_stride, to_stride);
        finish(row, end, first, last);
      });
    }
#endif
    // Long parts of the outputs for few rows, for the hardware prefetcher.
    const int64_t chunk = rows > FEW ? matrices::ROW_CHUNK : chunk_of(w, w.outputs, rows, s.threads);
    phase(mine, (w.outputs + chunk - 1) / chunk, [&](int64_t i) {
      const int64_t first = i * chunk, last = std::min(first + chunk, w.outputs);
      multiply_rows(w, mine.prepared, rows, to, to_stride, first, last, mine.panel,
                    matrices::row_prefetch(w, (i + s.threads) * chunk, rows > FEW ? chunk : 0));
      finish(0, rows, first, last);
    });
  }

  // to = W norm(x).
  void product(const Matrix& w, const Adapters& adapters, const NormWeights& norm, float* to, int64_t to_stride, Own& mine) {
    inputs_of(w, adapters, h, h_stride, count, mine,
              [&](int64_t t) { normed(norm, m.bf16, x + t * m.width, m.width, h + t * h_stride); });
    multiply(w, adapters, count, to, to_stride, mine, [](int64_t, int64_t, int64_t, int64_t) {});
  }

  // x = norm(x + W in).
  void add(const Matrix& w, const Adapters& adapters, const float* in, int64_t step, const NormWeights& norm, Own& mine) {
    inputs_of(w, adapters, in, step, count, mine, [](int64_t) {});
    multiply(w, adapters, count, y, m.width, mine, [&](int64_t row, int64_t end, int64_t first, int64_t last) {
      for (int64_t t = row; t < end; ++t)
        for (int64_t i = first; i < last; ++i) x[t * m.width + i] += y[t * m.width + i];
    });
    if (norm.kind)
      phase(mine, count, [&](int64_t t) { normed(norm, m.bf16, x + t * m.width, m.width, x + t * m.width); });
  }

  // inner = act(W norm(x)), or act(gate) * up.
  void up(const LayerWeights& layer, const NormWeights& norm, Own& mine) {
    product(layer.up, layer.up_adapters, norm, inner, wide_stride, mine);
    phase(mine, count, [&](int64_t t) {
      float *gates = inner + t * wide_stride, *ups = gates + m.mlp_width;
      activate(m.activation, gates, m.mlp_width);
      for (int64_t i = 0; m.gated && i < m.mlp_width; ++i) gates[i] *= ups[i];
    });
  }

  void head(Own& mine) {
    inputs_of(m.head, m.head_adapters, h, h_stride, s.outputs, mine, [](int64_t) {});
    const int64_t vocabulary = m.head.outputs;
    const auto finish = [&](int64_t row, int64_t end, int64_t first, int64_t last) {
      for (int64_t t = row; t < end; ++t)
        if (m.logit_scale != 1 || m.logit_softcap != 0)
          each(s.logits + t * vocabulary + first, last - first, [&](Floats v) {
            v *= m.logit_scale;
            return m.logit_softcap != 0 ? m.logit_softcap * tanh(v / m.logit_softcap) : v;
          });
    };
    multiply(m.head, m.head_adapters, s.outputs, s.logits, vocabulary, mine, finish);
  }

  // ------------------------------------------------------------------ the cache

  // The first block of a head of a layer; the next block is kv_heads * block_size elements further.
  template <class T>
  T* head_cache(int64_t layer, int64_t head) const {
    return (T*)s.cache + (layer * s.blocks * m.kv_heads + head) * block_size(m);
  }

  int64_t sequence_of(int64_t t) const { return std::upper_bound(s.starts, s.starts + s.sequences, t) - s.starts - 1; }

  // Finishes queries and keys of a token, and stores its key and value.
  void finish_token(const LayerWeights& layer, int64_t index, int64_t t, Own& mine) {
    float* row = qkv + t * layout.size;
    finish_qkv(m, layer, layout, row, angles + t * m.rotary_dim, mine.together);
    const int64_t sequence = sequence_of(t), at = s.past[sequence] + t - s.starts[sequence];
    const int64_t block = s.tables[sequence * s.table_stride + at / BLOCK_TOKENS];
    for (int64_t g = 0; g < m.kv_heads; ++g) {
      const float *key = row + layout.keys + g * layout.stride, *value = row + layout.values + g * layout.stride;
      const int64_t offset = block * m.kv_heads * block_size(m);
      if (s.cache_bf16)
        store_paged(head_cache<uint16_t>(index, g) + offset, at % BLOCK_TOKENS, m.head_dim, padded, key, value);
      else
        store_paged(head_cache<float>(index, g) + offset, at % BLOCK_TOKENS, m.head_dim, padded, key, value);
    }
  }

  template <class T>
  void attend(const LayerWeights& layer, int64_t index, Own& mine) {
    SequenceTasks tasks(s.starts, 0, s.sequences, m.kv_heads, query_tokens());
    phase(mine, tasks.count(), [&](int64_t task) {
      const auto [sequence, group, begin, end] = tasks.at(task);
      attend_tokens<T>(layer, index, sequence, group, begin, end - begin, mine);
    });
  }

  template <class T>
  void attend_tokens(const LayerWeights& layer, int64_t index, int64_t sequence, int64_t g, int64_t begin, int64_t tokens,
                     Own& mine) {
    const int64_t first = s.starts[sequence] + begin, rows = tokens * shared(), dim = m.head_dim;
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = qkv + (first + i / shared()) * layout.size + (g * shared() + i % shared()) * layout.stride;
      for (int64_t c = 0; c < dim; ++c) mine.query[i * dim + c] = from[c] * m.scale;
    }
    PagedQueries queries = {
        {mine.query, int(rows), int(shared()), int(dim), int(padded), s.past[sequence] + begin, layer.window,
         m.alibi_slopes ? m.alibi_slopes + g * shared() : nullptr, m.softcap},
        s.tables + sequence * s.table_stride, head_cache<T>(index, g), m.kv_heads * block_size(m)};
    PartialSoftmax part = {mine.values, mine.values + rows, mine.values + 2 * rows};
    attend_paged<T>(queries, part, mine.block, mine.scores);
    for (int64_t i = 0; i < rows; ++i) {
      float* to = attended + (first + i / shared()) * heads_stride + (g * shared() + i % shared()) * dim;
      const float factor = 1 / part.total[i];
      for (int64_t c = 0; c < dim; ++c) to[c] = part.values[i * padded + c] * factor;
    }
  }

  const ModelWeights& m;
  const PagedStep& s;
  const int64_t count;  // tokens
  const HeadLayout layout;
  const int64_t inner_width, padded;  // of all heads; of a head in the cache
  int64_t wide_stride, h_stride, heads_stride, most_inputs, ranks;
  float *x, *h, *y, *qkv, *attended, *inner, *angles, *low;
  char *inputs, *own;
};

// As `run_in_scratch`.
inline int64_t step(const ModelWeights& model, const PagedStep& step) {
  return run_in_scratch<PagedRun>(model, step);
}

}  // namespace paged
