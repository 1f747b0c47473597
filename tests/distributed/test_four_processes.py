"""Tensor parallelism on four processes, and two replicas of a model on two processes each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomised
from tiny_families import KIND, MODEL_TYPES, fields, labels_of, model_inputs
from torch_multiprocess import in_processes, write_case

import monoblock
from monoblock.families import family_of

TOLERANCE = 1e-5  # as in tests/torch/test_tensor_parallel.py
NAMES = [name for name, kind in KIND.items() if kind is not None]
# Two replicas of two processes each: by the number, and by a mesh of the caller's.
PAIRS: dict[str, dict[str, Any]] = {"pairs": {"tp_size": 2}, "mesh": {"axes": {"data": 2, "tensor": 2}}}
FSDP = [f"{name} fsdp" for name in NAMES if KIND[name] in ("causal", "masked")]
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 99,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("four")
    for name in NAMES:
        model_type = MODEL_TYPES[name]
        sizes = {} if model_type in ("mpt", "openai-gpt") else {"intermediate_size": 48}
        config = family_of(name).config(**fields(model_type, 8, **sizes))
        model = randomised(getattr(monoblock, name)(config).eval())
        ids, mask = model_inputs(name)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if KIND[name] != "pooler":
            inputs |= labels_of(name, ids, mask)
        write_case(folder / name, model, inputs)
        if KIND[name] in ("causal", "masked"):
            write_case(folder / f"{name} fsdp", model, inputs)
            case = torch.load(folder / f"{name} fsdp" / "case.pt")
            options = {"tp_size": 2, "fsdp": True}
            torch.save({**case, "options": options, "step": True}, folder / f"{name} fsdp" / "case.pt")
        if name == "MistralForCausalLM":
            for what, options in PAIRS.items():
                write_case(folder / what, model, inputs)
                case = torch.load(folder / what / "case.pt")
                torch.save({**case, "options": options}, folder / what / "case.pt")
    wide = randomised(monoblock.MistralForCausalLM(monoblock.MistralConfig(**WIDE)).eval())
    for bits, how in (("int8", 8), ("int4", 4)):
        config = {"bits": how, "group_size": 64}
        inputs = {"input_ids": torch.arange(24).reshape(2, 12) + 5}
        write_case(folder / bits, wide, inputs, gradients=False, quantization_config=config)
    return {"folder": folder, "ranks": in_processes(folder, 4, 400)}


@pytest.mark.parametrize("name", [*NAMES, *PAIRS, *FSDP, "int8", "int4"])
def test_four_processes_compute_what_one_does(results: dict[str, Any], name: str) -> None:
    for result in results["ranks"]:
        case = dict(result[name])
        assert "error" not in case, case
        assert case.pop("tokens", True)
        assert (
            f"tp_plan: {2 if name in (*PAIRS, *FSDP) else 4} processes" in case["path"]
            or "predicts no" in case["path"]
        )
        for what in ("path", "bytes", "missing gradients"):
            case.pop(what, None)
        for what, value in case.items():
            assert value <= TOLERANCE, what


@pytest.mark.parametrize("name", FSDP)
def test_a_step_under_fsdp_and_tensor_parallelism_is_saved_whole(results: dict[str, Any], name: str) -> None:
    """The weights after a step along the clipped gradients, a quarter of the whole ones."""
    folder, cls = results["folder"] / name, getattr(monoblock, name.split()[0])
    before = dict(cls.from_pretrained(folder).named_parameters())
    after = dict(cls.from_pretrained(folder / "saved").named_parameters())
    gradients = torch.load(folder / "case.pt")["expected"]["gradients"]
    for key, value in before.items():
        expected = value - gradients[key] / 4 if key in gradients else value
        torch.testing.assert_close(after[key], expected, atol=TOLERANCE, rtol=TOLERANCE)
