"""Image and prompt processing for Fuyu. Modules are imported lazily; Pillow only when an image needs it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monoblock.processing.auto import AutoProcessor
    from monoblock.processing.auto_image import AutoImageProcessor
    from monoblock.processing.batch import FuyuBatchEncoding
    from monoblock.processing.image import FuyuImageProcessor
    from monoblock.processing.processor import FuyuProcessor

_MODULES = {
    "AutoImageProcessor": "auto_image",
    "AutoProcessor": "auto",
    "FuyuBatchEncoding": "batch",
    "FuyuImageProcessor": "image",
    "FuyuProcessor": "processor",
}

__all__ = ["AutoImageProcessor", "AutoProcessor", "FuyuBatchEncoding", "FuyuImageProcessor", "FuyuProcessor"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
