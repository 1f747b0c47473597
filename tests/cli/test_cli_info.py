"""`monoblock info`: reads configs and tensor headers, without a framework."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from v4_checkpoints import FOLDER

from monoblock import AutoConfig, MptConfig, MptForCausalLM, native
from monoblock.checkpoint.header import make_header
from monoblock.checkpoint.hub import find_weights
from monoblock.cli import info
from monoblock.cli.options import DownloadOptions
from monoblock.errors import HubError

CONFIG = {
    "model_type": "mpt",
    "architectures": ["MPTForCausalLM"],  # llm-foundry's spelling
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 3,
    "vocab_size": 100,
    "max_seq_len": 128,
}
# embedding + 3 * (qkv + out + up + down + two norms) + final norm
PARAMETERS = 100 * 64 + 3 * (3 * 64 * 64 + 64 * 64 + 2 * 4 * 64 * 64 + 2 * 64) + 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    header, _ = make_header([("transformer.wte.weight", "BF16", (100, 64))], {"format": "pt"})
    (tmp_path / "model.safetensors").write_bytes(header + bytes(2 * 100 * 64))
    return tmp_path


def run(*args: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-m", "monoblock.cli", "info", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_json(folder: Path) -> None:
    found = json.loads(run(str(folder), "--json").stdout)
    assert found["family"] == "mpt"
    assert found["parameters"] == PARAMETERS
    assert found["memory"] == {
        "float32": PARAMETERS * 4,
        "bfloat16": PARAMETERS * 2,
        "int8": PARAMETERS,
        "int4": PARAMETERS // 2,
    }
    assert found["cache_per_token"] == {"float32": 2 * 64 * 3 * 4, "bfloat16": 2 * 64 * 3 * 2}
    assert found["stored"] == {"BF16": 6400}
    assert set(found["files"]) == {"config.json", "model.safetensors"}
    assert found["spec"]["attention"]["head_dim"] == 16
    assert found["spec"]["positions"] == [{"type": "Alibi", "bias_max": 8}]


def test_plain_lines_in_a_pipe(folder: Path) -> None:
    result = run(str(folder))
    assert result.returncode == 0
    assert f"parameters: {PARAMETERS:,} (154 K)" in result.stdout
    assert "weights in bfloat16: 301.38 KiB" in result.stdout
    assert "  head_dim: 16" in result.stdout
    assert "\x1b" not in result.stdout


def test_imports_no_framework(folder: Path) -> None:
    report = run(str(folder), options=("-X", "importtime")).stderr
    imported = {line.rpartition("|")[2].strip() for line in report.splitlines()}
    assert "monoblock.config" in imported  # the report was parsed
    assert not imported & {"torch", "jax", "tensorflow", "numpy", "huggingface_hub"}


def test_cache_size_with_grouped_query_attention(folder: Path) -> None:
    attn = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"attn_config": attn}))
    assert info.describe(str(folder), DownloadOptions())["cache_per_token"]["float32"] == 2 * 2 * 16 * 3 * 4


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "abc"}'), "'abc'"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" + bytes(20)), "model.safetensors"),
    ],
)
def test_errors_are_one_line(folder: Path, corrupt: Any, message: str) -> None:
    corrupt(folder)
    result = run(str(folder))
    assert result.returncode == 1
    assert result.stderr.startswith("monoblock: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert result.stdout == ""


class Api:
    """Replaces huggingface_hub.HfApi."""

    def __init__(self, token: str | None) -> None:
        assert token == "secret"

    def model_info(self, name: str, revision: str, files_metadata: bool) -> Any:
        assert (name, revision, files_metadata) == ("someone/model", "v1", True)
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename="model.safetensors", size=12800)])

    def get_safetensors_metadata(self, name: str, revision: str) -> Any:
        assert (name, revision) == ("someone/model", "v1")
        return SimpleNamespace(parameter_count={"BF16": 6400})


def test_models_on_the_hub_are_described_from_headers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    import monoblock

    config = monoblock.AutoConfig.from_pretrained(folder)
    monkeypatch.setattr(monoblock.AutoConfig, "from_pretrained", staticmethod(lambda *_, **__: config))
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    found = info.describe("someone/model", DownloadOptions(revision="v1", token="secret"))
    assert found["files"] == {"model.safetensors": 12800}
    assert found["stored"] == {"BF16": 6400}
    assert found["parameters"] == PARAMETERS


def test_cached_configs_are_described_offline(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import monoblock

    config = monoblock.AutoConfig.from_pretrained(folder)
    monkeypatch.setattr(monoblock.AutoConfig, "from_pretrained", staticmethod(lambda *_, **__: config))
    found = info.describe("someone/model", DownloadOptions(offline=True))
    assert (found["files"], found["stored"], found["parameters"]) == ({}, None, PARAMETERS)
    assert "cannot be listed" in capsys.readouterr().err


def test_bidirectional_models_have_no_cache(tmp_path: Path) -> None:
    config = {"model_type": "mpnet", "architectures": ["MPNetForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = info.describe(str(tmp_path), DownloadOptions())
    assert found["cache_per_token"] == {}
    layer = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 2 * 2 * 768  # attention, MLP, two norms
    body = (
        30527 * 768 + 512 * 768 + 2 * 768 + 32 * 12 + 12 * layer
    )  # tokens, positions, norm, buckets, layers
    head = 768 * 768 + 3 * 768 + 30527  # dense, norm, bias of the tied matrix
    assert found["parameters"] == body + head


def test_flax_checkpoints_are_counted() -> None:
    found = info.describe(str(FOLDER / "FlaxMistralForCausalLM"), DownloadOptions())
    assert found["stored"] == {"F32": found["parameters"]}


def test_runtime_reports_the_decoding_path() -> None:
    found = json.loads(run("--runtime", "--json").stdout)["runtime"]
    expected = "native step" if found["device"] == "cpu" else "CUDA graph"
    if found["device"] == "cpu" and native.library() is None:
        expected = "native kernels"
    assert expected in found["decoding"]
    assert found["dtype"] == "bfloat16"
    assert found["threads"] > 0
    assert found["native_kernels"] == native.status()
    assert "runtime" not in json.loads(run("--json").stdout)


def test_runtime_reports_why_native_decoding_is_not_used(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    MptForCausalLM(MptConfig.from_pretrained(folder)).double().save_pretrained(folder)
    lines = run(str(folder), "--runtime").stdout.splitlines()
    rows = dict(line.split(": ", 1) for line in lines if ": " in line)
    assert rows["dtype"] == "float64"
    if rows["device"] == "cpu" and native.library() is not None:
        assert rows["decoding"] == "dtype float64"


# --- folders with other files than those of one transformers model -------------------------------------------


def written(folder: Path, name: str, count: int) -> None:
    """A safetensors file with one tensor."""
    header, _ = make_header([(f"tensor of {name}", "F32", (count,))], {"format": "pt"})
    (folder / name).write_bytes(header + bytes(4 * count))


@pytest.mark.parametrize(
    "other", ["consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"]
)
def test_only_weights_that_a_load_reads_are_counted(folder: Path, other: str) -> None:
    written(folder, other, 7)
    found = info.describe(str(folder), DownloadOptions())
    assert found["stored"] == {"BF16": 6400}
    assert found["weights"] == ["model.safetensors"]
    text = run(str(folder)).stdout
    assert f"file {other}: " in text
    assert [line.endswith(", not read") for line in text.splitlines() if f"file {other}" in line] == [True]
    assert "not read" not in next(line for line in text.splitlines() if "file model.safetensors" in line)


def test_shards_are_counted_by_their_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {}
    for i in (1, 2):
        name = f"model-0000{i}-of-00002.safetensors"
        written(folder, name, i)
        index[f"tensor of {name}"] = name
    written(folder, "consolidated.safetensors", 3)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert info.describe(str(folder), DownloadOptions())["stored"] == {"F32": 3}


KINDS = {
    "model-00001-of-00002.safetensors": "but not their index model.safetensors.index.json",
    "pytorch_model-00001-of-00002.bin": "but not their index pytorch_model.bin.index.json",
    "model.fp16.safetensors": "load it with variant='fp16'",
    "model.fp16-00001-of-00002.safetensors": "load it with variant='fp16'",
    "pytorch_model.bf16.bin": "load it with variant='bf16'",
    "consolidated.safetensors": "`monoblock convert`",
    "consolidated.00.pth": "`monoblock convert`",
    "model-Q4_K_M.gguf": "a GGUF file (model-Q4_K_M.gguf)",
}


@pytest.mark.parametrize(("name", "message"), KINDS.items())
def test_weights_in_other_formats_are_named(folder: Path, name: str, message: str) -> None:
    """By `info` and by `find_weights`, with and without a config."""
    (folder / "model.safetensors").rename(folder / name)
    result = run("-m", str(folder))
    assert result.returncode == 0
    assert message in next(line for line in result.stdout.splitlines() if line.startswith("stored: "))
    assert json.loads(run(str(folder), "--json").stdout)["stored"] is None
    with pytest.raises(HubError) as error:
        find_weights(folder)
    assert message in str(error.value)
    (folder / "config.json").unlink()
    result = run(str(folder))
    assert (result.returncode, result.stdout) == (1, "")
    assert message in result.stderr


def test_adapter(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "someone/model", "r": 8, "lora_alpha": 16}
    config["target_modules"] = ["q_proj", "v_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    written(tmp_path, "adapter_model.safetensors", 70)
    lines = run("--model", str(tmp_path)).stdout.splitlines()
    assert "adapter: LORA (PEFT), without a base model" in lines
    assert {"base model: someone/model", "rank: 8", "target modules: q_proj, v_proj", "stored: 70 F32"} < {
        *lines
    }
    found = json.loads(run(str(tmp_path), "--json").stdout)
    assert (found["adapter"], found["base"], found["stored"]) == ("LORA", "someone/model", {"F32": 70})
    refused = run(str(tmp_path), "--runtime")
    assert refused.returncode == 1
    assert "give its base model" in refused.stderr
    with pytest.raises(HubError, match="a PEFT adapter"):
        AutoConfig.from_pretrained(tmp_path)


def test_sentence_transformers(folder: Path) -> None:
    (folder / "modules.json").write_text("[]")
    assert "made for: sentence-transformers" in run("-m", str(folder)).stdout
    assert info.describe(str(folder), DownloadOptions())["kind"] == "sentence-transformers"


def test_a_model_given_twice_is_a_usage_error(folder: Path) -> None:
    assert run("-m", str(folder)).stdout == run(str(folder)).stdout
    refused = run(str(folder), "--model", "other")
    assert refused.returncode == 2
    assert "two models are given" in refused.stderr
