"""`monoblock chat`: a conversation with a model, in this process."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.conversation import Conversation
from monoblock.cli.options import DownloadOptions, FrameworkModelOptions, SamplingOptions
from monoblock.texts import read_text

if TYPE_CHECKING:
    from monoblock.cli.settings import Settings

app = sub_app()


def _dashes(name: str) -> str:
    """Accept underscores in option names, as in transformers' chat command."""
    return name.replace("_", "-")


@app.command(epilog=EXIT_CODES, context_settings={"token_normalize_func": _dashes})
@console.command
def chat(
    *,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL NAME=VALUE",
            help="The model, as --model; and settings, such as max_new_tokens=64 do_sample=False.",
            show_default=False,
        ),
    ] = None,
    source: FrameworkModelOptions,
    hub: DownloadOptions,
    sampling: SamplingOptions,
    system: Annotated[
        str | None,
        typer.Option("--system", "--system-prompt", help="System prompt."),
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(help="JSON file of a conversation: continued if it exists, saved after each reply."),
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="File with a chat template (Jinja) to use instead of the model's.")
    ] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="sdpa, eager, flex_attention or flash_attention_2.")
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No notes, counts and speeds on stderr.")
    ] = False,
) -> None:
    """Chat with a model, in this process.

    Ctrl-C stops a reply; Ctrl-C or Ctrl-D at the prompt leaves; /help lists the commands.

    A model without a chat template continues the conversation as plain text. From a pipe, each line is
    a message, and only the replies go to standard output. Unless --max-new-tokens or the model's
    generation_config.json sets a limit, a reply stops after 512 tokens.
    """
    sampling.kwargs()  # usage errors before the model is loaded
    source, flags = _sort_words(words or [], source)
    settings = _settings(sampling, flags)
    conversation = Conversation()
    if history and history.exists():
        conversation, saved = Conversation.load(history)
        settings.change(saved | settings.values)
    if system is not None:
        conversation.system = system
    text = read_text(template) if template else None
    from monoblock.cli import engine
    from monoblock.cli.session import Session

    loaded = engine.load(source, hub, attn_implementation, "monoblock chat", chat=True)
    if text is not None:
        loaded.tokenizer.chat_template = text
    Session(loaded, settings, conversation, autosave=history, quiet=quiet).run()


def _sort_words(words: list[str], source: FrameworkModelOptions) -> tuple[FrameworkModelOptions, list[str]]:
    """Sort the positional arguments into a model, set in the options, and NAME=VALUE settings."""
    flags = [word for word in words if re.match(r"[a-z_0-9]+=", word)]
    names = [word for word in words if word not in flags]
    if any(name.startswith(("http://", "https://")) for name in names):
        raise typer.BadParameter("monoblock chat runs the model in this process: drop the server address")
    if len(names) > 1:
        raise typer.BadParameter(
            f"expected one model, got {', '.join(names)}; settings are NAME=VALUE, as in max_new_tokens=64"
        )
    if names and source.model is not None:
        raise typer.BadParameter(f"two models are given, {names[0]} and --model {source.model}; drop one")
    return (replace(source, model=names[0]) if names else source), flags


def _settings(sampling: SamplingOptions, flags: list[str]) -> Settings:
    from monoblock.cli.settings import Settings

    try:
        return Settings.of(sampling, flags)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
