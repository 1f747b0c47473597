"""Training of sentence embeddings: the vectors of texts near those of their positives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monoblock.backends.pytorch.training import batches
from monoblock.backends.pytorch.training.learner import Learner, Units
from monoblock.embeddings.model import SentenceTransformer
from monoblock.training.checkpoints import SHARED
from monoblock.training.tasks.base import Example, TokenRow

if TYPE_CHECKING:
    from monoblock.backends.pytorch.training.shared import SharedModel


class EmbeddingLearner(Learner):
    """Trains a `SentenceTransformer`, all of its modules."""

    encoder: Any

    def _load(self, source: str, fields: Mapping[str, Any]) -> Any:
        del fields  # the config has no labels
        self.encoder = SentenceTransformer(
            source, device=self.device, dtype=self.options.dtype, framework="pt", **self.options.hub(source)
        )
        wide = self.encoder.get_embedding_dimension()
        for width in self.options.widths:
            if wide is not None and width >= wide:
                raise ValueError(
                    f"matryoshka={self.options.matryoshka}: the vectors have {wide} values: give smaller widths"
                )
        return self.encoder.transformers_model

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of all modules by name."""
        return dict(self.encoder.named_parameters())

    def _share(self, model: Any) -> SharedModel:
        from monoblock.backends.pytorch.training.shared import SharedModel

        return SharedModel(self.processes, self.options, model, self.encoder)

    def _loss(self, batch: Units) -> Tensor:
        examples = [unit[0] for unit in batch]
        return self._summed(examples, *self._encodings(examples))

    def _loss_of_rows(self, batch: Units, rows: slice) -> Tensor:
        """The loss of the whole batch in the first process, whose other vectors come from the others, and 0 in these;
        all have the gradients of their rows."""
        from monoblock.backends.pytorch.training.shared import joined_rows

        assert self.shared is not None
        examples = [unit[0] for unit in batch]
        own = examples[rows] or examples[:1]
        anchors_aw, candidates_cw = self._encodings(own)
        parts = [examples[self.shared.rows(len(examples), row)] for row in range(self.processes.rows)]
        counts = [len(part) for part in parts]
        negatives = [sum(len(example.rows) - 2 for example in part) for part in parts]
        row, count = self.processes.row, len(own)
        found = [
            joined_rows(x, sizes, self.processes)
            for x, sizes in (
                (anchors_aw[: counts[row]], counts),
                (candidates_cw[: counts[row]], counts),
                (candidates_cw[count : count + negatives[row]], negatives),
            )
        ]
        loss = self._summed(examples, found[0], torch.cat(found[1:]))
        return loss if row == 0 else loss - loss.detach()

    def _evaluated(self, batch: Units) -> tuple[float, list[Any]]:
        """The outputs of each example: whether its positive is the nearest of the batch (None for pairs with scores),
        and the vectors of its texts (texts, width)."""
        examples = [unit[0] for unit in batch]
        anchors_aw, candidates_cw = self._encodings(examples)
        loss = self._summed(examples, anchors_aw, candidates_cw)
        first: list[bool | None] = [None] * len(examples)
        if examples[0].target is None:
            nearest = self._similarities(examples, anchors_aw, candidates_cw).argmax(-1).tolist()
            first = [i == found for i, found in enumerate(nearest)]
        anchors, candidates = anchors_aw.cpu().numpy(), candidates_cw.cpu().numpy()
        outputs, end = [], len(examples)
        for i, example in enumerate(examples):
            start, end = end, end + len(example.rows) - 2
            outputs.append((first[i], np.stack([anchors[i], candidates[i], *candidates[start:end]])))
        return float(loss), outputs

    def _encodings(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """The vectors of the anchors (a, width), and of the candidates (c, width): the positives in order, then all
        negatives."""
        positives = [example.rows[1] for example in examples]
        candidates = [*positives, *(row for example in examples for row in example.rows[2:])]
        return self._vectors([example.rows[0] for example in examples]), self._vectors(candidates)

    def _summed(self, examples: Sequence[Example], anchors_aw: Tensor, candidates_cw: Tensor) -> Tensor:
        """The sum of the losses of the whole vectors and of their beginnings of the widths of `matryoshka` (Kusupati et
        al., arXiv 2205.13147)."""
        total = self._compared(examples, anchors_aw, candidates_cw)
        for width in self.options.widths:
            total = total + self._compared(examples, anchors_aw[:, :width], candidates_cw[:, :width])
        return total

    def _compared(self, examples: Sequence[Example], anchors_aw: Tensor, candidates_cw: Tensor) -> Tensor:
        """The sum of the examples' losses. Of pairs with scores: the squared difference of cosine and score. Of others:
        the cross-entropy of each anchor's positive among all positives and negatives of the batch (Henderson et al.,
        arXiv 1705.00652)."""
        if examples[0].target is not None:
            targets_a = torch.tensor([e.target for e in examples], device=anchors_aw.device)
            return (F.cosine_similarity(anchors_aw, candidates_cw) - targets_a).square().sum()
        scores_ac = self._similarities(examples, anchors_aw, candidates_cw)
        own = torch.arange(len(examples), device=scores_ac.device)
        return F.cross_entropy(scores_ac, own, reduction="sum")

    def _similarities(self, examples: Sequence[Example], anchors_aw: Tensor, candidates_cw: Tensor) -> Tensor:
        """The scaled cosines (anchors, candidates)."""
        anchors_aw, candidates_cw = F.normalize(anchors_aw, dim=-1), F.normalize(candidates_cw, dim=-1)
        scores_ac = self.options.similarity_scale * anchors_aw @ candidates_cw.T
        # A text that is an anchor's positive is no negative of it where it occurs again.
        texts = [example.rows[1].ids.tobytes() for example in examples]
        texts += [row.ids.tobytes() for example in examples for row in example.rows[2:]]
        again = [[j != i and text == texts[i] for j, text in enumerate(texts)] for i in range(len(examples))]
        return scores_ac.masked_fill(torch.tensor(again, device=scores_ac.device), -torch.inf)

    def _vectors(self, rows: Sequence[TokenRow]) -> Tensor:
        """The vectors (texts, width) in float32. With `chunk_size`, activations are computed again in the backward
        pass, for as many texts at a time (cached gradients; Gao et al., arXiv 2101.06983)."""
        size = self.options.chunk_size
        if size is None or not torch.is_grad_enabled() or len(rows) <= size:
            return self._encoded(rows)
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        return torch.cat([checkpoint(self._encoded, chunk, use_reentrant=False) for chunk in chunks])

    def _encoded(self, rows: Sequence[TokenRow]) -> Tensor:
        given, _ = batches.inputs([[row] for row in rows], self.model, self.pad)
        given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
        return self.encoder(given)["sentence_embedding"].float()

    def save(self, folder: Path) -> None:
        """Write the folder that `SentenceTransformer` loads."""
        if self.processes.first:  # each process holds the whole encoder
            self.encoder.save_pretrained(folder)

    def load_weights(self, folder: Path) -> None:
        """Set the weights to those of a folder that `save` or `start_saving` wrote."""
        if (folder / SHARED).is_dir():
            self._load_shared(folder)
            return
        other = SentenceTransformer(folder, device=self.device, dtype=self.options.dtype, framework="pt")
        stored = dict(other.named_parameters())
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(stored[name])
