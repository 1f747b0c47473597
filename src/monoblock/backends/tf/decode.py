"""What a model says about generation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from monoblock.checkpoint.hub import find_file
from monoblock.checkpoint.options import HubOptions
from monoblock.generation.config import GENERATION_CONFIG_NAME, GenerationConfig

if TYPE_CHECKING:
    from monoblock.families import ModelClass


class Generation:
    """What concerns the models that predict the next token."""

    row: ModelClass
    config: Any
    generation_config: GenerationConfig | None

    def can_generate(self) -> bool:
        """Whether the class predicts the next token."""
        return self.row.head == "causal"

    def default_generation_config(self) -> GenerationConfig:
        """What the model's config says about generation."""
        return GenerationConfig.from_model_config(self.config)

    def file_generation_config(self, name: str | Path, hub: HubOptions) -> GenerationConfig | None:
        """The checkpoint's generation_config.json; without one, what config.json says."""
        if not self.can_generate():
            return None
        path = find_file(name, GENERATION_CONFIG_NAME, hub, required=False)
        return GenerationConfig.from_json_file(path) if path else self.default_generation_config()
