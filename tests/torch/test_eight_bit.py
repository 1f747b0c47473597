"""AdamW with moments in 8 bits: the error of one step, the loss curve, memory, files, and resuming."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs
from safetensors.torch import load_file
from test_training_resume import assert_same
from training_runs import Signal, jsonl, losses, sentences

from monoblock.backends.pytorch.training import eight_bit
from monoblock.backends.pytorch.training import optimizer as optimizer_module
from monoblock.backends.pytorch.training.eight_bit import BLOCK, QuantizedMoments, dequantized, quantized
from monoblock.backends.pytorch.training.optimizer import Optimizer
from monoblock.errors import CheckpointError
from monoblock.training import Trainer, TrainingOptions

torch.set_num_threads(1)

OPTIONS = TrainingOptions(optimizer="adamw_8bit", weight_decay=0.1)
# Matrices of more than 4096 values, whose moments are quantised.
WIDE: dict[str, Any] = {"hidden_size": 96, "num_heads": 6, "intermediate_size": 192}


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_the_nearest_levels(signed: bool) -> None:
    """For values of all decades, midpoints of levels and their neighbours; the last block is not full. Squares that are
    nearest to zero have the level above it."""
    torch.manual_seed(0)
    levels, upper, _ = eight_bit.tables(signed, torch.device("cpu"))
    assert len(levels) == 256 and float(levels[-1]) == 1 and bool((levels.diff() > 0).all())
    middles = upper[:-1]
    ends = torch.full_like(middles, torch.inf)
    near = torch.cat((middles, middles.nextafter(ends), middles.nextafter(-ends)))
    values = torch.cat((torch.randn(5000) * 10 ** torch.linspace(-8, 0, 5000), near))
    values = values.clamp(-1, 1) if signed else values.abs().clamp(max=1)
    values = values[: 21 * BLOCK - 100]
    values[::BLOCK] = 1.0  # so that the scale of each block is 1
    codes, scale = quantized(values, signed=signed)
    assert codes.dtype == torch.uint8 and scale.tolist() == [1.0] * 21
    found = dequantized(codes, scale, signed=signed)
    least = (values[:, None].double() - levels.double()).abs().amin(1)
    above = torch.zeros_like(values, dtype=torch.bool) if signed else (values > 0) & (values < upper[0])
    assert bool(above.any()) is not signed and torch.equal(found[above], levels[1].expand(int(above.sum())))
    # Midpoints are rounded to float32: by a unit in 2^24 of a value, which is up to 140 times half a distance.
    assert bool(((found.double() - values).abs() <= least * (1 + 2e-5))[~above].all())


def test_blocks_have_scales_of_their_own() -> None:
    values = torch.cat((torch.zeros(BLOCK), torch.full((BLOCK,), 1e-30), torch.tensor([3e8, -3e8])))
    found = dequantized(*quantized(values, signed=True), signed=True)
    # the level next to -1 is 1 / 140 away
    torch.testing.assert_close(found, values, rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_that_of_adamw_from_the_stored_moments(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only error is that of storing the moments: at most half the distance of two levels, times the block's scale.
    For matrices in both memory layouts and a vector, in several chunks."""
    monkeypatch.setattr(optimizer_module, "SLICE", 4 * BLOCK)
    torch.manual_seed(0)
    shapes = {"matrix": (70, 70), "table": (8191,), "small": (50,)}
    ours = {n: torch.nn.Parameter(torch.randn(s).to(dtype)) for n, s in shapes.items()}
    ours["transposed"] = torch.nn.Parameter(torch.randn(80, 60).to(dtype).t())
    optimizer = Optimizer(ours, OPTIONS)
    for _ in range(4):
        theirs = {n: torch.nn.Parameter(p.detach().clone().contiguous()) for n, p in ours.items()}
        exact = Optimizer(theirs, TrainingOptions(weight_decay=0.1))
        state = optimizer.state()
        for name, held in optimizer.moments.items():
            if isinstance(held, QuantizedMoments):
                state = {k: x for k, x in state.items() if not k.startswith(f"{name}/exp")}
                for part, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                    codes, scale = getattr(held, part), getattr(held, f"{part}_scale")
                    values = dequantized(codes.view(-1), scale, signed=signed)
                    state[f"{name}/{part}"] = values.view(ours[name].shape).clone()
        if state:
            exact.restore({key: x.clone() for key, x in state.items()})
        for name in ours:
            gradient = torch.randn(ours[name].shape) * 10 ** torch.linspace(-3, 0, 70).repeat(200)[
                : ours[name].numel()
            ].view(ours[name].shape)
            ours[name].grad, theirs[name].grad = gradient.to(dtype), gradient.to(dtype)
        optimizer.step(1e-2)
        exact.step(1e-2)
        for name in ours:  # PyTorch's vectorised loop rounds its remainder otherwise
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-7, rtol=1e-6)
        assert not isinstance(optimizer.moments["small"], QuantizedMoments)
        for name in ("matrix", "table", "transposed"):
            stored, after = optimizer.moments[name], exact.moments[name]
            assert isinstance(stored, QuantizedMoments) and stored.exp_avg.dtype == torch.uint8
            assert torch.equal(stored.step, after.step)
            for part, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                scale = getattr(stored, f"{part}_scale")
                found = dequantized(getattr(stored, part).view(-1), scale, signed=signed)
                error = (found - getattr(after, part).view(-1)).abs()
                each = scale.repeat_interleave(BLOCK)[: len(error)]
                widest = float(eight_bit.tables(signed, error.device).levels.diff().max())
                assert bool((error <= each * (widest / 2) * (1 + 1e-5)).all())


def test_a_square_that_is_nearest_to_zero_makes_no_long_step() -> None:
    """Values whose gradients are a ten thousandth of their block's largest, and then zero: their squares are below the
    least level. AdamW's steps are at most 3.2 learning rates; those here are none longer."""
    gradient = torch.full((16, BLOCK), 1e-4)
    gradient[:, 0] = 1.0
    parameter = torch.nn.Parameter(torch.zeros(16, BLOCK))
    optimizer = Optimizer({"matrix": parameter}, TrainingOptions(optimizer="adamw_8bit", weight_decay=0.0))
    for step in range(6):
        before = parameter.detach().clone()
        parameter.grad = gradient if step < 3 else torch.zeros_like(gradient)
        optimizer.step(1e-3)
        assert (parameter.detach() - before).abs().max() < 3.2e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("model")
    return training_runs.folder(at, "GPTNeoForCausalLM", embed_dropout=0.1, **WIDE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", ({"text": text} for text in sentences(60)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_curve_is_that_of_adamw(dtype: str, model: Path, data: Path, tmp_path: Path) -> None:
    """Over 50 steps, in which the loss falls by more than one. A moment's error is at most 0.7% (1.4% of a square's
    largest) of its block's scale: steps differ by a few percent in length, and the losses by less than 2% of what they
    fall. The moments in the checkpoint take a quarter."""
    sizes: dict[str, int] = {}
    for name in ("adamw", "adamw_8bit"):
        given = {"max_steps": 50, "optimizer": name, "dtype": dtype}
        Trainer(training_runs.options(model, data, tmp_path / name, **given)).train()
        stored = load_file(tmp_path / name / "checkpoints" / "step-50" / "training" / "model.safetensors")
        large = {key for key, x in stored.items() if x.numel() >= eight_bit.LEAST and "/exp" in key}
        large |= {key for key in stored if key.endswith("_scale")}
        sizes[name] = sum(stored[key].nbytes for key in large)
    exact, found = losses(tmp_path / "adamw"), losses(tmp_path / "adamw_8bit")
    fall = exact[0] - exact[-1]
    assert fall > 1
    assert max(abs(a - b) for a, b in zip(exact, found, strict=True)) < 0.02 * fall
    assert exact != found
    # 4 bytes in 256 more, and blocks that are not full
    assert 0.25 < sizes["adamw_8bit"] / sizes["adamw"] < 0.26


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_run_resumes(dtype: str, model: Path, data: Path, tmp_path: Path) -> None:
    """Ended by a signal in float32, killed at random times in bfloat16; the weights are the same bit for bit."""
    base = {"max_steps": 8, "optimizer": "adamw_8bit", "dtype": dtype, "save_every": 1}
    Trainer(training_runs.options(model, data, tmp_path / "whole", **base)).train()
    options = training_runs.options(model, data, tmp_path / "broken", **base)
    if dtype == "float32":
        Trainer(options).train(show=Signal(4, signal.SIGTERM))
        assert Trainer(options).train(resume=True).interrupted is None
    else:
        assert training_runs.run_killed(options, tmp_path, 2) >= 1
    assert_same(tmp_path / "whole", tmp_path / "broken")
    with pytest.raises(ValueError, match="was written with optimizer='adamw_8bit', not 'adamw'"):
        Trainer(options.changed({"optimizer": "adamw"})).train(resume=True)


def test_states_of_another_form_are_refused() -> None:
    parameters = {"matrix": torch.nn.Parameter(torch.zeros(64, 64))}
    stored: dict[str, Optimizer] = {}
    for name in ("adamw", "adamw_8bit"):
        stored[name] = Optimizer(parameters, TrainingOptions(optimizer=name))
        parameters["matrix"].grad = torch.ones(64, 64)
        stored[name].step(1e-3)
    with pytest.raises(CheckpointError, match=r"is \(64, 64\) of torch.uint8, expected .* of torch.float32"):
        stored["adamw"].restore(stored["adamw_8bit"].state())
    with pytest.raises(CheckpointError, match=r"is \(64, 64\) of torch.float32, expected .* of torch.uint8"):
        stored["adamw_8bit"].restore(stored["adamw"].state())
    broken = {key: x[:-1] if key.endswith("_scale") else x for key, x in stored["adamw_8bit"].state().items()}
    with pytest.raises(
        CheckpointError, match=r"exp_avg_scale' is \(15,\) of torch.float32, expected \(16,\)"
    ):
        stored["adamw_8bit"].restore(broken)


@pytest.mark.parametrize(
    ("problem", "given"),
    [
        ("parallel=fsdp does not divide the states of optimizer=adamw_8bit", {"parallel": "fsdp"}),
        ("tensor_parallel=2 does not divide the states of optimizer", {"tensor_parallel": 2}),
        ("optimizer needs framework=pt", {"framework": "flax"}),
        ("optimizer must be one of adamw, adamw_8bit, got 'sgd'", {"optimizer": "sgd"}),
    ],
)
def test_what_is_refused(problem: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=problem):
        TrainingOptions(**{"optimizer": "adamw_8bit", **given})
    assert not TrainingOptions(optimizer="adamw_8bit").divides_weights  # several processes have copies
