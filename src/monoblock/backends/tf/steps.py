"""The forward passes of generation, traced once for each bucket of lengths, and what is done to caches between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import tensorflow as tf

from monoblock.backends.tf.arrays import shown
from monoblock.backends.tf.cache import Cache, Layer, init_cache
from monoblock.backends.tf.inputs import Wanted
from monoblock.backends.tf.ops import Tensor, size
from monoblock.spec import ArchSpec

Given = Mapping[str, Tensor]


class Pass(NamedTuple):
    """What one pass gives: scores in float32, (b, vocab) of the last token or (b, k, vocab), and the rest."""

    scores: Tensor
    cache: Cache | None
    attentions: tuple[Tensor, ...] | None
    hidden_states: tuple[Tensor, ...] | None


def passed(model: Any, given: Given, cache: Cache | None, wanted: Wanted) -> Pass:
    """One pass, to be traced into something or run as it is."""
    out = model.network(given, cache, wanted)
    scores = tf.cast(out["logits"], tf.float32)
    last = scores[:, -1] if wanted.keep == 1 else scores
    return Pass(last, *(out.get(name) for name in ("past_key_values", "attentions", "hidden_states")))


class Steps:
    """A model's passes, each a `tf.function` of tensors alone.

    `compiled`: XLA compiles them. `traced=False`: they run eagerly. What decides the code besides shapes (what is
    wanted, windows, room) makes a function of its own; a new shape traces anew, and shapes are those of buckets.
    TensorFlow's own relaxing of shapes would leave lengths open, and open lengths take slower kernels.
    """

    def __init__(self, model: Any, *, compiled: bool, traced: bool = True) -> None:
        self.model, self.compiled, self.traced = model, compiled and traced, traced
        self.functions: dict[Any, Any] = {}

    def run(self, key: Any, function: Callable[..., Any], *tensors: Any) -> Any:
        """`function(*tensors)`, which is traced when `key` is met for the first time with these shapes."""
        tensors = tf.nest.map_structure(shown, tensors)
        if not self.traced:
            return function(*tensors)
        # A function of its own for each: TensorFlow warns of one that is traced often.
        key = (key, *(tuple(x.shape) for x in tf.nest.flatten(tensors)))
        if key not in self.functions:
            self.functions[key] = tf.function(function, jit_compile=self.compiled or None, autograph=False)
        return self.functions[key](*tensors)

    @property
    def in_place(self) -> bool:
        """Whether caches are only touched by what XLA compiles."""
        return self.compiled and not tf.config.functions_run_eagerly()

    def anew(self, given: Given, wanted: Wanted) -> Pass:
        """A pass over whole texts, without a cache."""
        return self.run(("anew", wanted), lambda given: passed(self.model, given, None, wanted), given)

    def first(self, given: Given, wanted: Wanted, spec: ArchSpec, max_length: int) -> Pass:
        """A pass over the prompts, into a new cache of `max_length` places with the windows of `spec`."""
        in_place = self.in_place

        def run(given: Given) -> Pass:
            rows, dtype = size(given["attention_mask"], 0), self.model.compute_dtype
            cache = init_cache(spec, rows, max_length, dtype, compiled=in_place)
            return passed(self.model, given, cache, wanted)

        return self.run(("first", wanted, spec, max_length, in_place), run, given)

    def more(self, given: Given, cache: Cache, wanted: Wanted) -> Pass:
        """A pass over the next tokens."""
        cache = replace(cache, compiled=self.in_place)
        return self.run(
            ("more", wanted), lambda given, cache: passed(self.model, given, cache, wanted), given, cache
        )

    def lookup(self, input_ids: Any) -> Tensor:
        """Token ids as vectors."""
        return self.run("lookup", self.model.main.lookup, input_ids)

    def traces(self) -> int:
        """How often anything was traced."""
        return sum(function.experimental_get_tracing_count() for function in self.functions.values())


def steps_of(model: Any, *, compiled: bool, traced: bool = True) -> Steps:
    """The model's passes of that kind, kept with it; made anew when its variables are others."""
    held = vars(model).setdefault("_generation_steps", {})
    variables = tuple(id(variable) for variable in model.variables)
    if held.get("variables") != variables:
        held.clear()
        held["variables"] = variables
    key = (compiled, traced)
    if key not in held:
        held[key] = Steps(model, compiled=compiled, traced=traced)
    return held[key]


def moved(cache: Cache, shift: int, spec: ArchSpec, max_length: int) -> Cache:
    """A copy of the cache for `max_length` places and the windows of `spec`, without its first `shift` tokens."""
    empty = init_cache(spec, size(cache.keys[0], 0), max_length, cache.keys[0].dtype)
    layers = [_moved(cache.layer(i), cache.length, shift, empty.layer(i)) for i in range(len(cache.keys))]
    keys, values = tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers)
    return replace(empty, keys=keys, values=values, length=cache.length - shift)


def _moved(layer: Layer, length: Tensor, shift: int, into: Layer) -> Layer:
    places = into.places(length - shift)
    known = (places >= 0) & (places + shift >= length - layer.slots)
    slots = tf.where(known, (places + shift) % layer.slots, 0)

    def put(held: Tensor) -> Tensor:
        return tf.where(known[:, None], tf.gather(held, slots, axis=2), tf.zeros((), held.dtype))

    return replace(into, keys=put(layer.keys), values=put(layer.values))
