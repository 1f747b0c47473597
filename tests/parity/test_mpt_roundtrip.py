"""MPT checkpoints saved by monoblock open in transformers with equal bits, and back: classes, dtypes, shards, .bin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import CLASSES, KIND, batch, model, randomised
from measure import assert_close

import monoblock

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARDS = {"one file": "50GB", "shards": 9000}


def transformers_model(name: str, seed: int = 0, **fields: Any) -> Any:
    sizes = {
        "d_model": 36,
        "n_heads": 6,
        "n_layers": 2,
        "vocab_size": 89,
        "max_seq_len": 48,
        "pad_token_id": 3,
    }
    config = transformers.MptConfig(**sizes, num_labels=3, **fields)
    return randomised(getattr(transformers, name)(config), seed).eval()


def logits(out: Any) -> torch.Tensor:
    return out[0] if "start_logits" not in out else torch.stack((out.start_logits, out.end_logits), -1)


def hub_weights(module: Any) -> dict[str, torch.Tensor]:
    return module.hub_state_dict() if hasattr(module, "hub_state_dict") else dict(module.state_dict())


def assert_same_weights(ours: Any, theirs: Any) -> None:
    a, b = hub_weights(ours), hub_weights(theirs)
    b.pop("lm_head.weight", None) if "lm_head.weight" not in a else None
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_saved_here_opens_in_transformers(name: str, dtype: str, shards: str, tmp_path: Path) -> None:
    ours = model(name, num_labels=3).to(DTYPES[dtype])
    ours.save_pretrained(tmp_path, max_shard_size=SHARDS[shards])
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "shards")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "shards")
    theirs, report = getattr(transformers, name).from_pretrained(
        tmp_path, output_loading_info=True, dtype="auto"
    )
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)).__name__ == "MptConfig"
    assert_same_weights(ours, theirs)
    if dtype == "float32":
        ids, mask = batch("right")
        a, b = logits(ours(ids, attention_mask=mask)), logits(theirs.eval()(ids, attention_mask=mask))
        assert_close("logits after a round trip", a, b, 1e-5)


@pytest.mark.parametrize("form", ["one file", "shards", "bin", "bin shards"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_saved_by_transformers_opens_here(name: str, dtype: str, form: str, tmp_path: Path) -> None:
    theirs = transformers_model(name).to(DTYPES[dtype])
    save_with_transformers(theirs, tmp_path, form)
    ours = getattr(monoblock, name).from_pretrained(tmp_path)
    assert not ours.training
    assert ours.dtype == DTYPES[dtype]
    assert ours.config.architectures == [name]
    assert_same_weights(ours, theirs)
    if dtype == "float32":
        ids, mask = batch("right")
        a, b = logits(ours(ids, attention_mask=mask)), logits(theirs(ids, attention_mask=mask))
        assert_close("logits after a round trip", a, b, 1e-5)


def save_with_transformers(theirs: Any, folder: Path, form: str) -> None:
    """transformers 5 writes safetensors only; older versions wrote .bin, with the tied matrix twice."""
    if not form.startswith("bin"):
        theirs.save_pretrained(folder, max_shard_size=SHARDS[form])
        return
    import json

    theirs.config.architectures = [type(theirs).__name__]
    theirs.config.dtype = theirs.dtype
    theirs.config.save_pretrained(folder)
    state = dict(theirs.state_dict())
    if form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
        return
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: t for name, t in state.items() if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_round_trip_keeps_weights_and_ties(tmp_path: Path) -> None:
    theirs = transformers_model("MptForCausalLM")
    theirs.save_pretrained(tmp_path / "theirs")
    monoblock.MptForCausalLM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    again = transformers.MptForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.lm_head.weight is again.transformer.wte.weight
    assert_same_weights(theirs, again)


def test_untied_weights(tmp_path: Path) -> None:
    theirs = transformers_model("MptForCausalLM", tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    ours = monoblock.MptForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(ours.at("head_out").weight, theirs.lm_head.weight)
    assert not torch.equal(ours.at("head_out").weight, ours.get_input_embeddings().weight)
    ours.save_pretrained(tmp_path / "again")
    assert_same_weights(ours, transformers.MptForCausalLM.from_pretrained(tmp_path / "again"))


def test_generation_config(tmp_path: Path) -> None:
    theirs = transformers_model("MptForCausalLM")
    theirs.generation_config.update(
        temperature=0.3, top_k=7, do_sample=True, eos_token_id=[0, 5], use_cache=False
    )
    theirs.save_pretrained(tmp_path)
    ours = monoblock.MptForCausalLM.from_pretrained(tmp_path)
    assert ours.generation_config.temperature == 0.3
    assert ours.generation_config.eos_token_id == [0, 5]
    ours.save_pretrained(tmp_path / "again")
    again = transformers.GenerationConfig.from_pretrained(tmp_path / "again")
    assert (again.temperature, again.top_k, again.do_sample, again.eos_token_id) == (0.3, 7, True, [0, 5])


@pytest.mark.parametrize("name", [name for name in CLASSES if KIND[name]])
def test_bare_checkpoint_in_a_class_with_a_head(name: str, tmp_path: Path) -> None:
    theirs = transformers_model("MptModel")
    theirs.save_pretrained(tmp_path)
    ours = getattr(monoblock, name).from_pretrained(tmp_path)
    assert torch.equal(ours.transformer.wte.weight, theirs.wte.weight)
    ids, mask = batch("right")
    with torch.no_grad():
        a, b = ours(ids, attention_mask=mask, output_hidden_states=True), theirs(ids, attention_mask=mask)
    assert_close("hidden states", a.hidden_states[-1], b.last_hidden_state, 1e-5)


def test_state_dicts_load_in_both_libraries() -> None:
    theirs, ours = (
        transformers_model("MptForSequenceClassification"),
        model("MptForSequenceClassification", num_labels=3),
    )
    assert not ours.load_state_dict(theirs.state_dict()).missing_keys
    assert_same_weights(ours, theirs)
    other = transformers_model("MptForSequenceClassification", seed=5)
    other.load_state_dict(ours.hub_state_dict())
    assert_same_weights(ours, other)
