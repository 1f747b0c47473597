"""The choice of a sequence's next token from the model's scores, by the processors of `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monoblock.generation import limits, processors, structured
from monoblock.generation.arrays import Array, ArrayOps
from monoblock.generation.config import GenerationConfig
from monoblock.serving.engine.params import SamplingParams
from monoblock.serving.engine.results import TokenLogprob


class CountPenalty:
    """OpenAI's penalties: `frequency` times the count of a token among the new ones, and `presence` once."""

    def __init__(self, ops: ArrayOps, start: int, presence: float, frequency: float) -> None:
        self.ops, self.start, self.presence, self.frequency = ops, start, presence, frequency

    def __call__(self, ids_bn: Array, scores_bv: Array) -> Array:
        counts: dict[int, int] = {}
        for token in self.ops.to_list(ids_bn[:, self.start :])[0]:
            counts[token] = counts.get(token, 0) + 1
        if not counts:
            return scores_bv
        penalties = [-(self.presence + self.frequency * count) for count in counts.values()]
        return self.ops.add_along(scores_bv, self.ops.array([list(counts)]), self.ops.array([penalties]))


def config_of(params: SamplingParams, model: GenerationConfig, tokens: int) -> GenerationConfig:
    """The generation config of a request with `tokens` new tokens at most; `model`: the model's own.

    ValueError for a field that is unknown, not supported or out of range.
    """
    eos = list(model.eos_ids)
    values: dict[str, Any] = {
        "do_sample": not params.greedy,
        "max_new_tokens": tokens,
        "eos_token_id": eos or None,
        "pad_token_id": model.pad_token_id,
    }
    if params.repetition_penalty != 1:
        values["repetition_penalty"] = params.repetition_penalty
    if params.min_tokens and eos:
        values["min_new_tokens"] = params.min_tokens
    if params.logit_bias:
        values["sequence_bias"] = [[[token], float(bias)] for token, bias in params.logit_bias.items()]
    if not params.greedy:
        values |= {"temperature": params.temperature, "top_p": params.top_p, "top_k": max(0, params.top_k)}
        values["min_p"] = params.min_p or None
    known = {name for name, *_ in (*processors.ALWAYS, *processors.LAST, *processors.SAMPLING)} - {
        "prefix_allowed_tokens_fn"
    }
    for name in params.fields:
        if name not in known:
            raise ValueError(
                f"fields: {name!r} is not a field that changes scores; expected one of {', '.join(sorted(known))}"
            )
    values |= dict(params.fields)
    return GenerationConfig(**{name: value for name, value in values.items() if value is not None})


class Sampler:
    """Chooses the tokens of one sequence. Its choices depend on the scores, its tokens so far and its seed."""

    def __init__(
        self,
        ops: ArrayOps,
        params: SamplingParams,
        config: GenerationConfig,
        prompt: Sequence[int],
        tokenizer: Any,
        vocab: int,
        seed: int,
    ) -> None:
        """`config`: of `config_of`. ValueError for a token outside the vocabulary, or a response format that cannot be
        used."""
        self.ops, self.params, self.config = ops, params, config
        limits.check_ids(config, vocab, frozenset())
        self.start = len(prompt)
        self._ids = ops.array([list(prompt)])
        self._new: list[int] = []
        own: list[Any] = []
        if params.presence_penalty or params.frequency_penalty:
            own.append(CountPenalty(ops, self.start, params.presence_penalty, params.frequency_penalty))
        own += params.logits_processors
        if (
            grammar := structured.build(ops, self.start, params.response_format, tokenizer, config)
        ) is not None:
            own.append(grammar)
        context = processors.ProcessorContext(
            ops=ops,
            config=config,
            prompt_bn=self._ids,
            valid_bn=None,
            prompt_length=self.start,
            max_length=self.start + (config.max_new_tokens or 0),
        )
        self._processors = processors.build(context, processors.wanted(config), own)
        self._generator = None if params.greedy else ops.generator(seed)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is chosen, without any change of the scores."""
        return self.params.greedy and not self._processors

    def choose(self, scores_1v: Array) -> int:
        """The next token."""
        if self._processors:
            ids = self._all_ids()
            for processor in self._processors:
                scores_1v = processor(ids, scores_1v)
        chosen = (
            self.ops.argmax(scores_1v) if self.params.greedy else self.ops.sample(scores_1v, self._generator)
        )
        return int(self.ops.to_list(chosen)[0])

    def _all_ids(self) -> Array:
        if self._new:
            self._ids = self.ops.concat([self._ids, self.ops.array([self._new])])
            self._new = []
        return self._ids

    def append(self, token: int) -> None:
        """The token was chosen."""
        self._new.append(token)

    def logprob(self, scores_1v: Array, token: int, count: int) -> TokenLogprob:
        """The model's log-probability of a token, and of the `count` likeliest."""
        logs = self.ops.log_softmax(scores_1v)
        own = float(self.ops.to_list(logs[:, token : token + 1])[0][0])
        if not count:
            return TokenLogprob(token, own)
        values, indices = self.ops.top_k(logs, min(count, int(logs.shape[-1])))
        pairs = zip(self.ops.to_list(indices)[0], self.ops.to_list(values)[0], strict=True)
        return TokenLogprob(token, own, tuple((int(i), float(v)) for i, v in pairs))
