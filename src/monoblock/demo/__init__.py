"""The embedded demo: a tiny MPT that completes Python code, trained by this project's own script; see docs/demo.md."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The folder of the model, as `from_pretrained` takes it."""
    return Path(__file__).parent
