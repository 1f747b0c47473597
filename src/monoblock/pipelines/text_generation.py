"""text-generation: texts and conversations that the model continues."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, ClassVar

from monoblock.pipelines.base import PipelineInput, is_stream, text
from monoblock.pipelines.generating import Generating, carries_on, is_chat, is_message, split

TOKENIZER = ("add_special_tokens", "padding", "truncation", "max_length")


class TextGenerationPipeline(Generating):
    """Continues texts and conversations.

    Inputs: a text, a conversation (a list of `{"role", "content"}`), or many of either. Gives a list of
    `{"generated_text": ...}`, one for each of `num_return_sequences`: the whole text, or with
    `return_full_text=False` what is new; a conversation comes back with the model's message at its end.
    `return_tensors=True`: `{"generated_token_ids": ids}` instead. Without other word from the user or the model's files
    it samples at temperature 0.7, up to 256 new tokens.

    `prefix`: a text before every prompt that is not given back. `stop_sequence` (or `stop_strings`): texts that end a
    reply. `handle_long_generation="hole"`: cut the prompt's beginning so that the new tokens fit. `tools`, `documents`,
    `continue_final_message`: for the chat template. `max_length` also cuts the prompt, as on the hub;
    `tokenizer_encode_kwargs` holds what is for the tokenizer alone. The rest is `generate`'s.
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
        self.tokenizer.padding_side = "left"  # new tokens follow the last of the prompt

    def checked(self, options: dict[str, Any]) -> dict[str, Any]:
        given = [n for n in ("return_full_text", "return_text", "return_tensors") if options[n] is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other: give one")
        if options["return_text"] is False:
            raise ValueError("return_text=False says not what to return: give return_tensors=True for ids")
        if options["handle_long_generation"] not in (None, "hole"):
            raise ValueError(
                f"handle_long_generation={options['handle_long_generation']!r}: expected None or 'hole'"
            )
        return super().checked(options)

    def items(self, inputs: Any, options: dict[str, Any]) -> Any:
        if isinstance(inputs, Iterator):
            # A generator of messages is one conversation; otherwise it is a stream of inputs.
            first = next(inputs, None)
            if first is None:
                return []
            return _One([first, *inputs]) if is_message(first) else chain([first], inputs)
        if is_chat(inputs):
            return _One(inputs)
        return inputs if is_stream(inputs) else super().items(inputs, options)

    def rows(self, item: Any, options: dict[str, Any]) -> list[PipelineInput]:
        encode = {name: options[name] for name in TOKENIZER if options.get(name) is not None}
        encode |= options["tokenizer_encode_kwargs"] or {}
        if isinstance(item, _One):
            item = item.chat
        if is_chat(item):
            encode.pop("add_special_tokens", None)  # the template writes them
            carry_on = carries_on(item, options["continue_final_message"])
            encoded = self.tokenizer.apply_chat_template(
                list(item),
                add_generation_prompt=not carry_on,
                continue_final_message=carry_on,
                tools=options["tools"],
                documents=options["documents"],
                **encode,
            )
        else:
            encoded = self.tokenizer(self._prefix(options) + text(item, self.task), **encode)
        inputs = self.model_inputs(encoded)
        inputs.pop("token_type_ids", None)  # of which generation takes none
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
            raise ValueError(
                "the prompt is empty and the model has no token that begins a text: give a prompt"
            )
        return start

    def _cut(self, inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        said = self.generation(options)[1]
        length = len(inputs["input_ids"])
        new = said.get("max_new_tokens") or said["max_length"] - length
        if self.limit is None or length + new <= self.limit:
            return inputs
        keep = self.limit - new
        if new < 0 or keep <= 0:
            raise ValueError(
                f"handle_long_generation='hole': {new} new tokens leave no room for a prompt within {self.limit}"
            )
        return {name: value[-keep:] for name, value in inputs.items()}

    def forward(self, batch: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        keywords, said = self.generation(options, len(batch["input_ids"][0]))
        if prefix := self._prefix(options):
            length = len(
                self.tokenizer(prefix, add_special_tokens=bool(options["add_special_tokens"])).input_ids
            )
            for whole, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
                if whole in said and new not in said:
                    keywords[whole] = said[whole] + length
        rows, width = len(batch["input_ids"]), len(batch["input_ids"][0])
        sequences = self.adapter.generate(batch, keywords)
        return {"sequences": split(sequences, rows), "width": [width] * rows}

    def answer(self, rows: list[PipelineInput], options: dict[str, Any]) -> Any:
        [row] = rows
        return [self._record(row, ids, options) for ids in row.output["sequences"]]

    def _record(self, row: PipelineInput, ids: list[int], options: dict[str, Any]) -> dict[str, Any]:
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
        if carries_on(prompt, options["continue_final_message"]):
            last = prompt[-1]
            return {"generated_text": [*prompt[:-1], {**last, "content": last["content"] + new}]}
        return {"generated_text": [*prompt, {"role": "assistant", "content": new}]}


class _One:
    """One conversation, which is a list but not many inputs."""

    def __init__(self, chat: Any) -> None:
        self.chat = chat
