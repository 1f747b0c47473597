"""The examples of docs/serving.md, run against a server with the embedded demo."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import server_models
from documents import DOCS, blocks, run
from live_server import LiveServer, live

from monoblock import demo

PAGE = DOCS / "serving.md"
ADDRESS = "http://127.0.0.1:8000"
PYTHON = blocks(PAGE, "python")
SHELL = "\n".join(blocks(PAGE, "sh")).replace("\\\n", " ").splitlines()
# What is not installed with the tests: `make test-ecosystem` has tests of these clients.
CLIENTS = ("langchain_openai",)


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live(None) as server:
        yield server


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return server_models.vector_model(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.strip().splitlines()[0])
def test_python_examples(code: str, server: LiveServer, vectors: Path, tmp_path: Path) -> None:
    if missing := [name for name in CLIENTS if name in code and importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {missing[0]}")
    code = code.replace(ADDRESS, server.url).replace("my-model", str(demo.path())).replace("* 1000", "* 3")
    code = code.replace("sentence-transformers/all-mpnet-base-v2", str(vectors))
    code = re.sub(r'cache_memory="\w+"', 'cache_memory="32MB"', code)
    head = "" if "import LLM" in code or "LLM(" not in code else "from monoblock import LLM\n"
    run(["python", "-c", head + code], tmp_path)


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("curl ")])
def test_curl_examples(line: str, server: LiveServer) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    words = shlex.split(line.replace(ADDRESS, server.url))
    command = ["curl", "-sS", "--fail-with-body", "--noproxy", "*", *words[1:]]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    if "stream" in line:
        assert answer.stdout.endswith("data: [DONE]\n\n")
    else:
        assert "error" not in json.loads(answer.stdout)


def test_the_batch_example(tmp_path: Path) -> None:
    [line] = re.findall(r"^```json\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "requests.jsonl").write_text(line)
    [command] = [line for line in SHELL if line.startswith("monoblock batch")]
    run(shlex.split(command.replace("my-model", str(demo.path()))), tmp_path)
    found: dict[str, Any] = json.loads((tmp_path / "results.jsonl").read_text())
    assert (found["custom_id"], found["response"]["status_code"]) == ("1", 200)


def test_all_kinds_of_examples_were_found() -> None:
    assert len(PYTHON) >= 4
    assert {line.split()[0] for line in SHELL if line} >= {"pip", "monoblock", "curl", "lm-eval"}
