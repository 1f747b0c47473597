"""Streamers: text as it is generated, by the hub's interface (`put`, `end`, `on_finalized_text`)."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any, Self, cast

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no whole character (yet)
MOST_PENDING = 64  # tokens held back at most: longer than any character, so those bytes are broken for good
CONTEXT = 16  # tokens that are decoded along with a new one, at most, where that is safe


class BaseStreamer:
    """What `generate` calls: `put` with the prompt, then with every token; then `end`.

    If generation stops with an error, `fail(error)` is called instead of `end()`, if there is one.
    """

    def put(self, value: Any) -> None:
        """Take token ids: an array or list of shape (tokens,) or (1, tokens)."""
        raise NotImplementedError

    def end(self) -> None:
        """The sequence is complete."""
        raise NotImplementedError


class TextStreamer(BaseStreamer):
    """Prints text as soon as whole characters are there, and a newline at the end.

    Subclasses change `on_finalized_text`. `decode_kwargs` go to `tokenizer.decode`, such as `skip_special_tokens`.
    What is emitted, put together, is the text of all tokens; each token is decoded a bounded number of times.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any):
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self._restart()

    def _restart(self) -> None:
        self.next_tokens_are_prompt = True
        self._tokens: list[int] = []  # those of the last emitted text, then those that are pending
        self._emitted = 0  # how many of them are emitted

    def put(self, value: Any) -> None:
        """Decode these tokens with the few before them, and emit what is new and final."""
        ids = _flat(value)
        is_prompt, self.next_tokens_are_prompt = self.next_tokens_are_prompt, False
        if is_prompt and self.skip_prompt:
            return
        self._tokens += ids
        self._emit(final=len(self._tokens) - self._emitted > MOST_PENDING and not is_prompt)

    def end(self) -> None:
        """Emit what is still pending, whatever it is, and be ready for the next sequence."""
        text = self._pending()
        self._restart()
        self.on_finalized_text(text, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print the text; a newline after the last."""
        print(text, flush=True, end="\n" if stream_end else "")

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, **self.decode_kwargs) if ids else ""

    def _pending(self) -> str:
        # The tokens before are decoded along: some tokenizers drop a leading space, or join a word's parts.
        return self._decode(self._tokens)[len(self._decode(self._tokens[: self._emitted])) :]

    def _emit(self, final: bool) -> None:
        text = self._pending()
        if not text or (text.endswith(UNFINISHED) and not final):
            return
        self._tokens = self._context(self._tokens[self._emitted :])
        self._emitted = len(self._tokens)
        self.on_finalized_text(text)

    def _context(self, ids: list[int]) -> list[int]:
        """The end of a long text, if it reads well on its own, so that a prompt is not decoded again and again."""
        tail = ids[-CONTEXT:]
        text = self._decode(tail) if len(ids) > CONTEXT else ""
        return tail if text and UNFINISHED not in text else ids


def _flat(value: Any) -> list[int]:
    plain = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(plain, list):
        return [int(plain)]
    rows = cast(list[Any], plain)
    if rows and isinstance(rows[0], list):
        if len(rows) > 1:
            raise ValueError(f"a text streamer takes one sequence at a time, got a batch of {len(rows)}")
        return cast(list[int], rows[0])
    return rows


class StreamTimeout(TimeoutError, queue.Empty):
    """No text came within a streamer's timeout."""


class _End:
    """What a queue holds after the last text: the end, and what ended it."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


class _QueueStreamer(TextStreamer):
    """A streamer whose text goes into a queue, for a reader elsewhere."""

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ):
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self._finished = False

    def _send(self, item: str | _End) -> None:
        raise NotImplementedError

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Queue the text; after the last, the end."""
        if text:
            self._send(text)
        if stream_end:
            self._send(_End())

    def fail(self, error: BaseException) -> None:
        """Queue what is pending, then the error, which the reader gets; a Ctrl-C is an end like others."""
        text = self._pending()
        self._restart()
        if text:
            self._send(text)
        self._send(_End(error if isinstance(error, Exception) else None))

    def _received(self, item: str | _End) -> str | None:
        """The text, or None at the end; raises what ended it."""
        if isinstance(item, str):
            return item
        self._finished = True
        if item.error is not None:
            raise item.error
        return None

    def _too_late(self) -> StreamTimeout:
        return StreamTimeout(
            f"no text came within {self.timeout} s; is generate() running in another thread?"
        )


class TextIteratorStreamer(_QueueStreamer):
    """An iterator over the text, for `generate` running in another thread.

    An error in that thread is raised here as well. `timeout` (seconds) limits the wait for each piece:
    `StreamTimeout`, which is a TimeoutError and a queue.Empty.
    """

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ):
        super().__init__(tokenizer, skip_prompt, timeout, **decode_kwargs)
        self.text_queue: queue.Queue[str | _End] = queue.Queue()

    def _send(self, item: str | _End) -> None:
        self.text_queue.put(item)

    def __iter__(self) -> Self:
        self._finished = False
        return self

    def __next__(self) -> str:
        if self._finished:
            raise StopIteration
        try:
            item = self.text_queue.get(timeout=self.timeout)
        except queue.Empty:
            raise self._too_late() from None
        if (text := self._received(item)) is None:
            raise StopIteration
        return text


class AsyncTextIteratorStreamer(_QueueStreamer):
    """The same for `async for`; make it inside a coroutine, whose event loop it uses."""

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ):
        super().__init__(tokenizer, skip_prompt, timeout, **decode_kwargs)
        self.text_queue: asyncio.Queue[str | _End] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def _send(self, item: str | _End) -> None:
        self.loop.call_soon_threadsafe(self.text_queue.put_nowait, item)

    def __aiter__(self) -> Self:
        self._finished = False
        return self

    async def __anext__(self) -> str:
        if self._finished:
            raise StopAsyncIteration
        try:
            async with asyncio.timeout(self.timeout):
                item = await self.text_queue.get()
        except TimeoutError:
            raise self._too_late() from None
        if (text := self._received(item)) is None:
            raise StopAsyncIteration
        return text


@contextmanager
def streaming(streamer: Any) -> Generator[None]:
    """Around the whole of a generation: the streamer is ended, or told of the error, whatever happens inside."""
    try:
        yield
    except BaseException as error:
        # The error that is on its way matters more than one from a streamer that cannot print any more.
        with suppress(Exception):
            streamer.fail(error) if hasattr(streamer, "fail") else streamer.end()
        raise
    streamer.end()
