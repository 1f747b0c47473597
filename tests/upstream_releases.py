"""Checkpoints of tiny random models in the original releases' formats, with names and layouts written out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import randomised

import monoblock


def mistral(**fields: Any) -> Any:
    """A tiny MistralForCausalLM with random weights."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"head_dim": 6, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = monoblock.MistralConfig(**{**sizes, **heads, **fields})
    return randomised(monoblock.MistralForCausalLM(config)).eval()


def saved(model: Any, folder: Path) -> Path:
    """Saves the model into the folder."""
    model.save_pretrained(folder)
    return folder


def names(folder: Path) -> list[str]:
    """The names of a folder's entries, hidden ones included."""
    return sorted(path.name for path in folder.iterdir())


# params.json of `mistral_release`
MISTRAL = {
    "dim": 24,
    "n_layers": 2,
    "head_dim": 6,
    "hidden_dim": 40,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 61,
    "rope_theta": 5000.0,
    "sliding_window": 7,
}


def mistral_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights with the names and shapes of mistral_inference."""
    torch.manual_seed(seed)
    dim, inner, q, kv = 24, 40, 24, 12
    state = {"tok_embeddings.weight": torch.randn(61, dim), "norm.weight": 1 + 0.1 * torch.randn(dim)}
    for i in range(2):
        layer = f"layers.{i}."
        state |= {
            layer + "attention.wq.weight": 0.3 * torch.randn(q, dim),
            layer + "attention.wk.weight": 0.3 * torch.randn(kv, dim),
            layer + "attention.wv.weight": 0.3 * torch.randn(kv, dim),
            layer + "attention.wo.weight": 0.3 * torch.randn(dim, q),
            layer + "feed_forward.w1.weight": 0.3 * torch.randn(inner, dim),
            layer + "feed_forward.w2.weight": 0.3 * torch.randn(dim, inner),
            layer + "feed_forward.w3.weight": 0.3 * torch.randn(inner, dim),
            layer + "attention_norm.weight": 1 + 0.1 * torch.randn(dim),
            layer + "ffn_norm.weight": 1 + 0.1 * torch.randn(dim),
        }
    return state | {"output.weight": 0.3 * torch.randn(61, dim)}


def mistral_release(folder: Path, state: dict[str, torch.Tensor] | None = None, **fields: Any) -> Path:
    """A folder with consolidated.00.pth and params.json."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(mistral_state() if state is None else state, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(MISTRAL | fields))
    (folder / "tokenizer.model.v3").write_bytes(b"pieces")
    return folder


def openai_release(folder: Path, model: Any, shards: int = 10) -> Path:
    """OpenAI's files of an OpenAIGPTLMHeadModel: one array in shards; matrices are (inputs, outputs)."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.numpy() for name, tensor in model.hub_state_dict().items()}
    rows = [state["transformer.positions_embed.weight"], state["transformer.tokens_embed.weight"]]
    for i in range(model.config.n_layer):
        for module in ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2"):
            for kind in ("weight", "bias"):
                array = state[f"transformer.h.{i}.{module}.{kind}"]
                rows.append(array[None] if array.ndim == 2 else array)
    flat = np.concatenate([row.reshape(-1) for row in rows])
    for i, shard in enumerate(np.array_split(flat, shards)):
        np.save(folder / f"params_{i}.npy", shard)
    (folder / "params_shapes.json").write_text(json.dumps([list(row.shape) for row in rows]))
    (folder / "encoder_bpe_40000.json").write_text('{"<unk>": 0, "a</w>": 1}')
    (folder / "vocab_40000.bpe").write_text("#version: 0.2\nt h\n")
    return folder


class Megatron:
    """A class of the training framework, which no reader can import."""


def fuyu_release(folder: Path, model: Any) -> Path:
    """Adept's release of a FuyuForCausalLM: a training checkpoint with nested dicts and pickled objects."""
    import argparse

    encoder: dict[str, torch.Tensor] = {}
    state = model.hub_state_dict()
    for name, tensor in state.items():
        stem = name.removeprefix("model.language_model.")
        if stem.startswith(("layers.", "final_layernorm.")):
            encoder[stem.replace("self_attn", "self_attention")] = tensor
    embed = state["model.language_model.embed_tokens.weight"]
    vision = {kind: state[f"model.vision_embed_tokens.{kind}"] for kind in ("weight", "bias")}
    content = {
        "args": argparse.Namespace(num_layers=2, mask=Megatron()),
        "iteration": 1251,
        "rng_state": [np.random.default_rng(0).integers(0, 9, 3)],
        "model": {
            "language_model": {
                "embedding": {"word_embeddings": {"weight": embed}},
                "encoder": encoder | {"rotary_emb.inv_freq": torch.ones(2)},
            },
            "word_embeddings_for_head": {"weight": state["lm_head.weight"]},
            "vit_encoder": {"linear_encoder": vision},
            "image_patch_projection": {"weight": torch.ones(3)},
        },
    }
    rank = folder / "iter_0001251" / "mp_rank_00"
    rank.mkdir(parents=True)
    torch.save(content, rank / "model_optim_rng.pt")
    (folder / "adept_vocab.model").write_bytes(b"unigrams")
    return folder


def foundry_release(folder: Path, model: Any, prefix: str = "model.") -> Path:
    """An export of llm-foundry: its class name and extra config fields, a `.bin` file, prefixed tensor names."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(model.config.to_json_string())
    config |= {
        "architectures": ["MPTForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
        "init_config": {"name": "kaiming_normal_"},
        "ffn_config": {"ffn_type": "mptmlp"},
        "fc_type": "torch",
        "loss_fn": "fused_crossentropy",
    }
    del config["no_bias"]  # llm-foundry's default is False
    del config["attn_config"]["alibi"]  # False, too
    (folder / "config.json").write_text(json.dumps(config))
    state = {prefix + name: tensor for name, tensor in model.hub_state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder
