"""Whether a package is installed, found out without importing it."""

from __future__ import annotations

import importlib.util


def installed(package: str) -> bool:
    """True for a package or module that can be imported; a folder of that name on the path is none."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module that was put in place by hand, which does not say where it is from
        return True
    return spec is not None and spec.origin is not None
