"""The fields that configs of all families share: their defaults, the quiet ones, and the refused ones."""

from __future__ import annotations

from typing import Any, Literal

# Fields that every config of the hub has, with the hub's defaults.
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

# The types of these, and of the quiet fields that something reads.
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
    # By what a head over texts finds their last token; see `HeadSpec.last_by`.
    "last_token_by": Literal["pad_id", "attention_mask"] | None,
    "prefix": str | None,
    "tokenizer_class": str | None,
    # What old files say about generation.
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

# Fields that say nothing about the model (in old files), or that others take over: a generation config, or how weights
# are packed. They are kept and written back; no warning is due.
QUIET = frozenset(
    [
        "transformers_version",
        "auto_map",
        "quantization_config",
        "tokenizer_class",
        "finetuning_task",
        "task_specific_params",
        "prefix",
        "is_decoder",
        "add_cross_attention",
        "cross_attention_hidden_size",
        "tie_encoder_decoder",
        "pruned_heads",
        "torchscript",
        "use_bfloat16",
        "sep_token_id",
        "decoder_start_token_id",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "suppress_tokens",
        "begin_suppress_tokens",
        "exponential_decay_length_penalty",
        "tf_legacy_loss",
        "classifier_dropout",
        "hidden_dropout",
        "gradient_checkpointing",
        "last_token_by",
        "n_ctx",
        "n_special",
        "predict_special_tokens",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    ]
)

# Values that no family here can honour; any other value of these fields is fine.
REFUSED: dict[str, tuple[Any, str]] = {
    "is_encoder_decoder": (False, "all families here are single-stack models"),
    "add_cross_attention": (False, "no family here has cross-attention"),
    "torchscript": (False, "use torch.compile or torch.export on the model"),
    "pruned_heads": ({}, "save the checkpoint with its heads in place"),
    "chunk_size_feed_forward": (0, "feed-forward chunking is not implemented"),
}
