"""Options shared by several commands. A group of options is a dataclass whose fields are the options."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer

from monoblock import seeds

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class Dtype(StrEnum):
    """Data types for loading weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Quantize(StrEnum):
    """Quantised types for loading weights."""

    INT8 = "int8"
    INT4 = "int4"
    LOSSLESS = "lossless"


class Speculation(StrEnum):
    """Sources of draft tokens."""

    SUFFIX = "suffix"
    LOOKUP = "lookup"
    OFF = "off"


SpeculationOption = Annotated[
    Speculation,
    typer.Option(
        help="Propose tokens that followed the last ones before, and verify several in a step: by the longest match "
        "(suffix), or the last 3 tokens (lookup). The output is the same."
    ),
]


class FrameworkName(StrEnum):
    """Frameworks."""

    PYTORCH = "pt"
    JAX = "flax"
    TENSORFLOW = "tf"


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """Options for downloads from the hub."""

    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")] = None
    token: Annotated[
        str | None,
        typer.Option(help="Access token of the hub; default: the one of HF_TOKEN or `hf auth login`."),
    ] = None
    offline: Annotated[bool, typer.Option("--offline", help="Use only files that are on this machine.")] = (
        False
    )
    gguf_file: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The GGUF file of the folder or repository that is the model."),
    ] = None

    def kwargs(self) -> dict[str, Any]:
        """As arguments of `from_pretrained` or `HubOptions`."""
        given: dict[str, Any] = {
            "revision": self.revision,
            "token": self.token,
            "gguf_file": self.gguf_file,
        }
        return {k: v for k, v in given.items() if v is not None} | {"local_files_only": self.offline}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options for loading a model in PyTorch."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Folder, GGUF file, or name on the hub; default: the embedded demo model."
        ),
    ] = None
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto: as stored.")] = Dtype.AUTO
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ...")] = (
        "auto"
    )
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="Quantise the weights while loading: int8, int4, or lossless (12 bits)."),
    ] = None

    def kwargs(self) -> dict[str, Any]:
        """As arguments of `from_pretrained`, without download options and device."""
        quantized = {"quantization_config": self.quantize.value} if self.quantize else {}
        return {"dtype": self.dtype.value, **quantized}


@dataclass(frozen=True, kw_only=True)
class FrameworkModelOptions(ModelOptions):
    """Options for loading a model in any framework."""

    framework: Annotated[
        FrameworkName | None,
        typer.Option(
            help="pt (PyTorch), flax (JAX) or tf (TensorFlow); default: the first that is installed."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling options; the defaults are those of the model's generation_config.json."""

    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after this many tokens.")
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", "-t", min=0, help="0: always the most likely token; 1: as trained."),
    ] = None
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Sample from the K most likely tokens; 0: from all.")
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Sample from the most likely tokens that sum up to P."),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Sample from tokens at least P times as likely as the most likely one."
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(min=0, help="Above 1: tokens that occur in the text become less likely.")
    ] = None
    seed: Annotated[
        int | None, typer.Option(min=0, max=seeds.MAX_SEED, help="The same seed gives the same text.")
    ] = None
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop after this text; may be given several times.")
    ] = None

    def kwargs(self, *, retry: int = 0) -> dict[str, Any]:
        """As arguments of `generate`; `retry` is added to the seed so that a retry differs.

        Usage error for options that greedy decoding would ignore.
        """
        choice = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        choice = {name: value for name, value in choice.items() if value is not None}
        if choice.get("temperature") == 0:
            if len(choice) > 1:
                others = ", ".join("--" + name.replace("_", "-") for name in choice if name != "temperature")
                raise typer.BadParameter(
                    f"--temperature 0 always takes the most likely token; drop it or {others}"
                )
            choice = {"do_sample": False}
        elif choice:
            choice["do_sample"] = True
        rest = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "seed": None if self.seed is None else seeds.advance(self.seed, retry),
            "stop_strings": self.stop or None,
        }
        return choice | {name: value for name, value in rest.items() if value is not None}


def shard_size(text: str | None) -> str | None:
    """The size itself, if it is valid; else a usage error."""
    from monoblock.checkpoint.save import parse_size

    try:
        if text is not None:
            parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(
            str(error).replace("max_shard_size=", ""), param_hint="--max-shard-size"
        ) from None
    return text
