"""How a model's parameters are split over several devices: one plan by canonical names, for every framework.

Two kinds of parallelism: over the data, where every device holds all parameters and its share of the rows; and over the
tensors (arXiv:1909.08053), where the layers that widen are split by their outputs, those that narrow by their inputs,
and tables of the vocabulary by their rows.
"""

from __future__ import annotations

from monoblock.heads import KINDS, HeadSpec
from monoblock.spec import ArchSpec
from monoblock.tree import parameters

# The end of a canonical name -> the axis of its shape (matrices are outputs x inputs) that is split. What is not here,
# norms, position tables, the small heads and the biases added after a sum, is whole on every device.
_SPLIT = {
    "attn.qkv.weight": 0,
    "attn.qkv.bias": 0,
    "attn.out.weight": 1,
    "mlp.up.weight": 0,
    "mlp.up.bias": 0,
    "mlp.gate_up.weight": 0,
    "mlp.gate_up.bias": 0,
    "mlp.down.weight": 1,
}
_VOCABULARY = {"embed.weight": 0, "head.out.weight": 0, "head.out.bias": 0}


def tensor_axes(spec: ArchSpec, head: HeadSpec | None = None, parts: int = 1) -> dict[str, int | None]:
    """Canonical name -> the axis that `parts` devices split evenly, or None: whole on each of them.

    A size that `parts` does not divide stays whole. `[q|k|v]` and `[gate|up]` are one axis here: where no compiler
    moves what ends up elsewhere, split each of their pieces for itself.
    """
    split = dict(_SPLIT)
    of_vocabulary = head is not None and KINDS[head.kind].size == "vocab"
    split |= _VOCABULARY if of_vocabulary else {"embed.weight": 0}
    axes: dict[str, int | None] = {}
    for name, shape in parameters(spec, head).items():
        axis = split.get(".".join(name.split(".")[2:]) if name.startswith("blocks.") else name)
        axes[name] = axis if axis is not None and shape[axis] % parts == 0 else None
    return axes
