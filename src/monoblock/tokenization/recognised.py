"""Our tokenizers as virtual instances of transformers' classes, where transformers is imported.

transformers' Trainer, TRL, outlines, lm-eval and sentence-transformers ask `isinstance(tokenizer,
PreTrainedTokenizerBase)`. That class is no ABC with which another one could be registered, but `isinstance` also
asks the object for its `__class__`, as it does for mocks and proxies: ours is then a class that derives from both.
"""

from __future__ import annotations

import sys
from typing import Any, cast

from monoblock.virtual import virtual_subclass

# Where transformers 5 and 4 define their tokenizer over `tokenizers`, and its base: the first that is imported counts.
PLACES = (
    ("transformers.tokenization_utils_tokenizers", "PreTrainedTokenizerFast"),
    ("transformers.tokenization_utils_fast", "PreTrainedTokenizerFast"),
    ("transformers.tokenization_utils_base", "PreTrainedTokenizerBase"),
)


class Recognised:
    """The part of a tokenizer by which transformers' tools take it for one of theirs."""

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The class of this object; with transformers imported, one that derives from transformers' too."""
        own = type(self)
        for module, name in PLACES:
            if (base := getattr(sys.modules.get(module), name, None)) is not None:
                return virtual_subclass(own, base)
        return own

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # By the true class: pickle refuses an object whose `__class__` is another one.
        del protocol
        return _blank, (type(self),), cast(Any, self).__getstate__()


def _blank(kind: Any) -> Any:
    return kind.__new__(kind)
