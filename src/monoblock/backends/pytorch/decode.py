"""Generation on PyTorch."""

from __future__ import annotations

from typing import Any


class Generation:
    """Adds `generate` to models that predict the next token."""

    def default_generation_config(self) -> Any:
        return None

    def file_generation_config(self, name: Any, hub: Any) -> Any:
        return None
