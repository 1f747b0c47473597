"""`lm`: predict each next token of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from monoblock.training.data import Record, read_documents
from monoblock.training.tasks.base import Evaluated, Example, Task, TokenRow, perplexity, shifted

_CHARACTERS = 1 << 20  # of a text that are tokenized together


class LanguageTask(Task):
    """Documents are cut into windows of the greatest length. Consecutive windows share one token, so that each token
    but a document's first is predicted once."""

    name = "lm"
    documents = True
    auto = "AutoModelForCausalLM"

    def read(self, path: str, *, train: bool = True) -> list[Record]:
        return read_documents(path, self.options.text_column, self.reading(train))

    def examples(self, records: Sequence[Record]) -> list[Example]:
        found: list[Example] = []
        for record in records:
            ids = self._ids(record.values["text"])
            for start in range(0, max(1, len(ids) - 1), self.limit - 1):
                window = ids[start : start + self.limit]
                if len(window) > 1:
                    row = TokenRow(window, shifted(window))
                    found.append(Example((row,), f"{record.where}, token {start}", len(found)))
        if not found:
            raise ValueError(f"{records[0].where}: the texts have fewer than two tokens")
        return found

    def _ids(self, text: str) -> np.ndarray:
        """The ids of a document, with the tokenizer's token before a text, if any, and the end token after it."""
        parts = [
            self.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            for part in _parts(text)
        ]
        # Special tokens that the tokenizer adds before a text begin it; those after it give way to the end token.
        around = self.tokenizer.build_inputs_with_special_tokens(parts[0][:1])
        special = [*self.tokenizer.get_special_tokens_mask(parts[0][:1]), 0]
        before = around[: special.index(0)] if parts[0] else []
        end = self.tokenizer.eos_token_id
        after = [] if end is None else [end]
        return np.array([*before, *(i for part in parts for i in part), *after], dtype=np.int32)

    def prompt(self, text: str) -> list[int]:
        ids = self._ids(text).tolist()
        return ids if self.tokenizer.eos_token_id is None else ids[:-1]

    def metrics(self, results: Sequence[Evaluated], loss: float) -> dict[str, float]:
        del results
        return {"perplexity": perplexity(loss)}


def _parts(text: str) -> Iterator[str]:
    """A long text in parts that end with a line, before a character that is no space: there, byte-level tokenizers
    separate tokens anyway."""
    start = 0
    while len(text) - start > _CHARACTERS:
        end = text.find("\n", start + _CHARACTERS)
        while 0 <= end < len(text) - 1 and text[end + 1].isspace():
            end = text.find("\n", end + 1)
        if end < 0 or end >= len(text) - 1:
            break
        yield text[start : end + 1]
        start = end + 1
    yield text[start:]
