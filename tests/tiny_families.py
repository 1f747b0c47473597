"""Tiny models of every family, the same in transformers and here, with a non-default value in each field that
transformers implements; and inputs that reach every feature."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from helpers import PAD, PADDINGS, batch, randomised
from measure import assert_close, rounding

import monoblock
from monoblock.families import FAMILIES, class_names, family, family_of

VOCAB, LABELS, TOKENS = 89, 4, 23
LENGTHS = (23, 9, 17)  # tokens of the rows of a batch; the longest is more than twice each window
CHOICES = 2
PATCH, PATCH_SIZE = 7, 4 * 4 * 3  # Fuyu's image token id, and the values of a patch (4 x 4 RGB)

FAMILY_NAMES = tuple(name for name in FAMILIES if name != "mpt")
# Class -> model_type, of all families; CLASSES is without MPT, whose options have tests of their own.
MODEL_TYPES = {name: model_type for model_type in FAMILIES for name in class_names(model_type)}
CLASSES = {name: model_type for name, model_type in MODEL_TYPES.items() if model_type != "mpt"}
KIND = {name: family(model_type).model_class(name).head for name, model_type in MODEL_TYPES.items()}
GENERATING = tuple(name for name in CLASSES if KIND[name] == "causal")
# MPNet recognises padding by its id, which is 1 in transformers whatever the config's pad_token_id.
PADS = {name: 1 if name == "mpnet" else PAD for name in FAMILIES}
LEARNED = ("openai-gpt", "gpt_neo")  # learned positions that are counted from the attention mask


def _mpt(heads: int) -> dict[str, Any]:
    sizes = {"d_model": 6 * heads, "n_heads": heads, "n_layers": 3, "max_seq_len": 64}
    # Projections have a standard deviation of about 1.2, so the clip has an effect.
    attn = {"clip_qkv": 0.9, "softmax_scale": 0.23}
    return {**sizes, "layer_norm_epsilon": 1e-3, "attn_config": attn}


def _mistral(heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": heads}
    grouped = {"num_key_value_heads": {3: 1, 6: 2, 8: 4}[heads], "head_dim": 10}
    rest = {"max_position_embeddings": 64, "rms_norm_eps": 1e-3, "sliding_window": 9, "hidden_act": "gelu"}
    return {**sizes, **grouped, **rest, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}


def _fuyu(heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": 8 * heads, "intermediate_size": 50, "num_hidden_layers": 3}
    image = {"patch_size": 4, "image_token_id": PATCH, "image_size": 20}
    rest = {"layer_norm_eps": 1e-3, "hidden_act": "gelu_new", "rope_theta": 500.0}
    return {**sizes, **image, **rest, "num_attention_heads": heads, "max_position_embeddings": 64}


def _openai_gpt(heads: int) -> dict[str, Any]:
    sizes = {"n_embd": 6 * heads, "n_layer": 3, "n_head": heads, "n_positions": 64}
    return {**sizes, "afn": "silu", "layer_norm_epsilon": 1e-3, "summary_activation": "tanh"}


def _gpt_neo(heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": 6 * heads, "num_layers": 3, "num_heads": heads, "intermediate_size": 50}
    layers = {"attention_types": [[["global", "local"], 1], [["local"], 1]], "window_size": 7}
    rest = {"activation_function": "gelu", "layer_norm_epsilon": 1e-3}
    return {**sizes, **layers, **rest, "max_position_embeddings": 64}


def _mpnet(heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": 6 * heads, "num_hidden_layers": 3, "num_attention_heads": heads}
    rest = {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "max_position_embeddings": 66}
    return {**sizes, **rest, "intermediate_size": 50}


_FIELDS = {
    "mpt": _mpt,
    "mistral": _mistral,
    "fuyu": _fuyu,
    "openai-gpt": _openai_gpt,
    "gpt_neo": _gpt_neo,
    "mpnet": _mpnet,
}


# Fields of models with fewer layers than the default of three, which compile faster.
TWO_LAYERS: dict[str, dict[str, Any]] = {
    "mpt": {"n_layers": 2},
    "mistral": {"num_hidden_layers": 2},
    "fuyu": {"num_hidden_layers": 2},
    "openai-gpt": {"n_layer": 2},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "mpnet": {"num_hidden_layers": 2},
}

ONE_LAYER: dict[str, dict[str, Any]] = {
    "mpt": {"n_layers": 1},
    "mistral": {"num_hidden_layers": 1},
    "fuyu": {"num_hidden_layers": 1},
    "openai-gpt": {"n_layer": 1},
    "gpt_neo": {"num_layers": 1, "attention_types": [[["local"], 1]]},
    "mpnet": {"num_hidden_layers": 1},
}


def fields(model_type: str, heads: int = 6, **more: Any) -> dict[str, Any]:
    """The fields of a tiny config."""
    ids = {"pad_token_id": PADS[model_type], "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB}
    if model_type == "mpnet":
        ids["bos_token_id"] = 0
    return {**ids, **_FIELDS[model_type](heads), "num_labels": LABELS, **more}


def transformers_model(name: str, **kwargs: Any) -> Any:
    """transformers' model of that class, random, in evaluation mode; eager, so that it returns attentions."""
    cls = getattr(transformers, name)
    made = cls(cls.config_class(**kwargs, attn_implementation="eager"))
    randomised(made, seed=kwargs.get("num_attention_heads", 6))
    made.tie_weights()
    return made.eval()


def monoblock_model(name: str, theirs: Any = None, **kwargs: Any) -> Any:
    """monoblock's model of that class, with the weights of transformers' model or with random ones."""
    made = getattr(monoblock, name)(family_of(name).config(**kwargs)).eval()
    if theirs is None:
        return randomised(made)
    made.load_state_dict({k: v.clone() for k, v in theirs.state_dict().items()})
    return made


@functools.cache
def pair(name: str, heads: int = 6, labels: int = LABELS) -> tuple[Any, Any]:
    """The same random model in transformers and here."""
    if name == "MPNetForQuestionAnswering":
        labels = 2  # in transformers this head has an output for each label of the config
    return model_pair(name, **fields(MODEL_TYPES[name], heads, num_labels=labels))


def model_pair(name: str, **kwargs: Any) -> tuple[Any, Any]:
    theirs = transformers_model(name, **kwargs)
    return theirs, monoblock_model(name, theirs, **kwargs)


def model_inputs(name: str, padding: str = "left", seed: int = 1) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids and mask for a class: (batch, tokens), or (batch, choices, tokens) for multiple choice."""
    pad = PADS[MODEL_TYPES[name]]
    if KIND[name] not in ("choice", "double"):
        ids, mask = batch(padding, LENGTHS, VOCAB, seed, low=10, pad=pad)
        return ids, mask
    ids, mask = batch(padding, (*LENGTHS, 12, 20, 5), VOCAB, seed, low=10, pad=pad)
    return ids.unflatten(0, (3, CHOICES)), None if mask is None else mask.unflatten(0, (3, CHOICES))


def explicit_positions(model_type: str, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The `position_ids` that transformers needs: its learned positions do not depend on the attention mask."""
    if mask is None or model_type not in LEARNED:
        return {}
    first = mask.argmax(-1, keepdim=True)
    return {"position_ids": (torch.arange(mask.shape[-1]) - first).clamp(min=0)}


def theirs_inputs(name: str, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, Any]:
    """The same inputs for transformers, whose double-heads model takes masks of (batch x choices, tokens)."""
    given = {"attention_mask": mask, **explicit_positions(MODEL_TYPES[name], mask)}
    if KIND[name] == "double":
        given = {key: None if x is None else x.flatten(0, 1) for key, x in given.items()}
    return {"input_ids": ids, **given}


def logits_of(out: Any) -> torch.Tensor:
    """All outputs of a head, (batch, [tokens,] outputs)."""
    if "start_logits" in out:
        return torch.stack((out.start_logits, out.end_logits), dim=-1)
    return out.logits if "logits" in out else out.last_hidden_state


def assert_same_logits(what: str, name: str, theirs: Any, ours: Any) -> None:
    """Compares logits of the class `name`, for each padding and each attention implementation of the CPU."""
    for padding in PADDINGS:
        ids, mask = model_inputs(name, padding)
        there = theirs(ids, attention_mask=mask, output_hidden_states=True)
        bound = rounding(ours.spec, there)
        for kernel in ("sdpa", "eager"):
            ours.set_attn_implementation(kernel)
            found = ours(ids, attention_mask=mask).logits
            assert_close(f"{what}, {padding}, {kernel}", found, there.logits, bound, mask)


def per_token(name: str) -> bool:
    """Whether a head has outputs for every token."""
    return KIND[name] not in ("sequence", "first", "choice")


def labels_of(name: str, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Labels for a class's loss; -100 at padding, at the token that follows padding, and at every sixth token."""
    kind = KIND[name]
    rows = len(ids)
    if kind in ("sequence", "first"):
        return {"labels": torch.tensor([2, 0, 3])[:rows]}
    if kind == "choice":
        return {"labels": torch.tensor([1, 0, 1])[:rows]}
    if kind == "span":
        return {
            "start_positions": torch.tensor([14, 15, 16]),
            "end_positions": torch.tensor([16, TOKENS, 999]),
        }
    labels = (ids * 7 + 1) % (LABELS if kind == "token" else VOCAB)
    labels[..., 5::6] = -100
    if mask is not None:
        labels[(mask == 0) | (mask.roll(1, -1) == 0)] = -100
    return {"labels": labels} | ({"mc_labels": torch.tensor([1, 0, 0])} if kind == "double" else {})


def with_images(counts: tuple[int, ...], newline: int = 8, columns: int = 3) -> tuple[Any, ...]:
    """Left-padded ids, mask, each row's patches (counts[i], 48), and for each token the index of its patch or -1. Rows
    of patches end with a newline token, as in the processor's output."""
    generator = torch.Generator().manual_seed(9)
    rows, indices = [], []
    for i, count in enumerate(counts):
        row: list[int] = []
        index: list[int] = []
        for n in range(count):
            row.append(PATCH)
            index.append(n)
            if n % columns == columns - 1:
                row.append(newline)
                index.append(-1)
        text = torch.randint(10, VOCAB, (9 + 4 * i,), generator=generator).tolist()
        rows.append(row + text)
        indices.append(index + [-1] * len(text))
    length = max(map(len, rows))
    ids = torch.tensor([[PADS["fuyu"]] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    patch_indices = torch.tensor([[-1] * (length - len(index)) + index for index in indices])
    return ids, mask, [torch.randn(count, PATCH_SIZE, generator=generator) for count in counts], patch_indices
