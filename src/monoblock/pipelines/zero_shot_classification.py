"""zero-shot-classification: labels chosen per call, scored by a natural-language-inference model."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import numpy as np

from monoblock.pipelines.arrays import softmax
from monoblock.pipelines.base import Pipeline, PipelineInput, text

log = logging.getLogger("monoblock")


class ZeroShotClassificationPipeline(Pipeline):
    """Returns `{"sequence", "labels", "scores"}`, the labels from best to worst.

    `candidate_labels`: a list, or one string with commas. `hypothesis_template`: a string with {} for the label; the
    model scores whether the text entails it. `multi_label=True`: softmax over entailment and contradiction for each
    label; otherwise over the labels. Texts that are too long for the model are truncated, hypotheses are not.
    """

    task = "zero-shot-classification"
    heads = ("sequence", "first")
    settings: ClassVar[dict[str, Any]] = {
        "candidate_labels": None,
        "hypothesis_template": "This example is {}.",
        "multi_label": False,
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.entailment_id == -1:
            log.warning(
                "the config's label2id has no label that starts with 'entail': the last label is used as entailment"
            )

    @property
    def entailment_id(self) -> int:
        """The index of the entailment label; -1 if the config has none."""
        labels: dict[str, int] = self.model.config.label2id
        return next((id for label, id in labels.items() if label.lower().startswith("entail")), -1)

    def __call__(self, sequences: Any, candidate_labels: Any = None, **options: Any) -> Any:
        """The scores of the candidate labels for each text."""
        if candidate_labels is not None:
            options["candidate_labels"] = candidate_labels
        return super().__call__(sequences, **options)

    def checked(self, options: dict[str, Any]) -> dict[str, Any]:
        labels = options["candidate_labels"]
        if isinstance(labels, str):
            labels = [label.strip() for label in labels.split(",") if label.strip()]
        if not labels:
            raise ValueError("candidate_labels must name at least one label")
        template = options["hypothesis_template"]
        if template.format(labels[0]) == template:
            raise ValueError(f"hypothesis_template={template!r} has no {{}} for the label")
        return options | {"candidate_labels": list(labels)}

    def rows(self, item: Any, options: dict[str, Any]) -> list[PipelineInput]:
        premise = text(item, self.task)
        template: str = options["hypothesis_template"]
        return [
            PipelineInput(self.model_inputs(self._encoded(premise, template.format(label))), premise)
            for label in options["candidate_labels"]
        ]

    def _encoded(self, premise: str, hypothesis: str) -> Any:
        encoded = self.tokenizer(premise, hypothesis, verbose=False)
        if self.limit is None or len(encoded["input_ids"]) <= self.limit:
            return encoded
        return self.tokenizer(premise, hypothesis, truncation="only_first", max_length=self.limit)

    def forward(self, batch: dict[str, Any], options: dict[str, Any]) -> dict[str, np.ndarray]:
        del options
        return {"logits": self.adapter.numpy(self.adapter.run(batch).logits)}

    def answer(self, rows: list[PipelineInput], options: dict[str, Any]) -> Any:
        logits = np.stack([row.output["logits"] for row in rows])
        entails = self.entailment_id
        if options["multi_label"] or len(rows) == 1:
            contradicts = -1 if entails == 0 else 0
            scores = softmax(logits[:, [contradicts, entails]])[:, 1]
        else:
            scores = softmax(logits[:, entails])
        order = scores.argsort()[::-1]
        labels = options["candidate_labels"]
        return {
            "sequence": rows[0].info,
            "labels": [labels[i] for i in order],
            "scores": [float(scores[i]) for i in order],
        }
