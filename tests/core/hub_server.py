"""A model hub on 127.0.0.1 for tests: the endpoints that huggingface_hub uses, fault injection, and a request log."""

import hashlib
import json
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import unquote, urlsplit

_CHUNK = 1 << 16  # bytes sent at once


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Faults:
    """Injected faults, by file name."""

    cut: dict[str, int] = field(default_factory=dict)  # close the connection once, after so many bytes
    reset: dict[str, int] = field(default_factory=dict)  # the same with a TCP reset
    hang: set[str] = field(default_factory=set)  # "HEAD x" or "GET x": never answer
    slow: set[str] = field(default_factory=set)  # pause a second between chunks
    status: dict[str, int] = field(default_factory=dict)  # "HEAD x" or "GET x": answer with this status


class HubServer:
    """Repositories in memory, served over HTTP within the `with` block.

    `add` makes a commit and points a branch at it. Repositories in `gated` answer 403 to everyone; `private` maps
    repositories to the token that they need.
    """

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.private: dict[str, str] = {}
        self.gated: set[str] = set()
        self.faults = Faults()
        self.log: list[Request] = []
        self.ended = threading.Event()

    def __enter__(self) -> Self:
        server = self

        class Handler(_Handler):
            hub = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()

    def add(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        commit = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        self.commits[repo, commit] = files
        self.branches[repo, branch] = commit
        return commit

    def requests(self, method: str, filename: str) -> list[Request]:
        return [r for r in self.log if r.method == method and r.path.endswith(f"/{filename}")]

    def find(self, repo: str, revision: str) -> str | None:
        """The commit of a branch or commit hash."""
        return revision if (repo, revision) in self.commits else self.branches.get((repo, revision))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: object) -> None:
        """Silent: requests are in `hub.log`."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(
            Request(self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        if path.startswith("/api/models/"):
            repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            self._info(repo, revision or "main")
        else:
            repo, _, rest = path[1:].partition("/resolve/")
            # Unquoting turns a branch name with slashes into several segments, so all branches are tried.
            for (owner, branch), _commit in [*self.hub.branches.items()]:
                if owner == repo and rest.startswith(f"{branch}/"):
                    return self._file(repo, branch, rest.removeprefix(f"{branch}/"))
            self._file(repo, *rest.split("/", 1))
        return None

    def _refused(self, repo: str) -> bool:
        token = self.headers.get("Authorization")
        known = any(owner == repo for owner, _ in self.hub.commits)
        if not known or self.hub.private.get(repo) not in (None, (token or "").removeprefix("Bearer ")):
            if token == "Bearer expired":
                self._fail(401, None, "Invalid credentials in Authorization header")
            else:  # like the hub: 401 without a token, whether or not the repository exists
                self._fail(404 if token else 401, "RepoNotFound", "Repository not found")
            return True
        return False

    def _info(self, repo: str, revision: str) -> None:
        commit = None if self._refused(repo) else self.hub.find(repo, revision)
        if commit:
            files = [{"rfilename": name} for name in self.hub.commits[repo, commit]]
            self._send(json.dumps({"id": repo, "sha": commit, "siblings": files}).encode(), {})

    def _file(self, repo: str, revision: str, filename: str) -> None:
        faults, ask = self.hub.faults, f"{self.command} {filename}"
        if ask in faults.hang:
            self.hub.ended.wait(30)
            self.close_connection = True
            return None
        if ask in faults.status:
            return self._fail(faults.status[ask], None, "Something is wrong")
        if self._refused(repo):
            return None
        if repo in self.hub.gated:
            return self._fail(403, "GatedRepo", "Access to this model is restricted")
        commit = self.hub.find(repo, revision)
        if commit is None:
            return self._fail(404, "RevisionNotFound", "Invalid rev id")
        headers = {"X-Repo-Commit": commit}
        content = self.hub.commits[repo, commit].get(filename)
        if content is None:
            return self._fail(404, "EntryNotFound", "Entry not found", headers)
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        return self._send(content, headers, filename)

    def _fail(
        self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "X-Error-Code": code, "X-Error-Message": message}.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, content: bytes, headers: dict[str, str], filename: str = "") -> None:
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for name, value in {**headers, "Content-Length": str(len(content) - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        faults = self.hub.faults
        limit = faults.cut.pop(filename, None)
        reset = faults.reset.pop(filename, None)
        end = next((n for n in (limit, reset) if n is not None), len(content))
        for offset in range(start, end, _CHUNK):
            self.wfile.write(content[offset : min(offset + _CHUNK, end)])
            if filename in faults.slow:
                self.hub.ended.wait(1)
        self.close_connection = end < len(content)
        if reset is not None:
            time.sleep(0.1)  # let the client read the bytes sent so far
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
