"""Models with random weights from a config, with optional dtype and attention implementation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import torch

from monoblock.config import as_own_config

if TYPE_CHECKING:
    from monoblock.families import Family


class Construction:
    """Adds `_from_config`, which `AutoModel*.from_config` and tools call, to the models."""

    family: Family

    @classmethod
    def _from_config(
        cls,
        config: Any,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
    ) -> Self:
        """A model of that config with random weights; the config itself is left as it is.

        `dtype` (or its older name `torch_dtype`): a floating torch dtype or its name; without one, the config's, and
        without that, PyTorch's default. `attn_implementation`: as in `from_pretrained`. ValueError: a wrong value.
        """
        if dtype is not None and torch_dtype is not None and as_dtype(dtype) != as_dtype(torch_dtype):
            raise ValueError(
                f"dtype={dtype} and torch_dtype={torch_dtype} are two names of one setting: give one"
            )
        own, _ = as_own_config(config, cls.family.config, cls.__name__).changed()
        wanted = as_dtype(next((d for d in (dtype, torch_dtype, own.dtype) if d is not None), None))
        if attn_implementation is not None:
            own._attn_implementation = attn_implementation
        own.dtype = wanted
        with default_dtype(wanted):
            return cls(own)  # pyright: ignore[reportCallIssue]


def as_dtype(value: Any) -> torch.dtype:
    """A floating dtype from itself or its name; PyTorch's default for None. ValueError for anything else."""
    if value is None:
        return torch.get_default_dtype()
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ValueError(
            f"dtype={value!r}: a new model needs a floating dtype of at least 16 bits (torch.bfloat16) or its name"
        )
    return found


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """PyTorch's default dtype for the parameters that are made inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
