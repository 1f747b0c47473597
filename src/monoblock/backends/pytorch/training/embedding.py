"""Training of sentence embeddings: the vectors of texts near those of their positives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monoblock.backends.pytorch.training import batches
from monoblock.backends.pytorch.training.learner import Learner, Units
from monoblock.embeddings.model import SentenceTransformer
from monoblock.training.tasks.base import TokenRow


class EmbeddingLearner(Learner):
    """Trains a `SentenceTransformer`, all of its modules."""

    encoder: Any

    def _load(self, source: str, fields: Mapping[str, Any]) -> Any:
        del fields  # the config has no labels
        self.encoder = SentenceTransformer(
            source, device=self.device, dtype=self.options.dtype, framework="pt", **self._where(source)
        )
        return self.encoder.transformers_model

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of all modules by name."""
        return dict(self.encoder.named_parameters())

    def _loss(self, batch: Units) -> Tensor:
        return self._scored(batch)[0]

    def _evaluated(self, batch: Units) -> tuple[float, list[Any]]:
        loss, scores_ac = self._scored(batch)
        first = scores_ac.argmax(-1) == torch.arange(len(scores_ac), device=scores_ac.device)
        return float(loss), first.tolist()

    def _scored(self, batch: Units) -> tuple[Tensor, Tensor]:
        """The sum of the cross-entropies of each anchor's positive among all positives and negatives of the batch
        (Henderson et al., arXiv 1705.00652), and the scores (anchors, candidates)."""
        examples = [unit[0] for unit in batch]
        positives = [example.rows[1] for example in examples]
        candidates = [*positives, *(row for example in examples for row in example.rows[2:])]
        anchors_aw = F.normalize(self._vectors([example.rows[0] for example in examples]), dim=-1)
        candidates_cw = F.normalize(self._vectors(candidates), dim=-1)
        scores_ac = self.options.similarity_scale * anchors_aw @ candidates_cw.T
        # A text that is an anchor's positive is no negative of it where it occurs again.
        texts = [row.ids.tobytes() for row in candidates]
        again = [[j != i and text == texts[i] for j, text in enumerate(texts)] for i in range(len(examples))]
        scores_ac = scores_ac.masked_fill(torch.tensor(again, device=scores_ac.device), -torch.inf)
        own = torch.arange(len(examples), device=scores_ac.device)
        return F.cross_entropy(scores_ac, own, reduction="sum"), scores_ac

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
        self.encoder.save_pretrained(folder)

    def load_weights(self, folder: Path) -> None:
        """Set the weights to those of a folder that `save` wrote."""
        other = SentenceTransformer(folder, device=self.device, dtype=self.options.dtype, framework="pt")
        stored = dict(other.named_parameters())
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(stored[name])
