"""`monoblock embed` and `search` with a fake model without weights: `python fake_embedder.py embed ...`.

A vector holds the lengths of the text's words. A call of `encode` takes FAKE_PAUSE seconds.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from monoblock.cli import encoder, main

WIDTH = 6


class Model:
    """The part of `SentenceTransformer` that the commands use."""

    similarity_fn_name = "dot"
    prompts = {"query": ""}  # noqa: RUF012

    def encode(self, texts: list[str], **options: Any) -> tuple[np.ndarray, np.ndarray]:
        assert options["return_truncated"]
        time.sleep(float(os.environ.get("FAKE_PAUSE", "0")))
        found = np.zeros((len(texts), WIDTH), np.float32)
        for row, text in zip(found, texts, strict=True):
            for i, word in enumerate(text.split()[:WIDTH]):
                row[i] = len(word) / 3
        return found, np.array([max(0, len(text.split()) - WIDTH) for text in texts])


def load(model: str, options: Any, hub: Any, framework: str, **encode: Any) -> encoder.Encoder:
    """Replaces `encoder.load`."""
    del model, options, hub, framework
    return encoder.Encoder(Model(), "none", encode)


if __name__ == "__main__":
    encoder.load = load
    main()
