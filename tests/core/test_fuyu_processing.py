"""Fuyu's image processor and processor without a framework: pixels, patches, prompts, boxes and files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fuyu_tokenizer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monoblock.errors import HubError
from monoblock.processing import (
    AutoImageProcessor,
    AutoProcessor,
    FuyuBatchEncoding,
    FuyuImageProcessor,
    FuyuProcessor,
)
from monoblock.tokenization import PreTrainedTokenizerFast

PADDING = np.float32((1 / 255 - 0.5) / 0.5)  # -0.992: images are padded with 1 before rescaling by 1 / 255


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=fuyu_tokenizer.backend(), **fuyu_tokenizer.SPECIAL)


@pytest.fixture(scope="module")
def processor(tokenizer: PreTrainedTokenizerFast) -> FuyuProcessor:
    return FuyuProcessor(FuyuImageProcessor(), tokenizer)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tokens(processor: FuyuProcessor, ids) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(list(map(int, ids)))


# --- pixels and patches


def test_patches_are_channels_last_and_padded_right_and_below() -> None:
    image = np.array([[[255, 0, 51]]], np.uint8)
    out = FuyuImageProcessor().patched(image)
    assert (out.rows, out.columns, out.patches.shape, out.patches.dtype) == (1, 1, (1, 2700), np.float32)
    np.testing.assert_allclose(out.patches[0, :3], [1, -1, -0.6], atol=1e-6)  # one rounding in float32
    np.testing.assert_array_equal(out.patches[0, 3:], PADDING)


def test_patches_are_in_row_major_order() -> None:
    image = np.zeros((31, 61, 3), np.uint8)
    marks = {(0, 0): 10, (0, 30): 20, (0, 60): 30, (30, 0): 40, (30, 30): 50, (30, 60): 60}
    for (y, x), value in marks.items():
        image[y, x] = value
    out = FuyuImageProcessor(do_normalize=False, do_rescale=False).patched(image)
    assert (out.rows, out.columns) == (2, 3)
    assert out.patches[:, 0].tolist() == list(marks.values())


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((1, 1), (1, 1)), ((1080, 1920), (1080, 1920)), ((2000, 3000), (1080, 1620)), ((5000, 40), (1080, 8))],
)
def test_only_larger_images_are_resized(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert FuyuImageProcessor().fitted_size(*size) == fitted


def test_resized_sides_are_at_least_one_pixel() -> None:
    pytest.importorskip("PIL")
    # 1 x 1080 / 100000 is less than a pixel
    out = FuyuImageProcessor().patched(np.zeros((100_000, 1, 3), np.uint8))
    assert (out.rows, out.columns) == (36, 1)


def test_array_layouts_and_dtypes() -> None:
    image = picture(20, 40)
    expected = FuyuImageProcessor().patched(image).patches
    alpha = np.full((20, 40, 1), 7, np.uint8)
    for same in (
        image.transpose(2, 0, 1),
        image.astype(np.float64),
        image.astype(np.int32),
        np.concatenate([image, alpha], axis=-1),
    ):
        np.testing.assert_array_equal(FuyuImageProcessor().patched(same).patches, expected)
    grey = image[..., 0]
    repeated = FuyuImageProcessor().patched(np.repeat(grey[..., None], 3, axis=-1)).patches
    for same in (grey, grey[None], grey[..., None]):
        np.testing.assert_array_equal(FuyuImageProcessor().patched(same).patches, repeated)
    scaled = FuyuImageProcessor(do_rescale=False, padding_value=1 / 255).patched(image / 255).patches
    np.testing.assert_allclose(scaled, expected, atol=1e-6)  # float32 at 1


@pytest.mark.parametrize(
    ("shape", "rows_columns"),
    [
        ((1, 31, 3), (1, 2)),
        ((1, 1, 3), (1, 1)),
        ((3, 31, 1), (2, 1)),
        ((3, 31, 61), (2, 3)),
        ((1, 31, 61), (2, 3)),
    ],
)
def test_an_axis_of_three_is_taken_for_channels(shape, rows_columns) -> None:
    out = FuyuImageProcessor().patched(np.zeros(shape, np.uint8))
    assert (out.rows, out.columns) == rows_columns


def test_input_data_format_resolves_ambiguous_shapes(logs) -> None:
    image = picture(3, 3)
    first = FuyuImageProcessor().patched(image, input_data_format="channels_first").patches
    np.testing.assert_array_equal(FuyuImageProcessor().patched(image).patches, first)
    assert "read as channels_first" in logs.text
    last = FuyuImageProcessor().patched(image, input_data_format="channels_last").patches
    np.testing.assert_array_equal(
        FuyuImageProcessor().patched(image.transpose(2, 0, 1), input_data_format="channels_first").patches,
        last,
    )


def test_modes_of_pillow_images(tmp_path: Path) -> None:
    images = pytest.importorskip("PIL.Image")
    image = picture(20, 40)
    rgb = images.fromarray(image)
    expected = FuyuImageProcessor().patched(image).patches
    rgb.save(tmp_path / "image.png")
    rgba = rgb.copy()
    rgba.putalpha(9)
    for same in (rgb, rgba, tmp_path / "image.png", str(tmp_path / "image.png")):
        np.testing.assert_array_equal(FuyuImageProcessor().patched(same).patches, expected)
    for mode in ("P", "L", "1", "CMYK", "LA"):
        other = rgb.convert(mode)
        np.testing.assert_array_equal(
            FuyuImageProcessor().patched(other).patches,
            FuyuImageProcessor().patched(np.asarray(other.convert("RGB"))).patches,
        )


def test_exif_orientation_is_applied_to_files(tmp_path: Path) -> None:
    images = pytest.importorskip("PIL.Image")
    exif = images.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    images.fromarray(picture(30, 90)).save(tmp_path / "rotated.png", exif=exif)
    out = FuyuImageProcessor().patched(str(tmp_path / "rotated.png"))
    assert (out.rows, out.columns) == (3, 1)


SMALL = {"size": {"height": 60, "width": 90}, "patch_size": {"height": 30, "width": 15}}


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 130),
    width=st.integers(1, 130),
    mode=st.sampled_from(["constant", "edge", "replicate", "reflect", "symmetric"]),
    value=st.sampled_from([0.0, 1.0, 0.5, 300.0]),
)
def test_patched_equals_the_unpadded_part_of_preprocess(
    height: int, width: int, mode: str, value: float
) -> None:
    pytest.importorskip("PIL")
    images = FuyuImageProcessor(**SMALL, padding_mode=mode, padding_value=value)
    image = picture(height, width)
    whole = images(image, return_tensors="np")
    assert whole["images"].shape == (1, 1, 3, 60, 90)
    out = images.patched(image)
    unpadded = whole["images"][0, :, :, : out.rows * 30, : out.columns * 15]
    np.testing.assert_array_equal(images.patchify_image(unpadded)[0], out.patches)
    assert out.rows == -(-whole["image_unpadded_heights"][0, 0] // 30)
    assert out.columns == -(-whole["image_unpadded_widths"][0, 0] // 15)


@pytest.mark.parametrize(
    "change",
    [
        {"do_resize": False, "size": {"height": 150, "width": 150}},
        {"size": {"height": 30, "width": 60}},
        {"resample": 3},
        {"padding_value": 0.0},
        {"padding_value": 0.5},
        {"padding_mode": "edge"},
        {"do_normalize": False},
        {"image_mean": 0.4},
        {"image_mean": [0.5, 0.5, 0.4]},
        {"image_std": [0.5, 0.4, 0.5]},
        {"do_rescale": False},
        {"rescale_factor": 1 / 128},
        {"patch_size": {"height": 15, "width": 30}},
    ],
)
def test_every_setting_has_an_effect_in_the_constructor_and_in_calls(change: dict) -> None:
    pytest.importorskip("PIL")
    image = picture(100, 80)
    plain, changed = FuyuImageProcessor(**SMALL), FuyuImageProcessor(**(SMALL | change))
    out = changed.patched(image).patches
    assert out.shape != plain.patched(image).patches.shape or not np.array_equal(
        out, plain.patched(image).patches
    )
    np.testing.assert_array_equal(plain.patched(image, **change).patches, out)
    np.testing.assert_array_equal(
        plain.preprocess(image, **change)["images"][0][0], changed.preprocess(image)["images"][0][0]
    )


def test_do_pad_false() -> None:
    images = FuyuImageProcessor(do_pad=False)
    assert images.preprocess(picture(31, 30))["images"][0][0].shape == (3, 31, 30)
    assert images.patched(picture(60, 30)).rows == 2
    with pytest.raises(ValueError, match="image_height=31 must be divisible by the patch's height 30"):
        images.patched(picture(31, 30))


def test_preprocess_groups_images_by_sample() -> None:
    small = FuyuImageProcessor(**SMALL)
    out = small([[picture(20, 30), picture(5, 6)], None, [], picture(7, 8)])
    assert [len(sample) for sample in out["images"]] == [2, 0, 0, 1]
    assert out["image_unpadded_heights"] == [[20, 5], [], [], [7]]
    assert out["image_sizes"] == [(20, 30), (5, 6), (7, 8)]
    assert small(np.stack([picture(9, 9)] * 4), return_tensors="np")["images"].shape == (4, 1, 3, 60, 90)
    last = small(picture(9, 9), data_format="channels_last", return_tensors="np")
    assert last["images"].shape == (1, 1, 60, 90, 3)


def test_preprocess_with_tokenizer_info() -> None:
    images = FuyuImageProcessor(patch_size={"height": 2, "width": 2})
    batch = np.arange(2 * 2 * 3 * 4 * 6, dtype=np.float32).reshape(2, 2, 3, 4, 6)
    out = images.preprocess_with_tokenizer_info(
        batch, np.array([[1, 1], [0, 1]]), np.array([[1, 4], [0, 3]]), np.array([[3, 6], [0, 1]]), 7, 8, True
    )
    a, b = [7, 7, 8], [7, 7, 7, 8, 7, 7, 7, 8]
    assert [[ids.tolist() for ids in row] for row in out["image_input_ids"]] == [[a, b], [[], [7, 8, 7, 8]]]
    assert out["image_input_ids"][0][0].dtype == np.int32
    assert [[i.tolist() for i in row] for row in out["image_patch_indices_per_batch"]] == [
        [[0, 1, -1], [2, 3, 4, -1, 5, 6, 7, -1]],
        [[], [0, -1, 1, -1]],
    ]
    assert out["image_patch_indices_per_subsequence"][0][1].tolist() == [0, 1, 2, -1, 3, 4, 5, -1]
    assert (
        out["image_patches"][0][0][1].tolist() == batch[0, 0, :, :2, 2:4].transpose(1, 2, 0).ravel().tolist()
    )
    assert [len(row) for row in out["image_patches"]] == [2, 1]
    assert out["images"][0][0].shape == (3, 2, 4)
    fixed = images.preprocess_with_tokenizer_info(batch, np.ones((2, 2, 1)), None, None, 7, 8, False)
    assert fixed["image_input_ids"][1][1].tolist() == [7] * 6


def test_get_num_patches() -> None:
    assert FuyuImageProcessor().get_num_patches(1080, 1920) == 36 * 64
    assert FuyuImageProcessor().get_num_patches(60, 60, {"height": 20, "width": 30}) == 6
    with pytest.raises(ValueError, match="image_width=61 must be divisible"):
        FuyuImageProcessor().get_num_patches(60, 61)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("https://example.com/a.png", ValueError, "is a URL"),
        ("data:image/png;base64,AAAA", ValueError, "is a URL"),
        ("nowhere/a.png", ValueError, "no image file 'nowhere/a.png'"),
        (np.zeros((2, 2, 5)), ValueError, "1, 3 or 4 channels"),
        (np.zeros(5), ValueError, "2 or 3 axes"),
        (np.zeros((0, 5, 3), np.uint8), ValueError, "empty: it is 0 high and 5 wide"),
        (np.full((2, 2, 3), np.nan), ValueError, "not finite"),
        (np.full((2, 2, 3), 256), ValueError, "from 0 to 255"),
        (np.full((2, 2, 3), "a"), TypeError, "integers or floating-point"),
        (object(), TypeError, "got object"),
    ],
)
def test_invalid_images_are_refused(image, error: type[Exception], message: str) -> None:
    if isinstance(image, str):
        pytest.importorskip("PIL")
    with pytest.raises(error, match=message):
        FuyuImageProcessor()([image])


def test_16_bit_images_and_corrupt_files_are_refused(tmp_path: Path) -> None:
    images = pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match="mode 'I;16' has no 8-bit values"):
        FuyuImageProcessor()(images.fromarray(np.zeros((2, 2), np.uint16)))
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="not an image that Pillow can read"):
        FuyuImageProcessor()(str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"size": {"shortest_edge": 5}}, ValueError, "size must look like"),
        ({"size": {"height": 0, "width": 5}}, ValueError, "size must look like"),
        ({"patch_size": "30"}, ValueError, "patch_size must look like"),
        ({"resample": 9}, ValueError, "resample must be one of Pillow's filters"),
        ({"padding_mode": "wrap"}, ValueError, "expected one of 'constant'"),
        ({"padding_value": "1"}, TypeError, "padding_value must be a number"),
        ({"do_pad": 1}, TypeError, "do_pad must be True or False"),
        ({"image_mean": [0.5, 0.5]}, ValueError, "three for red"),
        ({"image_std": 0}, ValueError, "image_std must not be 0"),
        ({"do_center_crop": True}, TypeError, "does not support do_center_crop=True"),
        ({"crop_size": 5}, TypeError, "does not support crop_size=5"),
        ({"pad_size": 5}, TypeError, "images are padded to size"),
        ({"device": "cuda"}, TypeError, r"call .to\(device\)"),
        ({"do_convert_rgb": False}, TypeError, "RGB images only"),
    ],
)
def test_invalid_settings_are_refused(setting: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FuyuImageProcessor(**setting)
    with pytest.raises(error, match=message):
        FuyuImageProcessor()(picture(2, 2), **setting)


def test_other_settings(logs) -> None:
    harmless = {"do_convert_rgb": True, "disable_grouping": None, "do_center_crop": False, "device": None}
    FuyuImageProcessor(**harmless)(picture(2, 2), **harmless)
    assert not logs.messages
    assert FuyuImageProcessor(colour="blue").to_dict()["colour"] == "blue"
    assert "does not know 'colour'" in logs.text
    with pytest.raises(TypeError, match="no argument 'colour'"):
        FuyuImageProcessor()(picture(2, 2), colour="blue")
    with pytest.raises(ValueError, match="expected one of 'channels_first'"):
        FuyuImageProcessor()(picture(2, 2), data_format="HWC")
    with pytest.raises(ValueError, match="70x2 does not fit into size 60x90"):
        FuyuImageProcessor(**SMALL, do_resize=False).patched(picture(70, 2))
    FuyuImageProcessor()(np.full((2, 2, 3), 0.5))
    assert "do_rescale=False" in logs.text


def test_missing_pillow_raises_an_import_error_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    FuyuImageProcessor()(picture(2, 2))
    with pytest.raises(ImportError, match=r'pip install "monoblock\[vision\]"'):
        FuyuImageProcessor()(picture(1081, 2))
    with pytest.raises(ImportError, match=r'pip install "monoblock\[vision\]"'):
        FuyuImageProcessor()("image.png")


def test_importing_processors_imports_neither_pillow_nor_a_framework() -> None:
    code = (
        "import sys; from monoblock.processing import *; "
        "print([m for m in ('PIL', 'torch', 'jax', 'tensorflow') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# --- prompts


def test_ids_of_an_image_and_its_prompt(processor: FuyuProcessor) -> None:
    out = processor("Generate a caption.\n", picture(40, 70), return_tensors="np")
    row = ["|SPEAKER|"] * 3 + ["|NEWLINE|"]
    text = ["<s>", "▁Generate", "▁a", "▁caption", ".", "<0x0A>", "<0x04>"]
    assert tokens(processor, out.input_ids[0]) == row + row + text
    assert out.image_patches_indices.tolist() == [[0, 1, 2, -1, 3, 4, 5, -1, *[-1] * 7]]
    assert out.attention_mask.tolist() == [[1] * 15]
    assert [patches.shape for patches in out.image_patches] == [(1, 6, 2700)]
    assert {out[key].dtype for key in ("input_ids", "attention_mask", "image_patches_indices")} == {
        np.dtype("int64")
    }
    assert isinstance(out, FuyuBatchEncoding)


def test_a_batch_with_and_without_images(processor: FuyuProcessor) -> None:
    images = [picture(29, 31), None, [], [picture(300, 300, 1)]]
    out = processor(["the cat", "the dog", "", "a"], images, return_tensors="np")
    assert out.input_ids.shape == out.attention_mask.shape == out.image_patches_indices.shape == (4, 113)
    for number, (text, image) in enumerate(zip(["the cat", "the dog", "", "a"], images, strict=True)):
        alone = processor([text], [image], return_tensors="np")
        length = alone.input_ids.shape[1]
        assert out.input_ids[number, -length:].tolist() == alone.input_ids[0].tolist()
        assert out.image_patches_indices[number, -length:].tolist() == alone.image_patches_indices[0].tolist()
        assert out.attention_mask[number].tolist() == [0] * (113 - length) + [1] * length
        assert not out.input_ids[number, :-length].any()  # padded with id 0
        assert (out.image_patches_indices[number, :-length] == -1).all()
        np.testing.assert_array_equal(out.image_patches[number], alone.image_patches[0])
    assert tokens(processor, out.input_ids[1][-4:]) == ["<s>", "▁the", "▁dog", "<0x04>"]
    assert tokens(processor, out.input_ids[2][-2:]) == ["<s>", "<0x04>"]
    assert [patches.shape for patches in out.image_patches] == [
        (1, 2, 2700),
        (1, 0, 2700),
        (1, 0, 2700),
        (1, 100, 2700),
    ]


def test_images_only_and_swapped_arguments(processor: FuyuProcessor) -> None:
    image = picture(10, 10)
    alone = processor(images=[image, image], return_tensors="np")
    assert tokens(processor, alone.input_ids[1]) == ["|SPEAKER|", "|NEWLINE|", "<s>", "<0x04>"]
    one, other = (
        processor(image, "a cat", return_tensors="np"),
        processor("a cat", image, return_tensors="np"),
    )
    assert one.input_ids.tolist() == other.input_ids.tolist()
    grouped = processor(
        text="a cat",
        images=[[image]],
        text_kwargs={"return_tensors": "np"},
        images_kwargs={"padding_value": 5.0},
    )
    assert grouped.input_ids.tolist() == other.input_ids.tolist()
    assert grouped.image_patches[0][0, 0, -1] == np.float32((5 / 255 - 0.5) / 0.5)


def test_pixel_values(processor: FuyuProcessor) -> None:
    images = [picture(10, 50), None, picture(40, 10)]
    new = processor(["a"] * 3, images, return_tensors="np", return_legacy_image_output=False)
    old = processor(["a"] * 3, images, return_tensors="np")
    assert set(new) == {"input_ids", "attention_mask", "pixel_values"}
    np.testing.assert_array_equal(new.pixel_values, np.concatenate([p[0] for p in old.image_patches]))


def test_padding_with_images(processor: FuyuProcessor) -> None:
    image = picture(10, 10)
    assert processor(
        "a cat", image, padding="max_length", max_length=9, return_tensors="np"
    ).input_ids.shape == (1, 9)
    assert processor(
        "a cat", image, padding=True, pad_to_multiple_of=8, return_tensors="np"
    ).input_ids.shape == (1, 8)
    right = processor(["a cat", "a"], [image, None], padding_side="right", return_tensors="np")
    assert right.attention_mask[1].tolist() == [1, 1, 1, 0, 0, 0]
    bare = processor("a", image, add_special_tokens=False, return_tensors="np")
    assert tokens(processor, bare.input_ids[0]) == ["|SPEAKER|", "|NEWLINE|", "▁a"]


def test_text_only_calls_equal_the_tokenizer(processor: FuyuProcessor) -> None:
    texts = ["a cat", "the dog is in the box"]
    out = processor(texts, padding=True, return_tensors="np")
    expected = processor.tokenizer(texts, padding=True, padding_side="left", return_tensors="np")
    assert set(out) == {"input_ids", "attention_mask"}
    assert all(out[key].tolist() == expected[key].tolist() for key in out)
    assert out.char_to_token(1, 4) is not None
    assert processor("a cat")["input_ids"] == processor.tokenizer("a cat")["input_ids"]
    assert len(processor("the dog is", truncation=True, max_length=2)["input_ids"]) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "nothing to process"),
        (
            {"text": "a", "return_attention_mask": False},
            ValueError,
            "return_attention_mask=False is not supported",
        ),
        ({"text": ["a", "b"], "images": [np.zeros((2, 2, 3))]}, ValueError, "2 texts and 1 images"),
        ({"text": "a", "images": [[np.zeros((2, 2, 3))] * 2]}, ValueError, "sample 0 has 2 images"),
        ({"text": [["a"]], "images": [np.zeros((2, 2, 3))]}, TypeError, "a string or a list of strings"),
        (
            {"text": "a", "images": np.zeros((2, 2, 3)), "truncation": True},
            ValueError,
            "truncation=True applies to text",
        ),
        (
            {"text": "a", "images": np.zeros((2, 2, 3)), "return_length": True},
            ValueError,
            "return_length=True",
        ),
        ({"text": "a", "images": np.zeros((2, 2, 3)), "max_length": 5}, ValueError, "nothing is truncated"),
        ({"text": "a", "images": np.zeros((2, 2, 3)), "padding": "most"}, ValueError, "padding='most'"),
        ({"text": "a", "images": np.zeros((2, 2, 3)), "colour": 1}, TypeError, "no argument 'colour'"),
        ({"text": "a", "padding_value": 1.0}, TypeError, "padding_value is an option of images"),
        ({"text": "a |SPEAKER|", "images": np.zeros((2, 2, 3))}, ValueError, "stands for a patch"),
        (
            {"text": "a", "images": np.zeros((2, 2, 3)), "return_tensors": "xy"},
            ValueError,
            "expected one of 'np'",
        ),
    ],
)
def test_invalid_calls_are_refused(
    processor: FuyuProcessor, arguments: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        processor(**arguments)


def test_a_tokenizer_without_image_tokens_is_refused() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0, "b": 1}, [])))
    with pytest.raises(ValueError, match=r"no token '\|SPEAKER\|'"):
        FuyuProcessor(FuyuImageProcessor(), other)


# --- boxes and points


def prompt_tokens(processor: FuyuProcessor, prompt: str, height: int, width: int) -> list[str]:
    """The tokens between `<s>` and `<0x04>`."""
    fitted = processor.image_processor.fitted_size(height, width)
    return tokens(processor, processor._prompts.prompt(prompt, (fitted[0] / height, fitted[1] / width)))


@pytest.mark.parametrize(
    ("prompt", "size", "expected"),
    [
        ("<box>388, 428, 404, 488</box>", (1080, 1920), "<0x00> 194 214 202 244 <0x01>"),
        ("<box>0,2,40,70</box>", (300, 300), "<0x00> 0 1 20 35 <0x01>"),
        ("<point>10, 20</point>", (300, 300), "<0x02> 5 10 <0x03>"),
        ("<0x00>388, 428, 404, 488<0x01>", (1080, 1920), "<0x00> 194 214 202 244 <0x01>"),
        ("<0x02>10, 20<0x03>", (300, 300), "<0x02> 5 10 <0x03>"),
        # 2000 x 3000 becomes 1080 x 1620: half of .54
        ("<box>100, 200, 1000, 3000</box>", (2000, 3000), "<0x00> 27 54 270 810 <0x01>"),
        # 5000 x 40 becomes 1080 x 8: .108 down, .1 across
        ("<box>1000, 20, 5000, 40</box>", (5000, 40), "<0x00> 108 2 540 4 <0x01>"),
        ("<point>20, 1000</point>", (5000, 40), "<0x02> 2 108 <0x03>"),
        # halves are rounded to even; fractions are allowed
        ("<point>3, 5.8</point>", (300, 300), "<0x02> 2 3 <0x03>"),
        ("a<point>2, 4</point><box>2, 4, 6, 8</box>", (9, 9), "▁a <0x02> 1 2 <0x03> <0x00> 1 2 3 4 <0x01>"),
        ("what <point>2, 4</point> is", (9, 9), "▁what ▁ <0x02> 1 2 <0x03> ▁ ▁is"),
    ],
)
def test_boxes_and_points_in_prompts(processor, prompt: str, size: tuple[int, int], expected: str) -> None:
    assert prompt_tokens(processor, prompt, *size) == expected.split()


def test_boxes_are_scaled_with_the_image_of_their_row(processor: FuyuProcessor) -> None:
    pytest.importorskip("PIL")
    images = [np.zeros((100, 100, 3), np.uint8), np.zeros((2160, 100, 3), np.uint8)]
    out = processor(["<box>10, 20, 30, 40</box>"] * 2, images, return_tensors="np")
    assert tokens(processor, out.input_ids[0][-7:]) == ["<0x00>", "5", "10", "15", "20", "<0x01>", "<0x04>"]
    assert tokens(processor, out.input_ids[1][-7:]) == ["<0x00>", "2", "5", "8", "10", "<0x01>", "<0x04>"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            "see <box>1, 2, 3</box>",
            r"'<box>1, 2, 3</box>' at character 4 has 3 numbers, not 4: write <box>y1, x1, y2, x2</box>",
        ),
        ("<box>1, 2, 3, 4, 5</box>", "has 5 numbers, not 4"),
        ("<box>1 2 3 4</box>", "has 1 numbers, not 4"),
        ("<box></box>", "has 1 numbers, not 4"),
        ("<point>1, 2, 3, 4</point>", "has 4 numbers, not 2: write <point>x, y</point>"),
        ("<box>1, 2, b, 4</box>", "holds 'b', which is not a number"),
        ("<box>1, 2, , 4</box>", "holds '', which is not a number"),
        ("<point>nan, 1</point>", "holds 'nan', which is not a number"),
        ("<point>1, inf</point>", "holds 'inf', which is not a number"),
        ("<point>-2, 1</point>", "holds -2, which is outside the image"),
        ("a <box>1, 2, 3, 4", "at character 2 opens a box that is not closed"),
        ("a</box> b", "at character 1 closes a box that is not open"),
        ("<box>1, 2, 3, 4</point>", "opens a box, but </point> comes next"),
        ("<box>1, 2, <box>3, 4</box>", "opens a box, but <box> comes next"),
        ("<box>1, 2, 3, 4</box></box>", "closes a box that is not open"),
        ("<box>0, 0, 9, 9000</box>", "needs the coordinate 4500"),
    ],
)
def test_malformed_boxes_in_prompts_are_refused(processor: FuyuProcessor, prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(prompt, picture(30, 30), return_tensors="np")


@pytest.mark.parametrize("call", [{}, {"images": [None]}])
def test_a_box_needs_an_image(processor: FuyuProcessor, call: dict) -> None:
    with pytest.raises(ValueError, match="but no image: pass the image"):
        processor(["a <box>1, 2, 3, 4</box>"], **call, return_tensors="np")


def ids_of(processor: FuyuProcessor, names: str) -> list[int]:
    return processor.tokenizer.convert_tokens_to_ids(names.split())


@pytest.mark.parametrize(
    ("names", "size", "text"),
    [
        ("<0x00> 30 62 50 134 <0x01>", None, "<box>60, 124, 100, 268</box>"),  # a box at index 0
        ("▁a <0x00> 30 62 50 134 <0x01> ▁cat", None, "a<box>60, 124, 100, 268</box> cat"),
        ("<0x02> 5 10 <0x03> <0x02> 1 2 <0x03>", None, "<point>10, 20</point><point>2, 4</point>"),
        ("<0x00> 27 54 270 810 <0x01>", (2000, 3000), "<box>100, 200, 1000, 3000</box>"),
        ("<0x02> 2 108 <0x03>", (5000, 40), "<point>20, 1000</point>"),
        ("▁a ▁cat", None, "a cat"),
    ],
)
def test_boxes_and_points_in_outputs(processor, names: str, size, text: str) -> None:
    ids = np.array([ids_of(processor, names)], np.int32)
    (out,) = processor.post_process_box_coordinates(ids, None if size is None else np.array([size]))
    assert isinstance(out, np.ndarray)
    assert out.dtype == np.int32
    assert processor.decode(out) == text
    (listed,) = processor.post_process_box_coordinates(ids.tolist(), None if size is None else [size])
    assert listed == out.tolist()


@settings(deadline=None, max_examples=150)
@given(
    size=st.tuples(st.integers(1, 6000), st.integers(1, 6000)),
    fractions=st.tuples(*[st.floats(0, 1)] * 4),
    kind=st.sampled_from(["box", "point"]),
)
def test_coordinates_survive_the_round_trip(processor, size, fractions, kind: str) -> None:
    axes = {"box": (0, 1, 0, 1), "point": (1, 0)}[kind]
    values = [round(fraction * size[axis]) for fraction, axis in zip(fractions, axes, strict=False)]
    prompt = f"<{kind}>{', '.join(map(str, values))}</{kind}>"
    fitted = processor.image_processor.fitted_size(*size)
    scale = (fitted[0] / size[0], fitted[1] / size[1])
    ids = processor._prompts.prompt(prompt, scale)
    (written,) = processor.post_process_box_coordinates([ids], [size])
    text = processor.decode(written)
    back = [int(number) for number in text.removeprefix(f"<{kind}>").removesuffix(f"</{kind}>").split(", ")]
    for before, after, axis in zip(values, back, axes, strict=True):
        # half a step of the resized, halved image, and half a pixel
        assert abs(before - after) <= 1 / scale[axis] + 0.5
    assert processor._prompts.prompt(text, scale) == ids


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("▁a <0x00> 1 2 3 <0x01>", "output 1, token 1: a box has 3 numbers, not 4"),
        ("<0x00> 1 2 3 4 5 <0x01>", "token 0: a box has 5 numbers"),
        ("<0x02> 1 <0x03>", "a point has 1 numbers, not 2"),
        ("<0x00> 1 2 ▁cat 4 <0x01>", "token 3: a box holds 'cat', which is not a number"),
        ("▁a <0x00> 1 2", "token 1: a box is opened and not closed: generate more tokens"),
        ("▁a <0x01>", "token 1: a box is closed that is not open"),
        ("<0x00> 1 2 3 4 <0x03>", "a box is opened, but <0x03> comes next"),
        ("<0x00> 1 <0x00> 1 2 3 4 <0x01>", "a box is opened, but <0x00> comes next"),
    ],
)
def test_malformed_boxes_in_outputs_are_refused(processor: FuyuProcessor, names: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor.post_process_box_coordinates([ids_of(processor, "▁a"), ids_of(processor, names)])


def test_post_processing_checks_its_arguments(processor: FuyuProcessor) -> None:
    with pytest.raises(ValueError, match="2 outputs and 1 target_sizes"):
        processor.post_process_box_coordinates([[1], [2]], [(5, 5)])
    with pytest.raises(ValueError, match=r"is the \(height, width\)"):
        processor.post_process_box_coordinates([[1]], [(5, 5, 5)])
    with pytest.raises(ValueError, match="got one row"):
        processor.post_process_box_coordinates([1, 2])


def test_post_process_image_text_to_text(processor: FuyuProcessor) -> None:
    rows = [
        ids_of(processor, "|SPEAKER| |NEWLINE| <s> ▁a <0x04> ▁the ▁cat </s>"),
        ids_of(processor, "<s> ▁a ▁dog </s>"),
    ]
    assert processor.post_process_image_text_to_text(rows) == ["the cat", "a dog"]
    assert processor.post_process_image_text_to_text(rows, skip_special_tokens=False)[0] == "the cat</s>"
    assert processor.batch_decode(rows, skip_special_tokens=True)[1] == "a dog"


def test_the_processor_uses_the_chat_template_of_its_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    chat_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
        **fuyu_tokenizer.SPECIAL,
    )
    chat = FuyuProcessor(FuyuImageProcessor(), chat_tokenizer)
    assert chat.apply_chat_template([{"role": "user", "content": "a cat"}], tokenize=False) == "a cat"
    assert chat.chat_template == chat_tokenizer.chat_template
    assert chat.model_input_names == ["input_ids", "attention_mask", "image_patches", "image_patches_indices"]
    assert chat.image_token_ids == [chat.image_newline_id, chat.image_token_id]


def test_to_needs_tensors() -> None:
    out = FuyuImageProcessor()(picture(2, 2))
    with pytest.raises(ValueError, match='return_tensors="pt"'):
        out.to("cpu")
    with pytest.raises(TypeError, match="as device"):
        out.to(3.5)


# --- files


def test_save_and_load_an_image_processor(tmp_path: Path) -> None:
    images = FuyuImageProcessor(**SMALL, image_mean=[0.1, 0.2, 0.3], padding_mode="edge", resample=3)
    assert images.save_pretrained(tmp_path) == [tmp_path / "preprocessor_config.json"]
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == images.to_dict()
    for cls in (FuyuImageProcessor, AutoImageProcessor):
        assert cls.from_pretrained(tmp_path).to_dict() == images.to_dict()
        assert cls.from_pretrained(tmp_path / "preprocessor_config.json").to_dict() == images.to_dict()
        assert cls.from_pretrained(tmp_path, padding_value=3.0).padding_value == 3.0
    with pytest.raises(HubError, match=r"expected preprocessor_config.json"):
        FuyuImageProcessor.from_pretrained(tmp_path.parent)
    with pytest.raises(ValueError, match="push_to_hub"):
        images.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match="is a file"):
        images.save_pretrained(tmp_path / "preprocessor_config.json")


def test_target_height_and_width_of_old_files(logs) -> None:
    images = FuyuImageProcessor.from_dict({"target_height": 60, "target_width": 90, "image_mean": None})
    assert (images.size, images.image_mean) == ({"height": 60, "width": 90}, 0.5)
    assert not logs.messages


def test_saving_updates_the_nested_settings_of_processor_config_json(tmp_path: Path) -> None:
    nested = {"processor_class": "FuyuProcessor", "image_processor": FuyuImageProcessor().to_dict()}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    FuyuImageProcessor(padding_value=4.0).save_pretrained(tmp_path)
    assert FuyuImageProcessor.from_pretrained(tmp_path).padding_value == 4.0


def test_save_and_load_a_processor(processor: FuyuProcessor, tmp_path: Path) -> None:
    FuyuProcessor(FuyuImageProcessor(padding_value=2.0), processor.tokenizer).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for cls in (FuyuProcessor, AutoProcessor):
        loaded = cls.from_pretrained(tmp_path)
        assert isinstance(loaded, FuyuProcessor)
        assert loaded.image_processor.padding_value == 2.0
        assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
        changed = cls.from_pretrained(tmp_path, padding_value=3.0, padding_side="left", local_files_only=True)
        assert (changed.image_processor.padding_value, changed.tokenizer.padding_side) == (3.0, "left")


def test_auto_classes(processor: FuyuProcessor, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="AutoProcessor has no constructor"):
        AutoProcessor()
    with pytest.raises(OSError, match="AutoImageProcessor has no constructor"):
        AutoImageProcessor()
    processor.tokenizer.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is PreTrainedTokenizerFast
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="monoblock has: FuyuImageProcessor"):
        AutoImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "fuyu"}')
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), FuyuProcessor)
    (tmp_path / "preprocessor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    with pytest.raises(ValueError, match="processor_class='LlavaProcessor'"):
        AutoProcessor.from_pretrained(tmp_path)
