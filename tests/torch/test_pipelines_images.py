"""The image-text-to-text pipeline."""

from __future__ import annotations

from typing import Any

import fuyu_tokenizer
import numpy as np
import pytest
import tiny_families
from PIL import Image
from tiny_families import monoblock_model

from monoblock import FuyuImageProcessor, FuyuProcessor, PreTrainedTokenizerFast, pipeline


@pytest.fixture(scope="module")
def vision_pipeline() -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fuyu_tokenizer.backend(), **fuyu_tokenizer.SPECIAL)
    images = FuyuImageProcessor(patch_size={"height": 4, "width": 4}, size={"height": 20, "width": 24})
    processor = FuyuProcessor(images, tokenizer)
    fields = tiny_families.fields("fuyu", vocab_size=len(tokenizer), eos_token_id=None)
    fields["image_token_id"] = tokenizer.convert_tokens_to_ids("|SPEAKER|")
    model = monoblock_model("FuyuForCausalLM", **fields)
    return pipeline("image-text-to-text", model, processor=processor, device=-1, max_new_tokens=4)


def picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_image_text_to_text(vision_pipeline: Any) -> None:
    """Against `generate`; in a batch with an image of another size, and with a text without image."""
    image, text = picture(12, 16), "what is in the box"
    inputs = vision_pipeline.processor(text=[text], images=[image], return_tensors="pt")
    ids = vision_pipeline.model.generate(**inputs, max_new_tokens=4)
    [answer] = vision_pipeline.processor.post_process_image_text_to_text(ids)
    alone = vision_pipeline(images=image, text=text)
    assert alone == [{"input_text": text, "generated_text": text + answer}]
    new = vision_pipeline(images=image, text=text, return_full_text=False)
    assert new == [{"input_text": text, "generated_text": answer}]
    other = vision_pipeline({"images": picture(20, 8), "text": "a cat"})
    batch = vision_pipeline(
        [{"images": image, "text": text}, {"images": picture(20, 8), "text": "a cat"}], batch_size=2
    )
    assert batch == [alone, other]
    assert vision_pipeline(images=[image, picture(20, 8)], text=[text, "a cat"]) == [*alone, *other]
    plain = vision_pipeline("the dog")
    assert plain[0]["generated_text"].startswith("the dog")
    assert vision_pipeline([{"images": image, "text": text}, "the dog"], batch_size=2) == [alone, plain]
    [tensors] = vision_pipeline(images=image, text=text, return_tensors=True)
    assert tensors["generated_token_ids"] == ids[0].tolist()
    twice = vision_pipeline(images=image, text=text, num_beams=2, num_return_sequences=2)
    assert len(twice) == 2


def test_invalid_inputs_raise(vision_pipeline: Any) -> None:
    with pytest.raises(ValueError, match="as many images"):
        vision_pipeline(images=[picture(4, 4)], text=["a", "b"])
    with pytest.raises(ValueError, match="text="):
        vision_pipeline(images=picture(4, 4))
    with pytest.raises(TypeError, match="no conversations"):
        vision_pipeline(text=[[{"role": "user", "content": "who?"}]])
    with pytest.raises(ValueError, match="given twice"):
        vision_pipeline("a", generate_kwargs={"max_new_tokens": 2})
    with pytest.raises(TypeError, match="does not take"):
        vision_pipeline("a", generate_kwargs={"max_tokens": 2})
