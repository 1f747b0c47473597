"""Streamers: decoded text during generation, with transformers' interface (`put`, `end`, `on_finalized_text`)."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any, Self, cast

UNFINISHED = "\ufffd"  # decoders write it for bytes that are not a complete character (yet)
MOST_PENDING = 64  # tokens held back at most: longer than any character, so the bytes are invalid
CONTEXT = 16  # tokens at most that are decoded again with a new one, where that is safe


class BaseStreamer:
    """The interface that `generate` calls: `put` with the prompt, then with every token; then `end`.

    If generation raises, `fail(error)` is called instead of `end()`, if it exists.
    """

    def put(self, value: Any) -> None:
        """Take token ids: an array or list of shape (tokens,) or (1, tokens)."""
        raise NotImplementedError

    def end(self) -> None:
        """Called when the sequence is complete."""
        raise NotImplementedError


class TextStreamer(BaseStreamer):
    """Prints text as soon as its characters are complete, and a newline at the end.

    Subclasses override `on_finalized_text`. `decode_kwargs` go to `tokenizer.decode`, such as `skip_special_tokens`.
    The emitted strings, concatenated, are the decoded sequence; each token is decoded a bounded number of times.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any):
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self._restart()

    def _restart(self) -> None:
        self.next_tokens_are_prompt = True
        self._tokens: list[int] = []  # the tokens of the last emitted text, then the pending ones
        self._emitted = 0  # how many of them are emitted

    def put(self, value: Any) -> None:
        """Decode these tokens together with a few before them, and emit the new text that is final."""
        ids = _flat(value)
        is_prompt, self.next_tokens_are_prompt = self.next_tokens_are_prompt, False
        if is_prompt and self.skip_prompt:
            return
        self._tokens += ids
        self._emit(final=len(self._tokens) - self._emitted > MOST_PENDING and not is_prompt)

    def end(self) -> None:
        """Emit the pending text, complete or not, and reset for the next sequence."""
        text = self._pending()
        self._restart()
        self.on_finalized_text(text, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print the text; a newline after the last."""
        print(text, flush=True, end="\n" if stream_end else "")

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, **self.decode_kwargs) if ids else ""

    def _pending(self) -> str:
        # Decoded with the tokens before: some tokenizers drop a leading space, or merge the tokens of a word.
        return self._decode(self._tokens)[len(self._decode(self._tokens[: self._emitted])) :]

    def _emit(self, final: bool) -> None:
        text = self._pending()
        if not text or (text.endswith(UNFINISHED) and not final):
            return
        self._tokens = self._context(self._tokens[self._emitted :])
        self._emitted = len(self._tokens)
        self.on_finalized_text(text)

    def _context(self, ids: list[int]) -> list[int]:
        """The last tokens of a long sequence if they decode on their own: its beginning is not decoded again."""
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
    """The end of a queue, with the error that ended generation, if any."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


class _QueueStreamer(TextStreamer):
    """A streamer that puts its text into a queue, for a consumer in another thread or task."""

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ):
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self._finished = False

    def _send(self, item: str | _End) -> None:
        raise NotImplementedError

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Queue the text, and the end after the last one."""
        if text:
            self._send(text)
        if stream_end:
            self._send(_End())

    def fail(self, error: BaseException) -> None:
        """Queue the pending text, then the error, which is raised in the consumer; Ctrl-C is a normal end."""
        text = self._pending()
        self._restart()
        if text:
            self._send(text)
        self._send(_End(error if isinstance(error, Exception) else None))

    def _received(self, item: str | _End) -> str | None:
        """The text, or None at the end; raises the error that ended generation."""
        if isinstance(item, str):
            return item
        self._finished = True
        if item.error is not None:
            raise item.error
        return None

    def _timeout_error(self) -> StreamTimeout:
        return StreamTimeout(
            f"no text came within {self.timeout} s; is generate() running in another thread?"
        )


class TextIteratorStreamer(_QueueStreamer):
    """An iterator over the text, for `generate` in another thread.

    An error in that thread is raised here as well. `timeout` (seconds) limits the wait for each string:
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
            raise self._timeout_error() from None
        if (text := self._received(item)) is None:
            raise StopIteration
        return text


class AsyncTextIteratorStreamer(_QueueStreamer):
    """An asynchronous iterator over the text; construct it in a coroutine, whose event loop it uses."""

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
            raise self._timeout_error() from None
        if (text := self._received(item)) is None:
            raise StopAsyncIteration
        return text


@contextmanager
def streaming(streamer: Any) -> Generator[None]:
    """A context for a whole generation: calls the streamer's `end`, or its `fail` on an error."""
    try:
        yield
    except BaseException as error:
        # The original error takes precedence over one from a streamer that can no longer print.
        with suppress(Exception):
            streamer.fail(error) if hasattr(streamer, "fail") else streamer.end()
        raise
    streamer.end()
