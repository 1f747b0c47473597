"""What the generating pipelines share: the arguments of `generate`, its defaults here, and chats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from monoblock.generation.config import GenerationConfig, as_own_config
from monoblock.generation.prompt import ARGUMENT_NAMES
from monoblock.generation.resolve import UNSUPPORTED_ARGUMENTS
from monoblock.pipelines.base import Pipeline

FIELDS = GenerationConfig.FIELDS
# Arguments of the call that are no fields, but for those that the pipeline makes; what is refused, `generate` refuses.
CALL = (ARGUMENT_NAMES | UNSUPPORTED_ARGUMENTS.keys()) - {
    "inputs",
    "input_ids",
    "attention_mask",
    "tokenizer",
}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


class Generating(Pipeline):
    """A pipeline that calls `generate`.

    What neither the user nor the model's generation_config.json says is taken from `generation_defaults`, sampling
    settings only when sampling.
    """

    heads = ("causal",)
    more = FIELDS | CALL
    generation_defaults: ClassVar[dict[str, Any]] = {}

    def merged(self, call: dict[str, Any]) -> dict[str, Any]:
        given = super().merged(call)
        if call.get("generation_config") is not None:  # it replaces what the constructor said of generation
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
        """The keywords of `generate` for prompts of that length, and all that is set about generation, by whomever."""
        given = {name: value for name, value in options.items() if name in self.more}
        said: dict[str, Any] = {}
        for config in (self.model.generation_config, given.get("generation_config")):
            own = as_own_config(config)
            said |= own.set_fields() if own is not None else {}
        said |= given
        defaults = dict(self.generation_defaults)
        if self.tokenizer.pad_token_id is not None:
            defaults["pad_token_id"] = self.tokenizer.pad_token_id
        missing = {name: value for name, value in defaults.items() if name not in said}
        if "max_length" in said:
            missing.pop("max_new_tokens", None)
        if "max_new_tokens" in missing and (room := self.model.room(length)) is not None:
            missing["max_new_tokens"] = max(1, min(missing["max_new_tokens"], room))
        if not {**missing, **said}.get("do_sample"):
            missing = {name: value for name, value in missing.items() if name not in SAMPLING}
        if said.get("stop_strings") or said.get("response_format") is not None:
            given["tokenizer"] = self.tokenizer
        return {**given, **missing}, {**said, **missing}


def is_chat(item: Any) -> bool:
    """Whether it is one conversation: messages with a role and a content."""
    return isinstance(item, list | tuple) and bool(item) and is_message(item[0])


def is_message(item: Any) -> bool:
    """Whether it is a message of a conversation."""
    return isinstance(item, Mapping) and "role" in item


def carries_on(chat: Any, wanted: bool | None) -> bool:
    """Whether the model goes on with the last message: so by default where that is the assistant's."""
    return chat[-1]["role"] == "assistant" if wanted is None else wanted


def split(sequences: list[list[int]], rows: int) -> list[list[list[int]]]:
    """The sequences of each row."""
    each = len(sequences) // rows
    return [sequences[i * each : (i + 1) * each] for i in range(rows)]
