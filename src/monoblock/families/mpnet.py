"""MPNet (Microsoft, 2020): a bidirectional encoder like BERT, with relative position buckets shared by all layers.

Source: arXiv:2004.09297 and transformers' MPNetConfig.
"""

from __future__ import annotations

from dataclasses import replace

from monoblock import modules
from monoblock.checkpoint.keymap import KeyMap, row
from monoblock.config import PretrainedConfig
from monoblock.families import Family, Heads, ModelClass
from monoblock.families.common import activation, layers, quotient
from monoblock.heads import HeadSpec
from monoblock.modules import KerasNames, ModuleSpec, module
from monoblock.spec import ArchSpec, Attention, Buckets, Dropout, Learned, Mlp, Norm

MAX_DISTANCE = 128  # T5's value; configs of this family do not have it


class MPNetConfig(PretrainedConfig):
    """The config of an MPNet model; the first two of `max_position_embeddings` are reserved (padding offset)."""

    model_type = "mpnet"

    vocab_size: int = 30527
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    relative_attention_num_buckets: int = 32
    pad_token_id: int = 1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 2

    implied = {  # noqa: RUF012
        "is_causal": ((False,), "attention is bidirectional"),
        "is_decoder": ((False,), "attention is bidirectional"),
        "position_embedding_type": (("absolute",), "positions are a learned table and relative buckets"),
        "relative_attention_max_distance": ((MAX_DISTANCE,), "the maximum distance of the buckets is fixed"),
    }

    def to_spec(self) -> ArchSpec:
        """The architecture; UnsupportedConfig or ValueError names the unsupported field."""
        head_dim = quotient(self, "hidden_size", "num_attention_heads")
        norm = Norm(kind="layer", eps=self.layer_norm_eps, bias=True)
        return ArchSpec(
            vocab=self.vocab_size,
            width=self.hidden_size,
            attention=Attention(
                heads=self.num_attention_heads,
                kv_heads=self.num_attention_heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
                qkv_bias=True,
                out_bias=True,
            ),
            mlp=Mlp(width=self.intermediate_size, act=activation(self, "hidden_act"), gated=False, bias=True),
            norm=norm,
            placement="post",
            causal=False,
            windows=(None,) * layers(self, "num_hidden_layers"),
            positions=(
                Learned(
                    size=self.max_position_embeddings, offset=self.pad_token_id + 1, pad_id=self.pad_token_id
                ),
                Buckets(count=self.relative_attention_num_buckets, max_distance=MAX_DISTANCE),
            ),
            embed_norm=norm,
            dropout=Dropout(
                embed=self.hidden_dropout_prob,
                attention=self.attention_probs_dropout_prob,
                residual=self.hidden_dropout_prob,
            ),
            tie_head=self.tie_word_embeddings,
            init_std=self.initializer_range,
        ).validate("MPNetConfig")

    def to_head(self, kind: str) -> HeadSpec:
        """The head of that kind; all but masked, span and pooler apply dropout before the projection."""
        dropout = 0.0 if kind in ("masked", "span", "pooler") else self.hidden_dropout_prob
        norm = self.to_spec().norm if kind == "masked" else None
        return replace(super().to_head(kind), dropout=dropout, norm=norm)


def tree(_: MPNetConfig) -> ModuleSpec:
    """transformers' module tree; only some classes have the pooler."""
    attention = module(
        "MPNetAttention",
        "attention_norm",
        attn=module("MPNetSelfAttention", "attention", q="q", k="k", v="v", o="out", dropout="attn_drop"),
        LayerNorm="norm1",
        dropout="out_drop",
    )
    layer = module(
        "MPNetLayer",
        "layer",
        tuples=True,
        attention=attention,
        intermediate=module("MPNetIntermediate", "widen", dense="up", intermediate_act_fn="act"),
        output=module("MPNetOutput", "narrow", dense="down", LayerNorm="norm2", dropout="mlp_drop"),
    )
    return module(
        "MPNetModel",
        "model",
        embeddings=module(
            "MPNetEmbeddings",
            "embeddings",
            word_embeddings="embed",
            position_embeddings="pos_embed",
            LayerNorm="embed_norm",
            dropout="embed_drop",
        ),
        encoder=module("MPNetEncoder", "stack", layer=layer, relative_attention_bias="rel_bias"),
        pooler=module("MPNetPooler", "pooler", dense="head_dense", activation="head_act"),
    )


HEADS: Heads = {
    "masked": {
        "lm_head": module(
            "MPNetLMHead", "lm_head", dense="head_dense", layer_norm="head_norm", decoder="head_out"
        )
    },
    "first": {
        "classifier": module(
            "MPNetClassificationHead",
            "classifier_head",
            dense="head_dense",
            dropout="head_drop",
            out_proj="head_out",
        )
    },
    "choice": {"dropout": "head_drop", "classifier": "head_out"},
    "token": {"dropout": "head_drop", "classifier": "head_out"},
    "span": {"qa_outputs": "head_out"},
    "pooler": {},
}


def keymap(config: MPNetConfig, head: str | None) -> KeyMap:
    """The key map of transformers' names. The masked head's bias has two names, a pooler has one with prefix, one
    without."""
    pooler, inside = "pooler.dense.{p}", "mpnet.pooler.dense.{p}"
    rows = {
        "masked": (
            row("head.dense.{p}", "lm_head.dense.{p}"),
            row("head.norm.{p}", "lm_head.layer_norm.{p}"),
            row("head.out.bias", "lm_head.bias", "lm_head.decoder.bias"),
            row("head.out.weight", "lm_head.decoder.weight"),
        ),
        "choice": (row("head.dense.{p}", inside, pooler), row("head.out.{p}", "classifier.{p}")),
        "pooler": (row("head.dense.{p}", pooler, inside),),
    }
    return modules.keymap(
        tree(config),
        HEADS,
        config.to_spec(),
        head=head,
        prefix="mpnet.",
        head_rows=rows,
        ignored=(r"embeddings\.position_ids$",),
    )


_IN = "input_ids attention_mask position_ids head_mask inputs_embeds"
_OUT = "output_attentions output_hidden_states return_dict"

FAMILY = Family(
    config=MPNetConfig,
    prefix="mpnet",
    keymap=keymap,
    tree=tree,
    heads=HEADS,
    keras_names=KerasNames(table="weight", first=("relative_attention_bias", "encoder", "pooler")),
    classes=(
        ModelClass("MPNetModel", "pooler", f"{_IN} {_OUT}", "BaseModelOutputWithPooling"),
        ModelClass("MPNetForMaskedLM", "masked", f"{_IN} labels {_OUT}", "MaskedLMOutput"),
        ModelClass(
            "MPNetForSequenceClassification", "first", f"{_IN} labels {_OUT}", "SequenceClassifierOutput"
        ),
        ModelClass("MPNetForMultipleChoice", "choice", f"{_IN} labels {_OUT}", "MultipleChoiceModelOutput"),
        ModelClass("MPNetForTokenClassification", "token", f"{_IN} labels {_OUT}", "TokenClassifierOutput"),
        ModelClass(
            "MPNetForQuestionAnswering",
            "span",
            f"{_IN} start_positions end_positions {_OUT}",
            "QuestionAnsweringModelOutput",
        ),
    ),
)
