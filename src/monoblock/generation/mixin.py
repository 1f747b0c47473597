"""What the models of all frameworks share of `generate`: which config they have, and how a call's arguments come."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from monoblock.checkpoint.hub import find_file
from monoblock.checkpoint.options import HubOptions
from monoblock.generation.config import GENERATION_CONFIG_NAME, GenerationConfig
from monoblock.spec import ArchSpec, Learned


class GenerationMixin:
    """The part of `generate` that has no framework."""

    config: Any
    spec: ArchSpec
    generation_config: GenerationConfig | None

    def can_generate(self) -> bool:
        """Whether the model predicts the next token."""
        raise NotImplementedError

    @property
    def max_positions(self) -> int | None:
        """The length of the table of positions; None: there is none, and texts may have any length."""
        learned = self.spec.position(Learned)
        return learned.size - learned.offset if learned else None

    def room(self, tokens: int) -> int | None:
        """How many new tokens fit after a prompt of so many; None: any number."""
        positions = self.max_positions
        return None if positions is None else max(0, positions - tokens + 1)

    def default_generation_config(self) -> GenerationConfig:
        """What the model's config says about generation."""
        return GenerationConfig.from_model_config(self.config)

    @staticmethod
    def file_generation_config(name: str | Path, hub: HubOptions) -> GenerationConfig | None:
        """The checkpoint's generation_config.json, if there is one."""
        path = find_file(name, GENERATION_CONFIG_NAME, hub, required=False)
        return GenerationConfig.from_json_file(path) if path else None

    def generate_arguments(self, inputs: Any, arguments: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The prompts and the other arguments of `generate`, of which a tokenizer's output holds several.

        TypeError for a model that predicts no next token, or an argument that is given twice.
        """
        if not self.can_generate():
            raise TypeError(
                f"{type(self).__name__} predicts no next token: generate with a ...ForCausalLM class"
            )
        if not isinstance(inputs, Mapping):
            return inputs, dict(arguments)
        given = cast(Mapping[str, Any], inputs)
        if twice := given.keys() & arguments.keys():
            raise TypeError(f"generate got {', '.join(sorted(twice))} twice")
        return None, {**given, **arguments}


def check_assistant(helper: Any, kind: type[GenerationMixin]) -> None:
    """TypeError unless `helper` is a model of that kind that generates."""
    if not (isinstance(helper, kind) and helper.can_generate()):
        raise TypeError(
            f"assistant_model must be one of monoblock's ...ForCausalLM models, got {type(helper).__name__}"
        )
