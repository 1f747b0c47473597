"""What tokenizers and processors give and take as arrays of a framework, whichever it is."""

from __future__ import annotations

from typing import Any

import fuyu_tokenizer
import numpy as np
import pytest
from text_tokenizers import byte_level

from monoblock import (
    BatchEncoding,
    FuyuBatchEncoding,
    FuyuImageProcessor,
    FuyuProcessor,
    PreTrainedTokenizerFast,
)

TEXTS = ["the quick brown fox", "the dog"]


def check_tokenizer(kind: str, array: type, integer: Any) -> None:
    """Ids and masks: equal to the lists, padded again, decoded, and moved into other frameworks' arrays."""
    made = PreTrainedTokenizerFast(tokenizer_object=byte_level("the"), pad_token="<eos>")
    lists = made(TEXTS, padding=True)
    out = made(TEXTS, padding=True, return_tensors=kind)
    for name in ("input_ids", "attention_mask"):
        assert isinstance(out[name], array)
        assert out[name].dtype == integer
        assert np.asarray(out[name]).tolist() == lists[name]
    assert made("", add_special_tokens=False, return_tensors=kind)["input_ids"].dtype == integer
    again = made.pad({"input_ids": out["input_ids"]}, padding="max_length", max_length=32)
    assert isinstance(again["input_ids"], array)
    assert again["input_ids"].shape == (2, 32)
    rows = [{"input_ids": made(text, return_tensors=kind)["input_ids"][0]} for text in TEXTS]
    assert np.asarray(made.pad(rows)["input_ids"]).tolist() == lists["input_ids"]
    assert made.decode(out["input_ids"][0]) == made.decode(lists["input_ids"][0])
    assert made.batch_decode(out["input_ids"]) == made.batch_decode(lists["input_ids"])
    one = BatchEncoding({"input_ids": [1, 2]}, tensor_type=kind, prepend_batch_axis=True)
    assert one["input_ids"].shape == (1, 2)
    assert out.convert_to_tensors(kind)["input_ids"] is out["input_ids"]
    assert isinstance(BatchEncoding(dict(out)).convert_to_tensors("np")["input_ids"], np.ndarray)
    with pytest.raises(ValueError, match="pass padding=True"):
        made(TEXTS, return_tensors=kind)
    with pytest.raises(ValueError, match="moves PyTorch tensors"):
        out.to("cpu")


def check_processor(kind: str, array: type) -> None:
    """Fuyu's batches: ids, patches in lists, the newer form, and images that are such arrays themselves."""
    text = PreTrainedTokenizerFast(tokenizer_object=fuyu_tokenizer.backend(), **fuyu_tokenizer.SPECIAL)
    sizes = {"patch_size": {"height": 4, "width": 4}, "size": {"height": 20, "width": 24}}
    images = FuyuImageProcessor(**sizes)
    processor = FuyuProcessor(images, text)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    call = {"text": ["a cat", "what is in the box"], "images": [pixels, pixels[:8]]}
    expected, out = processor(**call, return_tensors="np"), processor(**call, return_tensors=kind)
    assert isinstance(out, FuyuBatchEncoding)
    for name in ("input_ids", "attention_mask", "image_patches_indices"):
        assert isinstance(out[name], array)
        assert np.asarray(out[name]).tolist() == expected[name].tolist()
    assert [isinstance(patches, array) for patches in out["image_patches"]] == [True, True]
    for ours, numpys in zip(out["image_patches"], expected["image_patches"], strict=True):
        np.testing.assert_array_equal(np.asarray(ours), numpys)
    newer = processor(**call, return_tensors=kind, return_legacy_image_output=False)
    assert isinstance(newer["pixel_values"], array)
    assert processor.batch_decode(out["input_ids"]) == processor.batch_decode(expected["input_ids"])
    read = processor.post_process_image_text_to_text
    assert read(out["input_ids"]) == read(expected["input_ids"])
    own = images(pixels, return_tensors=kind)
    assert all(isinstance(value, array) for value in own.values())
    from_own = processor("a cat", own_image(kind, pixels), return_tensors=kind)
    np.testing.assert_array_equal(
        np.asarray(from_own["image_patches"][0]),
        processor("a cat", pixels, return_tensors="np")["image_patches"][0],
    )
    with pytest.raises(ValueError, match="moves PyTorch tensors"):
        out.to("cpu")


def own_image(kind: str, pixels: np.ndarray) -> Any:
    """The image as an array of the framework."""
    return FuyuBatchEncoding({"image": pixels}, tensor_type=kind)["image"]
