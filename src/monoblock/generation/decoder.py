"""The interface of a backend: a `GenerativeModel` makes a `Decoder` for the `GenerationPlan` of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from monoblock.generation.arrays import Array, ArrayOps
from monoblock.generation.config import GenerationConfig
from monoblock.generation.resolve import Unsupported


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """Sizes and options of a run, fixed before the first forward pass."""

    config: GenerationConfig  # resolved: defaults are filled in
    prompt_length: int  # positions of the prompt, ids or embeddings
    new_tokens: int
    batch: int  # prompts
    copies: int  # consecutive rows for each prompt (beams or returned sequences)
    rewinds: bool = False  # whether the cache is cropped during the run: it must not drop any position

    @property
    def rows(self) -> int:
        """Rows of the cache after the prompts are expanded."""
        return self.batch * self.copies

    @property
    def max_length(self) -> int:
        """Positions that a row can occupy, prompt included; the last token is never fed back."""
        return self.prompt_length + self.new_tokens


class Decoder(Protocol):
    """A model during one run: its KV cache, position ids and mask.

    Scores are float32, and later calls must not overwrite them. After each call, `attentions` and `hidden_states` are
    those of that call if the config requests them, one array per layer, else None. `past_key_values` is returned to the
    caller.
    """

    attentions: Any
    hidden_states: Any
    past_key_values: Any

    def prefill(self, ids_bn: Array, mask_bm: Array | None) -> Array:
        """Process the prompts; scores (rows, vocab) of the token after each. Without a mask there is no padding."""
        ...

    def step(self, ids_b1: Array) -> Array:
        """Process one token for each row; scores (rows, vocab) of the next."""
        ...

    def reorder(self, index_b: Array) -> None:
        """Replace row i by row index[i]; the number of rows may change (copies of a prompt, beams)."""
        ...


class RewindableDecoder(Decoder, Protocol):
    """A decoder whose cache can be cropped, as speculative decoding does with rejected tokens."""

    def extend(self, ids_bk: Array) -> Array:
        """Process k tokens for each row; scores (rows, k, vocab) of the token after each."""
        ...

    def crop(self, length: int) -> None:
        """Drop all but the first `length` positions from the cache."""
        ...


class GenerativeModel(Protocol):
    """The description of a model that `generate` needs; see `loop.py`."""

    ops: ArrayOps
    generation_config: GenerationConfig | None
    input_names: frozenset[str]
    max_positions: int | None
    vocab: int | None  # size of the vocabulary; None: not known before the first scores

    @property
    def unsupported(self) -> Unsupported:
        """Entries that override those of `resolve.UNSUPPORTED` and `resolve.UNSUPPORTED_ARGUMENTS`."""
        ...

    @property
    def compiled(self) -> Callable[[Any, Any], Any] | None:
        """Runs a `GenerationRun` that needs no host code between tokens as one compiled `Program`.

        None where the host loop generates token by token.
        """
        ...

    def decoder(self, plan: GenerationPlan, inputs: dict[str, Any]) -> Decoder:
        """A decoder for one run."""
        ...
