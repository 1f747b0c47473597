"""Decoders for the framework-free loop of `generate`, on JAX and TensorFlow: with a key/value cache and without.

Prompts are left-padded to a bucket's length, and caches have the lengths of buckets, so that sequences of other lengths
reuse compiled programs. The attention mask hides the padding, and positions do not count it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from monoblock.backends.xla.inputs import ForwardOptions
from monoblock.backends.xla.passes import Passes, PassOutput
from monoblock.errors import UnsupportedConfig
from monoblock.generation.buckets import bucket
from monoblock.generation.config import GenerationConfig
from monoblock.generation.decoder import GenerationPlan
from monoblock.positions import is_dynamic
from monoblock.spec import ArchSpec, Learned, Rotary

# The padding value of an input; 0 for the others.
FILL = {"patch_rows": -1}
NO_TOKEN_AXIS = ("image_patches",)  # inputs without a token axis
MAX_EXTEND = 128  # slots at the end of a cache for the padding of several tokens at once


def _pad_inputs(given: Mapping[str, Any], pad: int) -> dict[str, Any]:
    """The inputs of a pass, left-padded by `pad` tokens, and the patches padded to a bucket's size."""
    made: dict[str, Any] = {}
    for name, value in given.items():
        axis, before, after = (
            (0, 0, bucket(len(value)) - len(value)) if name == "image_patches" else (1, pad, 0)
        )
        widths = [(before, after) if i == axis else (0, 0) for i in range(value.ndim)]
        made[name] = np.pad(value, widths, constant_values=FILL.get(name, 0))
    return made


def _select_rows(value: Any, index_b: Any) -> Any:
    """The selected rows of an input; a single row is shared by all."""
    return value if value.shape[0] == 1 and len(index_b) else value[index_b]


class CachedDecoder:
    """The state of one generation: the cache, and the inputs of later passes in addition to tokens.

    `length` and `prompt_length` include the bucket's padding, `pad`; lengths in the loop's interface do not.
    """

    def __init__(self, passes: Passes, plan: GenerationPlan, inputs: dict[str, Any]) -> None:
        self.passes, self.plan, self.spec = passes, plan, passes.spec
        learned = self.spec.position(Learned)
        self.max_positions = learned.size - learned.offset if learned else None
        self.inputs = dict(inputs)
        self.past = passes.as_cache(self.inputs.pop("past_key_values", None))
        output_config = plan.config if plan.config.return_dict_in_generate else GenerationConfig()
        self.options = ForwardOptions(
            attentions=bool(output_config.output_attentions),
            hidden_states=bool(output_config.output_hidden_states),
            keep=1,
        )
        self.attentions = self.hidden_states = None
        self.cache: Any = None
        self.given: dict[str, Any] = {}  # the mask of all slots, the last token types
        self.last_positions: Any = None  # the given position ids of the prompts' last tokens
        self.pad = self.length = self.prompt_length = 0  # slots
        self.used = 0  # positions used by the longest row

    # ------------------------------------------------------------------ interface to the loop

    @property
    def past_key_values(self) -> Any:
        """The cache without the bucket's padding."""
        if self.cache is None or self.cache.max_length is None:
            return None
        return self.passes.shifted_cache(self.cache, self.pad, self.spec, self.cache.max_length)

    def prefill(self, ids_bn: Any, mask_bm: Any) -> Any:
        """Process the prompts, except for tokens that a given cache already holds; scores of the next token."""
        given, batch, count = self.prepare_inputs(ids_bn, mask_bm)
        past = 0 if self.past is None else int(self.past.length)
        if 0 < count <= past:
            raise ValueError(
                f"past_key_values hold {past} tokens and the prompt has {count}: give the whole prompt, including the "
                "cached tokens"
            )
        chunk = self._chunk(count)
        self.pad = 0 if past or chunk else bucket(count) - count
        self.length = self.prompt_length = self.pad + count
        given = _pad_inputs(given, self.pad)
        slots = bucket(self.length) + self._new_token_slots(count) + (MAX_EXTEND if self.plan.rewinds else 0)
        mask = np.ones((batch, slots), np.int32)
        mask[:, : self.length] = given["attention_mask"]
        self._keep_prompt_inputs(given, mask)
        given["attention_mask"] = mask
        if past:
            self.cache = self.passes.shifted_cache(self.past, 0, self._cache_spec(), slots)
        elif chunk:
            self.cache = self.passes.empty_cache(batch, self._cache_spec(), slots)
        else:
            options = replace(self.options, fresh=True)
            found = self.passes.prefill(given, options, self._cache_spec(), slots)
            return self._store_outputs(found, slice(self.pad, None))
        return self._prefill_chunks(given, past, count, chunk or count)

    def _chunk(self, count: int) -> int | None:
        """Tokens per pass of a chunked prefill; None: all at once."""
        chunk = self.plan.config.prefill_chunk_size
        if chunk is not None and is_dynamic(self.spec.position(Rotary)):
            raise UnsupportedConfig(
                f"GenerationConfig.prefill_chunk_size={chunk}: this model's RoPE scaling depends on the "
                "length of the whole prompt"
            )
        return None if chunk is None or chunk >= count else chunk

    def _new_token_slots(self, count: int) -> int:
        """Cache slots for new tokens."""
        limit, most = self.plan.config.max_cache_len, self.plan.max_length - 1
        if limit is not None and most > limit:
            raise ValueError(
                f"the static cache has room for {limit} tokens and up to {most} are needed: make max_cache_len larger"
            )
        return bucket(self.plan.new_tokens) if limit is None else max(1, limit - count)

    def _prefill_chunks(self, given: dict[str, Any], past: int, count: int, chunk: int) -> Any:
        """Process the tokens after `past` cached ones in chunks of `chunk` tokens, then of powers of two, so that few
        lengths are compiled."""
        mask, scores, chunks = given.pop("attention_mask"), None, []
        while past < count:
            left = count - past
            size = chunk if chunk < left else 1 << (left.bit_length() - 1)
            chunk_inputs = {
                n: x if n in NO_TOKEN_AXIS else x[:, past : past + size] for n, x in given.items()
            }
            self.length = past + size
            scores = self._extend({**chunk_inputs, "attention_mask": mask}, size, self.options)
            chunks.append(self.hidden_states)
            past += size
        if self.hidden_states is not None:
            self.hidden_states = tuple(self.passes.loop_ops.xp.concat(x) for x in zip(*chunks, strict=True))
        return scores

    def step(self, ids_b1: Any) -> Any:
        """Process one token per row; scores of the next."""
        self.advance(1)
        return self._extend(self.next_inputs() | {"input_ids": np.asarray(ids_b1, np.int32)}, 1, self.options)

    def extend(self, ids_bk: Any) -> Any:
        """Process k tokens per row; scores after each, on the host."""
        count = ids_bk.shape[1]
        if count == 1:
            return self.passes.loop_ops.xp.to_numpy(self.step(ids_bk))[:, None]
        # With dynamic RoPE scaling, angles depend on the length: no padding.
        exact = is_dynamic(self.spec.position(Rotary))
        size = count if exact else 1 << (count - 1).bit_length()
        start = self.used
        self.advance(count)
        given = self.next_inputs(count)
        given["input_ids"] = np.pad(np.asarray(ids_bk, np.int32), ((0, 0), (0, size - count)), mode="edge")
        if not exact:
            given["position_ids"] = self._position_ids(given, start, count, size)
        scores = self._extend(given, count, replace(self.options, keep=0))
        if size > count:
            self._set_length()
        return self.passes.loop_ops.xp.to_numpy(scores)[:, :count]

    def reorder(self, index_b: Any) -> None:
        """Row i becomes the former row `index_b[i]`."""
        index_b = np.asarray(index_b)
        if self.cache is not None:
            self.cache = self.passes.reordered_cache(self.cache, index_b)
        self.given = {name: _select_rows(value, index_b) for name, value in self.given.items()}
        if self.last_positions is not None:
            self.last_positions = _select_rows(self.last_positions, index_b)

    def crop(self, length: int) -> None:
        """Remove all tokens after the first `length`."""
        self.used -= self.length - (self.pad + length)
        self.length = self.pad + length
        self._set_length()

    # ------------------------------------------------------------------ inputs of passes

    def prepare_inputs(self, ids_bn: Any, mask_bm: Any) -> tuple[dict[str, Any], int, int]:
        """The checked inputs of the prompts on the host, with a mask; the number of rows and of tokens."""
        arguments = {**self.inputs, "attention_mask": mask_bm}
        if arguments.get("inputs_embeds") is None:
            arguments["input_ids"] = ids_bn
        made = self.passes.check_inputs({name: x for name, x in arguments.items() if x is not None})
        given = {name: self.passes.loop_ops.xp.to_numpy(value) for name, value in made.items()}
        tokens = given.get("input_ids", given.get("inputs_embeds"))
        assert tokens is not None
        batch, count = tokens.shape[:2]
        given.setdefault("attention_mask", np.ones((batch, count), np.int32))
        return given, batch, count

    def _keep_prompt_inputs(self, given: Mapping[str, Any], mask: Any) -> None:
        """Store the inputs that passes over new tokens take from the prompt."""
        self.given = {"attention_mask": mask}
        if (types := given.get("token_type_ids")) is not None:
            self.given["token_type_ids"] = types[:, -1:]
        self.used = int(mask[:, : self.length].sum(axis=1).max())
        if (positions := given.get("position_ids")) is not None:
            learned = self.spec.position(Learned)
            self.last_positions = positions[:, -1:]
            self.used = int(positions.max()) + 1 - (learned.offset if learned else 0)

    def next_inputs(self, count: int = 1) -> dict[str, Any]:
        """Inputs, in addition to the tokens, of a pass over the last `count` tokens."""
        given = dict(self.given)
        if "token_type_ids" in given and count > 1:
            given["token_type_ids"] = given["token_type_ids"].repeat(count, axis=1)
        if self.last_positions is not None:
            after = np.arange(self.length - count, self.length, dtype=np.int32) - self.prompt_length + 1
            given["position_ids"] = self.last_positions + after
        return given

    def fixed_inputs(self) -> dict[str, Any]:
        """Inputs shared by the passes of all new tokens; position ids are those of the prompts' last tokens."""
        positions = self.last_positions
        return self.given if positions is None else {**self.given, "position_ids": positions}

    @property
    def room(self) -> int:
        """The number of further tokens for which there are positions."""
        return (1 << 30) if self.max_positions is None else self.max_positions - self.used

    def _position_ids(self, given: Mapping[str, Any], start: int, count: int, size: int) -> Any:
        """Positions of `count` tokens of one row, right-padded by repeating the last one: a later position may exceed
        the position embedding."""
        learned = self.spec.position(Learned)
        held = given.get("position_ids")
        if held is None:
            held = start + (learned.offset if learned else 0) + np.arange(count, dtype=np.int32)[None]
        return np.pad(held, ((0, 0), (0, size - count)), mode="edge")

    def advance(self, count: int) -> None:
        """Add `count` tokens to the length; ValueError if there are no positions for them."""
        self.length, self.used = self.length + count, self.used + count
        self.check(self.used)

    def check(self, used: int) -> None:
        """ValueError if there are fewer than `used` positions."""
        if self.max_positions is not None and used > self.max_positions:
            raise ValueError(
                f"the model has {self.max_positions} learned positions, but the sequence, cache included, has {used} "
                "tokens: shorten it"
            )

    def _cache_spec(self) -> ArchSpec:
        """The spec of the cache: without windows if tokens may be rewound or attention weights are returned."""
        spec = self.spec
        keep_all = self.plan.rewinds or self.options.attentions
        return replace(spec, windows=(None,) * spec.layers) if keep_all else spec

    # ------------------------------------------------------------------ forward passes

    def _extend(self, given: dict[str, Any], count: int, options: ForwardOptions) -> Any:
        assert self.cache is not None
        options = replace(options, fresh=False)
        return self._store_outputs(self.passes.extend(given, self.cache, options), slice(0, count))

    def _store_outputs(self, found: PassOutput, tokens_slice: slice) -> Any:
        """Store the outputs of a pass without padding; return its scores."""
        self.cache = found.cache
        if found.attentions is not None:
            keys_slice = slice(self.pad, self.length)
            self.attentions = self.passes.sliced(found.attentions, (..., tokens_slice, keys_slice))
        if found.hidden_states is not None:
            self.hidden_states = self.passes.sliced(found.hidden_states, (..., tokens_slice, slice(None)))
        return found.scores

    def _set_length(self) -> None:
        assert self.cache is not None
        self.cache = replace(
            self.cache, length=self.passes.loop_ops.xp.to_framework(np.array(self.length, np.int32))
        )


class UncachedDecoder:
    """The same without a cache: each pass processes the whole sequence."""

    past_key_values = None

    def __init__(self, passes: Passes, plan: GenerationPlan, inputs: dict[str, Any]) -> None:
        self.decoder, self.passes = CachedDecoder(passes, plan, inputs), passes
        self.attentions = self.hidden_states = None
        self.given: dict[str, Any] = {}

    def prefill(self, ids_bn: Any, mask_bm: Any) -> Any:
        """Process the prompts; scores of the next token."""
        self.given, _, _ = self.decoder.prepare_inputs(ids_bn, mask_bm)
        return self._full_pass(1)[:, -1]

    def step(self, ids_b1: Any) -> Any:
        """Process one token per row; scores of the next."""
        return self.extend(ids_b1)[:, -1]

    def extend(self, ids_bk: Any) -> Any:
        """Process k tokens per row; scores after each, on the host."""
        ids_bk, count = np.asarray(ids_bk, np.int32), ids_bk.shape[1]
        after = {
            "input_ids": lambda _: ids_bk,
            "inputs_embeds": lambda _: self.passes.loop_ops.xp.to_numpy(self.passes.embed_tokens(ids_bk)),
            "attention_mask": lambda _: np.ones(ids_bk.shape, np.int32),
            "position_ids": lambda x: x[:, -1:] + 1 + np.arange(count, dtype=np.int32),
            "token_type_ids": lambda x: x[:, -1:].repeat(count, axis=1),
            "patch_rows": lambda _: np.full(ids_bk.shape, -1, np.int32),
        }
        for name, value in self.given.items():
            if name in after:
                self.given[name] = np.concatenate((value, after[name](value)), axis=1)
        return self._full_pass(count)

    def reorder(self, index_b: Any) -> None:
        """Row i becomes the former row `index_b[i]`."""
        index_b = np.asarray(index_b)
        self.given = {n: x if n in NO_TOKEN_AXIS else _select_rows(x, index_b) for n, x in self.given.items()}

    def crop(self, length: int) -> None:
        """Remove all tokens after the first `length`."""
        self.given = {n: x if n in NO_TOKEN_AXIS else x[:, :length] for n, x in self.given.items()}

    def _full_pass(self, count: int) -> Any:
        """Scores (rows, count, vocab) of a pass over the whole sequence, after each of the last `count` tokens."""
        decoder, mask = self.decoder, self.given["attention_mask"]
        decoder.check(int(mask.sum(axis=1).max()))
        pad = bucket(mask.shape[1]) - mask.shape[1]
        # All logits if several are needed: their number varies, and would compile again for each.
        options = replace(decoder.options, keep=1 if count == 1 else 0)
        found = self.passes.uncached(_pad_inputs(self.given, pad), options)
        tokens_slice = slice(pad, None)
        if found.attentions is not None:
            self.attentions = self.passes.sliced(found.attentions, (..., tokens_slice, tokens_slice))
        if found.hidden_states is not None:
            self.hidden_states = self.passes.sliced(found.hidden_states, (..., tokens_slice, slice(None)))
        if count == 1:
            return found.scores[:, None]
        return self.passes.loop_ops.xp.to_numpy(found.scores)[:, -count:]
