"""The base class of Flax models: a Linen network with its parameters, loading and saving of checkpoints."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.errors import FlaxError

from monoblock.backends.flax import cache as caches
from monoblock.backends.flax import explicit, loading
from monoblock.backends.flax.cache import Cache
from monoblock.backends.flax.checked import check_inputs
from monoblock.backends.flax.decode import FlaxGenerationMixin
from monoblock.backends.flax.loading import Tree
from monoblock.backends.flax.network import Network
from monoblock.backends.flax.options import TORCH_DTYPE, LoadOptions, computation
from monoblock.backends.flax.outputs import output_class
from monoblock.backends.flax.parameters import Parameters
from monoblock.backends.flax.placement import from_host, put
from monoblock.backends.flax.processes import Read, write_once
from monoblock.backends.flax.sharding import Sharded
from monoblock.backends.flax.training import Training
from monoblock.backends.options import loading_info, opened, told_of_unused
from monoblock.backends.xla.inputs import ForwardOptions
from monoblock.checkpoint.msgpack_save import save_msgpack
from monoblock.checkpoint.options import HubOptions
from monoblock.checkpoint.save import save_tensors
from monoblock.config import CONFIG_NAME, PretrainedConfig, as_own_config
from monoblock.generation.config import GENERATION_CONFIG_NAME

log = logging.getLogger("monoblock")

# Arguments of transformers' other classes that these do not have, and their replacements.
ELSEWHERE = {
    "labels": "model.compute_loss(outputs, labels=...) gives the loss",
    "mc_labels": "model.compute_loss(outputs, mc_labels=...) gives the loss",
    "start_positions": "model.compute_loss(outputs, start_positions=..., end_positions=...) gives the loss",
    "end_positions": "model.compute_loss(outputs, start_positions=..., end_positions=...) gives the loss",
    "use_cache": "a call returns a cache if past_key_values=model.init_cache(batch, max_length) is given",
    "head_mask": "the PyTorch classes take it",
}


class FlaxPreTrainedModel(Parameters, Sharded, Training, FlaxGenerationMixin):
    """The base class of all Flax models: a Linen network (`module`) and its parameters (`params`, nested dicts).

    `dtype` is the dtype of the computation, not of the parameters. `input_shape`: transformers' argument, on which no
    parameter depends. `seed`: of the random initialisation, which happens at the first use. With `_do_init=False` the
    model has no parameters, and each call takes `params`. ValueError for a config of another family.
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
        """Run the model; see the class's docstring for inputs, defaults and outputs."""
        self._check_names(inputs)
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **inputs,
        }
        keep = arguments.pop("logits_to_keep", None) or 0
        if not isinstance(keep, int) or keep < 0:
            raise ValueError(f"logits_to_keep must be the number of last tokens, got {keep!r}")
        options = ForwardOptions(
            train=bool(train),
            attentions=self._option(output_attentions, "output_attentions"),
            hidden_states=self._option(output_hidden_states, "output_hidden_states"),
            keep=keep,
        )
        params = self.params if params is None else params
        key = self.dropout_key(dropout_rng) if train else None
        given = (arguments, params, past_key_values, key)
        run = functools.partial(self._run, options)
        if (mesh := explicit.explicit(given)) is None:
            found = run(*given)
        else:
            layout = explicit.Layout.of(mesh, arguments, past_key_values, self.vocabulary_axes(params))
            found = explicit.run(mesh, run, given, layout)
        result = output_class(self.row.output)(**found)
        return result if self._option(return_dict, "return_dict") else result.to_tuple()

    def _run(
        self, options: ForwardOptions, arguments: dict[str, Any], params: Any, cache: Any, key: Any
    ) -> dict[str, Any]:
        """The outputs by name."""
        checked = check_inputs(self.spec, self.module.head_spec, arguments, cache, options.train)
        options = replace(options, fresh=checked.fresh, choices=checked.choices, nested=checked.nested)
        names = _names(output_class(self.row.output))
        try:
            return forward(self.updated_module(), options, names, params, checked.given, cache, key)
        except FlaxError:
            self.checked_params(params)  # raises an error that names the leaf
            raise

    def _check_names(self, inputs: Mapping[str, Any]) -> None:
        for name in inputs:
            if name in self.inputs:
                continue
            if name in ELSEWHERE:
                raise TypeError(f"{type(self).__name__} has no argument {name!r}: {ELSEWHERE[name]}")
            raise TypeError(
                f"{type(self).__name__} has no argument {name!r}; the further inputs are: "
                + ", ".join(self.inputs)
            )

    def _option(self, value: bool | None, name: str) -> bool:
        return bool(getattr(self.config, name) if value is None else value)

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens, for `past_key_values`.

        Layers with a sliding window store only the window. ValueError for a bidirectional model.
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
        """A model with a checkpoint's parameters; with `_do_init=False`, (model, params).

        The checkpoint is a folder or a name on the hub. `dtype` is the dtype of the computation; the parameters have
        that of the files (`to_bf16`, `to_fp16` and `to_fp32` change it). The first of these formats is read:
        safetensors, flax_model.msgpack, pytorch_model.bin (which needs PyTorch), tf_model.h5; `from_pt=True` puts
        PyTorch's first. `ignore_mismatched_sizes=True` initialises parameters of other shapes instead of raising
        ShapeMismatch; `strict=False` ignores tensors that the model does not use, with a warning.
        `output_loading_info=True` returns as the last result {"missing_keys", "unexpected_keys", "mismatched_keys",
        "error_msgs"}. `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, `subfolder`, `variant`,
        `use_safetensors` select the files. `mesh`, with `tensor_axis`, `fsdp_axis` and `data_axis`, shards the
        parameters over a mesh of devices as `shard_params` does; each process reads only its shards. Other keywords set
        fields of the config (`num_labels=3`).

        A head that is not in the files is initialised, with a warning; with `_do_init=False` it is missing in the
        parameters: `model.init_weights(key, params=params)` adds it. HubError: the files are not available.
        CheckpointError: they do not match the model. ValueError: an invalid argument.
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
        shardings = None if options.mesh is None else self.set_up_sharding(options.mesh, **options.axes)
        by_path = loading.flat(shardings or {})

        def to_device(leaf: loading.ParamLeaf, array: Any) -> Any:
            return from_host(array, by_path[leaf.path]) if by_path else jnp.asarray(array)

        params, report = loading.load(
            store,
            keymap,
            shapes,
            self.tied(),
            self.groups,
            to_device,
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
            params = params if shardings is None else jax.tree.map(put, params, shardings)
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
        """Write config.json, generation_config.json and safetensors with transformers' names; atomic: all files or
        none.

        `params`: a tree to write instead of the model's parameters. `max_shard_size`: bytes, or "5GB".
        `safe_serialization=False` writes flax_model.msgpack, as transformers 4's Flax classes read it. If
        the parameters are on devices of several processes, all must make the call: process 0 writes, the others wait.
        """
        if push_to_hub:
            raise ValueError("save_pretrained does not support push_to_hub=True: it writes to a local folder")
        folder = Path(save_directory)
        leaf_arrays = loading.flat(self.params if params is None else self.checked_params(params))
        self.config.architectures = [self.config.stored_class(self.row.name)]
        self.config.dtype = str(next(iter(leaf_arrays.values())).dtype)
        texts = {CONFIG_NAME: self.config.to_json_string()}
        if self.generation_config is not None:
            self.generation_config.validate()
            texts[GENERATION_CONFIG_NAME] = self.generation_config.to_json_string()
        numbers = {path: number for number, path in enumerate(leaf_arrays)}
        leaves = self.leaves.values()

        def write(read: Read) -> None:
            if folder.is_file():
                raise ValueError(f"save_pretrained needs a folder, but {folder} is a file")

            def values(path: loading.LeafPath) -> Any:
                return read(numbers[path])

            if safe_serialization:
                tensors = loading.file_tensors(leaf_arrays, leaves, values)
                save_tensors(
                    folder, tensors, framework="np", max_shard_size=max_shard_size, extra_files=texts
                )
            else:
                arrays = loading.leaf_tensors(leaf_arrays, values)
                save_msgpack(folder, arrays, max_shard_size=max_shard_size, extra_files=texts)

        write_once(list(leaf_arrays.values()), write)

    def can_generate(self) -> bool:
        """Whether the class is a causal language model."""
        return self.row.head == "causal"


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def forward(
    module: Network,
    options: ForwardOptions,
    names: tuple[str, ...],
    params: Mapping[str, Any],
    given: Mapping[str, jax.Array],
    cache: Cache | None,
    key: jax.Array | None,
) -> dict[str, Any]:
    """The outputs with these names; models with equal specs share compiled programs."""
    rngs = None if key is None else {"dropout": key}
    found = module.apply({"params": params}, given, cache, options, rngs=rngs, method="run")
    return {name: value for name, value in found.items() if name in names}  # pyright: ignore


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(kind.__dataclass_fields__)
