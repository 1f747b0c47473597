"""The embedded demo: a tiny MPT, trained from scratch on the standard library's source (docs/demo.md)."""

from pathlib import Path


def path() -> Path:
    """The folder with the demo's config, weights and tokenizer; any `from_pretrained` takes it."""
    return Path(__file__).parent
