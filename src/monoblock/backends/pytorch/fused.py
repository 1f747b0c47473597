"""A few new tokens of a model in one call of the native library: from modules and caches to its structures.

`obstacle` says what stands in the way of that, `of` makes the `Steps` of one generation. What the library computes is
what the modules compute, with float32 between the matrices whatever their type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from monoblock import native
from monoblock.backends.pytorch.cache import Cache, DynamicCache, StaticCache
from monoblock.backends.pytorch.model import Attention
from monoblock.positions import inverse_frequencies, is_dynamic
from monoblock.spec import ACTIVATIONS, Alibi, ArchSpec, Buckets, Learned, Rotary

if TYPE_CHECKING:
    from monoblock.backends.pytorch.pretrained import PreTrainedModel

# Tokens of all rows together that a step takes; more are better off in the modules' large products.
MOST = 16
DTYPES = {torch.float32: native.FORMATS["float32"], torch.bfloat16: native.FORMATS["bfloat16"]}


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_float), ("kind", c_int32)]


class _Layer(Structure):
    _fields_ = [
        *((name, native.Matrix) for name in ("qkv", "out", "up", "down")),
        *((name, _Norm) for name in ("norm1", "norm2", "q_norm", "k_norm")),
        ("window", c_int64),
    ]


class _Model(Structure):
    _fields_ = [
        ("blocks", POINTER(_Layer)),
        ("embed", native.Matrix),
        ("head", native.Matrix),
        *((name, c_void_p) for name in ("positions", "turns", "slopes")),
        ("embed_norm", _Norm),
        ("final_norm", _Norm),
        *(
            (name, c_int64)
            for name in ("layers", "width", "heads", "groups", "dim", "inner", "size", "offset")
        ),
        *((name, c_int32) for name in ("activation", "gated", "before", "by_head", "bf16", "rotary")),
        *(
            (name, c_float)
            for name in ("scale", "clip", "softcap", "turn_scale", "logit_scale", "logit_softcap")
        ),
    ]


class _Slot(Structure):
    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_steps", c_int64 * 3),
        ("value_steps", c_int64 * 3),
        ("place", c_int64),
    ]


class _Step(Structure):
    _fields_ = [
        ("slots", POINTER(_Slot)),
        *((name, c_void_p) for name in ("ids", "types", "positions", "valid", "logits", "scratch")),
        *((name, c_int64) for name in ("scratch_bytes", "rows", "tokens", "past")),
        *((name, c_int64) for name in ("position_step", "valid_step")),
        *((name, c_int32) for name in ("threads", "cache_bf16")),
    ]


# ---------------------------------------------------------------------------- whether


def obstacle(model: PreTrainedModel) -> str | None:
    """Why the library cannot run this model's steps; None if it can."""
    if native.library() is None:
        return f"there are no native kernels ({native.status()})"
    spec, backbone = model.spec, model.backbone
    rotary, learned = spec.position(Rotary), spec.position(Learned)
    if not spec.causal or spec.position(Buckets) or (learned and learned.pad_id is not None):
        return "its tokens look both ways"
    if is_dynamic(rotary):
        return "its cached keys are turned by angles that change with the length"
    if "row" not in vars(type(model)) or not model.can_generate():
        return f"{type(model).__name__} may compute something of its own"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the types"
    if _GLOBAL.has_hooks():
        return "hooks are on all modules"
    for name, module in model.named_modules():
        kind = type(module)
        if module is not model and kind not in _THEIRS and kind.__module__ not in _OURS:
            return f"{name} is a {kind.__name__}"
        if _is_altered(module):
            return f"{name or 'the model'} has hooks, or a forward of its own"
        if isinstance(module, Attention) and module.implementation != "sdpa":
            return f"attention by {module.implementation} was chosen"
    if isinstance(backbone.embed, nn.Embedding) and backbone.embed.max_norm is not None:
        return "its embedding is normed when it is read"
    dtype = _dtype(model)
    if dtype not in DTYPES:
        return f"its type is {dtype}"
    for name, tensor in _tensors(model):
        if type(tensor) not in (nn.Parameter, Tensor) or tensor.device.type != "cpu":
            return f"{name} is not an ordinary tensor on the CPU"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous"
        if tensor.dtype != dtype and not name.endswith(_PACKED):
            return f"{name} is {tensor.dtype} in a model of {dtype}"
    return None


# What the library computes: PyTorch's modules of these types, and all that these files define.
_THEIRS = {nn.ModuleList, nn.Dropout, nn.Identity, nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm}
_OURS = {f"monoblock.backends.pytorch.{name}" for name in ("model", "heads", "linear", "packed")}
_PACKED = (".codes", ".scale", ".low")


class _GLOBAL:
    """PyTorch's hooks on all modules at once."""

    @staticmethod
    def has_hooks() -> bool:
        module = nn.modules.module
        return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


def _is_altered(module: nn.Module) -> bool:
    own = vars(module)
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
    )


def _dtype(model: PreTrainedModel) -> torch.dtype:
    """The type of what is never packed."""
    return model.backbone.blocks[0].norm1.weight.dtype  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


# ---------------------------------------------------------------------------- weights


class Weights:
    """A model's weights as the library's structures, which point to where they lie."""

    def __init__(self, model: PreTrainedModel) -> None:
        spec, backbone, head = model.spec, model.backbone, model.head
        assert head is not None
        self.bf16 = _dtype(model) == torch.bfloat16
        self.layers = spec.layers
        self.vocab = int(head.out.out_features)  # pyright: ignore
        self._blocks = (_Layer * spec.layers)(*map(_layer, backbone.blocks, spec.windows))
        self._arrays = _constants(spec)
        learned = spec.position(Learned)
        numbers = _numbers(spec) | {
            "by_head": spec.attention.qk_norm is not None and spec.attention.qk_norm.span == "head",
            "bf16": self.bf16,
        }
        self.struct = _Model(
            blocks=self._blocks,
            embed=_matrix(backbone.embed),
            head=_matrix(head.out),
            positions=backbone.pos_embed.weight.data_ptr() if learned else None,
            embed_norm=_norm(backbone.embed_norm),
            final_norm=_norm(backbone.final_norm),
            **{name: array.ctypes.data for name, array in self._arrays.items()},
            **numbers,
        )


def _layer(block: Any, window: int | None) -> _Layer:
    attn, mlp = block.attn, block.mlp
    return _Layer(
        qkv=_matrix(attn.qkv),
        out=_matrix(attn.out),
        up=_matrix(mlp.gate_up if mlp.gated else mlp.up),
        down=_matrix(mlp.down),
        norm1=_norm(block.norm1),
        norm2=_norm(block.norm2),
        q_norm=_norm(getattr(attn, "q_norm", None)),
        k_norm=_norm(getattr(attn, "k_norm", None)),
        window=window or 0,
    )


def _numbers(spec: ArchSpec) -> dict[str, Any]:
    att, rotary, learned = spec.attention, spec.position(Rotary), spec.position(Learned)
    return {
        "layers": spec.layers,
        "width": spec.width,
        "heads": att.heads,
        "groups": att.kv_heads,
        "dim": att.head_dim,
        "inner": spec.mlp.width,
        "size": learned.size if learned else 0,
        "offset": learned.offset if learned else 0,
        "activation": ACTIVATIONS.index(spec.mlp.act),
        "gated": spec.mlp.gated,
        "before": spec.placement == "pre",
        "rotary": rotary.dim if rotary else 0,
        "scale": att.scale,
        "clip": att.clip or 0,
        "softcap": att.softcap or 0,
        "turn_scale": inverse_frequencies(rotary)[1] if rotary else 1,
        "logit_scale": spec.logit_scale,
        "logit_softcap": spec.logit_softcap or 0,
    }


def _constants(spec: ArchSpec) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays that belong to no module."""
    made: dict[str, np.ndarray[Any, Any]] = {}
    if rotary := spec.position(Rotary):
        made["turns"] = np.ascontiguousarray(inverse_frequencies(rotary)[0], np.float32)
    if alibi := spec.position(Alibi):
        made["slopes"] = np.array(alibi.slopes(spec.attention.heads), np.float32)
    return made


def _matrix(module: Any) -> native.Matrix:
    bias = getattr(module, "bias", None)
    if hasattr(module, "codes"):
        low = module.low
        return native.Matrix(
            data=module.codes.data_ptr(),
            scale=module.scale.data_ptr(),
            low=None if low is None else low.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            outputs=module.rows,
            inputs=module.columns,
            format=native.FORMATS[f"int{module.bits}"],
            group=module.group,
            bias_format=0 if bias is None else DTYPES[bias.dtype],
        )
    outputs, inputs = module.weight.shape
    return native.Matrix(
        data=module.weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        outputs=outputs,
        inputs=inputs,
        format=DTYPES[module.weight.dtype],
        bias_format=0 if bias is None else DTYPES[bias.dtype],
    )


def _norm(module: Any) -> _Norm:
    match module:
        case nn.LayerNorm():
            bias = None if module.bias is None else module.bias.data_ptr()
            return _Norm(weight=module.weight.data_ptr(), bias=bias, eps=module.eps, kind=1)
        case nn.RMSNorm():
            return _Norm(weight=module.weight.data_ptr(), eps=module.eps, kind=2)
        case _:
            return _Norm()


# Each model's weights as they were last found, and where they lay: not part of the model, so neither copied nor saved.
_MADE: WeakKeyDictionary[nn.Module, tuple[list[Any], Weights]] = WeakKeyDictionary()


def _weights(model: PreTrainedModel, tensors: Sequence[Tensor]) -> Weights:
    places = [(tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors]
    made = _MADE.get(model)
    if made is None or made[0] != places:
        made = _MADE[model] = (places, Weights(model))
    return made[1]


# ---------------------------------------------------------------------------- steps


def of(model: PreTrainedModel, cache: Cache | None) -> Steps | None:
    """The steps of one generation over that cache; None where the modules must run them."""
    if cache is None or type(cache) not in (DynamicCache, StaticCache) or obstacle(model) is not None:
        return None
    # The tensors themselves, so that nothing that the structures point to goes while they are in use.
    tensors = [tensor.detach() for _, tensor in _tensors(model)]
    return Steps(_weights(model, tensors), tensors, cache)


class Steps:
    """The native steps of one generation: weights, a cache, and memory to work in."""

    def __init__(self, weights: Weights, tensors: list[Tensor], cache: Cache) -> None:
        self.weights, self.tensors, self.cache = weights, tensors, cache
        self._run = native.library().mb_step
        self._run.restype, self._run.argtypes = c_int64, (POINTER(_Model), POINTER(_Step))
        self._slots = (_Slot * weights.layers)()
        self._bound: list[Tensor] = []
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._step = _Step(slots=self._slots)

    def run(
        self,
        ids_bn: Tensor,
        *,
        types_bn: Tensor | None = None,
        positions_bn: Tensor | None = None,
        valid_bm: Tensor | None = None,
    ) -> Tensor | None:
        """Take n tokens of each row: scores (b, n, vocabulary) of what follows each, float32.

        `types_bn` are rows of the embedding that are added; `positions_bn` (b or 1, n) given positions; `valid_bm`
        booleans (b, cached + n), False for padding. None, with nothing done: the modules must take these tokens.
        """
        rows, count = ids_bn.shape
        past = self.cache.get_seq_length()
        if not past or rows * count > MOST or not self._bind(rows, count, past):
            return None
        step, ids = self._step, ids_bn.long().contiguous()
        types = None if types_bn is None else types_bn.long().contiguous()
        positions = None if positions_bn is None else positions_bn.long().contiguous()
        valid = None if valid_bm is None else valid_bm.contiguous()
        logits = torch.empty((rows, count, self.weights.vocab), dtype=torch.float32)
        step.ids, step.logits = ids.data_ptr(), logits.data_ptr()
        step.types = None if types is None else types.data_ptr()
        step.positions = None if positions is None else positions.data_ptr()
        step.position_step = 0 if positions is None or len(positions) == 1 else count
        step.valid, step.valid_step = None if valid is None else valid.data_ptr(), past + count
        step.rows, step.tokens, step.past = rows, count, past
        step.threads = torch.get_num_threads()
        while (answer := self._run(self.weights.struct, step)) > 0:
            self._scratch = torch.empty(answer, dtype=torch.uint8)
            step.scratch, step.scratch_bytes = self._scratch.data_ptr(), answer
        if answer:
            return None
        for layer in range(self.weights.layers):
            self.cache.advance(layer, count)
        return logits

    def _bind(self, rows: int, count: int, past: int) -> bool:
        """Room for the new tokens, and where it is; whether the library can write there."""
        cache, layers = self.cache, self.weights.layers
        if len(cache) != layers or cache.lengths.count(past) != layers:
            return False
        places = [cache.place(layer, count) for layer in range(layers)]
        buffers = [*cache.keys, *cache.values]
        if len(self._bound) == len(buffers) and all(map(_is, buffers, self._bound)):
            for slot, place in zip(self._slots, places, strict=True):
                slot.place = place
            return True
        self._bound = []
        first, dim = buffers[0], self.weights.struct.dim
        for buffer in buffers:
            plain = buffer.device.type == "cpu" and buffer.dtype == first.dtype and buffer.stride(-1) == 1
            shape = (*buffer.shape[:2], buffer.shape[3])
            if not plain or shape != (rows, self.weights.struct.groups, dim) or buffer.requires_grad:
                return False
        if first.dtype not in DTYPES:
            return False
        self._step.cache_bf16 = first.dtype == torch.bfloat16
        for slot, place, keys, values in zip(self._slots, places, cache.keys, cache.values, strict=True):
            slot.keys, slot.key_steps = keys.data_ptr(), keys.stride()[:3]
            slot.values, slot.value_steps = values.data_ptr(), values.stride()[:3]
            slot.place = place
        self._bound = buffers
        return True


def _is(one: Any, other: Any) -> bool:
    return one is other
