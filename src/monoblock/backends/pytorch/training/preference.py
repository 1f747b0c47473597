"""Training on preferences between answers (DPO; Rafailov et al., arXiv 2305.18290)."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from monoblock.backends.pytorch import heads
from monoblock.backends.pytorch.training.learner import Learner, Units
from monoblock.training.tasks.base import IGNORED

if TYPE_CHECKING:
    from monoblock.backends.pytorch.training.shared import SharedModel


class PreferenceLearner(Learner):
    """Trains a language model against a frozen reference: the same model before training, without its adapter if it has
    one."""

    reference: Any = None
    shared_reference: SharedModel | None = None

    def _prepare(self, adapter: str | None) -> None:
        super()._prepare(adapter)
        if self.options.lora_rank is None:
            self.reference = self._load(self.base, {}).eval().requires_grad_(False)
            if self.processes.size > 1:
                self.shared_reference = self._share(self.reference)

    def _loss(self, batch: Units) -> Tensor:
        return -F.logsigmoid(self._margins(batch)).sum()

    def _evaluated(self, batch: Units) -> tuple[float, list[Any]]:
        margins_b = self._margins(batch)
        return float(-F.logsigmoid(margins_b).sum()), margins_b.tolist()

    def _margins(self, batch: Units) -> Tensor:
        """beta times how much more the model than the reference prefers the chosen answer of each example."""
        examples = [unit[0] for unit in batch]
        rows = [[example.rows[which]] for which in (0, 1) for example in examples]
        given, labels_bs = self._tensors(rows)
        assert labels_bs is not None
        own_b = log_probabilities(self.model, given, labels_bs)
        with torch.no_grad(), self._as_reference() as model:
            share = self.shared_reference
            reference_b = (
                log_probabilities(model, given, labels_bs)
                if share is None
                else share.run(lambda: log_probabilities(model, given, labels_bs))
            )
        chosen_b, rejected_b = (own_b - reference_b).chunk(2)
        return self.options.dpo_beta * (chosen_b - rejected_b)

    @contextlib.contextmanager
    def _as_reference(self) -> Generator[Any]:
        """The reference, without dropout."""
        if self.reference is not None:
            yield self.reference
            return
        training = self.model.training
        self.model.eval()
        self.model.disable_adapters()
        try:
            yield self.model
        finally:
            self.model.enable_adapters()
            self.model.train(training)


def log_probabilities(model: Any, given: dict[str, Any], labels_bs: Tensor) -> Tensor:
    """(b,), the sum of the log probabilities of the labels, each predicted at the token before it."""
    hidden_bsw, labels_bs = model.bare(**given, return_dict=True)[0][:, :-1], labels_bs[:, 1:]
    labelled = labels_bs != IGNORED
    logits_nv = heads.logits(model, hidden_bsw[labelled]).float()
    found_n = -F.cross_entropy(logits_nv, labels_bs[labelled], reduction="none")
    row_n = labelled.nonzero()[:, 0]
    return torch.zeros(len(labels_bs), device=found_n.device).index_add(0, row_n, found_n)
