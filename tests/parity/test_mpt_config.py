"""config.json of MPT against transformers: files written by either library open in the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import monoblock

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "storywriter": {"max_seq_len": 65536, "attn_config": {"alibi_bias_max": 16, "clip_qkv": 6.0}},
    "every field": {
        "d_model": 24,
        "n_heads": 4,
        "n_layers": 3,
        "expansion_ratio": 2,
        "max_seq_len": 99,
        "vocab_size": 51,
        "resid_pdrop": 0.1,
        "layer_norm_epsilon": 1e-3,
        "emb_pdrop": 0.2,
        "learned_pos_emb": False,
        "init_device": "meta",
        "logit_scale": 0.5,
        "no_bias": False,
        "embedding_fraction": 0.5,
        "norm_type": "rmsnorm",
        "use_cache": True,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": [0, 50],
        "num_labels": 4,
        "problem_type": "regression",
        "attn_config": {
            "attn_type": "multiquery_attention",
            "attn_impl": "flash",
            "softmax_scale": 0.2,
            "alibi": False,
        },
    },
    "labels": {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}},
    "outputs": {"output_hidden_states": True, "return_dict": False, "dtype": "bfloat16"},
}


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def without_version(data: dict[str, Any]) -> dict[str, Any]:
    """The data without transformers' version, the only field that may differ."""
    data = {k: v for k, v in data.items() if k != "transformers_version"}
    data["attn_config"] = {k: v for k, v in data["attn_config"].items() if k != "transformers_version"}
    return data


@pytest.mark.parametrize("case", CASES)
def test_our_config_opens_in_transformers(case: str, tmp_path: Path) -> None:
    monoblock.MptConfig(**CASES[case]).save_pretrained(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    opened, made = (without_version(c.to_dict()) for c in (theirs, transformers.MptConfig(**CASES[case])))
    assert opened.pop("verbose") == 0, "documented, but no longer in transformers"
    for data in (opened, made):
        del data["_name_or_path"]
    assert opened == made


@pytest.mark.parametrize("case", CASES)
def test_transformers_config_opens_here(case: str, tmp_path: Path) -> None:
    transformers.MptConfig(**CASES[case]).save_pretrained(tmp_path)
    ours = monoblock.AutoConfig.from_pretrained(tmp_path)
    assert ours.to_spec() == monoblock.MptConfig(**CASES[case]).to_spec()
    for name in CASES[case].keys() - {"attn_config", "dtype"}:
        assert getattr(ours, name) == getattr(transformers.MptConfig(**CASES[case]), name), name
    assert ours.dtype == CASES[case].get("dtype")
    ours.save_pretrained(tmp_path / "again")
    written, expected = read(tmp_path / "again"), without_version(read(tmp_path))
    attention = expected.pop("attn_config")
    # transformers' defaults need not be written
    absent = {**dict.fromkeys(expected), "tie_word_embeddings": True}
    assert {k: written.get(k, absent[k]) for k in expected} == expected
    own = monoblock.MptAttentionConfig.fields
    assert {k: written["attn_config"][k] for k in own if k in attention} == {
        k: attention[k] for k in own if k in attention
    }


def test_upstream_fields_open_in_transformers(tmp_path: Path) -> None:
    attn = {"attn_type": "multiquery_attention", "rope": True, "rope_theta": 500, "qk_gn": True}
    monoblock.MptConfig(head_dim=4, ffn_config={"ffn_type": "mptglu"}, attn_config=attn).save_pretrained(
        tmp_path
    )
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.head_dim, theirs.ffn_config) == (4, {"ffn_type": "mptglu"})
    theirs.save_pretrained(tmp_path / "theirs")
    again = monoblock.MptConfig.from_pretrained(tmp_path / "theirs")
    assert again.to_spec() == monoblock.MptConfig.from_pretrained(tmp_path).to_spec()
