"""`monoblock embed` and `monoblock search`: a tiny MPNet; and a fake model in processes that are killed."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiny_pipelines
import xla_test_flags
from terminal import CTRL_C, Terminal

from monoblock import SentenceTransformer, demo
from monoblock.cli.app import command
from monoblock.installed import installed
from monoblock.pipelines.frameworks import FRAMEWORKS
from monoblock.vectors.index import open_index

FAKE = str(Path(__file__).parent / "fake_embedder.py")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "who", "köln", ",", ".", "?"]
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=1 + i % 9)) for i in range(150)]
needs_pyarrow = pytest.mark.skipif(not installed("pyarrow"), reason="needs pyarrow")
SUFFIXES = ["npy", "jsonl", pytest.param("parquet", marks=needs_pyarrow)]
BATCH = ("--batch-size", "2")  # chunks of 64 texts


@dataclass
class Result:
    """What a command printed, and its exit code."""

    exit_code: int
    stdout: str
    stderr: str


def invoke(*args: object, text: str = "") -> Result:
    """A command in this process, where PyTorch is imported."""
    out, err, stdin = io.StringIO(), io.StringIO(), io.TextIOWrapper(io.BytesIO(text.encode()))
    code: Any = 0
    with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "stdin", stdin):
        try:
            command()(args=[str(arg) for arg in args], prog_name="monoblock")
        except SystemExit as end:
            code = end.code
    return Result(code, out.getvalue(), err.getvalue())


def fake(*args: object, text: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """A command with the fake model, in a process."""
    return subprocess.run(
        [sys.executable, FAKE, *map(str, args)],
        capture_output=True,
        text=True,
        input=text,
        timeout=120,
        env=os.environ | env,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random MPNet with mean pooling and a prompt for queries."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipelines.folder(folder / "plain", "MPNetModel")
    made = SentenceTransformer(str(folder / "plain"), prompts={"query": "who ", "lazy": "lazy dog "})
    made.save(str(folder / "made"))
    return folder / "made"


@pytest.fixture(scope="module")
def reference(model: Path) -> SentenceTransformer:
    return SentenceTransformer(str(model), device="cpu")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


def vectors(path: Path) -> np.ndarray:
    return np.concatenate(list(open_index(path).blocks()))


def results(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------- embed


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_vectors_are_those_of_the_model(
    model: Path, reference: Any, source: Path, tmp_path: Path, suffix: str
) -> None:
    output = tmp_path / f"x.{suffix}"
    result = invoke("embed", source, "--model", model, "--output", output, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"# {output}\ntexts: {len(TEXTS)}\nwidth: 36\n"
    # Rows do not depend on the batch that they are in by more than rounding, float32 values below 4.
    np.testing.assert_allclose(vectors(output), reference.encode(TEXTS), atol=1e-5)
    assert open_index(output).texts(range(len(TEXTS))) == dict(enumerate(TEXTS))


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (("--prompt", "who "), {"prompt": "who "}),
        (("--prompt-name", "lazy"), {"prompt_name": "lazy"}),
        (("--normalize", "--truncate-dim", "7"), {"normalize_embeddings": True, "truncate_dim": 7}),
    ],
)
def test_options_reach_the_model(
    model: Path, reference: Any, source: Path, tmp_path: Path, args: tuple[str, ...], options: dict[str, Any]
) -> None:
    output = tmp_path / "x.npy"
    result = invoke("embed", source, "-m", model, "-o", output, "--device", "cpu", *args)
    assert result.exit_code == 0, result.stderr
    expected = reference.encode(TEXTS, **options)
    np.testing.assert_allclose(np.load(output), expected, atol=1e-5)
    assert not np.allclose(expected[:, :7], reference.encode(TEXTS)[:, :7], atol=1e-2)


def test_dtype_and_quantisation_reach_the_model(
    model: Path, reference: Any, source: Path, tmp_path: Path
) -> None:
    exact = reference.encode(TEXTS)
    for name, args in {"b": ("--dtype", "bfloat16"), "q": ("--quantize", "int8")}.items():
        output = tmp_path / f"{name}.npy"
        assert invoke("embed", source, "-m", model, "-o", output, "--device", "cpu", *args).exit_code == 0
        difference = abs(np.load(output) - exact).max()
        assert 1e-5 < difference < 0.2


def test_inputs(model: Path, source: Path, tmp_path: Path) -> None:
    fixed = ("-m", model, "--device", "cpu")
    assert invoke("embed", source, *fixed, "-o", tmp_path / "x.npy").exit_code == 0
    piped = invoke("embed", "-", *fixed, "-o", tmp_path / "a.npy", text="\n".join(TEXTS))
    assert piped.exit_code == 0, piped.stderr
    lines = "\n".join(json.dumps({"body": text}) for text in TEXTS)
    columns = ("--input-format", "jsonl", "--text-column", "body")
    named = invoke("embed", *columns, *fixed, "-o", tmp_path / "b.npy", text=lines)
    assert named.exit_code == 0, named.stderr
    for name in "ab":
        assert (tmp_path / f"{name}.npy").read_bytes() == (tmp_path / "x.npy").read_bytes()


@needs_pyarrow
def test_a_parquet_index_is_an_input(model: Path, source: Path, tmp_path: Path) -> None:
    fixed = ("-m", model, "--device", "cpu")
    invoke("embed", source, *fixed, "-o", tmp_path / "x.parquet")
    result = invoke("embed", tmp_path / "x.parquet", *fixed, "-o", tmp_path / "y.npy")
    assert result.exit_code == 0, result.stderr
    assert vectors(tmp_path / "x.parquet").tobytes() == np.load(tmp_path / "y.npy").tobytes()


@pytest.mark.parametrize("framework", ["flax", "tf"])
def test_other_frameworks(model: Path, reference: Any, source: Path, tmp_path: Path, framework: str) -> None:
    if (missing := FRAMEWORKS[framework].missing()) is not None:
        pytest.skip(f"needs {missing}")
    args = (
        "embed",
        source,
        "-m",
        model,
        "-o",
        tmp_path / "x.npy",
        "--framework",
        framework,
        "--device",
        "cpu",
    )
    subprocess.run(
        [sys.executable, "-m", "monoblock.cli", *map(str, args)],
        check=True,
        capture_output=True,
        env={**os.environ, **xla_test_flags.environment()},
    )
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), reference.encode(TEXTS), atol=1e-5)


def test_truncated_texts_are_counted_once(model: Path, tmp_path: Path) -> None:
    long = "\n".join(["fox " * 40, "fox", "dog " * 41] * 50)
    result = invoke("embed", "-m", model, "-o", tmp_path / "x.npy", *BATCH, text=long)
    assert result.exit_code == 0
    notes = [line for line in result.stderr.splitlines() if "cut" in line]
    assert notes == ["100 of 150 texts were longer than the model takes: cut off"]


def test_a_killed_process_is_resumed(model: Path, tmp_path: Path) -> None:
    """With the real model: the output has the bytes of a run without a kill, also if more threads are available."""
    source = tmp_path / "in.txt"
    source.write_text("\n".join(TEXTS * 2))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    args = ("embed", source, "-m", model, "--device", "cpu", "--batch-size", "1")
    here = [sys.executable, "-m", "monoblock.cli", *map(str, args), "-o"]
    one, two = ({**os.environ, "OMP_NUM_THREADS": count} for count in "12")
    subprocess.run([*here, str(whole / "x.npy")], env=one, check=True, capture_output=True)
    count = kill_after([*here, str(killed / "x.npy")], killed, lambda count: count > 60, **one)
    assert 60 < count < len(TEXTS) * 2
    result = subprocess.run([*here, str(killed / "x.npy")], env=two, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"continuing after {count} texts" in result.stderr
    assert results(killed) == results(whole)


def journal(folder: Path) -> int:
    """How many texts the journal of the run in a folder has; -1 without one."""
    for path in folder.glob("*.partial.json"):
        try:
            return json.loads(path.read_bytes())["count"]
        except FileNotFoundError:  # finished meanwhile
            pass
    return -1


def kill_after(
    command: list[str], folder: Path, ready: Callable[[int], bool], pause: float = 0, **env: str
) -> int:
    """Starts a command, kills it some time after the journal is ready; returns the texts in it (-1: it finished)."""
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=os.environ | env
    )
    deadline = time.monotonic() + 100
    while process.poll() is None and not ready(journal(folder)):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return journal(folder)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_kills_at_random_moments(model: Path, tmp_path: Path, suffix: str) -> None:
    """Processes with the fake model are killed until one finishes; each makes progress."""
    source = tmp_path / "in.txt"
    source.write_text("\n".join(f"{text} {i}" for i, text in enumerate(TEXTS * 8)))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    args = ["embed", str(source), "-m", str(model), "--batch-size", "1"]
    assert fake(*args, "-o", whole / f"x.{suffix}").returncode == 0
    draw = random.Random(suffix)
    counts = [0]
    for _ in range(4):
        start = counts[-1]
        found = kill_after(
            [sys.executable, FAKE, *args, "-o", str(killed / f"x.{suffix}")],
            killed,
            lambda count, start=start: count > start,
            pause=draw.uniform(0, 0.1),
            FAKE_PAUSE="0.01",
        )
        if found < 0:
            break
        assert not (killed / f"x.{suffix}").exists()
        counts.append(found)
    assert len(counts) > 2 and counts == sorted(set(counts))
    last = fake(*args, "-o", killed / f"x.{suffix}")
    assert last.returncode == 0, last.stderr
    assert results(killed) == results(whole)


def test_ctrl_c_keeps_the_texts(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("\n".join(TEXTS * 20))
    output = tmp_path / "x.npy"
    args = (FAKE, "embed", str(source), "-m", str(model), "-o", str(output), "--batch-size", "1")
    with Terminal(args, env={"TERM": "xterm", "COLUMNS": "100", "FAKE_PAUSE": "0.1"}) as terminal:
        terminal.expect("/3000")  # the bar knows the total
        terminal.expect("texts/s")
        terminal.type(CTRL_C)
        terminal.expect("the same command continues")
        assert terminal.end() == 130
    assert fake(*args[1:]).returncode == 0
    assert np.load(output).shape[0] == 20 * len(TEXTS)


def test_refusals(model: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.npy"
    args = ("embed", source, "-m", model, "-o", output, *BATCH)
    here = [sys.executable, FAKE, *map(str, args)]
    kill_after(here, tmp_path, lambda count: count > 0, FAKE_PAUSE="0.2")
    for more, message in [
        (("--prompt", "a"), "with --prompt not given, and now it is 'a'"),
        (("--batch-size", "3"), "with --batch-size 2, and now it is 3"),
        (("-m", demo.path()), "with another --model"),
    ]:
        result = fake(*args, *more)
        assert result.returncode == 1 and message in result.stderr and "--restart" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    source.write_text("other")
    result = fake(*args)
    assert result.returncode == 1 and "another input" in result.stderr
    assert fake(*args, "--restart").returncode == 0
    result = fake(*args)
    assert result.returncode == 1 and f"{output} exists" in result.stderr and "--force" in result.stderr
    assert fake(*args, "--force").returncode == 0


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("embed", "a.txt", "-o", "x.npy"), 2, "--model"),
        (("embed", "a.txt", "-m", "m"), 2, "--output"),
        (("embed", "a.txt", "-m", "m", "-o", "x.npy", "--batch-size", "0"), 2, "--batch-size"),
        (("embed", "a.txt", "-m", "m", "-o", "x.npy", "--prompt", "a", "--prompt-name", "b"), 2, "not both"),
        (("embed", "-m", "m", "-o", "x.npy", "--quantize", "int8", "--framework", "flax"), 2, "needs PyTorch"),
        (("embed", "a.txt", "-m", demo.path(), "-o", "x.bin"), 1, "one of .npy, .parquet, .jsonl"),
        (("embed", "a.txt", "-m", demo.path(), "-o", "x.npy", "--text-column", "a"), 1, "no column 'a'"),
        (("embed", "missing.txt", "-m", demo.path(), "-o", "x.npy"), 1, "missing.txt: no such file"),
        (("embed", "a.txt", "-m", "./missing", "-o", "x.npy"), 1, "missing"),
        (("embed", "a.txt", "-m", "name", "-o", "x.npy", "--offline"), 1, "'sentence-transformers/name'"),
        (("search", "a", "-i", "x.npy"), 1, "no such file"),
        (("search", "a", "-i", "x.npy", "--top-k", "0"), 2, "--top-k"),
        (("search", "a", "-m", "m"), 2, "--model needs --index"),
    ],
)  # fmt: skip
def test_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*args)
    assert result.exit_code == code
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- search


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_search_equals_brute_force(
    model: Path, reference: Any, source: Path, tmp_path: Path, suffix: str
) -> None:
    output = tmp_path / f"x.{suffix}"
    invoke("embed", source, "-m", model, "-o", output, "--device", "cpu")
    queries = ["lazy fox", "the quick dog ?"]
    result = invoke("search", "-", "--index", output, "--top-k", 4, "--json", text="\n".join(queries))
    assert result.exit_code == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    rows = reference.encode(TEXTS).astype(np.float64)
    asked = reference.encode(queries, prompt_name="query").astype(np.float64)
    rows, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, asked))
    cosines = asked @ rows.T
    for query, line, scores in zip(queries, found, cosines, strict=True):
        assert line["query"] == query
        best = np.sort(scores)[::-1][:4]
        # float32 cosines; equal texts have equal scores
        np.testing.assert_allclose([hit["score"] for hit in line["results"]], best, atol=1e-5)
        for hit in line["results"]:
            assert hit["text"] == TEXTS[hit["row"]]
            assert hit["score"] == pytest.approx(scores[hit["row"]], abs=1e-5)


def test_search_prints_lines_and_takes_prompts(
    model: Path, reference: Any, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "x.npy"
    invoke("embed", source, "-m", model, "-o", output, "--normalize", "--truncate-dim", "9")
    plain = invoke("search", TEXTS[7], "-i", output, "-k", 2, "--prompt", "")
    score, row, text = plain.stdout.splitlines()[0].split("\t")
    assert (score, text) == ("1.0000", TEXTS[7]) and TEXTS[int(row)] == TEXTS[7]
    assert len(plain.stdout.splitlines()) == 2
    with_prompt = invoke("search", TEXTS[7], "-i", output, "-k", 2)  # that of the model, "who "
    named = invoke("search", TEXTS[7], "-i", output, "-k", 2, "--prompt-name", "query")
    assert with_prompt.stdout == named.stdout != plain.stdout
    several = invoke("search", "-", "-i", output, "-k", 2, "--prompt", "", text=f"\n{TEXTS[7]}\n")
    assert several.stdout == f"# {TEXTS[7]}\n{plain.stdout}"


def test_search_of_the_embedded_index() -> None:
    result = invoke("search", "read a csv file", "--json", "--offline")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["results"]
    assert len(found) == 5 and any(row["text"].startswith("csv") for row in found)
    assert "warning" not in result.stderr  # the index is of this model


def test_the_model_of_a_search(model: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.npy"
    invoke("embed", source, "-m", model, "-o", output)
    result = invoke("search", "fox", "-i", output, "-m", demo.path())
    assert result.exit_code == 1
    assert "is not the model" in result.stderr and "pass the --model that made it" in result.stderr
    (tmp_path / "x.npy.index.json").unlink()
    result = invoke("search", "fox", "-i", output)
    assert result.exit_code == 2 and "give --model" in result.stderr
    assert invoke("search", "fox", "-i", output, "-m", model).exit_code == 0
