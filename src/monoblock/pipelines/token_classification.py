"""token-classification: labels of tokens, and the entities that they form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from monoblock.pipelines.arrays import softmax
from monoblock.pipelines.base import Pipeline, PipelineInput, one_of, text
from monoblock.pipelines.entities import (
    BY_WORD,
    STRATEGIES,
    TokenGroup,
    merge_entities,
    merge_words,
    without_overlaps,
)


@dataclass(frozen=True)
class _TokenChunk:
    """The chunk of a text in one row: its tokens, special-token mask and character offsets."""

    sentence: str
    tokens: list[str]
    special: list[int]
    offsets: list[tuple[int, int]]


class TokenClassificationPipeline(Pipeline):
    """Labels the tokens of texts.

    `aggregation_strategy`: "none" returns each token, `{"entity", "score", "index", "word", "start", "end"}`; the
    others return entities, `{"entity_group", "score", "word", "start", "end"}`: "simple" merges adjacent tokens of one
    tag; "first", "average" and "max" first give all tokens of a word one label. `start` and `end`: character offsets.
    Texts are truncated to the model's maximum length; with `stride` (tokens) they are split into chunks that overlap by
    it instead. `ignore_labels` are left out. `is_split_into_words`: inputs are lists of words, joined by `delimiter`.
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
                    "stride splits a text into chunks, whose entities are merged: choose an aggregation_strategy "
                    "other than 'none'"
                )
            if self.limit is None:
                raise ValueError(
                    "stride needs the length of a chunk, which the files lack: set tokenizer.model_max_length"
                )
            if not isinstance(stride, int) or not 0 <= stride < self.limit:
                raise ValueError(
                    f"stride={stride!r}: expected an integer, less than the model's maximum {self.limit}"
                )
            if options["offset_mapping"] is not None:
                raise ValueError(
                    "offset_mapping applies to whole texts, and stride splits them into chunks: pass one of both"
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
                f"offset_mapping has {len(mappings)} lists for {len(many)} texts: pass one for each"
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
                    f"offset_mapping has {len(offsets)} spans for {len(row['input_ids'])} tokens: pass one for each"
                )
            chunk = _TokenChunk(sentence, encoded.tokens(i), row["special_tokens_mask"], offsets)
            found.append(PipelineInput(self.model_inputs(row), chunk))
        return found

    def forward(self, batch: dict[str, Any], options: dict[str, Any]) -> dict[str, np.ndarray]:
        del options
        return {"logits": self.adapter.numpy(self.adapter.run(batch).logits)}

    def answer(self, rows: list[PipelineInput], options: dict[str, Any]) -> Any:
        strategy, labels = options["aggregation_strategy"], self.model.config.id2label
        entities: list[dict[str, Any]] = []
        for row in rows:
            groups = self._token_groups(row)
            if strategy == "none":
                found = [_single(group, labels) for group in groups]
            else:
                words = strategy in BY_WORD
                groups = merge_words(groups, strategy) if words else groups
                found = merge_entities(groups, labels, self.tokenizer.convert_tokens_to_string, words)
            ignored = set(options["ignore_labels"])
            entities += [e for e in found if e.get("entity", e.get("entity_group")) not in ignored]
        return without_overlaps(entities) if len(rows) > 1 else entities

    def _token_groups(self, row: PipelineInput) -> list[TokenGroup]:
        chunk: _TokenChunk = row.info
        scores = softmax(row.output["logits"])
        prefix = getattr(self.tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)
        groups: list[TokenGroup] = []
        for i, token in enumerate(chunk.tokens):
            if chunk.special[i]:
                continue
            start, end = (int(offset) for offset in chunk.offsets[i])
            surface = chunk.sentence[start:end]
            if prefix:
                continues = len(token) != len(surface)
            else:  # the vocabulary does not mark words: text without a space is one word
                continues = start > 0 and " " not in chunk.sentence[start - 1 : start + 1]
            if row.inputs["input_ids"][i] == self.tokenizer.unk_token_id:
                token, continues = surface, False
            groups.append(TokenGroup(scores[i], [token], start, end, i, continues))
        return groups


def _single(group: TokenGroup, labels: Mapping[int, str]) -> dict[str, Any]:
    return {
        "entity": labels[group.best],
        "score": float(group.scores[group.best]),
        "index": group.index,
        "word": group.tokens[0],
        "start": group.start,
        "end": group.end,
    }
