"""Options of the Flax classes' `from_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jax.sharding import Mesh

from monoblock.backends import options
from monoblock.checkpoint.hub import Kind
from monoblock.partition import AxisNames

QUANTISED = "quantised weights run on PyTorch only"
AXES = ("tensor_axis", "fsdp_axis", "data_axis")
TORCH_DTYPE = (
    "use dtype=, the dtype of the computation; to_bf16() and to_fp16() change that of the parameters"
)


def computation(dtype: Any) -> Any:
    """The dtype of the computation; ValueError unless it is a floating-point type."""
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"dtype must be jnp.float32, float16 or bfloat16, got {dtype!r}") from error
    if not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"dtype must be jnp.float32, float16 or bfloat16, got {found}")
    return found


class LoadOptions(options.CommonLoadOptions):
    """Options of `from_pretrained`; keywords that are not options stay in `kwargs`."""

    prefix = "Flax"
    native: ClassVar[Kind] = "msgpack"
    refused: ClassVar[Mapping[str, str]] = {
        "torch_dtype": TORCH_DTYPE,
        "device_map": "mesh= shards the parameters over devices",
        "quantization_config": QUANTISED,
        "load_in_4bit": QUANTISED,
        "load_in_8bit": QUANTISED,
        **options.KERNEL,
    }

    def __init__(self, kwargs: dict[str, Any]) -> None:
        super().__init__(kwargs)
        self.do_init = bool(kwargs.pop("_do_init", True))
        self.mesh: Mesh | None = kwargs.pop("mesh", None)
        self.axes: dict[str, AxisNames] = {name: kwargs.pop(name) for name in AXES if name in kwargs}
        if self.axes and self.mesh is None:
            raise ValueError(f"{next(iter(self.axes))} names an axis of a mesh: give mesh= too")
        self.init = {name: kwargs.pop(name) for name in ("input_shape", "seed") if name in kwargs}
