"""Several documents packed in one row: the document of each token."""

from __future__ import annotations

from monoblock.backends.xla.namespace import Array, Namespace
from monoblock.spec import ArchSpec, Learned


def document_ids(xp: Namespace, spec: ArchSpec, positions_bs: Array, mask_bs: Array | None) -> Array | None:
    """(batch or 1, tokens): the number of each token's document. A position that does not exceed the previous one
    begins a document; None if it is known that none does. Positions of padding are ignored."""
    before, here = positions_bs[:, :-1], positions_bs[:, 1:]
    begins = here <= before
    learned = spec.position(Learned)
    if learned is not None and learned.pad_id is not None:
        begins = begins & (here >= learned.offset)  # lower positions mark padding
    if mask_bs is not None:
        valid = mask_bs != 0
        begins = valid[:, 1:] & xp.where(valid[:, :-1], begins, here < before)
    values = xp.values(begins)
    if values is not None and not values.any():
        return None
    return xp.pad(xp.cumsum(xp.int32(begins)), 1, 0)
