"""Keras's own formats: a model's entry in `.keras` files, and the SavedModel that serves it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import keras
import tensorflow as tf

from monoblock.outputs import ModelOutput

if TYPE_CHECKING:
    from monoblock.families import Family, ModelClass

SAVED_MODEL = "tf_saved_model"


class Configured:
    """Adds `get_config` and `from_config`, by which Keras's files hold a model or its main layer."""

    family: ClassVar[Family]
    config: Any

    def get_config(self: Any) -> dict[str, Any]:
        """The model's config and Keras's own fields."""
        own = {"name": self.name, "trainable": self.trainable}
        policy = keras.dtype_policies.serialize(self.dtype_policy)
        return {**own, "dtype": policy, "config": self.config.to_dict()}

    @classmethod
    def from_config(cls, config: Any, custom_objects: Any = None) -> Self:
        """One with new weights, from what `get_config` gave, or from a config of the hub's, as the old classes took."""
        del custom_objects  # nothing in the entry is an object of the user's
        if isinstance(config, cls.family.config):
            return cls(config)  # pyright: ignore[reportCallIssue]
        fields = dict(config)
        made = cls.family.config.from_dict(fields.pop("config"))
        if isinstance(fields.get("dtype"), dict):
            fields["dtype"] = keras.dtype_policies.deserialize(fields["dtype"])
        return cls(made, **fields)  # pyright: ignore[reportCallIssue]


class Serving(Configured, keras.Model):
    """Adds `export`, and what `model.save` and `keras.saving.load_model` need."""

    row: ClassVar[ModelClass]

    def export(
        self,
        filepath: str | Path,
        format: str = SAVED_MODEL,
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """Write a SavedModel whose signature `serving_default` takes input_ids and attention_mask, and gives the
        outputs by name. It needs no monoblock to run.

        `input_signature`: a dict of `tf.TensorSpec`s by argument, instead; lengths left open (None) stay open. Other
        formats are Keras's own.
        """
        signature = self.serving_signature() if input_signature is None else input_signature
        if isinstance(signature, Sequence) and len(signature) == 1:
            signature = signature[0]
        if not isinstance(signature, dict):
            raise ValueError(
                f"input_signature must be a dict of tf.TensorSpec by argument, got {type(signature).__name__}"
            )
        if format != SAVED_MODEL:
            super().export(
                str(filepath), format=format, verbose=verbose, input_signature=[signature], **kwargs
            )
            return
        if kwargs:
            raise TypeError(f"export has no argument {next(iter(kwargs))!r} for the format {format!r}")
        archive: Any = keras.export.ExportArchive()
        archive.track(self)
        archive.add_endpoint("serve", self.serve, input_signature=[signature])
        archive.write_out(str(filepath), verbose=bool(verbose))

    @property
    def input_signature(self) -> dict[str, tf.TensorSpec]:
        """The inputs of `serving`."""
        return self.serving_signature()

    @property
    def serving(self) -> Any:
        """A `tf.function` of a dict of inputs, which gives the outputs by name."""
        return tf.function(self.serve, input_signature=[self.input_signature], autograph=False)

    @property
    def _default_save_signature(self) -> Any:
        """What `tf.saved_model.save(model, folder)` takes for `serving_default`."""
        return self.serving

    def _get_save_spec(self, dynamic_batch: bool = True) -> Any:
        """What `TFLiteConverter.from_keras_model` asks for."""
        del dynamic_batch
        raise ValueError(
            "from_keras_model says no lengths: give export() an input_signature of known shapes, and its folder to "
            "TFLiteConverter.from_saved_model"
        )

    def save_signatures(self, folder: str | Path, signatures: Any = None) -> None:
        """Write a SavedModel with these signatures (name -> `tf.function` or concrete function, or one of them); by
        default `serving_default`, and `int64_serving` for ids of 64 bits."""
        if signatures is None:
            wide = {
                name: tf.TensorSpec(spec.shape, tf.int64, name=name)
                for name, spec in self.input_signature.items()
            }
            long = tf.function(self.serve, input_signature=[wide], autograph=False)
            signatures = {"serving_default": self.serving, "int64_serving": long}
        # The variables alone, as in `export`: TFLite reads wrong numbers from SavedModels of whole Keras 3 models.
        held: Any = tf.Module()
        held.held = [variable.value for variable in self.variables]
        tf.saved_model.save(held, str(folder), signatures=signatures)

    @tf.autograph.experimental.do_not_convert
    def serve(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The outputs of a dict of inputs as a flat dict of tensors, numbered where there is one for each layer."""
        out: ModelOutput = self(inputs, training=False, use_cache=False, return_dict=True)
        flat: dict[str, Any] = {}
        for name, value in out.items():
            many = enumerate(value) if isinstance(value, tuple) else ()
            flat |= {f"{name}_{i}": x for i, x in many} if isinstance(value, tuple) else {name: value}
        return flat

    def serving_signature(self) -> dict[str, tf.TensorSpec]:
        """The inputs of the exported model: batch and lengths are open."""
        shape = (None,) * (3 if self.row.head in ("choice", "double") else 2)
        names = ("input_ids", "attention_mask")
        return {name: tf.TensorSpec(shape, tf.int32, name=name) for name in names}
