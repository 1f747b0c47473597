"""Saves are atomic: when killed, with concurrent saves and readers, on a full disk, and with corrupt journals."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kill_points
import numpy as np
import pytest
import save_cases
from save_cases import CASES

from monoblock.checkpoint import transaction
from monoblock.checkpoint.folder import new_folder
from monoblock.checkpoint.hub import HubOptions, consistent_read, find_file, find_weights
from monoblock.checkpoint.journal import COMMIT, STAGE
from monoblock.checkpoint.msgpack_save import save_msgpack
from monoblock.checkpoint.save import save_tensors
from monoblock.checkpoint.store import open_store
from monoblock.checkpoint.transaction import staged, write_atomically
from monoblock.errors import CheckpointError, HubError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs renameat2 and fork")

SAMPLE = 6  # kill points of a case; `make fuzz` tries all of them
ROUNDS = 25


@pytest.fixture(autouse=True)
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables fsync: the tests simulate no power failure."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The path of a model in its own parent folder."""
    (tmp_path / "parent").mkdir()
    return tmp_path / "parent" / "model"


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_exchange(first: Path, second: Path) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(transaction, "exchange", no_exchange)


# --- killed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_commit_method_and_remaining_files(folder: Path, name: str) -> None:
    case = CASES[name]
    case.prepare(folder)
    found = kill_points.operations(lambda: case.do(folder))
    assert ("exchange" in found) == (case.by == "exchange")
    assert save_cases.model_in(folder) == 2
    assert not save_cases.leftovers(folder)
    for other, text in case.others.items():
        assert (folder / other).is_file() == case.stays
        assert not case.stays or (folder / other).read_text() == text


@pytest.mark.parametrize("name", CASES)
def test_killed(folder: Path, name: str) -> None:
    CASES[name].killed(folder, SAMPLE)


@pytest.mark.parametrize("others", [{}, {"runs/log": "x"}])
def test_killed_while_a_tokenizer_is_saved(folder: Path, others: dict[str, str]) -> None:
    """The files of a tokenizer are replaced atomically, and the model next to them is unchanged."""

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        save_cases.save(folder, 1)
        save_cases.save_tokenizer(folder, 1)
        for name, text in others.items():
            (folder / name).parent.mkdir()
            (folder / name).write_text(text)

    prepare()
    count = len(kill_points.operations(lambda: save_cases.save_tokenizer(folder, 2)))
    for at in kill_points.spread(count, 12):
        prepare()
        assert kill_points.killed(lambda: save_cases.save_tokenizer(folder, 2), at) == (at < count)
        assert save_cases.tokenizer_tags(folder) in ({1}, {2})
        assert save_cases.model_in(folder) == 1


def test_killed_while_flax_weights_are_saved(folder: Path) -> None:
    """The old and the new model have the same number of msgpack shards, which have no metadata."""
    save_cases.save_flax(folder, 1, per_shard=1)
    count = len(kill_points.operations(lambda: save_cases.save_flax(folder, 2, per_shard=1)))
    for at in kill_points.spread(count, SAMPLE):
        shutil.rmtree(folder)
        save_cases.save_flax(folder, 1, per_shard=1)
        (folder / "checkpoint-1").mkdir()
        kill_points.killed(lambda: save_cases.save_flax(folder, 2, per_shard=1), at)
        assert save_cases.model_in(folder) in (1, 2)


def test_killed_during_recovery(folder: Path) -> None:
    """A load completes a committed save from the journal, and may be killed, too."""
    case = CASES["trainer, to shards"]
    case.prepare(folder)
    committed = kill_points.operations(lambda: case.do(folder)).index("os.chmod") + 2
    case.prepare(folder)
    kill_points.killed(lambda: case.do(folder), committed)
    shutil.copytree(folder, folder.with_name("copy"))
    count = len(kill_points.operations(lambda: save_cases.model_in(folder)))
    assert count > 5
    for at in range(count):
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name("copy"), folder)
        assert kill_points.killed(lambda: save_cases.model_in(folder), at)
        assert save_cases.model_in(folder) == 2


@pytest.mark.parametrize("name", ["same layout", "to shards", "from shards", "replaced"])
def test_journal_if_the_system_cannot_exchange_folders(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_exchange(monkeypatch)
    case = CASES[name]
    CASES[name].__class__(before=case.before, do=case.do, by="journal", stays=case.stays).killed(
        folder, SAMPLE
    )


def test_staging_within_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the parent folder is not writable or is on another file system."""
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.parent == folder and Path(target).parent == folder.parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    case = CASES["from shards"]
    CASES["from shards"].__class__(before=case.before, do=case.do, by="journal").killed(folder, SAMPLE)


def test_files_written_by_others_during_a_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are created or replaced just before the exchange are kept."""
    save_cases.save(folder, 1)
    (folder / "README.md").write_text("old")
    exchange = transaction.exchange

    def late(first: Path, second: Path) -> None:
        (folder / "log").write_text("new")
        (folder / "new").write_text("new")
        (folder / "new").replace(folder / "README.md")
        exchange(first, second)

    monkeypatch.setattr(transaction, "exchange", late)
    save_cases.save(folder, 2)
    assert save_cases.model_in(folder) == 2
    assert [(folder / name).read_text() for name in ("log", "README.md")] == ["new", "new"]
    assert not save_cases.leftovers(folder)


def test_staging_folders_of_other_processes_and_machines_are_kept(folder: Path) -> None:
    """Only those of ended processes of this machine and user are removed."""
    save_cases.save(folder, 1)
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    mine = os.uname().nodename
    others = [
        f"{STAGE}elsewhere-{dead.stdout.strip()}-00",
        f"{STAGE}{mine}-{os.getpid()}-00",
        f"{STAGE}{mine}",
        f"{STAGE}x-y-z",
    ]
    stale = f"{STAGE}{mine}-{dead.stdout.strip()}-00"
    for name in (*others, stale):
        (folder.parent / name / "files").mkdir(parents=True)
    save_cases.save(folder, 2)
    assert sorted(path.name for path in folder.parent.glob(".*")) == sorted(others)


# --- concurrency -----------------------------------------------------------------------------------------


def many(folder: Path, first: int, rounds: int) -> None:
    """Saves of models and tokenizers with different layouts; tags count up from `first`."""
    for i in range(rounds):
        save_cases.save(folder, first + i, per_shard=1 + (first + i) % 3)
        save_cases.save_tokenizer(folder, first + i)


def reading(folder: Path, stop: threading.Event, wrong: list[BaseException]) -> None:
    while not stop.is_set():
        try:
            save_cases.model_in(folder)
        except BaseException as error:
            wrong.append(error)
            return


@pytest.mark.parametrize("others", [{}, {"checkpoint-1/optimizer.pt": "x"}])
def test_four_threads(folder: Path, others: dict[str, str]) -> None:
    """The last save remains, complete; a concurrent reader sees no mixture."""
    save_cases.save(folder, 1)
    for name, text in others.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(text)
    stop, wrong = threading.Event(), list[BaseException]()
    reader = threading.Thread(target=reading, args=(folder, stop, wrong))
    reader.start()
    savers = [threading.Thread(target=many, args=(folder, 100 * n, ROUNDS // 4)) for n in range(1, 5)]
    for saver in savers:
        saver.start()
    for saver in savers:
        saver.join()
    stop.set()
    reader.join()
    if wrong:
        raise wrong[0]
    assert (save_cases.model_in(folder) or 0) > 99
    assert len(save_cases.tokenizer_tags(folder)) == 1
    assert not save_cases.leftovers(folder)


def test_four_processes(folder: Path) -> None:
    save_cases.save(folder, 1)
    processes: list[int] = []
    for n in range(1, 5):
        processes.append(os.fork())
        if not processes[-1]:
            status = 1
            try:
                many(folder, 100 * n, ROUNDS // 4)
                status = 0
            finally:
                os._exit(status)
    running = set(processes)
    while running:
        save_cases.model_in(folder)
        for process in list(running):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                running.remove(process)
                assert status == 0
    assert (save_cases.model_in(folder) or 0) > 99
    assert len(save_cases.tokenizer_tags(folder)) == 1
    assert not save_cases.leftovers(folder)


def test_lock_of_a_killed_process(folder: Path) -> None:
    """The lock is released with the process; its file is reused and removed."""
    save_cases.save(folder, 1)
    code = f"""
import os, signal
from pathlib import Path
from monoblock.checkpoint.locks import locked
with locked(Path({str(folder)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert (folder / ".monoblock-lock").exists()
    save_cases.save(folder, 2)
    assert save_cases.model_in(folder) == 2
    assert not save_cases.leftovers(folder)


def test_a_symlink_instead_of_the_lock_file_is_refused(folder: Path, tmp_path: Path) -> None:
    save_cases.save(folder, 1)
    (tmp_path / "secret").write_text("x")
    (folder / ".monoblock-lock").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="cannot save into"):
        save_cases.save(folder, 2)
    assert (tmp_path / "secret").read_text() == "x"
    assert save_cases.model_in(folder) == 1


# --- failing operations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_full_disk(folder: Path, name: str) -> None:
    """If one operation fails, the old model remains without temporary files, or the new one is complete."""
    case = CASES[name]
    case.prepare(folder)
    count = len(kill_points.operations(lambda: case.do(folder)))
    for at in kill_points.spread(count, 2 * SAMPLE):
        case.prepare(folder)
        before = save_cases.model_in(folder)
        try:
            with kill_points.failing(at):
                case.do(folder)
        except CheckpointError as error:
            message = str(error)
            assert "No space left" in message
            committed = "the next load or save" in message or "holds all the new files" in message
            assert save_cases.model_in(folder) == (2 if committed else before)
        else:
            assert save_cases.model_in(folder) == 2
        case.check(folder)


@pytest.mark.parametrize("limit", [0, 100, 1300])
@pytest.mark.parametrize("name", ["to shards", "trainer, from shards", "replaced"])
def test_file_size_limit(folder: Path, name: str, limit: int) -> None:
    case = CASES[name]
    case.prepare(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            case.do(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not save_cases.leftovers(folder)
    assert save_cases.model_in(folder) == 1


def as_nobody(do: Callable[[], object]) -> int:
    """The exit status of an unprivileged process that does this; 7 for a CheckpointError about permissions."""
    process = os.fork()
    if not process:
        status = 1
        try:
            if not os.geteuid():
                os.setgid(65534)
                os.setuid(65534)
            do()
            status = 0
        except CheckpointError as error:
            status = 7 if "Permission denied" in str(error) else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Like `folder`, for other users. Not in pytest's folder, which each pytest that starts closes to them."""
    with tempfile.TemporaryDirectory(prefix="monoblock-") as top:
        Path(top).chmod(0o755)
        (Path(top) / "parent").mkdir(mode=0o755)
        yield Path(top) / "parent" / "model"


def test_read_only_folder(open_folder: Path) -> None:
    folder = open_folder
    save_cases.save(folder, 1)
    folder.chmod(0o555)
    folder.parent.chmod(0o555)
    try:
        assert as_nobody(lambda: save_cases.save(folder, 2)) == 7
        assert as_nobody(lambda: save_cases.save(folder.with_name("other"), 2)) == 7
    finally:
        folder.parent.chmod(0o755)
        folder.chmod(0o755)
    assert save_cases.model_in(folder) == 1
    assert not save_cases.leftovers(folder)


def test_interrupted_save_in_a_read_only_folder(open_folder: Path) -> None:
    """A reader that cannot write reads the complete new model from the staged files."""
    folder = open_folder
    case = CASES["trainer, from shards"]
    case.prepare(folder)
    committed = kill_points.operations(lambda: case.do(folder)).index("os.chmod") + 2
    for at in range(committed, committed + 12):
        case.prepare(folder)
        kill_points.killed(lambda: case.do(folder), at)
        for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            path.chmod(0o555)

        def read() -> None:
            assert save_cases.model_in(folder) == 2

        assert as_nobody(read) == 0
        for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            path.chmod(0o755)


# --- the user's folder -----------------------------------------------------------------------------------


def test_permissions_and_other_files_are_kept(folder: Path) -> None:
    save_cases.save(folder, 1)
    (folder / "notes").write_text("mine")
    (folder / "link").symlink_to("notes")
    (folder / "away").symlink_to("/nowhere")
    os.link(folder / "notes", folder.parent / "second name")
    folder.chmod(0o750)
    inode = (folder / "notes").stat().st_ino
    assert "exchange" in kill_points.operations(lambda: save_cases.save(folder, 2, per_shard=1))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert (folder / "notes").stat().st_ino == inode
    assert (folder / "link").readlink() == Path("notes")
    assert (folder / "away").readlink() == Path("/nowhere")
    assert stat.S_IMODE((folder / "config.json").stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_working_directories_are_not_exchanged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose working directory is exchanged would stay in the old one."""
    save_cases.save(folder, 1)
    inode = folder.stat().st_ino
    with subprocess.Popen(["sleep", "60"], cwd=folder) as other:
        save_cases.save(folder, 2, per_shard=1)
        assert folder.stat().st_ino == inode
        other.kill()
    monkeypatch.chdir(folder)
    save_cases.save(Path(), 3)
    assert (folder.stat().st_ino, save_cases.model_in(Path())) == (inode, 3)
    monkeypatch.chdir("/")
    save_cases.save(folder, 4, per_shard=1)
    assert folder.stat().st_ino != inode


def test_saving_through_a_symlink(folder: Path) -> None:
    save_cases.save(folder, 1)
    latest = folder.with_name("latest")
    latest.symlink_to("model")
    save_cases.save(latest, 2, per_shard=2)
    assert latest.is_symlink()
    assert save_cases.model_in(folder) == save_cases.model_in(latest) == 2
    latest.unlink()
    latest.symlink_to("not there yet")
    save_cases.save(latest, 3)
    assert save_cases.model_in(folder.with_name("not there yet")) == 3


def test_folders_with_named_pipes(folder: Path) -> None:
    """A named pipe cannot be hard-linked, so the journal is used."""
    save_cases.save(folder, 1)
    os.mkfifo(folder / "pipe")
    save_cases.save(folder, 2, per_shard=1)
    assert save_cases.model_in(folder) == 2
    assert stat.S_ISFIFO((folder / "pipe").stat().st_mode)
    (folder / "pipe").unlink()
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json is a folder"):
        save_cases.save(folder, 3)


def test_symlinked_subfolders_are_refused(folder: Path, tmp_path: Path) -> None:
    save_cases.save(folder, 1)
    (tmp_path / "elsewhere").mkdir()
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a file or a link"):
        save_cases.save_tokenizer(folder, 2)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert save_cases.model_in(folder) == 1


def test_staging_folders_are_private_with_random_names(folder: Path) -> None:
    names: set[str] = set()
    for _ in range(2):
        with staged(folder) as stage:
            names.add(stage.files.parent.name)
            assert stat.S_IMODE(stage.files.parent.stat().st_mode) == 0o700
            stage.write("a", "1")
            with pytest.raises(FileExistsError):
                stage.open("a")
            (stage.files / "b").symlink_to(folder / "target")
            with pytest.raises(FileExistsError):
                stage.open("b")
            (stage.files / "b").unlink()
    assert len(names) == 2


def test_unchanged_files_are_not_written(folder: Path) -> None:
    """A save that changes only the weights is one rename."""
    save_cases.save_again(folder, 1)
    config = (folder / "config.json").stat()
    assert kill_points.operations(lambda: save_cases.save_again(folder, 2)).count("exchange") == 0
    assert (folder / "config.json").stat().st_ino == config.st_ino
    before = folder.stat().st_ino, sorted(folder.iterdir())
    save_cases.save_again(folder, 2)
    assert (folder.stat().st_ino, sorted(folder.iterdir())) == before


# --- files of two saves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["model-00002-of-00003.safetensors", "model.safetensors.index.json"])
def test_mixed_shards_are_refused(tmp_path: Path, which: str) -> None:
    """Shards and index have the id of their save; an index without an id is accepted."""
    for tag in (1, 2):
        save_cases.save(tmp_path / str(tag), tag, per_shard=1)
    shutil.copy(tmp_path / "1" / which, tmp_path / "2" / which)
    with pytest.raises(CheckpointError, match="weights of two saves"):
        open_store(find_weights(tmp_path / "2"), "np")
    index = tmp_path / "2" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["metadata"]["save_id"]
    index.write_text(json.dumps(content))
    if which.endswith(".json"):
        open_store(find_weights(tmp_path / "2"), "np")
    else:
        with pytest.raises(CheckpointError, match="weights of two saves"):
            open_store(find_weights(tmp_path / "2"), "np")


@pytest.mark.parametrize("size", [8, 200_000])
@pytest.mark.parametrize("which", ["flax_model-00002-of-00002.msgpack", "flax_model.msgpack.index.json"])
def test_mixture_of_msgpack_shards(tmp_path: Path, which: str, size: int) -> None:
    """The format has no metadata, so the index has fingerprints of the shards: of all bytes, or of samples."""
    for tag in (1, 2):
        leaves = {name: np.full(size, tag + i, np.float32) for i, name in enumerate("ab")}
        save_msgpack(tmp_path / str(tag), leaves, max_shard_size=4 * size)
    open_store(find_weights(tmp_path / "2"), "np")
    shutil.copy(tmp_path / "1" / which, tmp_path / "2" / which)
    with pytest.raises(CheckpointError, match=r"weights of two saves: flax_model-0000\d-of-00002\.msgpack"):
        open_store(find_weights(tmp_path / "2"), "np")
    index = tmp_path / "2" / "flax_model.msgpack.index.json"
    content = json.loads(index.read_text())
    del content["metadata"]["fingerprints"]
    index.write_text(json.dumps(content))
    open_store(find_weights(tmp_path / "2"), "np")


def test_single_files_are_reproducible(tmp_path: Path) -> None:
    for name in "ab":
        save_cases.save(tmp_path / name, 1)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_open_stores_are_unaffected_by_saves(folder: Path) -> None:
    big = {"a": np.full((600, 1024), 1.0, np.float32), "b": np.full((600, 1024), 2.0, np.float32)}
    save_tensors(folder, big, framework="np")
    store = open_store(find_weights(folder), "np")
    save_tensors(folder, {name: -array[:300] for name, array in big.items()}, framework="np")
    for _ in range(2):
        assert all(np.array_equal(store.tensor(name), big[name]) for name in big)
        assert np.array_equal(store.concatenated(["b", "a"]), np.concatenate([big["b"], big["a"]]))


def test_readers_retry_after_a_concurrent_save(folder: Path) -> None:
    save_cases.save(folder, 1)
    tags: list[Any] = []

    def read() -> tuple[Any, Any]:
        path = find_file(folder, "config.json")
        assert path is not None
        first = json.loads(path.read_text())["tag"]
        if not tags:
            save_cases.save(folder, 2, per_shard=1)
        tags.append(first)
        return first, float(open_store(find_weights(folder), "np").tensor("a.weight")[0])

    assert consistent_read(folder, HubOptions(), read) == (2, 2.0)
    assert tags == [1, 2]

    def never() -> None:
        save_cases.save(folder, 2 + len(tags), per_shard=1)
        tags.append(0)

    with pytest.raises(CheckpointError, match="was changed by other saves"):
        consistent_read(folder, HubOptions(), never)

    def gone() -> None:
        raise HubError("not there")

    with pytest.raises(HubError, match="not there"):
        consistent_read(folder, HubOptions(), gone)


def test_readers_retry_if_saves_are_being_committed_at_both_ends(folder: Path) -> None:
    """config.json is absent during every commit, so both ends look alike but for the journal's own folder."""
    CASES["trainer, to shards"].prepare(folder)
    copy = folder.with_name("copy")

    def half_committed(tag: int) -> None:
        shutil.copytree(folder, copy)
        found = kill_points.operations(lambda: save_cases.save(copy, tag, per_shard=1))
        shutil.rmtree(copy)
        after = found.index("os.chmod") + 4  # after it: into the folder, fsync, config.json removed
        assert kill_points.killed(lambda: save_cases.save(folder, tag, per_shard=1), after)
        assert (folder / COMMIT).is_dir() and not (folder / "config.json").exists()

    half_committed(2)
    tags: list[int] = []

    def read() -> int:
        if len(tags) < 2:
            store = open_store(find_weights(folder), "np")  # completes the save
            tags.append(int(store.tensor("a.weight")[0]))
            half_committed(tags[-1] + 1)
        else:
            tags.append(int(open_store(find_weights(folder), "np").tensor("a.weight")[0]))
        return tags[-1]

    assert consistent_read(folder, HubOptions(), read) == 4
    assert tags[:3] == [2, 3, 4]


# --- invalid journals ------------------------------------------------------------------------------------


def journal(folder: Path, fields: dict[str, Any] | None = None) -> Path:
    save_cases.save(folder, 1)
    commit = folder / COMMIT
    (commit / "files").mkdir(parents=True)
    content = {
        "put": [],
        "remove": [],
        "kept": {},
        "folder": folder.name,
        "replaced": [0, 0],
        **(fields or {}),
    }
    (commit / "journal.json").write_text(json.dumps(content))
    return commit


@pytest.mark.parametrize(
    "fields",
    [
        {"remove": ["../secret"]},
        {"remove": ["/etc/x"]},
        {"remove": ["a\\..\\b"]},
        {"remove": [3]},
        {"remove": [""]},
        {"put": ["../secret"]},
        {"put": 3},
        {"put": {"a": 1}},
        {"folder": "../x"},
        {"folder": 3},
        {"more": 1},
    ],
)
def test_journals_with_paths_outside_the_folder_are_refused(folder: Path, fields: dict[str, Any]) -> None:
    (folder.parent / "secret").write_text("x")
    journal(folder, fields)
    for call in (lambda: save_cases.model_in(folder), lambda: save_cases.save(folder, 2)):
        with pytest.raises(CheckpointError, match="no valid journal of a save"):
            call()
    assert (folder.parent / "secret").read_text() == "x"


def test_journals_do_not_follow_symlinks(folder: Path, tmp_path: Path) -> None:
    """Symlinks of an untrusted folder are neither read nor written through."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "key").write_text("secret")
    commit = journal(folder, {"put": ["key"], "remove": ["way/key"]})
    (commit / "files").rmdir()
    (commit / "files").symlink_to(outside)
    (folder / "way").symlink_to(outside)
    assert save_cases.model_in(folder) == 1
    assert (outside / "key").read_text() == "secret"
    assert not (folder / "key").exists()
    shutil.rmtree(folder)
    commit = journal(folder, {"put": ["way/key"]})
    (folder / "way").symlink_to(outside)
    (commit / "files" / "way").mkdir()
    (commit / "files" / "way" / "key").write_text("other")
    with pytest.raises(CheckpointError, match="is a file or a link"):
        save_cases.model_in(folder)
    assert (outside / "key").read_text() == "secret"
    shutil.rmtree(commit)
    commit.symlink_to(outside)
    (outside / "journal.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no valid journal of a save"):
        save_cases.model_in(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{", b"\xff", b"[" * 100_000, None])
def test_corrupt_journals_are_refused(folder: Path, content: bytes | None) -> None:
    commit = journal(folder)
    path = commit / "journal.json"
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="no valid journal of a save"):
        save_cases.model_in(folder)


def test_a_file_instead_of_the_journal_folder_is_refused(folder: Path) -> None:
    save_cases.save(folder, 1)
    (folder / COMMIT).write_text("x")
    for call in (lambda: save_cases.model_in(folder), lambda: save_cases.save(folder, 2)):
        with pytest.raises(CheckpointError, match="no valid journal of a save"):
            call()


# --- new folders -----------------------------------------------------------------------------------------


def test_new_folder_refuses_existing_files_and_subfolders(folder: Path) -> None:
    save_cases.save(folder, 1)
    with pytest.raises(CheckpointError, match="holds files already"), new_folder(folder, replace=False):
        pass
    (folder / "checkpoint-1").mkdir()
    with pytest.raises(CheckpointError, match="has a subfolder"), new_folder(folder, replace=True):
        pass
    assert save_cases.model_in(folder) == 1


def test_atomic_write_of_one_file(folder: Path) -> None:
    """Killed at any operation, it is the old or the new file."""
    path = folder / "session.json"

    def write(text: str) -> None:
        write_atomically(path, lambda staged: staged.write_text(text))

    write("old")
    count = len(kill_points.operations(lambda: write("new")))
    for at in range(count):
        path.write_text("old")
        assert kill_points.killed(lambda: write("new"), at)
        assert path.read_text() in ("old", "new")
    write("new")
    assert not save_cases.leftovers(folder)
