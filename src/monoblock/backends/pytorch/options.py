"""The options of the PyTorch classes' `from_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from monoblock.backends import options
from monoblock.checkpoint.hub import Kind
from monoblock.quantization import BitsAndBytesConfig, parse_quantization

if TYPE_CHECKING:
    from monoblock.backends.pytorch.parallel.groups import TensorGroup


class LoadOptions(options.CommonLoadOptions):
    """The options of a load; other keywords stay in `kwargs`."""

    prefix = "PyTorch"
    refused: ClassVar[Mapping[str, str]] = {}

    def __init__(self, kwargs: dict[str, Any]) -> None:
        super().__init__(kwargs)
        self.dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        self.device_map = kwargs.pop("device_map", None)
        bits = {f"in_{n}bit": bool(kwargs.pop(f"load_in_{n}bit", False)) for n in (4, 8)}
        self.quantization = parse_quantization(kwargs.pop("quantization_config", None), **bits)
        self.state_dict = kwargs.pop("state_dict", None)
        self.generation_config = kwargs.pop("generation_config", None)
        self.max_memory = kwargs.pop("max_memory", None)
        self.offload_folder = kwargs.pop("offload_folder", None)
        self.group = self._group(*(kwargs.pop(name, None) for name in ("tp_plan", "tp_size", "device_mesh")))
        kwargs.pop("code_revision", None)  # of code that is never run
        kwargs.pop("low_cpu_mem_usage", None)  # always so

    def _group(self, tp_plan: Any, tp_size: Any, device_mesh: Any) -> TensorGroup | None:
        """The processes over which the model is sharded; ValueError: an option that does not go with it."""
        if tp_plan is None:
            for name, value in (("tp_size", tp_size), ("device_mesh", device_mesh)):
                if value is not None:
                    raise ValueError(f"{name} is for sharded models: give tp_plan='auto' as well")
            return None
        if self.device_map is not None:
            raise ValueError("tp_plan has a device for each process: leave device_map out")
        if isinstance(self.quantization, BitsAndBytesConfig):
            raise ValueError(
                "bitsandbytes does not quantise shards: with tp_plan give quantization_config='int8' or 'int4'"
            )
        from monoblock.backends.pytorch.parallel.groups import tensor_group

        return tensor_group(tp_plan, tp_size, device_mesh)

    def preferred(self, kwargs: dict[str, Any]) -> tuple[Kind, ...]:
        """The kind of files that `from_flax` or `from_tf` asks for."""
        sources: dict[str, Kind] = {"from_flax": "msgpack", "from_tf": "h5"}
        found: tuple[Kind, ...] = tuple(kind for name, kind in sources.items() if kwargs.pop(name, False))
        if len(found) > 1:
            raise ValueError("from_flax=True and from_tf=True exclude each other: choose one")
        return found
