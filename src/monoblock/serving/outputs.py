"""What `LLM` returns, with vLLM's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from monoblock.serving.engine.results import Completion, FinishReason, TokenLogprob


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability. `rank`: 1 for the likeliest; None for a token that is not among the alternatives."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass
class CompletionOutput:
    """A generated sequence.

    `logprobs`: for each token, token id -> `Logprob`, of the chosen token and the alternatives; None if
    `SamplingParams.logprobs` is. `cumulative_logprob`: the sum over the chosen tokens. `finish_reason`: "stop" or
    "length". `stop_reason`: the stop string or the id of the stop token that ended it; None for an eos token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


@dataclass
class RequestOutput:
    """The completions of a prompt. `prompt`: None if it was given as token ids. `num_cached_tokens`: of the prompt, in
    the prefix cache."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0


@dataclass
class EmbeddingOutput:
    """The vector of a text."""

    embedding: list[float] = field(repr=False)


@dataclass
class ClassificationOutput:
    """The probabilities of a text's labels, in the order of the config's `id2label`, and the likeliest label."""

    probs: list[float]
    label: str

    @property
    def num_classes(self) -> int:
        """The number of labels."""
        return len(self.probs)


@dataclass
class ScoringOutput:
    """The score of a pair of texts."""

    score: float


@dataclass
class EmbeddingRequestOutput:
    """The vector of a text, with its tokens."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True


@dataclass
class ClassificationRequestOutput:
    """The labels of a text, with its tokens."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: ClassificationOutput
    finished: bool = True


@dataclass
class ScoringRequestOutput:
    """The score of a pair, with the tokens of both texts."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: ScoringOutput
    finished: bool = True


class LogprobReader:
    """Reads the engine's log-probabilities; each token is decoded once."""

    def __init__(self, tokenizer: object) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def token(self, entry: TokenLogprob) -> dict[int, Logprob]:
        """The chosen token and the alternatives of a position."""
        found = {
            token: Logprob(value, rank, self._text(token)) for rank, (token, value) in enumerate(entry.top, 1)
        }
        if entry.token not in found:
            found[entry.token] = Logprob(entry.logprob, None, self._text(entry.token))
        return found

    def completion(self, found: Completion, wanted: bool) -> CompletionOutput:
        """A finished sequence; with log-probabilities if they are wanted."""
        return CompletionOutput(
            index=found.index,
            text=found.text,
            token_ids=found.tokens,
            cumulative_logprob=sum(entry.logprob for entry in found.logprobs) if wanted else None,
            logprobs=[self.token(entry) for entry in found.logprobs] if wanted else None,
            finish_reason=found.finish,
            stop_reason=found.stop,
        )

    def prompt(self, found: Sequence[TokenLogprob | None]) -> list[dict[int, Logprob] | None]:
        """Those of a prompt; None for its first token."""
        return [None if entry is None else self.token(entry) for entry in found]

    def _text(self, token: int) -> str:
        if token not in self._texts:
            decode = getattr(self._tokenizer, "decode", None)
            self._texts[token] = "" if decode is None else decode([token])
        return self._texts[token]
