"""Tokenizers as virtual instances of transformers' classes, where transformers is imported.

transformers' Trainer, TRL, outlines, lm-eval and sentence-transformers check `isinstance(tokenizer,
PreTrainedTokenizerBase)`. That class is not an ABC with `register`, but `isinstance` also reads the object's
`__class__`, as for mocks and proxies; here it is a class that derives from both.
"""

from __future__ import annotations

import sys
from typing import Any, cast

from monoblock.virtual import virtual_subclass

# transformers 5's and 4's tokenizer over `tokenizers`, and their base: the first module that is imported counts.
BASES = (
    ("transformers.tokenization_utils_tokenizers", "PreTrainedTokenizerFast"),
    ("transformers.tokenization_utils_fast", "PreTrainedTokenizerFast"),
    ("transformers.tokenization_utils_base", "PreTrainedTokenizerBase"),
)


class TransformersClassMixin:
    """The `__class__` of a tokenizer for transformers' `isinstance` checks."""

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The class of this object; with transformers imported, one that also derives from transformers' class."""
        own = type(self)
        for module, name in BASES:
            if (base := getattr(sys.modules.get(module), name, None)) is not None:
                return virtual_subclass(own, base)
        return own

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # By the actual class: pickle refuses an object whose `__class__` differs.
        del protocol
        return _new, (type(self),), cast(Any, self).__getstate__()


def _new(kind: Any) -> Any:
    return kind.__new__(kind)
