"""The model of `embed` and `search`, and the options that decide its vectors."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monoblock.cli.options import DownloadOptions, Dtype, FrameworkName, Quantize

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Options for loading an embedding model."""

    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto: as stored.")] = Dtype.AUTO
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ...")] = (
        "auto"
    )
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="Quantise the weights while loading: int8, int4, or lossless (12 bits)."),
    ] = None
    framework: Annotated[
        FrameworkName | None,
        typer.Option(
            help="pt (PyTorch), flax (JAX) or tf (TensorFlow); default: the first that is installed."
        ),
    ] = None
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Texts per forward pass.")] = 32


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """The text that is put before each text."""

    prompt: Annotated[str | None, typer.Option(help="Put this before each text.")] = None
    prompt_name: Annotated[
        str | None, typer.Option(help="Put the model's prompt of this name before it.")
    ] = None

    def check(self) -> None:
        """Usage error if both are given."""
        if self.prompt is not None and self.prompt_name is not None:
            raise typer.BadParameter("give --prompt or --prompt-name, not both")


class Encoder:
    """A loaded embedding model with the options of a command."""

    def __init__(self, model: Any, framework: str, options: dict[str, Any]) -> None:
        self.model, self._framework, self._options = model, framework, options
        self._once = _Once()

    @property
    def similarity(self) -> str:
        """The name of the model's similarity, by default "cosine"."""
        return self.model.similarity_fn_name or "cosine"

    def use_prompt(self, name: str) -> None:
        """Put the model's prompt of this name before each text, if it has one."""
        if name in self.model.prompts:
            self._options["prompt_name"] = name

    @property
    def threads(self) -> int | None:
        """The number of PyTorch's threads; None in another framework."""
        if self._framework != "pt":
            return None
        import torch

        return torch.get_num_threads()

    def use_threads(self, count: int | None) -> None:
        """Use the threads of the run that is resumed: sums in another order differ in their last bits."""
        if count is not None and count != self.threads:
            self.model.limit_threads(count)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, int]:
        """The vectors, [texts, width] float32, and the number of texts that were truncated."""
        log = logging.getLogger("monoblock")
        log.addFilter(self._once)
        try:
            vectors, cut = self.model.encode(
                texts, show_progress_bar=False, return_truncated=True, **self._options
            )
        finally:
            log.removeFilter(self._once)
        return vectors, int((cut > 0).sum())


class _Once(logging.Filter):
    """Drops warnings of truncated texts, whose number the command reports, and repetitions of other messages."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        seen = record.msg in self._seen
        self._seen.add(record.msg)
        return not seen and "max_seq_length" not in record.msg


def identity(model: str, hub: DownloadOptions) -> str:
    """The fingerprint of the model's files."""
    from monoblock.embeddings.model import OWNER
    from monoblock.embeddings.sequence import hub_options
    from monoblock.vectors.identity import model_fingerprint

    if hub.gguf_file is not None:
        raise typer.BadParameter(
            "--gguf-file is for language models: embedding models are folders or repositories"
        )
    name, where = hub_options(model, None, hub.revision, hub.token, hub.offline, OWNER)
    return model_fingerprint(name, where)


def framework_of(options: EncoderOptions, what: str) -> str:
    """The framework's name; errors before anything is downloaded. `what`: the command, for errors."""
    from monoblock.pipelines.frameworks import FRAMEWORKS, chosen

    framework = chosen(options.framework, what)
    if framework.backend != "pytorch" and options.quantize is not None:
        raise typer.BadParameter(f"--quantize needs PyTorch, but the framework is {framework.name}")
    return next(name for name, other in FRAMEWORKS.items() if other is framework)


def load(model: str, options: EncoderOptions, hub: DownloadOptions, framework: str, **encode: Any) -> Encoder:
    """Load a model; `encode`: arguments of every call of its `encode`."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only, no hardware reports
    from monoblock import SentenceTransformer

    quantized = {"quantization_config": options.quantize.value} if options.quantize else {}
    loaded = SentenceTransformer(
        model,
        dtype=options.dtype.value,
        framework=framework,
        device=None if options.device == "auto" else options.device,
        **quantized,
        **hub.kwargs(),
    )
    return Encoder(loaded, framework, {"batch_size": options.batch_size, **encode})
