"""The interface of the host loop to a framework: a model's compiled forward passes, and operations on caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from monoblock.backends.xla.compiled import LoopOps, LoopStart
from monoblock.backends.xla.inputs import ForwardOptions
from monoblock.backends.xla.namespace import Array
from monoblock.generation.compiled_loop import Program
from monoblock.spec import ArchSpec

Given = Mapping[str, Any]


class PassOutput(NamedTuple):
    """Outputs of one forward pass: scores in float32, (b, vocab) of the last token or (b, k, vocab), and the rest."""

    scores: Array
    cache: Any
    attentions: tuple[Array, ...] | None
    hidden_states: tuple[Array, ...] | None


def pass_output(out: Mapping[str, Any], scores: Array, options: ForwardOptions) -> PassOutput:
    """The network's outputs as a `PassOutput`; `scores` are its logits in float32."""
    last = scores[:, -1] if options.keep == 1 else scores
    return PassOutput(last, *(out.get(name) for name in ("past_key_values", "attentions", "hidden_states")))


class Passes(Protocol):
    """A model's forward passes, compiled once for each bucket of lengths. Caches that are passed in are donated: they
    must not be used afterwards."""

    spec: ArchSpec
    loop_ops: LoopOps

    def check_inputs(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Check the prompts' arguments and convert them into the network's inputs."""
        ...

    def as_cache(self, given: Any) -> Any:
        """The cache of a `past_key_values` argument in any accepted form; None without one."""
        ...

    def prefill(self, given: Given, options: ForwardOptions, spec: ArchSpec, max_length: int) -> PassOutput:
        """A pass over the prompts that fills a new cache of `max_length` slots with the windows of `spec`."""
        ...

    def extend(self, given: Given, cache: Any, options: ForwardOptions) -> PassOutput:
        """A pass over the next tokens."""
        ...

    def uncached(self, given: Given, options: ForwardOptions) -> PassOutput:
        """A pass over whole sequences, without a cache."""
        ...

    def embed_tokens(self, ids: Any) -> Array:
        """The embeddings of token ids."""
        ...

    def empty_cache(self, rows: int, spec: ArchSpec, max_length: int) -> Any:
        """An empty cache of `max_length` slots with the windows of `spec`."""
        ...

    def shifted_cache(self, cache: Any, shift: int, spec: ArchSpec, max_length: int) -> Any:
        """A copy of the cache for `max_length` slots and the windows of `spec`, without its first `shift` tokens."""
        ...

    def reordered_cache(self, cache: Any, index_b: Any) -> Any:
        """The cache whose row i is row `index_b[i]`."""
        ...

    def sliced(self, arrays: Sequence[Array], index: tuple[Any, ...]) -> tuple[Array, ...]:
        """`array[index]` of each array."""
        ...

    def run_loop(self, program: Program, start: LoopStart) -> Any:
        """Generate all tokens of a call in one compiled loop (`compiled.token_loop`, or for beams
        `compiled_beams.beam_loop`); its final state."""
        ...
