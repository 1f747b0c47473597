"""What `loop.generate` knows of a model of either framework, and the errors that both have."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from monoblock.backends.xla import compiled, compiled_beams
from monoblock.backends.xla.decoder import Decoder, Rereader
from monoblock.backends.xla.passes import Passes
from monoblock.generation.arrays import ArrayOps
from monoblock.generation.config import GenerationConfig
from monoblock.generation.decoder import Plan
from monoblock.generation.programs import Program
from monoblock.generation.resolve import Unsupported
from monoblock.spec import Learned

INPUTS = frozenset({"past_key_values", "position_ids", "inputs_embeds"})
# Inputs that only some models take; new tokens get the last token type.
MORE = frozenset({"token_type_ids", "image_patches", "image_patches_indices", "pixel_values"})


class Runner:
    """A model as `loop.generate` sees it. `inputs`: the names of the inputs that its call takes."""

    ops: ArrayOps
    unsupported: ClassVar[Unsupported]

    def __init__(self, model: Any, ops: ArrayOps, inputs: Collection[str]) -> None:
        self.model, self.ops = model, ops
        self.input_names = INPUTS | MORE.intersection(inputs)
        self.generation_config: GenerationConfig | None = model.generation_config
        learned = model.spec.position(Learned)
        self.max_positions = learned.size - learned.offset if learned else None

    def compiled(self, generation: Any, program: Program) -> Any:
        """Run a call as one program."""
        return (compiled if program.width is None else compiled_beams).run(generation, program)

    def passes(self, config: GenerationConfig) -> Passes:
        """The passes of a call."""
        raise NotImplementedError

    def decoder(self, plan: Plan, inputs: dict[str, Any]) -> Any:
        """A decoder for one call."""
        cached = plan.config.use_cache or "past_key_values" in inputs
        return (Decoder if cached else Rereader)(self.passes(plan.config), plan, inputs)
