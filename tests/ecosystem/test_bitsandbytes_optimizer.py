"""AdamW in 8 bits beside bitsandbytes' AdamW8bit on a CPU, over adapters too."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import pytest
import torch
import training_runs
from bitsandbytes.functional import create_dynamic_map
from safetensors.torch import load_file
from training_runs import jsonl, losses, sentences

from monoblock.backends.pytorch.training import eight_bit
from monoblock.backends.pytorch.training.eight_bit import QuantizedMoments
from monoblock.backends.pytorch.training.optimizer import Optimizer
from monoblock.training import Trainer, TrainingOptions

torch.set_num_threads(1)


@pytest.mark.parametrize("signed", [True, False])
def test_levels(signed: bool) -> None:
    theirs = create_dynamic_map(signed=signed)
    ours = eight_bit.tables(signed, torch.device("cpu")).levels
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=2e-7)


def test_steps() -> None:
    """Over 20 steps in float32: the same weights in the mean within a tenth of their distance to AdamW's in float32,
    and nearly all codes. bitsandbytes rounds halfway between levels another way, and small squares to zero."""
    torch.manual_seed(0)
    ours, theirs, exact = (torch.nn.Parameter(torch.ones(96, 128)) for _ in range(3))
    optimizer = Optimizer({"matrix": ours}, TrainingOptions(optimizer="adamw_8bit", weight_decay=0.1))
    others = [
        bitsandbytes.optim.AdamW8bit([theirs], lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW([exact], lr=1e-2, weight_decay=0.1),
    ]
    for step in range(20):
        gradient = torch.randn(96, 128)
        for parameter in (ours, theirs, exact):
            parameter.grad = gradient.clone()
        optimizer.step(1e-2)
        for other in others:
            other.step()
        if step == 0:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    moments, state = optimizer.moments["matrix"], others[0].state[theirs]
    assert isinstance(moments, QuantizedMoments)
    assert (moments.exp_avg != state["state1"]).float().mean() < 0.05
    assert (moments.exp_avg_sq != state["state2"]).float().mean() < 0.05
    torch.testing.assert_close(moments.exp_avg_sq_scale, state["absmax2"], atol=0, rtol=0.01)
    error = (ours - exact).abs().mean()
    assert (ours - theirs).abs().mean() < 0.1 * error
    assert error < 1.1 * (theirs - exact).abs().mean()


def test_a_killed_run_of_an_adapter_resumes(tmp_path: Path) -> None:
    """Of QLoRA whose adapter's matrices have more than 4096 values."""
    model = training_runs.folder(tmp_path / "model", "MistralForCausalLM")
    data = jsonl(tmp_path / "data.jsonl", ({"text": text} for text in sentences(60)))
    base = {"lora_rank": 128, "quantize": "int4", "optimizer": "adamw_8bit", "save_every": 1, "max_steps": 10}
    Trainer(training_runs.options(model, data, tmp_path / "whole", **base)).train()
    options = training_runs.options(model, data, tmp_path / "broken", **base)
    training_runs.run_killed(options, tmp_path, 4)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    found = losses(tmp_path / "whole")
    assert found == losses(tmp_path / "broken") and found[-1] < found[0]
    stored = load_file(tmp_path / "whole" / "checkpoints" / "step-10" / "training" / "model.safetensors")
    assert any(key.endswith("exp_avg_scale") for key in stored)
