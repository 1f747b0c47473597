"""Image patches of a call: the patch of each token, and the projected patches at the tokens' positions.

Shape suffixes: b batch, s tokens, w width, p patches of the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monoblock.backends.pytorch.kernels import dispatch
from monoblock.spec import ArchSpec


def with_patches(
    spec: ArchSpec,
    project: nn.Module,
    x_bsw: Tensor,
    input_ids: Tensor,
    patches: Tensor | list[Tensor],
    indices_bs: Tensor | None,
) -> Tensor:
    """The tokens with projected image patches at the positions that are theirs.

    `patches`: with `indices_bs`, (n, size) for each row, and which of its row's patches each token is, -1 for none.
    Without, all patches of the batch in order: the tokens of the patch id take one after the other. ValueError: they do
    not fit. Where the call is compiled, exported, traced or transformed, counts cannot be read, and what does not fit
    is PyTorch's error of an index that is out of bounds.
    """
    layout = spec.patches
    if layout is None:
        raise ValueError("image patches were given, but the model takes text only")
    sets = _sets(patches, layout.size)
    sets = [own.reshape(-1, layout.size).to(x_bsw.device) for own in sets]
    readable = dispatch.readable(x_bsw, input_ids, indices_bs, *sets)
    if indices_bs is None:
        which_bs = _in_order(sets, input_ids.to(x_bsw.device), layout.token_id, readable)
    else:
        which_bs = _by_index(sets, indices_bs[:, -x_bsw.shape[1] :].to(x_bsw.device), input_ids, readable)
    weight = next(project.parameters())
    all_patches = torch.cat(sets).to(weight.dtype)
    if readable:  # unused patches need no projection
        which = which_bs.flatten()
        tokens = (which >= 0).nonzero()[:, 0]
        vectors = project(all_patches[which[tokens]]).to(x_bsw.dtype)
        return x_bsw.flatten(0, 1).index_copy(0, tokens, vectors).view_as(x_bsw)
    # One additional row, so that gathering works without any patch.
    vectors_pw = F.pad(project(all_patches).to(x_bsw.dtype), (0, 0, 0, 1))
    return torch.where((which_bs >= 0)[..., None], vectors_pw[which_bs.clamp(min=0)], x_bsw)


def _sets(patches: Any, size: int) -> list[Tensor]:
    """The patches of each row, or of all rows. TypeError or ValueError: invalid patches."""
    expected = f"image_patches must be a tensor (.., {size}), or a list with one for each row"
    if isinstance(patches, Tensor) and patches.dim() < 3:
        found = [patches]
    elif isinstance(patches, (Tensor, list, tuple)):
        found: list[Any] = list(patches)
    else:
        raise TypeError(f"{expected}, got {type(patches).__name__}")
    for own in found:
        if not isinstance(own, Tensor):
            raise TypeError(f"{expected}, got a list of {type(own).__name__}")
        if own.dim() < 2 or own.shape[-1] != size:
            raise ValueError(f"image patches must be (.., {size}), got {tuple(own.shape)}")
    return found


def _in_order(sets: list[Tensor], ids_bs: Tensor, token_id: int, readable: bool) -> Tensor:
    """(b, s) which patch of all each token is, -1 for none; beyond them if there are not as many as tokens."""
    # Not len(), which would make the number of patches a constant of an exported program.
    total, is_patch = sum(own.shape[0] for own in sets), (ids_bs == token_id).flatten()
    if readable and total != (count := int(is_patch.sum())):
        raise ValueError(
            f"{total} image patches for {count} tokens of the id {token_id}: without "
            "image_patches_indices there must be as many"
        )
    count_t = is_patch.cumsum(0)
    which = count_t - 1 if readable else torch.where(count_t[-1] == total, count_t - 1, total + 1)
    return torch.where(is_patch, which, -1).view_as(ids_bs)


def _by_index(sets: list[Tensor], indices_bs: Tensor, ids_bs: Tensor, readable: bool) -> Tensor:
    """(b, s) which patch of all each token is, of which one of its row it is; beyond them if its row has fewer."""
    if len(sets) != len(ids_bs):
        raise ValueError(
            f"image_patches must hold one set for each of the {len(ids_bs)} rows, got {len(sets)}"
        )
    if indices_bs.shape != ids_bs.shape:
        raise ValueError(
            f"image_patches_indices must be (batch, tokens) = {tuple(ids_bs.shape)}, got {tuple(indices_bs.shape)}"
        )
    counts, before = [len(own) for own in sets], 0
    found: list[Tensor] = []
    for row, (indices_s, count) in enumerate(zip(indices_bs.unbind(), counts, strict=True)):
        if readable and (needed := int(indices_s.max()) + 1) > count:
            raise ValueError(f"row {row} has tokens for {needed} image patches, but {count} were given")
        which = torch.where(indices_s < count, indices_s + before, sum(counts) + 1)
        found.append(torch.where(indices_s >= 0, which, -1))
        before += count
    return torch.stack(found)
