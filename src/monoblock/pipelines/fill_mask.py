"""fill-mask: the most probable tokens at the masked positions of texts."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import numpy as np

from monoblock.pipelines.arrays import softmax
from monoblock.pipelines.base import Pipeline, PipelineInput, count_or_none, text

log = logging.getLogger("monoblock")


class FillMaskPipeline(Pipeline):
    """Returns the `top_k` best tokens, `{"score", "token", "token_str", "sequence"}`; a list for each mask if there are
    several. `targets`: words to choose among. `tokenizer_kwargs`: arguments of the tokenizer, such as truncation.
    """

    task = "fill-mask"
    heads = ("masked",)
    settings: ClassVar[dict[str, Any]] = {"top_k": 5, "targets": None, "tokenizer_kwargs": None}
    by_token = ("logits",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.tokenizer.mask_token_id is None:
            raise ValueError("'fill-mask' needs a tokenizer with a mask token: set tokenizer.mask_token")

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """The results for these texts; a list of one text returns that text's result, as in transformers."""
        answers = super().__call__(inputs, **options)
        return answers[0] if isinstance(inputs, list) and len(inputs) == 1 else answers

    def checked(self, options: dict[str, Any]) -> dict[str, Any]:
        if count_or_none("top_k", options["top_k"]) is None:
            options = options | {"top_k": 5}
        if options["targets"] is not None:
            options = options | {"targets": self._target_ids(options["targets"])}
        return options

    def _target_ids(self, targets: Any) -> list[int]:
        vocab, ids = self.tokenizer.get_vocab(), []
        for target in [targets] if isinstance(targets, str) else targets:
            found = (
                [vocab[target]]
                if target in vocab
                else self.tokenizer(target, add_special_tokens=False).input_ids
            )
            if target not in vocab:
                instead = self.tokenizer.convert_ids_to_tokens(found[0]) if found else None
                log.warning(
                    "the target %r is not in the vocabulary; its first token is used: %r", target, instead
                )
            ids += found[:1]
        if not ids:
            raise ValueError("targets must name at least one token of the vocabulary")
        return sorted(set(ids))

    def rows(self, item: Any, options: dict[str, Any]) -> list[PipelineInput]:
        encoded = self.tokenizer(text(item, self.task), **(options["tokenizer_kwargs"] or {}))
        if self.tokenizer.mask_token_id not in encoded["input_ids"]:
            raise ValueError(
                f"the text has no mask: insert {self.tokenizer.mask_token} at the position to fill"
            )
        return [PipelineInput(self.model_inputs(encoded))]

    def forward(self, batch: dict[str, Any], options: dict[str, Any]) -> dict[str, np.ndarray]:
        del options
        return {"logits": self.adapter.numpy(self.adapter.run(batch).logits)}

    def answer(self, rows: list[PipelineInput], options: dict[str, Any]) -> Any:
        [row] = rows
        ids = list(row.inputs["input_ids"])
        masks = [i for i, id in enumerate(ids) if id == self.tokenizer.mask_token_id]
        lists: list[list[dict[str, Any]]] = []
        for position in masks:
            scores = softmax(row.output["logits"][position])
            candidates = (
                np.arange(len(scores)) if options["targets"] is None else np.asarray(options["targets"])
            )
            best = candidates[np.argsort(-scores[candidates], kind="stable")[: options["top_k"]]]
            lists.append(
                [self._filling(ids, position, int(id), float(scores[id]), len(masks) == 1) for id in best]
            )
        return lists[0] if len(lists) == 1 else lists

    def _filling(self, ids: list[int], position: int, id: int, score: float, only: bool) -> dict[str, Any]:
        filled = [id if i == position else old for i, old in enumerate(ids)]
        filled = [one for one in filled if one != self.tokenizer.pad_token_id]
        # With several masks the remaining ones are kept in the text, and with them all special tokens.
        sequence = self.tokenizer.decode(filled, skip_special_tokens=only)
        return {"score": score, "token": id, "token_str": self.tokenizer.decode([id]), "sequence": sequence}
