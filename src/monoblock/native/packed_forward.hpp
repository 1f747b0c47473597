// A forward pass of a transformer over several sequences without padding: their tokens are rows of one matrix, and each
// sequence attends to itself. The architecture is described by ModelWeights; activations are float32. A token's output
// depends on its own sequence only, to the bit: sums are added in an order that does not depend on the other rows.
//
// One parallel region runs the pass. Its phases are dynamic parallel loops, each with a barrier: qkv | norms and RoPE of heads
// | attention | out + residual | norm | up with activation | down + residual | norm.
#pragma once

#include <algorithm>

#include "attention.hpp"
#include "model.hpp"
#include "panel_gemm.hpp"
#include "thread_team.hpp"

namespace packed {

using namespace decode;

constexpr int64_t CHUNK_TOKENS = 2048;  // tokens of the sequences that are computed together, which bounds the scratch
constexpr int64_t PREFETCHED_ROWS = 8;  // rows of a product's result that are prefetched before they are written
constexpr int64_t TOKENS_AT_ONCE = 8;    // tokens that a thread takes at a time where each is computed alone
constexpr int64_t LEAST_SHARE = 96;      // rows of a product from which each thread takes a share of them
constexpr int64_t QUERY_BLOCK = 192;    // queries of an attention task: they share packed keys and values

struct PackedForward {
  const int64_t *ids, *type_ids, *positions;  // (tokens,); type_ids may be null
  const int64_t* starts;                      // (sequences + 1,): the first token of each sequence, and the end
  const float* relative;                      // biases by distance, as in AttentionCall, or null
  float* out;                                 // (tokens, width): after the final norm
  float* peaks;  // (layers, 4, the most inputs), or null: the largest magnitude of each channel of the inputs of qkv, out, up
                 // and down over all tokens, to which they are raised
  void* scratch;
  int64_t scratch_bytes, sequences, relative_stride, relative_center;
  int32_t causal, threads;
};

// Whether all token ids and positions are within their tables.
inline bool tokens_in_range(const ModelWeights& m, const PackedForward& c) {
  for (int64_t t = 0; t < c.starts[c.sequences]; ++t) {
    if (c.ids[t] < 0 || c.ids[t] >= m.embed.outputs) return false;
    if (c.type_ids && (c.type_ids[t] < 0 || c.type_ids[t] >= m.embed.outputs)) return false;
    if (m.position_table && (c.positions[t] < 0 || c.positions[t] >= m.position_rows)) return false;
  }
  return true;
}

// The end of the chunk of sequences that begins at `first`: at least one sequence, and else at most `tokens` tokens.
inline int64_t chunk_end(const PackedForward& c, int64_t first, int64_t tokens) {
  int64_t last = first + 1;
  while (last < c.sequences && c.starts[last + 1] - c.starts[first] <= tokens) ++last;
  return last;
}

inline int64_t longest_chunk(const PackedForward& c, int64_t tokens) {
  int64_t most = 1;
  for (int64_t first = 0, last; first < c.sequences; first = last) {
    last = chunk_end(c, first, tokens);
    most = std::max(most, c.starts[last] - c.starts[first]);
  }
  return most;
}

class PackedRun {
 public:
  PackedRun(const ModelWeights& model, const PackedForward& call, Arena& arena)
      : m(model), c(call), layout(model), wide(m.mlp_width * (m.gated ? 2 : 1)), inner_width(m.heads * m.head_dim) {
    const int64_t most = longest_chunk(c, CHUNK_TOKENS);
    x = arena.take<float>(most * m.width);
    h = arena.take<float>(most * m.width);
    qkv = arena.take<float>(most * layout.size);
    rounded = arena.take<uint16_t>(by_pairs() ? most * layout.size : 0);
    attended = arena.take<float>(most * inner_width);
    inner = arena.take<float>(most * wide);
    angles = arena.take<float>(most * m.rotary_dim);
    inputs = arena.take<char>(PanelInputs::bytes(most_inputs(m), most));
    own = arena.take<char>(c.threads * own_bytes());
  }

  ThreadTeam team;

  bool in_range() const { return tokens_in_range(m, c); }

  // One thread's share of the pass; all threads of the region call it together.
  void run(int thread) {
    Arena arena(own + thread * own_bytes());
    Own mine(thread, arena, m, c);
    for (int64_t first = 0; first < c.sequences;) {
      const int64_t last = chunk_end(c, first, CHUNK_TOKENS);
      forward(first, last, mine);
      first = last;
    }
  }

 private:
  // A thread's private memory.
  struct Own {
    Own(int number, Arena& arena, const ModelWeights& m, const PackedForward& c)
        : thread(number), panel(arena, most_inputs(m)), together(arena.take<float>(m.heads * m.head_dim)) {
      if (!arena.base) return;
      call.alibi_slopes = m.alibi_slopes, call.relative = c.relative;
      call.relative_stride = c.relative_stride, call.relative_center = c.relative_center;
      call.batch = 1, call.heads = m.heads, call.kv_heads = m.kv_heads, call.head_dim = m.head_dim;
      call.scale = m.scale, call.softcap = m.softcap, call.causal = c.causal, call.threads = 1;
    }
    const int thread;
    PanelScratch panel;
    float* together;
    prompt::AttentionCall call = {};
  };

  static int64_t most_inputs(const ModelWeights& m) {
    return std::max(std::max(m.width, m.mlp_width), m.heads * m.head_dim);
  }

  int64_t own_bytes() const {
    Arena measure(nullptr);
    Own mine(0, measure, m, c);
    return measure.used;
  }

  // work(t) for each of `count` tokens.
  template <class F>
  void each_token(Own& mine, int64_t count, F work) {
    team.parallel_ranges(mine.thread, (count + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE, [&](int64_t block) {
      const int64_t first = block * TOKENS_AT_ONCE, last = std::min(count, first + TOKENS_AT_ONCE);
      for (int64_t t = first; t < last; ++t) work(t);
    });
  }

  // The sequences [first, last) through all layers.
  void forward(int64_t first, int64_t last, Own& mine) {
    const int64_t start = c.starts[first], count = c.starts[last] - start;
    if (!count) return;
    each_token(mine, count, [&](int64_t t) {
      const int64_t position = c.positions[start + t];
      embed_token(m, c.ids[start + t], c.type_ids ? c.type_ids[start + t] : -1, position, x + t * m.width);
      rope_angles(m, position, angles + t * m.rotary_dim);
    });
    PanelInputs in;
    for (int64_t i = 0; i < m.layers; ++i) {
      const LayerWeights& layer = m.blocks[i];
      if (m.pre_norm)
        in = norm_rows(layer.norm1, h, &layer.qkv, layer.qkv_inputs, count, mine);
      else if (!i)
        in = prepare_rows(layer.qkv, layer.qkv_inputs, x, m.width, count, mine);
      raise_peaks(i, 0, m.width, in, mine);
      const bool unfinished = m.rotary_dim || m.clip != 0 || layer.q_norm.kind || layer.k_norm.kind;
      if (unfinished || !by_pairs())
        product(layer.qkv, in, mine, qkv, layout.size, copy);
      else
        product(layer.qkv, in, mine, rounded, layout.size, [](const float* sums, int64_t n, uint16_t* to) {
          matrices::round_to_bf16(sums, n, to, n);
        });
      if (unfinished)
        each_token(mine, count, [&](int64_t t) {
          float* row = qkv + t * layout.size;
          finish_qkv(m, layer, layout, row, angles + t * m.rotary_dim, mine.together);
          if (by_pairs()) matrices::round_to_bf16(row, layout.size, rounded + t * layout.size, layout.size);
        });
      if (by_pairs())
        attend<prompt::Tiles>((const uint16_t*)rounded, layer, first, last, mine);
      else
        attend<prompt::Plain>((const float*)qkv, layer, first, last, mine);
      in = prepare_rows(layer.out, layer.out_inputs, attended, inner_width, count, mine);
      raise_peaks(i, 1, inner_width, in, mine);
      add(layer.out, in, mine);
      in = m.pre_norm ? norm_rows(layer.norm2, h, &layer.up, layer.up_inputs, count, mine)
                      : norm_rows(layer.norm1, x, &layer.up, layer.up_inputs, count, mine);
      raise_peaks(i, 2, m.width, in, mine);
      up(layer.up, in, count, mine);
      in = prepare_rows(layer.down, layer.down_inputs, inner, wide, count, mine);
      raise_peaks(i, 3, m.mlp_width, in, mine);
      add(layer.down, in, mine);
      if (m.pre_norm) continue;
      const LayerWeights* next = i + 1 < m.layers ? &m.blocks[i + 1] : nullptr;
      in = norm_rows(layer.norm2, x, next ? &next->qkv : nullptr, next ? next->qkv_inputs : InputRounding{}, count, mine);
    }
    each_token(mine, count, [&](int64_t t) {
      normed(m.final_norm, m.bf16, x + t * m.width, m.width, c.out + (start + t) * m.width);
    });
  }

  // Rows of inputs of a product with w, in the form that it reads.
  PanelInputs prepare_rows(const Matrix& w, const InputRounding& how, const float* from, int64_t ldx, int64_t count, Own& mine) {
    PanelInputs rows = {from, ldx, count, how};
    rows.place(inputs, w);
    if (PanelInputs::needed(w)) each_token(mine, count, [&](int64_t t) { rows.prepare_row(w, t); });
    return rows;
  }

  // The same of normalised rows of x, which are written to `to`; `next`: null if no product reads them.
  PanelInputs norm_rows(const NormWeights& norm, float* to, const Matrix* next, const InputRounding& how, int64_t count, Own& mine) {
    PanelInputs rows = {to, m.width, count, how};
    if (next) rows.place(inputs, *next);
    const bool needed = next && PanelInputs::needed(*next);
    each_token(mine, count, [&](int64_t t) {
      normed(norm, m.bf16, x + t * m.width, m.width, to + t * m.width);
      if (needed) rows.prepare_row(*next, t);
    });
    return rows;
  }

  // Raises c.peaks of product `which` of a layer to the rows of its inputs, in the first thread; all have prepared them.
  void raise_peaks(int64_t layer, int64_t which, int64_t width, const PanelInputs& in, const Own& mine) const {
    if (!c.peaks || mine.thread) return;
    float* peak = c.peaks + (layer * 4 + which) * most_inputs(m);
    for (int64_t r = 0; r < in.rows; ++r)
      for (int64_t i = 0; i < width; ++i) peak[i] = std::max(peak[i], fabsf(in.x[r * in.ldx + i]));
  }

  static void copy(const float* sums, int64_t n, float* to) { memcpy(to, sums, n * sizeof(float)); }

  // to (rows, ldt) = W in, for panels of outputs and blocks of rows; `finish(sums, n, at)` takes n sums of a row.
  template <class T, class F>
  void product(const Matrix& w, const PanelInputs& in, Own& mine, T* to, int64_t ldt, F finish) {
    const int64_t count = in.rows;
    mine.panel.packed = nullptr;
    const int64_t panels = (w.outputs + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS;
    // Each thread's share of the rows, which it takes for every panel; few rows are not divided, since a panel is packed for each
    // share. A share is multiplied by up to PANEL_ROWS at a time, or by fewer for four tasks per thread.
    const int64_t shares = count >= team.threads() * LEAST_SHARE ? team.threads() : 1;
    const int64_t share = round_up((count + shares - 1) / shares, TILE_ROWS);
    const int64_t wanted = (4 * team.threads() + shares * panels - 1) / (shares * panels);
    const int64_t each = std::min(PANEL_ROWS, std::max<int64_t>(8 * TILE_ROWS, round_up((share + wanted - 1) / wanted, TILE_ROWS)));
    const int64_t blocks = (share + each - 1) / each;
    team.parallel_ranges(mine.thread, shares * panels * blocks, [&](int64_t task) {
      const int64_t own = task / (panels * blocks) * share, first = task / blocks % panels * PANEL_OUTPUTS;
      const int64_t row = own + task % blocks * each, n = std::min(each, std::min(count, own + share) - row);
      if (n <= 0) return;
      panel_sums(w, in, first, row, n, mine.panel);
      const int64_t outputs = std::min(PANEL_OUTPUTS, w.outputs - first);
      T* at = to + row * ldt + first;
      for (int64_t r = 0; r < n; ++r, at += ldt) {
        // A row's part is a few lines of a page of its own, which no processor prefetches by itself.
        for (int64_t o = 0; o < outputs; o += 64 / int64_t(sizeof(T))) __builtin_prefetch(at + PREFETCHED_ROWS * ldt + o, 1);
        finish(mine.panel.sums + r * PANEL_OUTPUTS, outputs, at);
      }
    });
  }

  // x += W in.
  void add(const Matrix& w, const PanelInputs& in, Own& mine) {
    product(w, in, mine, x, m.width, [](const float* sums, int64_t n, float* to) {
      for (int64_t i = 0; i < n; ++i) to[i] += sums[i];
    });
  }

  // inner = act(W in), or act(gate) * up.
  void up(const Matrix& w, const PanelInputs& in, int64_t count, Own& mine) {
    if (!m.gated)
      return product(w, in, mine, inner, wide, [this](float* sums, int64_t n, float* to) {
        activate(m.activation, sums, n);
        copy(sums, n, to);
      });
    product(w, in, mine, inner, wide, copy);
    each_token(mine, count, [&](int64_t t) {
      float *gates = inner + t * wide, *ups = gates + m.mlp_width;
      activate(m.activation, gates, m.mlp_width);
      for (int64_t i = 0; i < m.mlp_width; ++i) gates[i] *= ups[i];
    });
  }

  // Whether attention multiplies pairs of bf16: where the weights are rounded as much, and one instruction does it.
  bool by_pairs() const {
#if defined(MB_BF16_DOT)
    return m.blocks[0].qkv.format != matrices::F32;
#else
    return false;
#endif
  }

  template <class Dot, class T>
  void attend(const T* heads, const LayerWeights& layer, int64_t first, int64_t last, Own& mine) {
    prompt::AttentionCall& a = mine.call;
    a.window = layer.window;
    for (int64_t* stride : {a.q_strides, a.k_strides, a.v_strides})
      stride[0] = 0, stride[1] = layout.stride, stride[2] = layout.size;
    a.out_strides[0] = 0, a.out_strides[1] = m.head_dim, a.out_strides[2] = inner_width;
    prompt::Task<Dot, T, float> task(a, QUERY_BLOCK);
    SequenceTasks tasks(c.starts, first, last, m.kv_heads, QUERY_BLOCK);
    team.parallel_ranges(mine.thread, tasks.count(), [&](int64_t index) {
      const auto [sequence, group, begin, end] = tasks.at(index);
      const int64_t start = c.starts[sequence] - c.starts[first];
      const T* at = heads + start * layout.size;
      a.q = at, a.k = at + layout.keys, a.v = at + layout.values, a.out = attended + start * inner_width;
      a.queries = a.keys = c.starts[sequence + 1] - c.starts[sequence];
      task.run(0, group, begin, end);
    });
  }

  const ModelWeights& m;
  const PackedForward& c;
  const HeadLayout layout;
  const int64_t wide, inner_width;  // widths of a row of `inner` and of `attended`
  float *x, *h, *qkv, *attended, *inner, *angles;
  uint16_t* rounded;  // queries, keys and values in bf16
  char *inputs, *own;
};

}  // namespace packed

#include "amx_forward.hpp"

namespace packed {

// As `run_in_scratch`.
inline int64_t forward(const ModelWeights& model, const PackedForward& call) {
#if defined(__AMX_TILE__)
  if (AmxRun::supports(model)) return run_in_scratch<AmxRun>(model, call);
#endif
  return run_in_scratch<PackedRun>(model, call);
}

}  // namespace packed

