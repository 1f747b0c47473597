"""OpenAI GPT, "GPT-1" (2018): post-norm, learned positions, biases in all projections.

Source: https://github.com/openai/finetune-transformer-lm and transformers' OpenAIGPTConfig.
"""

from __future__ import annotations

from dataclasses import replace

from monoblock import modules
from monoblock.checkpoint.keymap import KeyMap
from monoblock.config import PretrainedConfig
from monoblock.families import Family, Heads, ModelClass
from monoblock.families.common import CAUSAL, layers, quotient
from monoblock.heads import HeadSpec, Summary
from monoblock.modules import KerasNames, ModuleSpec, module
from monoblock.spec import ArchSpec, Attention, Dropout, Learned, Mlp, Norm

# GPT-1's "gelu" is the tanh approximation.
ACTIVATIONS = {"gelu": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}


class OpenAIGPTConfig(PretrainedConfig):
    """The config of a GPT-1 model; the `summary_` fields configure the choice head of the double-heads model."""

    model_type = "openai-gpt"
    attribute_map = {  # noqa: RUF012
        "max_position_embeddings": "n_positions",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 40478
    n_positions: int = 512
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    afn: str = "gelu"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    summary_type: str = "cls_index"
    summary_use_proj: bool = True
    summary_activation: str | None = None
    summary_proj_to_labels: bool = True
    summary_first_dropout: float = 0.1
    summary_last_dropout: float = 0.0

    implied = {  # noqa: RUF012
        **CAUSAL,
        "scale_attn_weights": ((True,), "attention scores are always divided by sqrt(head_dim)"),
        "scale_attn_by_inverse_layer_idx": ((False,), "all layers scale attention scores by the same factor"),
    }
    upstream_from = "summary_last_dropout"

    def to_spec(self) -> ArchSpec:
        """The architecture; UnsupportedConfig or ValueError names the unsupported field."""
        self.check({"afn": tuple(ACTIVATIONS)})
        head_dim = quotient(self, "n_embd", "n_head")
        return ArchSpec(
            vocab=self.vocab_size,
            width=self.n_embd,
            attention=Attention(
                heads=self.n_head,
                kv_heads=self.n_head,
                head_dim=head_dim,
                scale=head_dim**-0.5,
                qkv_bias=True,
                out_bias=True,
                masked_rows="valid",
            ),
            mlp=Mlp(width=4 * self.n_embd, act=ACTIVATIONS[self.afn], gated=False, bias=True),
            norm=Norm(kind="layer", eps=self.layer_norm_epsilon, bias=True),
            placement="post",
            windows=(None,) * layers(self, "n_layer"),
            positions=(Learned(size=self.n_positions),),
            dropout=Dropout(embed=self.embd_pdrop, attention=self.attn_pdrop, residual=self.resid_pdrop),
            tie_head=self.tie_word_embeddings,
            init_std=self.initializer_range,
        ).validate("OpenAIGPTConfig")

    def to_head(self, kind: str) -> HeadSpec:
        """The head of that kind; a double head has an additional choice head with one score."""
        if kind != "double":
            return super().to_head(kind)
        self.check(
            {
                "summary_type": ("cls_index", "last", "first", "mean"),
                "summary_activation": (None, "", "tanh"),
            }
        )
        size = 1 if self.summary_proj_to_labels else self.n_embd
        summary = Summary(
            pool=self.summary_type,  # pyright: ignore[reportArgumentType]
            size=size if self.summary_use_proj else None,
            tanh=self.summary_activation == "tanh",
            dropout_in=self.summary_first_dropout,
            dropout_out=self.summary_last_dropout,
        )
        return replace(super().to_head(kind), labels=1, summary=summary)


def tree(_: OpenAIGPTConfig) -> ModuleSpec:
    """transformers' module tree; matrices are stored as (inputs, outputs) (Conv1D)."""
    conv = {"linear": "Conv1D"}
    attention = module(
        "Attention",
        "attention",
        classes=conv,
        c_attn="qkv",
        c_proj="out",
        attn_dropout="attn_drop",
        resid_dropout="out_drop",
    )
    mlp = module("MLP", "mlp", classes=conv, c_fc="up", c_proj="down", act="act", dropout="mlp_drop")
    return module(
        "OpenAIGPTModel",
        "model",
        tokens_embed="embed",
        positions_embed="pos_embed",
        drop="embed_drop",
        h=module("Block", "layer", tuples=True, attn=attention, ln_1="norm1", mlp=mlp, ln_2="norm2"),
    )


HEADS: Heads = {
    "causal": {"lm_head": "head_out"},
    "sequence": {"score": "head_out"},
    "double": {
        "lm_head": "head_out",
        "multiple_choice_head": module(
            "OpenAIGPTSequenceSummary",
            "summary",
            summary="head_summary",
            activation="head_act",
            first_dropout="head_drop_in",
            last_dropout="head_drop_out",
        ),
    },
}


def keymap(config: OpenAIGPTConfig, head: str | None) -> KeyMap:
    """The key map of transformers' names; some files store the tied matrix under the head's name."""
    return modules.keymap(
        tree(config),
        HEADS,
        config.to_spec(),
        head=head,
        prefix="transformer.",
        older={"embed": ("lm_head.{p}",)},
        ignored=(r"attn\.bias$", r"position_ids$"),
    )


_IN = "input_ids attention_mask token_type_ids position_ids head_mask inputs_embeds"
_OUT = "output_attentions output_hidden_states return_dict"

FAMILY = Family(
    config=OpenAIGPTConfig,
    prefix="transformer",
    keymap=keymap,
    tree=tree,
    heads=HEADS,
    keras_names=KerasNames(table="weight", first=("score", "positions_embed")),
    classes=(
        ModelClass("OpenAIGPTModel", None, f"{_IN} {_OUT}", "BaseModelOutput"),
        ModelClass("OpenAIGPTLMHeadModel", "causal", f"{_IN} labels {_OUT}", "CausalLMOutput"),
        ModelClass(
            "OpenAIGPTDoubleHeadsModel",
            "double",
            f"{_IN} mc_token_ids labels mc_labels {_OUT}",
            "OpenAIGPTDoubleHeadsModelOutput",
        ),
        ModelClass(
            "OpenAIGPTForSequenceClassification",
            "sequence",
            f"{_IN} labels {_OUT}",
            "SequenceClassifierOutput",
        ),
    ),
)
