"""The bare model as a layer, a sublayer of every model under the family's prefix; the base of `TF*MainLayer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from monoblock.backends.tf import heads
from monoblock.backends.tf.cache import Cache
from monoblock.backends.tf.forward import Forward
from monoblock.backends.tf.inputs import prepare
from monoblock.backends.tf.layers import Leaves
from monoblock.backends.tf.model import (
    Attention,
    AttentionNorm,
    Block,
    Embeddings,
    Mlp,
    Narrow,
    Stack,
    Widen,
    Wrapper,
    embed_tokens,
    positioned,
    run_layers,
    with_patches,
)
from monoblock.backends.tf.ops import Tensor, size
from monoblock.backends.tf.parts import Builder, Part, at, role_paths
from monoblock.backends.tf.serving import Configured
from monoblock.backends.xla.checked import dropout_rates
from monoblock.backends.xla.inputs import DEFAULT_OPTIONS, ForwardOptions
from monoblock.config import PretrainedConfig, as_own_config
from monoblock.heads import HeadSpec

KINDS: dict[str, type[Part]] = {
    "attention": Attention,
    "attention_norm": AttentionNorm,
    "embeddings": Embeddings,
    "layer": Block,
    "mlp": Mlp,
    "mlp_add": Mlp,
    "narrow": Narrow,
    "stack": Stack,
    "widen": Widen,
    "wrapper": Wrapper,
    **heads.KINDS_OF_PARTS,
}


class MainLayer(Forward, Configured, Part):
    """The bare model: hidden states, and a pooler's output if the family has one.

    Its weights are created by the enclosing model, or at the first call. `head`: that model's head, whose dropout uses
    this layer's seeds too.
    """

    def __init__(self, config: PretrainedConfig, *, head: HeadSpec | None = None, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.config = as_own_config(config, self.family.config, type(self).__name__)
        self.spec, kind = config.to_spec(), self.row.head
        self.head_spec = config.to_head(kind) if kind else None
        self.gradient_checkpointing = bool(getattr(config, "gradient_checkpointing", False))
        self.layout, names = self.family.tree(config), self.family.keras_names
        leaf = Leaves(self.spec, self.head_spec, self.dtype_policy, names.table)
        Builder(self.spec, KINDS, leaf, names).fill(self, self.layout)
        self.role_paths = role_paths(self.layout)
        rates = [*dropout_rates(self.spec, self.head_spec), *dropout_rates(self.spec, head)]
        self.seeds = keras.random.SeedGenerator() if any(rates) else None

    def at(self, role: str, layer: int | None = None) -> Any:
        """The layer with a role, of block `layer` if the role belongs to blocks; None if there is none."""
        return at(self, self.role_paths[role], layer) if role in self.role_paths else None

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """The embeddings (b, s, w) of token ids (b, s)."""
        return embed_tokens(self.at("embed"), input_ids, self.spec)

    def seed(self, options: ForwardOptions) -> Tensor | None:
        """The seed of dropout in a call; None without dropout."""
        return tf.cast(self.seeds.next(), tf.int32) if options.train and self.seeds is not None else None

    @tf.autograph.experimental.do_not_convert
    def network(
        self,
        given: Mapping[str, Tensor],
        cache: Cache | None = None,
        options: ForwardOptions = DEFAULT_OPTIONS,
    ) -> dict[str, Any]:
        found = self.hidden(given, cache, options, self.seed(options))
        if self.has("pooler"):
            found["pooler_output"] = self.call_role("pooler", found["last_hidden_state"])
        return found

    def hidden(
        self, given: Mapping[str, Tensor], cache: Cache | None, options: ForwardOptions, seed: Tensor | None
    ) -> dict[str, Any]:
        """The outputs without the pooler; see `network`."""
        x, types = given.get("inputs_embeds"), given.get("token_type_ids")
        x = self.embed_tokens(given["input_ids"]) if x is None else tf.cast(x, self.compute_dtype)
        if (patches := given.get("image_patches")) is not None:
            patches = tf.cast(patches, self.compute_dtype)
            x = with_patches(self.role("patch_embed"), x, patches, given["patch_rows"])
        if types is not None:
            x = x + self.embed_tokens(types)
        count = size(x, 1)
        context = prepare(self.spec, given, count, cache, options)
        context = replace(context, seed=seed, checkpointing=self.gradient_checkpointing)
        cache_layers = None if cache is None else tuple(cache.layer(i) for i in range(self.spec.layers))
        x = (
            self.call_role("embeddings", x, context=context)
            if self.has("embeddings")
            else positioned(self, x, context)
        )
        if self.has("stack"):
            out = self.call_role(
                "stack", x, context=context, layers=cache_layers, hidden_states=options.hidden_states
            )
        else:
            out = run_layers(self, x, context, cache_layers, options.hidden_states)
        found = {
            "last_hidden_state": out.hidden,
            "hidden_states": out.hidden_states,
            "attentions": out.attentions,
        }
        if cache is not None and out.layers is not None:
            past = tf.zeros((), tf.int32) if options.fresh else cache.length
            found["past_key_values"] = replace(
                cache,
                keys=tuple(layer.keys for layer in out.layers),
                values=tuple(layer.values for layer in out.layers),
                length=past + count,
            )
        return found

    # ------------------------------------------------------------------ Keras's files

    def save_own_variables(self, store: Any) -> None:
        """Save the state of the dropout seeds, so that training can resume exactly."""
        if self.seeds is not None:
            store["seeds"] = self.seeds.state.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Load the state of the dropout seeds, if the file has it."""
        if self.seeds is not None and "seeds" in store.keys():  # noqa: SIM118, as it is no dict
            self.seeds.state.assign(np.asarray(store["seeds"]))
