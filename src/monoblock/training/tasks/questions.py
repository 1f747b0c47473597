"""`qa`: the answer to a question as a span of a context (Rajpurkar et al., arXiv 1606.05250)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from monoblock.field_types import brief
from monoblock.training import scores
from monoblock.training.data import Record, read_records
from monoblock.training.tasks.base import Evaluated, Example, Task, TokenRow

_LONGEST = 30  # tokens of an answer


class QuestionTask(Task):
    """Records have a `question`, a `context`, and `answers` with the lists `text` and `answer_start` (characters),
    empty if the context has no answer; or they are SQuAD's nested `data`. A context that is longer than the row is
    divided into windows that overlap by `doc_stride` tokens; the answer of a window without the answer is its first
    token."""

    name = "qa"
    auto = "AutoModelForQuestionAnswering"
    outputs = "logits"
    targets = ("start_positions", "end_positions")

    def read(self, path: str, *, train: bool = True) -> list[Record]:
        records = [one for record in read_records(path, self.reading(train)) for one in _flattened(record)]
        for record in records:
            record.text("question")
            record.text("context")
            _answers(record)
        if not records:
            raise ValueError(f"{path} is empty: it has no question")
        return records

    def examples(self, records: Sequence[Record]) -> list[Example]:
        found: list[Example] = []
        for number, record in enumerate(records):
            encoded = self.tokenizer(
                [record.values["question"]],
                [record.values["context"]],
                truncation="only_second",
                max_length=self.limit,
                stride=self.options.doc_stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                verbose=False,
            )
            texts, starts = _answers(record)
            for window, ids in enumerate(encoded["input_ids"]):
                own = [kind == 1 for kind in encoded.sequence_ids(window)]
                offsets = np.array(encoded["offset_mapping"][window], dtype=np.int64)
                offsets[~np.array(own)] = -1
                target = (0, 0)
                if texts:
                    target = _tokens(offsets, starts[0], starts[0] + len(texts[0])) or (0, 0)
                notes = {"offsets": offsets, "context": record.values["context"], "answers": texts}
                row = TokenRow(np.array(ids, dtype=np.int32))
                found.append(Example((row,), record.where, number, target, notes))
        return found

    def metrics(self, results: Sequence[Evaluated], loss: float) -> dict[str, float]:
        del loss
        windows: dict[int, list[Evaluated]] = {}
        for result in results:
            windows.setdefault(result.example.group, []).append(result)
        pairs = [
            (_answer(found), list(found[0].example.notes["answers"]) or [""]) for found in windows.values()
        ]
        return scores.answers(pairs)


def _tokens(offsets: np.ndarray, start: int, end: int) -> tuple[int, int] | None:
    """The first and the last token of characters `start` to `end` of the context; None: the window does not have them
    all. `offsets` (tokens, 2): -1 for tokens that are not the context's."""
    inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end) & (offsets[:, 0] >= 0))
    if not len(inside) or offsets[inside[0], 0] > start or offsets[inside[-1], 1] < end:
        return None
    return int(inside[0]), int(inside[-1])


def _answer(windows: Sequence[Evaluated]) -> str:
    """The text of the span with the highest score in all windows of a question; "" if that of the first token is higher
    in each of them."""
    best, text = -np.inf, ""
    for window in windows:
        start, end = window.outputs
        offsets = window.example.notes["offsets"]
        null = float(start[0] + end[0])
        own = offsets[:, 0] >= 0
        total = np.where(own[:, None] & own[None], start[:, None] + end[None], -np.inf)
        total = np.triu(total) + np.tril(np.full(total.shape, -np.inf), -1)
        total[np.triu_indices(len(total), _LONGEST)] = -np.inf
        first, last = np.unravel_index(int(total.argmax()), total.shape)
        score = float(total[first, last]) - null
        if score > max(best, 0.0):
            best = score
            text = window.example.notes["context"][offsets[first, 0] : offsets[last, 1]]
    return text


def _flattened(record: Record) -> Iterator[Record]:
    """The questions of SQuAD's nested form; other records unchanged."""
    articles = record.values.get("data")
    if not isinstance(articles, list) or record.has("question"):
        yield record
        return
    for i, article in enumerate(articles):
        for j, paragraph in enumerate(_list(article, "paragraphs", f"{record.where}, data[{i}]")):
            where = f"{record.where}, data[{i}].paragraphs[{j}]"
            for k, question in enumerate(_list(paragraph, "qas", where)):
                own = f"{where}.qas[{k}]"
                if not isinstance(question, dict):
                    raise ValueError(f"{own}: expected an object, got {brief(question)}")
                found = [one for one in _list(question, "answers", own) if not question.get("is_impossible")]
                if not all(isinstance(one, dict) for one in found):
                    raise ValueError(f"{own}: answers must be objects, got {brief(found)}")
                answers = {
                    "text": [one.get("text") for one in found],
                    "answer_start": [one.get("answer_start") for one in found],
                }
                yield Record(
                    own,
                    {
                        "question": question.get("question"),
                        "context": paragraph.get("context"),
                        "answers": answers,
                    },
                )


def _list(value: Any, name: str, where: str) -> list[Any]:
    found = cast("dict[str, Any]", value).get(name) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"{where}: {name!r} must be a list, got {brief(found)}")
    return found


def _answers(record: Record) -> tuple[list[str], list[int]]:
    """The texts of the answers and where they begin. ValueError: the context has another text there."""
    value = record.get("answers")
    if isinstance(value, str):  # of a CSV file
        try:
            value = json.loads(value)
        except ValueError:
            raise record.error(f"'answers' must be an object, got {brief(value)}") from None
    texts = value.get("text") if isinstance(value, Mapping) else None
    starts = value.get("answer_start") if isinstance(value, Mapping) else None
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise record.error(
            "'answers' must have the lists 'text' and 'answer_start' of equal length, got " + brief(value)
        )
    context = record.values["context"]
    for text, start in zip(texts, starts, strict=True):
        right = isinstance(text, str) and text and isinstance(start, int) and not isinstance(start, bool)
        if not right or start < 0 or context[start : start + len(text)] != text:
            raise record.error(
                f"the context does not have the answer {brief(text)} at character {brief(start)}"
            )
    return texts, starts
