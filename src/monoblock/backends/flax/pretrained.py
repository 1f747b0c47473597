"""The public Flax classes: a Linen network and its parameters, loaded from and saved in the hub's files."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.errors import FlaxError

from monoblock.backends.flax import cache as caches
from monoblock.backends.flax import loading
from monoblock.backends.flax.cache import Cache
from monoblock.backends.flax.checked import checked
from monoblock.backends.flax.decode import Generation
from monoblock.backends.flax.loading import Tree
from monoblock.backends.flax.network import Network
from monoblock.backends.flax.options import TORCH_DTYPE, LoadOptions, computation
from monoblock.backends.flax.outputs import output_class
from monoblock.backends.flax.parameters import Parameters
from monoblock.backends.flax.sharding import Sharded
from monoblock.backends.flax.training import Training
from monoblock.backends.options import loading_info, opened, told_of_unused
from monoblock.backends.xla.inputs import Wanted
from monoblock.checkpoint.msgpack_save import save_msgpack
from monoblock.checkpoint.options import HubOptions
from monoblock.checkpoint.save import save_tensors
from monoblock.config import CONFIG_NAME, PretrainedConfig, as_own_config
from monoblock.generation.config import GENERATION_CONFIG_NAME

log = logging.getLogger("monoblock")

# What the hub's other classes take and these do not, and where it is instead.
ELSEWHERE = {
    "labels": "model.compute_loss(outputs, labels=...) gives the loss",
    "mc_labels": "model.compute_loss(outputs, mc_labels=...) gives the loss",
    "start_positions": "model.compute_loss(outputs, start_positions=..., end_positions=...) gives the loss",
    "end_positions": "model.compute_loss(outputs, start_positions=..., end_positions=...) gives the loss",
    "use_cache": "a call keeps a cache if past_key_values=model.init_cache(batch, max_length) came in",
    "head_mask": "the PyTorch classes take it",
}


class FlaxPreTrainedModel(Parameters, Sharded, Training, Generation):
    """The base of all Flax models: a Linen network (`module`) and its parameters (`params`, nested dicts).

    `dtype` is the computation's type and leaves the parameters' alone. `input_shape` is the hub's argument; no
    parameter depends on it. `seed` makes the random parameters, which exist from when they are first used. With
    `_do_init=False` the model holds none, and each call is given `params`. ValueError for a config of another family.
    """

    inputs: ClassVar[tuple[str, ...]]
    framework: ClassVar[str] = "flax"
    main_input_name: ClassVar[str] = "input_ids"

    def __init__(
        self,
        config: PretrainedConfig,
        input_shape: tuple[int, ...] = (1, 1),
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
        **kwargs: Any,
    ) -> None:
        config = as_own_config(config, self.family.config, type(self).__name__)
        remat = kwargs.pop("gradient_checkpointing", getattr(config, "gradient_checkpointing", False))
        if kwargs:
            name = next(iter(kwargs))
            instead = f": {TORCH_DTYPE}" if name == "torch_dtype" else ""
            raise TypeError(f"{type(self).__name__} has no argument {name!r}{instead}")
        self.config = config
        self.spec = config.to_spec()
        self.name_or_path = config.name_or_path
        self.dtype = computation(dtype)
        self.seed, self.input_shape, self._do_init = seed, input_shape, _do_init
        head = config.to_head(self.row.head) if self.row.head else None
        layout = self.family.layout(config, self.row)
        kind = output_class(self.row.output)
        self.module = Network(layout, self.spec, head, dtype=self.dtype, remat=bool(remat), output=kind)
        self.generation_config = self.default_generation_config() if self.can_generate() else None
        self._params: Tree | None = None

    # ------------------------------------------------------------------ forward

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Mapping[str, Any] | None = None,
        past_key_values: Cache | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """Run the model; inputs, defaults and outputs are in the class's docstring."""
        self._check_names(inputs)
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **inputs,
        }
        keep = arguments.pop("logits_to_keep", None) or 0
        if not isinstance(keep, int) or keep < 0:
            raise ValueError(f"logits_to_keep must be how many of the last tokens, got {keep!r}")
        call = checked(self.spec, self.module.head_spec, arguments, past_key_values, train)
        wanted = Wanted(
            train=bool(train),
            attentions=self._option(output_attentions, "output_attentions"),
            hidden_states=self._option(output_hidden_states, "output_hidden_states"),
            fresh=call.fresh,
            keep=keep,
            choices=call.choices,
            nested=call.nested,
        )
        kept = self.params if params is None else params
        key = self.dropout_key(dropout_rng) if train else None
        kind = output_class(self.row.output)
        try:
            found = forward(
                self.updated_module(), wanted, _names(kind), kept, call.given, past_key_values, key
            )
        except FlaxError:
            self.checked_params(kept)  # says in words which leaf does not fit
            raise
        result = kind(**found)
        return result if self._option(return_dict, "return_dict") else result.to_tuple()

    def _check_names(self, inputs: Mapping[str, Any]) -> None:
        for name in inputs:
            if name in self.inputs:
                continue
            if name in ELSEWHERE:
                raise TypeError(f"{type(self).__name__} has no argument {name!r}: {ELSEWHERE[name]}")
            raise TypeError(
                f"{type(self).__name__} has no argument {name!r}; beside those of its signature it takes: "
                + ", ".join(self.inputs)
            )

    def _option(self, value: bool | None, name: str) -> bool:
        return bool(getattr(self.config, name) if value is None else value)

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for so many rows of up to `max_length` tokens, to be given as `past_key_values`.

        Layers with a window keep no more than that. ValueError for a model that looks both ways.
        """
        return caches.init_cache(self.spec, batch_size, max_length, self.dtype)

    # ------------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        dtype: Any = jnp.float32,
        *model_args: Any,
        config: PretrainedConfig | str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """A model with a checkpoint's parameters; with `_do_init=False`, a model without any, and its parameters.

        The checkpoint is a folder or a name on the hub. `dtype` is the computation's type: the parameters have that of
        the files (`to_bf16`, `to_fp16` and `to_fp32` change it). Read are safetensors, then flax_model.msgpack,
        pytorch_model.bin (which needs PyTorch) and tf_model.h5; `from_pt=True`, as the hub's older classes need it,
        puts PyTorch's own before the others. `ignore_mismatched_sizes=True` makes parameters of other shapes anew
        instead of raising ShapeMismatch; `strict=False` passes over tensors that the model has no place for, with a
        warning. `output_loading_info=True` gives besides, as the last of the results, {"missing_keys",
        "unexpected_keys", "mismatched_keys", "error_msgs"}. `revision`, `token`, `cache_dir`, `local_files_only`,
        `force_download`, `subfolder`, `variant`, `use_safetensors` say which files. Other keywords set fields of the
        config (`num_labels=3`).

        A head that the files lack is made anew, with a warning; with `_do_init=False` it is not in the parameters:
        `model.init_weights(key, params=params)` adds it. HubError: the files cannot be had. CheckpointError: they do
        not fit. ValueError: an argument is wrong.
        """
        if model_args:
            raise TypeError(
                f"{cls.__name__}.from_pretrained takes two positional arguments: a name and a dtype"
            )
        options = LoadOptions(kwargs)
        settings, generation, store = opened(cls, pretrained_model_name_or_path, config, options, kwargs)
        model = cls(settings, dtype=dtype, _do_init=options.do_init, **options.init)
        params, info = model._load(store, options)
        if generation is not None:
            model.generation_config = generation
        more = (info,) if options.loading_info else ()
        if not options.do_init:
            return (model, params, *more)
        model.params = params
        return (model, *more) if more else model

    def _load(self, store: Any, options: LoadOptions) -> tuple[Tree, dict[str, list[str]]]:
        keymap, shapes = self.keymap(), self.canonical_shapes()
        params, report = loading.load(
            store,
            keymap,
            shapes,
            self.tied(),
            self.groups,
            ignore_mismatched_sizes=options.ignore_mismatched_sizes,
            strict=options.strict,
        )
        where = self.name_or_path or "the checkpoint"
        missing, mismatched = (
            [keymap.source(name).names[0] for name in names] for names in (report.missing, report.mismatched)
        )
        if report.made:
            hub = ", ".join((*missing, *mismatched))
            what = "newly initialised" if self._do_init else "not in params"
            log.warning(
                "%s: %s, because %s has none that fits: %s. Train it.", type(self).__name__, what, where, hub
            )
        told_of_unused(type(self).__name__, where, report)
        if self._do_init and report.made:
            params = self.init_weights(self.key, params=params)
        return params, loading_info(missing, mismatched, report)

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
        params: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write config.json, generation_config.json and safetensors by the hub's names; whole or not at all.

        `params`: a tree to write instead of the model's. `max_shard_size`: bytes, or "5GB".
        `safe_serialization=False` writes flax_model.msgpack, as transformers 4's Flax classes read it.
        """
        if push_to_hub:
            raise ValueError("save_pretrained does not support push_to_hub=True: it writes to a local folder")
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_pretrained needs a folder, but {folder} is a file")
        tensors = self.hub_tensors(params)
        kept = self.params if params is None else params
        self.config.architectures = [self.config.stored_class(self.row.name)]
        self.config.dtype = str(next(iter(jax.tree.leaves(kept))).dtype)
        texts = {CONFIG_NAME: self.config.to_json_string()}
        if self.generation_config is not None:
            self.generation_config.validate()
            texts[GENERATION_CONFIG_NAME] = self.generation_config.to_json_string()
        if safe_serialization:
            save_tensors(folder, tensors, framework="np", max_shard_size=max_shard_size, beside=texts)
            return
        save_msgpack(folder, loading.own_arrays(kept), max_shard_size=max_shard_size, beside=texts)

    def can_generate(self) -> bool:
        """Whether the class predicts the next token."""
        return self.row.head == "causal"


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def forward(
    module: Network,
    wanted: Wanted,
    names: tuple[str, ...],
    params: Mapping[str, Any],
    given: Mapping[str, jax.Array],
    cache: Cache | None,
    key: jax.Array | None,
) -> dict[str, Any]:
    """The outputs of these names; models of one spec share what is compiled."""
    rngs = None if key is None else {"dropout": key}
    found = module.apply({"params": params}, given, cache, wanted, rngs=rngs, method="run")
    return {name: value for name, value in found.items() if name in names}  # pyright: ignore


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(kind.__dataclass_fields__)
