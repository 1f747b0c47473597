"""What from_pretrained takes out of its keywords before the rest goes to the config."""

from __future__ import annotations

import logging
from typing import Any

from monoblock.checkpoint.hub import Kind
from monoblock.checkpoint.options import HubOptions
from monoblock.quantization import wanted

log = logging.getLogger("monoblock")


class LoadOptions:
    """The options of a load; the keywords that are no options are left where they were."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.hub = HubOptions.pop(kwargs)
        self.dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        self.device_map = kwargs.pop("device_map", None)
        self.ignore_mismatched_sizes = bool(kwargs.pop("ignore_mismatched_sizes", False))
        bits = {f"in_{n}bit": bool(kwargs.pop(f"load_in_{n}bit", False)) for n in (4, 8)}
        self.quantization = wanted(kwargs.pop("quantization_config", None), **bits)
        self.variant = kwargs.pop("variant", None)
        self.use_safetensors = kwargs.pop("use_safetensors", None)
        sources: dict[str, Kind] = {"from_flax": "msgpack", "from_tf": "h5"}
        self.prefer: list[Kind] = [kind for name, kind in sources.items() if kwargs.pop(name, False)]
        if len(self.prefer) > 1:
            raise ValueError("from_flax=True and from_tf=True exclude each other: choose one")
        self.state_dict = kwargs.pop("state_dict", None)
        self.strict = bool(kwargs.pop("strict", True))
        self.loading_info = bool(kwargs.pop("output_loading_info", False))
        self.generation_config = kwargs.pop("generation_config", None)
        self.max_memory = kwargs.pop("max_memory", None)
        self.offload_folder = kwargs.pop("offload_folder", None)
        kwargs.pop("code_revision", None)  # of code that is never run
        if kwargs.pop("trust_remote_code", False):
            log.info("trust_remote_code=True: no remote code is run here; the makers' options work natively")
        kwargs.pop("low_cpu_mem_usage", None)  # always so
        for name in (
            "gguf_file",
            "tp_plan",
        ):
            if kwargs.get(name):
                raise ValueError(f"from_pretrained does not support {name}={kwargs[name]!r}")
            kwargs.pop(name, None)
