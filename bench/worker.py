"""Runs one backend in its own process: reads a JSON object per line and writes one per line (see `answer`).

python worker.py NAME                            answer questions on standard input
python worker.py NAME --prepare SOURCE TARGET FORM   write a model in the backend's own format
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

# Backend -> its module in backends/, and the arguments of its `Backend`.
MODULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "monoblock": ("torch_models", ("monoblock",)),
    "monoblock, before": ("torch_models", ("monoblock",)),
    "monoblock, lossless": ("torch_models", ("monoblock",)),
    "monoblock, plain": ("torch_models", ("monoblock",)),
    "transformers": ("torch_models", ("transformers",)),
    "OpenVINO": ("openvino_genai_backend", ()),
    "CTranslate2": ("ctranslate2_backend", ()),
}


def memory(kind: str) -> int:
    """Memory of this process in bytes: VmRSS current, VmHWM peak since the start or the last `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the system does not report {kind}")


def reset_peak() -> None:
    """Resets the peak memory."""
    Path("/proc/self/clear_refs").write_text("5")


def prompts_of(batch: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    """Random tokens without the special ones (0, 1, 2), the same for all backends."""
    draw = random.Random(seed)
    return [[draw.randrange(3, vocab) for _ in range(length)] for _ in range(batch)]


class Worker:
    """Answers questions; each public method is one kind of question."""

    def __init__(self, name: str) -> None:
        module, arguments = MODULES[name]
        self.backend: Any = importlib.import_module(f"backends.{module}").Backend(*arguments)

    def start(self, architecture: str) -> dict[str, Any]:
        """Imports the library, and the model's class if it has one."""
        begin = time.perf_counter()
        self.backend.start()
        if hasattr(self.backend, "import_class"):
            self.backend.import_class(architecture)
        return {"import s": time.perf_counter() - begin}

    def load(self, folder: str, form: str) -> dict[str, Any]:
        """Loads a model and generates one token, which completes lazy loading."""
        reset_peak()
        idle, begin = memory("VmRSS"), time.perf_counter()
        self.backend.load(folder, form)
        loaded = time.perf_counter()
        self.backend.generate(prompts_of(1, 8, 500, 0), 1)
        return {
            "load s": loaded - begin,
            "first token s": time.perf_counter() - loaded,
            "load peak MB": (memory("VmHWM") - idle) / 1e6,
            "weight bytes": self.backend.weight_bytes(),
            "versions": self.backend.versions(),
        }

    def generate(self, batch: int, length: int, vocab: int, new: int, seed: int) -> dict[str, Any]:
        """Seconds, additional memory in MB, and tokens of one call."""
        prompts = prompts_of(batch, length, vocab, seed)
        reset_peak()
        held, begin = memory("VmRSS"), time.perf_counter()
        tokens = self.backend.generate(prompts, new)
        seconds = time.perf_counter() - begin
        if any(len(one) != new for one in tokens):
            raise RuntimeError(f"expected {new} tokens, got {[len(one) for one in tokens]}")
        return {"seconds": seconds, "MB": (memory("VmHWM") - held) / 1e6, "tokens": tokens}

    def step_logits(
        self, batch: int, length: int, vocab: int, new: int, seed: int, file: str
    ) -> dict[str, Any]:
        """New tokens, and in `file` (npy) their logits if the backend returns them."""
        prompts = prompts_of(batch, length, vocab, seed)
        if not hasattr(self.backend, "step_logits"):
            return {"tokens": self.backend.generate(prompts, new), "file": None}
        import numpy

        tokens, logits = self.backend.step_logits(prompts, new)
        numpy.save(file, logits)
        return {"tokens": tokens, "file": file}

    def logits(self, sequences: list[list[int]], last: int, file: str) -> dict[str, Any]:
        """Writes the logits of the `last` tokens of each sequence to `file` (npy)."""
        import numpy

        numpy.save(file, self.backend.logits(sequences)[:, -last - 1 : -1])
        return {"file": file}

    def train(self, batch: int, length: int, vocab: int, form: str, seed: int) -> dict[str, Any]:
        """Seconds and MB of one training step."""
        tokens = prompts_of(batch, length, vocab, seed)
        reset_peak()
        begin = time.perf_counter()
        self.backend.train(tokens, form)
        return {"seconds": time.perf_counter() - begin, "MB": memory("VmHWM") / 1e6}

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """`{"do": METHOD, ...its arguments}`."""
        return getattr(self, question.pop("do"))(**question)


def main() -> None:
    """Answers questions until standard input ends."""
    name, *rest = sys.argv[1:]
    if rest and rest[0] == "--prepare":
        module, _ = MODULES[name]
        importlib.import_module(f"backends.{module}").prepare(*rest[1:])
        return
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries goes to stderr
    worker = Worker(name)
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
