"""MPT (MosaicML, 2023): pre-norm, ALiBi, no biases, a fused qkv; and all that its makers' code adds to it.

Source: https://github.com/mosaicml/llm-foundry, configs of both the hub's MptConfig and the makers' MPTConfig.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from monoblock.checkpoint.keymap import KeyMap, Same, Spelling, Split, row
from monoblock.config import PretrainedConfig
from monoblock.errors import UnsupportedConfig
from monoblock.families import Family, ModelClass
from monoblock.families.common import head_rows, quotient
from monoblock.spec import (
    Alibi,
    ArchSpec,
    Attention,
    Dropout,
    Learned,
    Mlp,
    Norm,
    Position,
    QkNorm,
    RopeScaling,
    Rotary,
)

NORMS: dict[str, Literal["layer", "rms"]] = {
    "layernorm": "layer",
    "low_precision_layernorm": "layer",
    "rmsnorm": "rms",
    "low_precision_rmsnorm": "rms",
    "triton_rmsnorm": "rms",
}
ATTENTIONS = ("multihead_attention", "multiquery_attention", "grouped_query_attention")
# ffn_act_fn's (name, approximate) -> the spec's activation
ACTIVATIONS = {
    ("gelu", "none"): "gelu",
    ("gelu", "tanh"): "gelu_tanh",
    ("quick_gelu", "none"): "quick_gelu",
    ("relu", "none"): "relu",
    ("silu", "none"): "silu",
}

# What is honoured of the options that have a few values; any other value is refused by name.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "attn_config.attn_type": ATTENTIONS,
    "attn_config.attn_impl": ("torch", "flash", "triton"),
    "attn_config.prefix_lm": (False,),
    "attn_config.nope": (False,),
    "attn_config.kv_dim": (None,),
    "attn_config.attn_temperature_tuning.attn_scale": (None, 0.0),
    "attn_config.seq_parallel_world_size": (None, 1),
    "attn_config.rope_impl": ("dail", "hf"),
    "attn_config.rope_dail_config.type": (None, "original"),
    "attn_config.rope_hf_config.type": (None, "no_scaling", "linear", "dynamic", "llama3"),
    "block_overrides": (None, {}),
    "fc_type.name": (None, "torch"),
    "ffn_config.ffn_type": (None, "mptmlp", "mptglu"),
    "norm_type": tuple(NORMS),
}

# The keys of the options that are dicts; one more is a wish that would go unheard.
KEYS: dict[str, frozenset[str]] = {
    "ffn_config": frozenset({"ffn_type", "ffn_hidden_size", "ffn_act_fn", "fc_type"}),
    "attn_config.rope_dail_config": frozenset({"type", "pos_idx_in_fp32", "xpos_scale_base"}),
    "attn_config.rope_hf_config": frozenset(
        {"type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "attn_config.attn_temperature_tuning": frozenset({"floor_scale", "attn_scale"}),
}


class MptAttentionConfig(PretrainedConfig):
    """The `attn_config` of an `MptConfig`; from `qk_gn` on, the options of the makers' own code."""

    attn_type: str = "multihead_attention"
    attn_pdrop: float = 0
    attn_impl: str = "torch"
    clip_qkv: float | None = None
    softmax_scale: float | None = None
    prefix_lm: bool = False
    qk_ln: bool = False
    attn_uses_sequence_id: bool = False
    alibi: bool = True
    alibi_bias_max: int = 8
    qk_gn: bool = False
    kv_n_heads: int | None = None
    fused_qkv: bool = True
    sliding_window_size: int = -1
    attn_logit_softcapping: float | None = None
    rope: bool = False
    rope_theta: float = 10000
    rope_impl: str = "dail"
    rope_dail_config: dict[str, Any] | None = None
    rope_hf_config: dict[str, Any] | None = None
    nope: bool = False
    kv_dim: int | None = None
    attn_temperature_tuning: dict[str, Any] | None = None
    seq_parallel_world_size: int | None = None

    makers_from = "qk_gn"

    def finish(self, given: frozenset[str], /) -> None:
        """The makers' default of `alibi` is False; the hub's True holds unless rope is asked for."""
        if self.rope and "alibi" not in given:
            self.alibi = False
        # transformers 5 takes whole numbers only, and 0.0 is what most files hold.
        if self.attn_pdrop == int(self.attn_pdrop):
            self.attn_pdrop = int(self.attn_pdrop)


class MptConfig(PretrainedConfig):
    """The config of an MPT model; from `head_dim` on, the options of the makers' own code.

    Defaults are the hub's. `head_dim=None` means d_model / n_heads; `attention_bias=None` means not `no_bias`.
    """

    model_type = "mpt"
    sub_configs = {"attn_config": MptAttentionConfig}  # noqa: RUF012
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
    ffn_config: dict[str, Any] | None = None
    final_logit_softcapping: float | None = None
    init_config: dict[str, Any] | None = None
    fc_type: str | dict[str, Any] | None = None
    use_pad_tok_in_ffn: bool = True
    block_overrides: dict[str, Any] | None = None
    fuse_norm_attn_norm: bool = False

    makers_from = "head_dim"

    def finish(self, given: frozenset[str], /) -> None:
        """The makers give `fc_type` as a word or as a dict with a name."""
        if "fc_type" in given and isinstance(self.fc_type, str):
            self.fc_type = {"name": self.fc_type}

    def to_spec(self) -> ArchSpec:
        """The architecture; UnsupportedConfig or ValueError names the field that cannot be honoured."""
        self.check(SUPPORTED)
        self.check_keys(KEYS)
        att, bias = self.attn_config, not self.no_bias
        if att.attn_type == "grouped_query_attention" and not att.kv_n_heads:
            raise ValueError("MptConfig.attn_config.kv_n_heads must be given for grouped_query_attention")
        if att.qk_ln and att.qk_gn:
            raise ValueError("MptConfig.attn_config: qk_ln and qk_gn exclude each other; set one of them")
        head_dim = self.head_dim or quotient(self, "d_model", "n_heads")
        kv_heads = dict(zip(ATTENTIONS, (self.n_heads, 1, att.kv_n_heads), strict=True))[att.attn_type]
        if att.kv_n_heads not in (None, kv_heads):
            raise ValueError(
                f"MptConfig.attn_config.kv_n_heads={att.kv_n_heads} does not go with attn_type={att.attn_type!r}, "
                f"which has {kv_heads}; use grouped_query_attention"
            )
        kind = NORMS[self.norm_type]
        norm = Norm(kind=kind, eps=self.layer_norm_epsilon, bias=bias and kind == "layer")
        return ArchSpec(
            vocab=self.vocab_size,
            width=self.d_model,
            attention=Attention(
                heads=self.n_heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                scale=att.softmax_scale or 1 / math.sqrt(max(head_dim, 1)),
                qkv_bias=bias if self.attention_bias is None else self.attention_bias,
                out_bias=bias,
                clip=att.clip_qkv or None,
                softcap=att.attn_logit_softcapping,
                qk_norm=_qk_norm(self, norm),
                by_segment=att.attn_uses_sequence_id,
            ),
            mlp=_mlp(self, bias),
            norm=norm,
            # The makers count the keys before the query, a spec's window counts the query's own too.
            windows=(None if att.sliding_window_size < 0 else att.sliding_window_size + 1,) * self.n_layers,
            positions=_positions(self, head_dim),
            final_norm=norm,
            dropout=Dropout(embed=self.emb_pdrop, attention=att.attn_pdrop, residual=self.resid_pdrop),
            tie_head=self.tie_word_embeddings,
            logit_scale=_logit_scale(self),
            logit_softcap=self.final_logit_softcapping,
            embed_gradient=self.embedding_fraction,
            init_std=self.initializer_range,
        ).validate("MptConfig")


def _qk_norm(config: MptConfig, norm: Norm) -> QkNorm | None:
    att = config.attn_config
    if not (att.qk_ln or att.qk_gn):
        return None
    return QkNorm(norm=norm, span="head" if att.qk_gn else "width")


def _mlp(config: MptConfig, bias: bool) -> Mlp:
    ffn = config.ffn_config or {}
    width = ffn.get("ffn_hidden_size") or config.d_model * config.expansion_ratio
    if width != int(width):
        raise ValueError(
            f"MptConfig.expansion_ratio={config.expansion_ratio} times d_model={config.d_model} must be a whole number"
        )
    act: dict[str, str] = ffn.get("ffn_act_fn") or {"name": "gelu"}
    name = ACTIVATIONS.get((act.get("name", ""), act.get("approximate", "none")))
    if name is None:
        raise UnsupportedConfig(f"MptConfig.ffn_config.ffn_act_fn={act!r}: not among {sorted(ACTIVATIONS)}")
    return Mlp(width=int(width), act=name, gated=ffn.get("ffn_type") == "mptglu", bias=bias)


def _positions(config: MptConfig, head_dim: int) -> tuple[Position, ...]:
    att = config.attn_config
    found: list[Position] = []
    if att.alibi:
        found.append(Alibi(bias_max=att.alibi_bias_max))
    if att.rope:
        found.append(Rotary(dim=head_dim, theta=att.rope_theta, scaling=_rope_scaling(config)))
    if config.learned_pos_emb and not found:
        found.append(Learned(size=config.max_seq_len))
    return tuple(found)


def _rope_scaling(config: MptConfig) -> RopeScaling | None:
    att = config.attn_config
    rope = dict(att.rope_hf_config or {}) if att.rope_impl == "hf" else {}
    kind = rope.get("type", "no_scaling")
    if kind == "no_scaling":
        return None
    return RopeScaling(
        kind=kind,
        factor=rope.get("factor", 1.0),
        original_length=rope.get("original_max_position_embeddings", config.max_seq_len),
        low_freq_factor=rope.get("low_freq_factor", 1.0),
        high_freq_factor=rope.get("high_freq_factor", 4.0),
    )


def _logit_scale(config: MptConfig) -> float:
    scale = config.logit_scale
    if isinstance(scale, str):
        if scale != "inv_sqrt_d_model":
            raise ValueError(f"MptConfig.logit_scale must be a number or 'inv_sqrt_d_model', got {scale!r}")
        return 1 / math.sqrt(config.d_model)
    return 1.0 if scale is None else scale


def keymap(config: MptConfig, head: str | None) -> KeyMap:
    """The hub's and the makers' names. Reads q, k and v fused or apart; writes as `fused_qkv` says."""
    att = config.to_spec().attention
    kv = att.kv_heads * att.head_dim
    apart = Split((att.heads * att.head_dim, kv, kv))
    width = config.to_spec().mlp.width
    block, fused = "blocks.{i}.", "blocks.{i}.norm_attn_norm."
    qkv = [
        Spelling((block + "attn.Wqkv.{p}",), Same()),
        Spelling(tuple(f"{block}attn.W{x}.{{p}}" for x in "qkv"), apart),
        Spelling((fused + "attn.Wqkv.{p}",), Same()),
        Spelling(tuple(f"{fused}attn.W{x}.{{p}}" for x in "qkv"), apart),
    ]
    if not config.attn_config.fused_qkv:
        qkv.insert(0, qkv.pop(1))
    return KeyMap(
        rows=(
            row("embed.{p}", "wte.{p}"),
            row("pos_embed.{p}", "wpe.{p}"),
            row(block + "norm1.{p}", block + "norm_1.{p}", fused + "norm_1.{p}"),
            row(block + "attn.qkv.{p}", *qkv),
            row(block + "attn.q_norm.{p}", block + "attn.q_ln.{p}", fused + "attn.q_ln.{p}"),
            row(block + "attn.k_norm.{p}", block + "attn.k_ln.{p}", fused + "attn.k_ln.{p}"),
            row(block + "attn.out.{p}", block + "attn.out_proj.{p}", fused + "attn.out_proj.{p}"),
            row(block + "norm2.{p}", block + "norm_2.{p}", fused + "norm_2.{p}"),
            row(block + "mlp.up.{p}", block + "ffn.up_proj.{p}"),
            row(
                block + "mlp.gate_up.{p}",
                Spelling((block + "ffn.gate_proj.{p}", block + "ffn.up_proj.{p}"), Split((width, width))),
            ),
            row(block + "mlp.down.{p}", block + "ffn.down_proj.{p}"),
            row("final_norm.{p}", "norm_f.{p}"),
        ),
        heads=head_rows(causal="lm_head", sequence="score", token="classifier", span="qa_outputs"),
        head=head,
        prefix="transformer.",
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
