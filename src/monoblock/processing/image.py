"""Fuyu's image processor on NumPy and Pillow, with transformers' names and defaults."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from monoblock.errors import FieldError
from monoblock.field_types import brief, in_file
from monoblock.processing import pixels
from monoblock.processing.batch import FuyuBatchEncoding, stacked
from monoblock.processing.files import image_files, read_image_config, write_json
from monoblock.processing.options import SETTINGS, ImageOptions, height_width, layout, refuse
from monoblock.processing.patching import OUTPUTS, grid, like, round_up, to_numpy, tokenizer_info
from monoblock.processing.pixels import Pixels

log = logging.getLogger("monoblock")

_PREPARED = ("images", "image_unpadded_heights", "image_unpadded_widths", "image_scale_factors")
# Entries of a preprocessor_config.json that are not image options.
_ABOUT = (
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "data_format",
    "input_data_format",
    "return_tensors",
)


@dataclass(frozen=True)
class PatchedImage:
    """One image for the model: `patches` [rows * columns, 2700] and the scale of the resizing."""

    patches: Pixels
    rows: int
    columns: int
    scale: tuple[float, float]  # resized / original: (height, width)


class FuyuImageProcessor:
    """Converts images of any size to Fuyu's patches.

    An image larger than `size` is shrunk to fit, with its aspect ratio; padded at the right and at the bottom with
    `padding_value`; then rescaled and normalised. Padding comes first, so its default 1.0 becomes -0.992.

    Args:
        do_resize, size, resample: fit into `{"height": 1080, "width": 1920}` with a filter of Pillow (2: bilinear).
        do_pad, padding_value, padding_mode: pad to `size`; "constant", "edge", "reflect" or "symmetric".
        do_rescale, rescale_factor: multiply by 1/255.
        do_normalize, image_mean, image_std: subtract and divide; one number, or three for red, green and blue.
        patch_size: `{"height": 30, "width": 30}`.
        kwargs: unknown options are kept, written back, and warned about.
    """

    model_input_names = OUTPUTS

    def __init__(
        self,
        /,
        do_resize: bool = True,
        size: Any = None,
        resample: Any = 2,
        do_pad: bool = True,
        padding_value: float = 1.0,
        padding_mode: str = "constant",
        do_normalize: bool = True,
        image_mean: float | Sequence[float] = 0.5,
        image_std: float | Sequence[float] = 0.5,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        patch_size: Any = None,
        **kwargs: Any,
    ):
        self.do_resize = do_resize
        self.size = _as_dict("size", {"height": 1080, "width": 1920} if size is None else size)
        self.resample = resample
        self.do_pad = do_pad
        self.padding_value = padding_value
        self.padding_mode = padding_mode
        self.do_normalize = do_normalize
        self.image_mean = image_mean
        self.image_std = image_std
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.patch_size = _as_dict(
            "patch_size", {"height": 30, "width": 30} if patch_size is None else patch_size
        )
        self._extra: dict[str, Any] = {}
        self._warned_of_scale = False
        for name, value in kwargs.items():
            if not refuse(name, value):
                if name.startswith("_") or hasattr(type(self), name):
                    raise FieldError(
                        f"FuyuImageProcessor.{name} is an attribute of the class, not an option", name
                    )
                self._extra[name] = value
                setattr(self, name, value)
                log.warning("FuyuImageProcessor does not know %s: it is kept and written back", brief(name))
        self._options({})

    def _options(self, overrides: Mapping[str, Any]) -> ImageOptions:
        """This processor's options, overridden by those of one call, checked."""
        own = {name: getattr(self, name) for name in SETTINGS}
        return ImageOptions.check(
            own | {k: v for k, v in overrides.items() if v is not None and k in SETTINGS}
        )

    # --- images

    def __call__(self, images: Any, **kwargs: Any) -> FuyuBatchEncoding:
        """Same as `preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: Any,
        do_resize: bool | None = None,
        size: Any = None,
        resample: Any = None,
        do_pad: bool | None = None,
        padding_value: float | None = None,
        padding_mode: str | None = None,
        do_normalize: bool | None = None,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        patch_size: Any = None,
        data_format: Any = "channels_first",
        input_data_format: Any = None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> FuyuBatchEncoding:
        """Fit, pad, rescale and normalise images.

        Args:
            images: an image (PIL, array, tensor or the path of a file), a list, or one list per sample; None or an
                empty list is a sample without an image.
            data_format, input_data_format: "channels_first" or "channels_last", of the result and of input arrays.
            return_tensors: "pt", "np", "jax" or "tf"; None for lists of NumPy arrays.
            The other arguments override the processor's options in this call.

        Returns:
            `images`, one list of [3, H, W] float32 per sample; their `image_unpadded_heights` and `_widths` after
            resizing; `image_scale_factors`, resized / original height; `image_sizes`, the original (height, width) of
            each image. With `return_tensors` one array each where all samples have the same shape.
        """
        given = {name: value for name, value in locals().items() if name in SETTINGS}
        _refuse_unknown(kwargs)
        options, arrays = self._options(given), layout("input_data_format", input_data_format)
        channels_last = layout("data_format", data_format) == "channels_last"
        data: dict[str, list[Any]] = {name: [] for name in _PREPARED}
        sizes: list[tuple[int, int]] = []
        for sample in pixels.as_samples(images):
            originals = [pixels.to_rgb(image, arrays) for image in sample]
            sizes += [(image.shape[0], image.shape[1]) for image in originals]
            rows = [self._prepared(image, options, channels_last) for image in originals]
            for index, values in enumerate(data.values()):
                values.append([row[index] for row in rows])
        data["image_sizes"] = sizes
        if return_tensors is None:
            return FuyuBatchEncoding(data)
        return FuyuBatchEncoding({k: stacked(v) for k, v in data.items()}, tensor_type=return_tensors)

    def _prepared(self, original: Pixels, options: ImageOptions, channels_last: bool) -> tuple[Any, ...]:
        """One image's values, in the order of `_PREPARED`."""
        image = self._fit(original, options)
        height, width = image.shape[:2]
        if options.do_pad:
            image = pixels.pad(image, options.size, options.padding_mode, options.padding_value)
        image = self._normalized(image, options)
        if not channels_last:
            image = np.ascontiguousarray(np.moveaxis(image, -1, 0))
        return image, height, width, height / original.shape[0]

    def patched(self, image: Any, **overrides: Any) -> PatchedImage:
        """One image as patches, padded only to whole patches, as `FuyuProcessor` passes it to the model."""
        arrays = layout("input_data_format", overrides.pop("input_data_format", None))
        settings = {name: overrides.pop(name) for name in SETTINGS if name in overrides}
        _refuse_unknown(overrides)
        options = self._options(settings)
        original = pixels.to_rgb(image, arrays)
        image = self._fit(original, options)
        height, width = image.shape[:2]
        if options.do_pad:
            limit, patch = options.size, options.patch_size
            fits = height <= limit[0] and width <= limit[1]  # if not, pad() raises for the limit
            size = (
                (round_up(height, patch[0], limit[0]), round_up(width, patch[1], limit[1])) if fits else limit
            )
            image = pixels.pad(image, size, options.padding_mode, options.padding_value)
        rows, columns = grid(image.shape[0], image.shape[1], options.patch_size)
        cut = pixels.patches(self._normalized(image, options), options.patch_size)
        scale = (height / original.shape[0], width / original.shape[1])
        return PatchedImage(cut.astype(np.float32, copy=False), rows, columns, scale)

    def fitted_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels that an image of that size is resized to."""
        if not self.do_resize:
            return height, width
        return pixels.fitted_size(height, width, height_width("size", self.size))

    def _fit(self, image: Pixels, options: ImageOptions) -> Pixels:
        size = pixels.fitted_size(image.shape[0], image.shape[1], options.size)
        if not options.do_resize or size == image.shape[:2]:
            return image
        return pixels.resize(image, size, options.resample)

    def _normalized(self, image: Pixels, options: ImageOptions) -> Pixels:
        if options.do_rescale:
            if image.dtype != np.uint8 and image.max() <= 1 and not self._warned_of_scale:
                self._warned_of_scale = True
                log.warning("an image without values over 1 is rescaled: do_rescale=False disables rescaling")
            image = pixels.rescale(image, options.rescale_factor)
        return (
            pixels.normalize(image, options.image_mean, options.image_std) if options.do_normalize else image
        )

    # --- patches

    def get_num_patches(self, image_height: int, image_width: int, patch_size: Any = None) -> int:
        """Patches of an image; ValueError if its height or width is not a multiple of a patch's."""
        rows, columns = grid(image_height, image_width, self._patch_size(patch_size))
        return rows * columns

    def patchify_image(self, image: Any, patch_size: Any = None) -> Any:
        """[batch, channels, H, W] (or without a batch) to [batch, patches, patch height * width * channels].

        Patches are in row-major order, with channels last. The result is of the input's framework.
        """
        size = self._patch_size(patch_size)
        array = to_numpy(image)
        if array.ndim not in (3, 4):
            raise ValueError(
                f"expected an image [batch, channels, height, width]; got the shape {array.shape}"
            )
        images = array if array.ndim == 4 else array[None]
        grid(images.shape[2], images.shape[3], size)
        cut = np.stack([pixels.patches(np.moveaxis(one, 0, -1), size) for one in images])
        return like(image)(cut if array.ndim == 4 else cut[0])

    def _patch_size(self, given: Any) -> tuple[int, int]:
        return height_width("patch_size", self.patch_size if given is None else given)

    def preprocess_with_tokenizer_info(
        self,
        image_input: Any,
        image_present: Any,
        image_unpadded_h: Any,
        image_unpadded_w: Any,
        image_placeholder_id: int,
        image_newline_id: int,
        variable_sized: bool,
        patch_size: Any = None,
    ) -> FuyuBatchEncoding:
        """Padded images to patches, their placeholder ids, and the patch index of each id.

        Args:
            image_input: [batch, images, channels, height, width].
            image_present: [batch, images] or [batch, images, 1]: 0 for a missing image.
            image_unpadded_h, image_unpadded_w: [batch, images], in pixels.
            image_placeholder_id, image_newline_id: the ids of `|SPEAKER|` and `|NEWLINE|`.
            variable_sized: crop the padding and end each row of patches with the newline id.

        Returns:
            Lists per sample, then per image: `images`, `image_input_ids` (int32), `image_patches`, and
            `image_patch_indices_per_batch` and `..._per_subsequence` (-1 for no patch; counted through the sample, or
            from 0 in each image). Arrays are of the framework of `image_input`.
        """
        present, heights, widths = map(to_numpy, (image_present, image_unpadded_h, image_unpadded_w))
        batch, back = to_numpy(image_input), like(image_input)
        data = tokenizer_info(
            batch,
            np.any(present.reshape((*batch.shape[:2], -1)), axis=-1),
            (heights, widths) if variable_sized else None,
            (image_placeholder_id, image_newline_id),
            self._patch_size(patch_size),
        )
        return FuyuBatchEncoding({name: back(value) for name, value in data.items()})

    # --- files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """The processor of a folder or of a model on the hub; keywords override its options, except the download
        options (`revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, `subfolder`)."""
        path, settings, rest = read_image_config(pretrained_model_name_or_path, kwargs)
        return cls.from_file(path, settings, rest)

    @classmethod
    def from_file(cls, path: Path, settings: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Self:
        """The processor with a file's settings; FieldError, which names the file, for an invalid one."""
        with in_file(path, kwargs):
            try:
                return cls.from_dict(settings, kwargs)
            except TypeError as error:  # an invalid value in the file
                if kwargs:
                    raise
                raise FieldError(str(error)) from error

    @classmethod
    def from_dict(
        cls, image_processor_dict: Mapping[str, Any], kwargs: Mapping[str, Any] | None = None
    ) -> Self:
        """A processor with the content of a `preprocessor_config.json`; `kwargs` override it."""
        settings = dict(image_processor_dict)
        first = [
            settings.pop(f"target_{side}", None) for side in ("height", "width")
        ]  # the size in Fuyu's first files
        if first[0] is not None and first[1] is not None:
            settings.setdefault("size", first)
        settings |= kwargs or {}
        return cls(**{k: v for k, v in settings.items() if v is not None and k not in _ABOUT and k[0] != "_"})

    def to_dict(self) -> dict[str, Any]:
        """The options under transformers' names."""
        own = {name: getattr(self, name) for name in SETTINGS}
        own["resample"] = int(self.resample)  # Pillow's enum as a plain int
        return {**own, **self._extra, "image_processor_type": "FuyuImageProcessor"}

    def to_json_string(self) -> str:
        """The content of `preprocessor_config.json`."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False) -> list[Path]:
        """Write `preprocessor_config.json` atomically; returns the paths of the written files.

        A `processor_config.json` in the folder with image options, which would take precedence, is updated as well.
        """
        if push_to_hub:
            raise ValueError(
                "push_to_hub=True is not supported: save to a folder, then `hf upload REPO FOLDER`"
            )
        return write_json(save_directory, image_files(save_directory, self.to_dict()))

    def __repr__(self) -> str:
        return f"FuyuImageProcessor {self.to_json_string()}"


def _as_dict(name: str, value: Any) -> dict[str, int]:
    return dict(zip(("height", "width"), height_width(name, value), strict=True))


def _refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    for name, value in kwargs.items():
        if not refuse(name, value):
            raise TypeError(f"FuyuImageProcessor has no argument {name!r}; it has: {', '.join(SETTINGS)}")
