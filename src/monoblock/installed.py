"""Test whether a package is installed, without importing it."""

from __future__ import annotations

import importlib.util


def installed(package: str) -> bool:
    """Whether a package or module can be imported; a namespace package (a folder on the path) does not count."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module in sys.modules without a spec
        return True
    return spec is not None and spec.origin is not None
