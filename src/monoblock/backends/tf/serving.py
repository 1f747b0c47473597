"""Keras's formats: a model's configuration in `.keras` files, and SavedModel export."""

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
    """Adds `get_config` and `from_config`, with which Keras serialises a model or its main layer."""

    family: ClassVar[Family]
    config: Any

    def get_config(self: Any) -> dict[str, Any]:
        """The model's config and Keras's fields."""
        fields = {"name": self.name, "trainable": self.trainable}
        policy = keras.dtype_policies.serialize(self.dtype_policy)
        return {**fields, "dtype": policy, "config": self.config.to_dict()}

    @classmethod
    def from_config(cls, config: Any, custom_objects: Any = None) -> Self:
        """Create an instance with new weights, from the result of `get_config` or from a config of the family."""
        del custom_objects  # the configuration has no custom objects
        if isinstance(config, cls.family.config):
            return cls(config)  # pyright: ignore[reportCallIssue]
        fields = dict(config)
        made = cls.family.config.from_dict(fields.pop("config"))
        if isinstance(fields.get("dtype"), dict):
            fields["dtype"] = keras.dtype_policies.deserialize(fields["dtype"])
        return cls(made, **fields)  # pyright: ignore[reportCallIssue]


class Serving(Configured, keras.Model):
    """Adds `export`, and the methods for `model.save` and `keras.saving.load_model`."""

    row: ClassVar[ModelClass]

    def export(
        self,
        filepath: str | Path,
        format: str = SAVED_MODEL,
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """Write a SavedModel whose signature `serving_default` takes input_ids and attention_mask and returns the
        outputs by name. It runs without monoblock.

        `input_signature`: other inputs, a dict of `tf.TensorSpec` by argument; dynamic axes (None) stay dynamic. Other
        formats are passed to Keras.
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
        """A `tf.function` from a dict of inputs to the outputs by name."""
        return tf.function(self.serve, input_signature=[self.input_signature], autograph=False)

    @property
    def _default_save_signature(self) -> Any:
        """The signature `serving_default` of `tf.saved_model.save(model, folder)`."""
        return self.serving

    def _get_save_spec(self, dynamic_batch: bool = True) -> Any:
        """Called by `TFLiteConverter.from_keras_model`; ValueError."""
        del dynamic_batch
        raise ValueError(
            "from_keras_model has no static lengths: give export() an input_signature with static shapes, and its "
            "folder to TFLiteConverter.from_saved_model"
        )

    def save_signatures(self, folder: str | Path, signatures: Any = None) -> None:
        """Write a SavedModel with these signatures (name -> `tf.function` or concrete function, or one of them); by
        default `serving_default`, and `int64_serving` for 64-bit ids."""
        if signatures is None:
            wide = {
                name: tf.TensorSpec(spec.shape, tf.int64, name=name)
                for name, spec in self.input_signature.items()
            }
            long = tf.function(self.serve, input_signature=[wide], autograph=False)
            signatures = {"serving_default": self.serving, "int64_serving": long}
        # Only the variables, as in `export`: TFLite reads wrong values from SavedModels of whole Keras 3 models.
        held: Any = tf.Module()
        held.held = [variable.value for variable in self.variables]
        tf.saved_model.save(held, str(folder), signatures=signatures)

    @tf.autograph.experimental.do_not_convert
    def serve(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The outputs for a dict of inputs as a flat dict of tensors; per-layer outputs are numbered."""
        out: ModelOutput = self(inputs, training=False, use_cache=False, return_dict=True)
        flat: dict[str, Any] = {}
        for name, value in out.items():
            many = enumerate(value) if isinstance(value, tuple) else ()
            flat |= {f"{name}_{i}": x for i, x in many} if isinstance(value, tuple) else {name: value}
        return flat

    def serving_signature(self) -> dict[str, tf.TensorSpec]:
        """The inputs of the exported model, with a dynamic batch size and length."""
        shape = (None,) * (3 if self.row.head in ("choice", "double") else 2)
        names = ("input_ids", "attention_mask")
        return {name: tf.TensorSpec(shape, tf.int32, name=name) for name in names}
