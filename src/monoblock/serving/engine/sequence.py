"""A request in the engine, and its sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from monoblock.generation.batches import BLOCK, EmbeddedImages
from monoblock.serving.engine.blocks import block_digest
from monoblock.serving.engine.drafting import SequenceDrafts
from monoblock.serving.engine.params import SamplingParams
from monoblock.serving.engine.results import Delta, FinishReason, TokenLogprob, Usage
from monoblock.serving.engine.sampler import Sampler
from monoblock.serving.engine.text import StopText, TextAssembler

Sink = Callable[[Delta], None]
CONTEXT = 8  # tokens of the prompt that new tokens are decoded with


class EngineRequest:
    """A prompt with its parameters. Its sequences differ in their draws alone."""

    def __init__(
        self, prompt: list[int], params: SamplingParams, sink: Sink, images: EmbeddedImages | None
    ) -> None:
        self.prompt, self.params, self.sink, self.images = prompt, params, sink, images
        self.usage = Usage(prompt=len(prompt))
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.sequences: list[EngineSequence] = []
        self.error: BaseException | None = None
        self.new_tokens = 0  # at most, for each sequence

    @property
    def done(self) -> bool:
        """Whether all sequences are finished."""
        return all(sequence.finish is not None for sequence in self.sequences)


class EngineSequence:
    """One sequence: its tokens, its part of the cache, and the text that was given out."""

    def __init__(
        self, request: EngineRequest, key: int, index: int, sampler: Sampler, tokenizer: Any, root: bytes
    ) -> None:
        """`root`: the digest before the first block."""
        self.request, self.key, self.index, self.sampler = request, key, index, sampler
        self.tokens = list(request.prompt)
        self.computed = 0  # tokens whose keys and values are in the cache
        self.table: list[int] = []
        self.digests: list[bytes] = []  # of the full blocks of `tokens`
        self.registered = 0  # blocks of the table that were registered
        self.finish: FinishReason | None = None
        self.stop: str | int | None = None
        params = request.params
        self._root = root
        self._text = None
        if tokenizer is not None:
            self._text = TextAssembler(tokenizer, self.tokens[-CONTEXT:], params.skip_special_tokens)
        self._stops = StopText(params.stop, params.include_stop_str_in_output)
        self._unsent: list[int] = []
        self._unsent_logprobs: list[TokenLogprob] = []
        self.drafts: SequenceDrafts | None = None

    @property
    def generated(self) -> int:
        """The number of new tokens."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def left(self) -> int:
        """The number of new tokens that may follow."""
        return self.request.new_tokens - self.generated

    def full_digests(self, count: int) -> list[bytes]:
        """The digests of the first `count` blocks, which must be full."""
        while len(self.digests) < count:
            at = len(self.digests) * BLOCK
            parent = self.digests[-1] if self.digests else self._root
            self.digests.append(block_digest(parent, self.tokens[at : at + BLOCK]))
        return self.digests[:count]

    # ------------------------------------------------------------------ new tokens

    def append(self, token: int, logprob: TokenLogprob | None, eos: frozenset[int]) -> None:
        """Take a new token; sends the text that is final, and sets `finish`."""
        params = self.request.params
        self.tokens.append(token)
        self.sampler.append(token)
        self.request.usage.completion += 1
        self._unsent.append(token)
        if logprob is not None:
            self._unsent_logprobs.append(logprob)
        may_stop = self.generated >= params.min_tokens
        if may_stop and token in params.stop_token_ids:
            return self._end("stop", token)
        if token in eos and not params.ignore_eos:
            return self._end("stop", None)
        if self._text is not None:
            self._text.put([token])
            if may_stop and self._search():
                return None
        if not self.left:
            return self._end("length", None)
        if self._text is not None and (text := self._stops.release(self._text.text)):
            self._send(text)
        return None

    def _search(self) -> bool:
        """Whether a stop string ended the sequence."""
        assert self._text is not None
        if not self._stops.stops or (found := self._stops.search(self._text.text)) is None:
            return False
        stop, end = found
        self.finish, self.stop = "stop", stop
        self._send(self._stops.release(self._text.text, end))
        return True

    def _end(self, finish: FinishReason, stop: str | int | None) -> None:
        if self._text is not None:
            self._text.end()  # characters that are not complete
            if self.generated >= self.request.params.min_tokens and self._search():
                return
        self.finish, self.stop = finish, stop
        self._send("" if self._text is None else self._stops.release(self._text.text, len(self._text.text)))

    def cancel(self) -> None:
        """End the sequence as it is."""
        if self.finish is None:
            self._end("cancelled", None)

    def _send(self, text: str) -> None:
        delta = Delta(
            self.index, text, tuple(self._unsent), tuple(self._unsent_logprobs), self.finish, self.stop
        )
        self._unsent, self._unsent_logprobs = [], []
        self.request.sink(delta)
