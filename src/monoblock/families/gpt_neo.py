"""GPT Neo (EleutherAI, 2021): the GPT-3 architecture, with alternating global and local (256-token window) attention.

Attention scores are not divided by sqrt(head_dim). Source: https://github.com/EleutherAI/gpt-neo and transformers'
GPTNeoConfig.
"""

from __future__ import annotations

from typing import Any

from monoblock import modules
from monoblock.checkpoint.keymap import KeyMap
from monoblock.config import PretrainedConfig
from monoblock.errors import FieldError
from monoblock.families import Family, Heads, ModelClass
from monoblock.families.common import CAUSAL, MAX_LAYERS, activation, quotient
from monoblock.modules import ModuleSpec, module
from monoblock.spec import ArchSpec, Attention, Dropout, Learned, Mlp, Norm


class GPTNeoConfig(PretrainedConfig):
    """The config of a GPT Neo model. `attention_types` [[["global", "local"], 12]] repeats the pair 12 times;
    `intermediate_size=None` means 4 * hidden_size."""

    model_type = "gpt_neo"
    attribute_map = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}  # noqa: RUF012

    vocab_size: int = 50257
    max_position_embeddings: int = 2048
    hidden_size: int = 2048
    num_layers: int = 24
    attention_types: list[Any] = [[["global", "local"], 12]]  # noqa: RUF012
    num_heads: int = 16
    intermediate_size: int | None = None
    window_size: int = 256
    activation_function: str = "gelu_new"
    resid_dropout: float = 0.0
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    attention_layers: list[str] | None = None

    implied = {  # noqa: RUF012
        **CAUSAL,
        "scale_attn_weights": ((False,), "attention scores are never divided by sqrt(head_dim)"),
        "rotary": ((False,), "positions are a learned table"),
    }

    def finish(self, _given: frozenset[str], /) -> None:
        """Expand `attention_types` to `attention_layers`, one kind per layer."""
        types: list[tuple[list[str], int]] = self._checked(
            "attention_types", self.attention_types, list[tuple[list[str], int]]
        )
        if (layers := sum(len(kinds) * count for kinds, count in types)) > MAX_LAYERS:
            raise FieldError(
                f"GPTNeoConfig.attention_types must name at most {MAX_LAYERS} layers, got {layers}",
                "attention_types",
            )
        self.attention_layers = [kind for kinds, count in types for _ in range(count) for kind in kinds]

    def to_spec(self) -> ArchSpec:
        """The architecture; UnsupportedConfig or ValueError names the unsupported field."""
        kinds = self.attention_layers or []
        if len(kinds) != self.num_layers or not set(kinds) <= {"global", "local"}:
            raise ValueError(
                f"GPTNeoConfig.attention_types={self.attention_types} names {len(kinds)} layers, but num_layers is "
                f"{self.num_layers}: expected one of global and local for each layer"
            )
        norm = Norm(kind="layer", eps=self.layer_norm_epsilon, bias=True)
        width = self.intermediate_size or 4 * self.hidden_size
        return ArchSpec(
            vocab=self.vocab_size,
            width=self.hidden_size,
            attention=Attention(
                heads=self.num_heads,
                kv_heads=self.num_heads,
                head_dim=quotient(self, "hidden_size", "num_heads"),
                scale=1.0,
                qkv_bias=False,
                out_bias=True,
                masked_rows="past",
            ),
            mlp=Mlp(width=width, act=activation(self, "activation_function"), gated=False, bias=True),
            norm=norm,
            windows=tuple(self.window_size if kind == "local" else None for kind in kinds),
            positions=(Learned(size=self.max_position_embeddings),),
            final_norm=norm,
            dropout=Dropout(
                embed=self.embed_dropout, attention=self.attention_dropout, residual=self.resid_dropout
            ),
            tie_head=self.tie_word_embeddings,
            init_std=self.initializer_range,
        ).validate("GPTNeoConfig")


def tree(_: GPTNeoConfig) -> ModuleSpec:
    """transformers' module tree."""
    attention = module(
        "GPTNeoSelfAttention",
        "attention",
        attn_dropout="attn_drop",
        resid_dropout="out_drop",
        k_proj="k",
        v_proj="v",
        q_proj="q",
        out_proj="out",
    )
    layer = module(
        "GPTNeoBlock",
        "layer",
        tuples=True,
        ln_1="norm1",
        attn=module("GPTNeoAttention", "wrapper", attention=attention),
        ln_2="norm2",
        mlp=module("GPTNeoMLP", "mlp", c_fc="up", c_proj="down", act="act", dropout="mlp_drop"),
    )
    return module(
        "GPTNeoModel", "model", wte="embed", wpe="pos_embed", drop="embed_drop", h=layer, ln_f="final_norm"
    )


HEADS: Heads = {
    "causal": {"lm_head": "head_out"},
    "sequence": {"score": "head_out"},
    "token": {"dropout": "head_drop", "classifier": "head_out"},
    "span": {"qa_outputs": "head_out"},
}


def keymap(config: GPTNeoConfig, head: str | None) -> KeyMap:
    """The key map of transformers' names; old files also hold causal masks as buffers."""
    ignored = (r"attn\.attention\.(masked_)?bias$",)
    return modules.keymap(
        tree(config), HEADS, config.to_spec(), head=head, prefix="transformer.", ignored=ignored
    )


_IN = "input_ids past_key_values attention_mask token_type_ids position_ids head_mask inputs_embeds"
_OUT = "output_attentions output_hidden_states return_dict"
_SPAN = "input_ids attention_mask token_type_ids position_ids head_mask inputs_embeds start_positions end_positions"

FAMILY = Family(
    config=GPTNeoConfig,
    prefix="transformer",
    keymap=keymap,
    tree=tree,
    heads=HEADS,
    classes=(
        ModelClass(
            "GPTNeoModel", None, f"{_IN} use_cache {_OUT}", "BaseModelOutputWithPastAndCrossAttentions"
        ),
        ModelClass(
            "GPTNeoForCausalLM",
            "causal",
            f"{_IN} labels use_cache {_OUT}",
            "CausalLMOutputWithCrossAttentions",
        ),
        ModelClass(
            "GPTNeoForSequenceClassification",
            "sequence",
            f"{_IN} labels use_cache {_OUT}",
            "SequenceClassifierOutputWithPast",
        ),
        ModelClass(
            "GPTNeoForTokenClassification", "token", f"{_IN} labels use_cache {_OUT}", "TokenClassifierOutput"
        ),
        ModelClass("GPTNeoForQuestionAnswering", "span", f"{_SPAN} {_OUT}", "QuestionAnsweringModelOutput"),
    ),
)
