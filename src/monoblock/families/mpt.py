"""MPT (MosaicML, 2023): pre-norm, ALiBi, no biases, fused qkv; with the further options of llm-foundry's MPT.

Source: https://github.com/mosaicml/llm-foundry (MPTConfig) and transformers' MptConfig.
"""

from __future__ import annotations

import math
from typing import Any

from monoblock import modules
from monoblock.checkpoint.keymap import KeyMap, Same, Spelling, Split
from monoblock.config import PretrainedConfig
from monoblock.families import Family, Heads, ModelClass
from monoblock.families import mpt_options as options
from monoblock.families.common import CAUSAL, layers, quotient
from monoblock.modules import ModuleSpec, module
from monoblock.spec import ArchSpec, Attention, Dropout, Norm


class MptConfig(PretrainedConfig):
    """The config of an MPT model; the fields from `head_dim` on are llm-foundry's options.

    Defaults are transformers'. `head_dim=None` means d_model / n_heads; `attention_bias=None` means not `no_bias`.
    """

    model_type = "mpt"
    sub_configs = {"attn_config": options.MptAttentionConfig}  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
        "norm_eps": "layer_norm_epsilon",
    }

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    expansion_ratio: int | float = 4
    max_seq_len: int = 2048
    vocab_size: int = 50368
    resid_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    emb_pdrop: float = 0.0
    learned_pos_emb: bool = True
    attn_config: Any = None
    init_device: str = "cpu"
    logit_scale: float | str | None = None
    no_bias: bool = True
    verbose: int = 0
    embedding_fraction: float = 1.0
    norm_type: str = "low_precision_layernorm"
    use_cache: bool = False
    initializer_range: float = 0.02
    head_dim: int | None = None
    attention_bias: bool | None = None
    ffn_config: options.FfnFields | None = None
    final_logit_softcapping: float | None = None
    init_config: dict[str, Any] | None = None
    fc_type: str | options.FcFields | None = None
    use_pad_tok_in_ffn: bool = True
    block_overrides: dict[str, Any] | None = None
    fuse_norm_attn_norm: bool = False

    implied = CAUSAL
    upstream_from = "head_dim"

    def finish(self, given: frozenset[str], /) -> None:
        """llm-foundry gives `fc_type` as a string or as a dict with a name; normalise to the dict."""
        if "fc_type" in given and isinstance(self.fc_type, str):
            self.fc_type = {"name": self.fc_type}

    def to_spec(self) -> ArchSpec:
        """The architecture; UnsupportedConfig or ValueError names the unsupported field."""
        self.check(options.SUPPORTED)
        self.check_keys(options.KEYS)
        att, bias = self.attn_config, not self.no_bias
        head_dim = self.head_dim or quotient(self, "d_model", "n_heads")
        kind = options.NORMS[self.norm_type]
        norm = Norm(kind=kind, eps=self.layer_norm_epsilon, bias=bias and kind == "layer")
        return ArchSpec(
            vocab=self.vocab_size,
            width=self.d_model,
            attention=Attention(
                heads=self.n_heads,
                kv_heads=options.kv_heads(self),
                head_dim=head_dim,
                scale=att.softmax_scale or 1 / math.sqrt(max(head_dim, 1)),
                qkv_bias=bias if self.attention_bias is None else self.attention_bias,
                out_bias=bias,
                clip=att.clip_qkv or None,
                softcap=att.attn_logit_softcapping,
                qk_norm=options.qk_norm(self, norm),
                by_segment=att.attn_uses_sequence_id,
            ),
            mlp=options.mlp(self, bias),
            norm=norm,
            windows=(options.window(self),) * layers(self, "n_layers"),
            positions=options.positions(self, head_dim),
            final_norm=norm,
            dropout=Dropout(embed=self.emb_pdrop, attention=att.attn_pdrop, residual=self.resid_pdrop),
            tie_head=self.tie_word_embeddings,
            logit_scale=options.logit_scale(self),
            logit_softcap=self.final_logit_softcapping,
            embed_gradient=self.embedding_fraction,
            init_std=self.initializer_range,
        ).validate("MptConfig")


def tree(config: MptConfig) -> ModuleSpec:
    """transformers' module tree, extended for llm-foundry's options; q, k and v are separate if not `fused_qkv`."""
    fused = config.attn_config.fused_qkv
    projections = {"Wqkv": "qkv"} if fused else {"Wq": "q", "Wk": "k", "Wv": "v"}
    attention = ModuleSpec(
        "MptAttention", "attention", {**projections, "q_ln": "q_norm", "k_ln": "k_norm", "out_proj": "out"}
    )
    mlp = module("MptMLP", "mlp_add", gate_proj="gate", up_proj="up", act="act", down_proj="down")
    return module(
        "MptModel",
        "model",
        classes={"act": "GELU"},
        wte="embed",
        wpe="pos_embed",
        blocks=module(
            "MptBlock",
            "layer",
            tuples=True,
            norm_1="norm1",
            attn=attention,
            norm_2="norm2",
            ffn=mlp,
            resid_attn_dropout="layer_drop",
        ),
        norm_f="final_norm",
    )


HEADS: Heads = {
    "causal": {"lm_head": "head_out"},
    "sequence": {"score": "head_out"},
    "token": {"dropout": "head_drop", "classifier": "head_out"},
    "span": {"qa_outputs": "head_out"},
}


def keymap(config: MptConfig, head: str | None) -> KeyMap:
    """The key map of transformers' and llm-foundry's names. Reads fused or separate q, k, v; writes per `fused_qkv`."""
    spec = config.to_spec()
    att = spec.attention
    separate = Split((att.heads * att.head_dim, *[att.kv_heads * att.head_dim] * 2))
    block, inner = "blocks.{i}.", "blocks.{i}.norm_attn_norm."
    qkv = [
        Spelling((stem + "attn.Wqkv.{p}",), Same()) if fused else Spelling(names, separate)
        for stem in (block, inner)
        for fused, names in ((True, ()), (False, tuple(f"{stem}attn.W{x}.{{p}}" for x in "qkv")))
    ]
    older: dict[str, tuple[str | Spelling, ...]] = {
        block + canonical: (f"{inner}{name}.{{p}}",)
        for canonical, name in {
            "norm1": "norm_1",
            "attn.q_norm": "attn.q_ln",
            "attn.k_norm": "attn.k_ln",
            "attn.out": "attn.out_proj",
            "norm2": "norm_2",
        }.items()
    }
    return modules.keymap(
        tree(config),
        HEADS,
        spec,
        head=head,
        prefix="transformer.",
        older={**older, block + "attn.qkv": tuple(qkv)},
        other_prefixes=("model.transformer.",),
        ignored=(r"rotary_embedding\.inv_freq$",),
    )


_IN = "input_ids past_key_values attention_mask inputs_embeds"
_OUT = "output_attentions output_hidden_states return_dict"
_SPAN = "input_ids attention_mask inputs_embeds start_positions end_positions"

FAMILY = Family(
    config=MptConfig,
    prefix="transformer",
    keymap=keymap,
    tree=tree,
    heads=HEADS,
    classes=(
        ModelClass(
            "MptModel",
            None,
            f"{_IN} use_cache {_OUT} cache_position",
            "BaseModelOutputWithPastAndCrossAttentions",
        ),
        ModelClass(
            "MptForCausalLM",
            "causal",
            f"{_IN} labels use_cache {_OUT} cache_position logits_to_keep",
            "CausalLMOutputWithCrossAttentions",
        ),
        ModelClass(
            "MptForSequenceClassification",
            "sequence",
            f"{_IN} labels use_cache {_OUT}",
            "SequenceClassifierOutputWithPast",
        ),
        ModelClass(
            "MptForTokenClassification", "token", f"{_IN} labels use_cache {_OUT}", "TokenClassifierOutput"
        ),
        ModelClass("MptForQuestionAnswering", "span", f"{_SPAN} {_OUT}", "QuestionAnsweringModelOutput"),
    ),
)
