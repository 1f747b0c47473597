"""The sequences and per-step outputs that a run collects, and its return value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from monoblock.generation.arrays import Array, ArrayOps
from monoblock.generation.config import GenerationConfig
from monoblock.generation.decoder import Decoder
from monoblock.generation.stopping import Rows
from monoblock.outputs import ModelOutput


@dataclass
class GenerateDecoderOnlyOutput(ModelOutput):
    """The output of `generate(..., return_dict_in_generate=True)`.

    sequences: (rows, prompt + new). scores and logits: one (rows, vocab) for each new token, after and before the
    processors. attentions and hidden_states: one tuple over layers for each forward pass.
    """

    sequences: Any = None
    scores: tuple[Any, ...] | None = None
    logits: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    past_key_values: Any = None


@dataclass
class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """The output of beam search, whose arrays have a row for each beam.

    sequences_scores: (prompts * num_return_sequences,), with `output_scores=True`: log-probability / length **
    length_penalty. scores: log-probabilities after the processors. beam_indices: (rows, new), the row of `scores`
    that each token was chosen from, -1 after a sequence's end.
    """

    sequences: Any = None
    sequences_scores: Any = None
    scores: tuple[Any, ...] | None = None
    logits: tuple[Any, ...] | None = None
    beam_indices: Any = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    past_key_values: Any = None


class GeneratedSequences:
    """The token ids so far: on the device, concatenated on demand, and on the host if stopping criteria need them."""

    def __init__(self, ops: ArrayOps, prompt_bn: Array, wants_rows: bool):
        self._ops = ops
        self._ids = prompt_bn
        self._new: list[Array] = []
        self.rows: Rows = ops.to_list(prompt_bn) if wants_rows else []

    def append(self, token_b: Array, tokens: list[int]) -> None:
        """Append one token to each row."""
        self._new.append(token_b[:, None])
        for row, token in zip(self.rows, tokens, strict=False):
            row.append(token)

    def extend(self, tokens_bk: Array) -> None:
        """Append several tokens to each row; the host's rows are not updated."""
        self._new.append(tokens_bk)

    def ids(self) -> Array:
        """(rows, tokens) on the device."""
        if self._new:
            self._ids = self._ops.concat([self._ids, *self._new])
            self._new = []
        return self._ids


# Makes the return value of a call without an output object, from the ids and the scores of beam search (else None).
ResultFn = Callable[[Array, Array | None], Any]


def ids_only(ids_bn: Array, scores_b: Array | None) -> Any:
    """The ids without scores."""
    del scores_b
    return ids_bn


class OutputCollector:
    """Collects the requested outputs besides the sequences."""

    def __init__(self, config: GenerationConfig, make_result: ResultFn = ids_only):
        self.make_result = make_result
        wanted = bool(config.return_dict_in_generate)
        self.as_dict = wanted
        self.scores: list[Array] | None = [] if wanted and config.output_scores else None
        self.logits: list[Array] | None = [] if wanted and config.output_logits else None
        self.attentions: list[Any] | None = [] if wanted and config.output_attentions else None
        self.hidden_states: list[Any] | None = [] if wanted and config.output_hidden_states else None

    def add_forward(self, decoder: Decoder) -> None:
        """Add the outputs of a forward pass over the prompt or one token."""
        if self.attentions is not None:
            self.attentions.append(decoder.attentions)
        if self.hidden_states is not None:
            self.hidden_states.append(decoder.hidden_states)

    def add_position(self, decoder: Decoder, index: int, after: int) -> None:
        """Add one position of a pass over several tokens, as if it had been run alone; `after` positions follow it."""
        at = slice(index, index + 1)
        if self.attentions is not None:
            cut = [w[:, :, at, : w.shape[-1] - after] for w in decoder.attentions]
            self.attentions.append(tuple(cut))
        if self.hidden_states is not None:
            self.hidden_states.append(tuple(x[:, at] for x in decoder.hidden_states))

    def expand(self, expand_rows: Callable[[Array], Array]) -> None:
        """Expand the outputs of the prompt's forward pass to the copies of each prompt."""
        for collected in (self.attentions, self.hidden_states):
            if collected:
                collected[0] = tuple(expand_rows(layer) for layer in collected[0])

    def add_scores(self, logits_bv: Array, scores_bv: Array) -> None:
        """Add the scores that a token was chosen from, before and after the processors."""
        if self.scores is not None:
            self.scores.append(scores_bv)
        if self.logits is not None:
            self.logits.append(logits_bv)

    def all_scores(self) -> tuple[Array, ...] | None:
        """The scores of all steps, for stopping criteria; None if they are not collected."""
        return _tuple(self.scores)

    def output(self, ids_bn: Array, decoder: Decoder) -> Any:
        """The return value: the ids, or an output object."""
        if not self.as_dict:
            return self.make_result(ids_bn, None)
        return GenerateDecoderOnlyOutput(sequences=ids_bn, **self._collected(decoder))

    def beam_output(self, ids_bn: Array, scores_b: Array, beam_indices_bn: Array, decoder: Decoder) -> Any:
        """The return value of beam search."""
        if not self.as_dict:
            return self.make_result(ids_bn, scores_b)
        return GenerateBeamDecoderOnlyOutput(
            sequences=ids_bn,
            sequences_scores=None if self.scores is None else scores_b,
            beam_indices=beam_indices_bn,
            **self._collected(decoder),
        )

    def _collected(self, decoder: Decoder) -> dict[str, Any]:
        return {
            "scores": _tuple(self.scores),
            "logits": _tuple(self.logits),
            "attentions": _tuple(self.attentions),
            "hidden_states": _tuple(self.hidden_states),
            "past_key_values": decoder.past_key_values,
        }


def _tuple(collected: list[Any] | None) -> tuple[Any, ...] | None:
    return None if collected is None else tuple(collected)
