"""Generation as one compiled program: which calls allow it, and the static arguments and inputs of the program.

A backend compiles the whole loop over tokens once per `Program` (the static arguments) and passes the rest as arrays:
the numeric options of the processors (a new temperature does not recompile), the number of tokens to generate, and the
token buffer. The buffer has a fixed number of columns and is right-aligned: each new token shifts it to the left.
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
from monoblock.generation.beams import BeamScorer
from monoblock.generation.buckets import bucket
from monoblock.generation.config import GenerationConfig
from monoblock.generation.preparation import GenerationRun

# Fields whose values are inputs of the program, as float32 or int32; the values of all others are static arguments.
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
NO_TOKEN = -1  # fills the unused columns of a token buffer; not a valid token id


class TokenBuffer(NamedTuple):
    """A right-aligned token buffer: ids and validity mask, (rows, columns), and the number of tokens, a scalar."""

    ids_bt: Array
    valid_bt: Array
    length: Array

    def appended(self, ops: ArrayOps, token_b: Array) -> TokenBuffer:
        """The buffer with one more token for each row."""
        if self.ids_bt.shape[1] == 0:
            return TokenBuffer(self.ids_bt, self.valid_bt, self.length + 1)
        token_b1 = token_b[:, None]
        return TokenBuffer(
            ops.concat([self.ids_bt[:, 1:], token_b1]),
            ops.concat([self.valid_bt[:, 1:], token_b1 == token_b1]),
            self.length + 1,
        )


class ProgramInputs(NamedTuple):
    """Inputs of a program besides the sequences so far: numeric options of the processors by name, the prompts, and the
    maximum length."""

    numbers: Mapping[str, Any]
    prompt: TokenBuffer
    max_length: Any


@dataclass(frozen=True)
class Program:
    """The static arguments of a compiled loop, besides shapes; hashable.

    `fields`: processor options that are compiled in, by name. `numbers`: names of the numeric options that are inputs.
    `max_new_tokens`: the capacity, at least the number of tokens that a call may request. `search`: of a beam search.
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
        """The scores after all processors; called inside the program."""
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
        """Which of these tokens are eos tokens."""
        ends_b = token_b != token_b
        for token in self.eos:
            ends_b = ends_b | (token_b == token)
        return ends_b

    @property
    def reads(self) -> bool:
        """Whether a processor reads the tokens so far."""
        return not processors.READERS.isdisjoint((*dict(self.fields), *self.numbers))

    def token_buffer(self, prompt_bn: NDArray[Any], valid_bn: NDArray[Any] | None) -> TokenBuffer:
        """The prompts as the initial token buffer, on the host."""
        columns = bucket(prompt_bn.shape[1]) + self.max_new_tokens if self.reads else 0
        return _at_the_end(prompt_bn, valid_bn, columns)

    def inputs(
        self, fields: Mapping[str, Any], prompt_bn: NDArray[Any], valid_bn: NDArray[Any] | None, new: int
    ) -> ProgramInputs:
        """The inputs for a call with these fields, on the host."""
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
    """The program of a run; None if the run needs host code between two tokens."""
    config, plan = generation.config, generation.plan
    host = (
        generation.streamer,
        generation.criteria,
        generation.guidance,
        generation.user_processors,
        "prefix_allowed_tokens_fn" in generation.fields,
        plan.rewinds,
        not config.use_cache,
        config.disable_compile,
        config.return_dict_in_generate and _recorded(config),
    )
    if any(host):
        return None
    # Sampling always divides by a temperature, so that 1.0 and other values share a program.
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
    """The static arguments of the beam search; None without one."""
    return (
        None
        if (config.num_beams or 1) == 1
        else BeamConfig.of(BeamScorer.of(config, new), len(config.eos_ids))
    )


def _recorded(config: GenerationConfig) -> Any:
    """Whether the call requests per-step outputs."""
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
