"""A model's parameters: their canonical and hub names, how they begin, which are shared, and how they resize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from monoblock import tree
from monoblock.backends.tf.layers import Tied
from monoblock.backends.tf.loading import CANONICAL, DTYPES, Array
from monoblock.checkpoint.keymap import KeyMap
from monoblock.checkpoint.save import Made
from monoblock.checkpoint.views import HUB_NAMES
from monoblock.checkpoint.weights import laid_out

if TYPE_CHECKING:
    from monoblock.backends.tf.heads import Head
    from monoblock.backends.tf.model import Backbone
    from monoblock.families import Family, ModelClass
    from monoblock.spec import ArchSpec


class Parameters:
    """What a model can do with its weights, given a backbone, a head or None, and the family's tables."""

    family: ClassVar[Family]
    row: ClassVar[ModelClass]
    config: Any
    spec: ArchSpec
    backbone: Backbone
    head: Head | None

    def keymap(self) -> KeyMap:
        """The map between canonical names and the hub's, for this class and config."""
        return self.family.keymap(self.config, self.row.head)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> canonical shape, in which matrices are outputs x inputs; tied ones left out."""
        return tree.parameters(self.spec, self.head.spec if self.head else None)

    def parameter_variables(self) -> dict[str, Any]:
        """Canonical name -> Keras variable; a `kernel` is the transposed parameter."""
        return {name: self.variable(name) for name in self.parameter_shapes()}

    def variable(self, canonical: str) -> Any:
        """The Keras variable of a parameter."""
        part, kind = self._owner(canonical)
        return next(v for v in part.weights if CANONICAL.get(v.name) == kind)

    def parameter(self, canonical: str) -> Array:
        """A parameter's values in the canonical shape, adapters (`enable_lora`) taken in."""
        part, kind = self._owner(canonical)
        name = next(v.name for v in part.weights if CANONICAL.get(v.name) == kind)
        value = getattr(part, name)
        array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
        return array.T if name == "kernel" else array

    def _owner(self, canonical: str) -> tuple[Any, str]:
        path, _, kind = canonical.rpartition(".")
        part: Any = self
        for step in path.split(".") if path.startswith("head.") else ("backbone", *path.split(".")):
            part = part[int(step)] if step.isdigit() else getattr(part, step)
        return part, kind

    def tied(self) -> dict[str, str]:
        """Second names: canonical name -> the canonical parameter that it shares."""
        return tree.tied(self.spec, self.head.spec if self.head else None)

    def hub_state_dict(self) -> dict[str, Made]:
        """The weights by the hub's names, tied ones once, each made when it is called for (`made()`, a NumPy array)."""
        self._check_not_quantized("saved by the hub's names")
        return laid_out(_Held(self), self.keymap())

    def _check_not_quantized(self, what: str) -> None:
        for name in self.parameter_shapes():
            if self._owner(name)[0].quantization_mode is not None:
                raise ValueError(f"quantised weights cannot be {what}: do that before model.quantize()")

    # ------------------------------------------------------------------ weights

    def init_parameter(self, canonical: str) -> None:
        """Begin a parameter anew: matrices and tables from a normal distribution of the spec's deviation, biases 0,
        norms 1."""
        variable = self.variable(canonical)
        if CANONICAL[variable.name] == "bias":
            values = np.zeros(variable.shape)
        elif len(variable.shape) == 1:
            values = np.ones(variable.shape)
        else:
            values = np.random.default_rng().normal(0.0, self.spec.init_std, variable.shape)
        variable.assign(values.astype(DTYPES[variable.dtype]))

    def get_input_embeddings(self) -> Any:
        """The token embedding, a `keras.layers.Embedding`."""
        return self.backbone.embed

    def get_output_embeddings(self) -> Any:
        """The projection to the vocabulary, or None; a tied one holds no matrix of its own."""
        return self.head.out if self.head is not None and self.head.vocabulary else None

    def get_bias(self) -> dict[str, Any] | None:
        """The bias of the projection to the vocabulary by its canonical name, or None."""
        out = self.get_output_embeddings()
        return None if out is None or getattr(out, "bias", None) is None else {"head.out.bias": out.bias}

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        """Change the vocabulary's size in the embedding, the head and the config; the embedding.

        New rows are the mean of the old ones, so that new tokens begin as an average token
        (`mean_resizing=False`: from the initial distribution). Compile the model again afterwards.
        """
        old = self.spec.vocab
        new = old if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            new = -(-new // pad_to_multiple_of) * pad_to_multiple_of
        if new < 1:
            raise ValueError(f"new_num_tokens must be at least 1, got {new}")
        if new == old:
            return self.backbone.embed
        self._check_not_quantized("resized")
        self.config.vocab_size = new
        self.spec = self.backbone.spec = self.config.to_spec()
        self._resize(self.backbone.embed, "embeddings", new, mean_resizing)
        self.backbone.embed.input_dim = new
        if (out := self.get_output_embeddings()) is not None and self.head is not None:
            self.head.arch = self.spec
            if not isinstance(out, Tied):
                self._resize(out, "kernel", new, mean_resizing)
                out.units = new
            if out.bias is not None:
                self._resize(out, "bias", new, mean_resizing)
        return self.backbone.embed

    def _resize(self, layer: Any, name: str, rows: int, mean: bool) -> None:
        """Give a layer a variable of another size. Keras locks what is built; its own layers open it in this way."""
        old = next(v for v in layer.weights if v.name == name)
        held = np.asarray(old.numpy())
        values = held.T if name == "kernel" else held
        shape = (rows, *values.shape[1:])
        if name == "bias":
            new = np.zeros(shape, held.dtype)
        elif mean:
            new = np.broadcast_to(values.astype(np.float32).mean(0), shape).astype(held.dtype)
        else:
            new = np.random.default_rng().normal(0.0, self.spec.init_std, shape).astype(held.dtype)
        kept = min(rows, values.shape[0])
        new[:kept] = values[:kept]
        new = new.T if name == "kernel" else new
        attribute = next(key for key, value in vars(layer).items() if value is old)
        layer._tracker.unlock()
        layer._untrack_variable(old)
        made = layer.add_weight(name=name, shape=new.shape, initializer="zeros", trainable=old.trainable)
        layer._tracker.lock()
        setattr(layer, attribute, made)
        made.assign(new)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the model has, tied ones once."""
        tables = ("embeddings",) if exclude_embeddings else ()
        return sum(
            int(np.prod(v.shape))
            for v in self.parameter_variables().values()
            if (v.trainable or not only_trainable) and v.name not in tables
        )


class _Held:
    """A model's weights by canonical name, for the code that lays them out for files."""

    def __init__(self, model: Parameters) -> None:
        self._model, self._variables = model, model.parameter_variables()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._model.parameter_shapes()

    def dtype(self, canonical: str) -> str:
        return HUB_NAMES[self._variables[canonical].dtype]

    def read(self, canonical: str) -> Array:
        return self._model.parameter(canonical)
