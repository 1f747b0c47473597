"""What the host loop asks of a framework: a model's compiled passes, and what is done to caches between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from monoblock.backends.xla.compiled import Loop, Start
from monoblock.backends.xla.inputs import Wanted
from monoblock.backends.xla.namespace import Array
from monoblock.generation.compiled_loop import Program
from monoblock.spec import ArchSpec

Given = Mapping[str, Any]


class Pass(NamedTuple):
    """What one pass gives: scores in float32, (b, vocab) of the last token or (b, k, vocab), and the rest."""

    scores: Array
    cache: Any
    attentions: tuple[Array, ...] | None
    hidden_states: tuple[Array, ...] | None


def of_outputs(out: Mapping[str, Any], scores: Array, wanted: Wanted) -> Pass:
    """A network's outputs as what a pass gives; `scores` are its logits in float32."""
    last = scores[:, -1] if wanted.keep == 1 else scores
    return Pass(last, *(out.get(name) for name in ("past_key_values", "attentions", "hidden_states")))


class Passes(Protocol):
    """A model's passes, compiled once for each bucket of lengths. Caches that go in are gone."""

    spec: ArchSpec
    loop: Loop

    def checked(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """A prompt's arguments, checked, as the network takes them."""
        ...

    def past(self, given: Any) -> Any:
        """The cache that a call gives, in whatever form it came; None without one."""
        ...

    def first(self, given: Given, wanted: Wanted, spec: ArchSpec, max_length: int) -> Pass:
        """A pass over the prompts, into a new cache of `max_length` slots with the windows of `spec`."""
        ...

    def more(self, given: Given, cache: Any, wanted: Wanted) -> Pass:
        """A pass over the next tokens."""
        ...

    def anew(self, given: Given, wanted: Wanted) -> Pass:
        """A pass over whole texts, without a cache."""
        ...

    def lookup(self, ids: Any) -> Array:
        """Token ids as vectors."""
        ...

    def empty(self, rows: int, spec: ArchSpec, max_length: int) -> Any:
        """A cache without tokens, of `max_length` slots with the windows of `spec`."""
        ...

    def moved(self, cache: Any, shift: int, spec: ArchSpec, max_length: int) -> Any:
        """A copy of the cache for `max_length` slots and the windows of `spec`, without its first `shift` tokens."""
        ...

    def reordered(self, cache: Any, index_b: Any) -> Any:
        """Row i is what row `index_b[i]` was."""
        ...

    def cut(self, arrays: Sequence[Array], where: tuple[Any, ...]) -> tuple[Array, ...]:
        """That part of each array."""
        ...

    def looped(self, program: Program, start: Start) -> Any:
        """Makes all tokens of a call in one compiled loop (`compiled.looped`, or `compiled_beams.looped` of a program
        that has a width); the state at its end."""
        ...
