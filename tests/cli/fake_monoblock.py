"""The command line with a fake model without weights: `python fake_monoblock.py chat ...`.

The model generates `re: PROMPT`, one token per character, and appends the arguments of each call as JSON to the file
FAKE_LOG. With "slow" in the prompt, a token takes 0.2 s; with "fail", the model raises an error.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from monoblock.cli import engine, main
from monoblock.cli.options import DownloadOptions, ModelOptions


class Batch(dict[str, Any]):
    """A tokenizer's output: named arrays with `to`."""

    def to(self, device: str) -> Batch:
        assert device == "cpu"
        return self


class Tokenizer:
    """One token per character."""

    all_special_ids = ()

    def __init__(self, template: bool) -> None:
        self.chat_template = "a template" if template else None

    def __call__(self, text: str, return_tensors: str) -> Batch:
        assert return_tensors == "pt"
        return Batch(input_ids=np.array([[ord(c) for c in text]]))

    def decode(self, ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        assert skip_special_tokens
        return "".join(chr(i) for i in np.asarray(ids).reshape(-1))

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> Batch:
        assert options == {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        return self("|".join(f"{m['role']}={m['content']}" for m in messages), "pt")


class Model:
    """Generates its prompt."""

    device = "cpu"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def room(self, tokens: int) -> None:
        """There is no limit."""

    def generate(self, input_ids: Any, streamer: Any, **options: Any) -> SimpleNamespace:
        prompt = self.tokenizer.decode(input_ids[0], skip_special_tokens=True)
        if log := os.environ.get("FAKE_LOG"):
            options.pop("tokenizer", None)
            options.pop("past_key_values", None)
            with Path(log).open("a") as file:
                file.write(json.dumps({"prompt": prompt} | options) + "\n")
        if "fail" in prompt:
            raise {"value": ValueError, "key": KeyError}[prompt.split()[-1]]("the model fell over")
        streamer.put(input_ids)
        for character in f"re: {prompt}"[: options["max_new_tokens"]]:
            streamer.put(np.array([ord(character)]))
            time.sleep(0.2 if "slow" in prompt.rpartition("|")[2] else 0)
        streamer.end()
        return SimpleNamespace(past_key_values=None)


def load(
    source: ModelOptions,
    hub: DownloadOptions,
    attention: str | None = None,
    what: str = "",
    *,
    chat: bool = False,
) -> engine.ChatEngine:
    """Replaces `engine.load`."""
    del hub, attention, what, chat
    if source.model == "missing":
        raise OSError("missing is not a folder, and the hub has no model of that name")
    tokenizer = Tokenizer(template=source.model == "with-template")
    return engine.ChatEngine(Model(tokenizer), tokenizer, source.model or "the fake")


if __name__ == "__main__":
    engine.load = load
    main()
