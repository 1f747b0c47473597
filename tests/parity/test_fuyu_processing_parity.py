"""Fuyu's processors against transformers: pixels, patches, ids and files.

Without torchvision, transformers has its Pillow image processor, whose images its processor cannot split into patches;
`Reference` only converts them to tensors.
"""

from __future__ import annotations

import json
from pathlib import Path

import fuyu_tokenizer
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor as TheirAuto
from transformers import PreTrainedTokenizerFast as TheirTokenizer
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil
from transformers.models.fuyu.processing_fuyu import FuyuProcessor as TheirProcessor

from monoblock.processing import AutoProcessor, FuyuImageProcessor, FuyuProcessor
from monoblock.tokenization import PreTrainedTokenizerFast

SIZES = [(1, 1), (29, 31), (300, 300), (1080, 1920), (2000, 3000), (5000, 40)]
PHOTOGRAPHS = Path(__file__).parents[2] / "../shared/data/images"


class Reference(FuyuImageProcessorPil):
    def preprocess(self, *args, **kwargs):
        out = super().preprocess(*args, **kwargs)
        out["images"] = torch.as_tensor(np.asarray(out["images"]))
        return out

    def patchify_image(self, image, patch_size=None):
        patches = super().patchify_image(image.numpy(), patch_size)
        return torch.as_tensor(patches)[None]  # of one image, as with torchvision


@pytest.fixture(scope="module")
def ours() -> FuyuProcessor:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fuyu_tokenizer.backend(), **fuyu_tokenizer.SPECIAL)
    return FuyuProcessor(FuyuImageProcessor(), tokenizer)


@pytest.fixture(scope="module")
def theirs() -> TheirProcessor:
    tokenizer = TheirTokenizer(tokenizer_object=fuyu_tokenizer.backend(), **fuyu_tokenizer.SPECIAL)
    return TheirProcessor(Reference(), tokenizer)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def photograph(name: str) -> Image.Image:
    path = PHOTOGRAPHS / name
    if not path.is_file():
        pytest.skip(f"{name} is not available")
    return Image.open(path)


def same_pixels(image, **settings) -> None:
    """Images, sizes and scales are bitwise equal, since both resize with Pillow and compute in float32."""
    mine = FuyuImageProcessor(**settings).preprocess(image, return_tensors="pt")
    reference = FuyuImageProcessorPil(**settings).preprocess(image, return_tensors="pt")
    assert set(mine) == set(reference)
    for name in mine:
        assert mine[name].dtype == reference[name].dtype, name
        torch.testing.assert_close(mine[name], reference[name], rtol=0, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_of_every_size(size: tuple[int, int]) -> None:
    same_pixels(picture(*size))


@pytest.mark.parametrize("name", ["australia.jpg", "cars.jpg"])
def test_photographs(ours: FuyuProcessor, theirs: TheirProcessor, name: str) -> None:
    image = photograph(name)
    same_pixels(image)
    same_inputs(ours, theirs, ["what is in the box"], [image])
    large = image.resize((3000, 2100))
    same_pixels(large)
    same_inputs(ours, theirs, ["what is in the box"], [large])


@pytest.mark.parametrize(
    "settings",
    [
        {"resample": 3},
        {"resample": Image.Resampling.NEAREST},
        {"padding_value": 0.0},
        {"padding_mode": "edge"},
        {"padding_mode": "symmetric"},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_normalize": False, "do_rescale": False},
        {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]},
        {"rescale_factor": 1 / 127.5},
        {"size": {"height": 90, "width": 60}},
        {"do_pad": False},
        {"do_resize": False, "size": {"height": 300, "width": 300}},
    ],
)
def test_pixels_with_other_settings(settings: dict) -> None:
    same_pixels(picture(200, 150), **({"size": {"height": 120, "width": 120}} | settings))


def test_arrays_and_tensors() -> None:
    pixels = np.array(picture(40, 70))
    small = {"size": {"height": 30, "width": 60}}
    for array in (pixels, pixels.transpose(2, 0, 1), pixels.astype(np.float32)):
        same_pixels(array)
        same_pixels(torch.from_numpy(np.ascontiguousarray(array)))
        same_pixels(array, **small)
    same_pixels(pixels / np.float32(255), do_rescale=False)
    # Resized floats: transformers truncates them to 8 bits before and rounds after, each by one step of 1/255.
    mine = FuyuImageProcessor(do_rescale=False, **small).preprocess(pixels / np.float32(255))
    reference = FuyuImageProcessorPil(do_rescale=False, **small).preprocess(pixels / np.float32(255))
    np.testing.assert_allclose(mine["images"][0][0], reference["images"][0][0], atol=2 * 2 / 255)


def test_tensors_of_any_dtype() -> None:
    pixels = np.asarray(picture(40, 70))
    expected = FuyuImageProcessor().patched(pixels).patches
    chw = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    for tensor in (chw, chw.float().requires_grad_(), chw.long(), chw.bfloat16()):
        np.testing.assert_array_equal(FuyuImageProcessor().patched(tensor).patches, expected)


def test_patchify_and_tokenizer_info() -> None:
    mine, reference = FuyuImageProcessor(), FuyuImageProcessorPil()
    batch = torch.randn(2, 1, 3, 120, 150)
    torch.testing.assert_close(
        mine.patchify_image(batch[:, 0]),
        torch.as_tensor(reference.patchify_image(batch[:, 0].numpy())),
        rtol=0,
        atol=0,
    )
    arguments = {
        "image_input": batch,
        "image_present": torch.tensor([[[1]], [[1]]]),
        "image_unpadded_h": torch.tensor([[31], [120]]),
        "image_unpadded_w": torch.tensor([[70], [1]]),
        "image_placeholder_id": 7,
        "image_newline_id": 8,
    }
    for variable in (True, False):
        out = mine.preprocess_with_tokenizer_info(**arguments, variable_sized=variable)
        expected = reference.preprocess_with_tokenizer_info(**arguments, variable_sized=variable)
        assert set(out) == set(expected)
        for name in set(out) - {"images"}:
            for row, wanted in zip(out[name], expected[name], strict=True):
                for one, other in zip(row, wanted, strict=True):
                    assert one.dtype == other.dtype, name
                    torch.testing.assert_close(one, other, rtol=0, atol=0)


def same_inputs(ours: FuyuProcessor, theirs: TheirProcessor, texts: list[str], images: list) -> None:
    mine = ours(text=texts, images=images)
    reference = theirs(text=texts, images=images)
    for name in ("input_ids", "attention_mask"):
        assert mine[name].dtype == reference[name].dtype
        assert mine[name].tolist() == reference[name].tolist()
    patches = torch.cat([one[0] for one in mine["image_patches"]])
    torch.testing.assert_close(patches, reference["image_patches"], rtol=0, atol=0)
    # transformers leaves this to the model: the placeholders take the patches in order.
    placeholders = mine["input_ids"] == ours.image_token_id
    assert (mine["image_patches_indices"][placeholders] >= 0).all()
    assert (mine["image_patches_indices"][~placeholders] == -1).all()
    counts = [one.shape[1] for one in mine["image_patches"]]
    order = [index for count in counts for index in range(count)]
    assert mine["image_patches_indices"][placeholders].tolist() == order


@pytest.mark.parametrize("size", SIZES)
def test_inputs_of_every_size(ours: FuyuProcessor, theirs: TheirProcessor, size: tuple[int, int]) -> None:
    same_inputs(ours, theirs, ["Generate a coco-style caption.\n"], [picture(*size)])


def test_inputs_of_a_batch(ours: FuyuProcessor, theirs: TheirProcessor) -> None:
    texts = ["the cat", "Generate a coco-style caption.\n", "what is in the box? 12"]
    same_inputs(ours, theirs, texts, [picture(29, 31), picture(300, 40), picture(1, 1)])


def test_pixel_values_in_place_of_image_patches(ours: FuyuProcessor, theirs: TheirProcessor) -> None:
    call = {"text": ["a", "the dog"], "images": [picture(29, 31), picture(90, 40)]}
    mine = ours(**call, return_legacy_image_output=False)
    reference = theirs(**call, return_legacy_image_output=False)
    assert set(mine) == set(reference)
    for name in mine:
        torch.testing.assert_close(mine[name], reference[name], rtol=0, atol=0)


def test_text_without_images(ours: FuyuProcessor, theirs: TheirProcessor) -> None:
    assert ours(text="the cat is")["input_ids"] == theirs(text="the cat is")["input_ids"]


def test_post_process_box_coordinates(ours: FuyuProcessor, theirs: TheirProcessor) -> None:
    names = [
        "<s>",
        "▁a",
        "<0x00>",
        "30",
        "62",
        "50",
        "134",
        "<0x01>",
        "▁cat",
        "<0x02>",
        "5",
        "10",
        "<0x03>",
        "</s>",
    ]
    ids = torch.tensor([ours.tokenizer.convert_tokens_to_ids(names)])
    for sizes in (None, torch.tensor([[300, 400]])):
        (mine,) = ours.post_process_box_coordinates(ids, sizes)
        (reference,) = theirs.post_process_box_coordinates(ids, sizes)
        assert mine.dtype == reference.dtype
        text = ours.decode(mine, skip_special_tokens=True)
        assert text == "a<box>60, 124, 100, 268</box> cat<point>10, 20</point>"
        # transformers' box begins with a space of the tokenizer
        assert text.replace(" ", "") == theirs.decode(reference, skip_special_tokens=True).replace(" ", "")


def test_post_process_image_text_to_text(ours: FuyuProcessor, theirs: TheirProcessor) -> None:
    rows = [["<s>", "▁a", "<0x04>", "▁the", "▁cat", "</s>"], ["<unk>", "<s>", "▁a", "▁a", "<0x04>", "▁dog"]]
    ids = torch.tensor([ours.tokenizer.convert_tokens_to_ids(row) for row in rows])
    assert ours.post_process_image_text_to_text(ids) == theirs.post_process_image_text_to_text(ids)


def test_batches_with_lists_move_to_devices_and_dtypes(ours: FuyuProcessor) -> None:
    batch = ours(["a", "the cat"], [picture(29, 31), None])
    assert batch.to("cpu", torch.float16) is batch
    assert [patches.dtype for patches in batch["image_patches"]] == [torch.float16] * 2
    assert batch["input_ids"].dtype == torch.int64
    assert [p.device.type for p in batch.to("meta")["image_patches"]] == ["meta"] * 2
    assert batch.to(torch.bfloat16).image_patches[0].dtype == torch.bfloat16
    # images of different sizes stay in nested lists
    images = FuyuImageProcessor(do_pad=False)([picture(30, 30), picture(60, 30)], return_tensors="pt")
    assert [image.dtype for image in images.to(dtype=torch.float64)["images"]] == [torch.float64] * 2


def test_post_process_keeps_tensors(ours: FuyuProcessor) -> None:
    row = torch.tensor(
        ours.tokenizer.convert_tokens_to_ids(["<0x02>", "1", "2", "<0x03>"]), dtype=torch.int32
    )
    (out,) = ours.post_process_box_coordinates([row], torch.tensor([[5.0, 5.0]]))
    assert (type(out), out.dtype) == (torch.Tensor, torch.int32)


def test_our_files_open_in_transformers(ours: FuyuProcessor, tmp_path: Path) -> None:
    FuyuProcessor(FuyuImageProcessor(padding_value=2.0), ours.tokenizer).save_pretrained(tmp_path)
    loaded = TheirAuto.from_pretrained(tmp_path)
    assert isinstance(loaded, TheirProcessor)
    assert loaded.image_processor.padding_value == 2.0
    assert loaded.tokenizer.get_vocab() == ours.tokenizer.get_vocab()
    images = FuyuImageProcessorPil.from_pretrained(tmp_path)
    assert dict(images.size) == {"height": 1080, "width": 1920}


def test_transformers_files_open_here(theirs: TheirProcessor, tmp_path: Path) -> None:
    TheirProcessor(FuyuImageProcessorPil(padding_value=3.0), theirs.tokenizer).save_pretrained(tmp_path)
    assert "image_processor" in json.loads((tmp_path / "processor_config.json").read_text())
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, FuyuProcessor)
    assert loaded.image_processor.padding_value == 3.0
    FuyuImageProcessorPil(padding_value=4.0).save_pretrained(tmp_path / "images")
    assert FuyuImageProcessor.from_pretrained(tmp_path / "images").padding_value == 4.0
