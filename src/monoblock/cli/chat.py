"""`monoblock chat`: a conversation with a model, in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.conversation import Conversation
from monoblock.cli.options import Hub, Sampling, Source

if TYPE_CHECKING:
    from monoblock.cli.engine import Engine

app = sub_app()
MAX_NEW_TOKENS = 512
PROMPT = "> "


@app.command(epilog=EXIT_CODES)
@console.command
def chat(
    *,
    source: Source,
    hub: Hub,
    sampling: Sampling,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the conversation.")
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(help="JSON file of a conversation: continued if it exists, written after each reply."),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No notes, counts and speeds on stderr.")
    ] = False,
) -> None:
    """Chat with a model, in this process.

    Ctrl-C stops a reply; Ctrl-C or Ctrl-D at the prompt leaves; /help lists the commands.

    A model without a chat template continues the conversation as one plain text. From a pipe, each line is
    a message, and the replies alone go to standard output. Where neither --max-new-tokens nor the
    model's generation_config.json gives a number, a reply stops after 512 tokens.
    """
    sampling.kwargs()  # usage errors before the model is loaded
    conversation = Conversation.load(history) if history and history.exists() else Conversation()
    if system is not None:
        conversation.system = system
    from monoblock.cli import engine

    session = Session(engine.load(source, hub), sampling, conversation, autosave=history, quiet=quiet)
    session.run()


class Session:
    """A running conversation: reads lines, obeys commands, streams replies."""

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        conversation: Conversation,
        *,
        autosave: Path | None = None,
        quiet: bool = False,
    ) -> None:
        self.engine = engine
        self.sampling = sampling
        self.conversation = conversation
        self.autosave = autosave
        self.quiet = quiet
        self.interactive = sys.stdin.isatty()
        self.replies = 0

    def run(self) -> None:
        """Until /exit, the end of the input, or Ctrl-C at the prompt (then KeyboardInterrupt comes out)."""
        self._greet()
        for line in _lines(self.interactive):
            text = line.strip()
            if not text:
                continue
            name, _, argument = text.partition(" ")
            if name == "/exit":
                return
            try:
                if name in self.COMMANDS:
                    self.COMMANDS[name][1](self, argument.strip())
                elif text.startswith("/"):
                    raise ValueError(f"{name} is not a command; /help lists them")
                else:
                    self.conversation.say(line)
                    self._reply()
            except console.EXPECTED as error:
                if not self.interactive:
                    raise
                console.complain(error)

    def _greet(self) -> None:
        if not self.engine.has_template and not self.quiet:
            console.note(
                f"{self.engine.name} has no chat template: replies continue the talk as one plain text."
            )
        if self.interactive and not self.quiet:
            console.note("Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands.")

    def _reply(self) -> None:
        """Streams the answer to the last message; a message that gets no answer is taken back."""
        options = self.engine.limits(MAX_NEW_TOKENS) | self.sampling.kwargs(retry=self.replies)
        self.replies += 1
        try:
            reply = self.engine.answer(self.conversation.messages(), options, console.write)
        except BaseException:
            self.conversation.take_back()
            raise
        if not reply.text.endswith("\n"):
            console.write("\n")
        if reply.text or not reply.interrupted:
            self.conversation.answer(reply.text)
        else:
            self.conversation.take_back()
        if not self.quiet:
            console.note(reply.summary() + (" stopped" if reply.interrupted else ""))
        if reply.interrupted and not self.interactive:
            raise KeyboardInterrupt
        if self.autosave:
            self.conversation.save(self.autosave)

    def _help(self, argument: str) -> None:
        _no_argument("/help", argument)
        for name, (text, _) in self.COMMANDS.items():
            console.note(f"  {name:<8} {text}")
        console.note("  /exit    leave (as Ctrl-D)")

    def _clear(self, argument: str) -> None:
        _no_argument("/clear", argument)
        self.conversation.clear()
        console.note("The conversation is empty; the system prompt stays.")

    def _save(self, argument: str) -> None:
        if not argument:
            raise ValueError("/save needs a file name: /save talk.json")
        self.conversation.save(Path(argument).expanduser())
        console.note(f"Saved {len(self.conversation.turns)} messages to {argument}.")

    def _system(self, argument: str) -> None:
        self.conversation.system = argument or None
        console.note("The system prompt is set." if argument else "There is no system prompt now.")

    def _retry(self, argument: str) -> None:
        _no_argument("/retry", argument)
        self.conversation.reopen()
        self._reply()

    COMMANDS: ClassVar[dict[str, tuple[str, Callable[[Session, str], None]]]] = {
        "/help": ("this list", _help),
        "/clear": ("forget the conversation", _clear),
        "/save": ("FILE: write the conversation as JSON", _save),
        "/system": ("TEXT: set the system prompt (nothing: remove it)", _system),
        "/retry": ("answer the last message again", _retry),
    }


def _no_argument(name: str, argument: str) -> None:
    if argument:
        raise ValueError(f"{name} takes nothing after it, got {argument!r}")


def _lines(interactive: bool) -> Iterator[str]:
    """The user's lines until the end of the input; at a terminal with editing and recall."""
    if not interactive:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # its import gives input() editing and recall
    while True:
        try:
            if sys.stdout.isatty():
                line = input(PROMPT)
            else:  # the prompt is no part of the result
                sys.stderr.write(PROMPT)
                sys.stderr.flush()
                line = input()
        except EOFError:
            sys.stderr.write("\n")
            return
        yield line
