"""The examples of docs/convert.md, run on tiny checkpoints with the names that they use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import upstream_releases
from helpers import model, randomised

import monoblock
from monoblock.conversion.convert import Options, convert

PAGE = Path(__file__).parents[2] / "docs" / "convert.md"


def blocks(language: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a Mistral release, Fuyu's archive and an MPT of the hub, tiny and under the page's names."""
    hub = upstream_releases.saved(upstream_releases.mistral(), tmp_path / "source")
    convert(hub, tmp_path / "mistral-7B-v0.1", Options(target_format="mistral"))
    convert(hub, tmp_path / "given", Options(target_format="mistral"))
    sizes = {"vocab_size": 67, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    config = monoblock.FuyuConfig(**sizes, num_attention_heads=3, patch_size=4)
    fuyu = upstream_releases.fuyu_release(tmp_path / "fuyu", randomised(monoblock.FuyuForCausalLM(config)))
    with tarfile.open(tmp_path / "fuyu-8b-model-weights.tar", "w") as archive:
        archive.add(fuyu, "8b_base_model_release")
    upstream_releases.saved(model(), tmp_path / "mosaicml" / "mpt-7b")
    return tmp_path


def test_commands(here: Path) -> None:
    env = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    script = "\n".join(blocks("sh"))
    assert script.count("monoblock convert") > 4
    done = subprocess.run(
        ["bash", "-euc", script], cwd=here, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_python_example(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "given").rename(here / "release")
    monkeypatch.chdir(here)
    for code in blocks("python"):
        exec(code, {})
    assert (here / "hub-folder" / "model.safetensors").exists()
