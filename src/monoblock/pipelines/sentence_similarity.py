"""sentence-similarity: the similarities of a text to others, from the vectors of a sentence-embedding model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from monoblock.embeddings.similarity import all_pairs
from monoblock.pipelines.base import Pipeline, count_or_none, text

KEYS = ("source_sentence", "sentences")
PAIR = ("text", "text_pair")
BATCH = 32  # texts per forward pass


@dataclass
class Question:
    """The texts of one input, the source first; `pair`: its result is a number, not a list."""

    texts: list[str]
    pair: bool


class SentenceSimilarityPipeline(Pipeline):
    """Compares a text with others by the vectors of a `SentenceTransformer`.

    Inputs: `{"source_sentence": ..., "sentences": [...]}`, which returns a list of floats; a pair `{"text": ...,
    "text_pair": ...}`, which returns a float; or many of either. The similarity is that of the model, by default the
    cosine. `prompt` or `prompt_name` puts a prompt before all texts.
    """

    task = "sentence-similarity"
    settings: ClassVar[dict[str, Any]] = {"prompt": None, "prompt_name": None}

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        image_processor: Any = None,
        processor: Any = None,
        device: Any = None,
        batch_size: int = BATCH,
        **settings: Any,
    ) -> None:
        for name, value in (
            ("tokenizer", tokenizer),
            ("image_processor", image_processor),
            ("processor", processor),
        ):
            if value is not None:
                raise ValueError(f"{self.task!r} uses the tokenizer of the model: leave out {name}")
        self.model, self.processor, self.image_processor = model, None, None
        if device is not None:
            model.to(device)
        self.tokenizer, self.adapter = model.tokenizer, model.transformer.adapter
        self.batch_size = count_or_none("batch_size", batch_size) or BATCH
        self.given = {}
        self.given = self.merged(settings)

    def stream(self, items: Iterable[Any], size: int, options: dict[str, Any]) -> Iterator[Any]:
        waiting: list[Question] = []
        for item in items:
            waiting.append(self._question(item))
            if sum(len(question.texts) for question in waiting) >= size:
                yield from self._answers(waiting, size, options)
                waiting = []
        yield from self._answers(waiting, size, options)

    def _question(self, item: Any) -> Question:
        if not isinstance(item, Mapping) or set(item) not in (set(KEYS), set(PAIR)):
            found = sorted(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
            raise ValueError(
                f'{self.task!r} takes {{"source_sentence": ..., "sentences": [...]}} or '
                f'{{"text": ..., "text_pair": ...}}; got {found}'
            )
        if pair := "text_pair" in item:
            others = [item["text_pair"]]
        elif isinstance(others := item["sentences"], str) or not isinstance(others, Iterable):
            raise TypeError(f"sentences: expected a list of strings, got {type(others).__name__}")
        source = item["text"] if pair else item["source_sentence"]
        return Question([text(one, self.task) for one in (source, *others)], pair)

    def _answers(
        self, questions: list[Question], size: int, options: dict[str, Any]
    ) -> Iterator[float | list[float]]:
        texts = [one for question in questions for one in question.texts]
        vectors = self.model.encode(texts, batch_size=size, show_progress_bar=False, **options)
        start = 0
        for question in questions:
            end = start + len(question.texts)
            scores = self._scores(vectors[start], vectors[start + 1 : end])
            yield scores[0] if question.pair else scores
            start = end

    def _scores(self, source: np.ndarray, others: np.ndarray) -> list[float]:
        if not len(others):
            return []
        return all_pairs(self.model.similarity_fn_name, source[None], others)[0].tolist()

    def save_pretrained(self, save_directory: Any) -> None:
        """Write the model with its tokenizer and modules to a folder."""
        self.model.save_pretrained(save_directory)

    def __repr__(self) -> str:
        dtype = str(self.dtype).rpartition(".")[2]
        return (
            f"{type(self).__name__}: {type(self.model.transformers_model).__name__}, {dtype} on {self.device}"
        )
