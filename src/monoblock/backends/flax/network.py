"""The whole model as a Linen module: a bare model, optionally with a head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from monoblock.backends.flax import explicit, heads, model
from monoblock.backends.flax.cache import Cache
from monoblock.backends.flax.checked import check_inputs
from monoblock.backends.flax.gathering import Gathering
from monoblock.backends.flax.inputs import prepare
from monoblock.backends.flax.parts import Part
from monoblock.backends.xla.inputs import DEFAULT_OPTIONS, ForwardOptions
from monoblock.outputs import ModelOutput


class Network(Part):
    """A bare model, or a model with a head, with the submodules of its layout.

    Fields: the layout, the spec, the head's spec, the dtype of the computation, gradient checkpointing (`remat`), the
    output class, and the sharding constraints of FSDP; equal networks share compiled programs.
    """

    output: type[ModelOutput] | None = None
    gathering: Gathering | None = None

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        deterministic: bool = True,
        init_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        *,
        past_key_values: Cache | None = None,
        inputs_embeds: Any = None,
        token_type_ids: Any = None,
        mc_token_ids: Any = None,
        image_patches: Any = None,
        image_patches_indices: Any = None,
        pixel_values: Any = None,
        sequence_id: Any = None,
    ) -> Any:
        """The forward pass of `module.apply({"params": params}, input_ids, attention_mask, position_ids)`, with the
        arguments of transformers' Flax modules in their order, and further inputs by keyword; shapes as in the model.

        `deterministic=False` enables dropout, with `rngs={"dropout": key}`. Returns the class's output without a loss,
        or its tuple. ValueError if an input does not fit, or if a cache is requested as a variable collection.
        """
        if init_cache or (self.scope is not None and "cache" in self.variables):
            raise ValueError(
                "a cache is an argument and a result here, not a variable collection: give past_key_values="
                "model.init_cache(batch, max_length), and take past_key_values from the output"
            )
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "token_type_ids": token_type_ids,
            "mc_token_ids": mc_token_ids,
            "image_patches": image_patches,
            "image_patches_indices": image_patches_indices,
            "pixel_values": pixel_values,
            "sequence_id": sequence_id,
        }
        train = not deterministic
        checked = check_inputs(self.spec, self.head_spec, arguments, past_key_values, train)
        options = ForwardOptions(
            train=train,
            attentions=output_attentions,
            hidden_states=output_hidden_states,
            fresh=checked.fresh,
            choices=checked.choices,
            nested=checked.nested,
        )
        found = self.run(checked.given, past_key_values, options)
        if self.output is None:
            return found
        names = {field.name for field in fields(self.output)}  # pyright: ignore[reportArgumentType]
        result = self.output(**{name: value for name, value in found.items() if name in names})
        return result if return_dict else result.to_tuple()

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Linen's `apply`, extended to meshes with explicit axes (`explicit.py`)."""
        run = super().apply
        if (mesh := explicit.explicit(variables, args, kwargs)) is None:
            return run(variables, *args, **kwargs)
        layout = explicit.Layout.of(mesh, (args, kwargs), kwargs.get("past_key_values"))
        return explicit.run(mesh, lambda v, a, k: run(v, *a, **k), (variables, args, kwargs), layout)

    @property
    @nn.nowrap
    def bare(self) -> Any:
        """The bare model: the submodule, or this module without a head."""
        return self.role("model") if self.has("model") else self

    def embed_tokens(self, input_ids: Array) -> Array:
        """The embeddings (b, s, w) of token ids (b, s)."""
        return model.embed_tokens(self.bare, input_ids, self.gathering)

    def run(
        self,
        given: Mapping[str, Array],
        cache: Cache | None = None,
        options: ForwardOptions = DEFAULT_OPTIONS,
    ) -> dict[str, Any]:
        """The outputs by name, without losses.

        `given`, all optional: input_ids (b, n) or inputs_embeds (b, n, w); attention_mask and sequence_id
        (b, n), with a cache (b, max_length); position_ids (b or 1, n); token_type_ids (b, n); mc_token_ids (b,);
        image_patches (P, size) and patch_rows (b, n), the index of each token's patch, -1 for text.
        """
        x, types, bare = given.get("inputs_embeds"), given.get("token_type_ids"), self.bare
        x = self.embed_tokens(given["input_ids"]) if x is None else x.astype(self.dtype)
        if (patches := given.get("image_patches")) is not None:
            x = model.with_patches(bare, x, patches, given["patch_rows"])
        elif self.is_initializing() and self.spec.patches:
            bare.at("patch_embed")(x[..., :1].repeat(self.spec.patches.size, -1))
        if types is not None:
            x = x + self.embed_tokens(types)
        if self.gathering is not None:
            x = self.gathering.shard_rows(x)
        context = prepare(self.spec, given, x.shape[1], cache, options)
        layers = (None,) * self.spec.layers
        if cache is not None:
            layers = tuple(cache.layer(i) for i in range(self.spec.layers))
        out = model.hidden_states(bare, x, context, layers)
        found: dict[str, Any] = {"last_hidden_state": out.hidden}
        if options.hidden_states:
            found["hidden_states"] = out.hidden_states
        if options.attentions:
            found["attentions"] = out.attentions
        if cache is not None:
            after: Any = out.layers
            found["past_key_values"] = replace(
                cache,
                keys=tuple(layer.keys for layer in after),
                values=tuple(layer.values for layer in after),
                length=jnp.asarray(0 if options.fresh else cache.length, jnp.int32) + x.shape[1],
            )
        if self.head_spec is not None:
            found |= heads.outputs(self, out.hidden, given, options)
        return found
