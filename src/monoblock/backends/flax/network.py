"""The whole model as one Linen module: the bare model and a head, from arrays to arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flax import linen as nn
from jax import Array

from monoblock.backends.flax import heads, model
from monoblock.backends.flax.cache import Cache
from monoblock.backends.flax.inputs import AT_REST, Wanted, prepare
from monoblock.backends.flax.parts import Part


class Network(Part):
    """A bare model, or one with a head, with the modules of its layout.

    Its fields are the layout, the spec, the head's spec, the dtype of the computation, and whether the backward pass
    computes each layer anew (`remat`); equal networks share what `jit` compiles.
    """

    @property
    @nn.nowrap
    def bare(self) -> Any:
        """The bare model: the one inside, or this one."""
        return self.role("model") if self.has("model") else self

    def lookup(self, input_ids: Array) -> Array:
        """Token ids (b, s) as vectors (b, s, w)."""
        return model.lookup(self.bare, input_ids)

    def run(
        self, given: Mapping[str, Array], cache: Cache | None = None, wanted: Wanted = AT_REST
    ) -> dict[str, Any]:
        """The outputs by name, without the losses.

        `given`, each where it is needed: input_ids (b, n) or inputs_embeds (b, n, w); attention_mask and sequence_id
        (b, n), with a cache (b, max_length); position_ids (b or 1, n); token_type_ids (b, n); mc_token_ids (b,);
        image_patches (P, size) and patch_rows (b, n), which say which patch each token is, -1 for none.
        """
        x, types, bare = given.get("inputs_embeds"), given.get("token_type_ids"), self.bare
        x = model.lookup(bare, given["input_ids"]) if x is None else x.astype(self.dtype)
        if (patches := given.get("image_patches")) is not None:
            x = model.with_patches(bare, x, patches, given["patch_rows"])
        elif self.is_initializing() and self.spec.patches:
            bare.at("patch_embed")(x[..., :1].repeat(self.spec.patches.size, -1))
        if types is not None:
            x = x + model.lookup(bare, types)
        call = prepare(self.spec, given, x.shape[1], cache, wanted)
        layers = (None,) * self.spec.layers
        if cache is not None:
            layers = tuple(cache.layer(i) for i in range(self.spec.layers))
        out = model.hidden_states(bare, x, call, layers)
        found: dict[str, Any] = {"last_hidden_state": out.hidden}
        if wanted.hidden_states:
            found["hidden_states"] = out.hidden_states
        if wanted.attentions:
            found["attentions"] = out.attentions
        if cache is not None:
            after: Any = out.layers
            found["past_key_values"] = replace(
                cache,
                keys=tuple(layer.keys for layer in after),
                values=tuple(layer.values for layer in after),
                length=(0 if wanted.fresh else cache.length) + x.shape[1],
            )
        if self.head_spec is not None:
            found |= heads.outputs(self, out.hidden, given, wanted)
        return found
