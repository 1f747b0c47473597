"""Which part of a parameter a process holds, as boxes of the whole: of the tensor axis, and of FSDP2's division of what
is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from monoblock.backends.pytorch.parallel.groups import TensorGroup
    from monoblock.partition import Sharding


@dataclass(frozen=True)
class Box:
    """A part of a tensor: where it begins in the whole, its sizes, and where it begins in the tensor of the process."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    own: tuple[int, ...]

    def of(self, x: Tensor, *, whole: bool = False) -> Tensor:
        """The view of this part in the tensor of the process, or in the whole one."""
        for dim, (start, size) in enumerate(
            zip(self.offsets if whole else self.own, self.sizes, strict=True)
        ):
            x = x.narrow(dim, start, size)
        return x


@dataclass(frozen=True)
class TensorLayout:
    """The shape of a whole tensor, and the boxes of it that a process holds."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> TensorLayout:
        """The layout of a tensor that a process holds whole."""
        start = (0,) * len(shape)
        return cls(shape, (Box(start, shape, start),))

    def copy(self, whole: Tensor, own: Tensor) -> None:
        """Copy this process's part of a whole tensor."""
        for box in self.boxes:
            box.of(own).copy_(box.of(whole, whole=True))


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this process holds, without a gradient; of a plain tensor, all of it."""
    found: Any = x.detach()
    return found.to_local() if hasattr(found, "to_local") else found


def layout(
    parameter: Tensor, shard: Sharding | None = None, group: TensorGroup | None = None
) -> TensorLayout:
    """The layout of a parameter. `shard`: its sharding over the tensor axis of the group."""
    shape = tuple(parameter.shape)
    if not shape:
        return TensorLayout.whole(shape)
    first, last = _rows(parameter)
    spans, dim, whole = [(0, 0, shape[0])], 0, list(shape)  # begin in the whole, begin in the shard, length
    if shard is not None and shard.dim is not None:
        assert group is not None
        dim, start, spans = shard.dim, 0, []
        for one in shard.slices(group.rank, group.size):
            spans.append((one.start, start, one.stop - one.start))
            start += one.stop - one.start
        whole[dim] = sum(shard.sizes)
    boxes: list[Box] = []
    for begin, own, length in spans:
        offsets, sizes, held = [0] * len(shape), list(shape), [0] * len(shape)
        offsets[dim], sizes[dim], held[dim] = begin, length, own
        low, high = max(held[0], first), min(held[0] + sizes[0], last)
        if low < high:
            offsets[0] += low - held[0]
            sizes[0], held[0] = high - low, low - first
            boxes.append(Box(tuple(offsets), tuple(sizes), tuple(held)))
    return TensorLayout(tuple(whole), tuple(boxes))


def _rows(parameter: Any) -> tuple[int, int]:
    """The rows of a parameter that FSDP2 leaves in this process: equal parts, of which the last ones may be smaller."""
    count = parameter.shape[0]
    if not hasattr(parameter, "to_local"):
        return 0, count
    mesh = parameter.device_mesh
    size = -(-count // mesh.size())
    first = min(mesh.get_local_rank() * size, count)
    return first, min(first + size, count)
