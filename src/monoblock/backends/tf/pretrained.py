"""The public TF classes: built from a family's table, loaded from and saved in the hub's files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import keras
import tensorflow as tf

from monoblock import tree
from monoblock.backends.tf import heads, layers, loading
from monoblock.backends.tf.binding import OPTIONS, bound, plainly
from monoblock.backends.tf.cache import Cache, from_tuples, init_cache
from monoblock.backends.tf.checked import checked
from monoblock.backends.tf.decode import Generation
from monoblock.backends.tf.inputs import prepare
from monoblock.backends.tf.model import Backbone
from monoblock.backends.tf.ops import Tensor, after, size
from monoblock.backends.tf.options import LoadOptions
from monoblock.backends.tf.outputs import named, output_class
from monoblock.backends.tf.parameters import Parameters
from monoblock.backends.tf.serving import Serving
from monoblock.backends.tf.training import Training
from monoblock.backends.xla.checked import Checked, dropouts
from monoblock.backends.xla.inputs import AT_REST, Wanted
from monoblock.checkpoint.hub import find_weights
from monoblock.checkpoint.options import HubOptions
from monoblock.checkpoint.save import save_tensors
from monoblock.checkpoint.store import open_store
from monoblock.config import CONFIG_NAME, PretrainedConfig, as_own_config
from monoblock.errors import UnsupportedConfig
from monoblock.generation.config import GENERATION_CONFIG_NAME

log = logging.getLogger("monoblock")


class TFPreTrainedModel(Training, Serving, Parameters, Generation):
    """The base of all TF models, a `keras.Model`: `backbone`, and `head` where the class has one.

    Public classes are made by `make_class` from a family's table; their names, signatures, defaults and outputs
    are the hub's.
    """

    arguments: ClassVar[tuple[str, ...]]
    extra: ClassVar[tuple[str, ...]]
    framework: ClassVar[str] = "tf"
    supports_gradient_checkpointing: ClassVar[bool] = True
    main_input_name: ClassVar[str] = "input_ids"

    def __init__(self, config: PretrainedConfig, *inputs: Any, **kwargs: Any) -> None:
        """`kwargs`: Keras's `name`, `dtype` (a policy or its name) and `trainable`."""
        if inputs:
            raise ValueError(f"{self.row.name} takes a config and keywords, got {type(inputs[0]).__name__}")
        config = as_own_config(config, self.family.config, self.row.name)
        if getattr(config, "tf_legacy_loss", False):
            raise UnsupportedConfig(
                "tf_legacy_loss=True: losses are a mean over the labels here; set it to False"
            )
        # Labels and masks keep their dtypes: what computes in another one casts for itself.
        super().__init__(autocast=False, **kwargs)
        self.config = config
        self.spec = config.to_spec()
        self.name_or_path = config.name_or_path
        head = config.to_head(self.row.head) if self.row.head else None
        self.backbone = Backbone(self.spec, name="backbone", dtype=self.dtype_policy)
        self.backbone.gradient_checkpointing = bool(getattr(config, "gradient_checkpointing", False))
        self.head = head and heads.Head(
            self.spec, head, tied=bool(tree.tied(self.spec, head)), name="head", dtype=self.dtype_policy
        )
        self.seeds = keras.random.SeedGenerator() if any(dropouts(self.spec, head)) else None
        self.generation_config = self.default_generation_config() if self.can_generate() else None
        self.build()

    def build(self, input_shape: Any = None) -> None:
        """Make the weights, whose shapes depend on no input; the constructor has done so."""
        del input_shape
        if not self.backbone.built:
            self.backbone.build()
            if self.head is not None:
                self.head.build()

    # ------------------------------------------------------------------ forward

    @tf.autograph.experimental.do_not_convert
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; arguments, defaults and outputs are in the class's docstring."""
        return super().__call__(**self.bound(args, kwargs))

    def run(self, arguments: dict[str, Any]) -> Any:
        """The output of arguments that `bound` has made."""
        given = {name: value for name, value in arguments.items() if value is not None}
        options = {name: given.pop(name) for name in OPTIONS if name in given}
        with plainly():
            made, cache, wanted = self._checked(given, options)
        values = self.network(made.given, cache, wanted)
        if made.legacy and "past_key_values" in values:
            values["past_key_values"] = values["past_key_values"].to_legacy_cache()
        result = named(output_class(self.row.output), values)
        return result if self._option(options, "return_dict") else result.to_tuple()

    def _checked(
        self, given: dict[str, Any], options: Mapping[str, Any]
    ) -> tuple[Checked, Cache | None, Wanted]:
        """What the network takes: tensors, the cache and what is wanted; ValueError says what is wrong."""
        train = bool(given.pop("training", False))
        cache, legacy = self._cache(given, given.pop("past_key_values", None), options, train)
        head = self.head.spec if self.head is not None else None
        made = checked(self.spec, head, given, cache, train)
        made.legacy = legacy
        return made, cache, self._wanted(made, options, train)

    @tf.autograph.experimental.do_not_convert
    def network(
        self, given: Mapping[str, Tensor], cache: Cache | None = None, wanted: Wanted = AT_REST
    ) -> dict[str, Any]:
        """The outputs by name, from tensors alone; all of it can be traced.

        `given`, each where it is needed: input_ids int32 (b, n) or inputs_embeds (b, n, w); attention_mask and
        sequence_id (b, n), with a static cache (b, max_length); position_ids (b or 1, n); token_type_ids (b, n);
        mc_token_ids (b,); head_mask; image_patches (P, size) and patch_rows (b, n), which say which patch each token
        is, -1 for none; labels.
        """
        backbone, x, types = self.backbone, given.get("inputs_embeds"), given.get("token_type_ids")
        x = backbone.lookup(given["input_ids"]) if x is None else tf.cast(x, self.compute_dtype)
        if (patches := given.get("image_patches")) is not None:
            x = backbone.with_patches(x, tf.cast(patches, self.compute_dtype), given["patch_rows"])
        if types is not None:
            x = x + backbone.lookup(types)
        count = size(x, 1)
        call = prepare(self.spec, given, count, cache, wanted)
        if wanted.train and self.seeds is not None:
            call = replace(call, seed=tf.cast(self.seeds.next(), tf.int32))
        held = None if cache is None else tuple(cache.layer(i) for i in range(self.spec.layers))
        out = backbone(x, call=call, layers=held, hidden_states=wanted.hidden_states)
        found = {
            "last_hidden_state": out.hidden,
            "hidden_states": out.hidden_states,
            "attentions": out.attentions,
        }
        seen = tf.zeros((), tf.int32) if cache is None or wanted.fresh else cache.length
        if cache is not None and out.layers is not None:
            found["past_key_values"] = replace(
                cache,
                keys=tuple(layer.keys for layer in out.layers),
                values=tuple(layer.values for layer in out.layers),
                length=seen + count,
            )
        if self.head is not None:
            if (mask := given.get("attention_mask")) is not None:
                given = {**given, "attention_mask": after(mask, seen, count, 1)}
            table = layers.rows_of(backbone.embed) if self.tied() else None
            head = heads.Projection(self.head, self.config.updated_head(self.head.spec), table, call.seed)
            found |= heads.outputs(head, out.hidden, given, wanted)
        return found

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Every way of giving arguments as keywords of tensors; TypeError for what the class does not take."""
        return bound(type(self).__name__, (self.arguments, self.extra), args, kwargs)

    def _cache(
        self, given: Mapping[str, Any], past: Any, options: Mapping[str, Any], train: bool
    ) -> tuple[Cache | None, bool]:
        """The cache, and whether it goes out as tuples (the form in which it came, or the hub's when none did)."""
        asked = options.get("use_cache")
        use = bool(getattr(self.config, "use_cache", False) and not train if asked is None else asked)
        if not self.spec.causal:
            if asked or past is not None:
                raise ValueError(
                    "a model that looks both ways has no cache: leave out use_cache and past_key_values"
                )
            return None, False
        if isinstance(past, Cache):
            return past, False
        if past is not None:
            return from_tuples(past), True
        if not use:
            return None, False
        tokens = given.get("input_ids", given.get("inputs_embeds"))
        nested = tokens is not None and len(tokens.shape) == (3 if "input_ids" in given else 4)
        rows = 0 if tokens is None else size(tokens, 0) * (size(tokens, 1) if nested else 1)
        return init_cache(self.spec, rows, None, self.compute_dtype), True

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for so many rows of up to `max_length` tokens, to be given as `past_key_values`."""
        return init_cache(self.spec, batch_size, max_length, self.compute_dtype)

    def _wanted(self, made: Checked, options: Mapping[str, Any], train: bool) -> Wanted:
        keep = options.get("logits_to_keep") or 0
        if not isinstance(keep, int):
            raise TypeError(
                f"logits_to_keep must be how many of the last tokens, an int, got {type(keep).__name__}"
            )
        return Wanted(
            train=train,
            attentions=self._option(options, "output_attentions"),
            hidden_states=self._option(options, "output_hidden_states"),
            fresh=made.fresh,
            keep=keep,
            choices=made.choices,
            nested=made.nested,
        )

    def _option(self, options: Mapping[str, Any], name: str) -> bool:
        value = options.get(name)
        return bool(getattr(self.config, name) if value is None else value)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Inputs that every class takes."""
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
    ) -> Self:
        """A model with a checkpoint's weights.

        The checkpoint is a folder or a name on the hub. `dtype` (or `torch_dtype`): "auto" (the default: Keras's global
        policy, or the checkpoint's own dtype), a dtype's name, or a Keras policy such as "mixed_bfloat16".
        `ignore_mismatched_sizes=True` makes tensors of other shapes anew instead of raising ShapeMismatch.
        `from_pt=True` reads PyTorch's files even where there is a `tf_model.h5`. `revision`, `token`, `cache_dir`,
        `local_files_only`, `force_download`, `subfolder`, `variant`, `use_safetensors` say which files. Other keywords
        set fields of the config (`num_labels=3`). HubError: the files cannot be had. CheckpointError: they do not fit.
        ValueError: an argument is wrong.
        """
        if model_args:
            raise TypeError(
                f"{cls.__name__}.from_pretrained takes one positional argument, got {1 + len(model_args)}"
            )
        options = LoadOptions(kwargs)
        settings, unused = cls._config_for(pretrained_model_name_or_path, config, options.hub, kwargs)
        if unused:
            raise TypeError(f"from_pretrained does not know the argument {next(iter(unused))!r}")
        files = find_weights(
            pretrained_model_name_or_path,
            options.hub,
            variant=options.variant,
            use_safetensors=options.use_safetensors,
            prefer=options.prefer,
        )
        store = open_store(files, "np")
        with layers.empty():
            dtype = loading.chosen_dtype(options.dtype, settings.dtype, store)
            model = cls(settings, dtype=dtype, name=options.name)
        model._load(store, options)
        settings.dtype = model.variable_dtype
        model.generation_config = model.file_generation_config(pretrained_model_name_or_path, options.hub)
        return model

    def _load(self, store: Any, options: LoadOptions) -> None:
        keymap = self.keymap()
        report = loading.load(
            self.parameter_variables(),
            self.parameter_shapes(),
            keymap,
            store,
            self.tied(),
            ignore_mismatched_sizes=options.ignore_mismatched_sizes,
        )
        for canonical in report.made:
            self.init_parameter(canonical)
        where = self.name_or_path or "the checkpoint"
        if report.made:
            hub = ", ".join(keymap.source(name).names[0] for name in report.made)
            log.warning(
                "%s: newly initialised, because %s has none that fits: %s. Train it.",
                type(self).__name__,
                where,
                hub,
            )
        if report.unused:
            unused = ", ".join(report.unused)
            log.info("%s: %s also holds %s, not used here", type(self).__name__, where, unused)

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
        push_to_hub: bool = False,
    ) -> None:
        """Write config.json, generation_config.json and safetensors by the hub's names, which every framework's classes
        read; whole or not at all. `saved_model=True`: an exported SavedModel besides, in `saved_model/1`.
        `max_shard_size`: bytes, or "5GB"."""
        if not safe_serialization or push_to_hub:
            name = "push_to_hub=True" if push_to_hub else "safe_serialization=False"
            raise ValueError(
                f"save_pretrained does not support {name}: it writes safetensors to a local folder"
            )
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_pretrained needs a folder, but {folder} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        self.config.architectures = [self.row.name]
        self.config.dtype = self.variable_dtype
        texts = {CONFIG_NAME: self.config.to_json_string()}
        if self.generation_config is not None:
            self.generation_config.validate()
            texts[GENERATION_CONFIG_NAME] = self.generation_config.to_json_string()
        save_tensors(
            folder, self.hub_state_dict(), framework="np", max_shard_size=max_shard_size, beside=texts
        )
        if saved_model:
            self.export(folder / "saved_model" / "1", verbose=False)

    # ------------------------------------------------------------------ switches and facts

    def gradient_checkpointing_enable(self) -> None:
        """While training, keep only each block's input and compute the rest again in the backward pass."""
        self.backbone.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self.backbone.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return self.backbone.gradient_checkpointing

    @property
    def base_model(self) -> Backbone:
        """The backbone: what the hub's classes call by the family's prefix."""
        return self.backbone
