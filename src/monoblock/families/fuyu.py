"""Fuyu (Adept, 2023): a Persimmon decoder that takes linearly projected image patches, without an image encoder.

Source: https://www.adept.ai/blog/fuyu-8b and transformers' FuyuConfig.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from monoblock import modules
from monoblock.checkpoint.keymap import KeyMap, KeyRow, Spelling, row
from monoblock.families import Family, Heads, ModelClass
from monoblock.families.common import CAUSAL, RopeConfig, RopeFields, activation, layers, quotient
from monoblock.modules import ModuleSpec, module
from monoblock.spec import ArchSpec, Attention, Dropout, Mlp, Norm, Patches, QkNorm

# Fields of the nested Persimmon config that describe that config itself.
_NESTED = frozenset({"model_type", "id2label", "label2id", "num_labels"})


class FuyuConfig(RopeConfig):
    """The config of a Fuyu model, flat as in published files; the fields of a `text_config` are merged into it."""

    model_type = "fuyu"

    vocab_size: int = 262144
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    hidden_act: str = "relu2"
    max_position_embeddings: int = 16384
    image_size: int = 300
    patch_size: int = 30
    num_channels: int = 3
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_theta: float = 25000.0
    rope_scaling: RopeFields | None = None
    qk_layernorm: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    partial_rotary_factor: float = 0.5
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    text_config: dict[str, Any] | None = None
    image_token_id: int = 71011
    rope_parameters: RopeFields | None = None

    implied = CAUSAL
    upstream_from = "text_config"

    def finish(self, given: frozenset[str], /) -> None:
        """Merge the language model's fields, which newer files nest, into this config."""
        nested = self.text_config
        if nested is not None:
            self._refuse(nested)
            for name, value in nested.items():
                if name in self.fields and name not in given:
                    setattr(self, name, value)
                elif name not in _NESTED:
                    self._warn_unknown(name)
            self.text_config = None
        super().finish(given)

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON values. `partial_rotary_factor`, unless it is 0.5, is also written to `rope_scaling`: in
        a flat file, transformers reads it only there."""
        data = super().to_dict()
        if self.partial_rotary_factor != 0.5:
            scaling = data.get("rope_scaling") or {"rope_type": "default"}
            data["rope_scaling"] = {**scaling, "partial_rotary_factor": self.partial_rotary_factor}
        return data

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
                qk_norm=QkNorm(norm=norm, span="head") if self.qk_layernorm else None,
            ),
            mlp=Mlp(width=self.intermediate_size, act=activation(self, "hidden_act"), gated=False, bias=True),
            norm=norm,
            windows=(None,) * layers(self, "num_hidden_layers"),
            positions=(self.rotary(int(head_dim * self.partial_rotary_factor)),),
            final_norm=norm,
            dropout=Dropout(attention=self.attention_dropout, residual=self.hidden_dropout),
            tie_head=self.tie_word_embeddings,
            patches=Patches(size=self.patch_size**2 * self.num_channels, token_id=self.image_token_id),
            init_std=self.initializer_range,
        ).validate("FuyuConfig")


def tree(_: FuyuConfig) -> ModuleSpec:
    """transformers' module tree; the inner language model is a Persimmon."""
    attention = module(
        "PersimmonAttention",
        "attention",
        query_key_value="qkv_by_head",
        dense="out",
        q_layernorm="q_norm",
        k_layernorm="k_norm",
        attention_dropout="attn_drop",
    )
    layer = module(
        "PersimmonDecoderLayer",
        "layer",
        self_attn=attention,
        mlp=module("PersimmonMLP", "mlp", dense_h_to_4h="up", dense_4h_to_h="down", act="act"),
        input_layernorm="norm1",
        post_attention_layernorm="norm2",
        dropout="layer_drop",
    )
    return module(
        "FuyuModel",
        "model",
        language_model=module(
            "PersimmonModel",
            "stack",
            classes={"rotary": "PersimmonRotaryEmbedding"},
            embed_tokens="embed",
            layers=layer,
            final_layernorm="final_norm",
            rotary_emb="rotary",
        ),
        vision_embed_tokens="patch_embed",
    )


HEADS: Heads = {"causal": {"lm_head": "head_out"}}


def keymap(config: FuyuConfig, head: str | None) -> KeyMap:
    """The key map of transformers' names, newer (`model.language_model.X`) and older (`language_model.model.X`)."""
    made = modules.keymap(
        tree(config), HEADS, config.to_spec(), head=head, prefix="model.", ignored=(r"rotary_emb\.inv_freq$",)
    )

    def both(known: KeyRow) -> KeyRow:
        now = known.spellings[0]
        old = tuple(name.replace("language_model.", "language_model.model.") for name in now.names)
        return known if old == now.names else replace(known, spellings=(now, Spelling(old, now.op)))

    heads = {"causal": (row("head.out.{p}", "lm_head.{p}", "language_model.lm_head.{p}"),)}
    return replace(made, rows=tuple(both(known) for known in made.rows), heads=heads)


_IN = (
    "input_ids image_patches image_patches_indices attention_mask position_ids past_key_values inputs_embeds"
)
_OUT = "output_attentions output_hidden_states return_dict"

FAMILY = Family(
    config=FuyuConfig,
    prefix="model",
    keymap=keymap,
    tree=tree,
    heads=HEADS,
    bare=ModelClass("FuyuModel", None, f"{_IN} use_cache {_OUT}", "BaseModelOutputWithPast"),
    extra=("pixel_values",),
    classes=(
        ModelClass(
            "FuyuForCausalLM",
            "causal",
            f"{_IN} use_cache labels {_OUT}",
            "CausalLMOutputWithPast",
        ),
    ),
)
