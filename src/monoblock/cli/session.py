"""The loop of a chat: read the user's input, execute commands, stream replies."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from monoblock.cli import console
from monoblock.cli.conversation import Conversation
from monoblock.cli.lines import TypedMessage, entries
from monoblock.cli.settings import Settings, literal

if TYPE_CHECKING:
    from monoblock.cli.engine import ChatEngine

MAX_NEW_TOKENS = 512


class Session:
    """A conversation with one model; commands change it and the settings of later replies."""

    def __init__(
        self,
        engine: ChatEngine,
        settings: Settings,
        conversation: Conversation,
        *,
        autosave: Path | None = None,
        quiet: bool = False,
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.conversation = conversation
        self.autosave = autosave
        self.quiet = quiet
        self.interactive = sys.stdin.isatty()
        self.replies = 0
        self.image: str | None = None  # for the next message

    def run(self) -> None:
        """Run until /exit, the end of the input, or Ctrl-C at the prompt (which raises KeyboardInterrupt)."""
        self._greet()
        for entry in entries(self.interactive):
            if entry.text.strip() == "/exit" and not entry.block:
                return
            try:
                self._handle(entry)
            except console.EXPECTED as error:
                if not self.interactive:
                    raise
                console.print_error(error)

    def _handle(self, entry: TypedMessage) -> None:
        text = entry.text.strip()
        if not text:
            return
        if entry.block or not text.startswith("/"):
            self.conversation.say(entry.text, self.image)
            self._reply()
            return
        name, argument = (*text.split(None, 1), "")[:2]
        if name not in self.COMMANDS:
            raise ValueError(f"{name} is not a command; /help lists them")
        self.COMMANDS[name][1](self, argument)

    def _greet(self) -> None:
        if not self.engine.has_template and not self.quiet:
            console.note(
                f"{self.engine.name} has no chat template: replies continue the conversation as plain text."
            )
        if self.interactive and not self.quiet:
            console.note("Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands.")

    def _reply(self) -> None:
        """Stream the reply to the last message; a message without a reply is removed."""
        options = self.settings.kwargs(retry=self.replies)
        if "max_length" not in options:
            options = self.engine.limits(MAX_NEW_TOKENS) | options
        self.replies += 1
        try:
            reply = self.engine.answer(self.conversation.messages(), options, console.write)
        except BaseException:
            self.conversation.drop_last()
            raise
        if not reply.text.endswith("\n"):
            console.write("\n")
        if reply.text or not reply.interrupted:
            self.conversation.answer(reply.text)
            self.image = None
        else:
            self.conversation.drop_last()
        if not self.quiet and sys.stderr.isatty():
            console.note(reply.summary() + (" stopped" if reply.interrupted else ""))
        if reply.interrupted and not self.interactive:
            raise KeyboardInterrupt
        if self.autosave:
            self.conversation.save(self.autosave, self.settings.values)

    def _help(self, argument: str) -> None:
        _no_argument("/help", argument)
        for name, (text, _) in self.COMMANDS.items():
            console.note(f"  {name:<8} {text}")
        console.note("  /exit    leave (as Ctrl-D)")
        console.note(
            'A line that ends in \\ continues on the next; """ begins and ends a text of several lines.'
        )

    def _clear(self, argument: str) -> None:
        _no_argument("/clear", argument)
        self.conversation.clear()
        self.image = None
        console.note("The conversation is empty; the system prompt stays.")

    def _undo(self, argument: str) -> None:
        _no_argument("/undo", argument)
        self.conversation.undo()
        console.note(f"The last message and its reply are removed; {self._count()} left.")

    def _set(self, argument: str) -> None:
        name, value = (*argument.replace("=", " ", 1).split(None, 1), "", "")[:2]
        if name and not value:
            raise ValueError(f"/set {name} needs a value: /set {name} VALUE, or none for the model's own")
        if name:
            self.settings.change({name: literal(value)})
        for line in self.settings.lines() or [
            "All settings are those of the model's generation_config.json."
        ]:
            console.note(line)

    def _save(self, argument: str) -> None:
        self.conversation.save(_path("/save", argument), self.settings.values)
        console.note(f"Saved {self._count()} to {argument}.")

    def _load(self, argument: str) -> None:
        path = _path("/load", argument)
        conversation, values = Conversation.load(path)
        if conversation.image() is not None:
            self.engine.need_images()
        settings = Settings()
        try:
            settings.change(values)
        except ValueError as error:
            raise ValueError(f"the settings in {path} are wrong: {error}") from None
        self.conversation, self.settings, self.image = conversation, settings, None
        console.note(f"Loaded {self._count()} from {argument}.")

    def _image(self, argument: str) -> None:
        self.engine.need_images()
        path = _path("/image", argument)
        if self.conversation.image() is not None:
            raise ValueError("the conversation has an image already; /clear starts a new conversation")
        path.open("rb").close()  # report an unreadable file now
        self.image = str(path)
        console.note(f"The next message is about {argument}.")

    def _system(self, argument: str) -> None:
        self.conversation.system = argument or None
        console.note("The system prompt is set." if argument else "There is no system prompt now.")

    def _retry(self, argument: str) -> None:
        _no_argument("/retry", argument)
        self.conversation.drop_reply()
        self._reply()

    def _count(self) -> str:
        return f"{len(self.conversation.turns)} messages"

    COMMANDS: ClassVar[dict[str, tuple[str, Callable[[Session, str], None]]]] = {
        "/help": ("this list", _help),
        "/set": ("NAME VALUE: change a setting (none: the model's own); alone: show them", _set),
        "/clear": ("forget the conversation", _clear),
        "/undo": ("forget the last message and its reply", _undo),
        "/retry": ("answer the last message again", _retry),
        "/save": ("FILE: write conversation and settings as JSON", _save),
        "/load": ("FILE: continue a saved conversation with its settings", _load),
        "/system": ("TEXT: set the system prompt (nothing: remove it)", _system),
        "/image": ("PATH: show an image with the next message", _image),
    }


def _no_argument(name: str, argument: str) -> None:
    if argument:
        raise ValueError(f"{name} takes no argument, got {argument!r}")


def _path(name: str, argument: str) -> Path:
    if not argument:
        raise ValueError(f"{name} needs a file name: {name} FILE")
    return Path(argument).expanduser()
