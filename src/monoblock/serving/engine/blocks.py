"""The blocks of the KV cache: allocation, and the prefix cache over full blocks."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from monoblock.generation.batches import BLOCK


def block_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Identifies a full block by its tokens and all tokens before it."""
    return hashlib.sha256(parent + np.asarray(tokens, np.int64).tobytes()).digest()


class BlockPool:
    """A fixed number of blocks with reference counts.

    A full block may be registered under the digest of its text. When nobody uses it any more, it stays, until its
    memory is needed: the least recently used one is taken first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._fresh = 0  # blocks from here on were never used
        self._free: list[int] = []
        self._uses: dict[int, int] = {}
        self._digests: dict[int, bytes] = {}
        self._known: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # registered and unused, the oldest first

    @property
    def available(self) -> int:
        """Blocks that can be allocated."""
        return len(self._free) + len(self._idle) + self.count - self._fresh

    @property
    def used(self) -> int:
        """Blocks that are in use."""
        return self.count - self.available

    def allocate(self, count: int) -> list[int] | None:
        """That many blocks, with one reference each; None if there are not enough."""
        if count > self.available:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        elif self._fresh < self.count:
            block, self._fresh = self._fresh, self._fresh + 1
        else:
            block, _ = self._idle.popitem(last=False)
            del self._known[self._digests.pop(block)]
        self._uses[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference of each. Later blocks of a text are taken again before earlier ones."""
        for block in reversed(blocks):
            self._uses[block] -= 1
            if self._uses[block]:
                continue
            del self._uses[block]
            if block in self._digests:
                self._idle[block] = None
            else:
                self._free.append(block)

    def register(self, block: int, digest: bytes) -> None:
        """Make a full block known; without effect if another one with the same text is."""
        if digest not in self._known and block not in self._digests:
            self._known[digest], self._digests[block] = block, digest

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The known blocks of a text's beginning, with a new reference to each."""
        found: list[int] = []
        for digest in digests:
            if (block := self._known.get(digest)) is None:
                break
            self._idle.pop(block, None)
            self._uses[block] = self._uses.get(block, 0) + 1
            found.append(block)
        return found


def blocks_for(tokens: int) -> int:
    """The number of blocks that so many tokens take."""
    return -(-tokens // BLOCK)
