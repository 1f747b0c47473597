"""What the loop asks of a backend: a `Model` that makes a `Decoder` for each call's `Plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from monoblock.generation.arrays import Array, ArrayOps
from monoblock.generation.config import GenerationConfig
from monoblock.generation.resolve import Unsupported


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """What is decided before the first forward pass."""

    config: GenerationConfig  # resolved: no default is left open
    prompt_length: int  # positions that the prompt takes, be it ids or embeddings
    new_tokens: int
    batch: int  # prompts
    copies: int  # rows that continue each prompt; consecutive
    rewinds: bool = False  # whether tokens are taken back: the cache must not drop any

    @property
    def rows(self) -> int:
        """Rows of the cache once the prompts are in."""
        return self.batch * self.copies

    @property
    def max_length(self) -> int:
        """Positions that a row can take, prompt included; the last token is never fed back."""
        return self.prompt_length + self.new_tokens


class Decoder(Protocol):
    """A model in the middle of one generation: its cache, positions and mask.

    Scores are float32 and must stay as they are when later calls return others. After each call, `attentions` and
    `hidden_states` are those of that call if the config asks for them, one array per layer, else None.
    `past_key_values` is what the caller gets back.
    """

    attentions: Any
    hidden_states: Any
    past_key_values: Any

    def prefill(self, ids_bn: Array, mask_bm: Array | None) -> Array:
        """Take the prompts; scores (rows, vocab) of the token after each. No mask: nothing is padding."""
        ...

    def step(self, ids_b1: Array) -> Array:
        """Take one token for each row; scores (rows, vocab) of the next."""
        ...

    def reorder(self, index_b: Array) -> None:
        """Row i becomes what row index[i] was; the number of rows may change (copies of a prompt, beams)."""
        ...


class RewindableDecoder(Decoder, Protocol):
    """A decoder that can try tokens and take them back, as speculative decoding does."""

    def extend(self, ids_bk: Array) -> Array:
        """Take k tokens for each row; scores (rows, k, vocab) of the one after each."""
        ...

    def crop(self, length: int) -> None:
        """Forget everything after the first `length` positions."""
        ...


class GenerativeModel(Protocol):
    """What `generate` needs to know about a model; see the module's text."""

    ops: ArrayOps
    generation_config: GenerationConfig | None
    input_names: frozenset[str]
    max_positions: int | None
    vocab: int | None  # ids that there are; None: not known before the first scores

    @property
    def unsupported(self) -> Unsupported:
        """Rows that take the place of those in `resolve.UNSUPPORTED` and `resolve.UNSUPPORTED_ARGUMENTS`."""
        ...

    @property
    def compiled(self) -> Callable[[Any, Any], Any] | None:
        """Runs a `GenerationRun` that needs no host code between tokens as one compiled `Program`.

        None where the host loop generates token by token.
        """
        ...

    def decoder(self, plan: GenerationPlan, inputs: dict[str, Any]) -> Decoder:
        """A decoder for one call."""
        ...
