"""The public PyTorch classes: built from a family's table, loaded from and saved as transformers' files."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from monoblock import modules, outputs, tree
from monoblock.backends.options import loading_info, told_of_unused
from monoblock.backends.pytorch import devices, heads, layers, loading, parts
from monoblock.backends.pytorch.adapters import AdapterMixin
from monoblock.backends.pytorch.checked import (
    TENSORS,
    as_indices,
    check_flag,
    check_tensor,
    check_tokens,
    check_types,
)
from monoblock.backends.pytorch.construction import Construction
from monoblock.backends.pytorch.generation.decoder import TorchGenerationMixin
from monoblock.backends.pytorch.inputs import PACKED, flattened, prepare
from monoblock.backends.pytorch.kernels import attention
from monoblock.backends.pytorch.model import (
    Attention,
    AttentionNorm,
    Block,
    Embeddings,
    ForwardContext,
    Mlp,
    Narrow,
    Stack,
    Widen,
    Wrapper,
    finished,
    layer_contexts,
    positioned,
)
from monoblock.backends.pytorch.options import LoadOptions
from monoblock.backends.pytorch.packed_forward import unpadded_states
from monoblock.backends.pytorch.parallel import files as shards
from monoblock.backends.pytorch.parallel import gradients, groups
from monoblock.backends.pytorch.parallel.modules import connect, shrink_tables
from monoblock.backends.pytorch.parallel.stages import current_stage, remove_others
from monoblock.backends.pytorch.parameters import Parameters
from monoblock.backends.pytorch.parts import Part
from monoblock.backends.pytorch.quantization import checkpoint, four_bit
from monoblock.backends.pytorch.tools import Recognised, Tools
from monoblock.checkpoint import foreign, quantized
from monoblock.checkpoint.adapter_files import base_of, is_adapter
from monoblock.checkpoint.hub import consistent_read, find_weights
from monoblock.checkpoint.options import HubOptions
from monoblock.checkpoint.save import save_tensors
from monoblock.checkpoint.store import open_store
from monoblock.checkpoint.weights import StateTensors
from monoblock.config import CONFIG_NAME, PretrainedConfig, as_own_config
from monoblock.families import warn_of_another_class
from monoblock.generation.config import GENERATION_CONFIG_NAME
from monoblock.generation.config import as_own_config as own_generation_config
from monoblock.partition import shard_spec
from monoblock.quantization import BitsAndBytesConfig

log = logging.getLogger("monoblock")

# The arguments of a batch that `forward_unpadded` takes.
_UNPADDED = {"input_ids", "attention_mask"}


class PreTrainedModel(Recognised, Parameters, TorchGenerationMixin, Construction, AdapterMixin, Tools):
    """The base of all PyTorch models. A model with a head holds the bare model, under the family's prefix, and
    the head's modules next to it; names, classes, signatures, defaults and outputs are transformers'.

    Public classes are made by `make_class` from a family's table.
    """

    make: ClassVar[Any]  # (name) -> the class of that name
    blank: ClassVar[Any]  # (name) -> a model of that class with nothing in it, for pickle
    framework: ClassVar[str] = "pt"
    supports_gradient_checkpointing: ClassVar[bool] = True
    main_input_name: ClassVar[str] = "input_ids"
    _no_split_modules: ClassVar[list[str]] = []

    def __init__(self, config: PretrainedConfig, *, add_pooling_layer: bool = True) -> None:
        super().__init__()
        self.config = config = as_own_config(config, self.family.config, self.row.name)
        self.spec = config.to_spec()
        if (group := groups.current()) is not None:
            self.tensor_group = group
            self.spec = shard_spec(self.spec, group.rank, group.size)
        self.name_or_path = config.name_or_path
        head = self.row.head if add_pooling_layer or self.row.head != "pooler" else None
        self.head_spec = config.to_head(head) if head else None
        self.gradient_checkpointing = False
        self.checkpointing: dict[str, Any] | None = None
        device = loading.new_parameters_device()
        with torch.device("meta"), loading.Uninitialised():
            self._build()
            if self.tensor_group is not None:
                shrink_tables(self, self.tensor_group)
            if (stage := current_stage(self.spec)) is not None:
                self.pipeline_stage = stage
                remove_others(self.get_submodule(self.module_path("layers")), stage)
        if getattr(config, "gradient_checkpointing", False):
            self.gradient_checkpointing_enable()
        self.set_attn_implementation(config._attn_implementation)
        self.generation_config = self.default_generation_config() if self.can_generate() else None
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights()
        self.tie_weights()

    def _build(self) -> None:
        """Build the modules from the family's tree; the bare model inside a headed model is an instance of its
        class."""
        family, kind = self.family, self.row.head
        layout = family.tree(self.config)
        leaves = layers.Leaves(self.spec, self.head_spec)
        builder = parts.Builder(KINDS, leaves, self._prepare, self.spec.layers)
        if kind in (None, "pooler"):
            bare = {n: c for n, c in layout.children.items() if self.head_spec or not _is_pooler(c)}
            layout = replace(layout, children=bare)
            builder.fill(self, layout)
            self.module_paths = {role: ".".join(path) for role, path in layout.paths()}
            return
        self.fused_tensors, self.roles, self.tuples = {}, {"bare": family.prefix}, False
        base = self.make(family.bare_class.name)(self.config, add_pooling_layer=kind == "choice")
        self.add_module(family.prefix, base)
        heads = modules.ModuleSpec(self.row.name, "head", family.heads[kind])
        builder.fill(self, heads)
        if self.has("lm_head"):
            head = self.role("lm_head")
            head.register_parameter("bias", head.role("head_out").bias)
        self.module_paths = {role: f"{family.prefix}.{path}" for role, path in base.module_paths.items()}
        self.module_paths |= {role: ".".join(path) for role, path in heads.paths()}

    def _prepare(self, part: Any, layer: int) -> None:
        """Set a part's options."""
        part.prepare(self.spec, layer)
        if isinstance(part, heads.SummaryHead) and self.head_spec is not None and self.head_spec.summary:
            part.settings = self.head_spec.summary

    def __reduce_ex__(self, protocol: Any) -> Any:
        if "row" in vars(type(self)):
            return type(self).blank, (self.row.name,), self.__getstate__()
        return super().__reduce_ex__(protocol)

    # ------------------------------------------------------------------ forward

    def forward_bare(self, *args: Any, **kwargs: Any) -> Any:
        """Hidden states; arguments, defaults and outputs are in the class's docstring."""
        keep = kwargs.pop("keep", None)
        given = self._bind(args, kwargs)
        if self.training and self.spec.attention.by_segment and given.get("sequence_id") is None:
            raise ValueError(
                "the config sets attn_uses_sequence_id=True: training needs sequence_id (batch, tokens)"
            )
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        shape = check_tokens(self.spec, ids, embeds)
        if ids is not None:
            given["input_ids"] = ids = as_indices(ids)
        if self.tensor_group is not None:
            self._refuse_inputs(given)
        inputs = prepare(self.spec, shape, given, self._uses_cache(given))
        if ids is None and (given.get("image_patches") is not None or given.get("pixel_values") is not None):
            raise ValueError(
                "image patches replace the tokens of their id: give input_ids, not inputs_embeds"
            )
        tokens: Any = ids if embeds is None else embeds
        types = given.get("token_type_ids")
        if ids is not None and not (self.has("embeddings") and types is None):
            tokens = self.embed(ids, given)
        if types is not None:
            check_types(types, shape[:2], self.spec)
            tokens = tokens + self.get_input_embeddings()(as_indices(types))
        context = inputs.context
        context.attentions = [] if self._option(given, "output_attentions") else None
        context.hidden_states = [] if self._option(given, "output_hidden_states") else None
        context.keep = keep if context.attentions is None and context.hidden_states is None else None
        context.checkpointing = self.checkpointing if self.gradient_checkpointing and self.training else None
        if self.has("stack"):
            hidden = self.role("stack")(self.embedded(tokens, context), context)
        else:  # `run_layers` inlined, to avoid a stack frame
            hidden = self.embedded(tokens, context)
            for layer, own in layer_contexts(self, hidden, context):
                hidden = own.after(layer(hidden, own))
            hidden = finished(self, hidden, context)
        return self._output(
            given,
            last_hidden_state=hidden,
            pooler_output=self.role("pooler")(hidden) if self.has("pooler") else None,
            past_key_values=inputs.past(),
            hidden_states=None if context.hidden_states is None else tuple(context.hidden_states),
            attentions=None if context.attentions is None else tuple(context.attentions),
        )

    def _refuse_inputs(self, given: Mapping[str, Any]) -> None:
        """ValueError for an argument that has an axis of all heads."""
        if given.get("head_mask") is not None:
            self.refuse_sharded("head_mask")
        if self._option(given, "output_attentions"):
            self.refuse_sharded("output_attentions=True")

    def forward_headed(self, *args: Any, **kwargs: Any) -> Any:
        """The bare model, then the head; arguments, defaults and outputs are in the class's docstring."""
        given = self._bind(args, kwargs)
        if self.row.head in ("choice", "double"):
            given = flattened(given)
        base = self.bare
        inner = {name: value for name, value in given.items() if name in base.arguments or name in PACKED}
        for name in ("output_attentions", "output_hidden_states"):
            inner[name] = self._option(given, name)
        inner["return_dict"] = True
        if (keep := self._kept(given)) is not None:
            inner["keep"] = keep
        out = base(**inner)
        return self._output(given, **{**out, **heads.outputs(self, out, given)})

    def forward_unpadded(self, given: Mapping[str, Any]) -> Any | None:
        """The output of a padded batch (`input_ids`, `attention_mask`), computed without its padding by the native
        library, without gradients; at padding it is that of zero hidden states. None if this model or this call needs
        `forward`."""
        if self.row.head in ("choice", "double") or not {"input_ids"} <= given.keys() <= _UNPADDED:
            return None
        if any(self._option(given, name) for name in ("output_attentions", "output_hidden_states")):
            return None
        base, mask = self.bare, given.get("attention_mask")
        reads_first = base.has("pooler") or self.row.head == "first"
        if reads_first and mask is not None and not mask[:, 0].all():
            return None  # it reads the state of a row's first token, which is padding
        hidden = unpadded_states(self, given["input_ids"], mask)
        if hidden is None:
            return None
        pooled = base.role("pooler")(hidden) if base.has("pooler") else None
        if base is self:
            return self._output(given, last_hidden_state=hidden, pooler_output=pooled)
        out = base._output({"return_dict": True}, last_hidden_state=hidden, pooler_output=pooled)
        return self._output(given, **{**out, **heads.outputs(self, out, dict(given))})

    def _output(self, given: Mapping[str, Any], **values: Any) -> Any:
        """The class's output, from the values that it has a field for."""
        kind = getattr(outputs, self.row.output)
        result = kind(**{name: value for name, value in values.items() if name in kind.__dataclass_fields__})
        return result if self._option(given, "return_dict") else result.to_tuple()

    def embedded(self, tokens: Tensor, context: ForwardContext) -> Tensor:
        """The input of the first layer (b, s, w), from ids (b, s) or vectors (b, s, w)."""
        if self.has("embeddings"):
            return self.role("embeddings")(tokens, context)
        return positioned(self, tokens, context)

    def _kept(self, given: Mapping[str, Any]) -> int | None:
        """The number of last tokens whose logits are needed, for which alone the last block is computed; None: all
        tokens, also if there are hooks in that block."""
        keep = given.get("logits_to_keep")
        if not isinstance(keep, int) or keep < 1 or self.row.head != "causal":
            return None
        base: Any = self.bare
        if "row" not in vars(type(base)):
            return None
        stack = base.role("stack") if base.has("stack") else base
        last = stack.role("layers")[-1]
        observed = [*last.modules(), *([stack.role("final_norm")] if stack.has("final_norm") else [])]
        observed += [base, *([stack] if stack is not base else [])]
        return (
            None if any(module._forward_hooks or module._forward_pre_hooks for module in observed) else keep
        )

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = self.row.forward.split()
        if len(args) > len(names):
            raise TypeError(
                f"{self.row.name} takes at most {len(names)} positional arguments, got {len(args)}"
            )
        given = dict(zip(names[: len(args)], args, strict=True))
        for name, value in kwargs.items():
            if name in given:
                raise TypeError(f"{self.row.name} got {name!r} twice")
            if name not in names and name not in self.extra and name not in PACKED:
                raise TypeError(
                    f"{self.row.name} has no argument {name!r}; it takes: {', '.join((*names, *self.extra))}"
                )
            given[name] = value
        for name, value in given.items():
            if name in TENSORS and value is not None and type(value) is not Tensor:
                check_tensor(name, value)
        return given

    def _option(self, given: Mapping[str, Any], name: str) -> bool:
        value = given.get(name)
        return bool(getattr(self.config, name)) if value is None else check_flag(name, value)

    def _uses_cache(self, given: Mapping[str, Any]) -> bool:
        wanted = given.get("use_cache")
        wanted = None if wanted is None else check_flag("use_cache", wanted)
        if self.training and self.gradient_checkpointing:
            if wanted:
                _warn_once("use_cache=True cannot go with gradient checkpointing: no cache is kept")
            return False
        return bool(getattr(self.config, "use_cache", False) if wanted is None else wanted)

    # ------------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *model_args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """A model with a checkpoint's weights, in evaluation mode.

        The checkpoint is a folder or a name on the hub; a folder of an adapter (peft) loads its base model with
        it. `dtype` (or `torch_dtype`): "auto" (the default: the checkpoint's own), a torch dtype or its name.
        `device_map`: "auto", a device, or a dict (through accelerate), with `max_memory` and, for the device
        "disk", `offload_folder`. `state_dict`: tensors by name instead of files (then `config` is needed, or the
        name gives it). `ignore_mismatched_sizes=True` initialises tensors of other shapes instead of raising
        ShapeMismatch; `strict=False` ignores tensors that the model does not have, with a warning.
        `output_loading_info=True` gives (model, {"missing_keys", "unexpected_keys", "mismatched_keys",
        "error_msgs"}). `generation_config`: one to use instead of the checkpoint's. `quantization_config`:
        "int8", "int4", "lossless", a WeightOnlyConfig or a BitsAndBytesConfig; or `load_in_4bit`, `load_in_8bit`
        for the latter, which keeps 4-bit weights of bitsandbytes as they are. A folder of quantised weights needs
        none. `attn_implementation`: "sdpa", "eager",
        "flex_attention" or "flash_attention_2". `tp_plan="auto"` shards the model over the processes that torchrun
        started, each of which reads only its shards; `tp_size` (all processes by default) or a `device_mesh` with
        an axis "tensor" choose which. `revision`, `token`, `cache_dir`, `local_files_only`,
        `force_download`, `subfolder`, `variant`, `use_safetensors` choose the files; `from_flax=True` and
        `from_tf=True` prefer transformers 4's flax_model.msgpack and tf_model.h5 to others. Other keywords set
        fields of the config (`num_labels=3`). HubError: the files cannot be had. CheckpointError: they do not
        fit. ValueError: an argument is wrong.
        """
        if model_args:
            raise TypeError(
                f"{cls.__name__}.from_pretrained takes one positional argument, got {1 + len(model_args)}"
            )
        options = LoadOptions(kwargs)
        name = pretrained_model_name_or_path
        adapter = name if name is not None and is_adapter(name, options.hub) else None
        if adapter is not None:
            name = base_of(adapter, options.hub)
        if name is None and (options.state_dict is None or config is None):
            raise ValueError("from_pretrained(None) needs state_dict= and config=")

        def read() -> tuple[Any, Any, Any]:
            settings, unused = cls._config_for(name or "", config, options.hub, kwargs)
            if unused:
                raise TypeError(f"from_pretrained does not know the argument {next(iter(unused))!r}")
            warn_of_another_class(settings, cls.row)
            generation = options.generation_config
            if generation is None and name is not None and cls.row.head == "causal":
                generation = cls.file_generation_config(name, options.hub)
            if options.state_dict is not None:
                return settings, generation, StateTensors(options.state_dict)
            assert name is not None
            files = find_weights(
                name,
                options.hub,
                variant=options.variant,
                use_safetensors=options.use_safetensors,
                prefer=options.prefer,
            )
            store = foreign.opened(open_store(files, "pt"), settings, name, options.hub, "pt")
            return settings, generation, store

        settings, generation, store = read() if name is None else consistent_read(name, options.hub, read)
        dtype = loading.chosen_dtype(options.dtype, settings.dtype, quantized.plain(store))
        if options.dtype in (None, "auto") and dtype == torch.float16 and options.device_map is None:
            dtype = checkpoint.dtype_on_cpu(store, dtype)
        with torch.device("meta"), groups.constructing(options.group):
            model = cls(settings)
        info = model._load(store, dtype, options)
        settings.dtype = dtype
        if generation is not None:
            model.generation_config = own_generation_config(generation, "generation_config")
        if adapter is not None:
            model.load_adapter(adapter, **{k: v for k, v in asdict(options.hub).items() if v})
        model.eval()
        return (model, info) if options.loading_info else model

    def _load(self, store: Any, dtype: torch.dtype, options: LoadOptions) -> dict[str, Any]:
        keymap = self.keymap()
        group, spec = self.tensor_group, self.config.to_spec()
        read_shard = None
        if group is not None:
            shards.check_loading(self, store, options.quantization)
            plain = quantized.plain(store)
            read_shard = functools.partial(
                shards.read_shard, spec, self.head_spec, plain, group, self.shapes()
            )
        where_to = options.device_map if group is None else group.device
        placed = devices.Placement(self, where_to, options.max_memory, options.offload_folder)
        kept = checkpoint.load(self, store, dtype, placed.device, options.quantization, strict=options.strict)
        quantizer = checkpoint.quantizer(self, options.quantization)
        keeper = four_bit.keeper(self, store, options.quantization)
        packed_names = {f"{name}.weight" for name in checkpoint.quantized_modules(self)}
        own = {
            canonical: source
            for canonical, source in self.sources().items()
            if source.names[0] not in packed_names
        }
        report = loading.load(
            self,
            own,
            keymap,
            quantized.plain(store),
            dtype=dtype,
            device=placed.device,
            shapes={c: shape for c, shape in tree.parameters(spec, self.head_spec).items() if c in own},
            tied=tree.tied(self.spec, self.head_spec),
            ignore_mismatched_sizes=options.ignore_mismatched_sizes,
            put=quantizer.put if quantizer else keeper.put if keeper else None,
            ignored=self._ignored,
            strict=options.strict,
            read_shard=read_shard,
            wanted=None if (stage := self.pipeline_stage) is None else lambda name: stage.holds(name, spec),
        )
        report.unused += kept.unused
        report.extra += kept.extra
        made = [name for canonical in report.made for name in own[canonical].names]
        for name in made:
            shape = self.get_parameter(name).shape
            loading.assign(self, name, torch.empty(shape, dtype=dtype, device=placed.device(name)))
            self._init_parameter(name)
        self.tie_weights()
        self.fuse_weights()
        if quantizer is not None:
            quantizer.finish()
        elif keeper is not None:
            keeper.finish()
        elif isinstance(options.quantization, BitsAndBytesConfig):
            self.quantize(options.quantization)
        if group is not None:
            shards.agree(self, made, group)
            connect(self, group)
        placed.dispatch(self)
        where = self.name_or_path or "the checkpoint"
        if made:
            log.warning(
                "%s: newly initialised, because %s has none that fits: %s. Train it.",
                self.row.name,
                where,
                ", ".join(made),
            )
        told_of_unused(self.row.name, where, report)
        missing, mismatched = (
            [n for c in names for n in own[c].names] for names in (report.missing, report.mismatched)
        )
        return loading_info(missing, mismatched, report)

    def _ignored(self, name: str) -> bool:
        """Whether a tensor of a file that the model does not have is ignored without a warning."""
        return any(re.search(pattern, name) for pattern in self._keys_to_ignore_on_load_unexpected or ())

    @classmethod
    def _config_for(
        cls, name: str | Path, config: Any, hub: HubOptions, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if config is not None and not isinstance(config, (str, Path)):
            return as_own_config(config, cls.family.config, cls.__name__).changed(**kwargs)
        source = name if config is None else config
        return cls.family.config.from_pretrained(source, return_unused_kwargs=True, **asdict(hub), **kwargs)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_function: Callable[..., Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        safe_serialization: bool = True,
        variant: str | None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write config.json, generation_config.json and safetensors; whole or not at all.

        `state_dict`: tensors to write instead of the model's, by the names of `state_dict()` (tied ones are
        written once). `max_shard_size`: bytes, or "5GB". `variant`: "fp16" writes model.fp16.safetensors.
        `is_main_process=False` writes nothing. With `tp_plan` all processes call it, and one of them writes the whole
        model, tensor by tensor. `save_function` is what transformers writes pickled files with:
        none are written here, and it is not called. With adapters added by `add_adapter`, the chosen one is
        written, as peft does. `push_to_hub=True` uploads the files too (`repo_id`, `private`, `commit_message`,
        ... as of `push_to_hub()`).
        """
        if not safe_serialization:
            raise ValueError(
                "save_pretrained does not support safe_serialization=False: it writes safetensors"
            )
        if not save_peft_format:
            raise ValueError(
                "save_pretrained does not support save_peft_format=False: adapters are peft's files"
            )
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained has no argument {next(iter(kwargs))!r}")
        del save_function
        if not is_main_process:
            return
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_pretrained needs a folder, but {folder} is a file")
        if self._hf_peft_config_loaded:
            self.save_adapter(folder)
            return
        if (group := self.tensor_group) is not None:
            if state_dict is not None or self.quantization_config is not None or push_to_hub:
                self.refuse_sharded("save_pretrained with state_dict=, push_to_hub= or quantised weights")
            with shards.whole_tensors(self, group) as whole:
                if whole is not None:
                    self.write_tensors(folder, whole, max_shard_size, variant)
            group.agreed(0, everywhere=True)  # no process returns before the files are written
            return
        tensors = self.hub_state_dict() if state_dict is None else self.file_names(state_dict)
        self.write_tensors(folder, tensors, max_shard_size, variant)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), token=token, **kwargs)

    def write_tensors(
        self,
        folder: Path,
        tensors: Mapping[str, Any],
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
    ) -> None:
        """Write the files of `save_pretrained` with these tensors."""
        self.config.architectures = [self.config.stored_class(self.row.name)]
        self.config.dtype = self.dtype
        self.record_quantization()
        files = {CONFIG_NAME: self.config.to_json_string()}
        if self.generation_config is not None:
            self.generation_config.validate()
            files[GENERATION_CONFIG_NAME] = self.generation_config.to_json_string()
        save_tensors(
            folder, tensors, framework="pt", max_shard_size=max_shard_size, extra_files=files, variant=variant
        )

    # ------------------------------------------------------------------ switches and facts

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients so that their norm is at most `max_norm`; returns their norm before. With `tp_plan` it is
        that of all shards, counted once, also under FSDP2, which `torch.nn.utils.clip_grad_norm_` does not know."""
        if self.tensor_group is None:
            return nn.utils.clip_grad_norm_(self.parameters(), max_norm)
        return gradients.clip(self, self.tensor_group, max_norm)

    def set_attn_implementation(self, attn_implementation: str | None) -> None:
        """Choose the attention kernel: "sdpa" (the default), "eager", "flex_attention", "flash_attention_2"."""
        name = attention.implementation(attn_implementation)
        for module in self.modules():
            if isinstance(module, Attention):
                module.implementation = name
        # Unresolved, since another library that reads the config has its own default.
        self.config._attn_implementation = attn_implementation

    @property
    def base_model(self) -> nn.Module:
        """The bare model, which is the attribute named by the family's prefix."""
        return self.bare


# Kind of part -> class.
KINDS: dict[str, type[Part]] = {
    "attention": Attention,
    "wrapper": Wrapper,
    "attention_norm": AttentionNorm,
    "mlp": Mlp,
    "mlp_add": Mlp,
    "widen": Widen,
    "narrow": Narrow,
    "layer": Block,
    "embeddings": Embeddings,
    "stack": Stack,
    **heads.KINDS_OF_PARTS,
}


def _is_pooler(child: Any) -> bool:
    return isinstance(child, modules.ModuleSpec) and child.kind == "pooler"


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
