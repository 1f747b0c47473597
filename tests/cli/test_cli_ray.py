"""`--ray` and `--replicas` of `monoblock embed` and `monoblock batch`, without Ray."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from monoblock.cli.app import command

REQUEST = {
    "custom_id": "1",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"prompt": "a", "max_tokens": 1},
}
EMBED = ("embed", "in.txt", "-m", "demo-embeddings", "-o", "x.npy")
MISSING = '--ray needs ray, which is not installed: pip install "monoblock[ray]"'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it was not installed
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    (tmp_path / "in.jsonl").write_text(json.dumps(REQUEST) + "\n")
    return tmp_path


def invoke(*args: str) -> tuple[Any, str]:
    """Exit code and output of a command in this process."""
    out = io.StringIO()
    code: Any = 0
    with redirect_stdout(out), redirect_stderr(out):
        try:
            command()(args=[*args], prog_name="monoblock")
        except SystemExit as end:
            code = end.code
    return code, " ".join(out.getvalue().split())


@pytest.mark.parametrize(
    "args",
    [
        (*EMBED, "--ray"),
        (*EMBED, "--ray", "auto", "--replicas", "2"),
        ("embed", "--ray", "in.txt", "-m", "demo-embeddings", "-o", "x.npy"),
        ("batch", "--ray", "in.jsonl", "out.jsonl", "--device", "cpu"),
        ("batch", "--ray", "10.0.0.1:6379", "in.jsonl", "out.jsonl"),
        ("batch", "--ray=local", "in.jsonl", "out.jsonl"),
        ("batch", "--ray", "--", "in.jsonl", "out.jsonl"),
    ],
)
def test_the_missing_package_is_named_whether_an_address_follows_or_not(
    args: tuple[str, ...], folder: Path
) -> None:
    code, output = invoke(*args)
    assert code == 1 and MISSING in output
    assert not list(folder.glob("x.npy*"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((*EMBED, "--replicas", "2"), "add --ray"),
        ((*EMBED, "--ray", "--replicas", "0"), "--replicas"),
        ((*EMBED, "--ray", "ray://head:10001"), "client protocol is not supported"),
        ((*EMBED, "--ray=in.txt"), "expected HOST:PORT, auto or local"),
        ((*EMBED, "--ray", "--device", "cuda:1"), "Ray chooses an actor's GPU"),
        (("batch", "in.jsonl", "out.jsonl", "--replicas", "2"), "add --ray"),
        (("batch", "in.jsonl", "out.jsonl", "--ray", "--device", "cuda:0"), "Ray chooses an actor's GPU"),
    ],
)
def test_wrong_usage(args: tuple[str, ...], message: str) -> None:
    code, output = invoke(*args)
    assert code == 2 and message in output


def test_ray_needs_pytorch() -> None:
    pytest.importorskip("flax")
    code, output = invoke(*EMBED, "--ray", "--framework", "flax")
    assert code == 2 and "--ray needs PyTorch, but the framework is flax" in output


def test_nothing_is_imported_without_the_option(folder: Path) -> None:
    assert invoke(*EMBED, "--device", "cpu")[0] == 0
    assert invoke("batch", "in.jsonl", "out.jsonl", "--device", "cpu", "--cache-memory", "32")[0] == 0
    assert (folder / "x.npy").exists() and len((folder / "out.jsonl").read_text().splitlines()) == 1
