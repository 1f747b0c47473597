// The forward pass of packed_forward.hpp by AMX, for weights of 16 bits and less. The same contract: sequences without padding,
// and a token's output depends on its own sequence only, to the bit.
//
// Activations are float32 (blocks of 16 tokens, channels, 16 tokens), so that the lanes of a vector are tokens. The sums of a
// product come in this order, and the next product's second operand is made of pairs of its channels: norms, activations and
// softmax work down the channels or keys, and only the keys of attention are transposed.
//
// Phases of a layer: qkv | norms and RoPE of heads | attention | out + residual | norm | up with activation | down + residual |
// norm.
#pragma once

#if defined(__AMX_TILE__)

#include <algorithm>

#include "attention.hpp"
#include "model.hpp"
#include "thread_team.hpp"

namespace packed {

using namespace decode;

class AmxRun {
 public:
  // Whether the pass can compute this model.
  static bool supports(const ModelWeights& m) {
    for (int64_t i = 0; i < m.layers; ++i)
      for (const Matrix* w : {&m.blocks[i].qkv, &m.blocks[i].out, &m.blocks[i].up, &m.blocks[i].down})
        if (w->format == matrices::F32) return false;
    return m.head_dim % CHANNELS == 0;
  }

  AmxRun(const ModelWeights& model, const PackedForward& call, Arena& arena)
      : m(model),
        c(call),
        layout(model),
        inner_width(m.heads * m.head_dim),
        key_width(m.kv_heads * m.head_dim),
        unfinished(is_unfinished(m)) {
    most = round_up(longest_chunk(c, CHUNK), LANES);
    stride = most + 2 * CHANNELS;
    x = arena.take<float>(most * m.width);
    h = arena.take<float>(m.pre_norm ? most * m.width : 0);
    qkv = arena.take<float>(unfinished ? most * layout.size : 0);
    queries = arena.take<uint32_t>(inner_width / 2 * stride + 2 * CHANNELS);
    keys = arena.take<uint16_t>((most + KEY_TILE) * key_width);
    values = arena.take<uint16_t>(key_width * stride + 2 * CHANNELS);
    attended = arena.take<float>(most * inner_width);
    wide = arena.take<float>(m.gated ? most * 2 * m.mlp_width : 0);
    angles = arena.take<float>(most * m.rotary_dim);
    biases = arena.take<float>(c.relative ? m.heads * bias_stride() : 0);
    inputs = arena.take<char>(AmxInputs::bytes(std::max(m.width, inner_width), most));
    inner = arena.take<char>(AmxInputs::bytes(m.mlp_width, most));
    own = arena.take<char>(c.threads * own_bytes());
  }

  ThreadTeam team;

  bool in_range() const { return tokens_in_range(m, c); }

  // One thread's share of the pass; all threads of the region call it together.
  void run(int thread) {
    Arena arena(own + thread * own_bytes());
    Own mine(*this, thread, arena);
    if (c.relative) phase(mine, m.heads, [&](int64_t head) { reverse_biases(head); });
    for (int64_t first = 0; first < c.sequences;) {
      const int64_t last = chunk_end(c, first, CHUNK);
      forward(first, last, mine);
      first = last;
    }
  }

 private:
  static constexpr int64_t CHUNK = 1024;     // tokens that are computed together: their activations stay near L2
  static constexpr int64_t CHANNELS = 32;    // channels of an operand's step
  static constexpr int64_t QUERY_TILE = 32;  // queries of a tile of scores
  static constexpr int64_t KEY_TILE = 128;   // keys of a tile of scores
  static constexpr int64_t QUERY_TASK = 128; // queries of an attention task
  static constexpr int64_t AROUND = 2 * QUERY_TILE;  // biases beyond the first and last distance: of queries that do not exist

  // A thread's private memory.
  struct Own {
    Own(const AmxRun& run, int number, Arena& arena)
        : thread(number), tiles(arena.take<char>(matrices::AmxScratch::BYTES)) {
      const int64_t dim = run.m.head_dim;
      rows = arena.take<float>(LANES * round_up(run.m.width, LANES));
      scores = arena.take<float>(KEY_TILE * QUERY_TILE);
      weights = arena.take<uint32_t>(KEY_TILE / 2 * QUERY_TILE);
      sums = arena.take<float>(dim * QUERY_TILE);
      last_values = arena.take<uint16_t>(dim * CHANNELS);
      bias = arena.take<float>(matrices::AMX_OUTPUTS);
      angles = arena.take<float>(run.m.rotary_dim);
      heads = arena.take<float>(run.unfinished && run.layout.stride != dim ? run.inner_width * LANES : 0);
    }
    const int thread;
    int64_t start = 0, count = 0, blocks = 0;  // of the present chunk: its first token, tokens, and blocks of 16
    char* tiles;           // AmxScratch
    float* rows;           // (16, width): embeddings of a block
    float* scores;         // (KEY_TILE, QUERY_TILE)
    uint32_t* weights;     // (KEY_TILE / 2, QUERY_TILE), pairs of keys
    float* sums;           // (head_dim, QUERY_TILE)
    uint16_t* last_values; // (head_dim, 32): the last keys of a sequence, followed by zeros
    float* bias;           // of a task's outputs
    float* angles;         // RoPE of a token
    float* heads;          // (heads, head_dim, 16): of a norm over all heads that are not adjacent
  };

  int64_t own_bytes() const {
    Arena measure(nullptr);
    Own mine(*this, 0, measure);
    return measure.used;
  }

  // Whether queries and keys are clipped, normed or rotated.
  static bool is_unfinished(const ModelWeights& m) {
    bool norms = false;
    for (int64_t i = 0; i < m.layers; ++i) norms |= m.blocks[i].q_norm.kind || m.blocks[i].k_norm.kind;
    return norms || m.rotary_dim || m.clip != 0;
  }

  template <class F>
  void phase(Own& mine, int64_t n, F work) {
    team.parallel_for(mine.thread, n, work, [] { return false; });
  }

  // The sequences [first, last) through all layers.
  void forward(int64_t first, int64_t last, Own& mine) {
    const int64_t start = c.starts[first];
    mine.start = start, mine.count = c.starts[last] - start, mine.blocks = (mine.count + LANES - 1) / LANES;
    if (!mine.count) return;
    const LayerWeights& begin = m.blocks[0];
    phase(mine, mine.blocks, [&](int64_t block) {
      embed(block, mine);
      prepare(m.pre_norm ? &begin.norm1 : nullptr, begin.qkv, block, mine);
    });
    for (int64_t i = 0; i < m.layers; ++i) {
      const LayerWeights& layer = m.blocks[i];
      project_heads(layer, mine);
      attend(layer, first, last, mine);
      phase(mine, mine.blocks, [&](int64_t block) { convert(layer.out, attended + block * inner_width * LANES, inner_width, block, mine); });
      add(layer.out, inputs, mine);
      phase(mine, mine.blocks, [&](int64_t block) {
        if (!m.pre_norm) norm_block(layer.norm1, x_of(block), m.width, x_of(block));
        prepare(m.pre_norm ? &layer.norm2 : nullptr, layer.up, block, mine);
      });
      up(layer, mine);
      add(layer.down, inner, mine);
      phase(mine, mine.blocks, [&](int64_t block) {
        if (!m.pre_norm) norm_block(layer.norm2, x_of(block), m.width, x_of(block));
        if (i + 1 < m.layers)
          prepare(m.pre_norm ? &m.blocks[i + 1].norm1 : nullptr, m.blocks[i + 1].qkv, block, mine);
        else
          finish(block, mine);
      });
    }
  }

  float* x_of(int64_t block) const { return x + block * m.width * LANES; }

  // The embeddings of a block's tokens; zeros beyond the last one.
  void embed(int64_t block, Own& mine) {
    const int64_t ld = round_up(m.width, LANES);
    for (int lane = 0; lane < LANES; ++lane) {
      float* row = mine.rows + lane * ld;
      const int64_t t = block * LANES + lane;
      if (t >= mine.count) {
        memset(row, 0, ld * sizeof(float));
        continue;
      }
      const int64_t position = c.positions[mine.start + t];
      embed_token(m, c.ids[mine.start + t], c.type_ids ? c.type_ids[mine.start + t] : -1, position, row);
      if (!m.rotary_dim) continue;
      rope_angles(m, position, mine.angles);
      for (int64_t i = 0; i < m.rotary_dim; ++i) angles[(block * m.rotary_dim + i) * LANES + lane] = mine.angles[i];
    }
    for (int64_t k = 0; k < m.width; k += LANES) {
      Floats v[LANES];
      UNROLL for (int lane = 0; lane < LANES; ++lane) v[lane] = load<Floats>(mine.rows + lane * ld + k);
      transpose(v);
      UNROLL for (int i = 0; i < LANES; ++i)
        if (k + i < m.width) store(x_of(block) + (k + i) * LANES, v[i]);
    }
  }

  // The results of a block's tokens: after the final norm, (tokens, width).
  void finish(int64_t block, Own& mine) {
    norm_block(m.final_norm, x_of(block), m.width, x_of(block));
    const int64_t ld = round_up(m.width, LANES);
    for (int64_t k = 0; k < m.width; k += LANES) {
      Floats v[LANES];
      UNROLL for (int i = 0; i < LANES; ++i) v[i] = k + i < m.width ? load<Floats>(x_of(block) + (k + i) * LANES) : Floats{};
      transpose(v);
      UNROLL for (int lane = 0; lane < LANES; ++lane) store(mine.rows + lane * ld + k, v[lane]);
    }
    for (int64_t t = block * LANES; t < std::min(mine.count, (block + 1) * LANES); ++t)
      memcpy(c.out + (mine.start + t) * m.width, mine.rows + t % LANES * ld, m.width * sizeof(float));
  }

  // y = norm(x) of a block's tokens; may be in place.
  void norm_block(const NormWeights& n, const float* from, int64_t width, float* to) const {
    if (!n.kind) {
      if (from != to) memcpy(to, from, width * LANES * sizeof(float));
      return;
    }
    typed(m.bf16, n.weight, [&](auto* weight) {
      const auto* bias = (decltype(weight))n.bias;
      Floats mean[4] = {}, square[4] = {};
      const auto sum = [](const Floats(&s)[4]) { return s[0] + s[1] + (s[2] + s[3]); };
      if (n.kind == 1)
        for (int64_t i = 0; i < width; ++i) mean[i % 4] += load<Floats>(from + i * LANES);
      const Floats shift = sum(mean) / float(width);
      for (int64_t i = 0; i < width; ++i) {
        const Floats d = load<Floats>(from + i * LANES) - shift;
        square[i % 4] += d * d;
      }
      const Floats variance = sum(square) / float(width) + n.eps;
      const Floats factor = 1.0f / (Floats)_mm512_sqrt_ps((__m512)variance);
      for (int64_t i = 0; i < width; ++i) {
        const Floats y = (load<Floats>(from + i * LANES) - shift) * (factor * read1(weight + i));
        store(to + i * LANES, bias ? y + read1(bias + i) : y);
      }
    });
  }

  // The inputs of `w` from x, normed if there is a norm.
  void prepare(const NormWeights* norm, const Matrix& w, int64_t block, const Own& mine) {
    float* from = x_of(block);
    if (norm) {
      float* to = h + block * m.width * LANES;
      norm_block(*norm, from, m.width, to);
      from = to;
    }
    convert(w, from, m.width, block, mine);
  }

  void convert(const Matrix& w, const float* from, int64_t width, int64_t block, const Own& mine) {
    placed(w, inputs, mine).convert(from, LANES, block, 0, width);
  }

  AmxInputs placed(const Matrix& w, char* at, const Own& mine) const {
    AmxInputs in;
    in.place(at, w, mine.blocks * LANES, false);
    return in;
  }

  // W in: calls epilogue(block, first output, outputs, sums, ld) for each block of rows and each task's outputs, with the
  // bias added.
  template <class F>
  void product(const Matrix& w, char* in, Own& mine, F epilogue) {
    using namespace matrices;
    const AmxInputs rows = placed(w, in, mine);
    const AmxTasks tasks(w, mine.count, c.threads);
    const AmxScratch scratch(mine.tiles);
    phase(mine, tasks.count(), [&](int64_t index) {
      const auto [row, end, first, last] = tasks.multiply(index, rows, scratch);
      const int64_t n = end - row, outputs = last - first;
      for (int64_t o = 0; w.bias && o < outputs; ++o) mine.bias[o] = bias_of(w, first + o);
      for (int64_t r = 0; r < n; r += SIDE) {
        float* sums = scratch.sums + r;
        for (int64_t o = 0; w.bias && o < outputs; ++o)
          store(sums + o * tasks.ld, load<Floats>(sums + o * tasks.ld) + mine.bias[o]);
        epilogue((row + r) / SIDE, first, outputs, sums, tasks.ld);
      }
    });
  }

  // x += W in.
  void add(const Matrix& w, char* in, Own& mine) {
    product(w, in, mine, [&](int64_t block, int64_t first, int64_t outputs, const float* sums, int64_t ld) {
      float* to = x_of(block) + first * LANES;
      for (int64_t o = 0; o < outputs; ++o) store(to + o * LANES, load<Floats>(to + o * LANES) + load<Floats>(sums + o * ld));
    });
  }

  // inner = act(W in), or act(gate) * up, as inputs of `down`.
  void up(const LayerWeights& layer, Own& mine) {
    const AmxInputs to = placed(layer.down, inner, mine);
    if (!m.gated)
      return product(
          layer.up, inputs, mine,
          [&](int64_t block, int64_t first, int64_t outputs, float* sums, int64_t ld) {
            choose(m.activation, [&](auto act) {
              for (int64_t o = 0; o < outputs; ++o)
                store(sums + o * ld, matrices::activated<decltype(act)::value>(load<Floats>(sums + o * ld)));
            });
            to.convert(sums, ld, block, first, outputs);
          });
    product(layer.up, inputs, mine, [&](int64_t block, int64_t first, int64_t outputs, const float* sums, int64_t ld) {
      float* all = wide + (block * 2 * m.mlp_width + first) * LANES;
      for (int64_t o = 0; o < outputs; ++o) store(all + o * LANES, load<Floats>(sums + o * ld));
    });
    phase(mine, mine.blocks, [&](int64_t block) {
      float *gates = wide + block * 2 * m.mlp_width * LANES, *ups = gates + m.mlp_width * LANES;
      choose(m.activation, [&](auto act) {
        for (int64_t i = 0; i < m.mlp_width * LANES; i += LANES)
          store(gates + i, matrices::activated<decltype(act)::value>(load<Floats>(gates + i)) * load<Floats>(ups + i));
      });
      to.convert(gates, LANES, block, 0, m.mlp_width);
    });
  }

  // ---------------------------------------------------------------------------- queries, keys and values

  void project_heads(const LayerWeights& layer, Own& mine) {
    if (!unfinished)
      return product(layer.qkv, inputs, mine,
                     [&](int64_t block, int64_t first, int64_t outputs, const float* sums, int64_t ld) {
                       store_heads(block, first, outputs, sums, ld);
                     });
    product(layer.qkv, inputs, mine, [&](int64_t block, int64_t first, int64_t outputs, const float* sums, int64_t ld) {
      float* to = qkv + (block * layout.size + first) * LANES;
      for (int64_t o = 0; o < outputs; ++o) store(to + o * LANES, load<Floats>(sums + o * ld));
    });
    phase(mine, mine.blocks, [&](int64_t block) {
      float* own = qkv + block * layout.size * LANES;
      if (m.clip != 0)
        for (int64_t i = 0; i < layout.size * LANES; i += LANES)
          store(own + i, matrices::smallest(matrices::largest(load<Floats>(own + i), Floats{} - m.clip), Floats{} + m.clip));
      finish_heads(layer.q_norm, own, m.heads, block, mine);
      finish_heads(layer.k_norm, own + layout.keys * LANES, m.kv_heads, block, mine);
      store_heads(block, 0, layout.size, own, LANES);
    });
  }

  // Norm and RoPE of a block's queries or keys.
  void finish_heads(const NormWeights& norm, float* first, int64_t heads, int64_t block, Own& mine) {
    const int64_t dim = m.head_dim, half = m.rotary_dim / 2;
    if (norm.kind && !m.qk_norm_by_head) {
      if (layout.stride == dim) {
        norm_block(norm, first, heads * dim, first);
      } else {
        const int64_t size = dim * LANES;
        for (int64_t i = 0; i < heads; ++i)
          memcpy(mine.heads + i * size, first + i * layout.stride * LANES, size * sizeof(float));
        norm_block(norm, mine.heads, heads * dim, mine.heads);
        for (int64_t i = 0; i < heads; ++i)
          memcpy(first + i * layout.stride * LANES, mine.heads + i * size, size * sizeof(float));
      }
    }
    for (int64_t i = 0; i < heads; ++i) {
      float* head = first + i * layout.stride * LANES;
      if (m.qk_norm_by_head) norm_block(norm, head, dim, head);
      const float* own = angles + block * m.rotary_dim * LANES;
      for (int64_t d = 0; d < half; ++d) {
        const Floats a = load<Floats>(head + d * LANES), b = load<Floats>(head + (d + half) * LANES);
        const Floats cos = load<Floats>(own + d * LANES), sin = load<Floats>(own + (half + d) * LANES);
        store(head + d * LANES, a * cos - b * sin);
        store(head + (d + half) * LANES, b * cos + a * sin);
      }
    }
  }

  // Stores outputs of qkv as operands of attention: queries as pairs of channels (channels / 2, tokens), values as (channels,
  // tokens), keys as (tokens, channels), all in bf16.
  void store_heads(int64_t block, int64_t first, int64_t outputs, const float* from, int64_t ld) {
    const int64_t dim = m.head_dim, token = block * LANES;
    for (int64_t o = 0; o < outputs; o += CHANNELS, from += CHANNELS * ld) {
      const int64_t at = first + o;
      int kind;
      int64_t channel;
      if (m.qkv_by_head) {
        kind = int(at / dim % 3), channel = at / layout.stride * dim + at % dim;
      } else {
        kind = at < layout.keys ? 0 : at < layout.values ? 1 : 2;
        channel = at - (kind == 0 ? 0 : kind == 1 ? layout.keys : layout.values);
      }
      if (kind == 2) {
        UNROLL for (int i = 0; i < CHANNELS; ++i) matrices::write(values + (channel + i) * stride + token, load<Floats>(from + i * ld));
        continue;
      }
      matrices::Words v[LANES];
      UNROLL for (int p = 0; p < LANES; ++p)
        v[p] = matrices::amx_pair(load<Floats>(from + 2 * p * ld), load<Floats>(from + (2 * p + 1) * ld));
      if (kind == 0) {
        UNROLL for (int p = 0; p < LANES; ++p) store(queries + (channel / 2 + p) * stride + token, v[p]);
        continue;
      }
      transpose(v);
      UNROLL for (int t = 0; t < LANES; ++t) store(keys + (token + t) * key_width + channel, v[t]);
    }
  }

  // ---------------------------------------------------------------------------- attention

  int64_t bias_stride() const { return c.relative_stride + 2 * AROUND; }

  // The biases of a head by query - key instead of key - query, times log2(e); zeros around them.
  void reverse_biases(int64_t head) {
    float* to = biases + head * bias_stride();
    std::fill(to, to + bias_stride(), 0.0f);
    const int64_t longest = c.relative_center;
    for (int64_t d = -longest; d <= longest; ++d)
      to[AROUND + longest + d] = c.relative[head * c.relative_stride + longest - d] * prompt::LOG2E;
  }

  void attend(const LayerWeights& layer, int64_t first, int64_t last, Own& mine) {
    SequenceTasks tasks(c.starts, first, last, m.heads, QUERY_TASK);
    phase(mine, tasks.count(), [&](int64_t index) {
      const auto [sequence, head, begin, end] = tasks.at(index);
      const int64_t start = c.starts[sequence] - c.starts[first], length = c.starts[sequence + 1] - c.starts[sequence];
      const matrices::AmxTiles configured;
      for (int64_t q = begin; q < end; q += QUERY_TILE)
        length - q > LANES ? attend_tile<2>(layer, start, length, head, q, mine)
                           : attend_tile<1>(layer, start, length, head, q, mine);
    });
  }

  // The queries [query, query + 16 B) of a sequence of `length` tokens from row `start` on.
  template <int B>
  void attend_tile(const LayerWeights& layer, int64_t start, int64_t length, int64_t head, int64_t query, Own& mine) {
    using namespace matrices;
    const int64_t dim = m.head_dim, group = head / (m.heads / m.kv_heads), window = layer.window;
    const int64_t end = c.causal ? std::min(length, query + B * LANES) : length;
    const AmxOperand q = {(const char*)(queries + head * dim / 2 * stride + start + query), LANES * stride * 4, 64, stride * 4};
    AmxPrefetch none;
    Floats most[B], total[B];
    for (int b = 0; b < B; ++b) most[b] = all(prompt::MASKED), total[b] = Floats{};
    int64_t first = window ? std::max<int64_t>(0, query - window + 1) : 0;
    for (bool begin = true; first < end; first += KEY_TILE, begin = false) {
      const int64_t n = std::min(KEY_TILE, end - first), padded = round_up(n, CHANNELS);
      for (int64_t k = 0; k < n; k += 2 * LANES) {
        const uint16_t* from = keys + (start + first + k) * key_width + group * dim;
        const AmxOperand rows = {(const char*)from, 64, LANES * key_width * 2, key_width * 2};
        amx_floats<2, B>(rows, q, dim / CHANNELS, mine.scores + k * QUERY_TILE, QUERY_TILE, true, none);
      }
      for (int b = 0; b < B; ++b) {
        const Floats highest = finish_scores(layer, head, query + b * LANES, first, n, mine.scores + b * LANES);
        const Floats now = largest(highest, most[b]);
        const Floats reference = now == prompt::MASKED ? Floats{} : now;
        const Floats factor = prompt::exp2(most[b] - reference);
        most[b] = now;
        Floats sum = {};
        for (int64_t k = 0; k < padded; k += 2) {
          const float* at = mine.scores + k * QUERY_TILE + b * LANES;
          const Floats low = k < n ? prompt::exp2(load<Floats>(at) - reference) : Floats{};
          const Floats high = k + 1 < n ? prompt::exp2(load<Floats>(at + QUERY_TILE) - reference) : Floats{};
          sum += low, sum += high;
          store(mine.weights + k / 2 * QUERY_TILE + b * LANES, amx_pair(low, high));
        }
        total[b] = total[b] * factor + sum;
        if (!begin)
          for (int64_t i = 0; i < dim; ++i) {
            float* at = mine.sums + i * QUERY_TILE + b * LANES;
            store(at, load<Floats>(at) * factor);
          }
      }
      const AmxOperand weights = {(const char*)mine.weights, LANES * QUERY_TILE * 4, 64, QUERY_TILE * 4};
      const uint16_t* from = values + group * dim * stride + start + first;
      const int64_t whole = n / CHANNELS, rest = n % CHANNELS;
      if (rest)  // keys beyond these may be NaN
        for (int64_t i = 0; i < dim; ++i)
          store(mine.last_values + i * CHANNELS,
                _mm512_maskz_loadu_epi16((1u << rest) - 1, from + i * stride + whole * CHANNELS));
      for (int64_t i = 0; i < dim; i += 2 * LANES) {
        float* to = mine.sums + i * QUERY_TILE;
        const AmxOperand rows = {(const char*)(from + i * stride), 64, LANES * stride * 2, stride * 2};
        if (whole) amx_floats<2, B>(rows, weights, whole, to, QUERY_TILE, begin, none);
        if (!rest) continue;
        const AmxOperand last = {(const char*)(mine.last_values + i * CHANNELS), 64, LANES * 64, 64};
        const AmxOperand own = {weights.data + whole * weights.by_step, weights.by_step, 64, weights.by_row};
        amx_floats<2, B>(last, own, 1, to, QUERY_TILE, begin && !whole, none);
      }
    }
    for (int b = 0; b < B; ++b) {
      const int64_t token = start + query + b * LANES, lane = token % LANES;
      const int exist = int(std::min<int64_t>(LANES, length - query - b * LANES));
      if (exist <= 0) break;
      const uint32_t lanes = (1u << exist) - 1;
      const __mmask16 here = __mmask16(lanes & ((1u << (LANES - lane)) - 1)), next = __mmask16(lanes & ~here);
      float* to = attended + (token / LANES * inner_width + head * dim) * LANES + lane;
      float* beyond = to + inner_width * LANES - LANES;  // the next block's first lane is lane 16 - `lane` of the vector
      const Floats scale = 1.0f / total[b];
      for (int64_t i = 0; i < dim; ++i) {
        const __m512 y = (__m512)(load<Floats>(mine.sums + i * QUERY_TILE + b * LANES) * scale);
        _mm512_mask_storeu_ps(to + i * LANES, here, y);
        if (next) _mm512_mask_storeu_ps(beyond + i * LANES, next, y);
      }
    }
  }

  // Scores of `n` keys from `first` on with 16 queries from `query` on, (keys, QUERY_TILE), become exponents of 2: scaled, with
  // biases and masks. Returns the highest of each query.
  Floats finish_scores(const LayerWeights& layer, int64_t head, int64_t query, int64_t first, int64_t n, float* scores) const {
    const Floats lanes = prompt::iota();
    const float scale = (m.softcap ? 1.0f : m.scale) * prompt::LOG2E;
    const float ramp = m.alibi_slopes ? m.alibi_slopes[head] * prompt::LOG2E : 0.0f;
    const float* bias = c.relative ? biases + head * bias_stride() + AROUND + c.relative_center + query : nullptr;
    Floats highest = all(prompt::MASKED);
    for (int64_t k = 0; k < n; ++k, scores += QUERY_TILE) {
      const int64_t key = first + k;
      Floats s = load<Floats>(scores);
      if (m.softcap) s = m.softcap * matrices::tanh(s * (m.scale / m.softcap));
      if (bias)
        s = s * scale + load<Floats>(bias - key);
      else
        s = s * scale + (float(key - query) - lanes) * ramp;
      if (c.causal && key > query) s = lanes < float(key - query) ? all(prompt::MASKED) : s;
      if (layer.window && query + LANES > key + layer.window)
        s = lanes >= float(key + layer.window - query) ? all(prompt::MASKED) : s;
      store(scores, s);
      highest = matrices::largest(s, highest);
    }
    return highest;
  }

  const ModelWeights& m;
  const PackedForward& c;
  const HeadLayout layout;
  const int64_t inner_width, key_width;
  const bool unfinished;
  int64_t most, stride;  // tokens of a chunk, and of a row of `queries` and `values`
  float *x, *h, *qkv, *attended, *wide, *angles, *biases;
  uint32_t* queries;
  uint16_t *keys, *values;
  char *inputs, *inner, *own;  // inputs of products; the threads' memory
};

}  // namespace packed

#endif
