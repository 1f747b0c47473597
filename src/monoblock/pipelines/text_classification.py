"""text-classification: the labels of texts or pairs of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from monoblock.pipelines.arrays import sigmoid, softmax
from monoblock.pipelines.base import Pipeline, PipelineInput, count_or_none, one_of, text

BEST = "best"  # the default top_k: the best label alone, not in a list
FUNCTIONS = {"softmax": softmax, "sigmoid": sigmoid, "none": lambda scores: scores}
TOKENIZER = (
    "add_special_tokens",
    "padding",
    "truncation",
    "max_length",
    "padding_side",
    "split_special_tokens",
)


class TextClassificationPipeline(Pipeline):
    """Classifies texts.

    Inputs: a text, `{"text": ..., "text_pair": ...}`, or many. Returns `{"label", "score"}` of the best label; with
    `top_k` a list of the k best, with top_k=None of all. `function_to_apply`: "softmax", "sigmoid" or "none"; by
    default according to the config's problem type. Also takes the tokenizer's `truncation`, `max_length` and others.
    A single text returns a list of one unless `top_k` is given, as in transformers.
    """

    task = "text-classification"
    heads = ("sequence", "first")
    settings: ClassVar[dict[str, Any]] = {"top_k": BEST, "function_to_apply": None}
    more = frozenset(TOKENIZER)

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """The labels of these texts."""
        answer = super().__call__(inputs, **options)
        return [answer] if isinstance(inputs, str) and "top_k" not in options else answer

    def checked(self, options: dict[str, Any]) -> dict[str, Any]:
        if options["top_k"] != BEST:
            count_or_none("top_k", options["top_k"])
        if (wanted := options["function_to_apply"]) is not None:
            one_of("function_to_apply", wanted, ("default", *FUNCTIONS))
        return options

    def rows(self, item: Any, options: dict[str, Any]) -> list[PipelineInput]:
        encode = {name: options[name] for name in TOKENIZER if name in options}
        # The old form of a pair in transformers: [["text", "pair"]] inside a list of inputs.
        if isinstance(item, list) and len(item) == 1 and isinstance(item[0], list) and len(item[0]) == 2:
            item = dict(zip(("text", "text_pair"), item[0], strict=True))
        if isinstance(item, Mapping):
            if unknown := item.keys() - {"text", "text_pair"}:
                raise ValueError(f"an input has the keys 'text' and 'text_pair'; got {sorted(unknown)[0]!r}")
            encoded = self.tokenizer(**item, **encode)
        elif isinstance(item, list):
            raise TypeError("pass pairs of texts as {'text': ..., 'text_pair': ...}, not as lists")
        else:
            encoded = self.tokenizer(text(item, self.task), **encode)
        return [PipelineInput(self.model_inputs(encoded))]

    def forward(self, batch: dict[str, Any], options: dict[str, Any]) -> dict[str, np.ndarray]:
        del options
        return {"logits": self.adapter.numpy(self.adapter.run(batch).logits)}

    def answer(self, rows: list[PipelineInput], options: dict[str, Any]) -> Any:
        scores = FUNCTIONS[self._function(options["function_to_apply"])](rows[0].output["logits"])
        order = np.argsort(-scores, kind="stable")
        labels = self.model.config.id2label
        ranked = [{"label": labels[int(i)], "score": float(scores[i])} for i in order]
        return ranked[0] if options["top_k"] == BEST else ranked[: options["top_k"]]

    def _function(self, wanted: Any) -> str:
        if (
            wanted is not None
            and (name := one_of("function_to_apply", wanted, ("default", *FUNCTIONS))) != "default"
        ):
            return name
        config = self.model.config
        if config.problem_type == "regression":
            return "none"
        if config.problem_type == "multi_label_classification" or config.num_labels == 1:
            return "sigmoid"
        return "softmax"
