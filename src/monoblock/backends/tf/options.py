"""Options of the TF classes' `from_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from monoblock.backends import options
from monoblock.checkpoint.hub import Kind


class LoadOptions(options.CommonLoadOptions):
    """Options of `from_pretrained`; keywords that are not options stay in `kwargs`."""

    prefix = "TF"
    native: ClassVar[Kind] = "h5"
    refused: ClassVar[Mapping[str, str]] = {
        "device_map": "a tf.distribute strategy or tf.device around the call determines the device of the weights",
        "quantization_config": "use Keras's model.quantize('int8')",
        "load_in_4bit": "use Keras's model.quantize('int4')",
        "load_in_8bit": "use Keras's model.quantize('int8')",
        **options.KERNEL,
    }

    def __init__(self, kwargs: dict[str, Any]) -> None:
        super().__init__(kwargs)
        self.dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        self.name = kwargs.pop("name", None)

    def preferred(self, kwargs: dict[str, Any]) -> tuple[Kind, ...]:
        """The order of file formats; `from_tf=True` puts `tf_model.h5` first."""
        from_tf = bool(kwargs.pop("from_tf", False))
        if from_tf and kwargs.get("from_pt"):
            raise ValueError("from_pt and from_tf select different files: give one")
        kinds = super().preferred(kwargs)
        return (self.native, "safetensors") if from_tf else kinds
