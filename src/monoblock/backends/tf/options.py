"""What the TF classes' `from_pretrained` takes: the common options, and its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from monoblock.backends import options
from monoblock.checkpoint.hub import Kind


class LoadOptions(options.LoadOptions):
    """The options of a load; the keywords that are no options are left where they were."""

    prefix = "TF"
    native: ClassVar[Kind] = "h5"
    refused: ClassVar[Mapping[str, str]] = {
        "device_map": "a tf.distribute strategy or tf.device around the call places the weights",
        "quantization_config": "model.quantize('int8') is Keras's own",
        "load_in_4bit": "model.quantize('int4') is Keras's own",
        "load_in_8bit": "model.quantize('int8') is Keras's own",
        **options.KERNEL,
    }

    def __init__(self, kwargs: dict[str, Any]) -> None:
        super().__init__(kwargs)
        self.dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        self.name = kwargs.pop("name", None)

    def preferred(self, kwargs: dict[str, Any]) -> tuple[Kind, ...]:
        """As of all frameworks; `from_tf=True` asks for `tf_model.h5` first."""
        from_tf = bool(kwargs.pop("from_tf", False))
        if from_tf and kwargs.get("from_pt"):
            raise ValueError("from_pt and from_tf say two kinds of files: give one")
        kinds = super().preferred(kwargs)
        return (self.native, "safetensors") if from_tf else kinds
