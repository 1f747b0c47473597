"""`monoblock batch`: every request has one result, also after kills at any moment."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import server_models

from monoblock.cli import batch_models
from monoblock.cli.app import command
from monoblock.cli.options import DownloadOptions
from monoblock.serving.batch_files import BatchResults, read_lines
from monoblock.serving.server.kinds import ModelKind
from monoblock.serving.server.registry import ModelEntry

PATIENCE = 120.0  # seconds that a subprocess may take
FIXED = ("--device", "cpu", "--cache-memory", "32")


def request(name: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def completion(i: int) -> dict[str, Any]:
    return request(f"r{i}", prompt=f"def f{i}(x", max_tokens=10 + i % 20, temperature=0)


def written(path: Path, *requests: Any) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in requests))
    return path


@dataclass
class Ran:
    exit_code: Any
    output: str


def invoke(*args: Any) -> Ran:
    """The command in this process, where PyTorch is imported."""
    out = io.StringIO()
    code: Any = 0
    with redirect_stdout(out), redirect_stderr(out):
        try:
            command()(args=["batch", *map(str, args)], prog_name="monoblock")
        except SystemExit as error:
            code = error.code
    return Ran(code, out.getvalue())


def results(path: Path) -> dict[str, Any]:
    """The results by custom_id; fails if one is there twice or torn."""
    found: dict[str, Any] = {}
    text = path.read_text()
    assert text.endswith("\n")
    for line in text.splitlines():
        item = json.loads(line)
        assert item.keys() == {"id", "custom_id", "response", "error"}
        assert item["custom_id"] not in found
        found[item["custom_id"]] = item
    return found


def texts(path: Path) -> dict[str, str]:
    return {name: item["response"]["body"]["choices"][0]["text"] for name, item in results(path).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_all_endpoints_and_the_errors_of_requests(folder: Path, tmp_path: Path) -> None:
    vectors = server_models.vector_model(folder)
    chat = [{"role": "user", "content": "hi"}]
    source = written(
        tmp_path / "in.jsonl",
        request("text", model="demo", prompt=["import", "def"], max_tokens=3, temperature=0),
        request("chat", "/v1/chat/completions", model="demo", messages=chat, max_tokens=3, n=2, seed=1),
        request("response", "/v1/responses", model="demo", input="hi", max_output_tokens=3),
        request("vector", "/v1/embeddings", model="vectors", input=["one", "two"]),
        request("no model", model="other", prompt="x"),
        request("too hot", model="demo", prompt="x", temperature=9),
        request("unknown field", model="demo", prompt="x", colour="red"),
        request("stream", model="demo", prompt="x", stream=True),
        request("wrong kind", "/v1/embeddings", model="demo", input="x"),
    )
    output = tmp_path / "out.jsonl"
    ran = invoke(source, output, "-m", vectors, "-m", _demo(), "--name", "vectors", "--name", "demo", *FIXED)
    assert ran.exit_code == 0, ran.output
    assert "failed: 5" in ran.output
    found = results(output)
    assert found.keys() == {line.custom_id for line in read_lines(source, "")}
    status = {name: item["response"]["status_code"] for name, item in found.items()}
    assert status == {
        "text": 200, "chat": 200, "response": 200, "vector": 200, "no model": 404, "too hot": 400,
        "unknown field": 400, "stream": 400, "wrong kind": 400,
    }  # fmt: skip
    assert all(item["error"] is None and item["id"].startswith("batch_req_") for item in found.values())
    assert len({item["response"]["request_id"] for item in found.values()}) == len(found)
    body = {name: item["response"]["body"] for name, item in found.items()}
    assert [choice["index"] for choice in body["text"]["choices"]] == [0, 1]
    assert len(body["chat"]["choices"]) == 2 and body["chat"]["object"] == "chat.completion"
    assert body["response"]["object"] == "response"
    assert [row["index"] for row in body["vector"]["data"]] == [0, 1]
    assert body["too hot"]["error"]["param"] == "temperature"
    assert body["unknown field"]["error"]["code"] == "unknown_parameter"
    assert body["stream"]["error"]["param"] == "stream"


def _demo() -> Path:
    from monoblock import demo

    return demo.path()


def test_the_default_model_is_the_demo_and_needs_no_name(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", completion(1))
    output = tmp_path / "out.jsonl"
    assert invoke(source, output, *FIXED).exit_code == 0
    assert results(output)["r1"]["response"]["body"]["model"] == "demo"


def test_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    """Processes are killed at random moments until one finishes; each adds results."""
    count = 120
    source = written(tmp_path / "in.jsonl", *map(completion, range(count)))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    args = (*FIXED, "--max-sequences", "2")
    assert invoke(source, whole, *args).exit_code == 0
    line = [sys.executable, "-m", "monoblock.cli", "batch", str(source), str(output), *args]
    draw = random.Random(0)
    kills, sizes = 0, [0]
    for _ in range(4):
        process = subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and _size(output) <= sizes[-1]:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.15))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        sizes.append(_size(output))
        if len(output.read_text().splitlines()) == count:
            break
    assert kills >= 2 and sizes == sorted(set(sizes))
    # What a kill in the middle of a write leaves behind.
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    kept = len(lines) - 1
    ran = invoke(source, output, *args)
    assert ran.exit_code == 0 and f"continuing after {kept} results" in ran.output
    assert texts(output) == texts(whole)
    assert len(results(output)) == count
    assert not list(tmp_path.glob("*.lock"))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_ctrl_c_keeps_the_results(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", *map(completion, range(200)))
    output = tmp_path / "out.jsonl"
    line = [sys.executable, "-m", "monoblock.cli", "batch", str(source), str(output), *FIXED]
    process = subprocess.Popen([*line, "--max-sequences", "1"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    while not _size(output):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    count = len(results(output))
    assert 0 < count < 200
    assert f"interrupted: {count} results are kept" in errors


def test_a_finished_batch_runs_nothing(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", completion(1), completion(2))
    output = tmp_path / "out.jsonl"
    assert invoke(source, output, *FIXED).exit_code == 0
    before = output.read_bytes()
    ran = invoke(source, output, *FIXED)
    assert ran.exit_code == 0 and "loading" not in ran.output
    assert output.read_bytes() == before


def test_more_lines_continue(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", completion(1))
    output = tmp_path / "out.jsonl"
    assert invoke(source, output, *FIXED).exit_code == 0
    first = output.read_bytes()
    written(source, completion(2), completion(1))
    assert invoke(source, output, *FIXED).exit_code == 0
    assert output.read_bytes().startswith(first) and results(output).keys() == {"r1", "r2"}


def test_another_request_or_model_is_not_mixed_in(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", completion(1), completion(2))
    output = tmp_path / "out.jsonl"
    assert invoke(source, output, *FIXED).exit_code == 0
    before = output.read_bytes()
    for options in (("--dtype", "float32"), ("--quantize", "int8"), ("--no-generation-config",)):
        ran = invoke(source, output, *FIXED, *options)
        assert ran.exit_code == 1 and "another request, model or options" in ran.output
    written(source, completion(1), {**completion(2), "body": {"prompt": "other"}})
    assert "result of 'r2' for another request" in invoke(source, output, *FIXED).output
    written(source, completion(1))
    assert "1 results of requests that" in invoke(source, output, *FIXED).output
    assert output.read_bytes() == before
    ran = invoke(source, output, *FIXED, "--restart")
    assert ran.exit_code == 0 and results(output).keys() == {"r1"}


def test_failed_requests_are_answered_again(tmp_path: Path) -> None:
    bad = request("bad", model="demo", prompt="x", temperature=9)
    source = written(tmp_path / "in.jsonl", completion(1), bad)
    output = tmp_path / "out.jsonl"
    assert invoke(source, output, *FIXED).exit_code == 0
    good = results(output)["r1"]
    written(source, completion(1), {**bad, "body": {"prompt": "x", "max_tokens": 2}})
    ran = invoke(source, output, *FIXED, "--retry-failed")
    assert ran.exit_code == 0 and "failed: 0" in ran.output
    assert results(output)["r1"] == good
    assert results(output)["bad"]["response"]["status_code"] == 200


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: expected an object"),
        ({"custom_id": "x"}, "line 2: method is missing"),
        ({**completion(2), "more": 1}, "line 2: unknown key 'more'"),
        ({**completion(2), "custom_id": 3}, "line 2: custom_id must be"),
        ({**completion(2), "custom_id": "\ud800"}, "line 2: custom_id must be"),
        ({**completion(2), "method": "GET"}, "line 2: method must be POST"),
        ({**completion(2), "url": "/v1/files"}, "line 2: url must be one of"),
        ({**completion(2), "body": "x"}, "line 2: body must be an object"),
        (completion(1), "line 2: the custom_id 'r1' occurred before"),
    ],
)
def test_an_input_with_a_wrong_line_is_refused(tmp_path: Path, line: Any, words: str) -> None:
    source = tmp_path / "in.jsonl"
    second = line if isinstance(line, str) else json.dumps(line)
    source.write_text(f"{json.dumps(completion(1))}\n{second}\n")
    output = tmp_path / "out.jsonl"
    ran = invoke(source, output, *FIXED)
    assert ran.exit_code == 1 and words in ran.output
    assert not _size(output)


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", completion(1))
    output = tmp_path / "notes.txt"
    output.write_text("my notes\nmore\n")
    ran = invoke(source, output, *FIXED)
    assert ran.exit_code == 1 and "is no result of a batch" in ran.output
    assert output.read_text() == "my notes\nmore\n"
    assert invoke(source, source, *FIXED).exit_code == 2
    assert invoke(tmp_path / "none.jsonl", output).exit_code == 2
    assert "has no requests" in invoke(written(tmp_path / "empty.jsonl"), tmp_path / "x.jsonl").output


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", completion(1))
    output = tmp_path / "out.jsonl"
    with BatchResults.opened(output):
        ran = invoke(source, output, *FIXED)
    assert ran.exit_code == 1 and "another process holds" in ran.output


def test_a_model_that_cannot_be_loaded_ends_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mpt", "architectures": ["MptForCausalLM"]}')
    source = written(tmp_path / "in.jsonl", completion(1))
    ran = invoke(source, tmp_path / "out.jsonl", "-m", folder, *FIXED)
    assert ran.exit_code == 1 and not _size(tmp_path / "out.jsonl")


def test_another_adapter_is_another_model(tmp_path: Path) -> None:
    """Its files, not its path, decide whether a run continues."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"1")
    entry = ModelEntry("tuned", None, ModelKind.GENERATE, adapter=str(folder))

    def decisive() -> str:
        return batch_models.decisive([entry], batch_models.BatchModelOptions(), DownloadOptions())

    first = decisive()
    assert first == decisive()
    (folder / "adapter_model.safetensors").write_bytes(b"2")
    assert first != decisive()


# ---------------------------------------------------------------------------- the files


def line_of(name: str) -> dict[str, Any]:
    response = {"status_code": 200, "request_id": "r", "body": {"text": "ä" * 40}}
    return {"id": f"batch_req_{name}", "custom_id": name, "response": response, "error": None}


def cuts(content: bytes) -> Iterator[int]:
    """Every length at which a write may have been torn."""
    return iter(range(len(content) + 1))


def test_a_result_torn_at_any_byte_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with BatchResults.opened(path) as found:
        found.append([line_of("a"), line_of("b")])
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    for length in cuts(content):
        path.write_bytes(content[:length])
        with BatchResults.opened(path) as found:
            whole = 2 if length == len(content) else 1 if length >= first else 0
            assert len(found.done) == whole
            found.append([line_of("c")])
        assert results(path).keys() == {*["a", "b"][:whole], "c"}


def test_a_result_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with BatchResults.opened(path) as found:
        found.append([line_of("a")])
        with pytest.raises(ValueError, match="two results of 'a'"):
            found.append([line_of("a")])
    assert results(path).keys() == {"a"}
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match="two results of 'a'"), BatchResults.opened(path):
        pass


def test_every_group_is_flushed_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), real(fd))[1])
    path = tmp_path / "out.jsonl"
    with BatchResults.opened(path) as found:
        found.append([line_of("a"), line_of("b")])
        assert synced[-1] == path.stat().st_size > 0
