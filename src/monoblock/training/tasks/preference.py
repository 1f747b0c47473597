"""`preference`: prefer one of two answers to a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monoblock.field_types import brief
from monoblock.texts import read_text
from monoblock.training.data import Record, read_records
from monoblock.training.tasks.base import IGNORED, Evaluated, Example, Task, TokenRow


class PreferenceTask(Task):
    """Records have a `prompt`, a `chosen` and a `rejected` answer: texts, which are joined as they are, or lists of
    messages in the form of the chat template. Answers end with the end token; only their tokens have a probability."""

    name = "preference"
    auto = "AutoModelForCausalLM"
    loss = "preferences"

    def read(self, path: str, *, train: bool = True) -> list[Record]:
        template = self.options.chat_template
        if template is not None and not Path(template).is_file():
            raise FileNotFoundError(f"{template}: there is no such chat template")
        records = read_records(path, self.reading(train))
        for record in records:
            _parts(record)
        return records

    def bind(self, tokenizer: Any, limit: int) -> None:
        super().bind(tokenizer, limit)
        if self.options.chat_template is not None:
            tokenizer.chat_template = read_text(Path(self.options.chat_template))

    def examples(self, records: Sequence[Record]) -> list[Example]:
        found: list[Example] = []
        for number, record in enumerate(records):
            prompt, *answers = _parts(record)
            rows = tuple(self._row(prompt, answer, record) for answer in answers)
            if any(row is None for row in rows):
                self.skipped += 1
                continue
            found.append(Example(tuple(row for row in rows if row is not None), record.where, number))
        if not found:
            raise ValueError(
                f"{records[0].where}: no prompt leaves room for an answer in {self.limit} tokens; raise max_length"
            )
        return found

    def _row(self, prompt: Any, answer: Any, record: Record) -> TokenRow | None:
        """The tokens of a prompt and an answer; None if the prompt has no answer in the first `limit` tokens."""
        end = self.tokenizer.eos_token_id
        if isinstance(prompt, str):
            before = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
            after = self.tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            first, whole = self._rendered(prompt, answer, record)
            before = self.tokenizer(first, add_special_tokens=False, verbose=False)["input_ids"]
            after = self.tokenizer(whole[len(first) :], add_special_tokens=False, verbose=False)["input_ids"]
        if end is not None and (not after or after[-1] != end):
            after = [*after, end]
        ids = np.array([*before, *after][: self.limit], dtype=np.int32)
        if len(before) >= len(ids) or not before:
            return None
        labels = ids.astype(np.int64)
        labels[: len(before)] = IGNORED
        return TokenRow(ids, labels)

    def _rendered(self, prompt: Any, answer: Any, record: Record) -> tuple[str, str]:
        """The text of the prompt, and of the prompt with the answer."""
        render = self.tokenizer.apply_chat_template
        try:
            first = render(prompt, tokenize=False, add_generation_prompt=True)
            whole = render([*prompt, *answer], tokenize=False)
        except ValueError as error:  # of the template, or there is none
            raise record.error(str(error)) from None
        if not whole.startswith(first):
            raise record.error("the chat template renders the prompt differently with an answer after it")
        return first, whole

    def metrics(self, results: Sequence[Evaluated], loss: float) -> dict[str, float]:
        del loss
        margins = np.array([result.outputs for result in results])
        return {"accuracy": float((margins > 0).mean()), "margin": float(margins.mean())}


def _parts(record: Record) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected answer: three texts, or three lists of messages."""
    values = tuple(record.get(name) for name in ("prompt", "chosen", "rejected"))
    if all(isinstance(value, str) for value in values):
        for name in ("prompt", "chosen", "rejected"):
            record.text(name)
    elif not all(_is_conversation(value) for value in values):
        raise record.error(
            "'prompt', 'chosen' and 'rejected' must be texts, or lists of {role, content}, got "
            + ", ".join(brief(value) for value in values)
        )
    if values[1] == values[2]:
        raise record.error("'chosen' and 'rejected' are the same answer")
    prompt, chosen, rejected = values
    return prompt, chosen, rejected


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
            for one in value
        )
    )
