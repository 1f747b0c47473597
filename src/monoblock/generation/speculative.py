"""Speculative decoding: a cheap guess at the next tokens, checked by the model in one pass.

The text has exactly the distribution that plain decoding gives it. Greedily a guess stands while it is what the model
would choose; sampled, the rule of arXiv 2211.17192: a guess that was drawn from q stands with probability
min(1, p/q), else the token is drawn anew from what p has more than q. Guesses come from an earlier place of the text
(prompt lookup) or from a smaller model (`assistant_model`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from monoblock.generation import processors
from monoblock.generation.arrays import Array
from monoblock.generation.config import GenerationConfig, as_own_config
from monoblock.generation.decoder import GenerativeModel, RewindableDecoder
from monoblock.generation.preparation import GenerationRun

# A windowed cache takes back that many tokens.
LONGEST_DRAFT = 64
DEFAULT_MATCH = 2  # tokens, the hub's max_matching_ngram_size
# The hub's defaults for an assistant.
DEFAULT_ASSISTANT: dict[str, Any] = {
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
}


@dataclass
class Draft:
    """Guessed tokens, and the scores (1, vocab) that each was drawn from; none if the guess was no draw."""

    tokens: list[int] = field(default_factory=list[int])
    scores: list[Array] = field(default_factory=list[Array])


class DraftSource(Protocol):
    """Where guesses come from."""

    def propose(self, ids: list[int], room: int) -> Draft:
        """At most `room` tokens that may follow the text."""
        ...


def run(generation: GenerationRun) -> Any:
    """One prompt continued by guessing and checking."""
    _check(generation)
    source = _source(generation)
    ops, plan, decoder = generation.ops, generation.plan, cast(RewindableDecoder, generation.decoder)
    text, record, scores_1v = generation.begin()
    if not text.rows:
        text.rows = ops.to_list(generation.prompt_bn)
    ids = text.rows[0]
    start = len(ids)
    scores_1kv, draft = scores_1v[:, None], Draft()
    done, left = False, plan.new_tokens
    while True:
        for place in range(len(draft.tokens) + 1):
            logits_1v = scores_1kv[:, place]
            chosen_1v = generation.processed(logits_1v, text.ids)
            record.choice(logits_1v, chosen_1v)
            if len(ids) > start:  # the prompt's pass is recorded already
                record.part(decoder, place, len(draft.tokens) - place)
            token, stands = _choose(generation, chosen_1v, draft, place)
            token_1 = ops.array([token])
            text.append(token_1, [token])
            if generation.streamer is not None:
                generation.streamer.put(ops.host(token_1))
            done = generation.ended([token], text.rows, text.ids, record)[0]
            left = plan.new_tokens - (len(ids) - start)
            if done or left == 0 or not stands:
                break
        # The last token is not in the cache yet; guesses behind it that did not stand are.
        decoder.crop(plan.prompt_length + len(ids) - start - 1)
        if done or left == 0:
            return record.output(text.ids(), decoder)
        draft = source.propose(ids, min(left - 1, LONGEST_DRAFT))
        scores_1kv = decoder.extend(ops.array([[ids[-1], *draft.tokens]]))


def _check(generation: GenerationRun) -> None:
    if generation.plan.rows > 1:
        raise ValueError(
            f"speculative decoding continues one prompt once, got {generation.plan.rows} rows: leave out "
            "assistant_model and prompt_lookup_num_tokens for batches"
        )
    if generation.assistant is not None and generation.config.prompt_lookup_num_tokens is not None:
        raise ValueError(
            "guesses come either from assistant_model or from prompt_lookup_num_tokens: give one of them"
        )


def _source(generation: GenerationRun) -> DraftSource:
    config = generation.config
    if generation.assistant is not None:
        return Assistant(generation, generation.assistant)
    assert config.prompt_lookup_num_tokens is not None
    return PromptLookup(config.prompt_lookup_num_tokens, config.max_matching_ngram_size or DEFAULT_MATCH)


def _choose(generation: GenerationRun, scores_1v: Array, draft: Draft, place: int) -> tuple[int, bool]:
    """The token at a place, and whether it is the one that was guessed."""
    ops = generation.ops
    guess = draft.tokens[place] if place < len(draft.tokens) else None
    if not generation.config.do_sample:
        [token] = ops.to_list(ops.argmax(scores_1v))
    elif guess is None or not draft.scores:
        # A guess that was no draw has q = 1: to draw from p and see whether it is the guess is the rule.
        [token] = ops.to_list(ops.sample(scores_1v, generation.generator))
    else:
        token = _drawn(generation, scores_1v, draft.scores[place], guess)
    return token, token == guess


def _drawn(generation: GenerationRun, p_scores_1v: Array, q_scores_1v: Array, guess: int) -> int:
    """A token of the distribution p, by way of a guess that was drawn from q."""
    ops, generator = generation.ops, generation.generator
    p_1v, q_1v = ops.softmax(p_scores_1v), ops.softmax(q_scores_1v)
    here = ops.array([[guess]])
    [[p]], [[q]] = ops.to_list(ops.take_along(p_1v, here)), ops.to_list(ops.take_along(q_1v, here))
    if p >= q:
        return guess
    # Two outcomes, whose logarithms are their scores: the guess stands with probability p / q.
    odds = ops.array([[math.log(p / q) if p else -math.inf, math.log1p(-p / q)]])
    if ops.to_list(ops.sample(odds, generator)) == [0]:
        return guess
    more_1v = ops.where(p_1v > q_1v, p_1v - q_1v, 0.0)
    [[most]] = ops.to_list(ops.max(more_1v))
    # p and q that differ by rounding alone leave nothing: then p itself.
    rest_1v = ops.log(more_1v) if most > 0 else p_scores_1v
    [token] = ops.to_list(ops.sample(rest_1v, generator))
    return token


class PromptLookup:
    """Guesses that the text goes on as it did after the latest place where its last tokens stood before."""

    def __init__(self, count: int, longest: int):
        self.count = count
        # n-gram -> where it ended last, for each length.
        self.ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest)]
        self.read = 1

    def propose(self, ids: list[int], room: int) -> Draft:
        """The tokens after the longest match; past the end of the text they repeat what lies between."""
        for end in range(self.read, len(ids)):
            for size, ends in enumerate(self.ends[:end], start=1):
                ends[tuple(ids[end - size : end])] = end
        self.read = max(self.read, len(ids))
        for size in range(min(len(self.ends), len(ids) - 1), 0, -1):
            start = self.ends[size - 1].get(tuple(ids[-size:]))
            if start is not None:
                period = len(ids) - start
                return Draft([ids[start + place % period] for place in range(min(self.count, room))])
        return Draft()


def _options(config: GenerationConfig, own: GenerationConfig | None) -> dict[str, Any]:
    """How to draft: the call's word, then the assistant's own file's, then the hub's default."""
    own_fields = {} if own is None else own.set_fields()
    given = {**own_fields, **config.set_fields()}
    options = {name: given.get(name, default) for name, default in DEFAULT_ASSISTANT.items()}
    GenerationConfig().check(options)
    return options


class Assistant:
    """Guesses of a smaller model with the same vocabulary, which keeps its own cache of the text."""

    def __init__(self, generation: GenerationRun, model: GenerativeModel):
        if generation.embedded:
            raise ValueError(
                "assistant_model reads token ids: give input_ids in place of inputs_embeds, or leave it out"
            )
        own = as_own_config(model.generation_config, "assistant_model.generation_config")
        options = _options(generation.config, own)
        self.count: int = options["num_assistant_tokens"]
        self.adapts = options["num_assistant_tokens_schedule"] != "constant"
        self.threshold: float = options["assistant_confidence_threshold"]
        self.generation, self.max_positions = generation, model.max_positions
        config = copy.copy(generation.config)
        config.use_cache, config.return_dict_in_generate, config.cache_implementation = True, False, None
        plan = dataclasses.replace(generation.plan, config=config)
        self.decoder = cast(RewindableDecoder, model.decoder(plan, {}))
        # The caller's own processors see only texts that are real; q may be any distribution.
        self.processors = processors.build(generation.context, processors.wanted(generation.config))
        self.fed = 0  # tokens of the text that the assistant's cache holds
        self.last = (0, 0)  # length of the text before the last draft, and the draft's

    def propose(self, ids: list[int], room: int) -> Draft:
        """Tokens drawn one after the other, until one was no likelier than the threshold."""
        self._adapt(len(ids))
        count = min(self.count, room)
        if self.max_positions is not None:
            count = min(count, self.max_positions - len(ids))
        draft = Draft()
        if count > 0:
            scores_1v = self._read(ids)
            while True:
                token, likely = self._guess(ids, scores_1v, draft)
                if likely < self.threshold or len(draft.tokens) >= count:
                    # The unlikely guess is kept: to drop a draw for its value would bend the distribution.
                    break
                scores_1v = self.decoder.step(self.generation.ops.array([[token]]))
                self.fed += 1
        self.last = (len(ids), len(draft.tokens))
        return draft

    def _adapt(self, length: int) -> None:
        before, guessed = self.last
        if self.adapts and guessed:
            self.count = self.count + 2 if length - before > guessed else max(1, self.count - 1)

    def _read(self, ids: list[int]) -> Array:
        """The scores after the text; what the cache holds of it stays."""
        run = self.generation
        if not self.fed:
            first_1v = self.decoder.prefill(run.prompt_bn, run.mask_bm)
            vocab, expected = int(first_1v.shape[-1]), run.vocab
            if vocab != expected:
                raise ValueError(
                    f"assistant_model must have the model's vocabulary of {expected} tokens, and has {vocab}"
                )
            self.fed = int(run.prompt_bn.shape[1])
        if self.fed >= len(ids):
            self.fed = len(ids) - 1
            self.decoder.crop(self.fed)
        scores_1kv = self.decoder.extend(run.ops.array([ids[self.fed :]]))
        self.fed = len(ids)
        return scores_1kv[:, -1]

    def _guess(self, ids: list[int], scores_1v: Array, draft: Draft) -> tuple[int, float]:
        """One more token of the draft, and its probability."""
        run, ops = self.generation, self.generation.ops
        if self.processors:
            ids_1n = ops.array([ids + draft.tokens])
            for processor in self.processors:
                scores_1v = processor(ids_1n, scores_1v)
        index_1 = ops.sample(scores_1v, run.generator) if run.config.do_sample else ops.argmax(scores_1v)
        [[likely]] = ops.to_list(ops.take_along(ops.softmax(scores_1v), index_1[:, None]))
        [token] = ops.to_list(index_1)
        draft.tokens.append(token)
        draft.scores.append(scores_1v)
        return token, likely
