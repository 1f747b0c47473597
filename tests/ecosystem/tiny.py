"""Tiny random models of the six families, a tokenizer, inputs, and access to both libraries."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from helpers import randomised
from text_tokenizers import byte_level

torch.set_num_threads(1)

SPECIAL = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
# In this order, since MPNet's padding id is always 1.
BOS, PAD, EOS, UNK, MASK = range(5)
VOCAB = 280
LENGTH = 128

TEXTS = [
    "the cat sat on the mat",
    "a dog ran",
    "the dog sat on a cat and ran to the mat again",
    "on the mat",
    "a cat and a dog",
    "the mat ran on",
]

_COMMON = {"vocab_size": VOCAB, "bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS}
# Without dropout, since the two libraries draw random numbers in different orders.
_FIELDS: dict[str, dict[str, Any]] = {
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": LENGTH},
    "mistral": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "sliding_window": 16,
    },
    "fuyu": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "patch_size": 4,
        "image_size": 20,
        "image_token_id": VOCAB - 1,
    },
    "openai-gpt": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": LENGTH,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "summary_first_dropout": 0.0,
    },
    "gpt_neo": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
        "max_position_embeddings": LENGTH,
        "classifier_dropout": 0.0,
    },
    "mpnet": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH + 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}

# The class of the language model.
LANGUAGE = {
    "mpt": "MptForCausalLM",
    "mistral": "MistralForCausalLM",
    "fuyu": "FuyuForCausalLM",
    "openai-gpt": "OpenAIGPTLMHeadModel",
    "gpt_neo": "GPTNeoForCausalLM",
    "mpnet": "MPNetForMaskedLM",
}
BARE = {
    "mpt": "MptModel",
    "mistral": "MistralModel",
    "openai-gpt": "OpenAIGPTModel",
    "gpt_neo": "GPTNeoModel",
    "mpnet": "MPNetModel",
}
SEQUENCE = {
    "mpt": "MptForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "openai-gpt": "OpenAIGPTForSequenceClassification",
    "gpt_neo": "GPTNeoForSequenceClassification",
    "mpnet": "MPNetForSequenceClassification",
}
# The class of a block, by transformers' name, and the list of them.
BLOCKS = {
    "mistral": ("MistralDecoderLayer", "model.layers"),
    "mpt": ("MptBlock", "transformer.blocks"),
    "gpt_neo": ("GPTNeoBlock", "transformer.h"),
    "mpnet": ("MPNetLayer", "mpnet.encoder.layer"),
    "fuyu": ("PersimmonDecoderLayer", "model.language_model.layers"),
    "openai-gpt": ("Block", "transformer.h"),
}
FAMILIES = tuple(LANGUAGE)
CAUSAL = tuple(family for family in FAMILIES if family != "mpnet")

# (writer, reader) of a file.
WAYS = [("transformers", "transformers"), ("transformers", "monoblock"), ("monoblock", "transformers")]


def family_of(name: str) -> str:
    """The model type of a class, e.g. "gpt_neo" of "GPTNeoModel"."""
    return getattr(transformers, name).config_class.model_type


def fields(name: str, **more: Any) -> dict[str, Any]:
    """The fields of a tiny config for a class."""
    return {**_COMMON, **_FIELDS[family_of(name)], **more}


CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer's files, with a chat template."""
    made = byte_level(" the", " cat", " dog", " mat", " on", " sat")
    state = json.loads(made.to_str())
    words = sorted(
        (word for word in state["model"]["vocab"] if word != "<eos>"), key=state["model"]["vocab"].__getitem__
    )
    state["model"]["vocab"] = {word: i for i, word in enumerate([*SPECIAL.values(), *words])}
    assert len(state["model"]["vocab"]) <= VOCAB - 1  # the last id is Fuyu's image token
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    state["added_tokens"] = [{"id": i, "content": word, **flags} for i, word in enumerate(SPECIAL.values())]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **SPECIAL,
        "model_max_length": LENGTH,
        "chat_template": CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


class Folders:
    """Checkpoints with random weights and a tokenizer, written by transformers."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, name: str, **more: Any) -> Path:
        """The checkpoint of a class with config fields `more`. Read-only."""
        key = "-".join([name, *(f"{field}={value}" for field, value in sorted(more.items()))])
        folder = self.root / key.replace("/", "_")
        if not folder.exists():
            cls = getattr(transformers, name)
            with torch.random.fork_rng():  # so that the order of tests does not change random numbers
                torch.manual_seed(0)
                model = randomised(cls(cls.config_class(**fields(name, **more))))
            model.tie_weights()
            model.save_pretrained(folder)
            write_tokenizer(folder)
        return folder


@dataclass(frozen=True)
class Library:
    """transformers or monoblock: `library.AutoModel` is the class of that library."""

    name: str
    folders: Folders

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self.name), attribute)

    def __str__(self) -> str:
        return self.name

    def model(self, name: str, **more: Any) -> Any:
        """The tiny model of a class, in evaluation mode, with the same weights in both libraries."""
        return getattr(self, name).from_pretrained(self.folders(name, **more)).eval()

    def open(self, name: str, folder: Path) -> Any:
        """Loads a checkpoint as that class; every parameter must be in the file."""
        model, info = getattr(self, name).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"], info
        assert not info["unexpected_keys"], info
        return model.eval()

    def tokenizer(self) -> Any:
        return self.AutoTokenizer.from_pretrained(self.folders("MistralForCausalLM"))


def copied(folder: Path, to: Path) -> Path:
    """A writable copy of a checkpoint."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    return to


def batch(padding: str = "right", seed: int = 0) -> dict[str, torch.Tensor]:
    """Ids and mask of three sequences of 21, 9 and 17 tokens, longer than the windows; "none": without padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (21, 9, 17)
    ids = torch.randint(5, VOCAB - 1, (3, 21), generator=generator)
    mask = torch.ones_like(ids)
    if padding != "none":
        for row, length in zip(mask, lengths, strict=True):
            row[slice(length, None) if padding == "right" else slice(0, 21 - length)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def labelled(name: str, padding: str = "right", seed: int = 0) -> dict[str, torch.Tensor]:
    """`batch` with labels for the loss of a class, -100 at padding."""
    inputs = batch(padding, seed)
    if "SequenceClassification" in name:
        return {**inputs, "labels": torch.tensor([1, 0, 1])}
    if "QuestionAnswering" in name:
        starts, ends = torch.tensor([2, 0, 3]), torch.tensor([4, 5, 8])
        return {**inputs, "start_positions": starts, "end_positions": ends}
    ids = inputs["input_ids"]
    labels = ids % 2 if "TokenClassification" in name else ids
    return {**inputs, "labels": labels.masked_fill(inputs["attention_mask"] == 0, -100)}


def logits(model: Any, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """The logits of a model or its wrapper on `batch`, in evaluation mode, 0 at padding."""
    inputs = batch() if inputs is None else inputs
    model.eval()
    with torch.no_grad():
        out = model(**inputs)
    if "start_logits" in out:
        first = torch.stack((out["start_logits"], out["end_logits"]), -1)
    else:
        first = out["logits" if "logits" in out else "last_hidden_state"]
    if first.shape[:2] == inputs["input_ids"].shape:
        first = first * inputs["attention_mask"][..., None]
    return first.float()


def steps(model: Any, name: str, count: int = 2, lr: float = 1e-2, eps: float = 1e-8) -> list[float]:
    """The losses of `count` steps of AdamW on the trainable parameters."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, eps=eps)
    losses = []
    for i in range(count):
        loss = model(**labelled(name, seed=i)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Equal names and bitwise equal tensors."""
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def equal_trees(one: Any, other: Any) -> None:
    """Nested values with equal keys and bitwise equal tensors."""
    if isinstance(one, dict):
        assert sorted(one) == sorted(other)
        for key in one:
            equal_trees(one[key], other[key])
    elif isinstance(one, list | tuple):
        for x, y in zip(one, other, strict=True):
            equal_trees(x, y)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other
