"""QLoRA over a base that transformers saved with bitsandbytes: the training over its dequantised weights."""

from __future__ import annotations

import shutil
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
from monoblock.backends.pytorch.quantization.four_bit import FourBitLinear
from monoblock.backends.pytorch.quantization.modules import QuantizedMatrix
from monoblock.training import Trainer
from monoblock.training.trainer import prepare

torch.set_num_threads(1)

LORA: dict[str, Any] = {"lora_rank": 4, "learning_rate": 1e-2, "max_steps": 12}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", ({"text": text} for text in sentences(40)))


def stored(at: Path, **how: Any) -> Path:
    """A tiny Mistral as transformers saves it after quantising it with bitsandbytes, with a tokenizer. In 64 channels,
    since bitsandbytes dequantises other rows wrongly on a CPU."""
    plain = training_runs.folder(
        at / "plain", "MistralForCausalLM", hidden_size=64, intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = transformers.MistralForCausalLM.from_pretrained(
        plain, dtype=torch.bfloat16, quantization_config=transformers.BitsAndBytesConfig(**how)
    )
    model.save_pretrained(at / "base")
    for file in plain.iterdir():
        if not (at / "base" / file.name).exists():
            shutil.copy(file, at / "base" / file.name)
    return at / "base"


def learner(options: Any) -> Any:
    trainer = Trainer(options)
    prepared = prepare(options, trainer.task)
    return prepared.learner(trainer.task, options, {}, source=prepared.base, base=prepared.base)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_training_is_that_over_the_dequantised_weights(
    kind: str, dtype: str, data: Path, tmp_path: Path
) -> None:
    double = kind == "nf4"
    base = stored(tmp_path, load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    dense = monoblock.AutoModelForCausalLM.from_pretrained(base)
    dense.save_pretrained(tmp_path / "dense")
    monoblock.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "dense")
    more = {**LORA, "dtype": dtype, "optimizer": "adamw_8bit"}
    made = learner(training_runs.options(base, data, tmp_path / "none", **more)).model
    packed = [m for m in made.modules() if isinstance(m, FourBitLinear)]
    assert len(packed) == 7 * made.config.num_hidden_layers
    for name, folder in (("kept", base), ("dense", tmp_path / "dense")):
        run(folder, data, tmp_path / f"{name}-out", **more)
    assert losses(tmp_path / "kept-out") == losses(tmp_path / "dense-out")
    one, other = (load_file(tmp_path / f"{n}-out" / "adapter_model.safetensors") for n in ("kept", "dense"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    run(base, data, tmp_path / "check", **more, gradient_checkpointing=True)
    assert losses(tmp_path / "check") == pytest.approx(losses(tmp_path / "kept-out"), abs=1e-2)
    # peft opens the adapter over the same base in transformers.
    theirs = transformers.MistralForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "kept-out").eval()
    ours = monoblock.AutoModelForCausalLM.from_pretrained(tmp_path / "kept-out")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits.float(), theirs(ids).logits.float(), atol=0.1, rtol=0.05)


def test_what_needs_the_weights_dequantises_them(data: Path, tmp_path: Path) -> None:
    base = stored(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    for name in ("merge", "dora"):
        options = training_runs.options(base, data, tmp_path / "none", **LORA, **{name: True})
        assert not any(isinstance(m, FourBitLinear) for m in learner(options).model.modules())
    run(base, data, tmp_path / "merged", **LORA, merge=True)
    assert transformers.MistralForCausalLM.from_pretrained(tmp_path / "merged")


def test_eight_bits(data: Path, tmp_path: Path) -> None:
    base = stored(tmp_path, load_in_8bit=True)
    options = training_runs.options(base, data, tmp_path / "none", **LORA)
    assert any(isinstance(m, QuantizedMatrix) for m in learner(options).model.modules())
    run(base, data, tmp_path / "out", **LORA)
    found = losses(tmp_path / "out")
    assert sum(found[-4:]) < sum(found[:4]) - 0.3
