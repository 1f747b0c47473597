"""The image-text-to-text pipeline against transformers, with the processor that works there without torchvision."""

from __future__ import annotations

from typing import Any

import fuyu_tokenizer
import numpy as np
import pytest
import tiny_families
import torch
import transformers
from PIL import Image
from test_fuyu_processing_parity import Reference
from transformers.models.fuyu.processing_fuyu import FuyuProcessor as TheirProcessor

from monoblock import FuyuImageProcessor, FuyuProcessor, PreTrainedTokenizerFast, pipeline

SIZES: dict[str, Any] = {"patch_size": {"height": 4, "width": 4}, "size": {"height": 20, "width": 24}}


@pytest.fixture(scope="module")
def both() -> tuple[Any, Any]:
    backend, special = fuyu_tokenizer.backend(), fuyu_tokenizer.SPECIAL
    their_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    our_tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    fields = tiny_families.fields("fuyu", vocab_size=len(our_tokenizer), eos_token_id=None)
    fields["image_token_id"] = our_tokenizer.convert_tokens_to_ids("|SPEAKER|")
    theirs, ours = tiny_families.model_pair("FuyuForCausalLM", **fields)
    our_processor = FuyuProcessor(FuyuImageProcessor(**SIZES), our_tokenizer)
    their_processor = TheirProcessor(Reference(**SIZES), their_tokenizer)
    return (
        pipeline(model=ours, processor=our_processor, device=-1, max_new_tokens=6),
        transformers.pipeline(
            "image-text-to-text", model=theirs, processor=their_processor, device="cpu", max_new_tokens=6
        ),
    )


@pytest.mark.parametrize("size", [(12, 16), (7, 30), (4, 4)], ids=str)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_image_text_to_text(both: tuple[Any, Any], size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    inputs = {"images": Image.fromarray(pixels), "text": "what is in the box"}
    for options in ({}, {"return_full_text": False}, {"skip_special_tokens": False}):
        ours, theirs = (pipe(**inputs, **options) for pipe in both)
        assert ours == theirs
    ours, theirs = (pipe(**inputs, return_tensors=True)[0]["generated_token_ids"] for pipe in both)
    assert torch.tensor(ours).equal(theirs)
