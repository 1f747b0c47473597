"""What from_pretrained takes out of its keywords before the rest goes to the config."""

from __future__ import annotations

import logging
from typing import Any

import jax.numpy as jnp

from monoblock.checkpoint.hub import Kind
from monoblock.checkpoint.options import HubOptions

log = logging.getLogger("monoblock")

TORCH_DTYPE = "use dtype=, the computation's type; to_bf16() and to_fp16() change the parameters'"
# Arguments of the PyTorch classes that have no meaning here, and what does the same.
_REFUSED = {
    "torch_dtype": TORCH_DTYPE,
    "device_map": "jax.device_put(params, sharding) places the parameters",
    "quantization_config": "quantised weights run on PyTorch only",
    "load_in_4bit": "quantised weights run on PyTorch only",
    "load_in_8bit": "quantised weights run on PyTorch only",
    "attn_implementation": "the kernel is chosen by the shapes, and output_attentions=True works with it",
}


def computation(dtype: Any) -> Any:
    """The computation's dtype; ValueError for what is no floating-point type."""
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"dtype must be jnp.float32, float16 or bfloat16, got {dtype!r}") from error
    if not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"dtype must be jnp.float32, float16 or bfloat16, got {found}")
    return found


class LoadOptions:
    """The options of a load; the keywords that are no options are left where they were."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.hub = HubOptions.pop(kwargs)
        self.do_init = bool(kwargs.pop("_do_init", True))
        self.init = {name: kwargs.pop(name) for name in ("input_shape", "seed") if name in kwargs}
        self.ignore_mismatched_sizes = bool(kwargs.pop("ignore_mismatched_sizes", False))
        self.variant = kwargs.pop("variant", None)
        self.use_safetensors = kwargs.pop("use_safetensors", None)
        from_pt = bool(kwargs.pop("from_pt", False))
        self.prefer: tuple[Kind, ...] = ("safetensors", "bin") if from_pt else ("safetensors", "msgpack")
        if kwargs.pop("trust_remote_code", False):
            log.info("trust_remote_code=True: no remote code is run here; the makers' options work natively")
        for name, instead in _REFUSED.items():
            if kwargs.pop(name, None):
                raise ValueError(f"from_pretrained of a Flax class does not take {name}: {instead}")
