"""What from_pretrained takes out of its keywords before the rest goes to the config."""

from __future__ import annotations

import logging
from typing import Any

from monoblock.checkpoint.hub import Kind
from monoblock.checkpoint.options import HubOptions

log = logging.getLogger("monoblock")

# Arguments of the PyTorch classes that have no meaning here, and what does the same.
_REFUSED = {
    "device_map": "a tf.distribute strategy or tf.device around the call places the weights",
    "quantization_config": "model.quantize('int8') is Keras's own",
    "load_in_4bit": "model.quantize('int4') is Keras's own",
    "load_in_8bit": "model.quantize('int8') is Keras's own",
    "attn_implementation": "the kernel is chosen by the shapes, and output_attentions=True works with it",
}


class LoadOptions:
    """The options of a load; the keywords that are no options are left where they were."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.hub = HubOptions.pop(kwargs)
        self.dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        self.name = kwargs.pop("name", None)
        self.ignore_mismatched_sizes = bool(kwargs.pop("ignore_mismatched_sizes", False))
        self.variant = kwargs.pop("variant", None)
        self.use_safetensors = kwargs.pop("use_safetensors", None)
        from_pt = bool(kwargs.pop("from_pt", False))
        from_tf = bool(kwargs.pop("from_tf", False))
        if from_pt and from_tf:
            raise ValueError("from_pt and from_tf say two kinds of files: give one")
        files: tuple[Kind, ...] = ("safetensors", "bin") if from_pt else ("safetensors", "h5")
        self.prefer: tuple[Kind, ...] = ("h5", "safetensors") if from_tf else files
        if kwargs.pop("trust_remote_code", False):
            log.info("trust_remote_code=True: no remote code is run here; the makers' options work natively")
        for name, instead in _REFUSED.items():
            if kwargs.pop(name, None):
                raise ValueError(f"from_pretrained of a TF class does not take {name}: {instead}")
