"""Fine-tuning: checkpoints, resuming, signals, and losses that are no numbers."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs
from safetensors.torch import load_file
from training_runs import Signal, jsonl, losses, metrics, sentences

import monoblock
from monoblock.backends.pytorch.training import optimizer as optimizer_module
from monoblock.backends.pytorch.training.optimizer import Optimizer, joined, split
from monoblock.errors import CheckpointError
from monoblock.training import Trainer, TrainingOptions
from monoblock.training.checkpoints import Checkpoints
from monoblock.training.decay import decays

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, so that the random states matter."""
    return training_runs.folder(tmp_path_factory.mktemp("model"), "GPTNeoForCausalLM", embed_dropout=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", ({"text": text} for text in sentences(60)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(one) == losses(other)


@pytest.mark.parametrize(
    ("number", "more"),
    [
        (signal.SIGTERM, {}),
        (signal.SIGINT, {"dtype": "bfloat16"}),
        (signal.SIGINT, {"packing": True, "accumulation": 2}),
    ],
)
def test_a_signal_saves_and_the_run_resumes(
    number: int, more: dict[str, Any], model: Path, data: Path, tmp_path: Path
) -> None:
    """After steps in the first and in the second epoch; the result is that of an unbroken run, bit for bit."""
    base = {"epochs": 3, "eval_fraction": 0.2, "eval_every": 3, **more}
    Trainer(training_runs.options(model, data, tmp_path / "whole", **base)).train()
    handler = signal.getsignal(number)
    broken = training_runs.options(model, data, tmp_path / "broken", **base)
    for step in (2, 7):
        result = Trainer(broken).train(resume=step > 2, show=Signal(step, number))
        assert result.interrupted == number and step <= result.step <= step + 1
        assert Checkpoints(tmp_path / "broken", 1).steps() == [result.step]
        assert signal.getsignal(number) == handler
        assert not (tmp_path / "broken" / "model.safetensors").exists()
    assert Trainer(broken).train(resume=True).interrupted is None
    assert_same(tmp_path / "whole", tmp_path / "broken")
    stored = [
        [line for line in metrics(tmp_path / name) if "eval_loss" in line] for name in ("whole", "broken")
    ]
    assert stored[0] == stored[1] != []
    again = Trainer(broken).train(resume=True)  # nothing is left to do
    assert again.step == again.steps
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_a_run_that_is_killed_resumes(model: Path, data: Path, tmp_path: Path) -> None:
    """At random times, in the loading, in steps and in saves."""
    base = {
        "max_steps": 16,
        "save_every": 1,
        "keep": 2,
        "eval_fraction": 0.2,
        "keep_best": True,
        "eval_every": 8,
    }
    Trainer(training_runs.options(model, data, tmp_path / "whole", **base)).train()
    options = training_runs.options(model, data, tmp_path / "broken", **base)
    assert training_runs.run_killed(options, tmp_path, 4) >= 2
    assert_same(tmp_path / "whole", tmp_path / "broken")
    assert Checkpoints(tmp_path / "broken", 2).steps() == [15, 16]
    assert not [path for path in tmp_path.rglob(".monoblock*") if path.is_dir()]


def test_a_checkpoint_is_a_model(model: Path, data: Path, tmp_path: Path) -> None:
    Trainer(training_runs.options(model, data, tmp_path, max_steps=3)).train()
    loaded = monoblock.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "step-3")
    final = monoblock.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), final.parameters(), strict=True))
    assert monoblock.AutoTokenizer.from_pretrained(tmp_path / "checkpoints" / "step-3").eos_token == "</s>"


def test_an_output_with_another_run_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    Trainer(training_runs.options(model, data, tmp_path, max_steps=2)).train()
    with pytest.raises(
        ValueError, match="holds the checkpoints of another run: resume it, or choose another output"
    ):
        Trainer(training_runs.options(model, data, tmp_path, max_steps=2)).train()
    with pytest.raises(
        ValueError, match=r"was written with learning_rate=0.001, not 0.5: resume with the same"
    ):
        Trainer(training_runs.options(model, data, tmp_path, max_steps=2, learning_rate=0.5)).train(
            resume=True
        )
    other = jsonl(tmp_path / "other.jsonl", [{"text": "the dog"}])
    with pytest.raises(ValueError, match="was written with digest of data="):
        Trainer(training_runs.options(model, other, tmp_path, max_steps=2)).train(resume=True)


def test_keep_best_and_early_stopping(model: Path, data: Path, tmp_path: Path) -> None:
    """A learning rate that is far too high makes later evaluations worse; the best weights are saved."""
    base = {
        "max_steps": 60,
        "eval_fraction": 0.2,
        "eval_every": 1,
        "learning_rate": 0.05,
        "schedule": "constant",
    }
    options = training_runs.options(model, data, tmp_path, early_stopping=4, keep_best=True, **base)
    result = Trainer(options).train()
    found = [line["eval_loss"] for line in metrics(tmp_path) if "eval_loss" in line]
    assert result.stopped_early and result.step < 60
    assert min(found) == found[-5] == result.metrics["loss"] < found[-1]
    best, final = weights(tmp_path / "checkpoints" / "best"), weights(tmp_path)
    assert all(torch.equal(best[name], final[name]) for name in final)
    last = weights(tmp_path / "checkpoints" / f"step-{result.step}")
    assert not all(torch.equal(last[name], final[name]) for name in final)


def test_a_loss_that_is_no_number_names_the_batch(model: Path, tmp_path: Path) -> None:
    broken = monoblock.GPTNeoForCausalLM.from_pretrained(model)
    tokenizer = monoblock.AutoTokenizer.from_pretrained(model)
    (token,) = tokenizer("z")["input_ids"]
    with torch.no_grad():
        broken.get_input_embeddings().weight[token] = float("nan")
        broken.get_output_embeddings().weight = torch.nn.Parameter(broken.lm_head.weight.nan_to_num())
    broken.config.tie_word_embeddings = False
    broken.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": text} for text in [*sentences(6), "the z", "the fox"]]
    data = jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"step \d \(epoch 1\): the loss is nan, for the batch of .*line 7, token 0"
    ):
        Trainer(training_runs.options(tmp_path / "model", data, tmp_path / "out", batch_size=1)).train()


def test_weight_decay_spares_norms_and_biases(model: Path) -> None:
    tuned = monoblock.GPTNeoForCausalLM.from_pretrained(model)
    groups = {name: decays(name, parameter.ndim) for name, parameter in tuned.named_parameters()}
    spared = {name for name, decay in groups.items() if not decay}
    assert spared == {n for n in groups if n.endswith("bias") or ".ln_" in n}
    table = monoblock.MPNetForMaskedLM(monoblock.MPNetConfig(hidden_size=12, num_attention_heads=2))
    biases = [name for name, p in table.named_parameters() if p.ndim > 1 and not decays(name, p.ndim)]
    assert biases == ["mpnet.encoder.relative_attention_bias.weight"]
    before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    optimizer = Optimizer(dict(tuned.named_parameters()), TrainingOptions(weight_decay=0.3))
    for parameter in tuned.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)  # without gradients, only the decay changes parameters
    for name, parameter in tuned.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.3 * groups[name])
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-7, rtol=1e-6)


def test_steps_are_those_of_adamw() -> None:
    """Of torch.optim.AdamW, with parameters that have no gradient in some steps."""
    torch.manual_seed(0)
    ours, theirs = ({n: torch.nn.Parameter(torch.ones(3, 4)) for n in ("a", "b")} for _ in range(2))
    optimizer = Optimizer(ours, TrainingOptions(weight_decay=0.1, learning_rate=0.1))
    reference = torch.optim.AdamW(theirs.values(), lr=0.1, weight_decay=0.1)
    for step in range(6):
        for name in ours:
            gradient = torch.randn(3, 4)
            ours[name].grad = None if step % 2 and name == "b" else gradient.clone()
            theirs[name].grad = None if step % 2 and name == "b" else gradient.clone()
        optimizer.step(0.1)
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-6)


def test_steps_of_bfloat16_parameters_are_those_of_their_float32_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By slices of rows, for matrices, vectors and a scalar; a restored state continues alike."""
    monkeypatch.setattr(optimizer_module, "SLICE", 8)
    torch.manual_seed(0)
    shapes = {"matrix": (5, 4), "vector": (9,), "scalar": ()}
    ours = {n: torch.nn.Parameter(torch.randn(s).bfloat16()) for n, s in shapes.items()}
    theirs = {n: torch.nn.Parameter(p.detach().float()) for n, p in ours.items()}
    options = TrainingOptions(weight_decay=0.1)
    optimizer = Optimizer(ours, options)
    groups = [
        {"params": [theirs["matrix"]]},
        {"params": [theirs["vector"], theirs["scalar"]], "weight_decay": 0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    state: dict[str, torch.Tensor] = {}
    for step in range(8):
        for name in ours:
            gradient = torch.randn(shapes[name]).bfloat16()
            ours[name].grad, theirs[name].grad = gradient, gradient.float()
        if step == 4:
            state = {name: x.clone() for name, x in optimizer.state().items()}
            optimizer = Optimizer(ours, options)
            optimizer.restore(state)
        optimizer.step(1e-3)
        reference.step()
    for name, exact in theirs.items():
        found = optimizer.state()[f"{name}/master"]
        torch.testing.assert_close(found, exact.detach(), atol=1e-6, rtol=1e-6)
        # half a unit of bfloat16's last of 8 bits
        torch.testing.assert_close(ours[name].detach().float(), found, atol=0, rtol=2**-8)
    with pytest.raises(CheckpointError, match=r"of weights in another dtype than torch\.float32: matrix"):
        Optimizer(theirs, options).restore(state)


def test_halves_of_float32_values() -> None:
    """Joined again they are the values to the bit; the upper half is the nearest bfloat16."""
    torch.manual_seed(0)
    values = torch.cat((torch.randn(4096) * 10 ** torch.linspace(-30, 30, 4096), torch.zeros(1)))
    ties = (torch.randn(64).bfloat16().view(torch.int16).to(torch.int32) << 16) + (1 << 15)
    values = torch.cat((values, ties.view(torch.float32), -ties.view(torch.float32)))
    high, low = torch.empty_like(values, dtype=torch.bfloat16), torch.empty_like(values, dtype=torch.int16)
    split(values, high, low)
    assert torch.equal(joined(high, low), values)
    nearest = (values.bfloat16().float() - values).abs()
    assert torch.equal((high.float() - values).abs(), nearest)


def test_frozen_parameters_do_not_change(model: Path, data: Path, tmp_path: Path) -> None:
    options = training_runs.options(model, data, tmp_path, max_steps=3, freeze=["transformer.w*", "*.h.0.*"])
    Trainer(options).train()
    before, after = weights(model), weights(tmp_path)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {n for n in after if not (n.startswith("transformer.w") or ".h.0." in n)}
    with pytest.raises(ValueError, match=r"freeze: no parameter is named 'wte\*'"):
        Trainer(training_runs.options(model, data, tmp_path / "other", freeze=["wte*"])).train()


@pytest.mark.parametrize("more", [{"gradient_checkpointing": True}, {"batch_size": 2, "accumulation": 2}])
def test_options_that_do_not_change_the_losses(more: dict[str, Any], data: Path, tmp_path: Path) -> None:
    model = training_runs.folder(tmp_path / "model", "GPTNeoForCausalLM", embed_dropout=0.0)
    for name, given in (("plain", {}), ("other", more)):
        Trainer(training_runs.options(model, data, tmp_path / name, **{"max_steps": 10, **given})).train()
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


def test_models_that_cannot_be_trained_whole_are_refused(model: Path, data: Path, tmp_path: Path) -> None:
    """Quantised weights, an adapter, and a tokenizer with more ids than the model."""
    monoblock.AutoModelForCausalLM.from_pretrained(model, quantization_config="int8").save_pretrained(
        tmp_path / "int8"
    )
    tokenizer = monoblock.AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(tmp_path / "int8")
    with pytest.raises(
        ValueError, match=r"int8 are quantised, so that only an adapter can be trained: set lora_rank"
    ):
        Trainer(training_runs.options(tmp_path / "int8", data, tmp_path / "out")).train()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(model)})
    )
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapter is an adapter: train from its base model"):
        Trainer(training_runs.options(tmp_path / "adapter", data, tmp_path / "out")).train()
    tokenizer.add_tokens(["quick"])
    small = shutil.copytree(model, tmp_path / "small")
    tokenizer.save_pretrained(small)
    with pytest.raises(
        ValueError, match=r"line \d+, token 0: the tokenizer gives the id 89, but the model has 89 ids"
    ):
        Trainer(training_runs.options(small, data, tmp_path / "out")).train()
    assert not (tmp_path / "out").exists()
