"""Lists of integers to tensors: a converter per framework, which is imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast


@dataclass(frozen=True, kw_only=True)
class Converter:
    """Makes a framework's arrays of integers: `make(module, nested_lists)`. NumPy and PyTorch use int64, the others
    int32, as their models do."""

    module: str
    array: str  # the name of the array class inside the module
    install: str
    make: Callable[[Any, Any], Any]


CONVERTERS: dict[str, Converter] = {
    "np": Converter(
        module="numpy",
        array="ndarray",
        install="monoblock",
        make=lambda np, rows: np.asarray(rows, **_dtype(np, rows)),
    ),
    "pt": Converter(
        module="torch",
        array="Tensor",
        install="monoblock[torch]",
        make=lambda torch, rows: torch.tensor(rows, **_dtype(torch, rows)),
    ),
    "jax": Converter(
        module="jax.numpy",
        array="ndarray",
        install="monoblock[jax]",
        make=lambda jnp, rows: jnp.asarray(_narrow(rows)),
    ),
    "tf": Converter(
        module="tensorflow",
        array="Tensor",
        install="monoblock[tf]",
        make=lambda tf, rows: tf.constant(rows, **_dtype(tf, rows, "int32")),
    ),
}


def _dtype(module: Any, rows: Any, integer: str = "int64") -> dict[str, Any]:
    """The dtype argument for rows without numbers, which frameworks would take for floats."""
    return {} if _has_leaf(rows) else {"dtype": getattr(module, integer)}


def _narrow(rows: Any) -> Any:
    """A NumPy array with integers as int32, which JAX copies at once, and nested lists number by number."""
    numpy: Any = importlib.import_module("numpy")
    array = numpy.asarray(rows, **_dtype(numpy, rows))
    if array.dtype != numpy.int64:
        return array
    small = array.astype(numpy.int32)
    if (small != array).any():
        raise ValueError("a number does not fit into 32 bits")
    return small


def _has_leaf(rows: Any) -> bool:
    return any(map(_has_leaf, cast(Sequence[Any], rows))) if isinstance(rows, list | tuple) else True


def _leaf(rows: Any) -> Any:
    """The first element of nested lists that is not a list, or None."""
    while isinstance(rows, list | tuple):
        items = cast(Sequence[Any], rows)
        rows = next((item for item in items if _has_leaf(item)), None)
    return rows


def converter(tensor_type: Any) -> Callable[[str, Any], Any]:
    """`convert(key, value) -> array` for "pt", "np", "jax" or "tf"; a value that already is an array stays.

    ValueError for another name, ImportError with the pip command if the framework is not installed.
    """
    name = str(getattr(tensor_type, "value", tensor_type))
    if name not in CONVERTERS:
        raise ValueError(
            f"return_tensors={name!r}: expected one of {', '.join(map(repr, CONVERTERS))}, or None for lists"
        )
    row = CONVERTERS[name]
    try:
        module = importlib.import_module(row.module)
    except ImportError as error:
        raise ImportError(
            f"return_tensors={name!r} needs {row.module.partition('.')[0]}, which is not installed: "
            f'pip install "{row.install}"'
        ) from error
    array = getattr(module, row.array)

    def convert(key: str, value: Any) -> Any:
        if isinstance(value, array):
            return value
        try:
            return row.make(module, _plain(value))
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(_why(key, value)) from error

    return convert


def _plain(value: Any) -> Any:
    """Lists of numbers unchanged; arrays inside lists as lists, since no framework reads another's."""
    return value if isinstance(_leaf(value), int | float | None) else as_list(value)


def as_list(value: Any) -> Any:
    """An array of any framework as nested lists of numbers; lists, numbers and everything else unchanged."""
    if isinstance(value, list | tuple):
        items = cast(Sequence[Any], value)
        return (
            [as_list(item) for item in items]
            if any(not isinstance(item, int) for item in items)
            else list(items)
        )
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "numpy"):  # TensorFlow's tensors have no tolist
        return value.numpy().tolist()
    return value


def _why(key: str, value: Any) -> str:
    rows: list[Any] = list(cast(Sequence[Any], value)) if isinstance(value, list | tuple) else []
    lengths = [len(cast(Sequence[Any], row)) for row in rows if isinstance(row, list | tuple)]
    if len(set(lengths)) > 1:
        if key == "labels":
            return (
                f"labels has rows of {min(lengths)} to {max(lengths)} values, and tensors need one length: the "
                "tokenizer does not pad labels, pad them (with -100) first or leave them out"
            )
        return (
            f"{key} has rows of {min(lengths)} to {max(lengths)} values, and tensors need one length: pass "
            "padding=True, and truncation=True where texts may be too long"
        )
    return f"{key} cannot become a tensor: expected lists of integers, got {_shortened(value)}"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
