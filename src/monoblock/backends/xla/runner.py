"""The interface of JAX and TensorFlow models to the generation loop (`generation.loop`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import numpy as np

from monoblock.backends.xla import compiled, compiled_beams
from monoblock.backends.xla.decoder import CachedDecoder, UncachedDecoder
from monoblock.backends.xla.namespace import Namespace
from monoblock.backends.xla.passes import Passes
from monoblock.generation.compiled_loop import Program
from monoblock.generation.config import GenerationConfig
from monoblock.generation.decoder import GenerationPlan
from monoblock.generation.limits import check_memory
from monoblock.generation.mixin import GenerationMixin
from monoblock.generation.resolve import Unsupported
from monoblock.generation.transitions import transition_scores

INPUTS = frozenset({"past_key_values", "position_ids", "inputs_embeds"})
# Inputs of some models only; new tokens get the last token type.
OPTIONAL_INPUTS = frozenset({"token_type_ids", "image_patches", "image_patches_indices", "pixel_values"})


class XlaGenerationMixin(GenerationMixin):
    """Methods related to `generate` that both frameworks' models share; `xp` is the framework's namespace."""

    xp: ClassVar[Namespace]

    def compute_transition_scores(
        self,
        sequences: Any,
        scores: Sequence[Any],
        beam_indices: Any = None,
        normalize_logits: bool = False,
    ) -> Any:
        """(rows, new tokens): the scores of the generated tokens, from an output of `generate(...,
        output_scores=True)`.

        Scores of a beam search need its `beam_indices`. `normalize_logits`: log-probabilities instead of raw scores.
        """
        rows = None if beam_indices is None else np.asarray(beam_indices)
        return self.xp.to_framework(
            transition_scores(self.xp, np.asarray(sequences), scores, rows, normalize_logits)
        )


class XlaRunner:
    """The `Model` of `loop.generate` for a model; `inputs`: the names of its forward arguments."""

    unsupported: Unsupported

    def __init__(self, model: Any, inputs: Collection[str]) -> None:
        self.model, self.ops = model, model.xp
        self.input_names = INPUTS | OPTIONAL_INPUTS.intersection(inputs)
        self.generation_config: GenerationConfig | None = model.generation_config
        self.max_positions: int | None = model.max_positions
        self.vocab: int | None = model.spec.vocab

    def compiled(self, generation: Any, program: Program) -> Any:
        """Run a call as one compiled program."""
        return (compiled if program.search is None else compiled_beams).run(generation, program)

    def passes(self, config: GenerationConfig) -> Passes:
        """The forward passes of a call."""
        raise NotImplementedError

    def decoder(self, plan: GenerationPlan, inputs: dict[str, Any]) -> Any:
        """A decoder for one call."""
        cached = plan.config.use_cache or "past_key_values" in inputs
        if cached:  # 2 bytes per number at least, on devices that may have 4x the host's memory
            check_memory(self.model.spec, plan.rows, plan.max_length, 2, times=4)
        return (CachedDecoder if cached else UncachedDecoder)(self.passes(plan.config), plan, inputs)
