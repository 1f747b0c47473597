"""What a generation has made so far, and what the call gets back."""

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
    """What `return_dict_in_generate=True` gives.

    sequences (rows, prompt + new); scores and logits one (rows, vocab) for each new token, after and before the
    processors; attentions and hidden_states one tuple over layers for each forward pass.
    """

    sequences: Any = None
    scores: tuple[Any, ...] | None = None
    logits: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    past_key_values: Any = None


@dataclass
class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """The same for beam search, whose arrays have a row for each beam.

    sequences_scores (prompts * num_return_sequences,), with `output_scores=True`: log-probability / length **
    length_penalty. scores: log-probabilities after the processors. beam_indices (rows, new): the row of `scores`
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
    """All token ids so far: on the device, joined only when someone looks, and on the host if criteria want."""

    def __init__(self, ops: ArrayOps, prompt_bn: Array, wants_rows: bool):
        self._ops = ops
        self._ids = prompt_bn
        self._new: list[Array] = []
        self.rows: Rows = ops.to_list(prompt_bn) if wants_rows else []

    def append(self, token_b: Array, tokens: list[int]) -> None:
        """One more token for each row."""
        self._new.append(token_b[:, None])
        for row, token in zip(self.rows, tokens, strict=False):
            row.append(token)

    def extend(self, tokens_bk: Array) -> None:
        """Several tokens more, after which nobody looks at the host's rows."""
        self._new.append(tokens_bk)

    def ids(self) -> Array:
        """(rows, tokens) on the device."""
        if self._new:
            self._ids = self._ops.concat([self._ids, *self._new])
            self._new = []
        return self._ids


# What a call gets that asks for no output object, from the ids and the scores of beams (None of others).
ResultFn = Callable[[Array, Array | None], Any]


def ids_only(ids_bn: Array, scores_b: Array | None) -> Any:
    """The ids."""
    del scores_b
    return ids_bn


class OutputCollector:
    """What the call wants back besides the sequences."""

    def __init__(self, config: GenerationConfig, make_result: ResultFn = ids_only):
        self.make_result = make_result
        wanted = bool(config.return_dict_in_generate)
        self.as_dict = wanted
        self.scores: list[Array] | None = [] if wanted and config.output_scores else None
        self.logits: list[Array] | None = [] if wanted and config.output_logits else None
        self.attentions: list[Any] | None = [] if wanted and config.output_attentions else None
        self.hidden_states: list[Any] | None = [] if wanted and config.output_hidden_states else None

    def forward(self, decoder: Decoder) -> None:
        """A forward pass of the prompt or of one token."""
        if self.attentions is not None:
            self.attentions.append(decoder.attentions)
        if self.hidden_states is not None:
            self.hidden_states.append(decoder.hidden_states)

    def part(self, decoder: Decoder, place: int, after: int) -> None:
        """One place of a pass of several tokens, as if it had been run alone; `after` more follow it there."""
        here = slice(place, place + 1)
        if self.attentions is not None:
            cut = [w[:, :, here, : w.shape[-1] - after] for w in decoder.attentions]
            self.attentions.append(tuple(cut))
        if self.hidden_states is not None:
            self.hidden_states.append(tuple(x[:, here] for x in decoder.hidden_states))

    def repeat(self, copied: Callable[[Array], Array]) -> None:
        """The prompt's forward pass, as if it had been run on every copy."""
        for kept in (self.attentions, self.hidden_states):
            if kept:
                kept[0] = tuple(copied(layer) for layer in kept[0])

    def choice(self, logits_bv: Array, scores_bv: Array) -> None:
        """The scores that a token was chosen from, before and after the processors."""
        if self.scores is not None:
            self.scores.append(scores_bv)
        if self.logits is not None:
            self.logits.append(logits_bv)

    def all_scores(self) -> tuple[Array, ...] | None:
        """The scores of all steps, if they are kept; what criteria get to see."""
        return _tuple(self.scores)

    def output(self, ids_bn: Array, decoder: Decoder) -> Any:
        """The ids, or all that was asked for."""
        if not self.as_dict:
            return self.make_result(ids_bn, None)
        return GenerateDecoderOnlyOutput(sequences=ids_bn, **self._kept(decoder))

    def beam_output(self, ids_bn: Array, scores_b: Array, beam_indices_bn: Array, decoder: Decoder) -> Any:
        """The same for beam search."""
        if not self.as_dict:
            return self.make_result(ids_bn, scores_b)
        return GenerateBeamDecoderOnlyOutput(
            sequences=ids_bn,
            sequences_scores=None if self.scores is None else scores_b,
            beam_indices=beam_indices_bn,
            **self._kept(decoder),
        )

    def _kept(self, decoder: Decoder) -> dict[str, Any]:
        return {
            "scores": _tuple(self.scores),
            "logits": _tuple(self.logits),
            "attentions": _tuple(self.attentions),
            "hidden_states": _tuple(self.hidden_states),
            "past_key_values": decoder.past_key_values,
        }


def _tuple(kept: list[Any] | None) -> tuple[Any, ...] | None:
    return None if kept is None else tuple(kept)
