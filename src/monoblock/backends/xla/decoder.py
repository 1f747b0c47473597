"""A model in the middle of one generation: what the framework-free loop drives, on JAX and on TensorFlow.

Prompts are padded on the left to the length of a bucket and caches have the length of buckets, so that texts of other
lengths use what is compiled already. Masks say where the padding is, and positions do not count it.
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

# What lies in an input's places of padding; 0 in those of others.
FILL = {"patch_rows": -1}
WHOLE = ("image_patches",)  # inputs without an axis of tokens
LONGEST_PIECE = 128  # places that the padding of several tokens at once may take at the end of a cache


def _padded(given: Mapping[str, Any], pad: int) -> dict[str, Any]:
    """The inputs of a pass with `pad` places of padding on the left, and patches up to a bucket's number."""
    made: dict[str, Any] = {}
    for name, value in given.items():
        axis, before, after = (
            (0, 0, bucket(len(value)) - len(value)) if name == "image_patches" else (1, pad, 0)
        )
        widths = [(before, after) if i == axis else (0, 0) for i in range(value.ndim)]
        made[name] = np.pad(value, widths, constant_values=FILL.get(name, 0))
    return made


def _rows(value: Any, index_b: Any) -> Any:
    """The rows of an input; one row stands for all."""
    return value if value.shape[0] == 1 and len(index_b) else value[index_b]


class CachedDecoder:
    """A model in the middle of one generation: its cache, and what later passes are given besides tokens.

    Places count the padding of the bucket, `pad`, too; lengths that the loop speaks of do not.
    """

    def __init__(self, passes: Passes, plan: GenerationPlan, inputs: dict[str, Any]) -> None:
        self.passes, self.plan, self.spec = passes, plan, passes.spec
        learned = self.spec.position(Learned)
        self.max_positions = learned.size - learned.offset if learned else None
        self.inputs = dict(inputs)
        self.past = passes.as_cache(self.inputs.pop("past_key_values", None))
        asked = plan.config if plan.config.return_dict_in_generate else GenerationConfig()
        self.options = ForwardOptions(
            attentions=bool(asked.output_attentions), hidden_states=bool(asked.output_hidden_states), keep=1
        )
        self.attentions = self.hidden_states = None
        self.cache: Any = None
        self.given: dict[str, Any] = {}  # the mask of all places, the last token types
        self.last_positions: Any = None  # given ones of the prompt's last tokens
        self.pad = self.length = self.prompt_length = 0  # places
        self.used = 0  # positions that the longest row has taken

    # ------------------------------------------------------------------ the loop's side

    @property
    def past_key_values(self) -> Any:
        """The cache without the bucket's padding."""
        if self.cache is None or self.cache.max_length is None:
            return None
        return self.passes.shifted_cache(self.cache, self.pad, self.spec, self.cache.max_length)

    def prefill(self, ids_bn: Any, mask_bm: Any) -> Any:
        """Take the prompts, without the part of them that a given cache already holds."""
        given, batch, count = self.prepared(ids_bn, mask_bm)
        seen = 0 if self.past is None else int(self.past.length)
        if 0 < count <= seen:
            raise ValueError(
                f"past_key_values hold {seen} tokens and the prompt has {count}: give the whole prompt, of which the "
                "cache is the beginning"
            )
        chunk = self._chunk(count)
        self.pad = 0 if seen or chunk else bucket(count) - count
        self.length = self.prompt_length = self.pad + count
        given = _padded(given, self.pad)
        slots = bucket(self.length) + self._room(count) + (LONGEST_PIECE if self.plan.rewinds else 0)
        mask = np.ones((batch, slots), np.int32)
        mask[:, : self.length] = given["attention_mask"]
        self._keep(given, mask)
        given["attention_mask"] = mask
        if seen:
            self.cache = self.passes.shifted_cache(self.past, 0, self._windows(), slots)
        elif chunk:
            self.cache = self.passes.empty_cache(batch, self._windows(), slots)
        else:
            options = replace(self.options, fresh=True)
            found = self.passes.prefill(given, options, self._windows(), slots)
            return self._taken(found, slice(self.pad, None))
        return self._continued(given, seen, count, chunk or count)

    def _chunk(self, count: int) -> int | None:
        """How many tokens of the prompt go through the model at a time; None: all."""
        chunk = self.plan.config.prefill_chunk_size
        if chunk is not None and is_dynamic(self.spec.position(Rotary)):
            raise UnsupportedConfig(
                f"GenerationConfig.prefill_chunk_size={chunk}: this model's RoPE scaling goes by the whole "
                "prompt"
            )
        return None if chunk is None or chunk >= count else chunk

    def _room(self, count: int) -> int:
        """Places for new tokens."""
        limit, most = self.plan.config.max_cache_len, self.plan.max_length - 1
        if limit is not None and most > limit:
            raise ValueError(
                f"the static cache holds {limit} tokens and {most} may come: make it with a larger max_cache_len"
            )
        return bucket(self.plan.new_tokens) if limit is None else max(1, limit - count)

    def _continued(self, given: dict[str, Any], seen: int, count: int, chunk: int) -> Any:
        """What comes after `seen` cached tokens, in pieces of `chunk` tokens and then of powers of two: few lengths are
        ever compiled."""
        mask, scores, shown = given.pop("attention_mask"), None, []
        while seen < count:
            left = count - seen
            size = chunk if chunk < left else 1 << (left.bit_length() - 1)
            piece = {n: x if n in WHOLE else x[:, seen : seen + size] for n, x in given.items()}
            self.length = seen + size
            scores = self._more({**piece, "attention_mask": mask}, size, self.options)
            shown.append(self.hidden_states)
            seen += size
        if self.hidden_states is not None:
            self.hidden_states = tuple(self.passes.loop_ops.xp.concat(x) for x in zip(*shown, strict=True))
        return scores

    def step(self, ids_b1: Any) -> Any:
        """Take one token for each row."""
        self.advance(1)
        return self._more(self.next_given() | {"input_ids": np.asarray(ids_b1, np.int32)}, 1, self.options)

    def extend(self, ids_bk: Any) -> Any:
        """Take k tokens for each row; scores after each, on the host."""
        count = ids_bk.shape[1]
        if count == 1:
            return self.passes.loop_ops.xp.to_numpy(self.step(ids_bk))[:, None]
        # Angles that change with the length must not see padding.
        exact = is_dynamic(self.spec.position(Rotary))
        size = count if exact else 1 << (count - 1).bit_length()
        start = self.used
        self.advance(count)
        given = self.next_given(count)
        given["input_ids"] = np.pad(np.asarray(ids_bk, np.int32), ((0, 0), (0, size - count)), mode="edge")
        if not exact:
            given["position_ids"] = self._places_of(given, start, count, size)
        scores = self._more(given, count, replace(self.options, keep=0))
        if size > count:
            self._set_length()
        return self.passes.loop_ops.xp.to_numpy(scores)[:, :count]

    def reorder(self, index_b: Any) -> None:
        """Row i becomes what row index[i] was."""
        index_b = np.asarray(index_b)
        if self.cache is not None:
            self.cache = self.passes.reordered_cache(self.cache, index_b)
        self.given = {name: _rows(value, index_b) for name, value in self.given.items()}
        if self.last_positions is not None:
            self.last_positions = _rows(self.last_positions, index_b)

    def crop(self, length: int) -> None:
        """Forget everything after the first `length` positions."""
        self.used -= self.length - (self.pad + length)
        self.length = self.pad + length
        self._set_length()

    # ------------------------------------------------------------------ what passes are given

    def prepared(self, ids_bn: Any, mask_bm: Any) -> tuple[dict[str, Any], int, int]:
        """The prompt's inputs, checked and on the host, with a mask; its rows and its tokens."""
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

    def _keep(self, given: Mapping[str, Any], mask: Any) -> None:
        """What the passes of new tokens need of the prompt."""
        self.given = {"attention_mask": mask}
        if (types := given.get("token_type_ids")) is not None:
            self.given["token_type_ids"] = types[:, -1:]
        self.used = int(mask[:, : self.length].sum(axis=1).max())
        if (positions := given.get("position_ids")) is not None:
            learned = self.spec.position(Learned)
            self.last_positions = positions[:, -1:]
            self.used = int(positions.max()) + 1 - (learned.offset if learned else 0)

    def next_given(self, count: int = 1) -> dict[str, Any]:
        """What the pass of the last `count` of the tokens so far is given, besides the tokens."""
        given = dict(self.given)
        if "token_type_ids" in given and count > 1:
            given["token_type_ids"] = given["token_type_ids"].repeat(count, axis=1)
        if self.last_positions is not None:
            after = np.arange(self.length - count, self.length, dtype=np.int32) - self.prompt_length + 1
            given["position_ids"] = self.last_positions + after
        return given

    def constants(self) -> dict[str, Any]:
        """What the pass of every new token is given; its position ids are those of the prompt's last tokens."""
        positions = self.last_positions
        return self.given if positions is None else {**self.given, "position_ids": positions}

    @property
    def room(self) -> int:
        """For how many more tokens there are positions."""
        return (1 << 30) if self.max_positions is None else self.max_positions - self.used

    def _places_of(self, given: Mapping[str, Any], start: int, count: int, size: int) -> Any:
        """Positions of `count` tokens of one row, and of padding after them, which repeats the last one: a position
        after it may have no row in the table."""
        learned = self.spec.position(Learned)
        held = given.get("position_ids")
        if held is None:
            held = start + (learned.offset if learned else 0) + np.arange(count, dtype=np.int32)[None]
        return np.pad(held, ((0, 0), (0, size - count)), mode="edge")

    def advance(self, count: int) -> None:
        """Count that many more tokens; ValueError if there is no position for them."""
        self.length, self.used = self.length + count, self.used + count
        self.check(self.used)

    def check(self, used: int) -> None:
        """ValueError if there are not so many positions."""
        if self.max_positions is not None and used > self.max_positions:
            raise ValueError(
                f"the model has {self.max_positions} learned positions, but the sequence, cache included, has {used} "
                "tokens: shorten it"
            )

    def _windows(self) -> ArchSpec:
        """The spec by which the cache is made: one that drops nothing where tokens are taken back or weights shown."""
        spec = self.spec
        whole = self.plan.rewinds or self.options.attentions
        return replace(spec, windows=(None,) * spec.layers) if whole else spec

    # ------------------------------------------------------------------ passes

    def _more(self, given: dict[str, Any], count: int, options: ForwardOptions) -> Any:
        assert self.cache is not None
        options = replace(options, fresh=False)
        return self._taken(self.passes.extend(given, self.cache, options), slice(0, count))

    def _taken(self, found: PassOutput, here: slice) -> Any:
        """Keep what a pass gave, of the tokens that are no padding; its scores."""
        self.cache = found.cache
        if found.attentions is not None:
            seen = slice(self.pad, self.length)
            self.attentions = self.passes.sliced(found.attentions, (..., here, seen))
        if found.hidden_states is not None:
            self.hidden_states = self.passes.sliced(found.hidden_states, (..., here, slice(None)))
        return found.scores

    def _set_length(self) -> None:
        assert self.cache is not None
        self.cache = replace(
            self.cache, length=self.passes.loop_ops.xp.to_framework(np.array(self.length, np.int32))
        )


class UncachedDecoder:
    """The same without a cache: each pass is over everything so far."""

    past_key_values = None

    def __init__(self, passes: Passes, plan: GenerationPlan, inputs: dict[str, Any]) -> None:
        self.decoder, self.passes = CachedDecoder(passes, plan, inputs), passes
        self.attentions = self.hidden_states = None
        self.given: dict[str, Any] = {}

    def prefill(self, ids_bn: Any, mask_bm: Any) -> Any:
        """Take the prompts."""
        self.given, _, _ = self.decoder.prepared(ids_bn, mask_bm)
        return self._passed(1)[:, -1]

    def step(self, ids_b1: Any) -> Any:
        """Take one token for each row."""
        return self.extend(ids_b1)[:, -1]

    def extend(self, ids_bk: Any) -> Any:
        """Take k tokens for each row; scores after each, on the host."""
        ids_bk, count = np.asarray(ids_bk, np.int32), ids_bk.shape[1]
        after = {
            "input_ids": lambda _: ids_bk,
            "inputs_embeds": lambda _: self.passes.loop_ops.xp.to_numpy(self.passes.lookup(ids_bk)),
            "attention_mask": lambda _: np.ones(ids_bk.shape, np.int32),
            "position_ids": lambda x: x[:, -1:] + 1 + np.arange(count, dtype=np.int32),
            "token_type_ids": lambda x: x[:, -1:].repeat(count, axis=1),
            "patch_rows": lambda _: np.full(ids_bk.shape, -1, np.int32),
        }
        for name, value in self.given.items():
            if name in after:
                self.given[name] = np.concatenate((value, after[name](value)), axis=1)
        return self._passed(count)

    def reorder(self, index_b: Any) -> None:
        """Row i becomes what row index[i] was."""
        index_b = np.asarray(index_b)
        self.given = {n: x if n in WHOLE else _rows(x, index_b) for n, x in self.given.items()}

    def crop(self, length: int) -> None:
        """Forget everything after the first `length` positions."""
        self.given = {n: x if n in WHOLE else x[:, :length] for n, x in self.given.items()}

    def _passed(self, count: int) -> Any:
        """Scores (rows, count, vocab) of a pass over everything, after each of the last `count` tokens."""
        decoder, mask = self.decoder, self.given["attention_mask"]
        decoder.check(int(mask.sum(axis=1).max()))
        pad = bucket(mask.shape[1]) - mask.shape[1]
        # All logits where several are asked for: how many changes from pass to pass.
        options = replace(decoder.options, keep=1 if count == 1 else 0)
        found = self.passes.uncached(_padded(self.given, pad), options)
        here = slice(pad, None)
        if found.attentions is not None:
            self.attentions = self.passes.sliced(found.attentions, (..., here, here))
        if found.hidden_states is not None:
            self.hidden_states = self.passes.sliced(found.hidden_states, (..., here, slice(None)))
        if count == 1:
            return found.scores[:, None]
        return self.passes.loop_ops.xp.to_numpy(found.scores)[:, -count:]
