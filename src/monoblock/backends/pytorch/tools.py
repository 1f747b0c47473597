"""Methods that other libraries expect of a model: Trainer, TRL, peft, accelerate, sentence-transformers.

Names, arguments and results are those of transformers' `PreTrainedModel`.
"""

from __future__ import annotations

import functools
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from monoblock.backends.pytorch import heads
from monoblock.backends.pytorch.kernels import dispatch
from monoblock.quantization import BitsAndBytesConfig
from monoblock.virtual import virtual_subclass

log = logging.getLogger("monoblock")

# Head kinds whose loss transformers' trainers know by name.
LOSSES = {
    "causal": "ForCausalLM",
    "masked": "ForMaskedLM",
    "sequence": "ForSequenceClassification",
    "first": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}
# Keywords of torch.utils.checkpoint.checkpoint.
CHECKPOINTING = {
    "use_reentrant",
    "preserve_rng_state",
    "context_fn",
    "determinism_check",
    "debug",
    "early_stop",
}


class Recognised:
    """Makes `isinstance(model, transformers.PreTrainedModel)` true once transformers is imported: its tools
    choose by it how a model is saved, resized and adapted. `type(model)` stays the class of this library."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # transformers' own would evaluate annotations, for a config class that these classes name already.
        del kwargs

    @property
    def __class__(self) -> Any:
        """The class of this object; with transformers imported, one that derives from transformers' too."""
        own = type(self)
        theirs = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
        return own if theirs is None or issubclass(own, theirs) else virtual_subclass(own, theirs)

    @__class__.setter
    def __class__(self, value: Any) -> None:  # FSDP and parametrizations change a module's class
        object.__dict__["__class__"].__set__(self, value)


class Tools:
    """Methods and attributes that tools probe for."""

    # Names that a load may miss or find beyond the model's, as regular expressions; transformers' attributes.
    _keys_to_ignore_on_load_missing: ClassVar[list[str] | None] = None
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str] | None] = None
    _keys_to_ignore_on_save: ClassVar[list[str] | None] = None
    _skip_keys_device_placement: ClassVar[str] = "past_key_values"
    _keep_in_fp32_modules: ClassVar[list[str] | None] = None
    _supports_sdpa: ClassVar[bool] = True
    _supports_flash_attn: ClassVar[bool] = True
    _supports_flex_attn: ClassVar[bool] = True
    _is_stateful: ClassVar[bool] = False
    input_modalities: ClassVar[tuple[str, ...]] = ("text",)
    output_modalities: ClassVar[tuple[str, ...]] = ("text",)
    _hf_peft_config_loaded = False
    tp_size: int | None = None
    kernel_config: Any = None
    model_tags: list[str] | None = None
    gradient_checkpointing: bool
    checkpointing: dict[str, Any] | None

    # ------------------------------------------------------------------ facts

    @property
    def loss_type(self: Any) -> str | None:
        """The loss by transformers' name ("ForCausalLM"), by which its Trainer counts label tokens; None: none of its
        own."""
        return LOSSES.get(self.row.head or "")

    @property
    def loss_function(self: Any) -> Callable[..., Tensor]:
        """The loss of logits and labels: `loss_function(logits=, labels=, vocab_size=, num_items_in_batch=None,
        shift_labels=None)`; for spans (start_logits, end_logits, start_positions, end_positions)."""
        if (kind := self.row.head) not in LOSSES:
            raise AttributeError(f"{self.row.name} has no loss function of one output")
        return functools.partial(_span_loss if kind == "span" else _loss, self)

    def get_decoder(self: Any) -> nn.Module:
        """The bare model."""
        return self.bare

    def get_encoder(self: Any, modality: str | None = None) -> nn.Module:
        """The module that encodes text (the model's encoder, or the bare model). ValueError for another modality."""
        if modality is not None:
            raise ValueError(f"{self.row.name} has no separate encoder for modality={modality!r}")
        bare = self.bare
        return bare.role("stack") if bare.has("embeddings") else bare

    @property
    def dummy_inputs(self: Any) -> dict[str, Tensor]:
        """Ids that the model takes, (3, 5)."""
        ids = torch.tensor([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]]) % self.spec.vocab
        nested = self.row.head in ("choice", "double")
        return {"input_ids": ids[:, None] if nested else ids}

    @property
    def tp_plan(self: Any) -> dict[str, str]:
        """Module name pattern -> how tensor parallelism splits it; empty where transformers has no plan."""
        plan = _from_the_whole(self, self.config.base_model_tp_plan)
        if plan:
            plan[self.module_path("embed")] = "embedding_rowwise"
        if plan and self.row.head == "causal":
            plan[self.module_path("head_out")] = "colwise_gather_output"
        return plan

    @property
    def pp_plan(self: Any) -> dict[str, Any]:
        """Module name -> its inputs and outputs, for pipeline parallelism; empty where transformers has no plan."""
        plan = _from_the_whole(self, self.config.base_model_pp_plan)
        if plan and self.row.head == "causal":
            plan[self.module_path("head_out")] = (["hidden_states"], ["logits"])
        return plan

    _tp_plan = tp_plan
    _pp_plan = pp_plan

    @property
    def is_loaded_in_8bit(self: Any) -> bool:
        """True where bitsandbytes holds the matrices in 8 bits; no attribute elsewhere, as in transformers."""
        return _held_by_bitsandbytes(self, "load_in_8bit")

    @property
    def is_loaded_in_4bit(self: Any) -> bool:
        """True where bitsandbytes holds the matrices in 4 bits; no attribute elsewhere, as in transformers."""
        return _held_by_bitsandbytes(self, "load_in_4bit")

    @property
    def is_quantized(self: Any) -> bool:
        """Whether matrices are quantised, by this library or by bitsandbytes."""
        return self.quantization_config is not None

    def is_custom_code(self) -> bool:
        """Whether the model's code came from a checkpoint: never."""
        return False

    def is_remote_code(self) -> bool:
        """Whether the model's code came from the hub: never."""
        return False

    @property
    def all_tied_weights_keys(self: Any) -> dict[str, str]:
        """Name of a parameter -> the one that it shares, as the config has it."""
        return self.tied()

    def get_parameter_or_buffer(self: Any, target: str) -> Tensor:
        """The parameter or buffer of that name. AttributeError if there is none."""
        try:
            return self.get_parameter(target)
        except AttributeError:
            return self.get_buffer(target)

    def set_decoder(self: Any, decoder: nn.Module) -> None:
        """Replace the bare model. ValueError for a model that is bare itself."""
        if not self.has("bare"):
            raise ValueError(f"{self.row.name} is the decoder itself")
        setattr(self, self.family.prefix, decoder)

    def warn_if_padding_and_no_attention_mask(
        self: Any, input_ids: Tensor | None, attention_mask: Tensor | None
    ) -> None:
        """Warn once if the first or the last column of `input_ids` holds padding and no mask was given."""
        pad = self.config.pad_token_id
        if attention_mask is not None or input_ids is None or pad is None or not dispatch.readable(input_ids):
            return
        if bool((input_ids[:, [0, -1]] == pad).any()):
            _warn_once(
                f"{self.row.name}: input_ids hold padding, but no attention_mask came: padding is attended to"
            )

    # ------------------------------------------------------------------ generation

    def prepare_inputs_for_generation(
        self: Any,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The forward's arguments for the tokens that are not cached yet. Other keywords are passed on if the forward
        has them."""
        known = {
            name: value for name, value in kwargs.items() if name in self.arguments and value is not None
        }
        cached = past_key_values.get_seq_length() if hasattr(past_key_values, "get_seq_length") else 0
        if inputs_embeds is not None and cached == 0:
            tokens: dict[str, Any] = {"inputs_embeds": inputs_embeds}
        elif cache_position is not None:
            tokens = {"input_ids": input_ids[:, -cache_position.shape[0] :]}
        else:
            tokens = {
                "input_ids": input_ids[:, cached:] if cached < input_ids.shape[1] else input_ids[:, -1:]
            }
        return {
            **known,
            **tokens,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "cache_position": cache_position,
        }

    # ------------------------------------------------------------------ activation checkpointing

    def activation_checkpointing_enable(
        self: Any,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """While training, keep only the input of every n-th block and compute the rest again in the backward pass.

        The keywords are those of `torch.utils.checkpoint.checkpoint`; `use_reentrant` is False unless given. `offload`:
        keep those inputs in the host's memory. ValueError: an unknown keyword, or every_n_layers below 1.
        """
        given = dict(activation_checkpointing_kwargs or {})
        if unknown := given.keys() - CHECKPOINTING:
            raise ValueError(
                f"activation checkpointing has no {sorted(unknown)[0]!r}: torch.utils.checkpoint.checkpoint takes "
                f"{', '.join(sorted(CHECKPOINTING))}"
            )
        if every_n_layers < 1:
            raise ValueError(f"every_n_layers must be at least 1, got {every_n_layers}")
        self._set_checkpointing(
            {"every_n_layers": every_n_layers, "offload": offload, "use_reentrant": False, **given}
        )

    def gradient_checkpointing_enable(
        self: Any,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self: Any) -> None:
        """Keep all activations again."""
        self._set_checkpointing(None)

    def activation_checkpointing_disable(self: Any) -> None:
        """Keep all activations again."""
        self._set_checkpointing(None)

    def _set_checkpointing(self: Any, how: dict[str, Any] | None) -> None:
        for module in self.modules():
            if isinstance(module, Tools):
                module.gradient_checkpointing, module.checkpointing = how is not None, how

    @property
    def is_gradient_checkpointing(self: Any) -> bool:
        """Whether activations are computed again in the backward pass."""
        return self.gradient_checkpointing

    is_activation_checkpointing = is_gradient_checkpointing

    def enable_input_require_grads(self: Any) -> None:
        """Let gradients flow from the embedding's output (adapters on frozen weights need that)."""
        if "_require_grads_hook" not in vars(self):
            hook = self.get_input_embeddings().register_forward_hook(_require_grads)
            vars(self)["_require_grads_hook"] = hook

    def disable_input_require_grads(self: Any) -> None:
        """Undo `enable_input_require_grads`."""
        if (hook := vars(self).pop("_require_grads_hook", None)) is not None:
            hook.remove()

    # ------------------------------------------------------------------ the hub

    def add_model_tags(self, tags: str | list[str]) -> None:
        """Tags for the model card that `push_to_hub` writes."""
        given = [tags] if isinstance(tags, str) else list(tags)
        self.model_tags = list(dict.fromkeys([*(self.model_tags or []), *given]))

    def push_to_hub(
        self: Any,
        repo_id: str,
        *,
        commit_message: str = "Upload model",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
    ) -> str:
        """Save the model and upload it to a repository of the hub, which is made if it is not there; its URL."""
        import huggingface_hub

        api = huggingface_hub.HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            if self.model_tags:
                card = huggingface_hub.ModelCard.from_template(
                    huggingface_hub.ModelCardData(tags=self.model_tags, library_name="monoblock")
                )
                card.save(f"{folder}/README.md")
            api.upload_folder(
                repo_id=url.repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        return str(url)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Refused: the classes here are the auto classes' own, and code from a checkpoint's folder is never run."""
        raise ValueError(
            f"register_for_auto_class({auto_class!r}): code in a checkpoint's folder is not written or run here; "
            "config.json's architectures names the class"
        )


def _from_the_whole(model: Any, plan: Mapping[str, Any] | None) -> dict[str, Any]:
    """A plan of the bare model, by the names that its modules have in this one."""
    inner = f"{model.family.prefix}." if model.has("bare") else ""
    return {inner + name: how for name, how in (plan or {}).items()}


def _held_by_bitsandbytes(model: Any, how: str) -> bool:
    config = model.quantization_config
    if not isinstance(config, BitsAndBytesConfig) or not getattr(config, how):
        raise AttributeError(f"{model.row.name} is not loaded with {how}=True")
    return True


def _loss(
    model: Any,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    config: Any = None,
) -> Tensor:
    """The loss of the model's kind of head. `shift_labels`: labels that are shifted already. `config`: one whose
    problem_type counts instead of the model's."""
    if vocab_size is not None and logits.shape[-1] != vocab_size:
        raise ValueError(f"loss_function: logits have {logits.shape[-1]} outputs, vocab_size is {vocab_size}")
    kind = model.row.head
    if shift_labels is not None:
        return heads.cross_entropy(logits, shift_labels, num_items_in_batch)
    if kind == "causal":
        return heads.causal_loss(logits, labels, num_items_in_batch)
    if kind in ("sequence", "first"):
        problem_type = (model.config if config is None else config).problem_type
        return heads.sequence_loss(logits, labels, problem_type, num_items_in_batch)
    return heads.cross_entropy(logits, labels, num_items_in_batch)


def _span_loss(
    model: Any,
    start_logits: Tensor,
    end_logits: Tensor,
    start_positions: Tensor,
    end_positions: Tensor,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    del model
    return heads.span_loss(start_logits, end_logits, start_positions, end_positions, num_items_in_batch)


def _require_grads(_: nn.Module, __: Any, output: Tensor) -> None:
    output.requires_grad_(True)


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
