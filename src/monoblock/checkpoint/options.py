"""What a user may say about where a model's files come from."""

import functools
import logging
from collections.abc import MutableMapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Self

# Arguments of other libraries that are not honoured, and what to do instead.
_REFUSED = {
    "use_auth_token": "use token= instead",
    "proxies": "set the environment variables HTTPS_PROXY and HTTP_PROXY instead",
    "mirror": "set the environment variable HF_ENDPOINT instead",
    "gguf_file": "GGUF files are not read; name a folder or model with safetensors",
}


log = logging.getLogger("monoblock")


def pop_remote_code(kwargs: MutableMapping[str, Any]) -> None:
    """Take `trust_remote_code` out of `kwargs`, which is changed; True is told once what it does."""
    if kwargs.pop("trust_remote_code", None):
        warn_of_remote_code()


@functools.cache
def warn_of_remote_code() -> None:
    """Say once what trust_remote_code=True does: nothing."""
    log.warning(
        "trust_remote_code=True changes nothing: no code of a model's folder is ever run here; the options of its "
        "makers' code work without it, or are refused by name"
    )


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Options of every `from_pretrained`.

    All but `subfolder` speak of the hub: `revision` is a branch, a tag or a commit hash; `token` an access
    token, True for the stored one, False for none, None for the stored one if there is one; `cache_dir` where
    downloads are kept; `local_files_only` uses the cache alone; `force_download` fetches again what the cache
    has.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str = ""

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.subfolder)
        if parts.is_absolute() or ".." in parts.parts or "\\" in self.subfolder:
            raise ValueError(
                f"subfolder={self.subfolder!r}: expected a folder inside the model, such as 'onnx/fp16'"
            )

    @classmethod
    def pop(cls, kwargs: MutableMapping[str, Any]) -> Self:
        """Take the options out of `kwargs`, which is changed; arguments that cannot be honoured raise
        `TypeError`.

        `resume_download` is taken too and changes nothing: a cut download is always resumed. So is `trust_remote_code`.
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
