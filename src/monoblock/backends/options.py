"""What the `from_pretrained` of every framework takes out of its keywords before the rest goes to the config."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from monoblock.checkpoint.hub import Kind
from monoblock.checkpoint.options import HubOptions

log = logging.getLogger("monoblock")

# Options of the PyTorch classes that the others refuse for the same reason.
KERNEL = {
    "attn_implementation": "the kernel is chosen by the shapes, and output_attentions=True works with it"
}


class LoadOptions:
    """The options of a load; the keywords that are no options are left where they were.

    `prefix` is that of the framework's classes; `refused` are options of other frameworks' classes, and what does the
    same here; `native` is the framework's own format, which is read where there are no safetensors.
    """

    prefix: ClassVar[str]
    refused: ClassVar[Mapping[str, str]]
    native: ClassVar[Kind]

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.hub = HubOptions.pop(kwargs)
        self.ignore_mismatched_sizes = bool(kwargs.pop("ignore_mismatched_sizes", False))
        self.variant: str | None = kwargs.pop("variant", None)
        self.use_safetensors: bool | None = kwargs.pop("use_safetensors", None)
        self.prefer = self.preferred(kwargs)
        if kwargs.pop("trust_remote_code", False):
            log.info("trust_remote_code=True: no remote code is run here; the makers' options work natively")
        for name, instead in self.refused.items():
            if kwargs.pop(name, None):
                raise ValueError(f"from_pretrained of a {self.prefix} class does not take {name}: {instead}")

    def preferred(self, kwargs: dict[str, Any]) -> tuple[Kind, ...]:
        """The kinds of files in the order in which they are looked for; `from_pt=True` asks for PyTorch's own."""
        return ("safetensors", "bin" if kwargs.pop("from_pt", False) else self.native)
