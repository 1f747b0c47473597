"""Config fields common to all families: defaults and types, fields without effect, and unsupported fields."""

from __future__ import annotations

from typing import Any, Literal

# Fields of every config, with transformers' defaults.
COMMON: dict[str, Any] = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "dtype": None,
    "tie_word_embeddings": True,
    "problem_type": None,
    "architectures": None,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
}

_IDS = int | list[int] | None

# Types of these fields, and of fields in HARMLESS that other code reads.
TYPES: dict[str, Any] = {
    **dict.fromkeys(("return_dict", "output_hidden_states", "output_attentions"), bool | None),
    **dict.fromkeys(("is_encoder_decoder", "gradient_checkpointing", "tf_legacy_loss"), bool | None),
    "tie_word_embeddings": bool,
    "problem_type": str | None,
    "architectures": list[str] | None,
    "chunk_size_feed_forward": int | None,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "sep_token_id"), int | None),
    **dict.fromkeys(("eos_token_id", "decoder_start_token_id"), _IDS),
    **dict.fromkeys(("classifier_dropout", "hidden_dropout"), float | None),
    # How a sequence head locates the last token; see `HeadSpec.last_by`.
    "last_token_by": Literal["pad_id", "attention_mask"] | None,
    "prefix": str | None,
    "tokenizer_class": str | None,
    # Generation parameters in old files.
    **dict.fromkeys(("max_length", "min_length", "num_beams", "num_beam_groups", "top_k"), int | None),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), int | None),
    **dict.fromkeys(("num_return_sequences", "forced_bos_token_id"), int | None),
    **dict.fromkeys(("temperature", "top_p", "typical_p", "repetition_penalty"), float | None),
    **dict.fromkeys(("length_penalty", "diversity_penalty"), float | None),
    **dict.fromkeys(("do_sample", "output_scores", "return_dict_in_generate"), bool | None),
    "remove_invalid_values": bool | None,
    "early_stopping": bool | str | None,
    "bad_words_ids": list[list[int]] | None,
    "forced_eos_token_id": _IDS,
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), list[int] | None),
    "exponential_decay_length_penalty": tuple[int, float] | None,
}

# Fields that do not affect a model's outputs, or are read by other code (generation config, tokenizer, reader of
# quantised weights). They are kept and written back without a warning, in these groups:
HARMLESS: dict[str, str] = {
    "origin of the file": """
        transformers_version auto_map name tokenizer_name tokenizer_class finetuning_task task_specific_params prefix
        export_model_type file_name transformers.js_config sentence_transformers sbert_ce_default_activation_function
        unsloth_version unsloth_fixed vocab_type model_max_length max_sequence_length max_seq_length
        tokenizer_model_max_length tokenizer_padding_side padding_side
    """,
    "read elsewhere": """
        quantization_config sep_token_id decoder_start_token_id unk_token_id mask_token_id cls_token_id
        classifier_dropout hidden_dropout tf_legacy_loss gradient_checkpointing
    """,
    "generation": """
        max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
        temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
        encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
        forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens begin_suppress_tokens
        exponential_decay_length_penalty use_cache output_past
    """,
    "initialisation and training": """
        init_config init_device initializer_range init_std verbose neftune_noise_alpha pretraining_tp
        output_router_logits label_smoothing
    """,
    "options of this library, which have an effect": "last_token_by",
    "kernel selection": """
        attn_implementation use_bfloat16 use_flash_attention use_flash_attn flash_attn reorder_and_upcast_attn
    """,
    "components that these models do not have": """
        is_decoder cross_attention_hidden_size tie_encoder_decoder n_ctx n_special predict_special_tokens
        summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
        type_vocab_size
    """,
}
QUIET = frozenset(name for names in HARMLESS.values() for name in names.split())

# Fields of other models that change their outputs -> the values that describe what every family here computes anyway,
# and why others are refused. A family that declares such a field supports it; `PretrainedConfig.implied` adds more.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "is_encoder_decoder": ((False,), "all families here are single-stack models"),
    "add_cross_attention": ((False,), "no family here has cross-attention"),
    "torchscript": ((False,), "use torch.compile or torch.export on the model"),
    "pruned_heads": (({},), "save the checkpoint with its heads in place"),
    "chunk_size_feed_forward": ((0,), "feed-forward chunking is not implemented"),
    "attention_bias": ((False,), "this family's projections are fixed by its architecture"),
    "qkv_bias": ((False,), "this family's projections are fixed by its architecture"),
    "mlp_bias": ((False,), "this family's MLP is fixed by its architecture"),
    "attn_logit_softcapping": ((), "this family has no softcap on attention scores"),
    "final_logit_softcapping": ((), "this family has no softcap on logits"),
    "logit_scale": ((1.0,), "this family does not scale its logits"),
    "logits_scaling": ((1.0,), "this family does not scale its logits"),
    "embedding_multiplier": ((1.0,), "this family does not scale its embeddings"),
    "residual_multiplier": ((1.0,), "this family does not scale its residuals"),
    "attention_multiplier": ((), "this family's scale of attention scores is fixed"),
    "query_pre_attn_scalar": ((), "this family's scale of attention scores is fixed"),
    "use_qk_norm": ((False,), "this family does not normalise queries and keys"),
    "qk_norm": ((False,), "this family does not normalise queries and keys"),
    "parallel_attn": ((False,), "attention and MLP are sequential in every family here"),
    "use_parallel_residual": ((False,), "attention and MLP are sequential in every family here"),
    "alibi": ((False,), "ALiBi is an option of MPT's attn_config only"),
    "num_local_experts": ((0, 1), "no family here is a mixture of experts"),
    "num_experts": ((0, 1), "no family here is a mixture of experts"),
    "n_routed_experts": ((0,), "no family here is a mixture of experts"),
    "no_rope_layers": (([],), "RoPE is applied in every layer"),
    "no_rope_layer_interval": ((0,), "RoPE is applied in every layer"),
    "layer_types": ((), "this family's layers are all of one kind, or given by other fields"),
    "partial_rotary_factor": ((1.0,), "this family applies RoPE to whole heads, or not at all"),
    "rotary_pct": ((1.0,), "this family applies RoPE to whole heads, or not at all"),
    "use_bidirectional_attention": ((False,), "this family's mask is fixed"),
    "bidirectional": ((False,), "this family's mask is fixed"),
    "attention_sink": ((False,), "no family here has attention sinks"),
    "quantization": ((), "only MLX's bits and group_size are, as the one declaration of quantised weights"),
    "compression_config": (
        (),
        "weights compressed by other tools are not supported: use the original checkpoint",
    ),
}
