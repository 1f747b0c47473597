"""A model as a graph of tensors, for exporters: the KV cache is among the inputs and outputs.

Shape suffixes: b batch, s new tokens, p cached tokens, g key/value heads, d head width.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from monoblock.backends.pytorch.cache import Cache
from monoblock.heads import KINDS
from monoblock.spec import ArchSpec

# The axes of tensors: index -> name; an axis without a name has a fixed size.
Axes = dict[int, str]

BATCH, TOKENS, PAST, ALL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
# Sizes of the traced call: all different, and none of 0 and 1, which exporters take for constants.
SIZES = {BATCH: 2, TOKENS: 4, PAST: 3, ALL: 7, "num_choices": 5, "num_patches": 6}


@dataclass(frozen=True, kw_only=True)
class GraphInterface:
    """The names and axes of a graph's inputs and outputs. `cache`: those of past keys and values, two for each layer,
    as they are named among the inputs and the outputs."""

    inputs: Mapping[str, Axes]
    outputs: Mapping[str, Axes]
    cache: tuple[tuple[str, str], ...] = ()

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """All names of inputs and of outputs, in order."""
        return (
            [*self.inputs, *(past for past, _ in self.cache)],
            [*self.outputs, *(present for _, present in self.cache)],
        )


def interface(model: Any, *, past: bool) -> GraphInterface:
    """The interface of a model's graph, with optimum's names. `past`: with the KV cache, for causal heads. ValueError:
    a classification head that needs a pad token, and has none."""
    head, spec = model.row.head, model.spec
    rows: Axes = {0: BATCH, 1: TOKENS}
    if head in ("choice", "double"):
        rows = {0: BATCH, 1: "num_choices", 2: TOKENS}
    inputs: dict[str, Axes] = {"input_ids": rows, "attention_mask": rows}
    if head in KINDS and KINDS[head].pool == "last" and model.current_head().pad_id is None:
        raise ValueError(
            f"{type(model).__name__} needs a pad token for batches of several rows: set pad_token_id in config.json"
        )
    if head == "causal":
        inputs["attention_mask"] = {0: BATCH, 1: ALL if past else TOKENS}
        if "position_ids" in model.row.forward.split():
            inputs["position_ids"] = rows
        if spec.patches is not None:
            inputs["image_patches"] = {0: "num_patches"}
    if head == "double":
        inputs["mc_token_ids"] = {0: BATCH, 1: "num_choices"}
    numbered = [(i, kind) for i in range(spec.layers if past else 0) for kind in ("key", "value")]
    cache = tuple((f"past_key_values.{i}.{kind}", f"present.{i}.{kind}") for i, kind in numbered)
    return GraphInterface(inputs=inputs, outputs=_outputs(head, rows), cache=cache)


def _outputs(head: str | None, rows: Axes) -> dict[str, Axes]:
    match head:
        case None | "pooler":
            return {"last_hidden_state": rows}
        case "span":
            return {"start_logits": rows, "end_logits": rows}
        case "sequence" | "first":
            return {"logits": {0: BATCH}}
        case "choice":
            return {"logits": {0: BATCH, 1: "num_choices"}}
        case "double":
            return {"logits": rows, "mc_logits": {0: BATCH, 1: "num_choices"}}
        case _:
            return {"logits": rows}


class GraphCache(Cache):
    """A cache whose past keys and values (b, g, p, d), two tensors for each layer, are inputs of a graph, and whose
    concatenations with the new ones (`present`) are outputs. Without any, it is empty."""

    def __init__(self, past: Sequence[Tensor]) -> None:
        super().__init__()
        self.past, self.present = past, list[Tensor]()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        if self.past:
            key_states = torch.cat((self.past[2 * layer_idx], key_states), dim=2)
            value_states = torch.cat((self.past[2 * layer_idx + 1], value_states), dim=2)
        self.present += [key_states, value_states]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past[2 * layer_idx].shape[2] if self.past else 0


class GraphModel(nn.Module):
    """(inputs by name, past keys and values) -> the outputs of an interface, as a tuple of tensors."""

    def __init__(self, model: Any, names: GraphInterface) -> None:
        super().__init__()
        self.model, self.outputs, self.cached = model, tuple(names.outputs), bool(names.cache)

    def forward(self, inputs: dict[str, Tensor], past: list[Tensor]) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"return_dict": True}
        cache = None
        if self.model.row.head == "causal":
            # Also without past keys: positions that restart then do not begin another document.
            cache = GraphCache(past)
            options |= {"past_key_values": cache, "use_cache": True}
        elif self.model.spec.causal and "use_cache" in self.model.row.forward.split():
            options["use_cache"] = False
        out = self.model(**inputs, **options)
        found = tuple(out[name] for name in self.outputs)
        return (*found, *cache.present) if self.cached and cache is not None else found


def example(
    spec: ArchSpec, names: GraphInterface, sizes: Mapping[str, int]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Inputs of these sizes, without padding, and past keys and values of zeros."""

    def shape(axes: Axes) -> tuple[int, ...]:
        return tuple(sizes[name] for _, name in sorted(axes.items()))

    inputs = {name: torch.ones(shape(axes), dtype=torch.long) for name, axes in names.inputs.items()}
    if "position_ids" in inputs:
        steps = torch.arange(sizes[PAST], sizes[PAST] + sizes[TOKENS])
        inputs["position_ids"] = steps.expand(sizes[BATCH], -1).contiguous()
    if "image_patches" in inputs:
        assert spec.patches is not None
        inputs["image_patches"] = torch.zeros(sizes["num_patches"], spec.patches.size)
    att = spec.attention
    held = (sizes[BATCH], att.kv_heads, sizes[PAST], att.head_dim)
    return inputs, [torch.zeros(held) for _ in names.cache]


def onnx_model(model: Any, names: GraphInterface) -> Any:
    """The graph of a float32 model on the CPU as an `onnx_ir.Model`, for all sizes of the named axes. It shares the
    weights' memory. RuntimeError: PyTorch's exporter has no operator for a part of the model."""
    spec: ArchSpec = model.spec
    inputs, past = example(spec, names, SIZES if names.cache else {**SIZES, PAST: 0, ALL: SIZES[TOKENS]})
    cached: Axes = {0: BATCH, 2: PAST}
    given, returned = names.names
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            GraphModel(model, names).eval(),
            (inputs, past),
            dynamo=True,
            input_names=given,
            output_names=returned,
            dynamic_shapes=({name: names.inputs[name] for name in inputs}, [cached] * len(past)),
            verbose=False,
        )
    assert program is not None
    made = program.model
    _strip(made)
    return made


def _strip(made: Any) -> None:
    """Remove the exporter's notes on each node, among them paths of source files."""
    made.metadata_props.clear()
    made.graph.metadata_props.clear()
    for node in made.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*made.graph.inputs, *made.graph.initializers.values()]:
        value.metadata_props.clear()


def fold_transposes(made: Any, *, shared: bool) -> None:
    """Store matrices that the graph only transposes in that order, as products need them. `shared`: also those with
    other uses (a tied embedding), of which there are two copies then."""
    ir = importlib.import_module("onnx_ir")
    graph = made.graph
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or source.const_value is None or len(source.shape) != 2:
            continue
        if not shared and len(source.uses()) > 1:
            continue
        result = node.outputs[0]
        value = ir.Value(
            name=f"{source.name}.transposed.{result.name}",
            const_value=ir.tensor(source.const_value.numpy().T.copy()),
            shape=ir.Shape(tuple(source.shape)[::-1]),
            type=source.type,
        )
        graph.register_initializer(value)
        ir.convenience.replace_all_uses_with(result, value)
        graph.remove(node, safe=True)
        if not source.uses():
            graph.initializers.pop(source.name)


@contextmanager
def _quiet() -> Generator[None]:
    """Without the exporter's warnings on axis names and operators of packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
