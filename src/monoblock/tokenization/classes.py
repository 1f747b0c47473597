"""The public tokenizer classes: each is `PreTrainedTokenizerFast` with one row of `families`."""

from __future__ import annotations

from monoblock.tokenization.families import GPT_NEOX
from monoblock.tokenization.fast import PreTrainedTokenizerFast


class GPTNeoXTokenizerFast(PreTrainedTokenizerFast):
    """The byte-level BPE of GPT-NeoX-20B, which MPT uses: `<|endoftext|>` begins, ends and stands for the unknown.

    `add_prefix_space=True` reads each text as if a space stood before it; `add_bos_token` and `add_eos_token`
    put `<|endoftext|>` around it.
    """

    family = GPT_NEOX


CLASSES: tuple[type[PreTrainedTokenizerFast], ...] = (PreTrainedTokenizerFast, GPTNeoXTokenizerFast)


def by_name(name: str) -> type[PreTrainedTokenizerFast] | None:
    """The class of a name in `tokenizer_config.json`, in the slow or the fast spelling."""
    return next((cls for cls in CLASSES if name in cls.family.names), None)


def by_model_type(model_type: str) -> type[PreTrainedTokenizerFast] | None:
    """The class that a model's family uses."""
    return next((cls for cls in CLASSES if model_type in cls.family.model_types), None)
