"""Speculative decoding: cheap draft tokens, verified by the model in one forward pass.

The distribution of the output is exactly that of plain decoding. Greedy: a draft token is accepted while it is the
model's own choice. Sampling: speculative sampling of arXiv 2211.17192: a token drawn from the draft distribution q is
accepted with probability min(1, p/q), else a token is drawn from the normalised max(0, p - q). Drafts come from an
earlier occurrence of the last tokens (`drafts.py`) or from a smaller model (`assistant_model`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any, cast

from monoblock.generation import draft_rule, processors
from monoblock.generation.arrays import Array
from monoblock.generation.config import GenerationConfig, as_own_config
from monoblock.generation.decoder import GenerativeModel, RewindableDecoder
from monoblock.generation.draft_rule import Draft, DraftRule
from monoblock.generation.drafts import DEFAULT_MATCH, DraftSource, PromptLookup, speculator
from monoblock.generation.preparation import GenerationRun

# A sliding-window cache can be cropped by that many tokens.
LONGEST_DRAFT = 64
# Tokens of a draft of `speculation`: with one more they are a step of the native library (native_decoder.MOST).
MOST_DRAFTED = 15
# transformers' defaults for an assistant.
DEFAULT_ASSISTANT: dict[str, Any] = {
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
}


def run(generation: GenerationRun) -> Any:
    """Continue one prompt by drafting and verifying."""
    _check(generation)
    source = _source(generation)
    ops, plan, decoder = generation.ops, generation.plan, cast(RewindableDecoder, generation.decoder)
    sequences, outputs, scores_1v = generation.prefill()
    if not sequences.rows:
        sequences.rows = ops.to_list(generation.prompt_bn)
    ids = sequences.rows[0]
    start = len(ids)
    scores_1kv, draft = scores_1v[:, None], Draft()
    done, left = False, plan.new_tokens
    while True:
        accepted_tokens, accepted = 0, False
        for index in range(len(draft.tokens) + 1):
            logits_1v = scores_1kv[:, index]
            chosen_1v = generation.processed(logits_1v, sequences.ids)
            outputs.add_scores(logits_1v, chosen_1v)
            if len(ids) > start:  # the forward pass of the prompt is collected already
                outputs.add_position(decoder, index, len(draft.tokens) - index)
            token_1, token, accepted = _choose(generation, chosen_1v, draft, index)
            sequences.append(token_1, [token])
            if generation.streamer is not None:
                generation.streamer.put(ops.host(token_1))
            done = generation.ended([token], sequences.rows, sequences.ids, outputs)[0]
            left = plan.new_tokens - (len(ids) - start)
            accepted_tokens += accepted
            if done or left == 0 or not accepted:
                break
        if accepted_tokens < len(draft.tokens) or done or left == 0:
            # The last token is not in the cache yet; rejected draft tokens are.
            decoder.crop(plan.prompt_length + len(ids) - start - 1)
        if done or left == 0:
            return outputs.output(sequences.ids(), decoder)
        if isinstance(source, RuledDrafts) and len(ids) > start + 1:
            source.stepped(draft, accepted_tokens)
        draft = source.propose(ids, min(left - 1, LONGEST_DRAFT))
        scores_1kv = decoder.extend(ops.array([[ids[-1], *draft.tokens]]))


def _check(generation: GenerationRun) -> None:
    if generation.plan.rows > 1:
        raise ValueError(
            f"speculative decoding needs one prompt and one sequence, got {generation.plan.rows} rows: leave out "
            "assistant_model, prompt_lookup_num_tokens and speculation for batches, or use monoblock.LLM"
        )
    sources = {
        "assistant_model": generation.assistant,
        "prompt_lookup_num_tokens": generation.config.prompt_lookup_num_tokens,
        "speculation": generation.speculation,
    }
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"drafts come either from {given[0]} or from {given[1]}: pass one of them")


def _source(generation: GenerationRun) -> DraftSource:
    config = generation.config
    if generation.assistant is not None:
        return Assistant(generation, generation.assistant)
    if generation.speculation is not None:
        return RuledDrafts(generation.speculation)
    assert config.prompt_lookup_num_tokens is not None
    return PromptLookup(config.prompt_lookup_num_tokens, config.max_matching_ngram_size or DEFAULT_MATCH)


class RuledDrafts:
    """Drafts of `speculation`, as long as the rule of `draft_rule.py` expects."""

    def __init__(self, method: str) -> None:
        """`method`: of `drafts.METHODS`."""
        self.drafts, self.rule = speculator(method, MOST_DRAFTED), DraftRule()
        self.started = 0.0

    def propose(self, ids: list[int], room: int) -> Draft:
        """A draft for the next step, which begins now."""
        began = draft_rule.clock()
        draft = self.drafts.propose(ids, room, self.rule.stride)
        proposed = draft.tokens
        if proposed:
            draft = draft.cut(self.rule.lengths([draft], [self.drafts.acceptance], 1, 1)[0])
        self.started = draft_rule.clock()
        if proposed:
            self.rule.proposed(self.started - began)
        return draft

    def stepped(self, draft: Draft, accepted: int) -> None:
        """The step is done; so many tokens of its draft were accepted."""
        seconds = draft_rule.clock() - self.started
        self.rule.stepped(1, len(draft.tokens), 1, accepted, seconds)
        self.drafts.learn(draft, min(accepted + 1, len(draft.tokens)), accepted)


def _choose(generation: GenerationRun, scores_1v: Array, draft: Draft, index: int) -> tuple[Array, int, bool]:
    """The token at a position of the draft, as an array (1,) and as a number, and whether it is the draft token."""
    ops = generation.ops
    draft_token = draft.tokens[index] if index < len(draft.tokens) else None
    if not generation.config.do_sample:
        token_1 = ops.argmax(scores_1v)
    elif draft_token is None or not draft.scores:
        # A draft that was not sampled has q = 1: the rule is to draw from p and compare.
        token_1 = ops.sample(scores_1v, generation.generator)
    else:
        token_1 = ops.array([_drawn(generation, scores_1v, draft.scores[index], draft_token)])
    [token] = ops.to_list(token_1)
    return token_1, token, token == draft_token


def _drawn(generation: GenerationRun, p_scores_1v: Array, q_scores_1v: Array, draft_token: int) -> int:
    """A sample of the distribution p, by way of a draft token that was drawn from q."""
    ops, generator = generation.ops, generation.generator
    p_1v, q_1v = ops.softmax(p_scores_1v), ops.softmax(q_scores_1v)
    index_11 = ops.array([[draft_token]])
    [[p]], [[q]] = ops.to_list(ops.take_along(p_1v, index_11)), ops.to_list(ops.take_along(q_1v, index_11))
    if p >= q:
        return draft_token
    # Two outcomes with their log-probabilities as scores: accept with probability p / q.
    odds = ops.array([[math.log(p / q) if p else -math.inf, math.log1p(-p / q)]])
    if ops.to_list(ops.sample(odds, generator)) == [0]:
        return draft_token
    more_1v = ops.where(p_1v > q_1v, p_1v - q_1v, 0.0)
    [[most]] = ops.to_list(ops.max(more_1v))
    # If p and q differ only by rounding, p - q is 0 everywhere: draw from p.
    rest_1v = ops.log(more_1v) if most > 0 else p_scores_1v
    [token] = ops.to_list(ops.sample(rest_1v, generator))
    return token


def _options(config: GenerationConfig, own: GenerationConfig | None) -> dict[str, Any]:
    """Draft options: of the call, then of the assistant's own file, then transformers' defaults."""
    own_fields = {} if own is None else own.set_fields()
    given = {**own_fields, **config.set_fields()}
    options = {name: given.get(name, default) for name, default in DEFAULT_ASSISTANT.items()}
    GenerationConfig().check(options)
    return options


class Assistant:
    """Drafts of a smaller model with the same vocabulary, which has its own KV cache."""

    def __init__(self, generation: GenerationRun, model: GenerativeModel):
        if generation.embedded:
            raise ValueError(
                "assistant_model needs token ids: pass input_ids instead of inputs_embeds, or leave it out"
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
        # The user's own processors are called on accepted sequences only; q may be any distribution.
        self.processors = processors.build(generation.context, processors.wanted(generation.config))
        self.fed = 0  # tokens in the assistant's cache
        self.last = (0, 0)  # length of the sequence before the last draft, and length of the draft

    def propose(self, ids: list[int], room: int) -> Draft:
        """Tokens drawn one after the other, until one is less probable than the threshold."""
        self._adapt(len(ids))
        count = min(self.count, room)
        if self.max_positions is not None:
            count = min(count, self.max_positions - len(ids))
        draft = Draft()
        if count > 0:
            scores_1v = self._next_scores(ids)
            while True:
                token, probability = self._draft_token(ids, scores_1v, draft)
                if probability < self.threshold or len(draft.tokens) >= count:
                    # The improbable token is kept: dropping a sample by its value would bias the distribution.
                    break
                scores_1v = self.decoder.step(self.generation.ops.array([[token]]))
                self.fed += 1
        self.last = (len(ids), len(draft.tokens))
        return draft

    def _adapt(self, length: int) -> None:
        before, drafted = self.last
        if self.adapts and drafted:
            self.count = self.count + 2 if length - before > drafted else max(1, self.count - 1)

    def _next_scores(self, ids: list[int]) -> Array:
        """The scores after `ids`; only tokens that the cache lacks are processed."""
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

    def _draft_token(self, ids: list[int], scores_1v: Array, draft: Draft) -> tuple[int, float]:
        """One more draft token, and its probability."""
        run, ops = self.generation, self.generation.ops
        if self.processors:
            ids_1n = ops.array([ids + draft.tokens])
            for processor in self.processors:
                scores_1v = processor(ids_1n, scores_1v)
        index_1 = ops.sample(scores_1v, run.generator) if run.config.do_sample else ops.argmax(scores_1v)
        [[probability]] = ops.to_list(ops.take_along(ops.softmax(scores_1v), index_1[:, None]))
        [token] = ops.to_list(index_1)
        draft.tokens.append(token)
        draft.scores.append(scores_1v)
        return token, probability
