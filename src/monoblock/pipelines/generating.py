"""The base of pipelines that call `generate`: its arguments, their defaults, and conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from monoblock.generation.config import GenerationConfig, as_own_config
from monoblock.generation.prompt import ARGUMENT_NAMES
from monoblock.generation.resolve import UNSUPPORTED_ARGUMENTS
from monoblock.pipelines.base import Pipeline

FIELDS = GenerationConfig.FIELDS
# Arguments of `generate` that are not fields, without those that the pipeline sets; `generate` refuses the unsupported.
CALL = (ARGUMENT_NAMES | UNSUPPORTED_ARGUMENTS.keys()) - {
    "inputs",
    "input_ids",
    "attention_mask",
    "tokenizer",
}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


class GenerationPipeline(Pipeline):
    """A pipeline that calls `generate`.

    Options that are set neither by the user nor by the model's generation_config.json come from `generation_defaults`;
    those of sampling only with `do_sample=True`.
    """

    heads = ("causal",)
    more = FIELDS | CALL
    generation_defaults: ClassVar[dict[str, Any]] = {}

    def merged(self, call: dict[str, Any]) -> dict[str, Any]:
        given = super().merged(call)
        if call.get("generation_config") is not None:  # replaces the constructor's generation options
            given = {k: v for k, v in given.items() if k in call or k not in self.more}
        return given

    def checked(self, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("return_dict_in_generate"):
            raise ValueError(
                "return_dict_in_generate=True is not supported in a pipeline: call model.generate for scores"
            )
        if (stop := options.get("stop_sequence")) is not None:
            options = options | {"stop_strings": [stop] if isinstance(stop, str) else stop}
        return options

    def generation(self, options: dict[str, Any], length: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
        """The keywords of `generate` for prompts of that length, and all generation options that any source sets."""
        given = {name: value for name, value in options.items() if name in self.more}
        explicit: dict[str, Any] = {}
        for config in (self.model.generation_config, given.get("generation_config")):
            own = as_own_config(config)
            explicit |= own.set_fields() if own is not None else {}
        explicit |= given
        defaults = dict(self.generation_defaults)
        if self.tokenizer.pad_token_id is not None:
            defaults["pad_token_id"] = self.tokenizer.pad_token_id
        missing = {name: value for name, value in defaults.items() if name not in explicit}
        if "max_length" in explicit:
            missing.pop("max_new_tokens", None)
        if "max_new_tokens" in missing and (room := self.model.room(length)) is not None:
            missing["max_new_tokens"] = max(1, min(missing["max_new_tokens"], room))
        if not {**missing, **explicit}.get("do_sample"):
            missing = {name: value for name, value in missing.items() if name not in SAMPLING}
        if explicit.get("stop_strings") or explicit.get("response_format") is not None:
            given["tokenizer"] = self.tokenizer
        return {**given, **missing}, {**explicit, **missing}


def is_chat(item: Any) -> bool:
    """Whether `item` is one conversation: messages with a role and a content."""
    return isinstance(item, list | tuple) and bool(item) and is_message(item[0])


def is_message(item: Any) -> bool:
    """Whether `item` is a message of a conversation."""
    return isinstance(item, Mapping) and "role" in item


def continues_last_message(chat: Any, wanted: bool | None) -> bool:
    """Whether the model continues the last message; by default if it is the assistant's."""
    return chat[-1]["role"] == "assistant" if wanted is None else wanted


def by_row(sequences: list[list[int]], rows: int) -> list[list[list[int]]]:
    """The sequences, grouped by row."""
    each = len(sequences) // rows
    return [sequences[i * each : (i + 1) * each] for i in range(rows)]
