"""The forward passes of generation, traced once per bucket of lengths, and operations on caches between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import tensorflow as tf

from monoblock.backends.tf.arrays import to_tensor
from monoblock.backends.tf.binding import to_tensors
from monoblock.backends.tf.cache import Cache, from_tuples, init_cache
from monoblock.backends.tf.checked import check_inputs
from monoblock.backends.tf.compiled import LOOP_OPS
from monoblock.backends.tf.ops import Tensor, size
from monoblock.backends.xla import cache as caches
from monoblock.backends.xla import compiled, compiled_beams
from monoblock.backends.xla.compiled import LoopOps, LoopStart
from monoblock.backends.xla.inputs import ForwardOptions
from monoblock.backends.xla.passes import Given, PassOutput, pass_output
from monoblock.generation.compiled_loop import Program
from monoblock.spec import ArchSpec


def forward_pass(model: Any, given: Given, cache: Cache | None, options: ForwardOptions) -> PassOutput:
    """One forward pass, to be traced or run eagerly."""
    out = model.network(given, cache, options)
    return pass_output(out, tf.cast(out["logits"], tf.float32), options)


def compiled_loop(model: Any, program: Program, start: LoopStart) -> Any:
    """A whole loop over tokens, to be traced."""
    run = compiled.token_loop if program.search is None else compiled_beams.beam_loop
    return run(LOOP_OPS, partial(forward_pass, model), program, start)


class TFPasses:
    """`xla.passes.Passes` for a model: each pass is a `tf.function` of tensors; see the protocol for the methods.

    `compiled`: XLA compiles them. `traced=False`: they run eagerly. Each combination of static options (windows, cache
    length) and shapes has a separate function; shapes are those of buckets. TensorFlow's shape relaxation would make
    lengths dynamic, for which XLA's kernels are slower.
    """

    loop_ops: LoopOps = LOOP_OPS

    def __init__(self, model: Any, *, compiled: bool, traced: bool = True) -> None:
        self.model, self.compiled, self.traced = model, compiled and traced, traced
        self.spec: ArchSpec = model.spec
        self.functions: dict[Any, Any] = {}

    def run(self, key: Any, function: Callable[..., Any], *tensors: Any) -> Any:
        """`function(*tensors)`, traced at the first call with this key and these shapes."""
        tensors = tf.nest.map_structure(to_tensor, tensors)
        if not self.traced:
            return function(*tensors)
        # A separate function for each: TensorFlow warns about functions that are retraced often.
        key = (key, *(tuple(x.shape) for x in tf.nest.flatten(tensors)))
        if key not in self.functions:
            self.functions[key] = tf.function(function, jit_compile=self.compiled or None, autograph=False)
        return self.functions[key](*tensors)

    @property
    def in_place(self) -> bool:
        """Whether only programs compiled by XLA use the caches."""
        return self.compiled and not tf.config.functions_run_eagerly()

    def check_inputs(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: to_tensors(name, value) for name, value in arguments.items()}
        return check_inputs(self.spec, self.model.head_spec, given, None, False, documents=False).given

    def as_cache(self, given: Any) -> Cache | None:
        converted = given is None or isinstance(given, Cache)
        return given if converted else from_tuples(to_tensors("past_key_values", given))

    def prefill(self, given: Given, options: ForwardOptions, spec: ArchSpec, max_length: int) -> PassOutput:
        in_place = self.in_place

        def run(given: Given) -> PassOutput:
            rows, dtype = size(given["attention_mask"], 0), self.model.compute_dtype
            cache = init_cache(spec, rows, max_length, dtype, compiled=in_place)
            return forward_pass(self.model, given, cache, options)

        return self.run(("prefill", options, spec, max_length, in_place), run, given)

    def extend(self, given: Given, cache: Cache, options: ForwardOptions) -> PassOutput:
        cache = replace(cache, compiled=self.in_place)
        return self.run(
            ("extend", options),
            lambda given, cache: forward_pass(self.model, given, cache, options),
            given,
            cache,
        )

    def uncached(self, given: Given, options: ForwardOptions) -> PassOutput:
        return self.run(
            ("uncached", options), lambda given: forward_pass(self.model, given, None, options), given
        )

    def embed_tokens(self, ids: Any) -> Tensor:
        return self.run("embed_tokens", self.model.main.embed_tokens, ids)

    def empty_cache(self, rows: int, spec: ArchSpec, max_length: int) -> Cache:
        return init_cache(spec, rows, max_length, self.model.compute_dtype)

    def shifted_cache(self, cache: Cache, shift: int, spec: ArchSpec, max_length: int) -> Cache:
        empty = init_cache(spec, size(cache.keys[0], 0), max_length, cache.keys[0].dtype)
        return caches.copy_shifted(cache, shift, empty)

    def reordered_cache(self, cache: Cache, index_b: Any) -> Cache:
        return cache.reorder(index_b)

    def sliced(self, arrays: Sequence[Tensor], index: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return tuple(array[index] for array in arrays)

    def run_loop(self, program: Program, start: LoopStart) -> Any:
        start = start._replace(cache=replace(start.cache, compiled=self.in_place))
        return self.run(("loop", program), partial(compiled_loop, self.model, program), start)

    def traces(self) -> int:
        """The total number of traces."""
        return sum(function.experimental_get_tracing_count() for function in self.functions.values())


def passes_of(model: Any, *, compiled: bool, traced: bool = True) -> TFPasses:
    """The model's passes, cached on the model; created again if its variables have been replaced."""
    held = vars(model).setdefault("_generation_passes", {})
    variables = tuple(id(variable) for variable in model.variables)
    if held.get("variables") != variables:
        held.clear()
        held["variables"] = variables
    key = (compiled, traced)
    if key not in held:
        held[key] = TFPasses(model, compiled=compiled, traced=traced)
    return held[key]
