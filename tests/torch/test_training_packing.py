"""Packed rows have the loss and the gradients of separate rows; the chunked cross-entropy those of the whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training_runs
from helpers import PAD, model
from measure import assert_close
from tiny_families import CLASSES, fields, monoblock_model
from training_runs import jsonl, sentences

from monoblock.backends.pytorch.training import batches, losses
from monoblock.training import Trainer
from monoblock.training.tasks.base import IGNORED, TokenRow

torch.set_num_threads(1)

NAMES = {
    "mpt": "MptForCausalLM",
    "mistral": "MistralForCausalLM",
    "fuyu": "FuyuForCausalLM",
    "openai-gpt": "OpenAIGPTLMHeadModel",
    "gpt_neo": "GPTNeoForCausalLM",
    "mpnet": "MPNetForMaskedLM",
}
LENGTHS = (12, 5, 20, 2, 17)  # longer and shorter than the windows
ROWS = ((0, 1), (2, 3, 4))  # the second row is longer, so the first one has padding


def made(family: str, **more: Any) -> Any:
    if family == "mpt":
        found = model(NAMES[family], attn={"sliding_window_size": 8, **more})
    else:
        found = monoblock_model(NAMES[family], **fields(CLASSES[NAMES[family]]))
    return found.eval()  # without dropout, with gradients


def texts() -> list[TokenRow]:
    rng = np.random.default_rng(3)
    found = []
    for length in LENGTHS:
        ids = rng.integers(10, 89, length).astype(np.int32)
        labels = np.where(rng.random(length) < 0.7, ids, IGNORED).astype(np.int64)
        labels[0], labels[1] = IGNORED, ids[1]
        found.append(TokenRow(ids, labels))
    return found


def loss_and_gradients(module: Any, rows: list[list[TokenRow]]) -> tuple[float, dict[str, torch.Tensor]]:
    module.zero_grad()
    given, labels = batches.inputs(rows, module, PAD)
    assert labels is not None
    loss = losses.token_loss(module, given, labels, module.row.head == "causal") / 40
    loss.backward()
    return float(loss), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", [*NAMES, "mpt by sequence ids"])
def test_packed_equals_separate(family: str) -> None:
    segments = {"attn_uses_sequence_id": True} if " " in family else {}
    module, parts = made(family.partition(" ")[0], **segments), texts()
    packed = loss_and_gradients(module, [[parts[i] for i in row] for row in ROWS])
    separate = [loss_and_gradients(module, [[part]]) for part in parts]
    assert packed[0] == pytest.approx(sum(loss for loss, _ in separate), abs=1e-5)
    for name, gradient in packed[1].items():
        assert_close(name, gradient, sum(found[name] for _, found in separate), 1e-5)
    padded = loss_and_gradients(module, [[part] for part in parts])
    assert padded[0] == pytest.approx(packed[0], abs=1e-5)


@pytest.mark.parametrize("family", ["mpt", "mistral", "mpnet"])
def test_chunks_have_the_loss_of_whole_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three tokens: tied and untied heads, a head with a dense layer and a norm."""
    module, parts = made(family), texts()
    given, labels = batches.inputs([[part] for part in parts], module, PAD)
    assert labels is not None
    module.zero_grad()
    logits = module(**given).logits
    causal = module.row.head == "causal"
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 40
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    monkeypatch.setattr(losses, "CHUNK", 3 * module.spec.vocab + 1)
    loss, found = loss_and_gradients(module, [[part] for part in parts])
    assert loss == pytest.approx(float(expected), abs=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert_close(name, found[name], gradient, 1e-5)


def test_the_logits_of_one_chunk_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward pass and in the backward pass."""
    module, sizes = made("mistral"), []
    monkeypatch.setattr(losses, "CHUNK", 4 * module.spec.vocab)

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            made = (
                isinstance(found, torch.Tensor) and not found._is_view()
            )  # not the head's transposed matrix
            if made and found.shape[-1:] == (module.spec.vocab,):
                sizes.append(found.numel())
            return found

    with Sizes():
        loss_and_gradients(module, [[part] for part in texts()])
    assert max(sizes) <= 4 * module.spec.vocab


def test_a_packed_run_learns_as_well(tmp_path: Path) -> None:
    """As many steps over rows of several texts: fewer rows hold them, and the loss falls further."""
    tiny = training_runs.folder(tmp_path / "model", "MistralForCausalLM")
    data = jsonl(tmp_path / "data.jsonl", ({"text": text} for text in sentences(100)))
    results = {}
    for packing in (False, True):
        options = training_runs.options(
            tiny,
            data,
            tmp_path / str(packing),
            packing=packing,
            max_length=60,
            max_steps=12,
            eval_fraction=0.2,
        )
        results[packing] = Trainer(options).train()
    assert results[True].metrics["loss"] < results[False].metrics["loss"]
