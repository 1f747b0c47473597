"""Mistral (2023): pre-norm RMSNorm, RoPE, grouped-query attention, SwiGLU; the first version has a sliding window.

Source: arXiv:2310.06825 and transformers' MistralConfig.
"""

from __future__ import annotations

from monoblock import modules
from monoblock.checkpoint.keymap import KeyMap
from monoblock.errors import FieldError, UnsupportedConfig
from monoblock.families import Family, Heads, ModelClass
from monoblock.families.common import (
    CAUSAL,
    FULL,
    SLIDING,
    RopeConfig,
    RopeFields,
    activation,
    layers,
    quotient,
)
from monoblock.field_types import brief
from monoblock.modules import KerasNames, ModuleSpec, module
from monoblock.spec import ArchSpec, Attention, Dropout, Mlp, Norm


class MistralConfig(RopeConfig):
    """The config of a Mistral or Ministral model. `head_dim=None` means hidden_size / heads; newer models set it.
    `sliding_window=None` means full causal attention. `layer_types` lists "sliding_attention" or "full_attention" for
    each layer (Ministral); None: all layers have the window."""

    model_type = "mistral"
    other_types = ("ministral",)

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096 * 32
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    sliding_window: int | None = 4096
    attention_dropout: float = 0.0
    rope_scaling: RopeFields | None = None
    rope_parameters: RopeFields | None = None
    layer_types: list[str] | None = None
    use_sliding_window: bool | None = None

    implied = CAUSAL
    upstream_from = "rope_scaling"
    base_model_tp_plan = {  # noqa: RUF012
        **{f"layers.*.self_attn.{x}_proj": "colwise" for x in "qkv"},
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def to_spec(self) -> ArchSpec:
        """The architecture; UnsupportedConfig or ValueError names the unsupported field."""
        head_dim = self.head_dim or quotient(self, "hidden_size", "num_attention_heads")
        norm = Norm(kind="rms", eps=self.rms_norm_eps, bias=False)
        return ArchSpec(
            vocab=self.vocab_size,
            width=self.hidden_size,
            attention=Attention(
                heads=self.num_attention_heads,
                kv_heads=self.num_key_value_heads or self.num_attention_heads,
                head_dim=head_dim,
                scale=max(head_dim, 1) ** -0.5,
                qkv_bias=False,
                out_bias=False,
            ),
            mlp=Mlp(width=self.intermediate_size, act=activation(self, "hidden_act"), gated=True, bias=False),
            norm=norm,
            windows=self._windows(),
            positions=(self.rotary(head_dim),),
            final_norm=norm,
            dropout=Dropout(attention=self.attention_dropout),
            tie_head=self.tie_word_embeddings,
            init_std=self.initializer_range,
        ).validate("MistralConfig")

    def _windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        count, kinds = layers(self, "num_hidden_layers"), self.layer_types
        if self.use_sliding_window is False and self.sliding_window is not None:
            raise UnsupportedConfig(
                f"MistralConfig.use_sliding_window=False contradicts sliding_window={self.sliding_window}, which "
                "transformers uses: give sliding_window=None for no window, or use_sliding_window=None for this one"
            )
        if kinds is None:
            return (self.sliding_window,) * count
        if len(kinds) != count or not set(kinds) <= {SLIDING, FULL}:
            raise FieldError(
                f"MistralConfig.layer_types must name {SLIDING!r} or {FULL!r} for each of the {count} layers of "
                f"num_hidden_layers, got {len(kinds)}: {brief(kinds)}",
                "layer_types",
            )
        if SLIDING in kinds and self.sliding_window is None:
            raise FieldError(
                f"MistralConfig.layer_types names {SLIDING!r}, which needs a sliding_window, got None",
                "sliding_window",
            )
        return tuple(self.sliding_window if kind == SLIDING else None for kind in kinds)

    def _is_ministral(self) -> bool:
        """Whether some layer has no window where transformers' Mistral gives it one."""
        return self.sliding_window is not None and FULL in (self.layer_types or ())

    def stored_type(self) -> str:
        """ "ministral" if `layer_types` has full-attention layers next to a window: transformers' Mistral ignores
        it."""
        return "ministral" if self._is_ministral() else "mistral"

    def stored_class(self, name: str) -> str:
        """The name of the class in config.json, consistent with `stored_type`."""
        return name.replace("Mistral", "Ministral", 1) if self._is_ministral() else name


def tree(_: MistralConfig) -> ModuleSpec:
    """transformers' module tree."""
    return module(
        "MistralModel",
        "model",
        classes={"norm": "MistralRMSNorm", "rotary": "MistralRotaryEmbedding"},
        embed_tokens="embed",
        layers=module(
            "MistralDecoderLayer",
            "layer",
            self_attn=module(
                "MistralAttention", "attention", q_proj="q", k_proj="k", v_proj="v", o_proj="out"
            ),
            mlp=module("MistralMLP", "mlp", gate_proj="gate", up_proj="up", down_proj="down", act_fn="act"),
            input_layernorm="norm1",
            post_attention_layernorm="norm2",
        ),
        norm="final_norm",
        rotary_emb="rotary",
    )


HEADS: Heads = {
    "causal": {"lm_head": "head_out"},
    "sequence": {"score": "head_out"},
    "token": {"dropout": "head_drop", "score": "head_out"},
    "span": {"qa_outputs": "head_out"},
}


def keymap(config: MistralConfig, head: str | None) -> KeyMap:
    """The key map of transformers' names."""
    spec = config.to_spec()
    return modules.keymap(
        tree(config), HEADS, spec, head=head, prefix="model.", ignored=(r"rotary_emb\.inv_freq$",)
    )


_IN = "input_ids attention_mask position_ids past_key_values inputs_embeds"
_OUT = "use_cache output_attentions output_hidden_states"
_SPAN = f"{_IN} start_positions end_positions output_attentions output_hidden_states"

FAMILY = Family(
    config=MistralConfig,
    prefix="model",
    keymap=keymap,
    tree=tree,
    heads=HEADS,
    keras_names=KerasNames(numbered="{name}.{i}"),
    classes=(
        ModelClass("MistralModel", None, f"{_IN} {_OUT} cache_position", "BaseModelOutputWithPast"),
        ModelClass(
            "MistralForCausalLM",
            "causal",
            f"{_IN} labels {_OUT} cache_position logits_to_keep",
            "CausalLMOutputWithPast",
        ),
        ModelClass(
            "MistralForSequenceClassification",
            "sequence",
            f"{_IN} labels {_OUT}",
            "SequenceClassifierOutputWithPast",
        ),
        ModelClass("MistralForTokenClassification", "token", f"{_IN} labels {_OUT}", "TokenClassifierOutput"),
        ModelClass("MistralForQuestionAnswering", "span", _SPAN, "QuestionAnsweringModelOutput"),
    ),
)
