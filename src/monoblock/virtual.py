"""Classes for `__class__` properties, with which objects pass `isinstance` checks of another library."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def virtual_subclass(own: type, theirs: type) -> Any:
    """A class that derives from both, used only for `isinstance`; calling it creates an `own`."""

    def new(_: type, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    body = {
        "__new__": new,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
    }
    return type(own.__name__, (own, theirs), body)
