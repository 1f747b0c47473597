"""The settings of a chat: fields of a `GenerationConfig` and a seed, which can change between replies."""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from monoblock import seeds
from monoblock.cli.options import SamplingOptions

SEED = "seed"
# Fields that a chat does not support: it streams one sequence.
NOT_IN_A_CHAT = frozenset({"num_return_sequences", "num_beams", "length_penalty", "early_stopping"})


@dataclass
class Settings:
    """The settings made by the user; all others are those of the model's generation_config.json."""

    values: dict[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(cls, sampling: SamplingOptions, flags: Sequence[str] = ()) -> Settings:
        """Settings from command options and `name=value` arguments; ValueError if one is wrong or given twice."""
        options = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            SEED: sampling.seed,
            "stop_strings": sampling.stop or None,
        }
        given = {name: value for name, value in options.items() if value is not None}
        for flag in flags:
            name, equals, text = flag.partition("=")
            if not equals:
                raise ValueError(f"{flag!r} is no setting: expected NAME=VALUE, as in max_new_tokens=64")
            if name in given:
                raise ValueError(f"{name} is given twice; drop one of them")
            given[name] = literal(text)
        settings = cls()
        settings.change(given)
        return settings

    def change(self, given: Mapping[str, Any]) -> None:
        """Set fields, or unset them with None. ValueError names an invalid one, and nothing is changed."""
        from monoblock.generation.config import GenerationConfig
        from monoblock.generation.resolve import resolve

        known = {
            name
            for name in GenerationConfig.FIELDS - NOT_IN_A_CHAT
            if not name.startswith(("output_", "return_"))
        } | {SEED}
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else "the names are those of generation_config.json"
                raise ValueError(f"{name} is no setting of a chat: {hint}")
        values = {name: v for name, v in (self.values | dict(given)).items() if v is not None}
        if seeds.checked_seed(values.get(SEED, 0)) < 0:
            raise ValueError(f"seed={values[SEED]}: expected an integer of at least 0")
        resolve(_arguments(values), None, None)
        self.values = values

    def kwargs(self, *, retry: int = 0) -> dict[str, Any]:
        """The arguments of `generate`; `retry` is added to the seed so that a retry differs."""
        options = _arguments(self.values)
        if SEED in self.values:
            options[SEED] = seeds.advance(self.values[SEED], retry)
        return options

    def lines(self) -> list[str]:
        """The settings as `name = value` lines."""
        return [f"{name} = {value!r}" for name, value in sorted(self.values.items())]


def literal(text: str) -> Any:
    """Parse a Python or JSON literal; any other text is a string, and `none` means unset."""
    words = {"true": True, "false": False, "none": None, "null": None}
    word = text.strip()
    if word.lower() in words:
        return words[word.lower()]
    try:
        value = ast.literal_eval(word)
        json.dumps(value)  # values must be storable in a saved conversation
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return word
    return value


def _arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as arguments of `generate`: temperature 0 means greedy decoding, other sampling fields enable sampling."""
    from monoblock.generation.checks import SAMPLING_FIELDS

    fields = {name: value for name, value in values.items() if name != SEED}
    greedy = fields.get("temperature") == 0 and not isinstance(fields["temperature"], bool)
    if greedy:
        del fields["temperature"]
    sampling = sorted(fields.keys() & SAMPLING_FIELDS)
    if greedy and fields.get("do_sample"):
        raise ValueError("temperature 0 always takes the most likely token; drop it or do_sample=True")
    if sampling and (greedy or fields.get("do_sample") is False):
        why = "temperature 0" if greedy else "do_sample=False"
        raise ValueError(f"{why} always takes the most likely token; drop it or {', '.join(sampling)}")
    if greedy or sampling:
        fields["do_sample"] = not greedy
    return fields
