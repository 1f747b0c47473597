"""Text generation without a framework: config, logits processors, stopping criteria, streamers and the decoding loop.

Public names are imported lazily, on first access, so that importing this package is cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monoblock.generation.config import GenerationConfig as GenerationConfig
    from monoblock.generation.loop import generate as generate
    from monoblock.generation.outputs import GenerateBeamDecoderOnlyOutput as GenerateBeamDecoderOnlyOutput
    from monoblock.generation.outputs import GenerateDecoderOnlyOutput as GenerateDecoderOnlyOutput
    from monoblock.generation.processors import LogitsProcessor as LogitsProcessor
    from monoblock.generation.processors import LogitsProcessorList as LogitsProcessorList
    from monoblock.generation.stopping import EosTokenCriteria as EosTokenCriteria
    from monoblock.generation.stopping import MaxLengthCriteria as MaxLengthCriteria
    from monoblock.generation.stopping import MaxTimeCriteria as MaxTimeCriteria
    from monoblock.generation.stopping import StoppingCriteria as StoppingCriteria
    from monoblock.generation.stopping import StoppingCriteriaList as StoppingCriteriaList
    from monoblock.generation.stopping import StopStringCriteria as StopStringCriteria
    from monoblock.generation.streamers import AsyncTextIteratorStreamer as AsyncTextIteratorStreamer
    from monoblock.generation.streamers import BaseStreamer as BaseStreamer
    from monoblock.generation.streamers import TextIteratorStreamer as TextIteratorStreamer
    from monoblock.generation.streamers import TextStreamer as TextStreamer

_WHERE = {
    "config": ("GenerationConfig",),
    "loop": ("generate",),
    "processors": ("LogitsProcessor", "LogitsProcessorList"),
    "outputs": ("GenerateBeamDecoderOnlyOutput", "GenerateDecoderOnlyOutput"),
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
