"""Model outputs as pytrees: export, compilation, gathering, and accelerate's conversions."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.operations import convert_to_fp32, recursively_apply
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import monoblock
from monoblock.outputs import BaseModelOutput, ModelOutput

assert monoblock.MptModel  # the backend registers the outputs


class Net(nn.Module):
    """A module that returns a model output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.linear(x), hidden_states=(x, x + 1))


def same(out: Any, wanted: BaseModelOutput) -> bool:
    both = zip(pytree.tree_leaves(out), pytree.tree_leaves(wanted), strict=True)
    return type(out) is type(wanted) and list(out) == list(wanted) and all(torch.equal(a, b) for a, b in both)


def test_outputs_are_pytree_nodes_with_named_children() -> None:
    out = Net()(torch.ones(2, 3))
    doubled = pytree.tree_map(lambda t: 2 * t, out)
    assert type(doubled) is BaseModelOutput and torch.equal(doubled.hidden_states[1], torch.full((2, 3), 4.0))
    paths, _ = pytree.tree_flatten_with_path(out)
    assert [pytree.keystr(path) for path, _ in paths] == [
        "['last_hidden_state']",
        "['hidden_states'][0]",
        "['hidden_states'][1]",
    ]


def test_later_subclasses_are_pytree_nodes() -> None:
    @dataclass
    class Late(ModelOutput):
        first: Any = None

    assert pytree.tree_map(lambda x: x + 1, Late(first=1)) == Late(first=2)


def test_export_keeps_the_output_class() -> None:
    net, x = Net(), torch.randn(2, 3)
    program = torch.export.export(net, (x,))
    assert same(program.module()(x), net(x))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    assert same(torch.export.load(buffer).module()(x), net(x))


def test_outputs_inside_a_full_graph() -> None:
    net, x = Net(), torch.randn(2, 3)

    def call(x: Tensor) -> tuple[BaseModelOutput, Tensor]:
        out = net(x)
        out.attentions = (x,)
        return out, out["last_hidden_state"] + out[1][0] + len(out)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    (out, total), (wanted, total_wanted) = compiled(x), call(x)
    assert same(out, wanted)
    assert torch.equal(total, total_wanted)


def test_accelerate_converts_outputs() -> None:
    out = BaseModelOutput(
        last_hidden_state=torch.ones(2, dtype=torch.bfloat16), hidden_states=(torch.ones(1),)
    )
    wide = convert_to_fp32(out)
    assert type(wide) is BaseModelOutput and wide.last_hidden_state.dtype == wide[0].dtype == torch.float32
    halved = recursively_apply(lambda t: t / 2, out)
    assert type(halved) is BaseModelOutput and halved.hidden_states[0].item() == 0.5


def test_scattered_outputs_are_gathered_by_name() -> None:
    """As by `nn.DataParallel`: `type(out)(pairs)`."""
    outputs = [Net()(torch.ones(1, 3)) for _ in range(2)]
    gathered = type(outputs[0])(
        (name, torch.cat([out[name] for out in outputs])) for name in ["last_hidden_state"]
    )
    assert gathered.last_hidden_state.shape == (2, 3)
