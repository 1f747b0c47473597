"""Files of a model on the hub, through huggingface_hub and its cache, with errors that say what to do.

huggingface_hub retries an unreachable server for minutes before it gives up; here a short look at the file's
metadata comes first, so that a missing network or a wrong name is told within seconds, and a cached file is
used instead.
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
_ON = {"1", "ON", "YES", "TRUE"}  # huggingface_hub's spellings of a switch that is on
_DOWNLOADS = 3  # times a download is started whose breaks huggingface_hub does not mend itself
_PAUSE = 1.0  # seconds before another try
_PARALLEL = 4  # files fetched at once: enough to fill a line, few enough progress bars to read

# Failures that say nothing about the model: another try may do.
_PASSING = {"TimeoutException", "NetworkError", "RemoteProtocolError"}
_BROKEN = {"ReadError", "RemoteProtocolError"}  # a TCP reset, an answer that ends too early
_PASSING_STATUS = {408, 500, 502, 503, 504}


class Remote:
    """The files of one model on the hub. The first file that is found fixes the commit of all that follow."""

    def __init__(self, repo: str, options: HubOptions):
        self._repo = repo
        self._options = options
        self._revision = options.revision or "main"
        self._hub: Any = importlib.import_module("huggingface_hub")
        self._constants: Any = importlib.import_module("huggingface_hub.constants")
        self._endpoint = (os.environ.get("HF_ENDPOINT") or self._constants.ENDPOINT).rstrip("/")
        self._cache = Path(options.cache_dir or self._constants.HF_HUB_CACHE).expanduser()
        self._home = self._cache / f"models--{repo.replace('/', '--')}"  # huggingface_hub's layout
        self._offline = options.local_files_only or self._switched_off()
        if self._offline and options.force_download:
            raise HubError(
                "force_download=True needs the network, but offline mode is on: switch one of them off"
            )

    def __str__(self) -> str:
        if self._offline:
            return f"'{self._repo}' in the cache {self._cache} (offline mode, revision '{self._revision}')"
        return f"'{self._repo}' on {self._endpoint} (revision '{self._revision}')"

    def get(self, filename: str) -> Path | None:
        """The local path of a file, fetched if need be; None if the model has no such file.

        `HubError`: whether there is one cannot be found out, or it cannot be had.
        """
        name = str(PurePosixPath(self._options.subfolder, filename))
        with self._explained(name):
            path = self._cached_only(name) if self._offline else self._fetched(name, None)
        if path is not None:
            self._revision = _commit(path, name)
        return path

    def get_all(self, filenames: Sequence[str]) -> list[Path | None]:
        """`get` for many files, several at once; the first failure or Ctrl-C stops the rest."""
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
        """The files there, as far as they can be listed."""
        if self._offline:
            folder = self._snapshot()
            return (
                sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
                if folder
                else []
            )
        with suppress(Exception):  # only ever part of an error that is about something else
            api = self._hub.HfApi(endpoint=self._endpoint, token=self._options.token)
            timeout = self._constants.HF_HUB_ETAG_TIMEOUT
            files: list[Any] = api.model_info(self._repo, revision=self._revision, timeout=timeout).siblings
            return sorted(str(file.rfilename) for file in files)
        return []

    def _switched_off(self) -> bool:
        # The environment is read again: huggingface_hub read it when it was imported, maybe by someone else.
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
        """A file's path in the cache, and whether the cache knows that the model has no such file."""
        found = self._hub.try_to_load_from_cache(
            self._repo, name, cache_dir=self._cache, revision=self._revision
        )
        return (Path(found), False) if isinstance(found, str) else (None, found is not None)

    def _snapshot(self) -> Path | None:
        """The folder of the cache that holds this revision, if any of it is there."""
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
            return path  # a commit's files never change
        try:
            commit = self._look(name)
        except Exception as error:
            kinds = names_of(error)
            if "RemoteEntryNotFoundError" in kinds:
                self._note_absence(name, error)
                return None
            if fresh or "RevisionNotFoundError" in kinds or (path is None and not known_absent):
                raise
            _log.warning(
                "%s cannot be asked about '%s' (%s): using the cache", self._endpoint, self._repo, error
            )
            return path
        if path is not None and not fresh and _commit(path, name) == commit:
            return path
        return self._download(name, bar)

    def _look(self, name: str) -> str:
        """The commit that the server has for a file."""
        url = self._hub.hf_hub_url(self._repo, name, revision=self._revision, endpoint=self._endpoint)
        ask = partial(
            self._hub.get_hf_file_metadata,
            url,
            token=self._options.token,
            timeout=self._constants.HF_HUB_ETAG_TIMEOUT,
            endpoint=self._endpoint,
        )
        try:
            seen = ask()
        except Exception as error:
            if not (names_of(error) & _PASSING or status_of(error) in _PASSING_STATUS):
                raise
            time.sleep(_PAUSE)
            seen = ask()
        if not seen.commit_hash or not seen.etag:
            raise HubError(
                f"{self._endpoint} does not answer like a model hub (no commit or ETag for {name} of "
                f"'{self._repo}'): check HF_ENDPOINT and proxy settings"
            )
        return seen.commit_hash

    def _download(self, name: str, bar: Any) -> Path:
        for _ in range(_DOWNLOADS - 1):
            try:
                return self._download_once(name, bar)
            except Exception as error:
                if not names_of(error) & _BROKEN:
                    raise
                _log.warning("the connection broke during %s of '%s': trying again", name, self._repo)
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
        """Tell the cache, in huggingface_hub's own way, that this commit has no such file."""
        commit = error.response.headers.get("X-Repo-Commit")
        if commit and _COMMIT.fullmatch(commit):
            note = self._home / ".no_exist" / commit / name
            with suppress(OSError):  # a cache that is read-only still serves
                note.parent.mkdir(parents=True, exist_ok=True)
                note.touch()

    def _stoppable_bar(self, stop: threading.Event) -> Any:
        """huggingface_hub's progress bar, which ends its download soon after `stop` is set."""
        base: Any = importlib.import_module("huggingface_hub.utils").tqdm

        def update(bar: Any, n: float | None = 1) -> Any:
            if stop.is_set():
                raise HubError("stopped because another file of the model failed")
            return base.update(bar, n)

        return type("StoppableBar", (base,), {"update": update})


def _commit(path: Path, name: str) -> str:
    """The commit in a path of the cache, `.../snapshots/<commit>/<name>`."""
    return path.parents[len(PurePosixPath(name).parts) - 1].name
