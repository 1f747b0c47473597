"""A model's parameters: names in files, initialisation, tying, resizing and counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import keras
import numpy as np

from monoblock import modules, tree
from monoblock.backends.tf import loading
from monoblock.backends.tf.layers import Tied
from monoblock.backends.tf.loading import DTYPES, IN_FILES, Array, StoredVariable
from monoblock.backends.tf.parts import layers_of
from monoblock.checkpoint.array_adapters import SAFETENSORS_DTYPES
from monoblock.checkpoint.keymap import KeyMap, TensorSource
from monoblock.checkpoint.matching import LoadReport
from monoblock.checkpoint.save import LazyTensor
from monoblock.heads import KINDS
from monoblock.spec import ArchSpec

if TYPE_CHECKING:
    from monoblock.backends.tf.main_layer import MainLayer
    from monoblock.families import Family, ModelClass
    from monoblock.heads import HeadSpec


class Parameters:
    """Parameter methods of a model, based on its layers and the family's tables.

    `unsaved`: parameters on which no output depends and which were not in the loaded checkpoint.
    """

    family: ClassVar[Family]
    row: ClassVar[ModelClass]
    config: Any
    spec: ArchSpec
    head_spec: HeadSpec | None
    unsaved: frozenset[str] = frozenset()

    @property
    def headed(self) -> bool:
        """Whether the class has a head on the bare model."""
        return self.row.head not in (None, "pooler")

    @property
    def main(self) -> MainLayer:
        """The main layer."""
        return getattr(self, self.family.prefix)

    def head_layers(self) -> Mapping[str, str | modules.ModuleSpec]:
        """The head's layers next to the main layer: attribute names, and roles or module trees."""
        return self.family.heads[self.row.head or ""] if self.headed else {}

    def keymap(self) -> KeyMap:
        """The map between canonical and transformers' parameter names, for this class and config."""
        return self.family.keymap(self.config, self.row.head)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape, with matrices as outputs x inputs; tied parameters once."""
        return tree.parameters(self.spec, self.head_spec)

    def sources(self) -> dict[str, TensorSource]:
        """Canonical name -> the names of the parameters that store it, and the operation between them."""
        keymap = self.keymap()
        return {name: keymap.source(name) for name in self.parameter_shapes()}

    def stored_variables(self) -> dict[str, StoredVariable]:
        """Name in files -> the variable of the parameter, in the order of the forward pass; last those on which no
        output depends."""
        inside, found = f"{self.family.prefix}." if self.headed else "", {}
        for path, layer in layers_of(self.main, self.main.layout, self.spec.layers):
            found |= loading.stored_variables(layer, inside + path)
        for path, layer in layers_of(self, modules.ModuleSpec("", "", self.head_layers()), 0):
            found |= loading.stored_variables(layer, path)
        used = [name for source in self.sources().values() for name in source.names]
        return {name: found[name] for name in (*used, *(name for name in found if name not in used))}

    def parameter_variables(self) -> dict[str, Any]:
        """Name in files -> Keras variable. A `kernel` is the transpose of the file's matrix."""
        return {name: stored.variable for name, stored in self.stored_variables().items()}

    def variable(self, name: str) -> Any:
        """The Keras variable of a parameter, by its name in files."""
        return self.stored_variables()[name].variable

    def parameter(self, name: str) -> Array:
        """A parameter's values in the layout of files, with adapters (`enable_lora`) merged."""
        return self.stored_variables()[name].read()

    def tied(self) -> dict[str, str]:
        """Tied parameters: canonical name -> the canonical parameter that it shares."""
        return tree.tied(self.spec, self.head_spec)

    def hub_state_dict(self) -> dict[str, LazyTensor]:
        """Lazy NumPy tensors by transformers' parameter names, tied ones once; calling one returns its array."""
        self._check_not_quantized("saved under transformers' names")
        return {
            name: LazyTensor(
                dtype=SAFETENSORS_DTYPES[stored.variable.dtype], shape=stored.shape, make=stored.read
            )
            for name, stored in self.stored_variables().items()
            if name not in self.unsaved
        }

    def _check_not_quantized(self, what: str) -> None:
        if any(stored.layer.quantization_mode is not None for stored in self.stored_variables().values()):
            raise ValueError(f"quantised weights cannot be {what}: do that before model.quantize()")

    # ------------------------------------------------------------------ weights

    def load_parameters(
        self, tensors: Any, *, ignore_mismatched_sizes: bool = False, strict: bool = True
    ) -> LoadReport:
        """Load tensors by transformers' names; report the initialised and the unused ones. A pooler on which no output
        depends may be missing.

        MissingKeys, UnexpectedKeys, UnreadKeys and ShapeMismatch name the first tensor that does not fit.
        """
        keymap, found = self.keymap(), self.stored_variables()
        report = loading.load(
            found,
            self.parameter_shapes(),
            keymap,
            tensors,
            self.tied(),
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            strict=strict,
        )
        initialised, sources = report.made, self.sources()
        for name in (name for canonical in initialised for name in sources[canonical].names):
            self.init_parameter(name)
        used = {name for source in sources.values() for name in source.names}
        unused, taken = [name for name in found if name not in used], set[str]()
        for name in unused:
            stored_name = next((n for n in (name, name.removeprefix(keymap.prefix)) if n in tensors), None)
            if stored_name is None or tuple(tensors.shape(stored_name)) != found[name].shape:
                self.init_parameter(name)
                continue
            found[name].assign(tensors.tensor(stored_name))
            taken |= {name, stored_name}
        self.unsaved = frozenset(unused) - taken
        return LoadReport(
            missing=[keymap.source(canonical).names[0] for canonical in report.missing],
            mismatched=[keymap.source(canonical).names[0] for canonical in report.mismatched],
            unused=[name for name in report.unused if name not in taken],
            extra=[name for name in report.extra if name not in taken],
        )

    def init_parameter(self, name: str) -> None:
        """Initialise a parameter: matrices and embeddings from a normal distribution with the spec's standard
        deviation, biases 0, norm weights 1."""
        variable = self.variable(name)
        if IN_FILES[variable.name] == "bias":
            values = np.zeros(variable.shape)
        elif len(variable.shape) == 1:
            values = np.ones(variable.shape)
        else:
            # From NumPy's generator, so that `set_seed` and `keras.utils.set_random_seed` take effect.
            values = np.random.normal(0.0, self.spec.init_std, variable.shape)
        variable.assign(values.astype(DTYPES[variable.dtype]))

    def get_input_embeddings(self) -> Any:
        """The token embedding, a `keras.layers.Embedding`."""
        return self.main.at("embed")

    def get_output_embeddings(self) -> Any:
        """The projection to the vocabulary, or None; a tied one has no separate matrix."""
        if self.head_spec is None or KINDS[self.head_spec.kind].size != "vocab":
            return None
        holder: Any = self
        return (holder.role("lm_head") if holder.has("lm_head") else holder).role("head_out")

    def _vocabulary_bias(self) -> StoredVariable | None:
        """The bias of the projection to the vocabulary, if there is one."""
        source = self.sources().get("head.out.bias")
        if self.get_output_embeddings() is None or source is None:
            return None
        return self.stored_variables()[source.names[0]]

    def get_bias(self) -> dict[str, Any] | None:
        """The bias of the projection to the vocabulary as {"bias": variable}, or None."""
        stored = self._vocabulary_bias()
        return None if stored is None else {"bias": stored.variable}

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        """Change the vocabulary size in the embedding, the head and the config; return the embedding.

        New rows are the mean of the old ones (`mean_resizing=False`: from the initial distribution). Compile the model
        again afterwards.
        """
        old, embed = self.spec.vocab, self.get_input_embeddings()
        new = old if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            new = -(-new // pad_to_multiple_of) * pad_to_multiple_of
        if new < 1:
            raise ValueError(f"new_num_tokens must be at least 1, got {new}")
        if new == old:
            return embed
        self._check_not_quantized("resized")
        bias, out = self._vocabulary_bias(), self.get_output_embeddings()
        resized = [*loading.stored_variables(embed, "").values(), *([] if bias is None else [bias])]
        if out is not None and not isinstance(out, Tied):
            resized += loading.stored_variables(out, "").values()
            out.units = new
        for stored in resized:
            self._resize(stored, new, mean_resizing)
        embed.input_dim = new
        self.config.vocab_size = new
        spec = self.config.to_spec()
        holder: Any = self
        for layer in holder._flatten_layers():
            if isinstance(getattr(layer, "spec", None), ArchSpec):
                layer.spec = spec
        return embed

    def _resize(self, stored: StoredVariable, rows: int, mean: bool) -> None:
        """Replace a variable of a layer by one of another size. Built layers are locked; Keras unlocks them this way
        too."""
        layer, old = stored.layer, stored.variable
        values = stored.read()
        shape = (rows, *values.shape[1:])
        if values.ndim == 1:
            new = np.zeros(shape, values.dtype)
        elif mean:
            new = np.broadcast_to(values.astype(np.float32).mean(0), shape).astype(values.dtype)
        else:
            new = np.random.default_rng().normal(0.0, self.spec.init_std, shape).astype(values.dtype)
        kept = min(rows, values.shape[0])
        new[:kept] = values[:kept]
        attribute = next(key for key, value in vars(layer).items() if value is old)
        size = new.shape[::-1] if stored.transposed else new.shape
        layer._tracker.unlock()
        layer._untrack_variable(old)
        name = {"weight": "embeddings"}.get(old.name, old.name)
        made = layer.add_weight(name=name, shape=size, initializer="zeros", trainable=old.trainable)
        layer._tracker.lock()
        setattr(layer, attribute, made)
        StoredVariable(layer, made).assign(new)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters, tied ones once."""
        return sum(
            int(np.prod(stored.shape))
            for stored in self.stored_variables().values()
            if (stored.variable.trainable or not only_trainable)
            and not (exclude_embeddings and isinstance(stored.layer, keras.layers.Embedding))
        )
