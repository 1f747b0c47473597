"""Masks and biases of the visualizer equal those of the PyTorch models, layer by layer, in all families."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import visualizer_cases

import monoblock
from monoblock.backends.pytorch.kernels import attention
from monoblock.backends.pytorch.ops import Scope, relative_position_bucket
from monoblock.spec import Buckets
from monoblock.utils import visibility

MODELS = {
    "mpt": "MptModel",
    "mistral": "MistralModel",
    "fuyu": "FuyuForCausalLM",
    "openai-gpt": "OpenAIGPTModel",
    "gpt_neo": "GPTNeoModel",
    "mpnet": "MPNetModel",
}
SIDES = ("left", "right")


@pytest.fixture
def scopes(monkeypatch: pytest.MonkeyPatch) -> list[Scope]:
    """The scope of each layer, as the attention of a forward pass got it."""
    captured: list[Scope] = []
    eager = attention.attend_eager

    def recorded(q: Any, k: Any, v: Any, scope: Scope, kernel: Any) -> Any:
        captured.append(scope)
        return eager(q, k, v, scope, kernel)

    monkeypatch.setattr(attention, "attend_eager", recorded)
    return captured


def model_of(visualizer: Any, name: str) -> Any:
    torch.manual_seed(0)
    return getattr(monoblock, name)(visualizer.config).eval()


def padded(visualizer: Any, texts: list[str], side: str) -> dict[str, torch.Tensor]:
    encoded = visualizer.tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def check(visualizer: Any, model: Any, scopes: list[Scope], attentions: Any) -> None:
    """Masks and biases equal bit for bit: both are made in fp32, by the same operations."""
    length = visualizer.tokens.length
    spec = visualizer.spec
    table = model.at("rel_bias").weight.detach().numpy() if spec.position(Buckets) else None
    assert len(scopes) == spec.layers == len(attentions)
    for layer, (scope, weights) in enumerate(zip(scopes, attentions, strict=True)):
        mask = visualizer.mask(layer)
        theirs = scope.visible(0, length, 0, length)[:, 0].numpy()
        assert (mask == theirs).all(), layer
        bias = visualizer.bias(layer, table=table)
        added = scope.bias(0, length, 0, length, torch.float32).detach().numpy()
        np.testing.assert_array_equal(bias, np.broadcast_to(added, bias.shape))
        # What the model did in the end: weights are positive where the mask allows, zero elsewhere.
        unmasked = mask.any(-1)[:, None, :, None]  # a fully masked query has equal weights
        given = weights.detach().numpy() > 0
        assert (given == mask[:, None])[np.broadcast_to(unmasked, given.shape)].all(), layer


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", MODELS)
def test_masks_and_biases_equal_the_models(family: str, side: str, scopes: list[Scope]) -> None:
    visualizer = visualizer_cases.visualizer(family)
    visualizer.read(visualizer_cases.TEXTS, padding_side=side)
    assert visualizer.tokens.length > 2 * max(
        w or 0 for w in visualizer.spec.windows
    )  # longer than the windows
    assert not visualizer.tokens.batch.valid_bk.all()
    visualizer.tokenizer.pad_token = visualizer.tokenizer.pad_token or "<unk>"  # Fuyu's tokenizer has none
    model = model_of(visualizer, MODELS[family])
    out = model(**padded(visualizer, visualizer_cases.TEXTS, side), output_attentions=True)
    check(visualizer, model, scopes, out.attentions)


@pytest.mark.parametrize("family", MODELS)
def test_one_sequence_without_padding(family: str, scopes: list[Scope]) -> None:
    visualizer = visualizer_cases.visualizer(family)
    visualizer.read(visualizer_cases.TEXTS[0])
    model = model_of(visualizer, MODELS[family])
    ids = torch.tensor([visualizer.tokenizer(visualizer_cases.TEXTS[0])["input_ids"]])
    check(visualizer, model, scopes, model(input_ids=ids, output_attentions=True).attentions)


@pytest.mark.parametrize("side", SIDES)
def test_image_patches_and_texts_in_one_batch(side: str, scopes: list[Scope]) -> None:
    visualizer = visualizer_cases.visualizer("fuyu")
    image = np.full((8, 12, 3), 200, np.uint8)
    texts, images = ["what is in the box?", "cat"], [image, None]
    visualizer.read(texts, images=images, padding_side=side)
    inputs = [
        visualizer._processor([t], [i], return_tensors="np") for t, i in zip(texts, images, strict=True)
    ]
    with_image = inputs[0]["image_patches_indices"][0] >= 0
    length = visualizer.tokens.length
    start = length - len(with_image) if side == "left" else 0
    assert visualizer.tokens.image_bk[0, start : start + len(with_image)].tolist() == with_image.tolist()
    assert not visualizer.tokens.image_bk[1].any()
    batch = visualizer._processor(texts, images, return_tensors="pt", padding_side=side)
    model = model_of(visualizer, MODELS["fuyu"])
    check(visualizer, model, scopes, model(**batch, output_attentions=True).attentions)


def test_masks_of_packed_rows_equal_the_models(scopes: list[Scope]) -> None:
    visualizer = visualizer_cases.visualizer("mpt", attn_config={"attn_uses_sequence_id": True})
    ids = visualizer.tokenizer(visualizer_cases.TEXTS[1])["input_ids"]
    segments = [int(i >= 4) for i in range(len(ids))]
    visualizer.read(visualizer_cases.TEXTS[1], sequence_id=segments)
    model = model_of(visualizer, "MptModel")
    out = model(input_ids=torch.tensor([ids]), sequence_id=torch.tensor([segments]), output_attentions=True)
    check(visualizer, model, scopes, out.attentions)
    assert not visualizer.mask()[0, 5, 3]


@pytest.mark.parametrize(("count", "distance"), [(32, 128), (12, 128), (6, 20), (64, 1000)])
def test_buckets_equal_the_backends(count: int, distance: int) -> None:
    far = torch.arange(-1500, 1500)
    ours = visibility.relative_position_bucket(far.numpy(), Buckets(count=count, max_distance=distance))
    assert (ours == relative_position_bucket(far, count, distance).numpy()).all()
