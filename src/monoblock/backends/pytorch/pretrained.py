"""The public PyTorch classes: built from a family's table, loaded from and saved in the hub's files."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from monoblock import outputs
from monoblock.backends.pytorch import devices, heads, loading
from monoblock.backends.pytorch.generation.decoder import Generation
from monoblock.backends.pytorch.inputs import PACKED, check_tokens, flattened, prepare
from monoblock.backends.pytorch.kernels import attention
from monoblock.backends.pytorch.model import Attention, Backbone
from monoblock.backends.pytorch.options import LoadOptions
from monoblock.backends.pytorch.parameters import Parameters
from monoblock.backends.pytorch.quantization import checkpoint
from monoblock.checkpoint import packed
from monoblock.checkpoint.hub import find_weights
from monoblock.checkpoint.options import HubOptions
from monoblock.checkpoint.save import save_tensors
from monoblock.checkpoint.store import open_store
from monoblock.config import CONFIG_NAME, PretrainedConfig
from monoblock.generation.config import GENERATION_CONFIG_NAME
from monoblock.quantization import BitsAndBytesConfig

log = logging.getLogger("monoblock")


class PreTrainedModel(Parameters, Generation):
    """The base of all PyTorch models: `backbone`, and `head` where the class has one.

    Public classes are made by `make_class` from a family's table; their names, signatures, defaults and outputs
    are the hub's.
    """

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
            self.backbone.gradient_checkpointing = bool(getattr(config, "gradient_checkpointing", False))
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
        if self.training and self.spec.attention.by_segment and given.get("sequence_id") is None:
            raise ValueError(
                "the config sets attn_uses_sequence_id=True: training needs sequence_id (batch, tokens)"
            )
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        shape = check_tokens(self.spec, ids, embeds)
        inputs = prepare(self.spec, shape, given, self._uses_cache(given))
        if ids is None and (given.get("image_patches") is not None or given.get("pixel_values") is not None):
            raise ValueError("image patches go to the places of their ids: give input_ids, not inputs_embeds")
        x: Any = embeds if ids is None else self.embed(ids, given)
        if (types := given.get("token_type_ids")) is not None:
            x = x + self.backbone.lookup(types)
        inputs.call.attentions = self._option(given, "output_attentions")
        wanted = self._option(given, "output_hidden_states")
        keep = None if wanted or inputs.call.attentions else self._kept(given)
        out = self.backbone(x, inputs.call, hidden_states=wanted, keep=keep)
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
        both = (given.get("image_patches"), given.get("pixel_values"))
        named = [patches for patches in both if patches is not None]
        indices = given.get("image_patches_indices")
        if len(named) > 1:
            raise ValueError("image_patches and pixel_values are two names of the same patches: give one")
        if not named:
            if indices is not None:
                raise ValueError("image_patches_indices say where image_patches go, but none came")
            return x
        return self.backbone.with_patches(x, input_ids, named[0], indices)

    def _kept(self, given: Mapping[str, Any]) -> int | None:
        """How many last tokens the logits are of, None for all; then the last block needs to compute no others. Hooks
        in that block see all tokens."""
        keep = given.get("logits_to_keep")
        if not isinstance(keep, int) or keep < 1 or self.row.head != "causal":
            return None
        seen = (*self.backbone.blocks[-1].modules(), self.backbone.final_norm)
        return None if any(module._forward_hooks or module._forward_pre_hooks for module in seen) else keep

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
            if name not in names and name not in self.extra and name not in PACKED:
                raise TypeError(
                    f"{self.row.name} has no argument {name!r}; it takes: {', '.join((*names, *self.extra))}"
                )
            given[name] = value
        return given

    def _option(self, given: Mapping[str, Any], name: str) -> bool:
        value = given.get(name)
        return bool(getattr(self.config, name) if value is None else value)

    def _uses_cache(self, given: Mapping[str, Any]) -> bool:
        wanted = given.get("use_cache")
        if self.training and self.backbone.gradient_checkpointing:
            if wanted:
                _warn_once("use_cache=True cannot go with gradient checkpointing: no cache is kept")
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
        `quantization_config`: "int8", "int4", "lossless", a WeightOnlyConfig or a BitsAndBytesConfig; or
        `load_in_4bit`, `load_in_8bit` for the latter. A folder of packed weights needs none.
        `attn_implementation`: "sdpa", "eager", "flex_attention" or "flash_attention_2". `revision`, `token`,
        `cache_dir`, `local_files_only`, `force_download`, `subfolder`, `variant`, `use_safetensors` say which files;
        `from_flax=True` and `from_tf=True` prefer transformers 4's flax_model.msgpack and tf_model.h5 to others.
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
            prefer=options.prefer,
        )
        store = open_store(files, "pt")
        dtype = loading.chosen_dtype(options.dtype, settings.dtype, packed.plain(store))
        with torch.device("meta"):
            model = cls(settings)
        model._load(store, dtype, options)
        settings.dtype = dtype
        model.generation_config = model.file_generation_config(pretrained_model_name_or_path, options.hub)
        return model.eval()

    def _load(self, store: Any, dtype: torch.dtype, options: LoadOptions) -> None:
        keymap = self.keymap()
        placed = devices.Placement(self, options.device_map, self.parameter_names(), keymap)
        kept = checkpoint.load(self, store, dtype, placed.device, options.quantization)
        packer = checkpoint.packer(self, options.quantization)
        names = self.parameter_names()
        report = loading.load(
            self,
            names,
            keymap,
            packed.plain(store),
            dtype=dtype,
            device=placed.device,
            tied=self.tied(),
            ignore_mismatched_sizes=options.ignore_mismatched_sizes,
            put=packer.put if packer else None,
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
        if packer is not None:
            packer.finish()
        elif isinstance(options.quantization, BitsAndBytesConfig):
            self.quantize(options.quantization)
        placed.dispatch(self)
        where = self.name_or_path or "the checkpoint"
        if made:
            hub = ", ".join(keymap.source(name).names[0] for name in made)
            log.warning(
                "%s: newly initialised, because %s has none that fits: %s. Train it.",
                self.row.name,
                where,
                hub,
            )
        if unused := [*kept, *report.unused]:
            log.info("%s: %s also holds %s, not used here", self.row.name, where, ", ".join(unused))

    @classmethod
    def _config_for(
        cls, name: str | Path, config: Any, hub: HubOptions, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if isinstance(config, PretrainedConfig):
            return config.changed(**kwargs)
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
        self.config.architectures = [self.row.name]
        self.config.dtype = self.dtype
        self.record_quantization()
        texts = {CONFIG_NAME: self.config.to_json_string()}
        if self.generation_config is not None:
            self.generation_config.validate()
            texts[GENERATION_CONFIG_NAME] = self.generation_config.to_json_string()
        save_tensors(folder, tensors, framework="pt", max_shard_size=max_shard_size, beside=texts)

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


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
