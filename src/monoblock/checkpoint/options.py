"""Download options shared by every `from_pretrained`."""

import functools
import logging
from collections.abc import MutableMapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Self

# Arguments of transformers that are not supported, and what to use instead.
_REFUSED = {
    "use_auth_token": "use token= instead",
    "proxies": "set the environment variables HTTPS_PROXY and HTTP_PROXY instead",
    "mirror": "set the environment variable HF_ENDPOINT instead",
}


log = logging.getLogger("monoblock")


def pop_remote_code(kwargs: MutableMapping[str, Any]) -> None:
    """Remove `trust_remote_code` from `kwargs` (in place); True logs a warning once."""
    if kwargs.pop("trust_remote_code", None):
        warn_of_remote_code()


@functools.cache
def warn_of_remote_code() -> None:
    """Warn once that trust_remote_code=True has no effect."""
    log.warning(
        "trust_remote_code=True has no effect: code in a model's folder is never run; the options of that code are "
        "implemented here, or raise an error that names them"
    )


def _is_name(name: object) -> bool:
    """Whether this is the relative path of a file inside a folder."""
    if not isinstance(name, str):
        return False
    parts = PurePosixPath(name)
    return bool(parts.name) and not parts.is_absolute() and ".." not in parts.parts and "\\" not in name


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Download options of every `from_pretrained`.

    `revision`: branch, tag or commit hash. `token`: access token; True for the stored one, False for none, None for the
    stored one if there is one. `cache_dir`: the download cache. `local_files_only`: use only the cache.
    `force_download`: download cached files again. `subfolder`: the folder of the model's files in the repository.
    `gguf_file`: the GGUF file in it that holds everything: config, weights and tokenizer.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str = ""
    gguf_file: str | None = None

    def __post_init__(self) -> None:
        if self.gguf_file is not None and not _is_name(self.gguf_file):
            raise ValueError(
                f"gguf_file={self.gguf_file!r}: expected the name of a file, such as 'model-q8_0.gguf'"
            )
        parts = PurePosixPath(self.subfolder)
        if parts.is_absolute() or ".." in parts.parts or "\\" in self.subfolder:
            raise ValueError(
                f"subfolder={self.subfolder!r}: expected a folder inside the model, such as 'onnx/fp16'"
            )

    @classmethod
    def pop(cls, kwargs: MutableMapping[str, Any]) -> Self:
        """Remove the options from `kwargs` (in place); unsupported arguments of transformers raise `TypeError`.

        `resume_download` and `trust_remote_code` are removed too and have no effect: downloads are always resumed, and
        remote code is never run.
        """
        pop_remote_code(kwargs)
        for name, instead in _REFUSED.items():
            if kwargs.pop(name, None) is not None:
                raise TypeError(f"{name}= is not supported: {instead}")
        kwargs.pop("resume_download", None)
        given = {field.name: kwargs.pop(field.name) for field in fields(cls) if field.name in kwargs}
        if given.get("subfolder", "") is None:
            del given["subfolder"]
        return cls(**given)
