"""A model's parameters: their names in files, how they begin, which are shared, and how they resize."""

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
    """What a model can do with its weights, given its layers and the family's tables.

    `unsaved`: parameters that no output depends on, and that the files did not have from which the model was loaded.
    """

    family: ClassVar[Family]
    row: ClassVar[ModelClass]
    config: Any
    spec: ArchSpec
    head_spec: HeadSpec | None
    unsaved: frozenset[str] = frozenset()

    @property
    def headed(self) -> bool:
        """Whether the class has more than the bare model gives."""
        return self.row.head not in (None, "pooler")

    @property
    def main(self) -> MainLayer:
        """The main layer."""
        return getattr(self, self.family.prefix)

    def head_layers(self) -> Mapping[str, str | modules.ModuleSpec]:
        """The head's layers beside the main layer: attribute names and roles or parts."""
        return self.family.heads[self.row.head or ""] if self.headed else {}

    def keymap(self) -> KeyMap:
        """The map between the canonical names of all frameworks and the hub's, for this class and config."""
        return self.family.keymap(self.config, self.row.head)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> canonical shape, in which matrices are outputs x inputs; tied ones left out."""
        return tree.parameters(self.spec, self.head_spec)

    def sources(self) -> dict[str, TensorSource]:
        """Canonical name -> the names of the parameters here that hold it, and how."""
        keymap = self.keymap()
        return {name: keymap.source(name) for name in self.parameter_shapes()}

    def stored_variables(self) -> dict[str, StoredVariable]:
        """Name in files -> the variable of that parameter, in the order of the forward pass; then those that no output
        depends on."""
        inside, found = f"{self.family.prefix}." if self.headed else "", {}
        for path, layer in layers_of(self.main, self.main.layout, self.spec.layers):
            found |= loading.stored_variables(layer, inside + path)
        for path, layer in layers_of(self, modules.ModuleSpec("", "", self.head_layers()), 0):
            found |= loading.stored_variables(layer, path)
        used = [name for source in self.sources().values() for name in source.names]
        return {name: found[name] for name in (*used, *(name for name in found if name not in used))}

    def parameter_variables(self) -> dict[str, Any]:
        """Name in files -> Keras variable. A `kernel` is the file's matrix transposed."""
        return {name: slot.variable for name, slot in self.stored_variables().items()}

    def variable(self, name: str) -> Any:
        """The Keras variable of a parameter, by its name in files."""
        return self.stored_variables()[name].variable

    def parameter(self, name: str) -> Array:
        """A parameter's values as files hold them, adapters (`enable_lora`) taken in."""
        return self.stored_variables()[name].read()

    def tied(self) -> dict[str, str]:
        """Second names: canonical name -> the canonical parameter that it shares."""
        return tree.tied(self.spec, self.head_spec)

    def hub_state_dict(self) -> dict[str, LazyTensor]:
        """The weights by the hub's names, tied ones once, each made when it is called for (`made()`, a NumPy array)."""
        self._check_not_quantized("saved by the hub's names")
        return {
            name: LazyTensor(dtype=SAFETENSORS_DTYPES[slot.variable.dtype], shape=slot.shape, make=slot.read)
            for name, slot in self.stored_variables().items()
            if name not in self.unsaved
        }

    def _check_not_quantized(self, what: str) -> None:
        if any(slot.layer.quantization_mode is not None for slot in self.stored_variables().values()):
            raise ValueError(f"quantised weights cannot be {what}: do that before model.quantize()")

    # ------------------------------------------------------------------ weights

    def load_parameters(
        self, tensors: Any, *, ignore_mismatched_sizes: bool = False, strict: bool = True
    ) -> LoadReport:
        """Fill the model from tensors by the hub's names; what was made anew and what was not used, by those names. A
        pooler that no output depends on may be missing.

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
        made, sources = report.made, self.sources()
        for name in (name for canonical in made for name in sources[canonical].names):
            self.init_parameter(name)
        used = {name for source in sources.values() for name in source.names}
        unused, taken = [name for name in found if name not in used], set[str]()
        for name in unused:
            ours = next((n for n in (name, name.removeprefix(keymap.prefix)) if n in tensors), None)
            if ours is None or tuple(tensors.shape(ours)) != found[name].shape:
                self.init_parameter(name)
                continue
            found[name].assign(tensors.tensor(ours))
            taken |= {name, ours}
        self.unsaved = frozenset(unused) - taken
        return LoadReport(
            missing=[keymap.source(canonical).names[0] for canonical in report.missing],
            mismatched=[keymap.source(canonical).names[0] for canonical in report.mismatched],
            unused=[name for name in report.unused if name not in taken],
            extra=[name for name in report.extra if name not in taken],
        )

    def init_parameter(self, name: str) -> None:
        """Begin a parameter anew: matrices and tables from a normal distribution of the spec's deviation, biases 0,
        norms 1."""
        variable = self.variable(name)
        if IN_FILES[variable.name] == "bias":
            values = np.zeros(variable.shape)
        elif len(variable.shape) == 1:
            values = np.ones(variable.shape)
        else:
            values = np.random.default_rng().normal(0.0, self.spec.init_std, variable.shape)
        variable.assign(values.astype(DTYPES[variable.dtype]))

    def get_input_embeddings(self) -> Any:
        """The token embedding, a `keras.layers.Embedding`."""
        return self.main.at("embed")

    def get_output_embeddings(self) -> Any:
        """The projection to the vocabulary, or None; a tied one holds no matrix of its own."""
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
        slot = self._vocabulary_bias()
        return None if slot is None else {"bias": slot.variable}

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
        for slot in resized:
            self._resize(slot, new, mean_resizing)
        embed.input_dim = new
        self.config.vocab_size = new
        spec = self.config.to_spec()
        holder: Any = self
        for layer in holder._flatten_layers():
            if isinstance(getattr(layer, "spec", None), ArchSpec):
                layer.spec = spec
        return embed

    def _resize(self, slot: StoredVariable, rows: int, mean: bool) -> None:
        """Give a layer a variable of another size. Keras locks what is built; its own layers open it in this way."""
        layer, old = slot.layer, slot.variable
        values = slot.read()
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
        size = new.shape[::-1] if slot.transposed else new.shape
        layer._tracker.unlock()
        layer._untrack_variable(old)
        name = {"weight": "embeddings"}.get(old.name, old.name)
        made = layer.add_weight(name=name, shape=size, initializer="zeros", trainable=old.trainable)
        layer._tracker.lock()
        setattr(layer, attribute, made)
        StoredVariable(layer, made).assign(new)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the model has, tied ones once."""
        return sum(
            int(np.prod(slot.shape))
            for slot in self.stored_variables().values()
            if (slot.variable.trainable or not only_trainable)
            and not (exclude_embeddings and isinstance(slot.layer, keras.layers.Embedding))
        )
