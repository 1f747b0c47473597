"""Folders of MLX: 2 to 8 bits, forms by module, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlx_files import declared, quantised
from safetensors.torch import load_file, save_file
from test_gptq_awq import check, tiny
from tiny_families import randomised

import monoblock
from monoblock import AutoModelForCausalLM
from monoblock.cli.info import describe
from monoblock.cli.options import DownloadOptions
from monoblock.errors import CheckpointError, ShapeMismatch, UnsupportedConfig

torch.set_num_threads(1)

IDS = torch.arange(3, 15)[None]


def write(
    folder: Path,
    *,
    bits: int = 4,
    group: int = 64,
    dtype: torch.dtype = torch.float16,
    forms: dict[str, Any] | None = None,
    left: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """A tiny Mistral with all matrices quantised, embedding and head included. `forms`: bits of modules by the last
    component; `left`: modules that are not quantised."""
    model = randomised(tiny("mistral")).to(dtype)
    model.save_pretrained(folder)
    tensors, expected, own = load_file(folder / "model.safetensors"), {}, {}
    for seed, name in enumerate(sorted(n for n, x in tensors.items() if x.dim() == 2)):
        stem = name.removesuffix(".weight")
        leaf = stem.rpartition(".")[2]
        if leaf in left:
            own[stem] = False
            continue
        form = (forms or {}).get(leaf, bits)
        if form != bits:
            own[stem] = {"group_size": group, "bits": form}
        made, expected[stem] = quantised(
            *tensors.pop(name).shape, bits=form, group=group, dtype=dtype, seed=seed
        )
        tensors |= {f"{stem}.{end}": tensor for end, tensor in made.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | declared(bits, group, **own)))
    return expected


@pytest.mark.parametrize(
    ("bits", "group", "dtype"),
    [
        (4, 64, torch.float16),
        (4, 32, torch.bfloat16),
        (4, 128, torch.float32),
        (8, 64, torch.bfloat16),
        (8, 32, torch.float16),
        (2, 64, torch.float16),
        (3, 64, torch.float16),
        (5, 32, torch.bfloat16),
        (6, 128, torch.float16),
    ],
)
@torch.no_grad()
def test_weights(bits: int, group: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """All are kept packed, with the same numbers."""
    expected = write(tmp_path / "a", bits=bits, group=group, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    check(model, expected)
    how = model.quantization_config
    assert (how.source, how.bits, how.group_size) == ("mlx", 4 if bits <= 4 else 8, group)
    tokens = model.generate(IDS, max_new_tokens=3)
    assert "by MLX" in describe(str(tmp_path / "a"), DownloadOptions())["quantization"]["summary"]
    # Saved in this library's format.
    model.save_pretrained(tmp_path / "b")
    assert "quantization" not in json.loads((tmp_path / "b" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    check(again, expected)
    assert torch.equal(again.generate(IDS, max_new_tokens=3), tokens)


@torch.no_grad()
def test_forms_by_module(tmp_path: Path) -> None:
    """v in 6 bits beside q and k in 4: all three are kept in 8 bits."""
    expected = write(tmp_path, forms={"v_proj": 6, "lm_head": 8, "down_proj": 3})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    check(model, expected)
    layer = model.model.layers[0]
    kept = [layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.down_proj, model.lm_head]
    assert [module.quantized.bits for module in kept] == [8, 8, 4, 8]


@torch.no_grad()
def test_beside_an_unquantised_matrix(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = write(tmp_path, left=("v_proj", "embed_tokens"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "fused with one that is not quantised" in caplog.text
    for name in ("q_proj", "k_proj"):
        weight = expected.pop(f"model.layers.0.self_attn.{name}")
        found = model.model.layers[0].self_attn.get_submodule(name).weight
        assert torch.equal(found, torch.from_numpy(weight).bfloat16())
    del expected["model.layers.1.self_attn.q_proj"], expected["model.layers.1.self_attn.k_proj"]
    check(model, expected)


def damaged(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "mlx"})


STEM = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.pop(f"{STEM}.biases"), CheckpointError, "biases"),
        (lambda t: t.pop(f"{STEM}.weight"), CheckpointError, "lacks"),
        (
            lambda t: t.update({f"{STEM}.scales": t[f"{STEM}.scales"][:, :-1].clone()}),
            ShapeMismatch,
            "layout",
        ),
        (lambda t: t.update({f"{STEM}.weight": t[f"{STEM}.weight"].view(torch.int32)}), ShapeMismatch, "I32"),
        (lambda t: t[f"{STEM}.scales"].fill_(float("nan")), CheckpointError, "not finite"),
        (lambda t: t[f"{STEM}.biases"].fill_(float("inf")), CheckpointError, "not finite"),
    ],
    ids=["no-biases", "no-weight", "groups", "dtype", "nan", "inf"],
)
def test_damage(change: Any, error: type[Exception], words: str, tmp_path: Path) -> None:
    write(tmp_path)
    damaged(tmp_path, change)
    with pytest.raises(error, match=words) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "down_proj" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 7}, "bits=7"),
        ({"group_size": 48}, "group_size=48"),
        ({"mode": "mxfp4"}, "mode='mxfp4'"),
        ({"model.norm": {"bits": 4}}, r"model\.norm\.group_size=None"),
        ({"trellis": 3}, "trellis=3"),
    ],
)
def test_declarations_that_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization"] |= change
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedConfig, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_other_declarations_and_readers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without the declaration, with another tool's, and where packed matrices are not read."""
    from monoblock.checkpoint import quantized
    from monoblock.checkpoint.hub import find_weights
    from monoblock.checkpoint.store import open_store

    write(tmp_path / "a", dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        assert (
            monoblock.AutoConfig.from_pretrained(tmp_path / "a").quantization_config["quant_method"] == "mlx"
        )
    assert "quantization" not in caplog.text
    with pytest.raises(CheckpointError, match="only the PyTorch classes read"):
        quantized.refuse(open_store(find_weights(tmp_path / "a"), "np"))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    how = config.pop("quantization")
    del config["quantization_config"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="as MLX writes them"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    both = {"quantization": how, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | both))
    with pytest.raises(UnsupportedConfig, match="quantization"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")
