"""MPNet (Microsoft, 2020): a BERT that looks both ways, with relative position buckets shared by all layers.

Source: arXiv:2004.09297 and the hub's MPNetConfig.
"""

from __future__ import annotations

from dataclasses import replace

from monoblock.checkpoint.keymap import KeyMap, Spelling, Split, row
from monoblock.config import PretrainedConfig
from monoblock.families import Family, ModelClass
from monoblock.families.common import activation, head_rows, quotient
from monoblock.heads import HeadSpec
from monoblock.spec import ArchSpec, Attention, Buckets, Dropout, Learned, Mlp, Norm

MAX_DISTANCE = 128  # T5's, which no config of this family holds


class MPNetConfig(PretrainedConfig):
    """The config of an MPNet model; of `max_position_embeddings`, the two before the first token are not usable."""

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

    def to_spec(self) -> ArchSpec:
        """The architecture; UnsupportedConfig or ValueError names the field that cannot be honoured."""
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
            windows=(None,) * self.num_hidden_layers,
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
        """The head; all but the masked one and the span one drop out what they project."""
        dropout = 0.0 if kind in ("masked", "span", "pooler") else self.hidden_dropout_prob
        norm = self.to_spec().norm if kind == "masked" else None
        return replace(super().to_head(kind), dropout=dropout, norm=norm)


def keymap(config: MPNetConfig, head: str | None) -> KeyMap:
    """The hub's names."""
    width, layer = config.hidden_size, "encoder.layer.{i}."
    qkv = tuple(f"{layer}attention.attn.{x}.{{p}}" for x in "qkv")
    pooler = "pooler.dense.{p}"
    return KeyMap(
        rows=(
            row("embed.{p}", "embeddings.word_embeddings.{p}"),
            row("pos_embed.{p}", "embeddings.position_embeddings.{p}"),
            row("rel_bias.{p}", "encoder.relative_attention_bias.{p}"),
            row("embed_norm.{p}", "embeddings.LayerNorm.{p}"),
            row("blocks.{i}.attn.qkv.{p}", Spelling(qkv, Split((width, width, width)))),
            row("blocks.{i}.attn.out.{p}", layer + "attention.attn.o.{p}"),
            row("blocks.{i}.norm1.{p}", layer + "attention.LayerNorm.{p}"),
            row("blocks.{i}.mlp.up.{p}", layer + "intermediate.dense.{p}"),
            row("blocks.{i}.mlp.down.{p}", layer + "output.dense.{p}"),
            row("blocks.{i}.norm2.{p}", layer + "output.LayerNorm.{p}"),
        ),
        heads=head_rows(token="classifier", span="qa_outputs")
        | {
            "masked": (
                row("head.dense.{p}", "lm_head.dense.{p}"),
                row("head.norm.{p}", "lm_head.layer_norm.{p}"),
                row("head.out.bias", "lm_head.bias", "lm_head.decoder.bias"),
                row("head.out.weight", "lm_head.decoder.weight"),
            ),
            "first": (
                row("head.dense.{p}", "classifier.dense.{p}"),
                row("head.out.{p}", "classifier.out_proj.{p}"),
            ),
            "choice": (
                row("head.dense.{p}", "mpnet." + pooler, pooler),
                row("head.out.{p}", "classifier.{p}"),
            ),
            "pooler": (row("head.dense.{p}", pooler, "mpnet." + pooler),),
        },
        head=head,
        prefix="mpnet.",
        ignored=(r"embeddings\.position_ids$",),
    )


_IN = "input_ids attention_mask position_ids head_mask inputs_embeds"
_OUT = "output_attentions output_hidden_states return_dict"

FAMILY = Family(
    config=MPNetConfig,
    prefix="mpnet",
    keymap=keymap,
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
