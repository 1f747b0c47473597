"""`FuyuProcessor`: texts and images to model inputs, and model outputs to text and coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import numpy as np

from monoblock.installed import installed
from monoblock.processing import pixels
from monoblock.processing.arguments import (
    is_image_input,
    padded_length,
    pairs,
    refuse_text_only,
    split_arguments,
)
from monoblock.processing.auto_image import AutoImageProcessor
from monoblock.processing.batch import FuyuBatchEncoding
from monoblock.processing.files import IMAGE_FILE, PROCESSOR_FILE, pop_options, write_json
from monoblock.processing.image import FuyuImageProcessor
from monoblock.processing.options import SETTINGS, height_width
from monoblock.processing.patching import Ids, like, placeholders
from monoblock.processing.prompts import ANSWER, BEGIN, IMAGE, NEWLINE, Prompts
from monoblock.tokenization.tensors import as_list

_CALL_ONLY = ("self", "kwargs", "text", "images", "return_legacy_image_output")


@dataclass(frozen=True)
class _PromptRow:
    """One sample: its ids, and the patch index of each (-1: none)."""

    ids: Ids
    indices: Ids
    patches: pixels.Pixels


class FuyuProcessor:
    """A `FuyuImageProcessor` and Fuyu's tokenizer in one.

    The ids of a sample are, for each row of patches, one `|SPEAKER|` per patch and `|NEWLINE|`; then `<s>`, the text
    and `<0x04>`, after which the answer begins. A tokenizer without a padding token gets id 0, as Fuyu's.
    """

    def __init__(self, image_processor: FuyuImageProcessor, tokenizer: Any):
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self._prompts = Prompts(tokenizer)
        self.image_token, self.image_newline_token = IMAGE, NEWLINE
        self.image_token_id, self.image_newline_id = self._prompts.image_id, self._prompts.newline_id
        self.pad_token_id = 0
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = self.pad_token_id

    @property
    def image_token_ids(self) -> list[int]:
        """The ids of an image's placeholders: of `|NEWLINE|` and `|SPEAKER|`."""
        return [self.image_newline_id, self.image_token_id]

    @property
    def model_input_names(self) -> list[str]:
        """The keys of a result that a model takes."""
        names = [name for name in self.tokenizer.model_input_names if name != "token_type_ids"]
        return [*names, "image_patches", "image_patches_indices"]

    @property
    def chat_template(self) -> Any:
        """The tokenizer's chat template."""
        return self.tokenizer.chat_template

    # --- texts and images to inputs

    def __call__(
        self,
        text: Any = None,
        images: Any = None,
        add_special_tokens: bool = True,
        return_attention_mask: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        pad_to_multiple_of: int | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_token_type_ids: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        return_tensors: Any = None,
        *,
        padding_side: str = "left",
        return_legacy_image_output: bool = True,
        **kwargs: Any,
    ) -> FuyuBatchEncoding:
        """Makes a batch for the model. Without images this is the tokenizer's call.

        Args:
            text: a string or a list; may contain `<box>y1, x1, y2, x2</box>` and `<point>x, y</point>` in pixels of
                the original image. Without text each image gets an empty prompt.
            images: an image or one entry per text, None or [] for a text without one: PIL images, arrays, tensors or
                paths, of any size. One image per text. Text and images may be given in either order.
            add_special_tokens: False leaves out `<s>` and `<0x04>`.
            padding, max_length, pad_to_multiple_of, padding_side: a batch with images is always padded, by default on
                the left, to its longest row or (padding="max_length") to `max_length`.
            truncation, stride, return_...: for text alone; refused with images.
            return_tensors: "pt", "np", "jax" or "tf". None with images is "pt" if PyTorch is installed, else "np".
            return_legacy_image_output: False returns `pixel_values`, the newer name: all patches of the batch in one
                array [patches, 2700] in the order of their placeholders, without indices.
            kwargs: options of the image processor for this call, and `text_kwargs`, `images_kwargs`.

        Returns:
            `input_ids`, `attention_mask` [batch, length]; with images also `image_patches`, a list of float32
            [1, patches, 2700] per sample, and `image_patches_indices` [batch, length]: the patch of the sample at each
            position, -1 for none.
        """
        if not return_attention_mask:
            raise ValueError(
                "return_attention_mask=False is not supported: Fuyu needs the mask of its left padding"
            )
        arguments = {k: v for k, v in locals().items() if k not in _CALL_ONLY}
        settings = split_arguments(arguments, kwargs)
        if is_image_input(text) and not is_image_input(images):
            text, images = images, text
        if images is None:
            if settings:
                raise TypeError(f"{next(iter(settings))} is an option of images, and this call has none")
            if text is None:
                raise ValueError("there is nothing to process: pass text, images or both")
            return self._text_only(text, arguments)
        refuse_text_only(arguments)
        rows = [self._row(*pair, arguments["add_special_tokens"], settings) for pair in pairs(text, images)]
        return self._batch(rows, arguments, return_legacy_image_output)

    def _text_only(self, text: Any, arguments: dict[str, Any]) -> FuyuBatchEncoding:
        for one in [text] if isinstance(text, str) else text:
            if isinstance(one, str):
                self._prompts.without_image(one)
        encoded = self.tokenizer(text, **arguments)
        return FuyuBatchEncoding(dict(encoded), encoded.encodings)

    def _row(self, text: str, image: Any, special: bool, settings: Mapping[str, Any]) -> _PromptRow:
        prompts = self._prompts
        patched = None if image is None else self.image_processor.patched(image, **settings)
        ids, indices = np.zeros(0, np.int64), np.zeros(0, np.int64)
        if patched is not None:
            ids, indices = placeholders(patched.rows, patched.columns, prompts.image_id, prompts.newline_id)
        text_ids = prompts.prompt(text, None if patched is None else patched.scale)
        if special:
            text_ids = [prompts.id(BEGIN), *text_ids, prompts.id(ANSWER)]
        none = np.full(len(text_ids), -1)
        return _PromptRow(
            np.concatenate([ids, np.asarray(text_ids, np.int64)]),
            np.concatenate([indices, none]),
            self._no_patches(settings) if patched is None else patched.patches,
        )

    def _no_patches(self, settings: Mapping[str, Any]) -> pixels.Pixels:
        size = height_width("patch_size", settings.get("patch_size") or self.image_processor.patch_size)
        return np.zeros((0, size[0] * size[1] * 3), np.float32)

    def _batch(
        self, rows: Sequence[_PromptRow], arguments: Mapping[str, Any], legacy: bool
    ) -> FuyuBatchEncoding:
        length = padded_length(max(len(row.ids) for row in rows), arguments)
        side = arguments["padding_side"]
        data: dict[str, Any] = {
            "input_ids": _padded([row.ids for row in rows], length, self.pad_token_id, side),
            "attention_mask": _padded([np.ones_like(row.ids) for row in rows], length, 0, side),
        }
        if legacy:
            data["image_patches"] = [row.patches[None] for row in rows]
            data["image_patches_indices"] = _padded([row.indices for row in rows], length, -1, side)
        else:
            data["pixel_values"] = np.concatenate([row.patches for row in rows])
        tensors = arguments["return_tensors"]
        if tensors is None:
            tensors = "pt" if installed("torch") else "np"
        return FuyuBatchEncoding(data, tensor_type=tensors)

    # --- outputs to text

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's `decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's `apply_chat_template`."""
        return self.tokenizer.apply_chat_template(*args, **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """The answers: the text after the first `<0x04>` of each row of ids, or the whole row where there is none."""
        answer = self._prompts.id(ANSWER)
        rows: list[list[int]] = [list(row) for row in as_list(generated_outputs)]
        answers = [row[row.index(answer) + 1 :] if answer in row else row for row in rows]
        return [
            self.tokenizer.decode(row, skip_special_tokens=skip_special_tokens, **kwargs) for row in answers
        ]

    def post_process_box_coordinates(self, outputs: Any, target_sizes: Any = None) -> list[Any]:
        """Rows of ids in which boxes and points are written as text, in pixels of the original images.

        A decoded row contains `<box>top, left, bottom, right</box>` and `<point>x, y</point>`.

        Args:
            outputs: ids [batch, length] as `generate` returns them, or a list of rows.
            target_sizes: [batch, 2], the original (height, width) of each image; None if none was resized.

        Returns:
            One row per sample, of the input's type. ValueError with row and token for a malformed box.
        """
        rows = list(getattr(outputs, "sequences", outputs))
        if rows and isinstance(as_list(rows[0]), int):
            raise ValueError("expected a batch of rows of ids; got one row: put it in a list")
        sizes = [None] * len(rows) if target_sizes is None else as_list(target_sizes)
        if len(sizes) != len(rows):
            raise ValueError(
                f"there are {len(rows)} outputs and {len(sizes)} target_sizes: pass one for each"
            )
        tokens = self._prompts.coordinates()
        results: list[Any] = []
        for number, (row, size) in enumerate(zip(rows, sizes, strict=True)):
            ids = as_list(row)
            written = tokens.to_text(ids, self._scale(size), number)
            results.append(row if written == ids else _like_row(row, written))
        return results

    def _scale(self, size: Any) -> tuple[float, float]:
        if size is None:
            return 1.0, 1.0
        if not isinstance(size, list | tuple) or len(cast("Sequence[Any]", size)) != 2:
            raise ValueError(f"each of target_sizes is the (height, width) of an image; got {size!r}")
        height, width = (int(length) for length in cast("Sequence[Any]", size))
        fitted = self.image_processor.fitted_size(height, width)
        return fitted[0] / height, fitted[1] / width

    # --- files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """The processor of a folder or of a model on the hub.

        Keywords that are image options override those of the files; the download options (`revision`, `token`,
        `cache_dir`, `local_files_only`, `force_download`, `subfolder`) apply to both, the rest to the tokenizer.
        """
        from monoblock.tokenization import AutoTokenizer

        options = vars(pop_options(kwargs))
        settings = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        image_processor = AutoImageProcessor.from_pretrained(
            pretrained_model_name_or_path, **options, **settings
        )
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **options, **kwargs)
        return cls(image_processor=image_processor, tokenizer=tokenizer)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False) -> list[Path]:
        """Write the tokenizer's files, preprocessor_config.json and processor_config.json; returns their paths."""
        if push_to_hub:
            raise ValueError(
                "push_to_hub=True is not supported: save to a folder, then `hf upload REPO FOLDER`"
            )
        name = {"processor_class": "FuyuProcessor"}
        files = {IMAGE_FILE: {**self.image_processor.to_dict(), **name}, PROCESSOR_FILE: name}
        written = write_json(save_directory, files)
        return [*written, *map(Path, self.tokenizer.save_pretrained(save_directory))]

    def __repr__(self) -> str:
        return f"FuyuProcessor:\n- image_processor: {self.image_processor!r}\n- tokenizer: {self.tokenizer!r}"


def _padded(rows: Sequence[Ids], length: int, fill: int, side: str) -> Ids:
    """[rows, length]"""
    if side not in ("left", "right"):
        raise ValueError(f"padding_side={side!r}: expected 'left' or 'right'")
    missing = [length - len(row) for row in rows]
    widths = [(count, 0) if side == "left" else (0, count) for count in missing]
    return np.stack(
        [np.pad(row, width, constant_values=fill) for row, width in zip(rows, widths, strict=True)]
    )


def _like_row(row: Any, ids: list[int]) -> Any:
    """Ids as a list or an array, as `row` is."""
    if isinstance(row, list | tuple):
        return ids
    if hasattr(row, "new_tensor"):  # PyTorch: the same dtype and device
        return row.new_tensor(ids)
    return like(row)(np.asarray(ids, cast("Ids", row).dtype if isinstance(row, np.ndarray) else np.int64))
