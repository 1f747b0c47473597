"""token-classification: labels of tokens, and the entities that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from monoblock.pipelines.arrays import softmax
from monoblock.pipelines.base import Pipeline, PipelineInput, one_of, text
from monoblock.pipelines.entities import BY_WORD, STRATEGIES, TokenGroup, by_word, groups, without_overlaps


@dataclass(frozen=True)
class _Chunk:
    """The part of a text that is in one row: what each token is, and where."""

    sentence: str
    tokens: list[str]
    special: list[int]
    offsets: list[tuple[int, int]]


class TokenClassificationPipeline(Pipeline):
    """Labels the tokens of texts.

    `aggregation_strategy`: "none" gives each token, `{"entity", "score", "index", "word", "start", "end"}`; the others
    give entities, `{"entity_group", "score", "word", "start", "end"}`: "simple" joins neighbours of one tag; "first",
    "average" and "max" give all tokens of a word one label before. `start` and `end` count characters of the text.
    Texts are cut at the model's length; with `stride` (tokens) they are read in chunks that overlap by so many
    instead. `ignore_labels` are left out. `is_split_into_words`: the texts are lists of words, joined by `delimiter`.
    """

    task = "token-classification"
    heads = ("token",)
    settings: ClassVar[dict[str, Any]] = {
        "aggregation_strategy": "none",
        "ignore_labels": ("O",),
        "stride": None,
        "offset_mapping": None,
        "is_split_into_words": False,
        "delimiter": " ",
    }
    by_token = ("logits",)

    def checked(self, options: dict[str, Any]) -> dict[str, Any]:
        strategy = one_of("aggregation_strategy", options["aggregation_strategy"] or "none", STRATEGIES)
        if (stride := options["stride"]) is not None:
            if strategy == "none":
                raise ValueError(
                    "stride reads a text in chunks, whose entities are put together: choose an aggregation_strategy "
                    "other than 'none'"
                )
            if self.limit is None:
                raise ValueError(
                    "stride needs the length of a chunk, and the files give none: set tokenizer.model_max_length"
                )
            if not isinstance(stride, int) or not 0 <= stride < self.limit:
                raise ValueError(f"stride={stride!r}: expected tokens, fewer than the model's {self.limit}")
            if options["offset_mapping"] is not None:
                raise ValueError(
                    "offset_mapping is of whole texts, and stride reads them in chunks: give one of both"
                )
        if options["ignore_labels"] is None:
            options = options | {"ignore_labels": ("O",)}
        delimiter = " " if options["delimiter"] is None else options["delimiter"]
        return options | {"aggregation_strategy": strategy, "delimiter": delimiter}

    def items(self, inputs: Any, options: dict[str, Any]) -> Any:
        inputs = super().items(inputs, options)
        one = isinstance(inputs, list) and not all(isinstance(item, list | tuple) for item in inputs)
        if options["is_split_into_words"] and one:
            inputs = [inputs]
        if (mappings := options["offset_mapping"]) is None:
            return inputs
        many = inputs if isinstance(inputs, list) else [inputs]
        mappings = [mappings] if mappings and isinstance(mappings[0], tuple) else mappings
        if len(mappings) != len(many):
            raise ValueError(
                f"offset_mapping has {len(mappings)} lists for {len(many)} texts: give one for each"
            )
        options["offset_mapping"] = iter(mappings)
        return inputs

    def rows(self, item: Any, options: dict[str, Any]) -> list[PipelineInput]:
        encode: dict[str, Any] = {"return_special_tokens_mask": True, "return_offsets_mapping": True}
        if self.limit:
            encode |= {"truncation": True, "max_length": self.limit}
        if options["stride"] is not None:
            encode |= {"return_overflowing_tokens": True, "stride": options["stride"]}
        starts: list[int] | None = None
        if options["is_split_into_words"]:
            if not isinstance(item, list | tuple) or not all(isinstance(word, str) for word in item):
                raise TypeError("is_split_into_words=True takes lists of words")
            item, delimiter = list(item), options["delimiter"]
            starts = [sum(len(word) + len(delimiter) for word in item[:i]) for i in range(len(item))]
            encoded = self.tokenizer(item, is_split_into_words=True, **encode)
            sentence = delimiter.join(item)
        else:
            sentence = text(item, self.task)
            encoded = self.tokenizer([sentence], **encode)
        given = options["offset_mapping"]
        mapping = None if given is None else next(given)
        if starts is not None and not isinstance(encoded["input_ids"][0], list):
            encoded_rows: Sequence[dict[str, Any]] = [dict(encoded)]
        else:
            encoded_rows = [
                {name: value[i] for name, value in encoded.items()} for i in range(len(encoded["input_ids"]))
            ]
        found = []
        for i, row in enumerate(encoded_rows):
            offsets = row["offset_mapping"] if mapping is None else mapping
            if starts is not None and mapping is None:
                words = encoded.word_ids(i)
                shifts = [0 if word is None else starts[word] for word in words]
                offsets = [(a + by, b + by) for (a, b), by in zip(offsets, shifts, strict=True)]
            if len(offsets) < len(row["input_ids"]):
                raise ValueError(
                    f"offset_mapping has {len(offsets)} places for {len(row['input_ids'])} tokens: give one for each"
                )
            chunk = _Chunk(sentence, encoded.tokens(i), row["special_tokens_mask"], offsets)
            found.append(PipelineInput(self.model_inputs(row), chunk))
        return found

    def forward(self, batch: dict[str, Any], options: dict[str, Any]) -> dict[str, np.ndarray]:
        del options
        return {"logits": self.adapter.numpy(self.adapter.run(batch).logits)}

    def answer(self, rows: list[PipelineInput], options: dict[str, Any]) -> Any:
        strategy, labels = options["aggregation_strategy"], self.model.config.id2label
        entities: list[dict[str, Any]] = []
        for row in rows:
            pieces = self._pieces(row)
            if strategy == "none":
                found = [_single(piece, labels) for piece in pieces]
            else:
                words = strategy in BY_WORD
                pieces = by_word(pieces, strategy) if words else pieces
                found = groups(pieces, labels, self.tokenizer.convert_tokens_to_string, words)
            ignored = set(options["ignore_labels"])
            entities += [e for e in found if e.get("entity", e.get("entity_group")) not in ignored]
        return without_overlaps(entities) if len(rows) > 1 else entities

    def _pieces(self, row: PipelineInput) -> list[TokenGroup]:
        chunk: _Chunk = row.info
        scores = softmax(row.output["logits"])
        prefix = getattr(self.tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)
        pieces: list[TokenGroup] = []
        for i, token in enumerate(chunk.tokens):
            if chunk.special[i]:
                continue
            start, end = (int(place) for place in chunk.offsets[i])
            written = chunk.sentence[start:end]
            if prefix:
                continues = len(token) != len(written)
            else:  # the vocabulary knows no words: what no space divides is one
                continues = start > 0 and " " not in chunk.sentence[start - 1 : start + 1]
            if row.inputs["input_ids"][i] == self.tokenizer.unk_token_id:
                token, continues = written, False
            pieces.append(TokenGroup(scores[i], [token], start, end, i, continues))
        return pieces


def _single(piece: TokenGroup, labels: Mapping[int, str]) -> dict[str, Any]:
    return {
        "entity": labels[piece.best],
        "score": float(piece.scores[piece.best]),
        "index": piece.index,
        "word": piece.tokens[0],
        "start": piece.start,
        "end": piece.end,
    }
