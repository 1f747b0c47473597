"""feature-extraction: the hidden states of texts."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from monoblock.pipelines.base import Pipeline, PipelineInput, text


class FeatureExtractionPipeline(Pipeline):
    """Returns the last hidden states, [1, tokens, width], as nested lists, or as an array with `return_tensors=True`.

    A model with a head returns its logits, as in transformers. `truncation=True` truncates texts to the model's maximum
    length; `tokenize_kwargs` holds further arguments of the tokenizer. Padding of a batch is removed.
    """

    task = "feature-extraction"
    settings: ClassVar[dict[str, Any]] = {
        "truncation": None,
        "tokenize_kwargs": None,
        "return_tensors": False,
    }
    by_token = ("features",)

    def checked(self, options: dict[str, Any]) -> dict[str, Any]:
        if options["truncation"] is not None and "truncation" in (options["tokenize_kwargs"] or {}):
            raise ValueError("truncation is given twice: as an argument and in tokenize_kwargs")
        return options

    def rows(self, item: Any, options: dict[str, Any]) -> list[PipelineInput]:
        encode = dict(options["tokenize_kwargs"] or {})
        if options["truncation"] is not None:
            encode["truncation"] = options["truncation"]
            if encode["truncation"] and "max_length" not in encode and self.limit is not None:
                encode["max_length"] = self.limit
        return [PipelineInput(self.model_inputs(self.tokenizer(text(item, self.task), **encode)))]

    def forward(self, batch: dict[str, Any], options: dict[str, Any]) -> dict[str, np.ndarray]:
        del options
        return {"features": self.adapter.numpy(self.adapter.run(batch)[0])}

    def answer(self, rows: list[PipelineInput], options: dict[str, Any]) -> Any:
        features = rows[0].output["features"][None]
        return self.adapter.native(features) if options["return_tensors"] else features.tolist()
