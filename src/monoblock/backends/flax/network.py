"""The whole model as one Linen module: backbone and head, from arrays to arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jax import Array

from monoblock.backends.flax import heads
from monoblock.backends.flax.cache import Cache
from monoblock.backends.flax.inputs import prepare
from monoblock.backends.flax.model import Backbone
from monoblock.backends.xla.inputs import AT_REST, Wanted
from monoblock.heads import HeadSpec


class Network(Backbone):
    """A backbone, and a head where there is one, with the canonical parameter tree.

    Its fields are the spec, the head's spec, the dtype of the computation, and whether the backward pass computes each
    block anew (`remat`); equal networks share what `jit` compiles.
    """

    head_spec: HeadSpec | None = None

    def setup(self) -> None:
        super().setup()
        if self.head_spec is not None:
            self.head = heads.Head(self.spec, self.head_spec, self.dtype)

    def __call__(
        self, given: Mapping[str, Array], cache: Cache | None = None, wanted: Wanted = AT_REST
    ) -> dict[str, Any]:
        """The outputs by name, without the losses.

        `given`, each where it is needed: input_ids (b, n) or inputs_embeds (b, n, w); attention_mask and sequence_id
        (b, n), with a cache (b, max_length); position_ids (b or 1, n); token_type_ids (b, n); mc_token_ids (b,);
        image_patches (P, size) and patch_rows (b, n), which say which patch each token is, -1 for none.
        """
        x, types = given.get("inputs_embeds"), given.get("token_type_ids")
        x = self.lookup(given["input_ids"]) if x is None else x.astype(self.dtype)
        if (patches := given.get("image_patches")) is not None:
            x = self.with_patches(x, patches, given["patch_rows"])
        elif self.is_initializing() and self.spec.patches:
            self.patch_embed(x[..., :1].repeat(self.spec.patches.size, -1))
        if types is not None:
            x = x + self.lookup(types)
        call = prepare(self.spec, given, x.shape[1], cache, wanted)
        layers = None if cache is None else tuple(cache.layer(i) for i in range(self.spec.layers))
        out = self.run(x, call, layers, wanted.hidden_states)
        found: dict[str, Any] = {"last_hidden_state": out.hidden}
        if out.hidden_states is not None:
            found["hidden_states"] = out.hidden_states
        if out.attentions is not None:
            found["attentions"] = out.attentions
        if cache is not None and out.layers is not None:
            found["past_key_values"] = replace(
                cache,
                keys=tuple(layer.keys for layer in out.layers),
                values=tuple(layer.values for layer in out.layers),
                length=(0 if wanted.fresh else cache.length) + x.shape[1],
            )
        if self.head_spec is not None:
            found |= heads.outputs(self.head, out.hidden, self.embed.embedding, given, wanted)
        return found
