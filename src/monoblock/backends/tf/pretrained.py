"""The base class of TF models: construction from a family's table, loading and saving of checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import tensorflow as tf

from monoblock import tree
from monoblock.backends.options import loading_info, opened, told_of_unused
from monoblock.backends.tf import heads, layers, loading
from monoblock.backends.tf.cache import Cache
from monoblock.backends.tf.decode import TFGenerationMixin
from monoblock.backends.tf.forward import Forward
from monoblock.backends.tf.main_layer import MainLayer
from monoblock.backends.tf.ops import Tensor, after, size
from monoblock.backends.tf.options import LoadOptions
from monoblock.backends.tf.parameters import Parameters
from monoblock.backends.tf.parts import Builder, Holder
from monoblock.backends.tf.serving import Serving
from monoblock.backends.tf.training import Training
from monoblock.backends.xla.inputs import DEFAULT_OPTIONS, ForwardOptions
from monoblock.checkpoint.hdf5 import is_weights
from monoblock.checkpoint.hub import WeightFiles
from monoblock.checkpoint.matching import match_weights
from monoblock.checkpoint.options import HubOptions
from monoblock.checkpoint.save import save_tensors
from monoblock.checkpoint.store import open_store
from monoblock.checkpoint.transaction import staged
from monoblock.config import CONFIG_NAME, PretrainedConfig, as_own_config
from monoblock.errors import UnsupportedConfig
from monoblock.generation.config import GENERATION_CONFIG_NAME

log = logging.getLogger("monoblock")

OLD_FILES = (".h5", ".hdf5")  # Keras 2's weight files


class TFPreTrainedModel(Forward, Training, Serving, Holder, Parameters, TFGenerationMixin):
    """The base class of all TF models, a `keras.Model` of the main layer, under the family's prefix, and the head's
    layers.

    `make_class` creates the public classes from the families' tables; their names, signatures, defaults and outputs are
    those of transformers.
    """

    main_class: ClassVar[type[MainLayer]]
    framework: ClassVar[str] = "tf"
    supports_gradient_checkpointing: ClassVar[bool] = True

    def __init__(self, config: PretrainedConfig, *inputs: Any, **kwargs: Any) -> None:
        """`kwargs`: Keras's `name`, `dtype` (a policy or its name) and `trainable`."""
        if inputs:
            raise ValueError(f"{self.row.name} takes a config and keywords, got {type(inputs[0]).__name__}")
        config = as_own_config(config, self.family.config, self.row.name)
        if getattr(config, "tf_legacy_loss", False):
            raise UnsupportedConfig(
                "tf_legacy_loss=True: not supported, losses are a mean over the labels; set it to False"
            )
        # Labels and masks keep their dtypes; layers cast their inputs themselves.
        super().__init__(autocast=False, **kwargs)
        self.config = config
        self.spec = config.to_spec()
        self.name_or_path = config.name_or_path
        self.head_spec = config.to_head(self.row.head) if self.row.head else None
        self._make_layers()
        self.generation_config = self.default_generation_config() if self.can_generate() else None
        self.build()

    def _make_layers(self) -> None:
        """Create the main layer and the head's layers from the family's tables."""
        family, names = self.family, self.family.keras_names
        children = self.head_layers()
        leaf = layers.Leaves(self.spec, self.head_spec, self.dtype_policy, names.table)
        builder = Builder(self.spec, heads.KINDS_OF_PARTS, leaf, names)
        self.roles, self.shapes = {}, {}
        for name in builder.ordered((family.prefix, *children)):
            if name == family.prefix:
                head = self.head_spec if self.headed else None
                main = self.main_class(self.config, head=head, name=name, dtype=self.dtype_policy)
                setattr(self, name, main)
                self.shapes[name] = None
            else:
                builder.add(self, name, children[name], {})
        if self.has("summary") and self.head_spec is not None and self.head_spec.summary is not None:
            self.role("summary").settings = self.head_spec.summary

    @property
    def base_model(self) -> MainLayer:
        """The main layer, which is also the attribute with the family's prefix."""
        return self.main

    @property
    def seeds(self) -> Any:
        """The generator of dropout seeds; None if all dropout probabilities are 0."""
        return self.main.seeds

    def build(self, input_shape: Any = None) -> None:
        """Create the weights, whose shapes do not depend on inputs; called by the constructor."""
        del input_shape
        self.build_children()

    @tf.autograph.experimental.do_not_convert
    def network(
        self,
        given: Mapping[str, Tensor],
        cache: Cache | None = None,
        options: ForwardOptions = DEFAULT_OPTIONS,
    ) -> dict[str, Any]:
        main = self.main
        if not self.headed:
            return main.network(given, cache, options)
        seed = main.seed(options)
        found = main.hidden(given, cache, options, seed)
        hidden = found["last_hidden_state"]
        if (mask := given.get("attention_mask")) is not None:
            past = 0 if cache is None or options.fresh else cache.length
            given = {**given, "attention_mask": after(mask, past, size(hidden, 1), 1)}
        table = layers.rows_of(main.at("embed")) if self.tied() else None
        assert self.head_spec is not None
        head = heads.Head(self, self.config.updated_head(self.head_spec), table, seed)
        return found | heads.outputs(head, hidden, given, options)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Example inputs for every class."""
        ids = tf.zeros((1, 2, 3) if self.row.head == "choice" else (1, 3), tf.int32)
        return {"input_ids": ids}

    # ------------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        config: PretrainedConfig | str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """A model with a checkpoint's weights.

        The checkpoint is a folder or a name on the hub. `dtype` (or `torch_dtype`): "auto" (the default: Keras's global
        policy, or the checkpoint's own dtype), a dtype's name, or a Keras policy such as "mixed_bfloat16".
        `ignore_mismatched_sizes=True` initialises tensors of other shapes instead of raising ShapeMismatch;
        `strict=False` ignores tensors that the model does not use, with a warning. `output_loading_info=True` returns
        (model, {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}). `from_pt=True` prefers PyTorch's
        files to `tf_model.h5`, `from_tf=True` `tf_model.h5` to all others. `revision`, `token`, `cache_dir`,
        `local_files_only`, `force_download`, `subfolder`, `variant`, `use_safetensors` select the files. Other keywords
        set fields of the config (`num_labels=3`). HubError: the files are not available. CheckpointError: they do not
        match the model. ValueError: an invalid argument.
        """
        if model_args:
            raise TypeError(
                f"{cls.__name__}.from_pretrained takes one positional argument, got {1 + len(model_args)}"
            )
        options = LoadOptions(kwargs)
        settings, generation, store = opened(cls, pretrained_model_name_or_path, config, options, kwargs)
        cls._check_tensors(settings, store, options)
        with layers.empty():
            dtype = loading.chosen_dtype(options.dtype, settings.dtype, store)
            model = cls(settings, dtype=dtype, name=options.name)
        info = model._load(
            store, ignore_mismatched_sizes=options.ignore_mismatched_sizes, strict=options.strict
        )
        settings.dtype = model.variable_dtype
        if generation is not None:
            model.generation_config = generation
        return (model, info) if options.loading_info else model

    @classmethod
    def _check_tensors(cls, config: PretrainedConfig, store: Any, options: LoadOptions) -> None:
        """Raise the errors of `load_parameters` before any variable is allocated: a config may have any size."""
        spec, kind = config.to_spec(), cls.row.head
        head = config.to_head(kind) if kind else None
        match_weights(
            store,
            cls.family.keymap(config, kind),
            tree.parameters(spec, head),
            tree.tied(spec, head),
            ignore_mismatched_sizes=options.ignore_mismatched_sizes,
            strict=options.strict,
        )

    def load_weights(self, filepath: Any, skip_mismatch: bool = False, **kwargs: Any) -> None:
        """Keras's method; also loads Keras 2's `.h5` files, as transformers' TF classes wrote (`tf_model.h5`), by the
        names in them."""
        path = Path(filepath)
        if path.suffix in OLD_FILES and not path.name.endswith(".weights.h5") and is_weights(path):
            if unknown := kwargs.keys() - {"by_name"}:
                raise TypeError(f"load_weights of a {path.suffix} file has no argument {min(unknown)!r}")
            store = open_store(WeightFiles(kind="h5", paths=(path,)), "np")
            self._load(store, ignore_mismatched_sizes=skip_mismatch)
        else:
            super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)

    def _load(
        self, store: Any, *, ignore_mismatched_sizes: bool, strict: bool = True
    ) -> dict[str, list[str]]:
        report = self.load_parameters(store, ignore_mismatched_sizes=ignore_mismatched_sizes, strict=strict)
        where = self.name_or_path or "the checkpoint"
        if report.made:
            log.warning(
                "%s: newly initialised, because %s has none that fits: %s. Train it.",
                type(self).__name__,
                where,
                ", ".join(report.made),
            )
        told_of_unused(type(self).__name__, where, report)
        return loading_info(report.missing, report.mismatched, report)

    @classmethod
    def _config_for(
        cls, name: str | Path, config: Any, hub: HubOptions, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if config is not None and not isinstance(config, str | Path):
            return as_own_config(config, cls.family.config, cls.__name__).changed(**kwargs)
        source = name if config is None else config
        return cls.family.config.from_pretrained(source, return_unused_kwargs=True, **asdict(hub), **kwargs)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        max_shard_size: int | str = "50GB",
        safe_serialization: bool = True,
        saved_model: bool = False,
        version: int = 1,
        signatures: Any = None,
        push_to_hub: bool = False,
    ) -> None:
        """Write config.json, generation_config.json and safetensors with transformers' names, which the classes of all
        frameworks read; atomic: all files or none. `max_shard_size`: bytes, or "5GB".

        `saved_model=True`: also write a SavedModel to `saved_model/<version>`, with `signatures` (name ->
        `tf.function`); by default `serving_default` and, for 64-bit ids, `int64_serving`.
        """
        if signatures is not None and not saved_model:
            raise ValueError("signatures need saved_model=True")
        if not safe_serialization or push_to_hub:
            name = "push_to_hub=True" if push_to_hub else "safe_serialization=False"
            raise ValueError(
                f"save_pretrained does not support {name}: it writes safetensors to a local folder"
            )
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_pretrained needs a folder, but {folder} is a file")
        self.config.architectures = [self.config.stored_class(self.row.name)]
        self.config.dtype = self.variable_dtype
        texts = {CONFIG_NAME: self.config.to_json_string()}
        if self.generation_config is not None:
            self.generation_config.validate()
            texts[GENERATION_CONFIG_NAME] = self.generation_config.to_json_string()
        with staged(folder) as stage:
            save_tensors(
                stage, self.hub_state_dict(), framework="np", max_shard_size=max_shard_size, extra_files=texts
            )
            if saved_model:
                self.save_signatures(stage.files / "saved_model" / str(version), signatures)

    # ------------------------------------------------------------------ gradient checkpointing

    def gradient_checkpointing_enable(self) -> None:
        """In training, store only each block's input and recompute activations in the backward pass."""
        self.main.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Store all activations."""
        self.main.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return self.main.gradient_checkpointing
