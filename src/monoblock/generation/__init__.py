"""Generation without a framework: config, processors, stopping, streamers and the one loop over a backend's decoder.

Public names are found where they live when they are first asked for, so that importing this costs nothing.
"""

import importlib
from typing import Any

_WHERE = {
    "config": ("GenerationConfig",),
    "loop": ("GenerateDecoderOnlyOutput", "generate"),
    "processors": ("LogitsProcessor", "LogitsProcessorList"),
    "stopping": (
        "EosTokenCriteria",
        "MaxLengthCriteria",
        "MaxTimeCriteria",
        "StopStringCriteria",
        "StoppingCriteria",
        "StoppingCriteriaList",
    ),
    "streamers": ("AsyncTextIteratorStreamer", "BaseStreamer", "TextIteratorStreamer", "TextStreamer"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
