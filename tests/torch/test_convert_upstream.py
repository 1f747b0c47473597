"""Upstream releases: read as laid out by the original code, and written back bitwise equal."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import upstream_releases
from helpers import randomised
from safetensors.torch import load_file, save_file

import monoblock
from monoblock.conversion.convert import Options, convert
from monoblock.processing import FuyuImageProcessor

transformers: Any = pytest.importorskip("transformers")

IDS = torch.randint(0, 61, (2, 21), generator=torch.Generator().manual_seed(1))


def logits(folder: Path, name: str) -> torch.Tensor:
    with torch.no_grad():
        return getattr(monoblock, name).from_pretrained(folder)(IDS).logits


def fuyu() -> Any:
    config = monoblock.FuyuConfig(
        vocab_size=67,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        patch_size=4,
    )
    return randomised(monoblock.FuyuForCausalLM(config)).eval()


def gpt(heads: int = 2, width: int = 128) -> Any:
    config = monoblock.OpenAIGPTConfig(vocab_size=61, n_positions=32, n_embd=width, n_layer=2, n_head=heads)
    return randomised(monoblock.OpenAIGPTLMHeadModel(config)).eval()


# ------------------------------------------------------------------ Mistral


def paired_rotation(q: Any, k: Any, cos: Any, sin: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
    """RoPE as Mistral's own code has it: channels 2j and 2j + 1 are one complex number."""
    half = cos.shape[-1] // 2
    rotation = torch.complex(cos[:, None, :, :half], sin[:, None, :, :half])

    def rotated(x: Any) -> Any:
        return torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * rotation
        ).flatten(-2)

    return rotated(q), rotated(k)


def mistral_logits(state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """transformers' model with the upstream matrices and the original RoPE."""
    from transformers.models.mistral import modeling_mistral

    config = transformers.MistralConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-5, sliding_window=7, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    tops = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        if stem in tops:
            renamed[tops[stem] + ".weight"] = tensor
        else:
            _, i, part = stem.split(".", 2)
            renamed[f"model.layers.{i}.{names[part]}.weight"] = tensor
    model.load_state_dict(renamed)
    monkeypatch.setattr(modeling_mistral, "apply_rotary_pos_emb", paired_rotation)
    with torch.no_grad():
        return model(IDS).logits


def test_mistral_equals_the_original_implementation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = upstream_releases.mistral_state()
    result = convert(upstream_releases.mistral_release(tmp_path / "a", state), tmp_path / "b")
    assert result.source_format == "mistral" and result.architecture == "MistralForCausalLM"
    expected = mistral_logits(state, monkeypatch)
    torch.testing.assert_close(logits(tmp_path / "b", "MistralForCausalLM"), expected, atol=2e-5, rtol=0)


def test_mistral_permutation_by_index(tmp_path: Path) -> None:
    state = upstream_releases.mistral_state()
    convert(upstream_releases.mistral_release(tmp_path / "a", state), tmp_path / "b")
    found = load_file(tmp_path / "b" / "model.safetensors")
    for theirs, ours, heads in (("wq", "q_proj", 4), ("wk", "k_proj", 2)):
        old = state[f"layers.1.attention.{theirs}.weight"]
        new = found[f"model.layers.1.self_attn.{ours}.weight"]
        for head in range(heads):
            for pair in range(3):
                assert torch.equal(new[6 * head + pair], old[6 * head + 2 * pair])
                assert torch.equal(new[6 * head + 3 + pair], old[6 * head + 2 * pair + 1])
    assert torch.equal(found["model.layers.1.self_attn.v_proj.weight"], state["layers.1.attention.wv.weight"])


def test_mistral_files_and_config(tmp_path: Path) -> None:
    convert(
        upstream_releases.mistral_release(tmp_path / "a", sliding_window="7", max_seq_len=99), tmp_path / "b"
    )
    config = monoblock.MistralConfig.from_pretrained(tmp_path / "b")
    assert (config.sliding_window, config.rope_theta, config.head_dim, config.num_key_value_heads) == (
        7,
        5e3,
        6,
        2,
    )
    assert (config.max_position_embeddings, config.rms_norm_eps, config.dtype) == (99, 1e-5, "float32")
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == b"pieces"
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_mistral_shards_of_two_ranks(tmp_path: Path) -> None:
    state, folder = upstream_releases.mistral_state(), upstream_releases.mistral_release(tmp_path / "a")
    along_columns = ("tok_embeddings", "wo", "w2")
    for rank in (0, 1):
        part: dict[str, torch.Tensor] = {}
        for name, tensor in state.items():
            if tensor.ndim == 1:
                part[name] = tensor
            elif any(word in name for word in along_columns):
                width = tensor.shape[1] // 2
                part[name] = tensor[:, rank * width : (rank + 1) * width].clone()
            else:
                # One rank has the larger part of the vocabulary, which is an odd number.
                cut = (tensor.shape[0] + 1) // 2
                part[name] = (tensor[:cut] if rank == 0 else tensor[cut:]).clone()
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    convert(folder, tmp_path / "b")
    convert(upstream_releases.mistral_release(tmp_path / "whole", state), tmp_path / "c")
    same_tensors(tmp_path / "b", tmp_path / "c")


def test_mistral_tensors_split_over_files(tmp_path: Path) -> None:
    state, folder = upstream_releases.mistral_state(), upstream_releases.mistral_release(tmp_path / "a")
    (folder / "consolidated.00.pth").unlink()
    names = sorted(state)
    save_file({name: state[name] for name in names[:9]}, folder / "consolidated-00001-of-00002.safetensors")
    save_file({name: state[name] for name in names[9:]}, folder / "consolidated-00002-of-00002.safetensors")
    convert(folder, tmp_path / "b")
    convert(upstream_releases.mistral_release(tmp_path / "whole", state), tmp_path / "c")
    same_tensors(tmp_path / "b", tmp_path / "c")


def test_mistral_round_trip(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in upstream_releases.mistral_state().items()}
    convert(upstream_releases.mistral_release(tmp_path / "a", state), tmp_path / "b")
    result = convert(tmp_path / "b", tmp_path / "c", Options(target_format="mistral", check=True))
    back = load_file(tmp_path / "c" / "consolidated.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert json.loads((tmp_path / "c" / "params.json").read_text()) == upstream_releases.MISTRAL
    assert result.comparison is not None and result.comparison.logits is not None
    assert result.comparison.equal == result.comparison.tensors and result.comparison.logits.agreement == 1


def test_mistral_windows_in_some_layers_round_trip(tmp_path: Path) -> None:
    """Ministral's params.json holds a list of windows, which is repeated over the layers."""
    convert(upstream_releases.mistral_release(tmp_path / "a", sliding_window=[None, 7]), tmp_path / "b")
    config = monoblock.AutoConfig.from_pretrained(tmp_path / "b")
    assert config.layer_types == ["full_attention", "sliding_attention"]
    assert config.to_spec().windows == (None, 7)
    convert(tmp_path / "b", tmp_path / "c", Options(target_format="mistral"))
    assert json.loads((tmp_path / "c" / "params.json").read_text())["sliding_window"] == [None, 7]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"moe": {"num_experts": 8}}, "moe"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantization"),
        ({"sliding_window": [7, 9]}, "sliding_window"),
        ({"sliding_window": [7, None, None]}, "sliding_window"),
        ({"sliding_window": [7, "all"]}, "sliding_window"),
        ({"use_biases": True}, "use_biases"),
    ],
)
def test_unsupported_mistral_params_raise(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(monoblock.UnsupportedConfig, match=words):
        convert(upstream_releases.mistral_release(tmp_path / "a", **fields), tmp_path / "b")
    assert not (tmp_path / "b").exists()


# ------------------------------------------------------------------ OpenAI


@pytest.mark.parametrize("files", [10])
def test_openai_round_trip(tmp_path: Path, files: int) -> None:
    model = gpt()
    upstream_releases.openai_release(tmp_path / "a", model, files)
    result = convert(tmp_path / "a", tmp_path / "b", Options(check=True))
    assert result.source_format == "openai-gpt" and result.architecture == "OpenAIGPTLMHeadModel"
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "b", "OpenAIGPTLMHeadModel"), model(IDS).logits)
    assert (tmp_path / "b" / "merges.txt").read_bytes() == (tmp_path / "a" / "vocab_40000.bpe").read_bytes()
    convert(tmp_path / "b", tmp_path / "c", Options(target_format="openai-gpt", check=True))
    assert json.loads((tmp_path / "c" / "params_shapes.json").read_text()) == json.loads(
        (tmp_path / "a" / "params_shapes.json").read_text()
    )
    whole = [np.concatenate([np.load(tmp_path / x / f"params_{i}.npy") for i in range(10)]) for x in "ac"]
    assert np.array_equal(*whole)
    assert (tmp_path / "c" / "encoder_bpe_40000.json").read_text() == '{"<unk>": 0, "a</w>": 1}'


def test_openai_equals_transformers(tmp_path: Path) -> None:
    upstream_releases.openai_release(tmp_path / "a", gpt())
    convert(tmp_path / "a", tmp_path / "b")
    theirs = transformers.OpenAIGPTLMHeadModel.from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
    torch.testing.assert_close(logits(tmp_path / "b", "OpenAIGPTLMHeadModel"), expected, atol=2e-5, rtol=0)


def test_openai_heads_of_other_sizes_need_a_config(tmp_path: Path) -> None:
    model = gpt(heads=3, width=36)
    upstream_releases.openai_release(tmp_path / "a", model)
    with pytest.raises(monoblock.CheckpointError, match="n_head"):
        convert(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "config.json").write_text('{"n_head": 3}')
    convert(tmp_path / "a", tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "b", "OpenAIGPTLMHeadModel"), model(IDS).logits)


# ------------------------------------------------------------------ Fuyu


@pytest.mark.parametrize("form", ["folder", "tar", "file"])
def test_fuyu_from_the_upstream_checkpoint(tmp_path: Path, form: str) -> None:
    model = fuyu()
    source = upstream_releases.fuyu_release(tmp_path / "a", model)
    if form == "tar":
        source = tmp_path / "release.tar"
        with tarfile.open(source, "w") as archive:
            archive.add(tmp_path / "a", "8b_base_model_release")
    elif form == "file":
        source = source / "iter_0001251" / "mp_rank_00" / "model_optim_rng.pt"
    result = convert(source, tmp_path / "b", Options(check=True))
    assert result.source_format == "fuyu"
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "b", "FuyuForCausalLM"), model(IDS).logits)
    config = monoblock.FuyuConfig.from_pretrained(tmp_path / "b")
    assert (config.num_attention_heads, config.patch_size, config.num_hidden_layers) == (3, 4, 2)
    images = FuyuImageProcessor.from_pretrained(tmp_path / "b")
    assert images.patch_size == {"height": 4, "width": 4}
    if form != "file":
        assert (tmp_path / "b" / "tokenizer.model").read_bytes() == b"unigrams"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_fuyu_round_trip(tmp_path: Path) -> None:
    source = upstream_releases.fuyu_release(tmp_path / "a", fuyu())
    convert(source, tmp_path / "b", Options(dtype="bfloat16"))
    convert(tmp_path / "b", tmp_path / "c", Options(target_format="fuyu", check=True))
    assert sorted(
        p.relative_to(tmp_path / "c").as_posix() for p in (tmp_path / "c").rglob("*") if p.is_file()
    ) == [
        "adept_vocab.model",
        "mp_rank_00/model_optim_rng.pt",
    ]
    written = torch.load(tmp_path / "c" / "mp_rank_00" / "model_optim_rng.pt", weights_only=True)["model"]
    original = torch.load(source / "iter_0001251" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)[
        "model"
    ]
    encoder = written["language_model"]["encoder"]
    for name, tensor in original["language_model"]["encoder"].items():
        if name != "rotary_emb.inv_freq":
            assert torch.equal(encoder.pop(name), tensor.bfloat16())
    assert not encoder
    for name in ("weight", "bias"):
        expected = original["vit_encoder"]["linear_encoder"][name].bfloat16()
        assert torch.equal(written["vit_encoder"]["linear_encoder"][name], expected)
    convert(tmp_path / "c", tmp_path / "d")
    same_tensors(tmp_path / "b", tmp_path / "d")


# ------------------------------------------------------------------ llm-foundry


def foundry_model() -> Any:
    config = monoblock.MptConfig(
        d_model=24, n_heads=4, n_layers=2, vocab_size=61, max_seq_len=32, no_bias=False,
        attn_config={"alibi": False, "attn_type": "grouped_query_attention", "kv_n_heads": 2},
    )  # fmt: skip
    return randomised(monoblock.MptForCausalLM(config)).eval()


@pytest.mark.parametrize("prefix", ["", "model."])
def test_llm_foundry_export(tmp_path: Path, prefix: str) -> None:
    model = foundry_model()
    source = upstream_releases.foundry_release(tmp_path / "a", model, prefix)
    result = convert(source, tmp_path / "b", Options(check=True))
    assert result.source_format == "llm-foundry" and result.architecture == "MptForCausalLM"
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "b", "MptForCausalLM"), model(IDS).logits)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["architectures"] == ["MptForCausalLM"] and "auto_map" not in config
    assert config["no_bias"] is False and config["attn_config"]["alibi"] is False
    assert (tmp_path / "b" / "tokenizer.json").is_file() and not (
        tmp_path / "b" / "pytorch_model.bin"
    ).exists()


def test_composer_checkpoint(tmp_path: Path) -> None:
    model = foundry_model()
    exported = upstream_releases.foundry_release(tmp_path / "a", model)
    content = json.loads((exported / "config.json").read_text())
    state = {"model." + name: tensor for name, tensor in model.hub_state_dict().items()}
    huggingface = {"model": {"config": {"content": content}}}
    whole = {
        "state": {
            "model": state,
            "integrations": {"huggingface": huggingface},
            "run_name": upstream_releases.Megatron(),
        }
    }
    torch.save(whole, tmp_path / "ep1-ba100.pt")
    convert(tmp_path / "ep1-ba100.pt", tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "b", "MptForCausalLM"), model(IDS).logits)


def same_tensors(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
