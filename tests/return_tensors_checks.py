"""Checks of `return_tensors` in tokenizers and processors, for the arrays of any framework."""

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
    """Ids and masks equal the lists, can be padded again, decoded and converted to other frameworks' arrays."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level("the"), pad_token="<eos>")
    lists = tokenizer(TEXTS, padding=True)
    out = tokenizer(TEXTS, padding=True, return_tensors=kind)
    for name in ("input_ids", "attention_mask"):
        assert isinstance(out[name], array)
        assert out[name].dtype == integer
        assert np.asarray(out[name]).tolist() == lists[name]
    assert tokenizer("", add_special_tokens=False, return_tensors=kind)["input_ids"].dtype == integer
    again = tokenizer.pad({"input_ids": out["input_ids"]}, padding="max_length", max_length=32)
    assert isinstance(again["input_ids"], array)
    assert again["input_ids"].shape == (2, 32)
    rows = [{"input_ids": tokenizer(text, return_tensors=kind)["input_ids"][0]} for text in TEXTS]
    assert np.asarray(tokenizer.pad(rows)["input_ids"]).tolist() == lists["input_ids"]
    assert tokenizer.decode(out["input_ids"][0]) == tokenizer.decode(lists["input_ids"][0])
    assert tokenizer.batch_decode(out["input_ids"]) == tokenizer.batch_decode(lists["input_ids"])
    one = BatchEncoding({"input_ids": [1, 2]}, tensor_type=kind, prepend_batch_axis=True)
    assert one["input_ids"].shape == (1, 2)
    assert out.convert_to_tensors(kind)["input_ids"] is out["input_ids"]
    assert isinstance(BatchEncoding(dict(out)).convert_to_tensors("np")["input_ids"], np.ndarray)
    with pytest.raises(ValueError, match="pass padding=True"):
        tokenizer(TEXTS, return_tensors=kind)
    with pytest.raises(ValueError, match="moves PyTorch tensors"):
        out.to("cpu")


def check_processor(kind: str, array: type) -> None:
    """Fuyu's batches: ids, lists of patches, the current output format, and images given as such arrays."""
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
    for ours, reference in zip(out["image_patches"], expected["image_patches"], strict=True):
        np.testing.assert_array_equal(np.asarray(ours), reference)
    current = processor(**call, return_tensors=kind, return_legacy_image_output=False)
    assert isinstance(current["pixel_values"], array)
    assert processor.batch_decode(out["input_ids"]) == processor.batch_decode(expected["input_ids"])
    read = processor.post_process_image_text_to_text
    assert read(out["input_ids"]) == read(expected["input_ids"])
    features = images(pixels, return_tensors=kind)
    assert all(isinstance(value, array) for value in features.values())
    from_array = processor("a cat", image_array(kind, pixels), return_tensors=kind)
    np.testing.assert_array_equal(
        np.asarray(from_array["image_patches"][0]),
        processor("a cat", pixels, return_tensors="np")["image_patches"][0],
    )
    with pytest.raises(ValueError, match="moves PyTorch tensors"):
        out.to("cpu")


def image_array(kind: str, pixels: np.ndarray) -> Any:
    """The image as an array of the framework."""
    return FuyuBatchEncoding({"image": pixels}, tensor_type=kind)["image"]
