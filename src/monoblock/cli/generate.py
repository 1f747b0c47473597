"""`monoblock generate`: continue a text."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.options import (
    DownloadOptions,
    FrameworkModelOptions,
    FrameworkName,
    SamplingOptions,
    Speculation,
    SpeculationOption,
)
from monoblock.cli.shards import ProcessOptions
from monoblock.texts import read_text

app = sub_app()
MAX_NEW_TOKENS = 128


@app.command(epilog=EXIT_CODES)
@console.command
def generate(
    *,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - or none: read it from standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the text to continue from a file.")
    ] = None,
    source: FrameworkModelOptions,
    hub: DownloadOptions,
    sampling: SamplingOptions,
    speculation: SpeculationOption = Speculation.OFF,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print text as it comes, or at the end.")
    ] = True,
    echo: Annotated[
        bool | None, typer.Option("--echo/--no-echo", help="Print the prompt first; default: at a terminal.")
    ] = None,
    processes: ProcessOptions,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No counts and speeds on stderr.")] = False,
) -> None:
    """Continue a text with a model; without --model, with the embedded demo, a tiny model for Python code.

    The completion goes to standard output, everything else to standard error. A line end at the end of a
    prompt from a file or standard input is removed. Unless --max-new-tokens or the model's
    generation_config.json sets a limit, generation stops after 128 tokens.
    """
    text = read_prompt(prompt, file)
    options = sampling.kwargs()
    if speculation is not Speculation.OFF:
        if processes.option is not None:
            raise typer.BadParameter(
                f"the processes would draft different numbers of tokens: drop it or {processes.option}",
                param_hint="--speculation",
            )
        options["speculation"] = speculation.value
    from monoblock.cli import engine, shards, stages

    processes.refuse()
    if processes.option is not None:
        if source.framework not in (None, FrameworkName.PYTORCH):
            raise typer.BadParameter(f"{processes.option} needs PyTorch; drop --framework {source.framework}")
        engine.need_pytorch(f"monoblock generate {processes.option}")
    with contextlib.ExitStack() as stack:
        if processes.tensor_parallel > 1:
            count = processes.tensor_parallel
            stack.enter_context(shards.processes(count, source, hub, text, MAX_NEW_TOKENS, options))
            loaded = engine.load(source, hub, sharded=True)
        elif processes.pipeline_parallel > 1:
            loaded = stack.enter_context(stages.loaded(processes.pipeline_parallel, source, hub))
        else:
            loaded = engine.load(source, hub)
        interrupted = _complete(loaded, text, options, stream, echo, quiet)
    if interrupted:
        raise typer.Exit(console.INTERRUPTED)


def _complete(
    loaded: Any, text: str, options: dict[str, Any], stream: bool, echo: bool | None, quiet: bool
) -> bool:
    """Print the completion; whether it was interrupted."""
    if sys.stdout.isatty() if echo is None else echo:
        console.write(text)
    reply = loaded.complete(
        text, loaded.limits(MAX_NEW_TOKENS) | options, console.write if stream else _ignore
    )
    if not stream:
        console.write(reply.text)
    if not reply.text.endswith("\n"):
        console.write("\n")
    if not quiet:
        console.note(reply.summary())
    return reply.interrupted


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt, from the argument, a file or standard input; usage error if it is missing or empty."""
    if prompt is not None and file is not None:
        raise typer.BadParameter("give the prompt as an argument or with --file, not both")
    if file is not None:
        text = _strip_line_end(read_text(file))
    elif prompt is not None and prompt != "-":
        text = prompt
    elif prompt is None and sys.stdin.isatty():
        raise typer.BadParameter('a prompt is needed: monoblock generate "def fibonacci(n):"')
    else:
        text = _strip_line_end(sys.stdin.read())
    if not text:
        raise typer.BadParameter("the prompt is empty; a model needs at least one character to continue")
    return text


def _strip_line_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


def _ignore(text: str) -> None:
    """With --no-stream, the text is printed from the reply at the end."""
    del text
