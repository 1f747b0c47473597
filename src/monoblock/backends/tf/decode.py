"""Text generation on TensorFlow: the models' `generate`, and the interface to the framework-free loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tensorflow as tf

from monoblock.backends.tf import graph
from monoblock.backends.tf.arrays import Seeds, to_tensor
from monoblock.backends.tf.namespace import XP
from monoblock.backends.tf.outputs import TFModelOutput
from monoblock.backends.tf.passes import TFPasses, passes_of
from monoblock.backends.tf.processors import without_length
from monoblock.backends.xla import runner
from monoblock.backends.xla.namespace import Namespace
from monoblock.generation import loop
from monoblock.generation.compiled_loop import Program
from monoblock.generation.config import GenerationConfig
from monoblock.generation.mixin import check_assistant
from monoblock.generation.outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from monoblock.generation.resolve import Unsupported

if TYPE_CHECKING:
    from monoblock.families import ModelClass


@dataclass
class TFGreedySearchDecoderOnlyOutput(TFModelOutput, GenerateDecoderOnlyOutput):
    """The output of greedy decoding with `return_dict_in_generate=True`."""


@dataclass
class TFSampleDecoderOnlyOutput(TFModelOutput, GenerateDecoderOnlyOutput):
    """The output of sampling with `return_dict_in_generate=True`."""


@dataclass
class TFBeamSearchDecoderOnlyOutput(TFModelOutput, GenerateBeamDecoderOnlyOutput):
    """The output of beam search with `return_dict_in_generate=True`."""


@dataclass
class TFBeamSampleDecoderOnlyOutput(TFModelOutput, GenerateBeamDecoderOnlyOutput):
    """The output of beam-search sampling with `return_dict_in_generate=True`."""


# (the framework-free output class, do_sample) -> the output class.
OUTPUTS: dict[tuple[type, bool], type[TFModelOutput]] = {
    (GenerateDecoderOnlyOutput, False): TFGreedySearchDecoderOnlyOutput,
    (GenerateDecoderOnlyOutput, True): TFSampleDecoderOnlyOutput,
    (GenerateBeamDecoderOnlyOutput, False): TFBeamSearchDecoderOnlyOutput,
    (GenerateBeamDecoderOnlyOutput, True): TFBeamSampleDecoderOnlyOutput,
}


class TFGenerationMixin(runner.XlaGenerationMixin):
    """Adds `generate` to causal language models."""

    xp: ClassVar[Namespace] = XP
    row: ModelClass

    def can_generate(self) -> bool:
        """Whether the class is a causal language model."""
        return self.row.head == "causal"

    @tf.autograph.experimental.do_not_convert
    def generate(
        self,
        inputs: Any = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        seed: Any = None,
        jit_compile: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts, (batch, tokens) or what a tokenizer returns.

        Returns ids (batch, prompt + new), or with `return_dict_in_generate=True` a TFGreedySearchDecoderOnlyOutput
        (TFSample..., TFBeamSearch..., TFBeamSample...).

        Greedy decoding, sampling and beam search run as one graph for each bucket of lengths, which XLA compiles unless
        `jit_compile=False`. Calls that need the host between tokens (streamers, custom criteria and processors,
        returned scores) run a graph per token. `disable_compile=True` runs everything eagerly, as does
        `tf.config.run_functions_eagerly(True)`. Inside a `tf.function`, the whole call becomes part of its graph (see
        `graph.py`).

        Sampling uses `seed` (an integer, or two), `generator` (a `tf.random.Generator`), or TensorFlow's global
        generator. Other keywords are those of the PyTorch classes' `generate`. ValueError for unknown or unsupported
        arguments.
        """
        inputs, arguments = self.generate_arguments(inputs, kwargs)
        if logits_processor is not None:
            arguments["logits_processor"] = [without_length(processor) for processor in logits_processor]
        arguments |= _random_arguments(seed, arguments.pop("generator", None))
        if (assistant := arguments.get("assistant_model")) is not None:
            check_assistant(assistant, TFGenerationMixin)
            arguments["assistant_model"] = TFRunner(assistant, jit_compile)
        if tf.executing_eagerly():
            eager = TFRunner(self, jit_compile)
            return eager.to_output(loop.generate(eager, inputs, generation_config, **arguments))
        traced = GraphRunner(self, inputs, arguments)
        return traced.to_output(loop.generate(traced, None, generation_config, **traced.placeholders()))


def _random_arguments(seed: Any, generator: Any) -> dict[str, Any]:
    """The arguments that determine the random number generator."""
    if seed is not None and generator is not None:
        raise ValueError("generate() got both seed and generator: pass one")
    if isinstance(generator, tf.random.Generator):
        return {"generator": Seeds(generator.make_seeds(1)[:, 0])}
    if generator is not None and not isinstance(generator, Seeds):
        raise TypeError(f"generator must be a tf.random.Generator, got {type(generator).__name__}")
    if seed is None or isinstance(seed, int):
        return {"generator": generator} if seed is None else {"seed": seed}
    if np.shape(seed) == (2,):
        return {"generator": Seeds(seed)}
    raise ValueError(f"seed must be one or two integers, got {seed!r}")


# Options that only these classes refuse.
UNSUPPORTED: Unsupported = {
    "cache_implementation": (
        ("dynamic", "static"),
        "the caches of the TF classes are 'dynamic' and 'static', in the computation's dtype",
    ),
    "compile_config": (
        (),
        "it holds torch.compile's options; jit_compile= and disable_compile= control compilation in TensorFlow",
    ),
    "synced_gpus": ((False,), "generation across processes is not implemented"),
}


class TFRunner(runner.XlaRunner):
    """The `Model` of `loop.generate` for a model."""

    unsupported = UNSUPPORTED

    def __init__(self, model: Any, jit_compile: bool) -> None:
        super().__init__(model, (*model.arguments, *model.extra))
        self.jit_compile, self.samples = jit_compile, False

    def passes(self, config: GenerationConfig) -> TFPasses:
        traced = not config.disable_compile
        self.samples = bool(config.do_sample)
        return passes_of(self.model, compiled=self.jit_compile and traced, traced=traced)

    def to_output(self, found: Any) -> Any:
        """A result with tensors instead of NumPy arrays, in its TF class."""
        if (kind := OUTPUTS.get((type(found), self.samples))) is None:
            return to_tensor(found)
        return kind(**{name: tf.nest.map_structure(to_tensor, value) for name, value in found.items()})


class GraphRunner(TFRunner):
    """A model inside a `tf.function`, where prompts have shapes but no values."""

    def __init__(self, model: Any, inputs: Any, arguments: Mapping[str, Any]) -> None:
        super().__init__(model, jit_compile=False)
        self.arguments = dict(arguments)
        self.prompt = graph.prompt(inputs, self.arguments)

    def placeholders(self) -> dict[str, Any]:
        """The call's arguments with placeholder prompts of the same shape."""
        return self.arguments | self.prompt.placeholders()

    def compiled(self, generation: Any, program: Program) -> Any:
        """The call as part of the graph."""
        return graph.run(self.prompt, generation, program)

    def decoder(self, plan: loop.GenerationPlan, inputs: dict[str, Any]) -> Any:
        """The decoder of a call, for which `compiled` generates the tokens."""
        self.samples = bool(plan.config.do_sample)
        return graph.GraphDecoder(self.model, plan, inputs, self.max_positions)
