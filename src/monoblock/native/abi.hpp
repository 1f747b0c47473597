// The memory layout of every structure that native/abi.py also declares. The loader compares the two.
#pragma once

#include <stddef.h>

#include "attention.hpp"
#include "decode_step.hpp"
#include "matrix.hpp"
#include "packed_forward.hpp"
#include "paged_step.hpp"

namespace abi {

using namespace decode;
using namespace packed;
using namespace paged;
using namespace prompt;

// Offset and size in bytes of a structure ("Matrix", offset 0) or of one of its fields ("Matrix.data").
struct LayoutEntry {
  const char* name;
  int64_t offset, size;
};

#define STRUCT(S) {#S, 0, sizeof(S)}
#define FIELD(S, field) {#S "." #field, offsetof(S, field), sizeof(S::field)}

constexpr LayoutEntry LAYOUT[] = {
    STRUCT(Matrix), FIELD(Matrix, data), FIELD(Matrix, scale), FIELD(Matrix, low), FIELD(Matrix, bias),
        FIELD(Matrix, outputs), FIELD(Matrix, inputs), FIELD(Matrix, format), FIELD(Matrix, group),
        FIELD(Matrix, bias_format), FIELD(Matrix, scale_format),
    STRUCT(InputRounding), FIELD(InputRounding, channels), FIELD(InputRounding, columns), FIELD(InputRounding, scale),
        FIELD(InputRounding, low), FIELD(InputRounding, count),
    STRUCT(ReadPlan), FIELD(ReadPlan, hint), FIELD(ReadPlan, distance), FIELD(ReadPlan, streams), FIELD(ReadPlan, chunks),
    STRUCT(AttentionCall), FIELD(AttentionCall, q), FIELD(AttentionCall, k), FIELD(AttentionCall, v),
        FIELD(AttentionCall, out), FIELD(AttentionCall, q_strides), FIELD(AttentionCall, k_strides),
        FIELD(AttentionCall, v_strides), FIELD(AttentionCall, out_strides), FIELD(AttentionCall, alibi_slopes),
        FIELD(AttentionCall, relative), FIELD(AttentionCall, relative_stride), FIELD(AttentionCall, relative_center),
        FIELD(AttentionCall, valid), FIELD(AttentionCall, segments), FIELD(AttentionCall, valid_stride),
        FIELD(AttentionCall, segments_stride), FIELD(AttentionCall, batch), FIELD(AttentionCall, heads),
        FIELD(AttentionCall, kv_heads), FIELD(AttentionCall, queries), FIELD(AttentionCall, keys),
        FIELD(AttentionCall, head_dim), FIELD(AttentionCall, window), FIELD(AttentionCall, scale),
        FIELD(AttentionCall, softcap), FIELD(AttentionCall, bf16), FIELD(AttentionCall, causal),
        FIELD(AttentionCall, threads),
    STRUCT(NormCall), FIELD(NormCall, x), FIELD(NormCall, weight), FIELD(NormCall, bias), FIELD(NormCall, out),
        FIELD(NormCall, rows), FIELD(NormCall, width), FIELD(NormCall, eps), FIELD(NormCall, bf16),
        FIELD(NormCall, rms), FIELD(NormCall, threads),
    STRUCT(RopeCall), FIELD(RopeCall, x), FIELD(RopeCall, cos), FIELD(RopeCall, sin), FIELD(RopeCall, out),
        FIELD(RopeCall, x_strides), FIELD(RopeCall, out_strides), FIELD(RopeCall, angle_strides),
        FIELD(RopeCall, batch), FIELD(RopeCall, heads), FIELD(RopeCall, tokens), FIELD(RopeCall, head_dim),
        FIELD(RopeCall, rotary_dim), FIELD(RopeCall, bf16), FIELD(RopeCall, threads),
    STRUCT(ActivationCall), FIELD(ActivationCall, x), FIELD(ActivationCall, out), FIELD(ActivationCall, rows),
        FIELD(ActivationCall, width), FIELD(ActivationCall, kind), FIELD(ActivationCall, gated),
        FIELD(ActivationCall, bf16), FIELD(ActivationCall, threads),
    STRUCT(NormWeights), FIELD(NormWeights, weight), FIELD(NormWeights, bias), FIELD(NormWeights, eps),
        FIELD(NormWeights, kind),
    STRUCT(LowRank), FIELD(LowRank, a), FIELD(LowRank, b), FIELD(LowRank, first), FIELD(LowRank, scale),
        FIELD(LowRank, reserved),
    STRUCT(Adapters), FIELD(Adapters, terms), FIELD(Adapters, count),
    STRUCT(LayerWeights), FIELD(LayerWeights, qkv), FIELD(LayerWeights, out), FIELD(LayerWeights, up),
        FIELD(LayerWeights, down), FIELD(LayerWeights, qkv_adapters), FIELD(LayerWeights, out_adapters),
        FIELD(LayerWeights, up_adapters), FIELD(LayerWeights, down_adapters), FIELD(LayerWeights, norm1),
        FIELD(LayerWeights, norm2), FIELD(LayerWeights, q_norm), FIELD(LayerWeights, k_norm),
        FIELD(LayerWeights, qkv_inputs), FIELD(LayerWeights, out_inputs), FIELD(LayerWeights, up_inputs),
        FIELD(LayerWeights, down_inputs), FIELD(LayerWeights, window),
    STRUCT(ModelWeights), FIELD(ModelWeights, blocks), FIELD(ModelWeights, embed), FIELD(ModelWeights, head),
        FIELD(ModelWeights, head_adapters),
        FIELD(ModelWeights, position_table), FIELD(ModelWeights, inverse_frequencies),
        FIELD(ModelWeights, alibi_slopes), FIELD(ModelWeights, embed_norm), FIELD(ModelWeights, final_norm),
        FIELD(ModelWeights, layers), FIELD(ModelWeights, width), FIELD(ModelWeights, heads),
        FIELD(ModelWeights, kv_heads), FIELD(ModelWeights, head_dim), FIELD(ModelWeights, mlp_width),
        FIELD(ModelWeights, position_rows), FIELD(ModelWeights, position_offset), FIELD(ModelWeights, activation),
        FIELD(ModelWeights, gated), FIELD(ModelWeights, pre_norm), FIELD(ModelWeights, qk_norm_by_head),
        FIELD(ModelWeights, bf16), FIELD(ModelWeights, rotary_dim), FIELD(ModelWeights, qkv_by_head),
        FIELD(ModelWeights, scale),
        FIELD(ModelWeights, clip), FIELD(ModelWeights, softcap), FIELD(ModelWeights, rotary_scale),
        FIELD(ModelWeights, logit_scale), FIELD(ModelWeights, logit_softcap),
    STRUCT(LayerCache), FIELD(LayerCache, keys), FIELD(LayerCache, values), FIELD(LayerCache, key_strides),
        FIELD(LayerCache, value_strides), FIELD(LayerCache, index),
    STRUCT(DecodeStep), FIELD(DecodeStep, caches), FIELD(DecodeStep, ids), FIELD(DecodeStep, type_ids),
        FIELD(DecodeStep, positions), FIELD(DecodeStep, valid), FIELD(DecodeStep, logits), FIELD(DecodeStep, scratch),
        FIELD(DecodeStep, scratch_bytes), FIELD(DecodeStep, rows), FIELD(DecodeStep, tokens), FIELD(DecodeStep, past),
        FIELD(DecodeStep, position_stride), FIELD(DecodeStep, valid_stride), FIELD(DecodeStep, threads),
        FIELD(DecodeStep, cache_bf16),
    STRUCT(PackedForward), FIELD(PackedForward, ids), FIELD(PackedForward, type_ids), FIELD(PackedForward, positions),
        FIELD(PackedForward, starts), FIELD(PackedForward, relative), FIELD(PackedForward, out), FIELD(PackedForward, peaks),
        FIELD(PackedForward, scratch), FIELD(PackedForward, scratch_bytes), FIELD(PackedForward, sequences),
        FIELD(PackedForward, relative_stride), FIELD(PackedForward, relative_center), FIELD(PackedForward, causal),
        FIELD(PackedForward, threads),
    STRUCT(PagedStep), FIELD(PagedStep, ids), FIELD(PagedStep, positions), FIELD(PagedStep, starts), FIELD(PagedStep, past),
        FIELD(PagedStep, tables), FIELD(PagedStep, wanted), FIELD(PagedStep, embeds),
        FIELD(PagedStep, embed_rows), FIELD(PagedStep, cache), FIELD(PagedStep, logits), FIELD(PagedStep, scratch),
        FIELD(PagedStep, scratch_bytes), FIELD(PagedStep, sequences), FIELD(PagedStep, outputs),
        FIELD(PagedStep, table_stride), FIELD(PagedStep, blocks), FIELD(PagedStep, threads), FIELD(PagedStep, cache_bf16),
    {nullptr, 0, 0},
};

#undef STRUCT
#undef FIELD

}  // namespace abi
