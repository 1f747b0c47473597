"""Texts per second, accuracy and start of sentence embeddings, compared with sentence-transformers.

    python bench/embeddings.py --model FOLDER [--peer-python PATH [--openvino FOLDER] [--openvino-int8 FOLDER]
        [--onnx-int8 FOLDER]] [--runs 3] [--share 1.0] [--threads N] [--only NAME,...] [--sets NAME,...] [--accuracy]
        [--start] [--json FILE]

FOLDER is all-mpnet-base-v2, or another model of sentence-transformers. PATH is the Python of an environment with
sentence-transformers; the other folders are the model exported there (its pages on backends say how), in the
subfolders `openvino` and `onnx`. Every library and form runs in a process of its own, which persists; they alternate.

The texts are docstrings of the Python standard library: 1,000 short ones (about 20 tokens), 1,000 paragraphs (about
130), 200 long ones (384, truncated), and all of them mixed; `--share` takes that part of each set, for slow machines,
in batches that need as much padding as all texts would.
Figures are medians with the range over the runs.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SETS = {
    "short": (1000, 20),
    "paragraphs": (1000, 130),
    "long": (200, 384),
}  # number of texts, about so many tokens
BATCH = 32  # texts of a batch, the default of both libraries
WORDS_PER_TOKEN = 0.62  # of docstrings, with this tokenizer
OURS = ("float32", "bfloat16", "int8", "int4")
THEIRS = ("torch float32", "torch bfloat16", "OpenVINO", "OpenVINO int8", "ONNX int8")


# ---------------------------------------------------------------------------- texts


def docstrings() -> list[str]:
    """Docstrings of the standard library, in one order on every machine with this Python."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) > 20:
                    found.append(text)
    return sorted(set(found))


def texts_of(share: float) -> dict[str, list[str]]:
    """The sets of texts: sentences of docstrings, joined up to each set's number of tokens."""
    draw = random.Random(0)
    sentences = [s for text in docstrings() for s in re.split(r"(?<=\.) ", text) if len(s.split()) > 4]
    draw.shuffle(sentences)
    sets: dict[str, list[str]] = {}
    at = 0
    for name, (count, tokens) in SETS.items():
        texts: list[str] = []
        while len(texts) < count:
            words: list[str] = []
            wanted = tokens * WORDS_PER_TOKEN * (1.15 if name == "long" else draw.uniform(0.6, 1.4))
            while len(words) < wanted:
                words += sentences[at % len(sentences)].split()
                at += 1
            texts.append(" ".join(words[: round(wanted)]))
        sets[name] = batches_of(texts, share)
    mixed = [text for texts in sets.values() for text in texts]
    draw.shuffle(mixed)
    return {**sets, "mixed": mixed}


def batches_of(texts: list[str], share: float) -> list[str]:
    """A part of the texts that needs as much padding as all of them: whole batches of the texts sorted by length."""
    if share >= 1:
        return texts
    ordered = sorted(texts, key=len)
    wanted = max(8, round(len(texts) * share))
    count = max(1, wanted // BATCH)
    size = min(wanted, BATCH)
    starts = [round((i + 0.5) * len(texts) / count - size / 2) for i in range(count)]
    return [text for start in starts for text in ordered[start : start + size]]


# ---------------------------------------------------------------------------- encoders


def our_model(form: str, folder: str) -> Callable[[list[str]], Any]:
    """`encode` of monoblock with weights in that form."""
    import monoblock

    options: dict[str, Any] = {"dtype": form} if form in ("float32", "bfloat16") else {"dtype": "float32"}
    if form in ("int8", "int4"):
        options["quantization_config"] = form
    model = monoblock.SentenceTransformer(folder, device="cpu", **options)
    return lambda texts: model.encode(texts, show_progress_bar=False)


def their_model(form: str, folder: str) -> Callable[[list[str]], Any]:
    """`encode` of sentence-transformers with that backend."""
    import torch
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]

    options: dict[str, Any] = {}
    if form.startswith("torch"):
        options["model_kwargs"] = {"dtype": getattr(torch, form.split()[1])}
    elif form.startswith("OpenVINO"):
        options["backend"] = "openvino"
    else:
        file = next(path.name for path in (Path(folder) / "onnx").glob("*int8*.onnx"))
        options |= {"backend": "onnx", "model_kwargs": {"file_name": f"onnx/{file}"}}
    model = SentenceTransformer(folder, device="cpu", **options)
    return lambda texts: model.encode(texts, show_progress_bar=False)


def worker(form: str, folder: str) -> None:
    """Answers lines on standard input: a file with texts -> seconds; the vectors go to the second file, if named."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    begin = time.perf_counter()
    encode = (our_model if form in OURS else their_model)(form, folder)
    loaded = time.perf_counter()
    encode(["a first vector"])
    first = time.perf_counter()
    print(json.dumps({"load s": loaded - begin, "first s": first - begin}), file=answers, flush=True)
    for line in sys.stdin:
        source, target = json.loads(line)
        texts = json.loads(Path(source).read_text())
        begin = time.perf_counter()
        vectors = encode(texts)
        seconds = time.perf_counter() - begin
        if target:
            np.save(target, np.asarray(vectors, np.float32))
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


class EncoderProcess:
    """A encoder's process."""

    def __init__(self, name: str, python: str, folder: str, threads: int) -> None:
        self.name = name
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [python, __file__, "--worker", name, "--model", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.environ.get("SHOW") else None,
            text=True,
            env=environment,
        )
        self.start = self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} failed: run again with SHOW=1 for its messages")
        return json.loads(line)

    def ask(self, source: Path, target: Path | None = None) -> float:
        """Seconds for the texts in a file; the vectors are written to `target`."""
        assert self.process.stdin is not None
        print(json.dumps([str(source), target and str(target)]), file=self.process.stdin, flush=True)
        return self._answer()["seconds"]


# ---------------------------------------------------------------------------- accuracy


def ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value."""
    found = np.empty(len(values))
    found[np.argsort(values)] = np.arange(len(values))
    return found


def accuracy(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Of vectors (texts, width) beside the float32 ones: cosines, Spearman's correlation of the similarities of all
    pairs, and how often the nearest text, and the set of the ten nearest, agree."""
    a = found / np.linalg.norm(found, axis=1, keepdims=True)
    b = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    cosines = (a * b).sum(1)
    pairs = np.triu_indices(len(a), 1)
    near = []
    for vectors in (a, b):
        similar = vectors @ vectors.T
        np.fill_diagonal(similar, -2)
        near.append((similar[pairs], np.argsort(-similar, axis=1)[:, :10]))
    (ours, our_ten), (theirs, their_ten) = near
    agreed = [len(set(x) & set(y)) / 10 for x, y in zip(our_ten.tolist(), their_ten.tolist(), strict=True)]
    return {
        "mean cosine": float(cosines.mean()),
        "worst cosine": float(cosines.min()),
        "Spearman": float(np.corrcoef(ranks(ours), ranks(theirs))[0, 1]),
        "top 1": float((our_ten[:, 0] == their_ten[:, 0]).mean()),
        "top 10": float(np.mean(agreed)),
    }


# ---------------------------------------------------------------------------- the run


def cold_start(folder: str) -> float:
    """Seconds from the start of Python to the first vector, in float32."""
    code = (
        "import sys; from monoblock import SentenceTransformer; "
        "SentenceTransformer(sys.argv[1], device='cpu').encode('a first vector')"
    )
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, folder], check=True)
    return time.perf_counter() - begin


def figure(values: list[float]) -> str:
    """The median, and the range."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def main() -> None:
    """Measures and prints tables in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    for name in ("peer-python", "openvino", "openvino-int8", "onnx-int8", "worker", "only", "sets"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--start", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.worker:
        return worker(given.worker, given.model)
    if given.start:
        print(f"start to first vector: {figure([cold_start(given.model) for _ in range(given.runs)])} s")
    folders = dict.fromkeys(OURS, given.model)
    if given.peer_python:
        folders |= {"torch float32": given.model, "torch bfloat16": given.model}
        folders |= {
            "OpenVINO": given.openvino,
            "OpenVINO int8": given.openvino_int8,
            "ONNX int8": given.onnx_int8,
        }
    wanted = given.only.split(",") if given.only else list(folders)
    encoders = [
        EncoderProcess(name, sys.executable if name in OURS else given.peer_python, folder, given.threads)
        for name, folder in folders.items()
        if folder and name in wanted
    ]
    sets = texts_of(given.share)
    if given.sets:
        sets = {name: sets[name] for name in given.sets.split(",")}
    return measure(encoders, sets, given)


def measure(encoders: list[EncoderProcess], sets: dict[str, list[str]], given: argparse.Namespace) -> None:
    """The tables."""
    import tempfile

    rates: dict[str, dict[str, list[float]]] = {c.name: {name: [] for name in sets} for c in encoders}
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch) / f"{name}.json" for name in sets}
        for name, texts in sets.items():
            files[name].write_text(json.dumps(texts))
        warm = Path(scratch) / "warm.json"
        warm.write_text(json.dumps(next(iter(sets.values()))[:8]))
        for encoder in encoders:
            encoder.ask(warm)
        for _ in range(given.runs):
            for name, texts in sets.items():
                for encoder in encoders:
                    seconds = encoder.ask(files[name])
                    rates[encoder.name][name].append(len(texts) / seconds)
                    print(f"{name}: {encoder.name} {len(texts) / seconds:.3g}", file=sys.stderr, flush=True)
        print("| texts per second | " + " | ".join(sets) + " |\n|---|" + "---|" * len(sets))
        for encoder in encoders:
            cells = [figure(rates[encoder.name][name]) for name in sets]
            print(f"| {encoder.name} | " + " | ".join(cells) + " |")
        quality = _accuracies(encoders, files["short"], Path(scratch)) if given.accuracy else {}
    if given.json:
        given.json.write_text(json.dumps({"rates": rates, "accuracy": quality}))


def _accuracies(encoders: list[EncoderProcess], source: Path, scratch: Path) -> dict[str, dict[str, float]]:
    vectors: dict[str, np.ndarray] = {}
    for encoder in encoders:
        target = scratch / "vectors.npy"
        encoder.ask(source, target)
        vectors[encoder.name] = np.load(target)
    exact = vectors.get("torch float32", vectors.get("float32"))
    if exact is None:
        sys.exit("--accuracy needs float32, or torch float32, among the encoders")
    found = {name: accuracy(own, exact) for name, own in vectors.items()}
    columns = list(next(iter(found.values())))
    print("\n| short texts | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, values in found.items():
        print(f"| {name} | " + " | ".join(f"{values[column]:.5f}" for column in columns) + " |")
    return found


if __name__ == "__main__":
    main()
