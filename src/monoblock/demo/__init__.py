"""The embedded demo: a tiny MPT, trained from scratch on the standard library's source (docs/demo.md)."""

from pathlib import Path


def path() -> Path:
    """The folder of the demo's config, weights and tokenizer, for any `from_pretrained`."""
    return Path(__file__).parent
