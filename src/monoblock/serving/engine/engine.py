"""The engine: continuous batching of requests on one model, step by step."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from monoblock.generation.arrays import Array
from monoblock.generation.batches import BLOCK, BatchRunner, EmbeddedImages, SequenceChunk
from monoblock.generation.config import GenerationConfig
from monoblock.seeds import advance
from monoblock.serving.engine.blocks import BlockPool
from monoblock.serving.engine.drafting import Drafting
from monoblock.serving.engine.options import EngineOptions
from monoblock.serving.engine.params import SamplingParams
from monoblock.serving.engine.results import QueueFull
from monoblock.serving.engine.sampler import Sampler, config_of
from monoblock.serving.engine.scheduler import Scheduler
from monoblock.serving.engine.sequence import EngineRequest, EngineSequence, Sink


@dataclass(frozen=True)
class EngineStats:
    """The state of an engine, and totals since its start."""

    running: int
    waiting: int
    cache_blocks: int
    cache_used: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    steps: int
    draft_tokens: int = 0
    accepted_tokens: int = 0


class Engine:
    """Requests on one model. `add` and `cancel` may be called between steps; `step` computes.

    Not for several threads at once: see `AsyncEngine`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        runner: BatchRunner,
        *,
        name: str = "",
        processor: Any = None,
        options: EngineOptions | None = None,
    ) -> None:
        """`runner`: of the model, from its backend. ValueError for a limit that the model does not allow."""
        self.model, self.tokenizer, self.runner, self.name = model, tokenizer, runner, name
        self.processor, self.options = processor, options or EngineOptions()
        self.vocab = runner.vocab
        self.pool = BlockPool(runner.blocks)
        self.drafting = Drafting(self.options)
        self.scheduler = Scheduler(self.options, self.pool, runner.divides, self.drafting, runner.drafts)
        self.max_model_len = min(model_length(model, self.options.max_model_len), runner.blocks * BLOCK)
        self.generation_config: GenerationConfig = model.generation_config or GenerationConfig()
        self._keys = itertools.count()
        self._salt = 0
        self._prompt_tokens = self._generated = self._steps = 0

    # ------------------------------------------------------------------ requests

    def add(
        self, prompt: Sequence[int] | str, params: SamplingParams, *, sink: Sink, image: Any = None
    ) -> EngineRequest:
        """A new request, whose deltas `sink` receives during later steps.

        `prompt`: token ids; with an image (or several), the text. ValueError: an empty prompt, an id outside the
        vocabulary, a prompt that leaves no room for new tokens, or parameters that cannot be used. QueueFull: too many
        wait.
        """
        if len(self.scheduler.waiting) + params.sequences > self.options.max_waiting:
            raise QueueFull(f"{len(self.scheduler.waiting)} sequences wait already: try again later")
        if params.sequences > params.n and params.logprobs is None:
            params = params.replaced(logprobs=0)  # the best ones are chosen by them
        images = None if image is None else self._embedded(prompt, image)
        ids = images.tokens if images is not None else self._checked(prompt)
        if params.prompt_logprobs is not None and images is not None:
            raise ValueError("prompt_logprobs is not supported for prompts with images")
        request = EngineRequest(ids, params, sink, images)
        request.new_tokens = self._room(len(ids), params.max_tokens)
        config = config_of(params, self.generation_config, request.new_tokens)
        root = self._root(images)
        for index in range(params.sequences):
            seed = int.from_bytes(os.urandom(8)) if params.seed is None else advance(params.seed, index)
            sampler = Sampler(self.runner.ops, params, config, ids, self.tokenizer, self.vocab, seed)
            key = next(self._keys)
            sequence = EngineSequence(request, key, index, sampler, self.tokenizer, root)
            sequence.drafts = self.drafting.of(params) if self.runner.divides else None
            request.sequences.append(sequence)
        self.scheduler.add(request.sequences)
        self._prompt_tokens += len(ids)
        return request

    def check(self, prompt: Sequence[int] | str, params: SamplingParams) -> None:
        """The errors of `add` that take no time to find; may be called from any thread."""
        ids = self._checked(prompt)
        config_of(params, self.generation_config, self._room(len(ids), params.max_tokens))

    def _root(self, images: EmbeddedImages | None) -> bytes:
        """The digest before the first block: requests share blocks only if it is equal."""
        if self.options.prefix_cache:
            return b"" if images is None else images.digest
        self._salt += 1
        return self._salt.to_bytes(8)

    def _checked(self, prompt: Sequence[int] | str) -> list[int]:
        if isinstance(prompt, str):
            raise TypeError("the prompt must be token ids: tokenize the text first")
        ids = [int(token) for token in prompt]
        if not ids:
            raise ValueError("the prompt is empty: give at least one token")
        if min(ids) < 0 or max(ids) >= self.vocab:
            raise ValueError(
                f"the prompt has token ids from {min(ids)} to {max(ids)}: the vocabulary has the ids 0 to "
                f"{self.vocab - 1}"
            )
        return ids

    def _embedded(self, text: Sequence[int] | str, image: Any) -> EmbeddedImages:
        if self.processor is None:
            raise ValueError(f"{self.name or 'the model'} takes no images")
        if not isinstance(text, str):
            raise TypeError("with an image, the prompt must be a text")
        images = list(image) if isinstance(image, list | tuple) else [image]
        inputs: dict[str, Any] = dict(self.processor(text=[text], images=images, return_tensors="pt"))
        return self.runner.embed_images(inputs)

    def _room(self, prompt: int, wanted: int | None) -> int:
        """New tokens of a sequence: `wanted` at most, as far as there is room."""
        room = self.max_model_len - prompt
        if room < 1:
            raise ValueError(
                f"the prompt has {prompt} tokens, and at most {self.max_model_len} fit, with at least one new token: "
                "shorten it"
            )
        if wanted is not None and wanted > room:
            raise ValueError(
                f"max_tokens={wanted} after a prompt of {prompt} tokens is more than the {self.max_model_len} that "
                f"fit: at most {room} can follow"
            )
        return room if wanted is None else wanted

    def cancel(self, request: EngineRequest) -> None:
        """End a request as it is; its sequences finish as "cancelled"."""
        for sequence in request.sequences:
            if sequence.finish is None:
                self._drop(sequence)
                sequence.cancel()

    def fail(self, request: EngineRequest, error: BaseException) -> None:
        """End a request by an error."""
        request.error = error
        for sequence in request.sequences:
            if sequence.finish is None:
                sequence.finish = "cancelled"
                self._drop(sequence)

    def _drop(self, sequence: EngineSequence) -> None:
        self.scheduler.remove(sequence)
        self.runner.drop(sequence.key)

    # ------------------------------------------------------------------ steps

    def close(self) -> None:
        """End what the runner has started; no step can follow."""
        self.runner.close()

    @property
    def busy(self) -> bool:
        """Whether there is work."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self) -> bool:
        """Compute some tokens of the running sequences; whether there was work."""
        self.drafting.begin()
        planned = self.scheduler.schedule()
        if not planned:
            return False
        self.drafting.planned(
            sum(len(chunk.tokens) for _, chunk in planned),
            sum(bool(chunk.wanted) for _, chunk in planned),
            [own for sequence, _ in planned if (own := sequence.drafts) is not None],
        )
        scores = self.runner.run([chunk for _, chunk in planned])
        self._steps += 1
        likeliest = self._likeliest(planned, scores)
        row = 0
        for sequence, chunk in planned:
            request = sequence.request
            own = scores[row : row + chunk.wanted]
            best = likeliest[row : row + chunk.wanted]
            row += chunk.wanted
            if sequence.finish is not None:  # by another sequence's error or its own request's
                continue
            try:
                self._advance(sequence, chunk, own, best)
            except Exception as error:  # of a processor of this request alone
                self.fail(request, error)
        self.drafting.end()
        return True

    def _likeliest(self, planned: list[tuple[EngineSequence, SequenceChunk]], scores: Array) -> list[int]:
        """The likeliest token of each row of scores, if a sequence needs no more."""
        if not any(chunk.wanted and sequence.sampler.plain for sequence, chunk in planned):
            return [0] * int(scores.shape[0])
        return self.runner.ops.to_list(self.runner.ops.argmax(scores))

    def _advance(
        self, sequence: EngineSequence, chunk: SequenceChunk, scores: Array, likeliest: list[int]
    ) -> None:
        """Take the results of a chunk: the next tokens of a sequence."""
        request, known = sequence.request, len(sequence.tokens) - chunk.past
        params, draft = request.params, chunk.tokens[known:]
        if params.prompt_logprobs is not None and sequence.index == 0 and chunk.past < len(request.prompt):
            self._prompt_logprobs(request, chunk, scores)
            scores, likeliest = scores[-1:], likeliest[-1:]
        complete = chunk.past + len(chunk.tokens) - len(draft) == len(sequence.tokens)
        if not complete:
            return self.scheduler.computed(sequence, len(chunk.tokens))
        accepted, mismatch = 0, False
        for at in range(len(draft) + 1):
            row = scores[at : at + 1]
            token = likeliest[at] if sequence.sampler.plain else sequence.sampler.choose(row)
            logprob = (
                None if params.logprobs is None else sequence.sampler.logprob(row, token, params.logprobs)
            )
            sequence.append(token, logprob, self._eos)
            self._generated += 1
            mismatch = at < len(draft) and token != draft[at]
            if mismatch or sequence.finish is not None or at == len(draft):
                break
            accepted += 1
        if draft and sequence.drafts is not None:
            self.drafting.verified(sequence.drafts, accepted, mismatch)
        self.scheduler.computed(sequence, known + accepted)
        if sequence.finish is not None:
            self.drafting.finished(sequence.drafts, request.prompt, sequence.tokens)
            self._drop(sequence)
        return None

    def _prompt_logprobs(self, request: EngineRequest, chunk: SequenceChunk, scores: Array) -> None:
        """Log-probabilities of the prompt's tokens, each from the scores after the token before it."""
        if not request.prompt_logprobs:
            request.prompt_logprobs.append(None)
        sampler, count = request.sequences[0].sampler, request.params.prompt_logprobs or 0
        for at in range(len(chunk.tokens)):
            following = chunk.past + at + 1
            if following < len(request.prompt) and following == len(request.prompt_logprobs):
                token = request.prompt[following]
                request.prompt_logprobs.append(sampler.logprob(scores[at : at + 1], token, count))

    def defaults(self) -> dict[str, Any]:
        """The sampling parameters that the model's generation_config.json sets, by the names of `SamplingParams`."""
        given = self.generation_config.set_fields()
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        found = {name: given[name] for name in names if name in given}
        if given.get("do_sample") is False:
            found = {name: value for name, value in found.items() if name == "repetition_penalty"} | {
                "temperature": 0.0
            }
        return found

    @property
    def _eos(self) -> frozenset[int]:
        return frozenset(self.generation_config.eos_ids)

    def stats(self) -> EngineStats:
        """The state and the totals."""
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            cache_blocks=self.pool.count,
            cache_used=self.pool.used,
            prefix_query_tokens=scheduler.stats.queried,
            prefix_hit_tokens=scheduler.stats.hits,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
            preemptions=scheduler.stats.preemptions,
            steps=self._steps,
            draft_tokens=self.drafting.drafted,
            accepted_tokens=self.drafting.accepted,
        )


def model_length(model: Any, wanted: int | None) -> int:
    """Tokens of a sequence at most: `wanted`, or the model's context. ValueError for more than its positions."""
    learned: int | None = model.max_positions
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    names = ("max_position_embeddings", "max_seq_len", "n_positions")
    context = learned or next((value for name in names if (value := getattr(config, name, None))), 2048)
    if wanted is not None and learned is not None and wanted > learned:
        raise ValueError(f"max_model_len={wanted}: the model has {learned} learned positions")
    if wanted is not None and wanted < 2:
        raise ValueError(f"max_model_len={wanted}: expected at least 2")
    return int(context if wanted is None else wanted)
