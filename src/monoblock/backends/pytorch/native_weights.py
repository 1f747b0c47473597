"""A model's weights as the ctypes structures of native/abi.py, and what keeps the native library from using them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monoblock import native
from monoblock.backends.pytorch.base import ModelBase
from monoblock.backends.pytorch.input_rounding import PRODUCTS, Roundings
from monoblock.backends.pytorch.kernels import dispatch, low_rank
from monoblock.backends.pytorch.kernels.linear import FORMATS, QUANTIZED, native_matrix
from monoblock.backends.pytorch.layers import Conv1D
from monoblock.backends.pytorch.model import Attention
from monoblock.backends.pytorch.parts import GROUPS, Part, fuse_weights
from monoblock.backends.pytorch.quantization.modules import QuantizedMatrix
from monoblock.native import tuning
from monoblock.native.abi import Adapters, LayerWeights, LowRank, Matrix, ModelWeights, NormWeights
from monoblock.positions import inverse_frequencies
from monoblock.spec import ACTIVATIONS, Alibi, ArchSpec, Learned, Rotary


def common_dtype(model: ModelBase) -> torch.dtype:
    """The dtype of the weights that are never quantised."""
    name = model.module_path("norm1", 0)
    return model.get_submodule(name).get_parameter("weight").dtype


class NativeWeights:
    """A model's weights as the library's structures, which hold pointers to the tensors' memory."""

    def __init__(self, model: ModelBase) -> None:
        spec = model.spec
        self.bf16 = common_dtype(model) == torch.bfloat16
        self.layers = spec.layers
        head: Any = model.get_output_embeddings()
        self.vocab = 0 if head is None else int(low_rank.base(head).out_features)
        self._blocks = (LayerWeights * spec.layers)(*(_layer(model, i) for i in range(spec.layers)))
        self._roundings = Roundings()
        self._arrays = _constants(spec)
        numbers = _numbers(spec) | {
            "qk_norm_by_head": spec.attention.qk_norm is not None and spec.attention.qk_norm.span == "head",
            "qkv_by_head": "qkv_by_head" in model.module_paths,
            "bf16": self.bf16,
        }
        learned = model.at("pos_embed") if spec.position(Learned) else None
        self.struct = ModelWeights(
            blocks=self._blocks,
            embed=_matrix(model.get_input_embeddings()),
            head=Matrix() if head is None else _matrix(head),
            head_adapters=Adapters() if head is None else _adapters([head]),
            position_table=None if learned is None else learned.weight.data_ptr(),
            embed_norm=_norm(model.at("embed_norm")),
            final_norm=_norm(model.at("final_norm")),
            **{name: array.ctypes.data for name, array in self._arrays.items()},
            **numbers,
        )

    @property
    def formats(self) -> set[int]:
        """The formats of all matrices, of `native.FORMATS`."""
        layers = [
            matrix.format for block in self._blocks for matrix in (block.qkv, block.out, block.up, block.down)
        ]
        return {self.struct.embed.format, self.struct.head.format, *layers}

    def round_inputs(self, model: ModelBase, peaks: Tensor) -> None:
        """Set how inputs are rounded to 8 bits, by the largest magnitudes of the channels of the inputs of qkv, out,
        up and down: (layers, 4, at least the inputs)."""
        for i, (layer, own) in enumerate(zip(self._blocks, peaks, strict=True)):
            for name, members, peak in zip(PRODUCTS, _matrices(model, i), own, strict=True):
                one_sign = name == "down" and not model.spec.mlp.gated
                inputs = getattr(layer, name).inputs
                self._roundings.set(layer, name, [low_rank.base(m) for m in members], peak[:inputs], one_sign)


def _matrices(model: ModelBase, i: int) -> tuple[list[Any], ...]:
    """The modules of the products of a layer: qkv, out, up and down."""
    return (
        _members(model, i, ("q", "k", "v"), ("qkv", "qkv_by_head")),
        [model.at("out", i)],
        _members(model, i, ("gate", "up"), ("up",)),
        [model.at("down", i)],
    )


def _layer(model: ModelBase, i: int) -> LayerWeights:
    qkv, out, up, down = _matrices(model, i)
    return LayerWeights(
        qkv=_joint(qkv),
        out=_joint(out),
        up=_joint(up),
        down=_joint(down),
        qkv_adapters=_adapters(qkv),
        out_adapters=_adapters(out),
        up_adapters=_adapters(up),
        down_adapters=_adapters(down),
        norm1=_norm(model.at("norm1", i)),
        norm2=_norm(model.at("norm2", i)),
        q_norm=_norm(model.at("q_norm", i)),
        k_norm=_norm(model.at("k_norm", i)),
        window=model.spec.windows[i] or 0,
    )


def _members(model: ModelBase, i: int, group: tuple[str, ...], single: tuple[str, ...]) -> list[Any]:
    """The modules of a group, or the single module that has their fused matrix."""
    members = [model.at(role, i) for role in group]
    if any(member is None for member in members):
        return [next(m for role in single if (m := model.at(role, i)) is not None)]
    return members


def _joint(members: list[Any]) -> Matrix:
    """Adjacent matrices as one."""
    matrices = [_matrix(member) for member in members]
    matrices[0].outputs = sum(matrix.outputs for matrix in matrices)
    return matrices[0]


def _adapters(members: list[Any]) -> Adapters:
    """The LoRA adapters of adjacent matrices that are used as one."""
    found: list[LowRank] = []
    first = 0
    for member in members:
        found += [
            LowRank(
                a=native_matrix(term.a, None), b=native_matrix(term.b, None), first=first, scale=term.scale
            )
            for term in low_rank.terms(member)
        ]
        first += _matrix(member).outputs
    return Adapters(terms=(LowRank * len(found))(*found) if found else None, count=len(found))


def _numbers(spec: ArchSpec) -> dict[str, Any]:
    att, rotary, learned = spec.attention, spec.position(Rotary), spec.position(Learned)
    return {
        "layers": spec.layers,
        "width": spec.width,
        "heads": att.heads,
        "kv_heads": att.kv_heads,
        "head_dim": att.head_dim,
        "mlp_width": spec.mlp.width,
        "position_rows": learned.size if learned else 0,
        "position_offset": learned.offset if learned else 0,
        "activation": ACTIVATIONS.index(spec.mlp.act),
        "gated": spec.mlp.gated,
        "pre_norm": spec.placement == "pre",
        "rotary_dim": rotary.dim if rotary else 0,
        "scale": att.scale,
        "clip": att.clip or 0,
        "softcap": att.softcap or 0,
        "rotary_scale": inverse_frequencies(rotary)[1] if rotary else 1,
        "logit_scale": spec.logit_scale,
        "logit_softcap": spec.logit_softcap or 0,
    }


def _constants(spec: ArchSpec) -> dict[str, np.ndarray[Any, Any]]:
    """The constant arrays that belong to no module."""
    made: dict[str, np.ndarray[Any, Any]] = {}
    if rotary := spec.position(Rotary):
        made["inverse_frequencies"] = np.ascontiguousarray(inverse_frequencies(rotary)[0], np.float32)
    if alibi := spec.position(Alibi):
        made["alibi_slopes"] = np.array(alibi.slopes(spec.attention.heads), np.float32)
    return made


def _matrix(module: Any) -> Matrix:
    module = low_rank.base(module)
    bias = getattr(module, "bias", None)
    if isinstance(module, QuantizedMatrix):
        return native_matrix(module.quantized, bias)
    return native_matrix(module.weight.t() if isinstance(module, Conv1D) else module.weight, bias)


def _norm(module: Any) -> NormWeights:
    match module:
        case nn.LayerNorm():
            bias = None if module.bias is None else module.bias.data_ptr()
            return NormWeights(weight=module.weight.data_ptr(), bias=bias, eps=module.eps, kind=1)
        case nn.RMSNorm():
            return NormWeights(weight=module.weight.data_ptr(), eps=module.eps, kind=2)
        case _:
            return NormWeights()


# ---------------------------------------------------------------------------- obstacles


class Inventory:
    """A model's modules and tensors by name, listed once: traversing a deep model takes a millisecond."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.named_modules())

    def fuse_groups(self) -> None:
        """Put the matrices that kernels want as one side by side, as `fuse_weights` does."""
        fuse_weights(module for _, module in self.modules)

    def tensors(self) -> Iterator[tuple[str, nn.Module, Tensor]]:
        """Name, module and tensor of all parameters and buffers."""
        for name, module in self.modules:
            for table in (module._parameters, module._buffers):
                for own, tensor in table.items():
                    if tensor is not None:
                        yield f"{name}.{own}" if name else own, module, tensor


def library_obstacle(model: ModelBase) -> str | None:
    """Why the library cannot run any model here; None if it can."""
    if native.library() is None:
        return f"there are no native kernels ({native.status()})"
    if (device := model.device.type) != "cpu":
        return f"device {device}"
    return sharding_obstacle(model)


def sharding_obstacle(model: ModelBase) -> str | None:
    """Why a model must run module by module: its processes exchange activations in each layer; None if it is whole."""
    if model.tensor_group is None:
        return None
    return f"tp_plan: {model.tensor_group.size} processes sum activations in each layer"


def weights_obstacle(model: ModelBase, inventory: Inventory | None = None) -> str | None:
    """Why the library cannot compute what this model's modules do; None if it can. `inventory`: after its
    `fuse_groups`."""
    if "row" not in vars(type(model)):
        return f"{type(model).__name__} is a subclass, which may compute something else"
    if (why := dispatch.setting_obstacle(model.device)) is not None:
        return why
    laid = inventory is not None
    inventory = inventory or Inventory(model)
    adaptable = set(_adaptable(model))
    for name, module in inventory.modules:
        kind = type(module)
        if isinstance(module, _DROPS) and module.training and not model.training:
            return f"dropout in training mode in {name}"
        if low_rank.is_lora(module) and name in adaptable:
            if (why := low_rank.obstacle(module) or dispatch.altered(module)) is not None:
                return f"{why} in {name}"
            continue
        known = module is model or kind in _THEIRS or kind.__module__ in _OURS or "row" in vars(kind)
        if (why := dispatch.module_obstacle(name, module, known=known)) is not None:
            return why
        if isinstance(module, Attention) and module.implementation != "sdpa":
            return f"attn_implementation={module.implementation!r}"
    for name, module in inventory.modules:
        if isinstance(module, Part):
            for group in GROUPS:
                if not all(map(module.has, group)) or (laid and group[0] in module.fused_tensors):
                    continue
                if (why := module.fusion_obstacle(group, adapted=True)) is not None:
                    return f"{name}: {why}"
    embed = model.get_input_embeddings()
    if isinstance(embed, nn.Embedding) and embed.max_norm is not None:
        return "max_norm of the embedding"
    dtype = common_dtype(model)
    if dtype not in FORMATS:
        return f"dtype {str(dtype).removeprefix('torch.')}"
    for name, module, tensor in inventory.tensors():
        if ".lora_" in name:
            continue
        if type(tensor) not in dispatch.ORDINARY or tensor.device.type != "cpu":
            return f"{name} is not an ordinary tensor on the CPU"
        transposed = type(module) is Conv1D and tensor.dim() == 2
        if not (tensor.t() if transposed else tensor).is_contiguous():
            return f"{name} is not contiguous"
        if tensor.dtype != dtype and not name.endswith(_PACKED):
            return f"{name} is {tensor.dtype} in a model of {dtype}"
    return None


def speed_obstacle(model: ModelBase, inventory: Inventory | None = None) -> str | None:
    """Why PyTorch's modules decode faster on this machine; None if they do not.

    The plans of the model's products are in use after this call (see native/tuning.py).
    """
    inventory = inventory or Inventory(model)
    formats = {
        _NAMES[number]
        for _, module in inventory.modules
        if isinstance(module, (nn.Linear, Conv1D, QuantizedMatrix))
        and (number := _format_of(module)) is not None
    }

    def weight_bytes() -> int:
        return sum(tensor.numel() * tensor.itemsize for _, _, tensor in inventory.tensors())

    threads = torch.get_num_threads()
    choices = tuning.ensure(native.library(), native.level(), formats, weight_bytes, threads, _rival)
    for name in sorted(formats):
        choice = choices.get((name, 1))
        if choice is not None and choice.lead is not None and choice.lead * STEP_GAIN < 1:
            return f"PyTorch's products of {name} weights are {1 / choice.lead:.1f} x as fast on this machine"
    return None


# A step of the library takes this much less time than the same products by PyTorch's modules.
STEP_GAIN = 1.2
_NAMES = {number: name for name, number in native.FORMATS.items()}


def _format_of(module: nn.Module) -> int | None:
    """The native format of a module's matrix; None: it has none."""
    if isinstance(module, QuantizedMatrix):
        return QUANTIZED[module.bits]
    return FORMATS.get(module.get_parameter("weight").dtype)


def _rival(form: str, rows: int, memory: tuning.SlicedMemory) -> tuning.Product | None:
    """PyTorch's own product, for the formats that it has."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(form)
    if dtype is None:
        return None
    x = torch.ones(rows, tuning.INPUTS, dtype=dtype)

    def product(number: int) -> Tensor:
        return F.linear(x, torch.from_numpy(memory.slice(form, number)).view(dtype))

    return product


# Modules that the library implements: these classes of PyTorch, and all classes of these files.
_THEIRS = {
    *(nn.ModuleList, nn.ModuleDict, nn.ParameterDict, nn.Dropout, nn.Identity),
    *(nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Tanh),
}
_OURS = {
    f"monoblock.backends.pytorch.{name}"
    for name in ("model", "heads", "layers", "kernels.linear", "quantization.modules")
}
# Modules that apply dropout in training mode.
_DROPS = (nn.Dropout, Part)
_PACKED = (".codes", ".scale", ".low")
# Roles of the matrices whose LoRA adapters the library supports.
_ADAPTABLE = ("qkv", "qkv_by_head", "q", "k", "v", "out", "gate", "up", "down")


def _adaptable(model: ModelBase) -> Iterator[str]:
    """The paths of the modules on which LoRA is supported."""
    for role in _ADAPTABLE:
        if role in model.module_paths:
            yield from (model.module_path(role, i) for i in range(model.spec.layers))
    if "head_out" in model.module_paths:
        yield model.module_path("head_out")


# Each model's structures and the addresses they were built from: outside the model, so neither copied nor saved.
_MADE: WeakKeyDictionary[nn.Module, tuple[list[Any], NativeWeights]] = WeakKeyDictionary()


def weights(
    model: ModelBase,
    inventory: Inventory,
    tensors: Sequence[Tensor],
    finish: Callable[[NativeWeights], None] | None = None,
) -> NativeWeights:
    """A model's structures, rebuilt if one of the `tensors` has moved. `finish` completes new ones with values that are
    computed from the tensors: then they are also rebuilt if one was modified."""
    addresses: list[Any] = [(tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors]
    if finish is not None:
        addresses += [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    addresses += [(term.a.data_ptr(), term.scale) for _, m in inventory.modules for term in low_rank.terms(m)]
    made = _MADE.get(model)
    if made is None or made[0] != addresses:
        held = NativeWeights(model)
        if finish is not None:
            finish(held)
        made = _MADE[model] = (addresses, held)
    return made[1]
