"""question-answering: the span of a context that answers a question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from monoblock.pipelines.arrays import softmax
from monoblock.pipelines.base import Pipeline, PipelineInput, count_or_none, is_stream

MAX_SEQ_LEN, DOC_STRIDE = 384, 128  # transformers' defaults, within the model's maximum length


class Span(NamedTuple):
    """Tokens `start` to `end`, both included, and the probability of that answer."""

    start: int
    end: int
    score: float


class _ContextChunk(NamedTuple):
    context: str
    encoding: Any  # of the tokenizers library
    is_context: np.ndarray  # [tokens], True for tokens of the context
    null: int | None  # index of the token whose span stands for "no answer"


class QuestionAnsweringPipeline(Pipeline):
    """Extracts answers from contexts.

    Inputs: `question=` and `context=` (strings, or lists of which one may be a single string for all), or one or many
    of `{"question": ..., "context": ...}`. Returns `{"score", "start", "end", "answer"}`, a list of the best with
    `top_k` above 1; `start` and `end` are character offsets in the context.

    Contexts that do not fit in `max_seq_len` tokens (default 384, or the model's maximum) are split into chunks that
    overlap by `doc_stride` tokens (default 128, at most half a chunk). `max_answer_len`: maximum of tokens of an
    answer. `max_question_len`: maximum of tokens of a question; the rest is truncated. `handle_impossible_answer`:
    allows the answer "". `align_to_words`: answers begin and end at word boundaries.
    """

    task = "question-answering"
    heads = ("span",)
    settings: ClassVar[dict[str, Any]] = {
        "top_k": 1,
        "doc_stride": None,
        "max_answer_len": 15,
        "max_seq_len": None,
        "max_question_len": 64,
        "handle_impossible_answer": False,
        "align_to_words": True,
    }
    by_token = ("start", "end")

    def __call__(self, *inputs: Any, question: Any = None, context: Any = None, **options: Any) -> Any:
        """The answers to these questions."""
        if (
            (question is None) != (context is None)
            or bool(inputs) == (question is not None)
            or len(inputs) > 1
        ):
            raise ValueError(
                "pass question= and context=, or one {'question': ..., 'context': ...}, or a list of those"
            )
        asked = inputs[0] if inputs else _paired(question, context)
        if isinstance(asked, list | tuple) and len(asked) == 1:
            asked = asked[0]  # as in transformers: a list of one returns no list
        return super().__call__(asked, **options)

    def checked(self, options: dict[str, Any]) -> dict[str, Any]:
        for name in ("top_k", "max_answer_len", "max_question_len"):
            if count_or_none(name, options[name]) is None:
                options = options | {name: self.settings[name]}
        limit = MAX_SEQ_LEN if self.limit is None else min(self.limit, MAX_SEQ_LEN)
        size = limit if options["max_seq_len"] is None else options["max_seq_len"]
        if (stride := options["doc_stride"]) is not None and stride > size:
            raise ValueError(f"doc_stride={stride} is more than max_seq_len={size}: use a smaller one")
        return options | {"max_seq_len": size}

    def items(self, inputs: Any, options: dict[str, Any]) -> Any:
        inputs = super().items(inputs, options)
        if isinstance(inputs, Mapping) and isinstance(inputs.get("question"), list):
            return _paired(inputs["question"], inputs.get("context"))
        if isinstance(inputs, str) or not (isinstance(inputs, list | Mapping) or is_stream(inputs)):
            raise TypeError("an input is {'question': ..., 'context': ...}, or pass question= and context=")
        return inputs

    def rows(self, item: Any, options: dict[str, Any]) -> list[PipelineInput]:
        question, context = _checked(item)
        first = self.tokenizer.padding_side == "right"
        short = self.tokenizer(question, add_special_tokens=False, verbose=False)
        asked = min(len(short["input_ids"]), options["max_question_len"])
        if len(short["input_ids"]) > asked:
            question = question[: short.token_to_chars(asked - 1).end]
        encoded = self.tokenizer(
            [question if first else context],
            [context if first else question],
            truncation="only_second" if first else "only_first",
            max_length=options["max_seq_len"],
            stride=self._stride(asked, options),
            return_overflowing_tokens=True,
        )
        return [
            PipelineInput(self.model_inputs(encoded, i), self._chunk(context, encoded[i], int(first)))
            for i in range(len(encoded["input_ids"]))
        ]

    def _stride(self, asked: int, options: dict[str, Any]) -> int:
        """The overlap of chunks in tokens, less than the number of context tokens in a row."""
        size, stride = options["max_seq_len"], options["doc_stride"]
        room = size - asked - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room < 1:
            raise ValueError(
                f"a question of {asked} tokens leaves no room for the context in {size}: use a smaller "
                "max_question_len or a greater max_seq_len"
            )
        if stride is None:
            usual = min(size // 2, DOC_STRIDE)
            return usual if usual < room else room // 2
        if stride >= room:
            raise ValueError(
                f"doc_stride={stride} must be less than the {room} tokens of the context that fit next to the question"
            )
        return stride

    def _chunk(self, context: str, encoding: Any, sequence: int) -> _ContextChunk:
        is_context = np.array([one == sequence for one in encoding.sequence_ids])
        cls = self.tokenizer.cls_token_id
        null = None if cls is None or cls not in encoding.ids else encoding.ids.index(cls)
        return _ContextChunk(context, encoding, is_context, null)

    def forward(self, batch: dict[str, Any], options: dict[str, Any]) -> dict[str, np.ndarray]:
        del options
        out = self.adapter.run(batch)
        return {"start": self.adapter.numpy(out.start_logits), "end": self.adapter.numpy(out.end_logits)}

    def answer(self, rows: list[PipelineInput], options: dict[str, Any]) -> Any:
        answers: dict[str, dict[str, Any]] = {}
        words, k = options["align_to_words"], options["top_k"]
        none = 1.0  # the probability that no chunk has an answer: the minimum over chunks
        for row in rows:
            chunk: _ContextChunk = row.info
            # Several token spans can align to the same words, so more than k are needed.
            found, null = spans(row.output, chunk, 2 * k + 10 if words else k, options["max_answer_len"])
            none = min(none, null)
            for span in found:
                start, end = _characters(chunk.encoding, span, words)
                string = chunk.context[start:end]
                known = answers.setdefault(
                    string.lower(), {"score": 0.0, "start": start, "end": end, "answer": string}
                )
                known["score"] += span.score
        ranked = list(answers.values())
        if options["handle_impossible_answer"]:
            ranked.append({"score": none, "start": 0, "end": 0, "answer": ""})
        ranked = sorted(ranked, key=lambda answer: answer["score"], reverse=True)[:k]
        return ranked[0] if len(ranked) == 1 else ranked


def spans(
    output: Mapping[str, np.ndarray], chunk: _ContextChunk, count: int, longest: int
) -> tuple[list[Span], float]:
    """The most probable spans of a chunk, best first, and the probability that it has no answer.

    Probabilities are over the tokens of the context and the "no answer" token.
    """
    allowed = chunk.is_context.copy()
    if chunk.null is not None:
        allowed[chunk.null] = True
    start, end = (softmax(np.where(allowed, output[name], -np.inf)) for name in ("start", "end"))
    null = 0.0 if chunk.null is None else float(start[chunk.null] * end[chunk.null])
    joint = np.triu(np.outer(start, end))
    joint = joint - np.triu(joint, longest)
    joint = np.where(np.outer(chunk.is_context, chunk.is_context), joint, -1.0)
    flat = joint.ravel()
    best = np.argsort(-flat, kind="stable")[:count]
    width = len(start)
    found = [Span(int(i) // width, int(i) % width, float(flat[i])) for i in best]
    return [span for span in found if span.score >= 0 and 0 <= span.end - span.start < longest], null


def _characters(encoding: Any, span: Span, words: bool) -> tuple[int, int]:
    start, end = encoding.offsets[span.start][0], encoding.offsets[span.end][1]
    if not words:
        return start, end
    sequence = encoding.sequence_ids[span.start]
    first, last = encoding.token_to_word(span.start), encoding.token_to_word(span.end)
    whole = [None if word is None else encoding.word_to_chars(word, sequence) for word in (first, last)]
    return (whole[0][0] if whole[0] else start), (whole[1][1] if whole[1] else end)


def _checked(item: Any) -> tuple[str, str]:
    if not isinstance(item, Mapping):
        raise TypeError(f"an input is {{'question': ..., 'context': ...}}; got {type(item).__name__}")
    for name in ("question", "context"):
        if not isinstance(item.get(name), str) or not item[name]:
            raise ValueError(f"an input needs a {name!r}, a string that is not empty; got {item.get(name)!r}")
    return item["question"], item["context"]


def _paired(question: Any, context: Any) -> Any:
    """Questions and contexts as inputs; a single string is paired with each element of a list."""
    if isinstance(question, str) and isinstance(context, str):
        return {"question": question, "context": context}
    sizes = {len(x) for x in (question, context) if not isinstance(x, str) and isinstance(x, Iterable)}  # pyright: ignore
    if len(sizes) != 1:
        raise ValueError("question and context must be strings, or lists of the same length")
    [size] = sizes
    questions, contexts = ([x] * size if isinstance(x, str) else list(x) for x in (question, context))
    return [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)]
