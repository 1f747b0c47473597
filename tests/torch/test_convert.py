"""Conversion of transformers checkpoints: dtypes, shards, naming schemes, mean-pooled key/value heads, memory."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import model, randomised
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from upstream_releases import mistral, names, saved

import monoblock
from monoblock.checkpoint import casts
from monoblock.checkpoint.array_adapters import numpy_dtype
from monoblock.checkpoint.keymap import Interleaved, PerHead, Same, Split, SplitEach, Transposed
from monoblock.conversion.convert import Options, convert

# ------------------------------------------------------------------ types


def test_every_bfloat16_pattern_equals_torch() -> None:
    bits = np.arange(2**16, dtype="<u2")
    array = bits.view(numpy_dtype("BF16"))
    theirs = torch.from_numpy(bits.view("<i2")).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(casts.widened(array), theirs)


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_rounding_to_bfloat16_equals_torch(numbers: list[float]) -> None:
    array = np.array(numbers, np.float32)
    theirs = torch.from_numpy(array).bfloat16().float().numpy()
    if np.isinf(theirs).sum() != np.isinf(array).sum():
        with pytest.raises(monoblock.CheckpointError, match="cannot hold"):
            casts.cast(array, "BF16", "x")
    else:
        np.testing.assert_array_equal(casts.widened(casts.cast(array, "BF16", "x")), theirs)


def test_rounding_to_bfloat16_is_to_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], "<u4")
    found = casts.cast(bits.view("<f4"), "BF16", "x").view("<u2")
    assert [hex(n) for n in found] == ["0x3f80", "0x3f82", "0x3f81", "0x3f80"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype(tmp_path: Path, dtype: str, stored: torch.dtype) -> None:
    source = saved(mistral().to(stored), tmp_path / "a")
    result = convert(source, tmp_path / "b", Options(dtype=dtype, check=True))
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert all(torch.equal(b[name], a[name].to(getattr(torch, dtype))) for name in a)
    assert monoblock.AutoConfig.from_pretrained(tmp_path / "b").dtype == result.dtype == dtype
    assert result.comparison is not None
    exact = all(torch.equal(b[name].double(), a[name].double()) for name in a)
    assert (
        (result.comparison.difference == 0) == (result.comparison.equal == result.comparison.tensors) == exact
    )


def test_overflow_of_the_dtype_raises(tmp_path: Path) -> None:
    big = mistral()
    with torch.no_grad():
        big.get_input_embeddings().weight[3, 4] = 7e4
    source = saved(big, tmp_path / "a")
    with pytest.raises(
        monoblock.CheckpointError, match=r"embed\.weight holds values up to 7e\+04, which float16"
    ):
        convert(source, tmp_path / "b", Options(dtype="float16"))
    assert names(tmp_path) == ["a"]


# ------------------------------------------------------------------ files and spellings


def test_bin_to_safetensors_with_other_files(tmp_path: Path) -> None:
    source = saved(model(), tmp_path / "a")
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["transformer.wte.weight"]  # .bin files hold tied weights twice
    torch.save(state, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "tokenizer_config.json",
        "additional_chat_templates/rag.jinja",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    (source / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    (source / "notes.txt").write_text("not part of the model")
    result = convert(source, tmp_path / "b")
    assert result.files == (
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    assert (tmp_path / "b" / "generation_config.json").read_text() == '{"eos_token_id": [0, 7]}'
    del state["lm_head.weight"]
    found = load_file(tmp_path / "b" / "model.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_shards(tmp_path: Path) -> None:
    source = saved(mistral(), tmp_path / "a")
    result = convert(source, tmp_path / "b", Options(max_shard_size="20kB", check=True))
    assert "model.safetensors.index.json" in result.files and len(result.files) > 4
    one = monoblock.MistralForCausalLM.from_pretrained(source).state_dict()
    two = monoblock.MistralForCausalLM.from_pretrained(tmp_path / "b").state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_old_names_are_converted(tmp_path: Path) -> None:
    config = monoblock.GPTNeoConfig(
        vocab_size=61, hidden_size=24, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    source = saved(randomised(monoblock.GPTNeoForCausalLM(config)), tmp_path / "a")
    state = load_file(source / "model.safetensors")
    buffers = {"transformer.h.0.attn.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
    save_file(state | buffers, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "b")
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == state.keys()


def test_unused_head_is_reported(tmp_path: Path) -> None:
    source = saved(mistral(), tmp_path / "a")
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(content | {"architectures": ["MistralModel"]}))
    result = convert(source, tmp_path / "b")
    assert result.architecture == "MistralModel" and result.left_out == ("lm_head.weight",)


@pytest.mark.parametrize("name", ["MptForTokenClassification", "MptForSequenceClassification", "MptModel"])
def test_class_is_derived_from_the_tensors(tmp_path: Path, name: str) -> None:
    source = saved(model(name), tmp_path / "a")
    content = json.loads((source / "config.json").read_text())
    del content["architectures"]
    (source / "config.json").write_text(json.dumps(content))
    assert convert(source, tmp_path / "b").architecture == name


# ------------------------------------------------------------------ pooled heads


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_pooled_heads_are_means(tmp_path: Path, kv_heads: int) -> None:
    source = saved(mistral(), tmp_path / "a")
    result = convert(source, tmp_path / "b", Options(kv_heads=kv_heads, check=True))
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    group = 4 // kv_heads
    for name in a:
        if "k_proj" in name or "v_proj" in name:
            for head in range(kv_heads):
                members = [a[name][6 * (head * group + i) :][:6] for i in range(group)]
                # Sums of four numbers: the order of summation matters in the last bit.
                torch.testing.assert_close(
                    b[name][6 * head :][:6], sum(members) / group, atol=1e-7, rtol=1e-6
                )
        else:
            assert torch.equal(a[name], b[name])
    assert monoblock.AutoConfig.from_pretrained(tmp_path / "b").num_key_value_heads == kv_heads
    assert result.comparison is not None and result.comparison.logits is not None
    assert result.comparison.logits.difference > 0  # another model


def test_pooling_equal_heads_keeps_the_output(tmp_path: Path) -> None:
    """MPT with biases, whose heads of a group are the same: pooling must not change the output."""
    twin = model(no_bias=False, n_heads=6)
    with torch.no_grad():
        for i in range(twin.spec.layers):
            for parameter in twin.at("qkv", i).parameters():
                heads = parameter[36:].unflatten(0, (6, 2, 6))  # k and v: groups of two heads of six channels
                heads[:, 1] = heads[:, 0]
    source = saved(twin, tmp_path / "a")
    result = convert(source, tmp_path / "b", Options(kv_heads=3, check=True))
    config = monoblock.AutoConfig.from_pretrained(tmp_path / "b")
    assert (config.attn_config.attn_type, config.attn_config.kv_n_heads) == ("grouped_query_attention", 3)
    assert result.comparison is not None and result.comparison.logits is not None
    assert result.comparison.logits.difference < 1e-4  # fp32, another order of summation; logits reach 30
    assert result.comparison.logits.agreement == 1


@pytest.mark.parametrize(
    ("made_model", "kv_heads", "words"),
    [
        (lambda: mistral(), 3, "does not divide"),
        (lambda: mistral(num_key_value_heads=2), 4, "does not divide"),
        (lambda: model(attn={"qk_ln": True}), 3, "qk_ln"),
        (lambda: monoblock.MPNetModel(monoblock.MPNetConfig(vocab_size=61, hidden_size=24, num_hidden_layers=1,
            num_attention_heads=4, intermediate_size=30)), 2, "mpnet"),
    ],
)  # fmt: skip
def test_invalid_pooling_raises(tmp_path: Path, made_model: Any, kv_heads: int, words: str) -> None:
    source = saved(made_model(), tmp_path / "a")
    with pytest.raises(ValueError, match=words):
        convert(source, tmp_path / "b", Options(kv_heads=kv_heads))
    assert names(tmp_path) == ["a"]


# ------------------------------------------------------------------ memory


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    many = mistral(hidden_size=96, intermediate_size=192, num_hidden_layers=20)
    source = saved(many, tmp_path / "a")
    size = (source / "model.safetensors").stat().st_size
    convert(source, tmp_path / "warm", Options(dtype="bfloat16"))  # without the memory of imports
    tracemalloc.start()
    convert(source, tmp_path / "b", Options(dtype="bfloat16", kv_heads=2))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 4  # 1.3 MB of 6.4: the largest tensor a few times over, and Python's own objects


# ------------------------------------------------------------------ the new ops


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_every_op_is_a_bijection(heads: int, kv: int, half: int, width: int) -> None:
    """Writing through the views fills the tensor, and every number is read back from where it was written."""
    q, k = 2 * half * heads, 2 * half * kv
    nested = SplitEach((q, k, k), (Interleaved(heads), Interleaved(kv), Same()))
    cases = [(nested, q + 2 * k), (Split((q, k, k)), q + 2 * k), (Interleaved(heads), q), (Transposed(), q)]
    for op, rows in [*cases, (PerHead(heads), 3 * q)]:
        for shape in ((rows, width), (rows,)):
            target = np.full(shape, -1)
            views = op.views(target)
            assert all(np.shares_memory(view, target) for view in views)
            start = 0
            for view in views:
                view[...] = np.arange(start, start + view.size).reshape(view.shape)
                start += view.size
            assert Counter(target.reshape(-1).tolist()) == Counter(range(target.size))
            assert [n for view in op.views(target) for n in view.reshape(-1)] == list(range(target.size))
