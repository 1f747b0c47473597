"""Download a model's files from the hub through huggingface_hub and its cache, with actionable errors.

huggingface_hub retries an unreachable server for minutes. Here the file's metadata is requested first, with a short
timeout, so that a missing network or a wrong name is reported within seconds, and a cached file is used instead.
"""

import importlib
import logging
import os
import re
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from monoblock.checkpoint.options import HubOptions
from monoblock.checkpoint.remote_errors import explain, names_of, status_of
from monoblock.errors import HubError

_log = logging.getLogger("monoblock")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ON = {"1", "ON", "YES", "TRUE"}  # values that huggingface_hub takes for true
_DOWNLOADS = 3  # attempts after connection failures that huggingface_hub does not retry
_PAUSE = 1.0  # seconds between attempts
_PARALLEL = 4  # concurrent downloads: enough to saturate a connection, few enough progress bars to read

# Transient failures, which are retried.
_PASSING = {"TimeoutException", "NetworkError", "RemoteProtocolError"}
_BROKEN = {"ReadError", "RemoteProtocolError"}  # a TCP reset, a truncated response
_PASSING_STATUS = {408, 500, 502, 503, 504}


class Remote:
    """The files of one hub repository. The first file found pins the commit of all later ones."""

    def __init__(self, repo: str, options: HubOptions):
        self._repo = repo
        self._options = options
        self._revision = options.revision or "main"
        self._hub: Any = importlib.import_module("huggingface_hub")
        self._constants: Any = importlib.import_module("huggingface_hub.constants")
        self._endpoint = (os.environ.get("HF_ENDPOINT") or self._constants.ENDPOINT).rstrip("/")
        self._cache = Path(options.cache_dir or self._constants.HF_HUB_CACHE).expanduser()
        self._home = self._cache / f"models--{repo.replace('/', '--')}"  # huggingface_hub's layout
        self._offline = options.local_files_only or self._offline_mode()
        if self._offline and options.force_download:
            raise HubError(
                "force_download=True needs the network, but offline mode is on: turn one of them off"
            )

    def __str__(self) -> str:
        if self._offline:
            return f"'{self._repo}' in the cache {self._cache} (offline mode, revision '{self._revision}')"
        return f"'{self._repo}' on {self._endpoint} (revision '{self._revision}')"

    def get(self, filename: str) -> Path | None:
        """The local path of a file, downloaded if necessary; None if the repository has no such file.

        `HubError`: this cannot be determined, or the download failed.
        """
        name = str(PurePosixPath(self._options.subfolder, filename))
        with self._explained(name):
            path = self._cached_only(name) if self._offline else self._fetched(name, None)
        if path is not None:
            self._revision = _commit(path, name)
        return path

    def get_all(self, filenames: Sequence[str]) -> list[Path | None]:
        """`get` for several files in parallel; the first failure or Ctrl-C stops the others."""
        names = [str(PurePosixPath(self._options.subfolder, filename)) for filename in filenames]
        if self._offline:
            return [self.get(filename) for filename in filenames]
        stop = threading.Event()
        bar = self._stoppable_bar(stop)

        def fetch(name: str) -> Path | None:
            with self._explained(name):
                return self._fetched(name, bar)

        with ThreadPoolExecutor(_PARALLEL) as pool:
            jobs = [pool.submit(fetch, name) for name in names]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        return [job.result() for job in jobs]

    def names(self) -> list[str]:
        """The names of the files, as far as they can be listed."""
        if self._offline:
            folder = self._snapshot()
            return (
                sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
                if folder
                else []
            )
        with suppress(Exception):  # used only in messages of other errors
            api = self._hub.HfApi(endpoint=self._endpoint, token=self._options.token)
            timeout = self._constants.HF_HUB_ETAG_TIMEOUT
            files: list[Any] = api.model_info(self._repo, revision=self._revision, timeout=timeout).siblings
            return sorted(str(file.rfilename) for file in files)
        return []

    def _offline_mode(self) -> bool:
        # Read the environment again: huggingface_hub read it when it was first imported.
        values = (os.environ.get("HF_HUB_OFFLINE"), os.environ.get("TRANSFORMERS_OFFLINE"))
        return bool(self._constants.HF_HUB_OFFLINE) or any((v or "").upper() in _ON for v in values)

    @contextmanager
    def _explained(self, name: str) -> Generator[None, None, None]:
        try:
            yield
        except HubError:
            raise
        except Exception as error:
            facts = {"repo": self._repo, "revision": self._revision, "file": name}
            raise explain(error, **facts, endpoint=self._endpoint, cache=self._cache) from error

    def _from_cache(self, name: str) -> tuple[Path | None, bool]:
        """A file's path in the cache, and whether the cache records that the repository has no such file."""
        found = self._hub.try_to_load_from_cache(
            self._repo, name, cache_dir=self._cache, revision=self._revision
        )
        return (Path(found), False) if isinstance(found, str) else (None, found is not None)

    def _snapshot(self) -> Path | None:
        """The cache folder of this revision, if it exists."""
        ref = self._home / "refs" / self._revision
        folder = self._home / "snapshots" / (ref.read_text().strip() if ref.is_file() else self._revision)
        return folder if folder.is_dir() else None

    def _cached_only(self, name: str) -> Path | None:
        path, _ = self._from_cache(name)
        if path is None and self._snapshot() is None:
            raise HubError(
                f"'{self._repo}' (revision '{self._revision}') is not in the cache {self._cache} and offline "
                "mode is on: fetch it once with the network, or give a local folder"
            )
        return path

    def _fetched(self, name: str, bar: Any) -> Path | None:
        path, known_absent = self._from_cache(name)
        fresh = self._options.force_download
        if path is not None and not fresh and _COMMIT.fullmatch(self._revision):
            return path  # files of a commit are immutable
        try:
            commit = self._remote_commit(name)
        except Exception as error:
            kinds = names_of(error)
            if "RemoteEntryNotFoundError" in kinds:
                self._note_absence(name, error)
                return None
            if fresh or "RevisionNotFoundError" in kinds or (path is None and not known_absent):
                raise
            _log.warning(
                "%s did not answer for '%s' (%s): using the cache", self._endpoint, self._repo, error
            )
            return path
        if path is not None and not fresh and _commit(path, name) == commit:
            return path
        return self._download(name, bar)

    def _remote_commit(self, name: str) -> str:
        """The commit of a file on the server."""
        url = self._hub.hf_hub_url(self._repo, name, revision=self._revision, endpoint=self._endpoint)
        request = partial(
            self._hub.get_hf_file_metadata,
            url,
            token=self._options.token,
            timeout=self._constants.HF_HUB_ETAG_TIMEOUT,
            endpoint=self._endpoint,
        )
        try:
            found = request()
        except Exception as error:
            if not (names_of(error) & _PASSING or status_of(error) in _PASSING_STATUS):
                raise
            time.sleep(_PAUSE)
            found = request()
        if not found.commit_hash or not found.etag:
            raise HubError(
                f"{self._endpoint} does not respond like a model hub (no commit or ETag for {name} of "
                f"'{self._repo}'): check HF_ENDPOINT and proxy settings"
            )
        return found.commit_hash

    def _download(self, name: str, bar: Any) -> Path:
        for _ in range(_DOWNLOADS - 1):
            try:
                return self._download_once(name, bar)
            except Exception as error:
                if not names_of(error) & _BROKEN:
                    raise
                _log.warning(
                    "the connection was lost during the download of %s of '%s': retrying", name, self._repo
                )
            time.sleep(_PAUSE)
        return self._download_once(name, bar)

    def _download_once(self, name: str, bar: Any) -> Path:
        return Path(
            self._hub.hf_hub_download(
                self._repo,
                name,
                revision=self._revision,
                token=self._options.token,
                cache_dir=self._cache,
                force_download=self._options.force_download,
                endpoint=self._endpoint,
                etag_timeout=self._constants.HF_HUB_ETAG_TIMEOUT,
                tqdm_class=bar,
            )
        )

    def _note_absence(self, name: str, error: Any) -> None:
        """Record in the cache, in huggingface_hub's format, that this commit has no such file."""
        commit = error.response.headers.get("X-Repo-Commit")
        if commit and _COMMIT.fullmatch(commit):
            note = self._home / ".no_exist" / commit / name
            with suppress(OSError):  # the cache may be read-only
                note.parent.mkdir(parents=True, exist_ok=True)
                note.touch()

    def _stoppable_bar(self, stop: threading.Event) -> Any:
        """huggingface_hub's progress bar, which aborts its download after `stop` is set."""
        base: Any = importlib.import_module("huggingface_hub.utils").tqdm

        def update(bar: Any, n: float | None = 1) -> Any:
            if stop.is_set():
                raise HubError("stopped because another file of the model failed")
            return base.update(bar, n)

        return type("StoppableBar", (base,), {"update": update})


def _commit(path: Path, name: str) -> str:
    """The commit in a cache path `.../snapshots/<commit>/<name>`."""
    return path.parents[len(PurePosixPath(name).parts) - 1].name
