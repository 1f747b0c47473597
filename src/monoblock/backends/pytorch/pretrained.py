"""The public PyTorch classes: built from a family's table, loaded from and saved in the hub's files."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from monoblock import families, outputs, tree
from monoblock.backends.pytorch import attention, devices, heads, loading
from monoblock.backends.pytorch.decode import Generation
from monoblock.backends.pytorch.inputs import check_tokens, flattened, has_positions, prepare
from monoblock.backends.pytorch.model import Attention, Backbone
from monoblock.checkpoint.hub import find_weights
from monoblock.checkpoint.keymap import KeyMap
from monoblock.checkpoint.options import HubOptions
from monoblock.checkpoint.save import save_tensors
from monoblock.checkpoint.store import open_store
from monoblock.config import PretrainedConfig
from monoblock.families import Family, ModelClass

log = logging.getLogger("monoblock")

# Arguments that every forward takes by keyword beside those of its own signature.
EXTRA = (
    "position_ids",
    "past_key_values",
    "use_cache",
    "return_dict",
    "cache_position",
    "sequence_id",
    "num_items_in_batch",
)


class PreTrainedModel(nn.Module, Generation):
    """The base of all PyTorch models: `backbone`, and `head` where the class has one.

    Public classes are made by `make_class` from a family's table; their names, signatures, defaults and outputs
    are the hub's.
    """

    family: ClassVar[Family]
    row: ClassVar[ModelClass]
    extra: ClassVar[tuple[str, ...]]
    framework: ClassVar[str] = "pt"
    supports_gradient_checkpointing: ClassVar[bool] = True
    main_input_name: ClassVar[str] = "input_ids"
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        if not isinstance(config, self.family.config):
            wanted = self.family.config.__name__
            raise ValueError(f"{self.row.name} takes a {wanted}, got {type(config).__name__}")
        self.config = config
        self.spec = config.to_spec()
        self.name_or_path = config.name_or_path
        self.hf_device_map: dict[str, Any] | None = None
        device = torch.get_default_device()
        with torch.device("meta"), loading.Uninitialised():
            self.backbone = Backbone(self.spec)
            head = config.to_head(self.row.head) if self.row.head else None
            self.head = heads.Head(self.spec, head) if head else None
        self.set_attn_implementation(config._attn_implementation)
        self.generation_config = self.default_generation_config() if self.can_generate() else None
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights()
        self.tie_weights()

    # ------------------------------------------------------------------ forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; arguments, defaults and outputs are in the class's docstring."""
        given = self._bind(args, kwargs)
        if self.row.head in ("choice", "double"):
            given = flattened(given)
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        shape = check_tokens(self.spec, ids, embeds)
        inputs = prepare(self.spec, shape, given, self._uses_cache(given))
        x = embeds if ids is None else self.embed(ids, given)
        if (types := given.get("token_type_ids")) is not None:
            x = x + self.backbone.lookup(types)
        inputs.call.attentions = self._option(given, "output_attentions")
        wanted = self._option(given, "output_hidden_states")
        out = self.backbone(x, inputs.call, hidden_states=wanted)
        values = {
            "last_hidden_state": out.hidden,
            "past_key_values": inputs.past(),
            "hidden_states": out.hidden_states,
            "attentions": out.attentions,
        }
        if self.head is not None:
            values |= heads.outputs(self.head, out.hidden, given)
        kind = getattr(outputs, self.row.output)
        result = kind(**{name: value for name, value in values.items() if name in kind.__dataclass_fields__})
        return result if self._option(given, "return_dict") else result.to_tuple()

    def embed(self, input_ids: Tensor, given: Mapping[str, Any]) -> Tensor:
        """Token ids as vectors (b, s, w), with image patches in their places where the call brings any."""
        x = self.backbone.lookup(input_ids)
        patches = given.get("image_patches")
        if patches is None:
            patches = given.get("pixel_values")
        if patches is None:
            return x
        return self.backbone.with_patches(x, input_ids, patches, given.get("image_patches_indices"))

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = self.row.forward.split()
        if len(args) > len(names):
            raise TypeError(
                f"{self.row.name} takes at most {len(names)} positional arguments, got {len(args)}"
            )
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise TypeError(f"{self.row.name} got {name!r} twice")
            if name not in names and name not in self.extra:
                raise TypeError(
                    f"{self.row.name} has no argument {name!r}; it takes: {', '.join((*names, *EXTRA))}"
                )
            given[name] = value
        if given.get("position_ids") is not None and not has_positions(self.spec):
            log.warning("position_ids have no effect: %s encodes positions as distances", self.row.name)
        return given

    def _option(self, given: Mapping[str, Any], name: str) -> bool:
        value = given.get(name)
        return bool(getattr(self.config, name) if value is None else value)

    def _uses_cache(self, given: Mapping[str, Any]) -> bool:
        wanted = given.get("use_cache")
        if self.training and self.backbone.gradient_checkpointing:
            if wanted:
                log.warning("use_cache=True cannot go with gradient checkpointing: no cache is kept")
            return False
        return bool(getattr(self.config, "use_cache", False) if wanted is None else wanted)

    # ------------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        config: PretrainedConfig | str | Path | None = None,
        **kwargs: Any,
    ) -> Self:
        """A model with a checkpoint's weights, in evaluation mode.

        The checkpoint is a folder or a name on the hub. `dtype` (or `torch_dtype`): "auto" (the default: the
        checkpoint's own), a torch dtype or its name. `device_map`: "auto", a device, or a dict (through accelerate).
        `ignore_mismatched_sizes=True` makes tensors of other shapes anew instead of raising ShapeMismatch.
        `attn_implementation`: "sdpa", "eager", "flex_attention" or "flash_attention_2". `revision`, `token`,
        `cache_dir`, `local_files_only`, `force_download`, `subfolder`, `variant`, `use_safetensors` say which files.
        Other keywords set fields of the config (`num_labels=3`). HubError: the files cannot be had. CheckpointError:
        they do not fit. ValueError: an argument is wrong.
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
        )
        store = open_store(files, "pt")
        dtype = loading.chosen_dtype(options.dtype, settings.dtype, store)
        with torch.device("meta"):
            model = cls(settings)
        model._load(store, dtype, options)
        settings.dtype = dtype
        model.generation_config = model.file_generation_config(pretrained_model_name_or_path, options.hub)
        return model.eval()

    def _load(self, store: Any, dtype: torch.dtype, options: LoadOptions) -> None:
        names = self.parameter_names()
        placed = devices.Placement(self, options.device_map, names, self.keymap())
        report = loading.load(
            self,
            names,
            self.keymap(),
            store,
            dtype=dtype,
            device=placed.device,
            tied=self.tied(),
            ignore_mismatched_sizes=options.ignore_mismatched_sizes,
        )
        made = [*report.missing, *report.mismatched]
        for canonical in made:
            shape = self.get_parameter(names[canonical]).shape
            loading.assign(
                self,
                names[canonical],
                torch.empty(shape, dtype=dtype, device=placed.device(names[canonical])),
            )
            self._init_parameter(names[canonical])
        self.tie_weights()
        placed.dispatch(self)
        where = self.name_or_path or "the checkpoint"
        if made:
            hub = ", ".join(self.keymap().source(name).names[0] for name in made)
            log.warning(
                "%s: newly initialised, because %s has none that fits: %s. Train it.",
                self.row.name,
                where,
                hub,
            )
        if report.unused:
            log.info("%s: %s also holds %s, not used here", self.row.name, where, ", ".join(report.unused))

    @classmethod
    def _config_for(
        cls, name: str | Path, config: Any, hub: HubOptions, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if isinstance(config, PretrainedConfig):
            for key in [key for key in kwargs if key in config.known_fields()]:
                setattr(config, key, kwargs.pop(key))
            return config, kwargs
        source = name if config is None else config
        return cls.family.config.from_pretrained(source, return_unused_kwargs=True, **asdict(hub), **kwargs)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        max_shard_size: int | str = "50GB",
        state_dict: Mapping[str, Tensor] | None = None,
        safe_serialization: bool = True,
        is_main_process: bool = True,
        push_to_hub: bool = False,
    ) -> None:
        """Write config.json, generation_config.json and safetensors by the hub's names; whole or not at all.

        `state_dict`: hub-named tensors to write instead of the model's. `max_shard_size`: bytes, or "5GB".
        """
        if not safe_serialization or push_to_hub:
            name = "push_to_hub=True" if push_to_hub else "safe_serialization=False"
            raise ValueError(
                f"save_pretrained does not support {name}: it writes safetensors to a local folder"
            )
        if not is_main_process:
            return
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_pretrained needs a folder, but {folder} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.hub_state_dict() if state_dict is None else dict(state_dict)
        save_tensors(folder, tensors, framework="pt", max_shard_size=max_shard_size)
        self.config.architectures = [self.row.name]
        self.config.dtype = self.dtype
        self.config.save_pretrained(folder)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(folder)

    def keymap(self) -> KeyMap:
        """The map between canonical names and the hub's, for this class and config."""
        return self.family.keymap(self.config, self.row.head)

    def parameter_names(self) -> dict[str, str]:
        """Canonical name -> name of the parameter in this module, tied ones left out."""
        head = self.head.spec if self.head else None
        return {name: _path(name) for name in tree.parameters(self.spec, head)}

    def tied(self) -> dict[str, str]:
        """Second names: canonical name -> the canonical parameter that it shares."""
        return tree.tied(self.spec, self.head.spec if self.head else None)

    def hub_state_dict(self) -> dict[str, Tensor]:
        """The weights by the hub's names, tied ones once; views of the parameters wherever that is possible."""
        keymap, state = self.keymap(), {}
        for canonical, path in self.parameter_names().items():
            source, tensor = keymap.source(canonical), self.get_parameter(path).detach()
            for name, view in zip(source.names, source.op.views(tensor), strict=True):
                state[name] = view if view.dim() <= 2 else view.reshape(tensor.shape)
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `torch.nn.Module`'s; a dict of the hub's names is understood too."""
        own = self.state_dict()
        if not any(name in own for name in state_dict):
            names = self.parameter_names()
            parameters = {name: own[path] for name, path in names.items()}
            canonical = loading.split_state(self.keymap(), parameters, dict(state_dict), self.tied())
            state_dict = {names[name]: tensor for name, tensor in canonical.items()}
            for second, first in self.tied().items():
                if first in canonical:
                    state_dict[_path(second)] = canonical[first]
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    # ------------------------------------------------------------------ weights

    def init_weights(self) -> None:
        """Matrices and tables from a normal distribution of the spec's deviation, biases 0, norms 1."""
        for path in self.parameter_names().values():
            self._init_parameter(path)
        if getattr(self.config, "init_config", None):
            log.warning(
                "init_config is not used: weights come from a normal distribution of initializer_range"
            )

    @torch.no_grad()
    def _init_parameter(self, path: str) -> None:
        parameter = self.get_parameter(path)
        if path.endswith(".bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, self.spec.init_std)

    def tie_weights(self) -> None:
        """Make the head's matrix the embedding's, where the spec ties them."""
        if self.tied():
            assert self.head is not None
            self.head.out.weight = self.backbone.embed.weight

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.backbone.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding (and with it a tied head's matrix)."""
        self.backbone.embed = value
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        """The projection to the vocabulary, or None."""
        return self.head.out if self.head is not None and self.head.vocabulary else None

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the projection to the vocabulary."""
        if self.get_output_embeddings() is None or self.head is None:
            raise ValueError(f"{self.row.name} has no projection to the vocabulary")
        self.head.out = new_embeddings

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Change the vocabulary's size in the embedding, the head and the config.

        New rows are the mean of the old ones, so that new tokens begin as an average token
        (`mean_resizing=False`: from the initial distribution).
        """
        old = self.spec.vocab
        new = old if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            new = -(-new // pad_to_multiple_of) * pad_to_multiple_of
        if new < 1:
            raise ValueError(f"new_num_tokens must be at least 1, got {new}")
        if new == old:
            return self.backbone.embed
        self.config.vocab_size = new
        self.spec = self.backbone.spec = self.config.to_spec()
        self._resize(self.backbone.embed, new, mean_resizing)
        self.backbone.embed.num_embeddings = new
        if (out := self.get_output_embeddings()) is not None:
            if not self.tied():
                self._resize(out, new, mean_resizing)
            out.out_features = new
        self.tie_weights()
        return self.backbone.embed

    @torch.no_grad()
    def _resize(self, module: nn.Embedding | nn.Linear, rows: int, mean: bool) -> None:
        old = module.weight
        new = old.new_empty(rows, old.shape[1])
        kept = min(rows, old.shape[0])
        new[:kept] = old[:kept]
        if mean:
            new[kept:] = old.float().mean(0).to(old.dtype)
        else:
            new[kept:].normal_(0.0, self.spec.init_std)
        module.weight = nn.Parameter(new, requires_grad=old.requires_grad)

    # ------------------------------------------------------------------ switches and facts

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """While training, keep only each block's input and compute the rest again in the backward pass."""
        if unknown := {
            k: v
            for k, v in (gradient_checkpointing_kwargs or {}).items()
            if (k, v) != ("use_reentrant", False)
        }:
            raise ValueError(f"gradient checkpointing here is use_reentrant=False; got {unknown}")
        self.backbone.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self.backbone.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return self.backbone.gradient_checkpointing

    def enable_input_require_grads(self) -> None:
        """Let gradients flow from the embedding's output (adapters on frozen weights need that)."""
        self.backbone.embed.register_forward_hook(lambda _, __, out: out.requires_grad_(True))

    def set_attn_implementation(self, attn_implementation: str | None) -> None:
        """Choose the attention kernel: "sdpa" (the default), "eager", "flex_attention", "flash_attention_2"."""
        name = attention.implementation(attn_implementation)
        for module in self.backbone.modules():
            if isinstance(module, Attention):
                module.implementation = name
        self.config._attn_implementation = name

    def can_generate(self) -> bool:
        """Whether the class predicts the next token."""
        return self.row.head == "causal"

    @property
    def base_model(self) -> nn.Module:
        """The backbone: what the hub's classes call by the family's prefix."""
        return self.backbone

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the weights are (the first ones, if they are spread)."""
        return self.backbone.embed.weight.device

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the model has, tied ones once."""
        tables = (
            {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
            if exclude_embeddings
            else set()
        )
        return sum(
            p.numel()
            for p in self.parameters()
            if (p.requires_grad or not only_trainable) and id(p) not in tables
        )

    def get_memory_footprint(self) -> int:
        """Bytes of the weights."""
        return sum(p.numel() * p.element_size() for p in self.parameters())


def _path(canonical: str) -> str:
    return canonical if canonical.startswith("head.") else "backbone." + canonical


class LoadOptions:
    """What from_pretrained takes out of its keywords before the rest goes to the config."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.hub = HubOptions.pop(kwargs)
        self.dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        self.device_map = kwargs.pop("device_map", None)
        self.ignore_mismatched_sizes = bool(kwargs.pop("ignore_mismatched_sizes", False))
        self.variant = kwargs.pop("variant", None)
        self.use_safetensors = kwargs.pop("use_safetensors", None)
        if kwargs.pop("trust_remote_code", False):
            log.info("trust_remote_code=True: no remote code is run here; the makers' options work natively")
        kwargs.pop("low_cpu_mem_usage", None)  # always so
        for name in (
            "quantization_config",
            "load_in_8bit",
            "load_in_4bit",
            "gguf_file",
            "tp_plan",
            "offload_folder",
        ):
            if kwargs.get(name):
                raise ValueError(f"from_pretrained does not support {name}={kwargs[name]!r}")
            kwargs.pop(name, None)


@functools.cache
def make_class(name: str) -> type[PreTrainedModel]:
    """The public class of that name, from its family's table."""
    family = families.family_of(name)
    if family is None:
        raise AttributeError(f"monoblock has no class {name!r}")
    row = family.model_class(name)
    body: dict[str, Any] = {
        "family": family,
        "row": row,
        "extra": extra_arguments(family, row),
        "config_class": family.config,
        "base_model_prefix": family.prefix,
        "__module__": "monoblock",
        "__doc__": _document(row, extra_arguments(family, row)),
        "forward": _forward(row),
        family.prefix: property(lambda self: self.backbone),
    }
    return types.new_class(name, (PreTrainedModel,), exec_body=lambda namespace: namespace.update(body))


def extra_arguments(family: Family, row: ModelClass) -> tuple[str, ...]:
    """The keywords that a class's forward takes beyond its signature."""
    own = row.forward.split()
    return tuple(name for name in (*EXTRA, *family.extra) if name not in own)


def _forward(row: ModelClass) -> Callable[..., Any]:
    """The common forward under the class's own signature."""

    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return PreTrainedModel.forward(self, *args, **kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [inspect.Parameter("self", kind)]
    names += [
        inspect.Parameter(n, kind, default=0 if n == "logits_to_keep" else None) for n in row.forward.split()
    ]
    extra = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    forward.__signature__ = inspect.Signature([*names, extra])  # pyright: ignore
    forward.__doc__ = f"Returns {row.output}, or its tuple with return_dict=False."
    return forward


def _document(row: ModelClass, extra: tuple[str, ...]) -> str:
    what = f"the model with a head of the kind {row.head!r}" if row.head else "the bare model"
    return (
        f"{row.name}: {what}.\n\nArguments, in order: {', '.join(row.forward.split())}; by keyword also "
        f"{', '.join(extra)}. Shapes: input_ids, attention_mask and token labels (batch, tokens); inputs_embeds "
        f"(batch, tokens, width). Returns `{row.output}`."
    )
