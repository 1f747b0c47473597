"""Calls that run as one compiled program: which they are, and what of them is compiled in.

A backend compiles the whole loop over tokens for a `Program`, which says all that decides its code, and gives it the
rest as arrays: the numbers of the processors (a new temperature compiles nothing), how many tokens to make, and the
text. The text lies at the end of arrays whose columns stay the same in number: with each token it moves to the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from monoblock.generation import processors
from monoblock.generation.arrays import Array, ArrayOps
from monoblock.generation.beam_program import BeamConfig
from monoblock.generation.beams import Rules
from monoblock.generation.buckets import bucket
from monoblock.generation.config import GenerationConfig
from monoblock.generation.preparation import GenerationRun

# Fields whose values come with each call, as float32 or int32; those of the others are compiled in.
NUMBERS: dict[str, type[np.generic]] = {
    **dict.fromkeys(
        (
            "temperature",
            "top_p",
            "top_h",
            "typical_p",
            "epsilon_cutoff",
            "repetition_penalty",
            "encoder_repetition_penalty",
        ),
        np.float32,
    ),
    "min_length": np.int32,
    "min_new_tokens": np.int32,
}
PROMPT_READERS = frozenset({"encoder_repetition_penalty", "encoder_no_repeat_ngram_size"})
NO_TOKEN = -1  # in places of the text's arrays that hold none of it; no token has that id


class TokenBuffer(NamedTuple):
    """The text in a compiled loop: ids and where they are no padding, (rows, columns), and its length, a number."""

    ids_bt: Array
    valid_bt: Array
    length: Array

    def appended(self, ops: ArrayOps, token_b: Array) -> TokenBuffer:
        """With one more token for each row."""
        if self.ids_bt.shape[1] == 0:
            return TokenBuffer(self.ids_bt, self.valid_bt, self.length + 1)
        token_b1 = token_b[:, None]
        return TokenBuffer(
            ops.concat([self.ids_bt[:, 1:], token_b1]),
            ops.concat([self.valid_bt[:, 1:], token_b1 == token_b1]),
            self.length + 1,
        )


class ProgramInputs(NamedTuple):
    """What a call gives to a program besides the text: numbers of the processors by name, the prompt as a `Text`,
    and how long the text may become."""

    numbers: Mapping[str, Any]
    prompt: TokenBuffer
    max_length: Any


@dataclass(frozen=True)
class Program:
    """All that decides what is compiled, besides shapes; hashable.

    `fields`: what acts on the scores, with the values that are compiled in. `numbers`: the names of what acts on them
    by a number of the call. `room`: new tokens that fit, at least as many as any call may ask for. `width`: of a beam
    search.
    """

    fields: tuple[tuple[str, Any], ...]
    numbers: tuple[str, ...]
    eos: tuple[int, ...]
    pad: int
    do_sample: bool
    keep: int
    max_new_tokens: int
    forced_bos: int | None
    search: BeamConfig | None

    def processed(self, ops: ArrayOps, scores_bv: Array, text: TokenBuffer, given: ProgramInputs) -> Array:
        """The scores after all processors; inside the program."""
        values = dict(self.fields) | {name: given.numbers[name] for name in self.numbers}
        config = GenerationConfig()
        config.eos_token_id, config.forced_bos_token_id = list(self.eos), self.forced_bos
        context = processors.ProcessorContext(
            ops=ops,
            config=config,
            prompt_bn=given.prompt.ids_bt,
            valid_bn=given.prompt.valid_bt,
            prompt_length=given.prompt.length,
            max_length=given.max_length,
            keep=self.keep,
            text_length=text.length,
            text_valid_bn=text.valid_bt,
        )
        for processor in processors.build(context, values):
            scores_bv = processor(text.ids_bt, scores_bv)
        return scores_bv

    def ends(self, token_b: Array) -> Array:
        """Which of these tokens end a text."""
        ends_b = token_b != token_b
        for token in self.eos:
            ends_b = ends_b | (token_b == token)
        return ends_b

    @property
    def reads(self) -> bool:
        """Whether a processor looks at the text."""
        return not processors.READERS.isdisjoint((*dict(self.fields), *self.numbers))

    def token_buffer(self, prompt_bn: NDArray[Any], valid_bn: NDArray[Any] | None) -> TokenBuffer:
        """The prompts as the text to begin with, on the host."""
        columns = bucket(prompt_bn.shape[1]) + self.max_new_tokens if self.reads else 0
        return _at_the_end(prompt_bn, valid_bn, columns)

    def inputs(
        self, fields: Mapping[str, Any], prompt_bn: NDArray[Any], valid_bn: NDArray[Any] | None, new: int
    ) -> ProgramInputs:
        """What a call with these fields gives besides, on the host."""
        names = {*dict(self.fields), *self.numbers}
        columns = 0 if PROMPT_READERS.isdisjoint(names) else bucket(prompt_bn.shape[1])
        return ProgramInputs(
            numbers={name: np.asarray(fields.get(name, 1), NUMBERS[name]) for name in self.numbers},
            prompt=_at_the_end(prompt_bn, valid_bn, columns),
            max_length=np.asarray(prompt_bn.shape[1] + new, np.int32),
        )


def _at_the_end(ids_bn: NDArray[Any], valid_bn: NDArray[Any] | None, columns: int) -> TokenBuffer:
    rows, length = ids_bn.shape
    ids_bt = np.full((rows, columns), NO_TOKEN, np.int32)
    valid_bt = np.zeros((rows, columns), np.bool_)
    if columns and length:
        ids_bt[:, -length:] = ids_bn
        valid_bt[:, -length:] = True if valid_bn is None else valid_bn
    return TokenBuffer(ids_bt, valid_bt, np.asarray(length, np.int32))


def program_of(generation: GenerationRun) -> Program | None:
    """The program of a call; None if the call needs the host between two tokens."""
    config, plan = generation.config, generation.plan
    host = (
        generation.streamer,
        generation.criteria,
        generation.guidance,
        generation.own_processors,
        "prefix_allowed_tokens_fn" in generation.fields,
        plan.rewinds,
        not config.use_cache,
        config.disable_compile,
        config.return_dict_in_generate and _recorded(config),
    )
    if any(host):
        return None
    # Sampling divides by a temperature always: to come back to 1 compiles nothing.
    tempered = ("temperature",) if config.do_sample and "temperature" not in generation.fields else ()
    return Program(
        fields=tuple((n, _frozen(v)) for n, v in generation.fields.items() if n not in NUMBERS),
        numbers=tuple(sorted((*tempered, *(name for name in generation.fields if name in NUMBERS)))),
        eos=tuple(config.eos_ids),
        pad=generation.pad,
        do_sample=bool(config.do_sample),
        keep=generation.context.keep,
        max_new_tokens=bucket(plan.new_tokens),
        forced_bos=config.forced_bos_token_id,
        search=_search(config, plan.new_tokens),
    )


def _search(config: GenerationConfig, new: int) -> BeamConfig | None:
    """Of a search; None without one."""
    return None if (config.num_beams or 1) == 1 else BeamConfig.of(Rules.of(config, new), len(config.eos_ids))


def _recorded(config: GenerationConfig) -> Any:
    """Whether something of every step is wanted back."""
    return (
        config.output_scores
        or config.output_logits
        or config.output_attentions
        or config.output_hidden_states
    )


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((_frozen(key), _frozen(item)) for key, item in cast(Mapping[Any, Any], value).items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_frozen(item) for item in cast(Sequence[Any], value))
    return value
