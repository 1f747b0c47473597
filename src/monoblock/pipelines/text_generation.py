"""text-generation: continuations of texts and conversations."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, ClassVar

from monoblock.pipelines.base import PipelineInput, is_stream, text
from monoblock.pipelines.generating import (
    GenerationPipeline,
    by_row,
    continues_last_message,
    is_chat,
    is_message,
)

TOKENIZER = ("add_special_tokens", "padding", "truncation", "max_length")


class TextGenerationPipeline(GenerationPipeline):
    """Continues texts and conversations.

    Inputs: a text, a conversation (a list of `{"role", "content"}`), or many of either. Returns a list of
    `{"generated_text": ...}`, one for each of `num_return_sequences`: the prompt with its continuation, or with
    `return_full_text=False` the continuation alone; for a conversation, the messages with the model's at the end.
    `return_tensors=True`: `{"generated_token_ids": ids}` instead. By default, unless the user or the model's files set
    other options, it samples at temperature 0.7, at most 256 new tokens.

    `prefix`: a text before every prompt that is not returned. `stop_sequence` (or `stop_strings`): strings that end the
    generation. `handle_long_generation="hole"`: truncates the beginning of the prompt so that the new tokens fit.
    `tools`, `documents`, `continue_final_message`: for the chat template. `max_length` also truncates the prompt, as in
    transformers; `tokenizer_encode_kwargs` holds options of the tokenizer alone. Other options go to `generate`.
    """

    task = "text-generation"
    settings: ClassVar[dict[str, Any]] = {
        "return_full_text": None,
        "return_tensors": None,
        "return_text": None,
        "clean_up_tokenization_spaces": None,
        "prefix": None,
        "handle_long_generation": None,
        "stop_sequence": None,
        "continue_final_message": None,
        "skip_special_tokens": True,
        "tokenizer_encode_kwargs": None,
        "tools": None,
        "documents": None,
        "add_special_tokens": None,
        "padding": None,
        "truncation": None,
    }
    generation_defaults: ClassVar[dict[str, Any]] = {
        "max_new_tokens": 256,
        "do_sample": True,
        "temperature": 0.7,
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokenizer.padding_side = "left"  # new tokens directly follow the prompt

    def checked(self, options: dict[str, Any]) -> dict[str, Any]:
        given = [n for n in ("return_full_text", "return_text", "return_tensors") if options[n] is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other: pass one")
        if options["return_text"] is False:
            raise ValueError("return_text=False selects no output: pass return_tensors=True for ids")
        if options["handle_long_generation"] not in (None, "hole"):
            raise ValueError(
                f"handle_long_generation={options['handle_long_generation']!r}: expected None or 'hole'"
            )
        return super().checked(options)

    def items(self, inputs: Any, options: dict[str, Any]) -> Any:
        if isinstance(inputs, Iterator):
            # A generator of messages is one conversation, any other generator a stream of inputs.
            first = next(inputs, None)
            if first is None:
                return []
            return _Conversation([first, *inputs]) if is_message(first) else chain([first], inputs)
        if is_chat(inputs):
            return _Conversation(inputs)
        return inputs if is_stream(inputs) else super().items(inputs, options)

    def rows(self, item: Any, options: dict[str, Any]) -> list[PipelineInput]:
        encode = {name: options[name] for name in TOKENIZER if options.get(name) is not None}
        encode |= options["tokenizer_encode_kwargs"] or {}
        if isinstance(item, _Conversation):
            item = item.chat
        if is_chat(item):
            encode.pop("add_special_tokens", None)  # the template adds them
            continue_last = continues_last_message(item, options["continue_final_message"])
            encoded = self.tokenizer.apply_chat_template(
                list(item),
                add_generation_prompt=not continue_last,
                continue_final_message=continue_last,
                tools=options["tools"],
                documents=options["documents"],
                **encode,
            )
        else:
            encoded = self.tokenizer(self._prefix(options) + text(item, self.task), **encode)
        inputs = self.model_inputs(encoded)
        inputs.pop("token_type_ids", None)  # generate takes none
        if not inputs["input_ids"]:
            inputs = {"input_ids": [self._start()], "attention_mask": [1]}
        if options["handle_long_generation"] == "hole":
            inputs = self._cut(inputs, options)
        return [PipelineInput(inputs, item)]

    def _prefix(self, options: dict[str, Any]) -> str:
        prefix = (
            getattr(self.model.config, "prefix", None) if options["prefix"] is None else options["prefix"]
        )
        return prefix or ""

    def _start(self) -> int:
        config = self.model.generation_config
        start = config.bos_token_id if config.bos_token_id is not None else self.tokenizer.bos_token_id
        if start is None:
            raise ValueError("the prompt is empty and the model has no bos token: pass a prompt")
        return start

    def _cut(self, inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        explicit = self.generation(options)[1]
        length = len(inputs["input_ids"])
        new = explicit.get("max_new_tokens") or explicit["max_length"] - length
        if self.limit is None or length + new <= self.limit:
            return inputs
        keep = self.limit - new
        if new < 0 or keep <= 0:
            raise ValueError(
                f"handle_long_generation='hole': {new} new tokens leave no room for a prompt within {self.limit}"
            )
        return {name: value[-keep:] for name, value in inputs.items()}

    def forward(self, batch: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        keywords, explicit = self.generation(options, len(batch["input_ids"][0]))
        if prefix := self._prefix(options):
            length = len(
                self.tokenizer(prefix, add_special_tokens=bool(options["add_special_tokens"])).input_ids
            )
            for whole, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
                if whole in explicit and new not in explicit:
                    keywords[whole] = explicit[whole] + length
        rows, width = len(batch["input_ids"]), len(batch["input_ids"][0])
        sequences = self.adapter.generate(batch, keywords)
        return {"sequences": by_row(sequences, rows), "width": [width] * rows}

    def answer(self, rows: list[PipelineInput], options: dict[str, Any]) -> Any:
        [row] = rows
        return [self._result(row, ids, options) for ids in row.output["sequences"]]

    def _result(self, row: PipelineInput, ids: list[int], options: dict[str, Any]) -> dict[str, Any]:
        if options["return_tensors"]:
            return {"generated_token_ids": ids}
        new: Any = self.tokenizer.decode(
            ids[row.output["width"] :],
            skip_special_tokens=options["skip_special_tokens"],
            clean_up_tokenization_spaces=options["clean_up_tokenization_spaces"],
        )
        prompt = row.info
        if options["return_full_text"] is False:
            return {"generated_text": new}
        if isinstance(prompt, str):
            return {"generated_text": prompt + new}
        if continues_last_message(prompt, options["continue_final_message"]):
            last = prompt[-1]
            return {"generated_text": [*prompt[:-1], {**last, "content": last["content"] + new}]}
        return {"generated_text": [*prompt, {"role": "assistant", "content": new}]}


class _Conversation:
    """One conversation, to tell it from a list of inputs."""

    def __init__(self, chat: Any) -> None:
        self.chat = chat
