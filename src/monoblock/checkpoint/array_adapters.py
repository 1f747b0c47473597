"""Convert between tensors of a framework and raw bytes, without copies or casts.

An `ArrayAdapter` describes a tensor (safetensors dtype name, shape), returns its bytes, and creates tensors over a
buffer. A framework is imported only when its adapter is requested.

Without `ml_dtypes`, NumPy has no bfloat16 and no float8. Such arrays then have a structured dtype of one field, such as
`dtype([("BF16", "<u2")])`: they can be sliced, concatenated and transposed like any array, and arithmetic on them
raises an error instead of giving wrong results.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

from monoblock.checkpoint.header import ITEM_BYTES
from monoblock.errors import CheckpointError

Framework = Literal["pt", "np"]
Array = Any  # a NumPy array, whose type the core does not import

# safetensors dtype names -> the names of torch, NumPy and ml_dtypes.
DTYPE_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
SAFETENSORS_DTYPES = {name: hub for hub, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class Description:
    """A tensor's dtype (safetensors name), its shape, and an identity that tied tensors share (None: no bytes)."""

    dtype: str
    shape: tuple[int, ...]
    identity: tuple[object, ...] | None


class ArrayAdapter(Protocol):
    """The operations on tensors that the checkpoint code needs of a framework."""

    def describe(self, name: str, tensor: Any) -> Description:
        """The description of `tensor`; `CheckpointError` if it cannot be stored in a checkpoint."""
        ...

    def raw(self, tensor: Any) -> memoryview:
        """The tensor's bytes, row-major and little-endian; a view if its memory has that layout."""
        ...

    def from_buffer(self, buffer: Any, dtype: str, shape: tuple[int, ...]) -> Any:
        """A tensor that shares the memory of `buffer`."""
        ...


@cache
def adapter(framework: str) -> ArrayAdapter:
    """The adapter for "pt" (PyTorch) or "np" (NumPy)."""
    if framework not in _ADAPTERS:
        raise ValueError(f"framework={framework!r}: expected one of {', '.join(map(repr, _ADAPTERS))}")
    return _ADAPTERS[framework]()


def import_torch(why: str) -> Any:
    """The torch module; ImportError, with `why` and the pip command, if it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise ImportError(f'{why} needs PyTorch: pip install "monoblock[torch]"') from error


def _little_endian(array: Any) -> Any:
    return array.astype(array.dtype.newbyteorder("<")) if array.dtype.str.startswith(">") else array


class _NumpyAdapter:
    def __init__(self) -> None:
        self._numpy: Any = importlib.import_module("numpy")

    def describe(self, name: str, tensor: Any) -> Description:
        array = self._numpy.asarray(tensor)
        kind = array.dtype
        dtype: str = kind.names[0] if kind.names else SAFETENSORS_DTYPES.get(kind.name, "")
        if ITEM_BYTES.get(dtype) != kind.itemsize:
            raise CheckpointError(f"tensor '{name}' has dtype {kind}, which safetensors does not support")
        identity = (array.ctypes.data, array.strides, array.shape, dtype) if array.nbytes else None
        return Description(dtype=dtype, shape=tuple(array.shape), identity=identity)

    def raw(self, tensor: Any) -> memoryview:
        array = _little_endian(self._numpy.ascontiguousarray(tensor))
        return memoryview(array.reshape(-1).view(self._numpy.uint8))

    def from_buffer(self, buffer: Any, dtype: str, shape: tuple[int, ...]) -> Any:
        kind = numpy_dtype(dtype)
        if not len(buffer):  # numpy and torch refuse an empty buffer
            return self._numpy.empty(shape, dtype=kind)
        return self._numpy.frombuffer(buffer, dtype=self._numpy.uint8).view(kind).reshape(shape)


@cache
def numpy_dtype(safetensors_name: str) -> Any:
    """The NumPy dtype of a safetensors name: NumPy's, that of `ml_dtypes` if installed, or a one-field structure."""
    numpy: Any = importlib.import_module("numpy")
    name = DTYPE_NAMES[safetensors_name]
    if not name.startswith(("bfloat", "float8")):
        return numpy.dtype(name).newbyteorder("<")
    try:
        return numpy.dtype(getattr(importlib.import_module("ml_dtypes"), name))
    except (ImportError, AttributeError):
        return numpy.dtype([(safetensors_name, f"<u{ITEM_BYTES[safetensors_name]}")])


class _TorchAdapter:
    def __init__(self) -> None:
        self._torch: Any = import_torch('framework="pt"')

    def describe(self, name: str, tensor: Any) -> Description:
        torch = self._torch
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"'{name}' is a {type(tensor).__name__}, not a tensor: only tensors can be saved"
            )
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise CheckpointError(f"tensor '{name}' is sparse or quantised: make it dense before saving")
        if tensor.is_meta:
            raise CheckpointError(
                f"tensor '{name}' is on the meta device and holds no values: load the model first"
            )
        dtype = SAFETENSORS_DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            raise CheckpointError(
                f"tensor '{name}' has dtype {tensor.dtype}, which safetensors does not support"
            )
        shape = tuple(tensor.shape)
        # Conjugate and negative views share memory but differ in value.
        storage = (str(tensor.device), tensor.data_ptr(), tensor.stride(), tensor.is_conj(), tensor.is_neg())
        return Description(
            dtype=dtype, shape=shape, identity=(*storage, shape, dtype) if tensor.numel() else None
        )

    def raw(self, tensor: Any) -> memoryview:
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        return memoryview(plain.reshape(-1).view(self._torch.uint8).numpy())

    def from_buffer(self, buffer: Any, dtype: str, shape: tuple[int, ...]) -> Any:
        kind = getattr(self._torch, DTYPE_NAMES[dtype], None)
        if kind is None:
            raise CheckpointError(f"this PyTorch has no dtype for {dtype}: upgrade PyTorch")
        if not len(buffer):
            return self._torch.empty(shape, dtype=kind)
        return self._torch.frombuffer(buffer, dtype=self._torch.uint8).view(kind).reshape(shape)


_ADAPTERS: dict[str, Callable[[], ArrayAdapter]] = {"pt": _TorchAdapter, "np": _NumpyAdapter}
