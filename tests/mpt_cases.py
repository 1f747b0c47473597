"""MPT options that transformers ignores, singly and combined, and tiny random models with them."""

from __future__ import annotations

from typing import Any

import torch
from helpers import model

LENGTHS = (23, 9, 17)

ROPE = {"alibi": False, "rope": True}
HF_ROPE = {**ROPE, "rope_impl": "hf"}
LLAMA3 = {"type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16, "high_freq_factor": 3.0}

# name -> (attn_config, other fields). The sequence (23) is longer than twice each window.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alibi_bias_max": ({"alibi_bias_max": 16}, {}),
    "storywriter": ({"alibi_bias_max": 16, "clip_qkv": 6}, {"n_heads": 3}),
    "learned positions": ({"alibi": False}, {"learned_pos_emb": True}),
    "no positions": ({"alibi": False}, {"learned_pos_emb": False}),
    "qk_ln": ({"qk_ln": True, "clip_qkv": 0.8}, {}),
    "qk_ln with bias": ({"qk_ln": True}, {"no_bias": False}),
    "qk_gn": ({"qk_gn": True}, {"no_bias": False}),
    "qk_gn, grouped": ({"qk_gn": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2}, {}),
    "qk_ln, grouped": ({"qk_ln": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2}, {}),
    "multiquery": ({"attn_type": "multiquery_attention"}, {}),
    "grouped": ({"attn_type": "grouped_query_attention", "kv_n_heads": 3, "fused_qkv": False}, {}),
    "biases": ({}, {"no_bias": False}),
    "attention_bias": ({}, {"attention_bias": True}),
    "no attention_bias": ({}, {"attention_bias": False, "no_bias": False}),
    "logit_scale": ({}, {"logit_scale": 0.37}),
    "inv_sqrt_d_model": ({}, {"logit_scale": "inv_sqrt_d_model"}),
    "expansion_ratio": ({}, {"expansion_ratio": 2.5}),
    "embedding_fraction": ({}, {"embedding_fraction": 0.3}),
    "rope": (ROPE, {}),
    "rope_theta": ({**ROPE, "rope_theta": 300.0}, {}),
    "rope, hf": (HF_ROPE, {}),
    "rope, linear": ({**HF_ROPE, "rope_hf_config": {"type": "linear", "factor": 3.0}}, {}),
    "rope, dynamic": ({**HF_ROPE, "rope_hf_config": {"type": "dynamic", "factor": 2.5}}, {"max_seq_len": 8}),
    "rope, llama3": ({**HF_ROPE, "rope_hf_config": LLAMA3}, {}),
    "rope with alibi": ({"rope": True, "alibi": True}, {}),
    "rmsnorm": ({}, {"norm_type": "rmsnorm"}),
    "norm_eps": ({}, {"norm_eps": 0.1}),
    "mptglu": ({}, {"ffn_config": {"ffn_type": "mptglu"}, "no_bias": False}),
    "ffn_hidden_size": ({}, {"ffn_config": {"ffn_hidden_size": 50}}),
    "sliding window": ({"sliding_window_size": 5}, {}),
    "sliding window of one": ({"sliding_window_size": 0}, {}),
    "sliding window, rope": ({**ROPE, "sliding_window_size": 7}, {}),
    "score cap": ({"attn_logit_softcapping": 0.9}, {}),
    "logit cap": ({}, {"final_logit_softcapping": 1.5}),
    "logit cap and scale": ({}, {"final_logit_softcapping": 1.5, "logit_scale": 3.0}),
    "untied": ({}, {"tie_word_embeddings": False}),
    "head_dim": ({}, {"head_dim": 10}),
    "head_dim, odd width": ({}, {"head_dim": 4, "d_model": 35}),
    "all at once": (
        {
            "alibi_bias_max": 5,
            "clip_qkv": 1.1,
            "qk_gn": True,
            "attn_type": "grouped_query_attention",
            "kv_n_heads": 2,
            "sliding_window_size": 6,
            "attn_logit_softcapping": 2.0,
            "softmax_scale": 0.4,
        },
        {
            "no_bias": False,
            "norm_type": "rmsnorm",
            "ffn_config": {"ffn_type": "mptglu", "ffn_hidden_size": 44, "ffn_act_fn": {"name": "silu"}},
            "logit_scale": 0.7,
            "final_logit_softcapping": 4.0,
            "tie_word_embeddings": False,
            "head_dim": 8,
            "layer_norm_epsilon": 1e-3,
        },
    ),
    **{
        f"activation {act}": ({}, {"ffn_config": {"ffn_act_fn": act}})
        for act in (
            {"name": "gelu", "approximate": "tanh"},
            {"name": "quick_gelu"},
            {"name": "relu"},
            {"name": "silu"},
        )
    },
}


def mpt_model(case: str, **more: Any) -> Any:
    """A model with the options of a case and these config fields."""
    attn, fields = CASES[case]
    module = model(attn=attn, **{**fields, **more})
    if case == "storywriter":  # so that clip_qkv=6 changes the projections
        with torch.no_grad():
            for i in range(module.spec.layers):
                module.at("qkv", i).weight *= 2
                module.at("out", i).weight /= 2
    return module
