"""Text generation on JAX: the models' `generate`, and the interface to the framework-free loop."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from monoblock.backends.flax import cache as caches
from monoblock.backends.flax import explicit
from monoblock.backends.flax.arrays import PRNGKeys, on_device
from monoblock.backends.flax.fusing import FUSE_FROM
from monoblock.backends.flax.namespace import XP
from monoblock.backends.flax.network import Network
from monoblock.backends.flax.outputs import FlaxModelOutput, pytree
from monoblock.backends.flax.passes import FlaxPasses
from monoblock.backends.flax.placement import rows_of
from monoblock.backends.flax.processors import without_length
from monoblock.backends.flax.traced import TracedRunner, is_traced
from monoblock.backends.xla import runner
from monoblock.backends.xla.namespace import Namespace
from monoblock.generation import loop
from monoblock.generation.compiled_loop import Program
from monoblock.generation.config import GenerationConfig
from monoblock.generation.mixin import check_assistant
from monoblock.generation.resolve import Unsupported
from monoblock.outputs import ModelOutput
from monoblock.positions import has_positions
from monoblock.spec import ArchSpec


@pytree
class FlaxGenerateOutput(FlaxModelOutput):
    """The output of `generate`, as in transformers' Flax classes: `sequences` (rows, prompt + new), and for beam search
    `scores` (rows,), log-probability / new tokens ** length_penalty."""

    sequences: Any = None
    scores: Any = None


class FlaxGenerationMixin(runner.XlaGenerationMixin):
    """Adds `generate` to causal language models."""

    xp: ClassVar[Namespace] = XP
    module: Network
    params: Any
    spec: ArchSpec
    dtype: Any
    inputs: ClassVar[tuple[str, ...]]

    def generate(
        self,
        inputs: Any = None,
        generation_config: GenerationConfig | None = None,
        prng_key: jax.Array | None = None,
        trace: bool = True,
        params: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts, (batch, tokens) or what a tokenizer returns.

        Returns a FlaxGenerateOutput, whose `sequences` are the ids (batch, prompt + new); with
        `return_dict_in_generate=True` a GenerateDecoderOnlyOutput, with False only the ids.

        Greedy decoding, sampling and beam search run as one compiled program for each bucket of lengths. Calls that
        need the host between tokens (streamers, custom criteria and processors, returned scores), and `trace=False`,
        run a compiled step per token. Sampling uses `prng_key` or `seed`, by default key 0, as JAX has no global
        random number generator: give a new key for each call. Other keywords are those of the PyTorch classes'
        `generate`. `params` replaces the model's parameters. ValueError for unknown or unsupported arguments.

        Greedy decoding and sampling also work under `jit`, `pmap` and `vmap`: prompts, masks, params and keys may be
        traced. The values of ids are not checked then, and all rows have columns for all new tokens, filled with the
        pad token.
        """
        given = (inputs, self.params if params is None else params, prng_key, kwargs)
        run = functools.partial(self._generate, generation_config, trace)
        if (mesh := explicit.explicit(given)) is None:
            return run(*given)
        kind: list[Any] = []

        def fields_of(*given: Any) -> Any:
            result = run(*given)
            kind.append(type(result))
            return dict(result.items()) if isinstance(result, ModelOutput) else result

        found = explicit.run(mesh, fields_of, given, explicit.Layout.of(mesh, (inputs, kwargs)))
        return kind[0](**found) if isinstance(found, dict) else found

    def _generate(
        self,
        generation_config: GenerationConfig | None,
        trace: bool,
        inputs: Any,
        params: Any,
        prng_key: Any,
        arguments: Mapping[str, Any],
    ) -> Any:
        inputs, arguments = self.generate_arguments(inputs, arguments)
        if not trace:
            arguments["disable_compile"] = True
        arguments |= _random_arguments(prng_key, arguments)
        if (processors := arguments.get("logits_processor")) is not None:
            arguments["logits_processor"] = [without_length(processor) for processor in processors]
        if (assistant := arguments.get("assistant_model")) is not None:
            check_assistant(assistant, FlaxGenerationMixin)
            arguments["assistant_model"] = FlaxRunner(assistant, assistant.params)
        ids_only = arguments.get("return_dict_in_generate") is False
        if is_traced(inputs, arguments, params, prng_key):
            traced = TracedRunner(FlaxRunner(self, params), inputs, arguments)
            ids = loop.generate(traced, None, generation_config, **traced.placeholders())
            return ids if ids_only else FlaxGenerateOutput(sequences=ids)
        plain = _ids if ids_only else FlaxGenerateOutput
        prompts = (inputs, arguments.get("input_ids"), arguments.get("inputs_embeds"))
        rows = next((found for x in prompts if (found := rows_of(x)) is not None), None)
        runner = FlaxRunner(self, params, rows)
        result = loop.generate(runner, inputs, generation_config, make_result=plain, **arguments)
        return on_device(result) if ids_only else _to_jax(result)

    def prepare_inputs_for_generation(
        self, input_ids: Any, max_length: int, attention_mask: Any = None
    ) -> dict[str, Any]:
        """Inputs, in addition to the ids, of the prefill (batch, tokens) in a custom decoding loop: an empty cache for
        `max_length` tokens, a mask (batch, max_length), and position ids."""
        batch, count = jnp.shape(input_ids)
        mask = jnp.ones((batch, max_length), jnp.int32)
        if attention_mask is not None:
            given_mask = jnp.asarray(attention_mask, jnp.int32)[:, :count]
            mask = jnp.pad(given_mask, ((0, 0), (0, max_length - count)), constant_values=1)
        given = {
            "past_key_values": caches.init_cache(self.spec, batch, max_length, self.dtype),
            "attention_mask": mask,
        }
        if has_positions(self.spec):
            given["position_ids"] = jnp.maximum(jnp.cumsum(mask[:, :count], axis=-1) - 1, 0)
        return given

    def update_inputs_for_generation(
        self, model_outputs: Any, model_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Inputs of the next token's pass, from the outputs and the inputs of the last one."""
        given = {**model_kwargs, "past_key_values": model_outputs.past_key_values}
        if "position_ids" in given:
            given["position_ids"] = given["position_ids"][:, -1:] + 1
        return given


def _random_arguments(key: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that determine the random number generator."""
    given = {"prng_key": key} | {name: arguments.get(name) for name in ("seed", "generator")}
    if len(named := [name for name, value in given.items() if value is not None]) > 1:
        raise ValueError(f"generate() got {' and '.join(named)}: give one of them")
    if not named:
        return {"seed": 0}
    if named == ["seed"]:
        return {}
    key = given[named[0]]
    return {"generator": key if isinstance(key, PRNGKeys) else PRNGKeys(jnp.asarray(key))}


def _ids(ids_bn: Any, scores_b: Any) -> Any:
    del scores_b
    return ids_bn


def _to_jax(output: Any) -> Any:
    """The output with JAX arrays instead of NumPy arrays."""
    for name, value in output.items():
        setattr(output, name, on_device(value))
    return output


# Options that only these classes refuse.
UNSUPPORTED: Unsupported = {
    "cache_implementation": (
        ("dynamic", "static"),
        "the caches of the JAX classes are 'dynamic' and 'static', in the computation's dtype",
    ),
    "compile_config": (
        (),
        "it holds torch.compile's options; jax.jit compiles the loop over tokens, or with trace=False each step",
    ),
    "synced_gpus": (
        (False,),
        "processes that share parameters make the same calls and end them together",
    ),
}


class FlaxRunner(runner.XlaRunner):
    """The `Model` of `loop.generate` for a model with these parameters."""

    unsupported = UNSUPPORTED

    def __init__(self, model: Any, params: Any, rows: NamedSharding | None = None) -> None:
        super().__init__(model, model.inputs)
        self.params, self.rows = params, rows

    def compiled(self, generation: Any, program: Program) -> Any:
        """Run a call as one compiled program."""
        if program.max_new_tokens >= FUSE_FROM:
            generation.decoder.passes = generation.decoder.passes.fused()
        return super().compiled(generation, program)

    def passes(self, config: GenerationConfig) -> FlaxPasses:
        del config  # `disable_compile` compiles each step ids_only
        return FlaxPasses(self.model.module, self.params, self.rows)
