"""The framework-independent base of models that generate: their configs and the arguments of `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from monoblock.checkpoint.hub import find_file, find_gguf, in_gguf
from monoblock.checkpoint.options import HubOptions
from monoblock.generation.config import GENERATION_CONFIG_NAME, GenerationConfig
from monoblock.spec import ArchSpec, Learned


class GenerationMixin:
    """The methods of models with `generate` that do not depend on the framework."""

    config: Any
    spec: ArchSpec
    generation_config: GenerationConfig | None

    def can_generate(self) -> bool:
        """Whether the model predicts the next token."""
        raise NotImplementedError

    @property
    def max_positions(self) -> int | None:
        """The size of the table of learned positions; None without one, for inputs of any length."""
        learned = self.spec.position(Learned)
        return learned.size - learned.offset if learned else None

    def room(self, tokens: int) -> int | None:
        """How many new tokens fit after a prompt of `tokens`; None: any number."""
        positions = self.max_positions
        return None if positions is None else max(0, positions - tokens + 1)

    def default_generation_config(self) -> GenerationConfig:
        """The generation fields of the model's config."""
        return GenerationConfig.from_model_config(self.config)

    @staticmethod
    def file_generation_config(name: str | Path, hub: HubOptions) -> GenerationConfig | None:
        """The checkpoint's generation_config.json, if there is one; for a GGUF file, what its metadata say."""
        if in_gguf(name, hub):
            from monoblock.checkpoint.gguf import config, files  # import NumPy

            return GenerationConfig.from_dict(config.generation_config(files.opened(find_gguf(name, hub))))
        path = find_file(name, GENERATION_CONFIG_NAME, hub, required=False)
        return GenerationConfig.from_json_file(path) if path else None

    def generate_arguments(self, inputs: Any, arguments: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The prompts and the other arguments of `generate`; `inputs` may be a tokenizer's output with several of them.

        TypeError for a model without a language-model head, or an argument that is given twice.
        """
        if not self.can_generate():
            raise TypeError(
                f"{type(self).__name__} has no language-model head: generate with a ...ForCausalLM class"
            )
        if not isinstance(inputs, Mapping):
            return inputs, dict(arguments)
        given = cast(Mapping[str, Any], inputs)
        if twice := given.keys() & arguments.keys():
            raise TypeError(f"generate got {', '.join(sorted(twice))} twice")
        return None, {**given, **arguments}


def check_assistant(helper: Any, kind: type[GenerationMixin]) -> None:
    """TypeError unless `helper` is a model of that class that generates."""
    if not (isinstance(helper, kind) and helper.can_generate()):
        raise TypeError(
            f"assistant_model must be one of monoblock's ...ForCausalLM models, got {type(helper).__name__}"
        )
