"""Compares an exported graph with the model, at sizes other than the traced ones, with padding and with a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monoblock.backends.pytorch.export import TOKENS, GraphInterface
from monoblock.conversion.logits import GraphComparison
from monoblock.spec import ArchSpec, Learned

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Arrays]  # the exported graph: inputs by name -> outputs by name

# Rows, cached tokens, new tokens. 0 cached tokens: the first call.
SHAPES = ((1, 0, 1), (1, 0, 6), (3, 0, 11), (2, 7, 1), (3, 5, 6), (1, 9, 2))
LONGEST = 300  # tokens; windows up to it are checked by longer sequences
CHOICES = 3


@dataclass(frozen=True)
class _Case:
    """A batch (rows, tokens) and its patches; `first`: the tokens of the first call, of two with a cache."""

    ids: Tensor
    mask: Tensor
    first: int
    patches: Tensor | None

    @property
    def choices(self) -> bool:
        """Whether the rows are choices (rows, choices, tokens)."""
        return self.ids.dim() == 3


def compare_graph(model: Any, names: GraphInterface, run: Run) -> GraphComparison:
    """Run both on random sequences; outputs at padding are not compared."""
    difference = magnitude = 0.0
    same: list[np.ndarray] = []
    shapes: list[tuple[int, int, int]] = []
    for case in _cases(model, bool(names.cache)):
        expected = _expected(model, names, case)
        found = _found(model.spec, names, case, run)
        for name, values in expected.items():
            per_token = TOKENS in names.outputs[name].values()
            kept = case.mask.numpy() != 0 if per_token else slice(None)
            a, b = values.numpy()[kept], found[name][kept]
            if found[name].shape != tuple(values.shape):
                raise ValueError(f"{name} is {found[name].shape}, expected {tuple(values.shape)}")
            gap = np.abs(a - b)
            difference = max(difference, float(np.nan_to_num(gap, nan=np.inf).max()))
            magnitude = max(magnitude, float(np.abs(a).max()))
            if values.dim() == 3 or model.row.head in ("sequence", "first"):
                same.append((a.argmax(-1) == b.argmax(-1)).reshape(-1))
        rows, tokens = case.ids.shape[0], case.ids.shape[-1]
        shapes.append((rows, case.first % tokens, tokens - case.first % tokens))
    agreement = float(np.concatenate(same).mean()) if same else None
    return GraphComparison(
        shapes=tuple(shapes), difference=difference, magnitude=magnitude, agreement=agreement
    )


def _cases(model: Any, cached: bool) -> Iterator[_Case]:
    spec: ArchSpec = model.spec
    learned = spec.position(Learned)
    room = learned.size - learned.offset if learned is not None else LONGEST
    windows = [window for window in spec.windows if window is not None and window <= LONGEST - 4]
    longest = min(max(windows, default=20) + 3, room - 2)
    random = torch.Generator().manual_seed(0)
    for rows, past, new in (*SHAPES, (2, longest, 2)):
        if not cached:
            past, new = 0, past + new
        if past < 0 or past + new > room:
            continue
        yield _case(model, rows, past, new, random)


def _case(model: Any, rows: int, past: int, new: int, random: torch.Generator) -> _Case:
    spec: ArchSpec = model.spec
    total = past + new
    learned = spec.position(Learned)
    pad = learned.pad_id if learned is not None else None
    if pad is None:
        pad = getattr(model.config, "pad_token_id", None) or 0
    choices = model.row.head in ("choice", "double")
    shape = (rows, CHOICES, total) if choices else (rows, total)
    special = {pad, *([spec.patches.token_id] if spec.patches else [])}
    usual = torch.tensor([i for i in range(min(spec.vocab, 1000)) if i not in special])
    ids = usual[torch.randint(0, len(usual), shape, generator=random)]
    mask = torch.ones(shape, dtype=torch.long)
    if rows > 1 and total > 2:  # the first row is padded: at the left for causal models, else at the right
        hidden = slice(None, total // 3) if spec.causal else slice(total - total // 3, None)
        mask[0, ..., hidden] = 0
        ids = ids.masked_fill(mask == 0, pad)
    patches = None
    if spec.patches is not None:
        count = min(2, past or new)
        ids[-1, :count] = spec.patches.token_id
        patches = torch.randn(count, spec.patches.size, generator=random)
    return _Case(ids, mask, past or total, patches)


@torch.no_grad()
def _expected(model: Any, names: GraphInterface, case: _Case) -> Mapping[str, Tensor]:
    """The model's outputs for the whole sequences, without a cache."""
    given: dict[str, Any] = {"input_ids": case.ids, "attention_mask": case.mask}
    if case.patches is not None:
        given["image_patches"] = case.patches
    if "mc_token_ids" in names.inputs:
        given["mc_token_ids"] = _last(case)
    out = model(**given, return_dict=True)
    return {name: out[name].float() for name in names.outputs}


def _last(case: _Case) -> Tensor:
    """(rows, choices), the index of each choice's last token."""
    return torch.full(case.ids.shape[:2], case.ids.shape[-1] - 1)


def _found(spec: ArchSpec, names: GraphInterface, case: _Case, run: Run) -> Arrays:
    """The graph's outputs, in one call, or in two of which the second one continues the cache of the first."""
    total = case.ids.shape[-1]
    positions = (case.mask.cumsum(-1) - 1).masked_fill(case.mask == 0, 1)
    att = spec.attention
    empty = np.zeros((case.ids.shape[0], att.kv_heads, 0, att.head_dim), np.float32)
    past = {name: empty for name, _ in names.cache}
    parts: list[Arrays] = []
    for start, stop in ((0, case.first), (case.first, total)):
        if start == stop:
            continue
        here = slice(start, stop)
        given: dict[str, Tensor] = {
            "input_ids": case.ids[..., here],
            "attention_mask": case.mask[..., :stop],
            "position_ids": positions[..., here],
        }
        if case.patches is not None:
            given["image_patches"] = case.patches if start == 0 else case.patches[:0]
        if case.choices:
            given["mc_token_ids"] = _last(case)
        outputs = run({k: x.numpy() for k, x in given.items() if k in names.inputs} | past)
        past = {name: outputs[present] for name, present in names.cache}
        parts.append(outputs)
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in names.outputs}
