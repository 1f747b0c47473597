"""What the `from_pretrained` of every framework takes out of its keywords before the rest goes to the config."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from monoblock.checkpoint.hub import Kind, consistent_read, find_weights
from monoblock.checkpoint.matching import LoadReport
from monoblock.checkpoint.options import HubOptions
from monoblock.checkpoint.store import open_store
from monoblock.families import warn_of_another_class

log = logging.getLogger("monoblock")

# Options of the PyTorch classes that the others refuse for the same reason.
KERNEL = {
    "attn_implementation": "the kernel is chosen by the shapes, and output_attentions=True works with it"
}


MOST_SHOWN = 50  # names in a warning; `output_loading_info` has all


class CommonLoadOptions:
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
        self.strict = bool(kwargs.pop("strict", True))
        self.loading_info = bool(kwargs.pop("output_loading_info", False))
        self.variant: str | None = kwargs.pop("variant", None)
        self.use_safetensors: bool | None = kwargs.pop("use_safetensors", None)
        self.prefer = self.preferred(kwargs)
        for name, instead in self.refused.items():
            if kwargs.pop(name, None):
                raise ValueError(f"from_pretrained of a {self.prefix} class does not take {name}: {instead}")

    def preferred(self, kwargs: dict[str, Any]) -> tuple[Kind, ...]:
        """The kinds of files in the order in which they are looked for; `from_pt=True` asks for PyTorch's own."""
        return ("safetensors", "bin" if kwargs.pop("from_pt", False) else self.native)


def told_of_unused(name: str, where: str, report: LoadReport) -> None:
    """Log what a load into a model of the class `name` did not use: a warning for what strict=False passed over."""
    if report.unused:
        log.info("%s: %s also holds %s, not used here", name, where, ", ".join(report.unused))
    if extra := report.extra:
        shown = ", ".join(extra[:MOST_SHOWN]) + (
            f" and {left} more" if (left := len(extra) - MOST_SHOWN) > 0 else ""
        )
        log.warning(
            "%s: strict=False passes over what %s holds and the model has no place for: %s",
            name,
            where,
            shown,
        )


def loading_info(
    missing: Iterable[str], mismatched: Iterable[str], report: LoadReport
) -> dict[str, list[str]]:
    """What `output_loading_info=True` gives; `missing` and `mismatched`: names of parameters that got new values."""
    return {
        "missing_keys": sorted(missing),
        "unexpected_keys": report.unexpected,
        "mismatched_keys": sorted(mismatched),
        "error_msgs": [],
    }


def opened(
    cls: Any, name: Any, config: Any, options: CommonLoadOptions, kwargs: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """What a model of a class is made of: its config, its generation config (or None) and its opened weights, all of
    one save of the folder or repository `name`. TypeError: a keyword that the config does not know."""

    def read() -> tuple[Any, Any, Any]:
        settings, unused = cls._config_for(name, config, options.hub, kwargs)
        if unused:
            raise TypeError(f"from_pretrained does not know the argument {next(iter(unused))!r}")
        warn_of_another_class(settings, cls.row)
        generation = cls.file_generation_config(name, options.hub) if cls.row.head == "causal" else None
        files = find_weights(
            name,
            options.hub,
            variant=options.variant,
            use_safetensors=options.use_safetensors,
            prefer=options.prefer,
        )
        return settings, generation, open_store(files, "np")

    return consistent_read(name, options.hub, read)
