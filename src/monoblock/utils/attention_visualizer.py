"""`AttentionMaskVisualizer`: the attention mask of a model for given texts, as pictures and as arrays."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TextIO, cast

import numpy as np

from monoblock.auto import AutoConfig
from monoblock.checkpoint.files import write_atomically
from monoblock.checkpoint.hub import HubOptions, find_file
from monoblock.config import PretrainedConfig
from monoblock.spec import Alibi, Buckets
from monoblock.tokenization import AutoTokenizer
from monoblock.utils import visibility
from monoblock.utils.heatmap import Panel, Style, drawing, lines, page
from monoblock.utils.panels import check_head, check_layer, mask_panels, weight_panels
from monoblock.utils.tokens import Reader, Tokens
from monoblock.utils.visibility import Bools, Floats, Ints

SIDES = ("left", "right")
KINDS: dict[str, Callable[[Sequence[Panel], str], str | bytes]] = {
    "svg": lambda panels, title: drawing(panels, title).svg(),
    "png": lambda panels, title: drawing(panels, title).png(),
    "html": page,
}


class AttentionMaskVisualizer:
    """Shows the attention mask of a model for a text, in every kind of layer: causal or bidirectional, sliding windows,
    padding, image patches, and ALiBi or relative position buckets as shades. Needs config and tokenizer, but neither
    weights nor a framework.

        visualizer = AttentionMaskVisualizer("mistralai/Mistral-7B-v0.1")
        visualizer("Do you have mayonnaise recipes?")   # prints
        visualizer.svg("mask.svg")                      # writes the same mask to a file
    """

    def __init__(self, model_name_or_path: str | Path, **options: Any) -> None:
        """
        Args:
            model_name_or_path: a folder, or a name on the hub.
            options: the download options `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`,
                `subfolder`.
        """
        rest = dict(options)
        self._hub = HubOptions.pop(rest)
        if rest:
            raise TypeError(f"AttentionMaskVisualizer takes no argument {next(iter(rest))!r}")
        config = AutoConfig.from_pretrained(model_name_or_path, **options)
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, config=config, **options)
        self._set_up(config, tokenizer, model_name_or_path, options)

    @classmethod
    def from_config(cls, config: PretrainedConfig, tokenizer: Any) -> Self:
        """A visualizer for a config and a tokenizer, without files."""
        visualizer = cls.__new__(cls)
        visualizer._set_up(config, tokenizer, None, {})
        return visualizer

    def _set_up(
        self, config: PretrainedConfig, tokenizer: Any, name: str | Path | None, options: dict[str, Any]
    ) -> None:
        self.config, self.tokenizer, self.spec = config, tokenizer, config.to_spec()
        self._name, self._options = name, options
        self._processor: Any = None
        self._tokens: Tokens | None = None
        self._head: int | None = None

    # ------------------------------------------------------------------------ inputs

    def __call__(self, text: str | Sequence[str], *, head: int | None = None, **more: Any) -> None:
        """Print the attention mask, one heatmap for each kind of layer and each text.

        Args:
            text: a text, or a batch of texts, which are padded to the longest.
            head: the head whose ALiBi the shades show; default the mean of all heads.
            more: as in `read`.
        """
        if head is not None:
            if not self.spec.position(Alibi):
                raise ValueError("head would have no effect: without ALiBi all heads have the same mask")
            check_head(self.spec, head)
        self.read(text, **more)
        self._head = head
        show(self.panels())

    def read(
        self,
        text: str | Sequence[str],
        *,
        images: Any = None,
        patches: tuple[int, int] | None = None,
        padding_side: str | None = None,
        sequence_id: Any = None,
    ) -> Tokens:
        """Tokenize a text without printing its mask; ValueError for one that the model would refuse.

        Args:
            text: a text, or a batch of texts, which are padded to the longest.
            images: for a model that takes them, an image (a PIL image, an array, a path), or one or None per text.
            patches: instead of an image, the rows and columns of patches of a blank one.
            padding_side: "left" or "right"; default the tokenizer's, with images "left".
            sequence_id: for a model that uses it, the index of the packed sequence that each token belongs to.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("there is no text: pass one, or a list with at least one")
        samples = self._images(images, patches, len(texts))
        with_images = any(sample is not None for sample in samples)
        # Batches with images are padded on the left, as by their processor.
        side = padding_side or ("left" if with_images else self.tokenizer.padding_side)
        if side not in SIDES:
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        segments = [sequence_id] if sequence_id is not None and isinstance(text, str) else sequence_id
        reader = Reader(self.spec, self.tokenizer, self._with_processor() if with_images else None)
        self._tokens, self._head = reader.read(texts, samples, side, segments), None
        return self._tokens

    def _images(self, images: Any, patches: tuple[int, int] | None, count: int) -> list[Any]:
        if images is None and patches is None:
            return [None] * count
        if self.spec.patches is None:
            raise ValueError(f"{self.config.model_type} takes text alone: leave out images and patches")
        if patches is not None:
            if images is not None:
                raise ValueError("pass images or patches, not both: patches stands for a blank image")
            if len(patches) != 2 or min(patches) < 1:
                raise ValueError(f"patches must be (rows, columns), each 1 or more, got {patches!r}")
            return [self._blank(patches)] * count
        several = isinstance(images, list | tuple)
        given: list[Any] = list(cast("Sequence[Any]", images)) if several else [images] * count
        if len(given) != count:
            raise ValueError(f"images must be one, or one per text: got {len(given)} for {count} texts")
        return given

    def _blank(self, patches: tuple[int, int]) -> Any:
        """An image with that many rows and columns of patches; ValueError if the model would shrink it."""
        images = self._with_processor().image_processor
        height, width = (
            n * images.patch_size[side] for n, side in zip(patches, ("height", "width"), strict=True)
        )
        if images.fitted_size(height, width) != (height, width):
            raise ValueError(
                f"patches={patches!r} are more than the model's images have: they would be shrunk"
            )
        return np.zeros((height, width, 3), np.uint8)

    def _with_processor(self) -> Any:
        """The model's processor, created when an image first needs it."""
        if self._processor is None:
            from monoblock.processing import AutoImageProcessor, FuyuImageProcessor, FuyuProcessor

            side: int = self.config.to_dict()["patch_size"]
            images: Any = FuyuImageProcessor(patch_size={"height": side, "width": side})
            files = ("preprocessor_config.json", "processor_config.json")
            if (name := self._name) is not None and any(
                find_file(name, file, self._hub, required=False) for file in files
            ):
                images = AutoImageProcessor.from_pretrained(name, **self._options)
            self._processor = FuyuProcessor(images, self.tokenizer)
        return self._processor

    @property
    def tokens(self) -> Tokens:
        """The tokens of the last call; ValueError before the first."""
        if self._tokens is None:
            raise ValueError('there is no text yet: call the visualizer first, as in visualizer("some text")')
        return self._tokens

    # ------------------------------------------------------------------------ arrays

    def mask(self, layer: int = 0) -> Bools:
        """(texts, queries, keys), True where the query attends to the key."""
        return visibility.mask(self.spec, check_layer(self.spec, layer), self.tokens.batch)

    def bias(self, layer: int = 0, *, table: Any = None) -> Floats:
        """The bias that the layer adds to its scores, (texts, heads or 1, queries, keys): ALiBi or that of relative
        buckets, else 0; the lowest float32 where a key is masked.

        Args:
            table: the learned bias (buckets, heads) of a model with relative buckets, which needs it.
        """
        return visibility.bias(self.spec, check_layer(self.spec, layer), self.tokens.batch, table)

    def buckets(self) -> Ints:
        """The relative position bucket of each pair, (queries, keys); ValueError for models without buckets."""
        layout = self.spec.position(Buckets)
        if layout is None:
            raise ValueError(f"{self.config.model_type} has no relative position buckets")
        index = np.arange(self.tokens.length)
        return visibility.relative_position_bucket(index[None, :] - index[:, None], layout)

    # ------------------------------------------------------------------------ heatmaps

    def panels(self) -> list[Panel]:
        """The attention masks of the last call: a heatmap for each kind of layer and each text."""
        return mask_panels(self.spec, self.tokens, self._head)

    def weights(
        self, attentions: Sequence[Any], *, layer: int | None = None, head: int | str = "mean"
    ) -> list[Panel]:
        """The attention weights of a model for the last text, as heatmaps for `show` and `save`.

        Args:
            attentions: a model's `attentions`: for each layer an array (texts, heads, queries, keys).
            layer: a layer's index; None for every layer.
            head: a head's index, "mean" or "all".
        """
        return weight_panels(self.spec, self.tokens, attentions, layer, head)

    def svg(self, path: str | Path | None = None) -> str:
        """The heatmaps of the last call as one SVG with all tokens; written to `path` if given."""
        return _as_text(path, drawing(self.panels(), self.title).svg())

    def html(self, path: str | Path | None = None) -> str:
        """The same as a self-contained HTML page."""
        return _as_text(path, page(self.panels(), self.title))

    def png(self, path: str | Path | None = None) -> bytes:
        """The same as the bytes of a PNG file; ImportError with the pip command without Pillow."""
        content = drawing(self.panels(), self.title).png()
        _write(path, content)
        return content

    @property
    def title(self) -> str:
        """The heading of pictures."""
        name = "" if self._name is None else f" ({Path(self._name).name})"
        return f"{self.config.model_type}{name}: attention mask"

    def _repr_html_(self) -> str | None:
        """The heatmaps in a notebook; None before the first call."""
        return None if self._tokens is None else self.svg()


def show(panels: Sequence[Panel], stream: TextIO | None = None) -> None:
    """Print heatmaps: in colour on a terminal that supports it, else in plain characters."""
    out = sys.stdout if stream is None else stream
    wanted = "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    columns = shutil.get_terminal_size().columns
    style = Style(columns, colour=out.isatty() and wanted, ascii=not _can_encode("░▒▓█·⋮…␣↵⇥", out))
    for panel in panels:
        print(*lines(panel, style), "", sep="\n", file=out)


def save(panels: Sequence[Panel], title: str, path: str | Path, kind: str) -> None:
    """Write heatmaps to a file of that kind: "svg", "png" or "html"."""
    _write(path, KINDS[kind](panels, title))


def _as_text(path: str | Path | None, text: str) -> str:
    _write(path, text)
    return text


def _write(path: str | Path | None, content: str | bytes) -> None:
    if path is not None:
        raw = content.encode() if isinstance(content, str) else content
        write_atomically(path, lambda staged: staged.write_bytes(raw))


def _can_encode(characters: str, stream: TextIO) -> bool:
    try:
        characters.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
