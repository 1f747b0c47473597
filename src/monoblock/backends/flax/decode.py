"""Generation on JAX: the `generate` of the models, and what the framework-free loop knows of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.core
import jax.numpy as jnp

from monoblock.backends.flax.arrays import Keys, on_device
from monoblock.backends.flax.namespace import XP
from monoblock.backends.flax.network import Network
from monoblock.backends.flax.outputs import FlaxModelOutput, pytree
from monoblock.backends.flax.steps import Steps
from monoblock.backends.xla import runner
from monoblock.backends.xla.namespace import Namespace
from monoblock.generation import loop
from monoblock.generation.config import GenerationConfig
from monoblock.generation.mixin import check_assistant
from monoblock.generation.resolve import Unsupported


@pytree
class FlaxGenerateOutput(FlaxModelOutput):
    """What `generate` gives, as transformers' Flax classes did: `sequences` (rows, prompt + new), and of beam search
    `scores` (rows,), log-probability / new tokens ** length_penalty."""

    sequences: Any = None
    scores: Any = None


class Generation(runner.Generation):
    """Adds `generate` to the models that predict the next token."""

    xp: ClassVar[Namespace] = XP
    module: Network
    params: Any
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

        Gives a FlaxGenerateOutput, whose `sequences` are the ids (batch, prompt + new); with
        `return_dict_in_generate=True` a GenerateDecoderOnlyOutput, with False the ids alone.

        Greedy decoding, sampling and beam search run as one compiled program for each bucket of lengths; what needs the
        host between tokens (streamers, criteria and processors of one's own, recorded scores), and `trace=False` run a
        compiled step for each token. Draws come from `prng_key`, or from `seed`; without, from key 0, as JAX
        has no global source of random numbers: give a new key for each call. Other keywords are those of the PyTorch
        classes' `generate`. `params` stand in for the model's own. ValueError for what is unknown or not supported.
        """
        inputs, arguments = self.generate_arguments(inputs, kwargs)
        params = self.params if params is None else params
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((inputs, arguments, params))):
            raise TypeError(
                "generate() compiles itself and looks at its prompts: call it outside jit, vmap and pmap; sharded "
                "params= spread it over devices"
            )
        if not trace:
            arguments["disable_compile"] = True
        arguments |= _random(prng_key, arguments)
        if (helper := arguments.get("assistant_model")) is not None:
            check_assistant(helper, Generation)
            arguments["assistant_model"] = Runner(helper, helper.params)
        alone = arguments.get("return_dict_in_generate") is False
        plain = _ids if alone else FlaxGenerateOutput
        result = loop.generate(Runner(self, params), inputs, generation_config, plain=plain, **arguments)
        return on_device(result) if alone else _all_shown(result)


def _random(key: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that say what draws come from."""
    given = {"prng_key": key} | {name: arguments.get(name) for name in ("seed", "generator")}
    if len(named := [name for name, value in given.items() if value is not None]) > 1:
        raise ValueError(f"generate() got {' and '.join(named)}: give one of them")
    if not named:
        return {"seed": 0}
    if named == ["seed"]:
        return {}
    key = given[named[0]]
    return {"generator": key if isinstance(key, Keys) else Keys(jnp.asarray(key))}


def _ids(ids_bn: Any, scores_b: Any) -> Any:
    del scores_b
    return ids_bn


def _all_shown(output: Any) -> Any:
    """The output with JAX's arrays in place of NumPy's."""
    for name, value in output.items():
        setattr(output, name, on_device(value))
    return output


# Refused by these classes for reasons of their own.
UNSUPPORTED: Unsupported = {
    "cache_implementation": (
        ("dynamic", "static"),
        "the caches of the JAX classes are 'dynamic' and 'static', in the computation's type",
    ),
    "compile_config": (
        (),
        "it holds torch.compile's options; jax.jit compiles the loop over tokens, or with trace=False each step",
    ),
    "synced_gpus": (
        (False,),
        "generation across processes is not built; sharded params= spread a call over the devices of one",
    ),
}


class Runner(runner.Runner):
    """What `loop.generate` needs to know of a model with these parameters."""

    unsupported = UNSUPPORTED

    def __init__(self, model: Any, params: Any) -> None:
        super().__init__(model, model.inputs)
        self.params = params

    def passes(self, config: GenerationConfig) -> Steps:
        del config  # `disable_compile` compiles each step alone
        return Steps(self.model.module, self.params)
