"""Tensor parallelism on two processes computes what one process does, for every class of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomised
from mpt_cases import CASES
from tiny_families import KIND, MODEL_TYPES, fields, labels_of, model_inputs, with_images
from torch_multiprocess import in_processes, write_case

import monoblock
from monoblock.families import family_of

WORLD = 2
# Relative to the largest value, fp32: sums over the processes are in another order. Measured at most 2e-6.
TOLERANCE = 1e-5
BFLOAT16 = 2**-5  # 8 units of its last bit, of weights compressed without loss; measured 1.3e-2
MPT = ("qk_ln with bias", "qk_gn, grouped", "qk_ln, grouped", "all at once")
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 99,
}


def made(name: str, **more: Any) -> Any:
    model_type = MODEL_TYPES[name]
    return randomised(
        getattr(monoblock, name)(family_of(name).config(**fields(model_type, 8, **more))).eval()
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for name in CLASSES_HERE:
        ids, mask = model_inputs(name)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if KIND[name] not in (None, "pooler"):
            inputs |= labels_of(name, ids, mask)
        more = {"tie_word_embeddings": False} if name == "GPTNeoForCausalLM" else {}
        write_case(folder / name, made(name, **more), inputs, save=name in SAVED)
    for name in MPT:
        attention, more = CASES[name]
        ids, mask = model_inputs("MptForCausalLM")
        config = {"n_heads": 4, **more, "n_layers": 1, "attn_config": attention}
        model = made("MptForCausalLM", **{"d_model": 32, **config})
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels_of("MptForCausalLM", ids, mask)["labels"],
        }
        write_case(folder / name.replace(" ", "_"), model, inputs, save=name == "all at once")
    ids, mask, patches, indices = with_images((3, 6))
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "image_patches": patches,
        "image_patches_indices": indices,
    }
    write_case(folder / "images", made("FuyuForCausalLM"), inputs)
    wide = randomised(monoblock.MistralForCausalLM(monoblock.MistralConfig(**WIDE)).eval())
    ids = torch.arange(24).reshape(2, 12) + 5
    for how in ("int8", "int4", "lossless"):
        options = {"quantization_config": how, **({"dtype": "bfloat16"} if how == "lossless" else {})}
        write_case(folder / how, wide, {"input_ids": ids}, gradients=False, **options)
    write_case(folder / "refused", made("MistralForCausalLM"), {"input_ids": ids})
    case = torch.load(folder / "refused" / "case.pt")
    torch.save({**case, "options": {"quantization_config": "int8"}}, folder / "refused" / "case.pt")
    results = in_processes(folder, WORLD)
    return {"folder": folder, "ranks": results}


SAVED = ("MptForCausalLM", "FuyuForCausalLM", "OpenAIGPTDoubleHeadsModel", "MPNetForMaskedLM")
# The language models of all families, and all heads of two; tests/distributed has the others.
CLASSES_HERE = [
    name
    for name, kind in KIND.items()
    if kind in ("causal", "masked", "double")
    or (kind is not None and MODEL_TYPES[name] in ("mistral", "mpnet"))
]
ALL = [*CLASSES_HERE, *(name.replace(" ", "_") for name in MPT), "images"]


@pytest.mark.parametrize("name", ALL)
def test_outputs_gradients_and_tokens_equal_those_of_one_process(found: dict[str, Any], name: str) -> None:
    for result in found["ranks"]:
        case = dict(result[name])
        assert "error" not in case, case
        assert case.pop("tokens", True)
        assert not case.pop("missing gradients", [])
        size, path = case.pop("bytes"), case.pop("path")
        assert "tp_plan: 2 processes" in path or "predicts no next token" in path, path
        whole = sum(file.stat().st_size for file in (found["folder"] / name).glob("model.safetensors"))
        assert size < 0.95 * whole
        for what, value in case.items():
            assert value <= TOLERANCE, what


@pytest.mark.parametrize("how", ["int8", "int4", "lossless"])
def test_quantised_shards(found: dict[str, Any], how: str) -> None:
    for result in found["ranks"]:
        assert "error" not in result[how], result[how]
        assert result[how]["logits"] <= (BFLOAT16 if how == "lossless" else TOLERANCE)
        assert how == "lossless" or result[how]["tokens"]


def test_groups_that_do_not_divide_are_refused(found: dict[str, Any]) -> None:
    for result in found["ranks"]:
        assert "groups of 128: a shard of the attention output has 40 inputs" in result["refused"]["error"]


@pytest.mark.parametrize("name", [*SAVED, "all_at_once"])
def test_saved_files_equal_those_of_the_whole_model(found: dict[str, Any], name: str) -> None:
    folder: Path = found["folder"] / name
    assert len(list((folder / "saved").glob("model-*.safetensors"))) > 1
    cls = getattr(monoblock, name if name in MODEL_TYPES else "MptForCausalLM")
    one, other = (cls.from_pretrained(path).state_dict() for path in (folder, folder / "saved"))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def test_without_torchrun_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="start the program by `torchrun"):
        monoblock.MistralForCausalLM.from_pretrained(tmp_path, tp_plan="auto")
    with pytest.raises(ValueError, match="tp_plan='rows' is not supported: 'auto'"):
        monoblock.MistralForCausalLM.from_pretrained(tmp_path, tp_plan="rows")
    with pytest.raises(ValueError, match="leave device_map out"):
        monoblock.MistralForCausalLM.from_pretrained(tmp_path, tp_plan="auto", device_map="cpu")
    with pytest.raises(ValueError, match="tp_size is for sharded models"):
        monoblock.MistralForCausalLM.from_pretrained(tmp_path, tp_size=2)
