"""Heatmap panels of a model for given tokens: attention masks and attention weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from monoblock.spec import Alibi, ArchSpec, Buckets
from monoblock.utils import visibility
from monoblock.utils.heatmap import Panel
from monoblock.utils.tokens import Tokens, ranges
from monoblock.utils.visibility import Bools, Floats


def mask_panels(spec: ArchSpec, tokens: Tokens, head: int | None) -> list[Panel]:
    """A panel for each kind of layer and each text; ALiBi shades are those of `head`, or the mean of all heads."""
    strength = visibility.strength(spec, tokens.length, head)
    legend = _legend(spec, head)
    panels: list[Panel] = []
    for window, layers in visibility.layer_kinds(spec).items():
        visible_bqk = visibility.mask(spec, layers[0], tokens.batch)
        shades = np.where(visible_bqk, strength, np.float32(np.nan))
        name = f"{_layers(layers, spec.layers)}: {_mask_kind(spec, window, tokens.length)}"
        panels += _squares(tokens, name, [legend] * len(visible_bqk), shades)
    return panels


def weight_panels(
    spec: ArchSpec, tokens: Tokens, attentions: Sequence[Any], layer: int | None, head: int | str
) -> list[Panel]:
    """A panel for each text, layer (None: every layer) and head (an index, "mean" or "all")."""
    if len(attentions) != spec.layers:
        raise ValueError(f"attentions must hold {spec.layers} layers, got {len(attentions)}")
    shape = (len(tokens.labels), spec.attention.heads, tokens.length, tokens.length)
    panels: list[Panel] = []
    for index in range(spec.layers) if layer is None else [check_layer(spec, layer)]:
        weights = np.asarray(attentions[index], np.float32)
        if weights.shape != shape:
            raise ValueError(f"attentions of layer {index} must be {shape}, got {weights.shape}")
        visible_bqk = visibility.mask(spec, index, tokens.batch)
        if head == "mean":
            panels += _heat(tokens, f"layer {index}, mean of all heads", weights.mean(axis=1), visible_bqk)
            continue
        heads = range(spec.attention.heads) if head == "all" else [check_head(spec, head)]
        for number in heads:
            panels += _heat(tokens, f"layer {index}, head {number}", weights[:, number], visible_bqk)
    return panels


def check_layer(spec: ArchSpec, layer: int) -> int:
    """The layer; ValueError if it is out of range."""
    if not 0 <= layer < spec.layers:
        raise ValueError(f"layer must be 0 to {spec.layers - 1}, got {layer}")
    return layer


def check_head(spec: ArchSpec, head: int | str) -> int:
    """The head; ValueError if it is out of range."""
    if not isinstance(head, int) or not 0 <= head < spec.attention.heads:
        raise ValueError(f"head must be 0 to {spec.attention.heads - 1}, 'mean' or 'all', got {head!r}")
    return head


def _heat(tokens: Tokens, name: str, weights: Floats, visible_bqk: Bools) -> list[Panel]:
    """Panels of weights, scaled so that the largest weight of each has the darkest shade."""
    scale = np.where(visible_bqk, weights, 0).max(axis=(1, 2), keepdims=True)
    shades = np.where(visible_bqk, weights / np.maximum(scale, np.float32(1e-12)), np.float32(np.nan))
    legends = [
        f"weight: {{weak}} 0 to {{strong}} {largest_weight:.3g}" for largest_weight in scale.ravel().tolist()
    ]
    return _squares(tokens, name, legends, shades)


def _squares(tokens: Tokens, name: str, legends: list[str], shades: Floats) -> list[Panel]:
    return [
        Panel(
            title=name if len(shades) == 1 else f"text {row}, {name}",
            legend=legends[row],
            labels=tokens.labels[row],
            shade=shades[row],
            image=tokens.image_bk[row],
            padding=~tokens.batch.valid_bk[row],
        )
        for row in range(len(shades))
    ]


def _layers(layers: Sequence[int], count: int) -> str:
    if len(layers) == count:
        return f"all {count} layers" if count > 1 else "the only layer"
    return f"{'layers' if len(layers) > 1 else 'layer'} {ranges(layers)}"


def _mask_kind(spec: ArchSpec, window: int | None, length: int) -> str:
    if not spec.causal:
        return "bidirectional"
    if window is None:
        return "causal"
    return f"causal, window of {window}" + (", wider than the text" if window >= length else "")


def _legend(spec: ArchSpec, head: int | None) -> str:
    if spec.position(Alibi):
        whose = f"head {head}" if head is not None else f"mean of {spec.attention.heads} heads"
        return f"ALiBi's factor, {whose}: {{weak}} near 0, {{strong}} 1"
    if spec.position(Buckets):
        return "relative bucket: {weak} farthest, {strong} nearest"
    return "{strong} visible"
