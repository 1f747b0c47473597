"""Small configs of the six families in which every feature of the attention mask is visible on a short text. Imports no
framework."""

from __future__ import annotations

from typing import Any

import fuyu_tokenizer
import text_tokenizers

from monoblock import AutoConfig
from monoblock.tokenization import PreTrainedTokenizerFast
from monoblock.utils.attention_visualizer import AttentionMaskVisualizer

VOCAB = 2000
FIELDS: dict[str, dict[str, Any]] = {
    "mpt": {"d_model": 36, "n_heads": 6, "n_layers": 2, "attn_config": {"alibi_bias_max": 4}},
    "mistral": {
        "hidden_size": 36,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "sliding_window": 4,
    },
    "fuyu": {
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "patch_size": 4,
    },
    "openai-gpt": {"n_embd": 36, "n_layer": 2, "n_head": 6},
    "gpt_neo": {
        "hidden_size": 36,
        "num_layers": 4,
        "num_heads": 6,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 3,
    },
    "mpnet": {
        "hidden_size": 36,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "relative_attention_num_buckets": 12,
    },
}
WORDS = (" the", "the", " quick", " brown", " fox", " jumps", " over", " lazy", " dog", "def", " return")
TEXTS = ["the quick brown fox jumps over the lazy dog", "def f(n): return n + 1", "fox"]


def tokenizer(model_type: str, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, or Fuyu's."""
    if model_type == "fuyu":
        backend = fuyu_tokenizer.backend()
        return PreTrainedTokenizerFast(tokenizer_object=backend, **fuyu_tokenizer.SPECIAL, **options)
    backend = text_tokenizers.byte_level(*WORDS)
    backend.add_special_tokens(["<s>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", **options)


def config(model_type: str, **more: Any) -> Any:
    """A tiny config; Fuyu's has its tokenizer's image token id."""
    fields = {"vocab_size": VOCAB, "pad_token_id": 1, **FIELDS[model_type], **more}
    if model_type == "fuyu":
        fields["image_token_id"] = tokenizer("fuyu").convert_tokens_to_ids("|SPEAKER|")
    return AutoConfig.for_model(model_type, **fields)


def visualizer(model_type: str, **more: Any) -> AttentionMaskVisualizer:
    """A visualizer of that config and tokenizer."""
    return AttentionMaskVisualizer.from_config(config(model_type, **more), tokenizer(model_type))
