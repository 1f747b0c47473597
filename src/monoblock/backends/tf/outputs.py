"""Output classes of TF models: transformers' output classes, which tf.function and Keras can flatten.

With labels, the loss is the first field; fields that are None are left out of the tuple.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any, Self

from keras.src import tree

from monoblock import outputs


class TFModelOutput(outputs.ModelOutput):
    """The base class of all outputs: a nest of tensors for TensorFlow (`tf.function`, `tf.nest`) and for Keras
    (`predict`, the functional API)."""

    def _split(self) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """The names and the values of the fields that are not None."""
        return tuple(self.keys()), tuple(self.values())

    # TensorFlow's extension protocol.

    def __tf_flatten__(self) -> tuple[Any, Any]:
        return self._split()

    @classmethod
    def __tf_unflatten__(cls, metadata: Any, components: Any) -> Self:
        return cls(**dict(zip(metadata, components, strict=True)))

    # Keras's tree protocol.

    def tree_flatten(self) -> tuple[Any, Any]:
        """The values and the names of the fields that are not None."""
        names, values = self._split()
        return values, names

    @classmethod
    def tree_unflatten(cls, metadata: Any, children: Any) -> Self:
        """The output with these values."""
        return cls(**dict(zip(metadata, children, strict=True)))


@functools.cache
def output_class(name: str) -> type[TFModelOutput]:
    """The TF class of an output name in a family's table: the name with the prefix TF, and the same fields."""
    base = getattr(outputs, name, None)
    if not (isinstance(base, type) and issubclass(base, outputs.ModelOutput)):
        raise AttributeError(f"monoblock has no output class 'TF{name}'")
    body = {"__module__": "monoblock", "__qualname__": "TF" + name, "__doc__": base.__doc__}
    made = type("TF" + name, (TFModelOutput, base), body)
    return tree.register_tree_node_class(dataclass(made))  # pyright: ignore[reportReturnType]


def named(kind: type[TFModelOutput], values: dict[str, Any]) -> TFModelOutput:
    """Create an output from the values for which it has fields."""
    names = {field.name for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    return kind(**{name: value for name, value in values.items() if name in names})


def __getattr__(name: str) -> type[TFModelOutput]:
    return output_class(name.removeprefix("TF"))
