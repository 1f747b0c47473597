"""`chat`: answer in conversations; only the assistant's tokens have a loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monoblock.field_types import brief
from monoblock.texts import read_text
from monoblock.training.data import Record, read_records
from monoblock.training.tasks.base import IGNORED, Evaluated, Example, Task, TokenRow, perplexity

ASSISTANT = "assistant"


class ConversationTask(Task):
    """Records have `messages`, a list of {"role", "content"}, in the form of the tokenizer's chat template. The
    assistant's tokens are those of the template's generation blocks; without these, what a message of the assistant
    adds to the prompt before it."""

    name = "chat"
    auto = "AutoModelForCausalLM"

    def read(self, path: str, *, train: bool = True) -> list[Record]:
        if self.options.chat_template is not None and not Path(self.options.chat_template).is_file():
            raise FileNotFoundError(f"{self.options.chat_template}: there is no such chat template")
        records = read_records(path, self.reading(train))
        for record in records:
            messages(record)
        return records

    def bind(self, tokenizer: Any, limit: int) -> None:
        super().bind(tokenizer, limit)
        if self.options.chat_template is not None:
            tokenizer.chat_template = read_text(Path(self.options.chat_template))
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: give a file of one with chat_template")

    def examples(self, records: Sequence[Record]) -> list[Example]:
        found: list[Example] = []
        for number, record in enumerate(records):
            row = conversation(self.tokenizer, messages(record), record, self.limit)
            if row.labels is None or not (row.labels != IGNORED).any():
                self.skipped += 1
                continue
            found.append(Example((row,), record.where, number))
        if not found:
            raise ValueError(
                f"{records[0].where}: no conversation has a token of the assistant in its first {self.limit} tokens; "
                "raise max_length"
            )
        return found

    def prompt(self, text: str) -> list[int]:
        chat = [{"role": "user", "content": text}]
        try:
            return list(self.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
        except ValueError as error:  # of the template
            raise ValueError(f"sample_prompt {brief(text)}: {error}") from None

    def metrics(self, results: Sequence[Evaluated], loss: float) -> dict[str, float]:
        del results
        return {"perplexity": perplexity(loss)}


def messages(record: Record) -> list[dict[str, Any]]:
    """The conversation of a record; ValueError if it is none, or without an assistant's message."""
    found = record.get("messages")
    if not isinstance(found, list) or not found:
        raise record.error("'messages' must be a list of {role, content}, with at least one message")
    for message in found:
        known = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not known or not isinstance(message.get("content"), str):
            raise record.error("each message must have a 'role' and a 'content' that are strings")
    if all(message["role"] != ASSISTANT for message in found):
        raise record.error("no message has the role 'assistant', so there is nothing to learn")
    return found


def conversation(tokenizer: Any, chat: list[dict[str, Any]], record: Record, limit: int) -> TokenRow:
    """The first `limit` tokens of a conversation, with labels of the assistant's."""
    template = tokenizer.get_chat_template()
    try:
        if "generation" in template and "endgeneration" in template:
            encoded = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)
            ids, own = list(encoded["input_ids"]), [bool(x) for x in encoded["assistant_masks"]]
        else:
            ids, own = _by_prefixes(tokenizer, chat)
    except ValueError as error:  # of the template
        raise record.error(str(error)) from None
    array = np.array(ids[:limit], dtype=np.int32)
    labels = np.where(np.array(own[:limit], dtype=bool), array, IGNORED).astype(np.int64)
    labels[:1] = IGNORED
    return TokenRow(array, labels)


def _by_prefixes(tokenizer: Any, chat: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """Ids, and which are the assistant's: those after the text of the prompt of each of its messages."""
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(chat):
        if message["role"] == ASSISTANT:
            prompt = tokenizer.apply_chat_template(chat[:number], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(chat[: number + 1], tokenize=False)
            if not whole.startswith(prompt) or not text.startswith(whole):
                raise ValueError(
                    "the chat template renders the beginning of this conversation differently alone, so the "
                    "assistant's tokens cannot be located: add {% generation %} blocks to the template"
                )
            spans.append((len(prompt), len(whole)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    own = [any(begin < high and low < end for begin, end in spans) for low, high in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), own
