"""`monoblock convert`: convert checkpoints between original release formats and transformers' format."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.options import DownloadOptions, Dtype, shard_size
from monoblock.cli.progress import phases

if TYPE_CHECKING:
    from monoblock.conversion.compare import Comparison
    from monoblock.conversion.convert import Result

app = sub_app()

LISTED = 3  # names of unused tensors that are shown


class From(StrEnum):
    """Source formats."""

    AUTO = "auto"
    HUB = "hub"
    LLM_FOUNDRY = "llm-foundry"
    MISTRAL = "mistral"
    FUYU = "fuyu"
    OPENAI_GPT = "openai-gpt"


class GgufType(StrEnum):
    """Types of the matrices of a GGUF file."""

    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"
    Q4_K = "q4_k"


class To(StrEnum):
    """Target formats."""

    HUB = "hub"
    MISTRAL = "mistral"
    FUYU = "fuyu"
    OPENAI_GPT = "openai-gpt"


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Formats, and changes to the weights."""

    source_format: Annotated[From, typer.Option("--from", help="Format of the source.")] = From.AUTO
    gguf_type: Annotated[
        GgufType | None,
        typer.Option(
            "--type", help="Type of the matrices of a GGUF file, the target's name ending in .gguf."
        ),
    ] = None
    target_format: Annotated[To, typer.Option("--to", help="Format of the target.")] = To.HUB
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto: as stored.")] = Dtype.AUTO
    max_shard_size: Annotated[
        str | None, typer.Option(help='Split the weights into files of this size at most, such as "5GB".')
    ] = None
    kv_heads: Annotated[
        int | None,
        typer.Option(min=1, help="Reduce the key and value heads to this many; each is the mean of a group."),
    ] = None


@app.command(epilog=EXIT_CODES)
@console.command
def convert(
    *,
    source: Annotated[str, typer.Argument(help="Folder, .tar or .pt file, or name on the hub.")],
    target: Annotated[str, typer.Argument(help="The folder to create, or a file NAME.gguf.")],
    changes: Changes,
    check: Annotated[
        bool, typer.Option("--check", help="Read the result back; compare its tensors and its logits.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the target folder; the files in it are deleted.")
    ] = False,
    hub: DownloadOptions,
) -> None:
    """Convert a checkpoint into a new folder: another format, type, shard size, or number of key and value heads.

    A target NAME.gguf is written as one GGUF file with the tokenizer, for llama.cpp: --type chooses f16, bf16, q8_0,
    q4_0 or q4_k. The folder or the file is created atomically, when it is complete.
    """
    if target.endswith(".gguf") or changes.gguf_type is not None:
        _gguf(source, target, changes, check=check, force=force, hub=hub)
        return
    from monoblock.checkpoint.options import HubOptions
    from monoblock.conversion.convert import Options
    from monoblock.conversion.convert import convert as run

    options = Options(
        source_format=changes.source_format.value,
        target_format=changes.target_format.value,
        dtype=None if changes.dtype is Dtype.AUTO else changes.dtype.value,
        max_shard_size=shard_size(changes.max_shard_size),
        kv_heads=changes.kv_heads,
        check=check,
        force=force,
        hub=HubOptions(**hub.kwargs()),
    )
    with phases() as progress:
        result = run(source, target, options, progress)
    _show(result, target)


def _gguf(
    source: str, target: str, changes: Changes, *, check: bool, force: bool, hub: DownloadOptions
) -> None:
    """Write a GGUF file; usage errors for options that are for folders."""
    if not target.endswith(".gguf"):
        raise typer.BadParameter("--type is for GGUF files: give a target NAME.gguf, or --dtype for a folder")
    if changes.gguf_type is None:
        kinds = ", ".join(GgufType)
        raise typer.BadParameter(f"{target} is a GGUF file, whose type is needed: --type {kinds}")
    given = {
        "--to": changes.target_format is not To.HUB,
        "--dtype": changes.dtype is not Dtype.AUTO,
        "--max-shard-size": changes.max_shard_size is not None,
        "--check": check,
    }
    if wrong := next((name for name, value in given.items() if value), None):
        raise typer.BadParameter(f"{wrong} is for folders, and {target} is a GGUF file: drop it")
    from monoblock.checkpoint.options import HubOptions
    from monoblock.conversion.gguf import GgufOptions, convert_to_gguf

    options = GgufOptions(
        kind=changes.gguf_type.value,
        source_format=changes.source_format.value,
        kv_heads=changes.kv_heads,
        force=force,
        hub=HubOptions(**hub.kwargs()),
    )
    with phases() as progress:
        result = convert_to_gguf(source, target, options, progress)
    _show(result, target)


def _show(result: Result, target: str) -> None:
    lines = [
        ("from", result.source_format),
        ("to", result.target_format),
        ("class", result.architecture),
        ("dtype", result.dtype),
        ("parameters", f"{result.parameters:,}"),
        ("files", ", ".join(result.files)),
    ]
    if result.left_out:
        more = len(result.left_out) - LISTED
        names = ", ".join(result.left_out[:LISTED]) + (f" and {more} more" if more > 0 else "")
        lines.append(("left out", f"{names}: {result.architecture} does not use them"))
    if result.comparison:
        lines += _check_lines(result.comparison)
    console.rows(target, lines)


def _check_lines(found: Comparison) -> list[tuple[str, str]]:
    others = found.tensors - found.equal
    text = f"{found.equal} of {found.tensors} are equal"
    if others:
        text += f"; the others differ by at most {found.difference:.3g}, from rounding"
    lines = [("tensors", text)]
    if found.logits is None:
        return [*lines, ("logits", f"not compared: {found.why}")]
    run = found.logits
    text = (
        f"differ by at most {run.difference:.3g} (largest magnitude: {run.magnitude:.3g}); same argmax at "
        f"{run.agreement:.1%} of positions, in {run.prompts} random prompts of {run.length} tokens"
    )
    return [*lines, ("logits", text)]
