"""Tiny JAX models of every family, with sizes divisible by four devices, and inputs. Imports no other framework."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from monoblock.backends.flax.classes import make_class

VOCAB, PAD, PATCH = 64, 3, 7
LENGTHS = (14, 9, 14, 5)  # tokens of the rows of a batch; longer than the windows

_MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32, "expansion_ratio": 2, "no_bias": False}
_MISTRAL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 6,
}
_FUYU = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 2,
    "image_token_id": PATCH,
}
_OPENAI_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
_GPT_NEO = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 48,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 6,
    "max_position_embeddings": 32,
}
_MPNET = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 34,
}

# One class for each family -> the fields of its tiny config.
MODELS: dict[str, dict[str, Any]] = {
    "FlaxMptForCausalLM": _MPT,
    "FlaxMistralForCausalLM": _MISTRAL,
    "FlaxFuyuForCausalLM": _FUYU,
    "FlaxOpenAIGPTLMHeadModel": _OPENAI_GPT,
    "FlaxGPTNeoForCausalLM": _GPT_NEO,
    "FlaxMPNetForMaskedLM": _MPNET,
}
# One layer: compiles in half the time.
_SHALLOW: dict[str, dict[str, Any]] = {
    "mpt": {"n_layers": 1},
    "openai-gpt": {"n_layer": 1},
    "gpt_neo": {"num_layers": 1, "attention_types": [[["local"], 1]]},
}
FIELDS = {make_class(name).family.name: fields for name, fields in MODELS.items()}


def tiny(name: str, seed: int = 0, *, shallow: bool = False, **fields: Any) -> Any:
    """A tiny model of that class with random parameters, norms and biases among them; one layer if shallow."""
    cls: Any = make_class(name)
    family = cls.family.name
    layers = _SHALLOW.get(family, {"num_hidden_layers": 1}) if shallow else {}
    ids = {"vocab_size": VOCAB, "pad_token_id": PAD}
    config = cls.config_class(**{**FIELDS[family], **layers, **ids, **fields})
    model = cls(config)
    model.params = randomised(model, seed)
    return model


def randomised(model: Any, seed: int = 0, std: float = 0.2) -> Any:
    """Random parameters for the model: leaves from a normal distribution, the scales of norms around 1."""
    generator = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        noise = generator.standard_normal(leaf.shape, np.float32)
        return jax.numpy.asarray(1 + 0.3 * noise if path[-1].key in ("scale", "weight") else std * noise)

    return jax.tree_util.tree_map_with_path(draw, model.params_shape_tree)


def batch(padded: bool = True, seed: int = 1) -> dict[str, np.ndarray]:
    """Ids and mask (4, 14), left-padded."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(10, VOCAB, (len(LENGTHS), max(LENGTHS)), np.int32)
    if not padded:
        return {"input_ids": ids}
    mask = (np.arange(max(LENGTHS)) >= max(LENGTHS) - np.array(LENGTHS)[:, None]).astype(np.int32)
    return {"input_ids": np.where(mask == 0, PAD, ids).astype(np.int32), "attention_mask": mask}
