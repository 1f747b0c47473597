"""Fine-tuning with adapters: peft reads them, they resume bit for bit, and merge."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import training_runs
import transformers
from safetensors.torch import load_file
from training_runs import jsonl, losses, run, sentences

import monoblock
from monoblock.training import Trainer

torch.set_num_threads(1)

LORA: dict[str, Any] = {"lora_rank": 4, "learning_rate": 1e-2, "max_steps": 20}
FAMILIES = {
    "mistral": "MistralForCausalLM",
    "gpt_neo": "GPTNeoForCausalLM",
    "openai-gpt": "OpenAIGPTLMHeadModel",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", ({"text": text} for text in sentences(60)))


def answer(model: Any) -> torch.Tensor:
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("more", [{}, {"rslora": True, "lora_dropout": 0.1}, {"dora": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_open_in_peft(family: str, more: dict[str, Any], data: Path, tmp_path: Path) -> None:
    """Over transformers' model, with equal logits; the loss falls; merging gives the same model."""
    name = FAMILIES[family]
    model = training_runs.folder(tmp_path / "model", name)
    run(model, data, tmp_path / "out", **LORA, **more)
    found = losses(tmp_path / "out")
    assert sum(found[-4:]) < sum(found[:4]) - 0.3
    assert not (tmp_path / "out" / "model.safetensors").exists()
    ours = monoblock.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = getattr(transformers, name).from_pretrained(model)
    before = answer(theirs)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
    torch.testing.assert_close(answer(ours), answer(theirs), atol=1e-4, rtol=0)
    assert (answer(ours) - before).abs().max() > 0.1
    run(model, data, tmp_path / "merged", **LORA, **more, merge=True)
    merged = getattr(transformers, name).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answer(merged), answer(ours), atol=1e-3, rtol=0)


def test_targets(data: Path, tmp_path: Path) -> None:
    model = training_runs.folder(tmp_path / "model", "MistralForCausalLM")
    run(model, data, tmp_path / "out", **LORA, lora_targets=["q_proj", "down_proj"])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"q_proj", "down_proj"} and config["r"] == 4
    assert config["base_model_name_or_path"] == str(model) and config["task_type"] == "CAUSAL_LM"
    with pytest.raises(
        ValueError, match="the model has no module 'c_attn'; the blocks have down_proj, gate_proj"
    ):
        run(model, data, tmp_path / "other", **LORA, lora_targets=["c_attn"])


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_adapters_of_quantised_weights(bits: str, data: Path, tmp_path: Path) -> None:
    model = training_runs.folder(tmp_path / "model", "MistralForCausalLM")
    run(model, data, tmp_path / "out", **LORA, quantize=bits)
    found = losses(tmp_path / "out")
    assert sum(found[-4:]) < sum(found[:4]) - 0.3


@pytest.mark.parametrize("more", [{}, {"dora": True}, {"quantize": "int4"}, {"dtype": "bfloat16"}], ids=str)
def test_a_killed_run_resumes(more: dict[str, Any], data: Path, tmp_path: Path) -> None:
    model = training_runs.folder(tmp_path / "model", "MistralForCausalLM")
    base = {**LORA, "save_every": 1, "lora_dropout": 0.1, **more}
    Trainer(training_runs.options(model, data, tmp_path / "whole", **base)).train()
    options = training_runs.options(model, data, tmp_path / "broken", **base)
    assert training_runs.run_killed(options, tmp_path, 8) >= 2
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")


def test_a_classifier_trains_its_head_too(tmp_path: Path) -> None:
    model = training_runs.folder(tmp_path / "model", "MPNetForSequenceClassification")
    rows = [{"text": text, "label": int("fox" in text)} for text in sentences(200)]
    data, held = jsonl(tmp_path / "train.jsonl", rows[:160]), jsonl(tmp_path / "eval.jsonl", rows[160:])
    more = {"task": "classification", "eval_data": held, "lora_rank": 8, "learning_rate": 1e-2, "epochs": 8}
    for name, merge in (("adapter", False), ("merged", True)):
        result = run(model, data, tmp_path / name, **more, merge=merge)
        assert result.metrics["accuracy"] >= 0.95
    best = run(model, data, tmp_path / "best", **more, keep_best=True)
    assert best.metrics["accuracy"] >= 0.95
    merged = monoblock.pipeline("text-classification", str(tmp_path / "merged"))
    assert merged("the quick fox")[0]["label"] == "LABEL_1"
    adapted = monoblock.MPNetForSequenceClassification.from_pretrained(
        model, num_labels=2, ignore_mismatched_sizes=True
    )
    adapted.load_adapter(tmp_path / "adapter")
    whole = monoblock.MPNetForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answer(adapted), answer(whole), atol=1e-3, rtol=0)


def test_preferences_against_the_model_without_the_adapter(tmp_path: Path) -> None:
    """The loss begins at log 2 and falls, though no second model is loaded."""
    model = training_runs.folder(tmp_path / "model", "MistralForCausalLM")
    rows = [{"prompt": "the fox ", "chosen": "quick.", "rejected": "lazy!"}] * 8
    data = jsonl(tmp_path / "data.jsonl", rows)
    result = run(model, data, tmp_path / "out", **LORA, task="preference", max_length=40, eval_data=data)
    found = losses(tmp_path / "out")
    assert found[0] == pytest.approx(math.log(2), abs=1e-5) and found[-1] < 0.6
    assert result.metrics["accuracy"] == 1
