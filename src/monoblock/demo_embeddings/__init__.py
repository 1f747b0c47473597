"""The embedded search model: a tiny MPNet, and an index of the standard library's documentation (docs/training.md)."""

from pathlib import Path

NAME = "demo-embeddings"  # instead of a folder or a name on the hub


def path() -> Path:
    """The folder of the model, for `SentenceTransformer`."""
    return Path(__file__).parent / "model"


def index() -> Path:
    """The index, for `monoblock search`."""
    return Path(__file__).parent / "library.npy"
