"""TFGenerationMixin on TensorFlow: the `generate` of the models, and what the framework-free loop knows of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tensorflow as tf

from monoblock.backends.tf import graph
from monoblock.backends.tf.arrays import Seeds, shown
from monoblock.backends.tf.namespace import XP
from monoblock.backends.tf.outputs import TFModelOutput
from monoblock.backends.tf.passes import TFPasses, passes_of
from monoblock.backends.tf.processors import of_two
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
    """What greedy decoding gives with `return_dict_in_generate=True`."""


@dataclass
class TFSampleDecoderOnlyOutput(TFModelOutput, GenerateDecoderOnlyOutput):
    """What sampling gives with `return_dict_in_generate=True`."""


@dataclass
class TFBeamSearchDecoderOnlyOutput(TFModelOutput, GenerateBeamDecoderOnlyOutput):
    """What beam search gives with `return_dict_in_generate=True`."""


@dataclass
class TFBeamSampleDecoderOnlyOutput(TFModelOutput, GenerateBeamDecoderOnlyOutput):
    """What sampled beam search gives with `return_dict_in_generate=True`."""


# By the framework-free output, and whether tokens are drawn.
OUTPUTS: dict[tuple[type, bool], type[TFModelOutput]] = {
    (GenerateDecoderOnlyOutput, False): TFGreedySearchDecoderOnlyOutput,
    (GenerateDecoderOnlyOutput, True): TFSampleDecoderOnlyOutput,
    (GenerateBeamDecoderOnlyOutput, False): TFBeamSearchDecoderOnlyOutput,
    (GenerateBeamDecoderOnlyOutput, True): TFBeamSampleDecoderOnlyOutput,
}


class TFGenerationMixin(runner.XlaGenerationMixin):
    """Adds `generate` to the models that predict the next token."""

    xp: ClassVar[Namespace] = XP
    row: ModelClass

    def can_generate(self) -> bool:
        """Whether the class predicts the next token."""
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

        Gives ids (batch, prompt + new), or with `return_dict_in_generate=True` a TFGreedySearchDecoderOnlyOutput
        (TFSample..., TFBeamSearch..., TFBeamSample...).

        Greedy decoding, sampling and beam search run as one graph for each bucket of lengths, which XLA compiles unless
        `jit_compile=False`; what needs the host between tokens (streamers, criteria and processors of one's own,
        recorded scores) runs a graph for each token. `disable_compile=True`: all of it runs eagerly, as
        with `tf.config.run_functions_eagerly(True)`. Inside a `tf.function` the prompt and all new tokens become part
        of its graph (see `graph.py`).

        Draws come from `seed` (an integer, or two), or `generator` (a `tf.random.Generator`), or TensorFlow's global
        source. Other keywords are those of the PyTorch classes' `generate`. ValueError for what is unknown or not
        supported.
        """
        inputs, arguments = self.generate_arguments(inputs, kwargs)
        if logits_processor is not None:
            arguments["logits_processor"] = [of_two(own) for own in logits_processor]
        arguments |= _random(seed, arguments.pop("generator", None))
        if (helper := arguments.get("assistant_model")) is not None:
            check_assistant(helper, TFGenerationMixin)
            arguments["assistant_model"] = TFRunner(helper, jit_compile)
        if tf.executing_eagerly():
            eager = TFRunner(self, jit_compile)
            return eager.shown(loop.generate(eager, inputs, generation_config, **arguments))
        traced = GraphRunner(self, inputs, arguments)
        return traced.shown(loop.generate(traced, None, generation_config, **traced.stand_ins()))


def _random(seed: Any, generator: Any) -> dict[str, Any]:
    """The arguments that say what draws come from."""
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
    raise ValueError(f"seed must be a whole number or two of them, got {seed!r}")


# Refused by these classes for reasons of their own.
UNSUPPORTED: Unsupported = {
    "cache_implementation": (
        ("dynamic", "static"),
        "the caches of the TF classes are 'dynamic' and 'static', in the computation's type",
    ),
    "compile_config": (
        (),
        "it holds torch.compile's options; jit_compile= and disable_compile= say what TensorFlow compiles",
    ),
    "synced_gpus": ((False,), "generation across processes is not implemented"),
}


class TFRunner(runner.XlaRunner):
    """What `loop.generate` needs to know of a model."""

    unsupported = UNSUPPORTED

    def __init__(self, model: Any, jit_compile: bool) -> None:
        super().__init__(model, (*model.arguments, *model.extra))
        self.jit_compile, self.samples = jit_compile, False

    def passes(self, config: GenerationConfig) -> TFPasses:
        traced = not config.disable_compile
        self.samples = bool(config.do_sample)
        return passes_of(self.model, compiled=self.jit_compile and traced, traced=traced)

    def shown(self, found: Any) -> Any:
        """A result with TensorFlow's arrays in place of NumPy's, and its class."""
        if (kind := OUTPUTS.get((type(found), self.samples))) is None:
            return shown(found)
        return kind(**{name: tf.nest.map_structure(shown, value) for name, value in found.items()})


class GraphRunner(TFRunner):
    """The same inside a `tf.function`, where the prompts have shapes and no values yet."""

    def __init__(self, model: Any, inputs: Any, arguments: Mapping[str, Any]) -> None:
        super().__init__(model, jit_compile=False)
        self.arguments = dict(arguments)
        self.prompt = graph.prompt(inputs, self.arguments)

    def stand_ins(self) -> dict[str, Any]:
        """The arguments of the call, with prompts of the same shape that have values."""
        return self.arguments | self.prompt.stand_ins()

    def compiled(self, generation: Any, program: Program) -> Any:
        """The call as a part of the graph."""
        return graph.run(self.prompt, generation, program)

    def decoder(self, plan: loop.GenerationPlan, inputs: dict[str, Any]) -> Any:
        """A decoder whose tokens `compiled` makes."""
        self.samples = bool(plan.config.do_sample)
        return graph.GraphDecoder(self.model, plan, inputs, self.max_positions)
