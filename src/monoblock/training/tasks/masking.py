"""`fill-mask`: predict tokens that are hidden (Devlin et al., arXiv 1810.04805, section 3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from monoblock.training.data import Record, read_documents
from monoblock.training.tasks.base import IGNORED, Evaluated, Example, Task, TokenRow, perplexity

_MASKED, _RANDOM = 0.8, 0.1  # of the chosen tokens; the rest keeps its id


class FillMaskTask(Task):
    """Documents are cut into windows with the tokenizer's special tokens around each. In each epoch other tokens are
    chosen, at least one of each window; with whole_word all tokens of a word together."""

    name = "fill-mask"
    documents = True
    auto = "AutoModelForMaskedLM"
    outputs = "best"

    def read(self, path: str, *, train: bool = True) -> list[Record]:
        return read_documents(path, self.options.text_column, self.reading(train))

    def bind(self, tokenizer: Any, limit: int) -> None:
        super().bind(tokenizer, limit)
        if tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token: the task fill-mask needs one")

    def examples(self, records: Sequence[Record]) -> list[Example]:
        found: list[Example] = []
        room = self.limit - self.tokenizer.num_special_tokens_to_add()
        if room < 1:
            raise ValueError(f"max_length={self.limit} leaves no room for text between the special tokens")
        for record in records:
            encoded = self.tokenizer(record.values["text"], add_special_tokens=False, verbose=False)
            ids, words = list(encoded["input_ids"]), encoded.word_ids()
            for start in range(0, len(ids), room):
                window = ids[start : start + room]
                whole = list(self.tokenizer.build_inputs_with_special_tokens(window))
                special = np.array(self.tokenizer.get_special_tokens_mask(window), dtype=bool)
                owners = np.full(
                    len(whole), -1, dtype=np.int64
                )  # the word of each token; -1: a special token
                own = words[start : start + room] if self.options.whole_word else np.arange(len(window))
                owners[~special] = own
                row = TokenRow(np.array(whole, dtype=np.int32), np.full(len(whole), IGNORED, dtype=np.int64))
                where = f"{record.where}, token {start}"
                found.append(Example((row,), where, len(found), notes={"words": owners}))
        if not found:
            raise ValueError(f"{records[0].where}: the texts have no tokens")
        return found

    def drawn(self, example: Example, rng: np.random.Generator) -> Example:
        (row,) = example.rows
        owners = example.notes["words"]
        words = np.unique(owners[owners >= 0])
        chosen = words[rng.random(len(words)) < self.options.mask_probability]
        if not len(chosen):
            chosen = rng.choice(words, 1)
        hidden = np.isin(owners, chosen)
        labels = np.where(hidden, row.ids, IGNORED).astype(np.int64)
        kind = rng.random(len(owners))
        ids = row.ids.copy()
        ids[hidden & (kind < _MASKED)] = self.tokenizer.mask_token_id
        other = hidden & (kind >= _MASKED) & (kind < _MASKED + _RANDOM)
        ids[other] = rng.integers(0, self.tokenizer.vocab_size, int(other.sum()))
        return dataclasses.replace(example, rows=(TokenRow(ids, labels),))

    def metrics(self, results: Sequence[Evaluated], loss: float) -> dict[str, float]:
        right = total = 0
        for result in results:
            labels = result.example.rows[0].labels
            assert labels is not None
            chosen = labels != IGNORED
            right += int((result.outputs == labels)[chosen].sum())
            total += int(chosen.sum())
        return {"perplexity": perplexity(loss), "accuracy": right / total}
