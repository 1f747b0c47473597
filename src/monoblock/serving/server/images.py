"""Images of requests: data: URLs, and where the server allows it file: and http(s): URLs."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import ipaddress
import socket
import ssl
import time
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.settings import Limits, ServerSettings

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SECONDS = 10.0  # for fetching an image
REDIRECTS = 3


def read_image(url: str, settings: ServerSettings, param: str) -> Any:
    """The image of a URL, a PIL image in RGB. Slow: runs in a thread.

    ApiError for a URL that is not allowed, and for data that is no image, has too many pixels or is damaged.
    """
    limits = settings.limits
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        data = _inline(url, limits, param)
    elif scheme == "file":
        data = _file(url, settings, param)
    elif scheme in ("http", "https"):
        if not settings.allow_fetch:
            raise _refused("this server fetches no images: send a data: URL", param)
        data = _fetched(url, limits, param)
    else:
        raise _refused("an image's URL begins with data:, file: or http(s):", param)
    return _decoded(data, limits, param)


def _refused(message: str, param: str) -> ApiError:
    return ApiError(message, param=param, code="invalid_image_url")


def _inline(url: str, limits: Limits, param: str) -> bytes:
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise _refused("a data: URL of an image is data:image/png;base64,...", param)
    if len(text) > limits.image_bytes * 4 // 3 + 4:
        raise _too_large(limits, param)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _refused("the image's data is not valid base64", param) from None


def _too_large(limits: Limits, param: str) -> ApiError:
    return ApiError(
        f"an image has more than the {limits.image_bytes:,} bytes that this server accepts",
        status=413,
        param=param,
        code="image_too_large",
    )


def _file(url: str, settings: ServerSettings, param: str) -> bytes:
    folder = settings.allow_files
    if folder is None:
        raise _refused("this server reads no files: send a data: URL", param)
    parts = urlsplit(url)
    text = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or "\0" in text:
        raise _refused("a file: URL is file:///path of this machine", param)
    try:
        path = Path(text).resolve(strict=True)
        # The same answer for files outside the folder and for missing ones.
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            raise OSError
        with path.open("rb") as file:
            data = file.read(settings.limits.image_bytes + 1)
    except (OSError, ValueError, RuntimeError):
        raise _refused(
            "there is no such file in the folder that this server reads images from", param
        ) from None
    if len(data) > settings.limits.image_bytes:
        raise _too_large(settings.limits, param)
    return data


class _Pinned(http.client.HTTPConnection):
    """A connection to an address that was checked, so that a second resolution cannot give another one."""

    def __init__(self, url: SplitResult, address: str) -> None:
        secure = url.scheme == "https"
        super().__init__(url.hostname or "", url.port or (443 if secure else 80), timeout=SECONDS)
        self._address, self._secure = address, secure

    def connect(self) -> None:
        connected = socket.create_connection((self._address, self.port), self.timeout)
        if self._secure:
            connected = ssl.create_default_context().wrap_socket(connected, server_hostname=self.host)
        self.sock = connected


def _public(url: SplitResult, param: str) -> str:
    """An address of the URL's host; ApiError for one of this machine or of a private network."""
    try:
        port = url.port or 80
        found = socket.getaddrinfo(url.hostname or "", port, type=socket.SOCK_STREAM)
    except (OSError, ValueError, UnicodeError):
        raise _refused("the host of the image's URL is unknown", param) from None
    for *_, address in found:
        if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_global:
            raise _refused("images are not fetched from this machine or from private networks", param)
    return str(found[0][4][0])


def _fetched(url: str, limits: Limits, param: str) -> bytes:
    until = time.monotonic() + SECONDS
    for _ in range(REDIRECTS + 1):
        try:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or parts.username is not None:
                raise _refused("an image is fetched from http(s):// without a user", param)
            connection = _Pinned(parts, _public(parts, param))
            try:
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "monoblock"})
                answer = connection.getresponse()
                if answer.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, answer.getheader("Location") or "")
                    continue
                if answer.status != 200:
                    raise _refused(f"fetching the image gives the status {answer.status}", param)
                return _received(answer, until, limits, param)
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError):
            raise _refused("the image cannot be fetched", param) from None
    raise _refused(f"the image's URL redirects more than {REDIRECTS} times", param)


def _received(answer: http.client.HTTPResponse, until: float, limits: Limits, param: str) -> bytes:
    data = bytearray()
    while chunk := answer.read1(2**16):
        data += chunk
        if len(data) > limits.image_bytes:
            raise _too_large(limits, param)
        if time.monotonic() > until:
            raise _refused(f"the image did not arrive within {SECONDS:g} s", param)
    return bytes(data)


def _too_many(count: str, limits: Limits, param: str) -> ApiError:
    return ApiError(
        f"the image has {count} pixels; this server accepts {limits.image_pixels:,}",
        param=param,
        code="image_too_large",
    )


def _decoded(data: bytes, limits: Limits, param: str) -> Any:
    """The image in RGB; the pixels are counted before they are decoded."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ApiError(
            'images need Pillow on the server: pip install "monoblock[vision]"', status=501, param=param
        ) from None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > limits.image_pixels:
                raise _too_many(f"{pixels:,}", limits, param)
            return image.convert("RGB")
    except ApiError:
        raise
    except Image.DecompressionBombError:
        raise _too_many("too many", limits, param) from None
    except Exception as error:  # a damaged file may raise anything
        raise _refused(
            f"the data is not a readable image of the types {', '.join(FORMATS)} ({type(error).__name__})",
            param,
        ) from None
