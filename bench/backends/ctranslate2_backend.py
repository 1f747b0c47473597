"""CTranslate2, with models written by its converter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

FORMS = ("float32", "int8")


def prepare(source: str, target: str, form: str) -> None:
    """Converts a transformers folder."""
    converter = Path(sys.executable).with_name("ct2-transformers-converter")
    command = [str(converter), "--model", source, "--output_dir", target, "--quantization", form]
    subprocess.run([*command, "--low_cpu_mem_usage"], check=True)


class Backend:
    """A generator with one thread per core."""

    def start(self) -> None:
        """Imports the library."""
        import ctranslate2

        self.library = ctranslate2

    def versions(self) -> dict[str, str]:
        """Versions by name."""
        return {"ctranslate2": self.library.__version__}

    def load(self, folder: str, form: str) -> None:
        """Loads the model."""
        threads = len(os.sched_getaffinity(0))
        self.generator = self.library.Generator(
            folder, device="cpu", compute_type=form, inter_threads=1, intra_threads=threads
        )
        self.words = json.loads(Path(folder, "vocabulary.json").read_text(encoding="utf-8"))
        self.size = Path(folder, "model.bin").stat().st_size

    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.size

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        words = [[self.words[token] for token in prompt] for prompt in prompts]
        results = self.generator.generate_batch(
            words, max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False
        )
        return [result.sequences_ids[0] for result in results]
