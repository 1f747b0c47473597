"""A save leaves the whole old model or the whole new one: killed anywhere, beside others, on a full disk."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kill_points
import numpy as np
import pytest
import save_cases as made
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

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a folder is exchanged, and processes fork")

SAMPLE = 6  # kill points of a case; `make fuzz` takes all of them
ROUNDS = 25


@pytest.fixture(autouse=True)
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be on the disk may stay in memory: the machine does not fail here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a model is to be, in a place of its own."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "model"


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_exchange(first: Path, second: Path) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(transaction, "exchange", no_exchange)


# --- killed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_how_a_save_comes_there(folder: Path, name: str) -> None:
    """The cases are what they say they are, and leave nothing but the model and the files of others."""
    case = CASES[name]
    case.made(folder)
    found = kill_points.operations(lambda: case.do(folder))
    assert ("exchange" in found) == (case.by == "exchange")
    assert made.model_in(folder) == 2
    assert not made.litter(folder)
    for other, text in case.others.items():
        assert (folder / other).is_file() == case.stays
        assert not case.stays or (folder / other).read_text() == text


@pytest.mark.parametrize("name", CASES)
def test_killed(folder: Path, name: str) -> None:
    CASES[name].killed(folder, SAMPLE)


@pytest.mark.parametrize("others", [{}, {"runs/log": "x"}])
def test_killed_while_a_tokenizer_is_saved(folder: Path, others: dict[str, str]) -> None:
    """Several small files belong together as well; the model beside them stays."""

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        made.save(folder, 1)
        made.save_texts(folder, 1)
        for name, text in others.items():
            (folder / name).parent.mkdir()
            (folder / name).write_text(text)

    prepare()
    count = len(kill_points.operations(lambda: made.save_texts(folder, 2)))
    for at in kill_points.spread(count, 12):
        prepare()
        assert kill_points.killed(lambda: made.save_texts(folder, 2), at) == (at < count)
        assert made.texts_in(folder) in ({1}, {2})
        assert made.model_in(folder) == 1


def test_killed_while_flax_weights_are_saved(folder: Path) -> None:
    """Shards of a format without metadata, of the same number."""
    made.save_flax(folder, 1, per_shard=1)
    count = len(kill_points.operations(lambda: made.save_flax(folder, 2, per_shard=1)))
    for at in kill_points.spread(count, SAMPLE):
        shutil.rmtree(folder)
        made.save_flax(folder, 1, per_shard=1)
        (folder / "checkpoint-1").mkdir()
        kill_points.killed(lambda: made.save_flax(folder, 2, per_shard=1), at)
        assert made.model_in(folder) in (1, 2)


def test_killed_while_it_completes_a_save(folder: Path) -> None:
    """A load that completes another program's save may be killed in turn."""
    case = CASES["trainer, to shards"]
    case.made(folder)
    committed = kill_points.operations(lambda: case.do(folder)).index("os.chmod") + 2
    case.made(folder)
    kill_points.killed(lambda: case.do(folder), committed)
    shutil.copytree(folder, folder.with_name("copy"))
    count = len(kill_points.operations(lambda: made.model_in(folder)))
    assert count > 5
    for at in range(count):
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name("copy"), folder)
        assert kill_points.killed(lambda: made.model_in(folder), at)
        assert made.model_in(folder) == 2


@pytest.mark.parametrize("name", ["same layout", "to shards", "from shards", "replaced"])
def test_without_an_exchange(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has none: the journal."""
    without_exchange(monkeypatch)
    case = CASES[name]
    CASES[name].__class__(before=case.before, do=case.do, by="journal", stays=case.stays).killed(
        folder, SAMPLE
    )


def test_place_beside_the_folder_that_is_not_writable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or another file system: then the new files are written inside."""
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.parent == folder and Path(target).parent == folder.parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    case = CASES["from shards"]
    CASES["from shards"].__class__(before=case.before, do=case.do, by="journal").killed(folder, SAMPLE)


def test_what_another_program_wrote_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that come or change between the list of files and the exchange are in the new folder too."""
    made.save(folder, 1)
    (folder / "README.md").write_text("old")
    exchange = transaction.exchange

    def late(first: Path, second: Path) -> None:
        (folder / "log").write_text("new")
        (folder / "new").write_text("new")
        (folder / "new").replace(folder / "README.md")
        exchange(first, second)

    monkeypatch.setattr(transaction, "exchange", late)
    made.save(folder, 2)
    assert made.model_in(folder) == 2
    assert [(folder / name).read_text() for name in ("log", "README.md")] == ["new", "new"]
    assert not made.litter(folder)


def test_stages_of_other_users_and_machines_stay(folder: Path) -> None:
    """Only what a dead process of this machine and user left is removed; a name proves nothing."""
    made.save(folder, 1)
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    mine = os.uname().nodename
    kept = [
        f"{STAGE}elsewhere-{dead.stdout.strip()}-00",
        f"{STAGE}{mine}-{os.getpid()}-00",
        f"{STAGE}{mine}",
        f"{STAGE}x-y-z",
    ]
    gone = f"{STAGE}{mine}-{dead.stdout.strip()}-00"
    for name in (*kept, gone):
        (folder.parent / name / "files").mkdir(parents=True)
    made.save(folder, 2)
    assert sorted(path.name for path in folder.parent.glob(".*")) == sorted(kept)


# --- several at once -------------------------------------------------------------------------------------


def many(folder: Path, first: int, rounds: int) -> None:
    """Saves of different layouts and kinds, with their numbers as tags."""
    for i in range(rounds):
        made.save(folder, first + i, per_shard=1 + (first + i) % 3)
        made.save_texts(folder, first + i)


def reading(folder: Path, stop: threading.Event, wrong: list[BaseException]) -> None:
    while not stop.is_set():
        try:
            made.model_in(folder)
        except BaseException as error:
            wrong.append(error)
            return


@pytest.mark.parametrize("others", [{}, {"checkpoint-1/optimizer.pt": "x"}])
def test_four_threads(folder: Path, others: dict[str, str]) -> None:
    """Whoever saves last wins, whole; meanwhile a reader sees no mixture."""
    made.save(folder, 1)
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
    assert (made.model_in(folder) or 0) > 99
    assert len(made.texts_in(folder)) == 1
    assert not made.litter(folder)


def test_four_processes(folder: Path) -> None:
    made.save(folder, 1)
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
        made.model_in(folder)
        for process in list(running):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                running.remove(process)
                assert status == 0
    assert (made.model_in(folder) or 0) > 99
    assert len(made.texts_in(folder)) == 1
    assert not made.litter(folder)


def test_lock_of_a_killed_process(folder: Path) -> None:
    """It ends with the process; its file is taken over and removed."""
    made.save(folder, 1)
    code = f"""
import os, signal
from pathlib import Path
from monoblock.checkpoint.locks import locked
with locked(Path({str(folder)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert (folder / ".monoblock-lock").exists()
    made.save(folder, 2)
    assert made.model_in(folder) == 2
    assert not made.litter(folder)


def test_link_in_the_place_of_the_lock(folder: Path, tmp_path: Path) -> None:
    made.save(folder, 1)
    (tmp_path / "secret").write_text("x")
    (folder / ".monoblock-lock").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="cannot save into"):
        made.save(folder, 2)
    assert (tmp_path / "secret").read_text() == "x"
    assert made.model_in(folder) == 1


# --- what fails on the way -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_full_disk(folder: Path, name: str) -> None:
    """Any one operation fails: the old model stays, and nothing else does; or the new one is there."""
    case = CASES[name]
    case.made(folder)
    count = len(kill_points.operations(lambda: case.do(folder)))
    for at in kill_points.spread(count, 2 * SAMPLE):
        case.made(folder)
        before = made.model_in(folder)
        try:
            with kill_points.failing(at):
                case.do(folder)
        except CheckpointError as error:
            words = str(error)
            assert "No space left" in words
            there = "the next load or save" in words or "holds all the new files" in words
            assert made.model_in(folder) == (2 if there else before)
        else:
            assert made.model_in(folder) == 2
        case.check(folder)


@pytest.mark.parametrize("most", [0, 100, 1300])
@pytest.mark.parametrize("name", ["to shards", "trainer, from shards", "replaced"])
def test_file_that_may_not_get_larger(folder: Path, name: str, most: int) -> None:
    case = CASES[name]
    case.made(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            case.do(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not made.litter(folder)
    assert made.model_in(folder) == 1


def as_nobody(do: Callable[[], object]) -> int:
    """The exit status of a process without rights that does this; 7 if it was refused in words."""
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


def open_to_all(tmp_path: Path) -> None:
    for place in (tmp_path, *tmp_path.parents):
        if place.owner() == Path(tmp_path).owner() and place != Path("/"):
            place.chmod(place.stat().st_mode | 0o055)


def test_folder_that_may_not_be_written(folder: Path, tmp_path: Path) -> None:
    open_to_all(tmp_path)
    made.save(folder, 1)
    folder.chmod(0o555)
    folder.parent.chmod(0o555)
    try:
        assert as_nobody(lambda: made.save(folder, 2)) == 7
        assert as_nobody(lambda: made.save(folder.with_name("other"), 2)) == 7
    finally:
        folder.parent.chmod(0o755)
        folder.chmod(0o755)
    assert made.model_in(folder) == 1
    assert not made.litter(folder)


def test_cut_off_save_in_a_folder_that_may_not_be_written(folder: Path, tmp_path: Path) -> None:
    """A reader without rights sees the new model, whole, where it is."""
    open_to_all(tmp_path)
    case = CASES["trainer, from shards"]
    case.made(folder)
    committed = kill_points.operations(lambda: case.do(folder)).index("os.chmod") + 2
    for at in range(committed, committed + 12):
        case.made(folder)
        kill_points.killed(lambda: case.do(folder), at)
        for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            place.chmod(0o555)

        def read() -> None:
            assert made.model_in(folder) == 2

        assert as_nobody(read) == 0
        for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            place.chmod(0o755)


# --- the user's folder -----------------------------------------------------------------------------------


def test_folder_keeps_its_rights_and_the_files_of_others(folder: Path) -> None:
    made.save(folder, 1)
    (folder / "notes").write_text("mine")
    (folder / "link").symlink_to("notes")
    (folder / "away").symlink_to("/nowhere")
    os.link(folder / "notes", folder.parent / "second name")
    folder.chmod(0o750)
    inode = (folder / "notes").stat().st_ino
    assert "exchange" in kill_points.operations(lambda: made.save(folder, 2, per_shard=1))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert (folder / "notes").stat().st_ino == inode
    assert (folder / "link").readlink() == Path("notes")
    assert (folder / "away").readlink() == Path("/nowhere")
    assert stat.S_IMODE((folder / "config.json").stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_working_folder_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that this or another process works in is not exchanged: the process would stay in the old one."""
    made.save(folder, 1)
    inode = folder.stat().st_ino
    with subprocess.Popen(["sleep", "60"], cwd=folder) as other:
        made.save(folder, 2, per_shard=1)
        assert folder.stat().st_ino == inode
        other.kill()
    monkeypatch.chdir(folder)
    made.save(Path(), 3)
    assert (folder.stat().st_ino, made.model_in(Path())) == (inode, 3)
    monkeypatch.chdir("/")
    made.save(folder, 4, per_shard=1)
    assert folder.stat().st_ino != inode


def test_folder_by_a_link(folder: Path) -> None:
    made.save(folder, 1)
    latest = folder.with_name("latest")
    latest.symlink_to("model")
    made.save(latest, 2, per_shard=2)
    assert latest.is_symlink()
    assert made.model_in(folder) == made.model_in(latest) == 2
    latest.unlink()
    latest.symlink_to("not there yet")
    made.save(latest, 3)
    assert made.model_in(folder.with_name("not there yet")) == 3


def test_things_that_are_no_files(folder: Path) -> None:
    """A named pipe cannot be linked, so the journal does it."""
    made.save(folder, 1)
    os.mkfifo(folder / "pipe")
    made.save(folder, 2, per_shard=1)
    assert made.model_in(folder) == 2
    assert stat.S_ISFIFO((folder / "pipe").stat().st_mode)
    (folder / "pipe").unlink()
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json is a folder"):
        made.save(folder, 3)


def test_nothing_is_written_behind_a_link(folder: Path, tmp_path: Path) -> None:
    made.save(folder, 1)
    (tmp_path / "elsewhere").mkdir()
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a file or a link"):
        made.save_texts(folder, 2)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert made.model_in(folder) == 1


def test_temporary_names_cannot_be_foretold(folder: Path) -> None:
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


def test_same_content_is_not_written_again(folder: Path) -> None:
    """Then a save that changes the weights alone is one rename, and one that changes nothing is nothing."""
    made.save_again(folder, 1)
    config = (folder / "config.json").stat()
    assert kill_points.operations(lambda: made.save_again(folder, 2)).count("exchange") == 0
    assert (folder / "config.json").stat().st_ino == config.st_ino
    before = folder.stat().st_ino, sorted(folder.iterdir())
    made.save_again(folder, 2)
    assert (folder.stat().st_ino, sorted(folder.iterdir())) == before


# --- files of two saves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["model-00002-of-00003.safetensors", "model.safetensors.index.json"])
def test_mixture_by_another_program(tmp_path: Path, which: str) -> None:
    """Shards and index say of which save they are; files that say nothing are taken."""
    for tag in (1, 2):
        made.save(tmp_path / str(tag), tag, per_shard=1)
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


def test_one_file_is_the_same_each_time(tmp_path: Path) -> None:
    for name in "ab":
        made.save(tmp_path / name, 1)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_store_of_a_folder_that_is_saved_to(folder: Path) -> None:
    """What was opened stays what it was, whatever is saved later."""
    big = {"a": np.full((600, 1024), 1.0, np.float32), "b": np.full((600, 1024), 2.0, np.float32)}
    save_tensors(folder, big, framework="np")
    store = open_store(find_weights(folder), "np")
    save_tensors(folder, {name: -array[:300] for name, array in big.items()}, framework="np")
    for _ in range(2):
        assert all(np.array_equal(store.tensor(name), big[name]) for name in big)
        assert np.array_equal(store.concatenated(["b", "a"]), np.concatenate([big["b"], big["a"]]))


def test_reader_reads_again_what_was_replaced(folder: Path) -> None:
    made.save(folder, 1)
    tags: list[Any] = []

    def read() -> tuple[Any, Any]:
        path = find_file(folder, "config.json")
        assert path is not None
        first = json.loads(path.read_text())["tag"]
        if not tags:
            made.save(folder, 2, per_shard=1)
        tags.append(first)
        return first, float(open_store(find_weights(folder), "np").tensor("a.weight")[0])

    assert consistent_read(folder, HubOptions(), read) == (2, 2.0)
    assert tags == [1, 2]

    def never() -> None:
        made.save(folder, 2 + len(tags), per_shard=1)
        tags.append(0)

    with pytest.raises(CheckpointError, match="was changed by other saves"):
        consistent_read(folder, HubOptions(), never)

    def gone() -> None:
        raise HubError("not there")

    with pytest.raises(HubError, match="not there"):
        consistent_read(folder, HubOptions(), gone)


# --- journals that no save wrote -------------------------------------------------------------------------


def journal(folder: Path, fields: dict[str, Any] | None = None) -> Path:
    made.save(folder, 1)
    commit = folder / COMMIT
    (commit / "files").mkdir(parents=True)
    whole = {"put": [], "remove": [], "kept": {}, "folder": folder.name, "replaced": [0, 0], **(fields or {})}
    (commit / "journal.json").write_text(json.dumps(whole))
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
def test_journal_that_leads_elsewhere(folder: Path, fields: dict[str, Any]) -> None:
    (folder.parent / "secret").write_text("x")
    journal(folder, fields)
    for call in (lambda: made.model_in(folder), lambda: made.save(folder, 2)):
        with pytest.raises(CheckpointError, match="no valid journal of a save"):
            call()
    assert (folder.parent / "secret").read_text() == "x"


def test_journal_behind_links(folder: Path, tmp_path: Path) -> None:
    """A folder from elsewhere can hold links; nothing is taken from behind them, nothing put or removed there."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "key").write_text("secret")
    commit = journal(folder, {"put": ["key"], "remove": ["way/key"]})
    (commit / "files").rmdir()
    (commit / "files").symlink_to(outside)
    (folder / "way").symlink_to(outside)
    assert made.model_in(folder) == 1
    assert (outside / "key").read_text() == "secret"
    assert not (folder / "key").exists()
    shutil.rmtree(folder)
    commit = journal(folder, {"put": ["way/key"]})
    (folder / "way").symlink_to(outside)
    (commit / "files" / "way").mkdir()
    (commit / "files" / "way" / "key").write_text("other")
    with pytest.raises(CheckpointError, match="is a file or a link"):
        made.model_in(folder)
    assert (outside / "key").read_text() == "secret"
    shutil.rmtree(commit)
    commit.symlink_to(outside)
    (outside / "journal.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no valid journal of a save"):
        made.model_in(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{", b"\xff", b"[" * 100_000, None])
def test_broken_journal(folder: Path, content: bytes | None) -> None:
    commit = journal(folder)
    path = commit / "journal.json"
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="no valid journal of a save"):
        made.model_in(folder)


def test_file_in_the_place_of_a_journal(folder: Path) -> None:
    made.save(folder, 1)
    (folder / COMMIT).write_text("x")
    for call in (lambda: made.model_in(folder), lambda: made.save(folder, 2)):
        with pytest.raises(CheckpointError, match="no valid journal of a save"):
            call()


# --- new folders -----------------------------------------------------------------------------------------


def test_new_folder_refuses(folder: Path) -> None:
    made.save(folder, 1)
    with pytest.raises(CheckpointError, match="holds files already"), new_folder(folder, replace=False):
        pass
    (folder / "checkpoint-1").mkdir()
    with pytest.raises(CheckpointError, match="has a subfolder"), new_folder(folder, replace=True):
        pass
    assert made.model_in(folder) == 1


def test_one_file_written_whole(folder: Path) -> None:
    """As chat's saved sessions are; killed anywhere, it is the old one or the new one."""
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
    assert not made.litter(folder)
