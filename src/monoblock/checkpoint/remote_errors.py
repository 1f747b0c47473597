"""Error messages for failures of huggingface_hub: what failed, why, and what to do.

Errors are identified by their class names, which stayed the same when huggingface_hub changed its HTTP library.
"""

import errno
import os
from typing import Any

from monoblock.errors import HubError

_ACCESS = "give a token that may read it (token=..., HF_TOKEN or `hf auth login`)"
_OUTAGE = "check the connection and HF_ENDPOINT, or use a local folder"
_BROKE = f"the connection to {{endpoint}} was lost while downloading {{file}} of '{{repo}}' ({{reason}}): {_OUTAGE}"
_UNFIT = "{file} of '{repo}' does not fit into {cache}; make room or set cache_dir="
_UNKEPT = "{file} of '{repo}' cannot be stored there; set cache_dir= to another folder"

# The first entry that matches one of the error's classes is used. {reason} is the first line of its message.
_BY_CLASS = {
    "GatedRepoError": f"'{{repo}}' is gated: accept its terms at {{endpoint}}/{{repo}}, then {_ACCESS}",
    "DisabledRepoError": "'{repo}' has been disabled on {endpoint}: use another model",
    "RepositoryNotFoundError": (
        "'{repo}' is neither a local folder nor a model on {endpoint}: check the name, or, "
        f"if it is private, {_ACCESS}"
    ),
    "RevisionNotFoundError": (
        "'{repo}' has no revision '{revision}': name one of its branches, tags or commit hashes"
    ),
    "HFValidationError": "'{repo}' is neither a local folder nor a valid name on the hub ({reason})",
    "LocalTokenNotFoundError": (
        "token=True, but no token is stored: run `hf auth login` or pass the token itself"
    ),
    "ProxyError": "the proxy refused the connection to {endpoint} ({reason}): check HTTPS_PROXY and HTTP_PROXY",
    "TimeoutException": (
        "{endpoint} did not answer in time about {file} of '{repo}': try again later, or raise "
        "HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT (seconds)"
    ),
    "ConnectError": f"{{endpoint}} cannot be reached for {{file}} of '{{repo}}' ({{reason}}): {_OUTAGE}",
    "NetworkError": _BROKE,
    "RemoteProtocolError": _BROKE,
}
_BY_STATUS = {
    401: f"{{endpoint}} does not accept the token for '{{repo}}' (401): renew it, or {_ACCESS}",
    403: f"access to {{file}} of '{{repo}}' is forbidden on {{endpoint}} (403): {_ACCESS}",
    429: "{endpoint} refuses more requests for now (429): wait a few minutes, or use a token",
}
_BY_ERRNO = {
    errno.ENOSPC: f"the disk is full: {_UNFIT}",
    errno.EDQUOT: f"the disk quota is used up: {_UNFIT}",
    errno.EACCES: f"{{cache}} is not writable: {_UNKEPT}",
    errno.EROFS: f"{{cache}} is read-only: {_UNKEPT}",
}


def names_of(error: BaseException) -> set[str]:
    """The names of an error's class and its bases."""
    return {kind.__name__ for kind in type(error).__mro__}


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error's response, if it has one."""
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def explain(error: Exception, **facts: object) -> HubError:
    """A HubError that explains `error`; `facts` are repo, revision, file, endpoint and cache."""
    reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return HubError(_template(error).format(reason=reason, status=status_of(error), **facts))


def _template(error: Exception) -> str:
    names, status = names_of(error), status_of(error)
    for name, template in _BY_CLASS.items():
        if name in names:
            return template
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if status is not None:
        return f"{{endpoint}} answered {{status}} about {{file}} of '{{repo}}': try again later; {_OUTAGE}"
    if isinstance(error, OSError) and error.errno in _BY_ERRNO:
        return _BY_ERRNO[error.errno]
    if isinstance(error, OSError) and error.errno is not None:
        return f"{{file}} of '{{repo}}' cannot be stored in {{cache}} ({os.strerror(error.errno)}): set cache_dir="
    return "{file} of '{repo}' could not be fetched from {endpoint} ({reason}): try again"
