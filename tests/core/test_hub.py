"""Locating the files of a model: local folders, and a test hub on 127.0.0.1 accessed by huggingface_hub."""

import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.constants
import pytest
from hub_server import HubServer

from monoblock.checkpoint import remote
from monoblock.checkpoint.hub import HubOptions, find_file, find_gguf, find_weights
from monoblock.errors import CheckpointError, HubError

NAME = "org/tiny"
BIG = bytes(range(256)) * 4096  # 1 MiB
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = json.dumps({"metadata": {}, "weight_map": {f"t{i}": name for i, name in enumerate(SHARDS)}}).encode()
MODEL = {
    "config.json": b'{"model_type": "mpt"}',
    "model.safetensors": b"weights",
    "onnx/fp16/config.json": b'{"nested": 1}',
}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub server that huggingface_hub uses, with short timeouts and without the user's settings."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
    monkeypatch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16
    )  # at most this is lost at a broken connection
    monkeypatch.setattr(remote, "_PAUSE", 0)
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
    huggingface_hub.close_session()
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.add(NAME, MODEL)
        yield hub
    huggingface_hub.close_session()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def refusal(call, *words, error=HubError):
    """The one-line message of the error that `call` raises, which contains all of `words`."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# --- the hub ---------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once(server, cache):
    path = find_file(NAME, "config.json", HubOptions(cache_dir=cache))
    assert path.read_bytes() == MODEL["config.json"]
    assert path.is_relative_to(cache)
    assert find_file(NAME, "config.json", HubOptions(cache_dir=cache)) == path
    assert len(server.requests("GET", "config.json")) == 1


def test_force_download(server, cache):
    for _ in range(2):
        find_file(NAME, "config.json", HubOptions(cache_dir=cache, force_download=True))
    assert len(server.requests("GET", "config.json")) == 2


@pytest.mark.parametrize("branch", ["v2", "refs/pr/7"])
def test_revision_of_a_branch(server, cache, branch):
    server.add(NAME, {"config.json": b'{"v": 2}'}, branch=branch)
    path = find_file(NAME, "config.json", HubOptions(cache_dir=cache, revision=branch))
    assert path.read_bytes() == b'{"v": 2}'
    assert find_file(NAME, "config.json", HubOptions(cache_dir=cache)).read_bytes() == MODEL["config.json"]


def test_revision_of_a_cached_commit_needs_no_network(server, cache):
    commit = server.add(NAME, MODEL)
    server.add(NAME, {"config.json": b'{"v": 3}'})  # a new commit on main
    options = HubOptions(cache_dir=cache, revision=commit)
    assert find_file(NAME, "config.json", options).read_bytes() == MODEL["config.json"]
    server.log.clear()
    assert find_file(NAME, "config.json", options).read_bytes() == MODEL["config.json"]
    assert not server.log


def test_new_commits_of_a_branch_are_downloaded(server, cache):
    find_file(NAME, "config.json", HubOptions(cache_dir=cache))
    server.add(NAME, {"config.json": b'{"v": 3}'})
    assert find_file(NAME, "config.json", HubOptions(cache_dir=cache)).read_bytes() == b'{"v": 3}'


def test_nested_subfolder(server, cache):
    path = find_file(NAME, "config.json", HubOptions(cache_dir=cache, subfolder="onnx/fp16"))
    assert path.read_bytes() == MODEL["onnx/fp16/config.json"]


def test_missing_optional_file(server, cache):
    assert find_file(NAME, "generation_config.json", HubOptions(cache_dir=cache), required=False) is None


def test_missing_required_file_lists_the_files(server, cache):
    options = HubOptions(cache_dir=cache)
    refusal(
        lambda: find_file(NAME, "vocab.json", options), "vocab.json", NAME, "config.json, model.safetensors"
    )


def test_token_is_sent(server, cache):
    server.private[NAME] = "secret"
    find_file(NAME, "config.json", HubOptions(cache_dir=cache, token="secret"))
    assert {request.token for request in server.log} == {"Bearer secret"}


def test_token_comes_from_the_environment(server, cache, monkeypatch):
    server.private[NAME] = "secret"
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert find_file(NAME, "config.json", HubOptions(cache_dir=cache))


def test_weights_in_shards(server, cache):
    shards = {name: bytes([i]) * 1000 for i, name in enumerate(SHARDS)}
    server.add(NAME, {"model.safetensors.index.json": INDEX, **shards})
    files = find_weights(NAME, HubOptions(cache_dir=cache))
    assert files.kind == "safetensors"
    assert [path.name for path in files.paths] == SHARDS
    assert [path.read_bytes() for path in files.paths] == list(shards.values())
    assert {tensor: path.name for tensor, path in files.weight_map.items()} == json.loads(INDEX)["weight_map"]


def test_shards_are_of_the_commit_of_their_index(server, cache, monkeypatch):
    shards = dict.fromkeys(SHARDS, b"old")
    server.add(NAME, {"model.safetensors.index.json": INDEX, **shards})
    read = find_weights.__globals__["_read_index"]

    def read_after_commit(index):
        server.add(NAME, {"model.safetensors.index.json": INDEX, **dict.fromkeys(SHARDS, b"new")})
        return read(index)

    monkeypatch.setitem(find_weights.__globals__, "_read_index", read_after_commit)
    assert {p.read_bytes() for p in find_weights(NAME, HubOptions(cache_dir=cache)).paths} == {b"old"}


def test_a_shard_missing_on_the_hub_is_named(server, cache):
    server.add(NAME, {"model.safetensors.index.json": INDEX, SHARDS[0]: b"1", SHARDS[2]: b"3"})
    options = HubOptions(cache_dir=cache)
    refusal(lambda: find_weights(NAME, options), SHARDS[1], NAME, error=CheckpointError)


def test_a_failed_shard_cancels_the_other_downloads(server, cache):
    shards = {name: name.encode() + BIG * 4 for name in SHARDS}
    server.add(NAME, {"model.safetensors.index.json": INDEX, **shards})
    server.faults.status[f"GET {SHARDS[1]}"] = 500
    server.faults.slow = {SHARDS[0], SHARDS[2]}  # each takes 64 chunks x 1 s
    start = time.monotonic()
    refusal(lambda: find_weights(NAME, HubOptions(cache_dir=cache)), SHARDS[1], "500")
    assert time.monotonic() - start < 30  # with a margin for busy machines


@pytest.mark.parametrize("fault", ["cut", "reset"])
def test_downloads_resume_after_a_broken_connection(server, cache, fault):
    server.add(NAME, {"model.safetensors": BIG})
    getattr(server.faults, fault)["model.safetensors"] = 500_000
    files = find_weights(NAME, HubOptions(cache_dir=cache))
    assert files.paths[0].read_bytes() == BIG
    ranges = [request.range for request in server.requests("GET", "model.safetensors")]
    assert ranges[0] is None
    assert len(ranges) == 2
    if fault == "cut":
        # complete chunks of 64 KiB are kept, 7 of the 500,000 bytes
        assert ranges[1] == f"bytes={7 * 65536}-"
    assert not list(cache.rglob("*.incomplete"))


def test_offline_uses_the_cache(server, cache, monkeypatch):
    options = HubOptions(cache_dir=cache)
    path = find_file(NAME, "config.json", options)
    weights = find_weights(NAME, options)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server.log.clear()
    assert find_file(NAME, "config.json", options) == path
    assert find_weights(NAME, options) == weights
    assert find_file(NAME, "generation_config.json", options, required=False) is None
    assert not server.log


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "local_files_only"])
def test_offline_with_an_uncached_model(server, cache, monkeypatch, how):
    if how != "local_files_only":
        monkeypatch.setenv(how, "1")
    options = HubOptions(cache_dir=cache, local_files_only=how == "local_files_only")
    for required in (True, False):
        refusal(
            lambda required=required: find_file(NAME, "config.json", options, required=required),
            NAME,
            "offline",
            str(cache),
        )
    assert not server.log


def test_offline_with_a_partly_cached_model(server, cache):
    find_file(NAME, "config.json", HubOptions(cache_dir=cache))
    options = HubOptions(cache_dir=cache, local_files_only=True)
    refusal(lambda: find_weights(NAME, options), "no weights", "offline", "it holds config.json")


def test_offline_and_force_download_exclude_each_other(server, cache):
    options = HubOptions(cache_dir=cache, local_files_only=True, force_download=True)
    refusal(lambda: find_file(NAME, "config.json", options), "force_download", "offline")


def test_unreachable_hub_falls_back_to_the_cache(server, cache, monkeypatch, caplog):
    options = HubOptions(cache_dir=cache)
    path = find_file(NAME, "config.json", options)
    assert find_file(NAME, "generation_config.json", options, required=False) is None
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert find_file(NAME, "config.json", options) == path
    assert "using the cache" in caplog.text
    # the cache records that this file does not exist
    assert find_file(NAME, "generation_config.json", options, required=False) is None
    # of this file the cache records nothing
    refusal(
        lambda: find_file(NAME, "vocab.json", options, required=False), "cannot be reached", "127.0.0.1:9"
    )


def test_connection_refused(server, cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refusal(
        lambda: find_file(NAME, "config.json", HubOptions(cache_dir=cache)),
        "http://127.0.0.1:9 cannot be reached",
        NAME,
        "check the connection",
    )


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_timeouts(server, cache, monkeypatch, method):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    server.faults.hang.add(f"{method} config.json")
    start = time.monotonic()
    options = HubOptions(cache_dir=cache)
    refusal(lambda: find_file(NAME, "config.json", options), "in time", "config.json", "HF_HUB_ETAG_TIMEOUT")
    # Two requests of 0.3 s, or six attempts of huggingface_hub at a download; its default timeouts are 10 s each.
    assert time.monotonic() - start < (10 if method == "HEAD" else 30)


def test_unknown_model(server, cache):
    options = HubOptions(cache_dir=cache)
    refusal(lambda: find_file("org/none", "config.json", options), "'org/none'", server.url, "check the name")
    options = HubOptions(cache_dir=cache, token="valid")
    refusal(lambda: find_file("org/none", "config.json", options), "'org/none'", server.url, "check the name")


def test_private_model_without_token(server, cache):
    server.private[NAME] = "secret"
    refusal(lambda: find_file(NAME, "config.json", HubOptions(cache_dir=cache)), "private", "HF_TOKEN")


def test_invalid_token(server, cache):
    server.private[NAME] = "secret"
    options = HubOptions(cache_dir=cache, token="expired")
    refusal(lambda: find_file(NAME, "config.json", options), "401", "token", NAME)


def test_token_true_without_a_stored_token(server, cache):
    options = HubOptions(cache_dir=cache, token=True)
    refusal(lambda: find_file(NAME, "config.json", options), "no token is stored", "hf auth login")


def test_gated_model(server, cache):
    server.gated.add(NAME)
    refusal(
        lambda: find_file(NAME, "config.json", HubOptions(cache_dir=cache)),
        "gated",
        f"accept its terms at {server.url}/{NAME}",
    )


def test_forbidden(server, cache):
    server.faults.status["HEAD config.json"] = 403
    refusal(lambda: find_file(NAME, "config.json", HubOptions(cache_dir=cache)), "forbidden", "403")


@pytest.mark.parametrize("revision", ["v9", "0" * 40])
def test_unknown_revision(server, cache, revision):
    options = HubOptions(cache_dir=cache, revision=revision)
    refusal(lambda: find_file(NAME, "config.json", options), f"no revision '{revision}'", NAME)


def test_server_errors_are_retried_once(server, cache):
    server.faults.status["HEAD config.json"] = 503
    refusal(lambda: find_file(NAME, "config.json", HubOptions(cache_dir=cache)), "503", "try again later")
    assert len(server.requests("HEAD", "config.json")) == 2


def test_endpoint_without_a_hub(server, cache):
    server.commits[NAME, ""] = {"config.json": b"{}"}  # answers without a commit
    server.branches[NAME, "main"] = ""
    server.find = lambda *_: ""
    refusal(lambda: find_file(NAME, "config.json", HubOptions(cache_dir=cache)), "HF_ENDPOINT", server.url)


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "is not writable")]
)
def test_unwritable_cache(server, cache, monkeypatch, number, message):
    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    refusal(
        lambda: find_file(NAME, "config.json", HubOptions(cache_dir=cache)), message, str(cache), "cache_dir="
    )


def test_connection_that_breaks_repeatedly(server, cache):
    server.add(NAME, {"config.json": BIG})
    server.faults.cut = Always({"config.json": 0})
    options = HubOptions(cache_dir=cache)
    refusal(
        lambda: find_file(NAME, "config.json", options), "was lost", "config.json", "check the connection"
    )


class Always(dict):
    """Permanent faults."""

    def pop(self, key, default=None):
        return self.get(key, default)


def test_weights_of_another_framework(server, cache):
    server.add(NAME, {"config.json": b"{}", "flax_model.msgpack": b"x"})
    files = find_weights(NAME, HubOptions(cache_dir=cache))
    assert (files.kind, [path.read_bytes() for path in files.paths]) == ("msgpack", [b"x"])


def test_endpoint_and_home_from_the_environment(server, tmp_path):
    code = f"from monoblock.checkpoint.hub import find_file; print(find_file({NAME!r}, 'config.json'))"
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).is_relative_to(tmp_path / "home" / "hub")


# --- local folders ---------------------------------------------------------------------------------------


def make(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(INDEX if name.endswith(".index.json") else b"x")
    return folder


def test_local_folders_import_no_third_party_module(tmp_path):
    make(tmp_path, "config.json", "model.safetensors")
    code = (
        "import sys; from monoblock.checkpoint.hub import find_file, find_weights\n"
        f"find_file({str(tmp_path)!r}, 'config.json'); find_weights({str(tmp_path)!r})\n"
        "print({'huggingface_hub', 'numpy', 'torch', 'safetensors', 'httpx'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "set()", run.stderr


@pytest.mark.parametrize("kind", [str, Path])
def test_local_file(tmp_path, kind):
    make(tmp_path, "config.json")
    assert find_file(kind(tmp_path), "config.json") == tmp_path / "config.json"
    assert find_file(kind(tmp_path), "vocab.json", required=False) is None
    refusal(
        lambda: find_file(kind(tmp_path), "vocab.json"), "vocab.json", str(tmp_path), "it holds config.json"
    )


def test_local_subfolder(tmp_path):
    make(tmp_path / "a" / "b", "config.json")
    options = HubOptions(subfolder="a/b")
    assert find_file(tmp_path, "config.json", options) == tmp_path / "a" / "b" / "config.json"
    refusal(lambda: find_file(tmp_path, "config.json", HubOptions(subfolder="c")), "no subfolder 'c'")


ORDER = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "flax_model.msgpack",
    "flax_model.msgpack.index.json",
    "tf_model.h5",
    "tf_model.h5.index.json",
]
KINDS = ["safetensors", "bin", "msgpack", "h5"]


@pytest.mark.parametrize("first", range(8))
def test_precedence(tmp_path, first):
    make(tmp_path, *SHARDS, *ORDER[first:])
    files = find_weights(tmp_path)
    assert files.kind == KINDS[first // 2]
    assert [p.name for p in files.paths] == ([ORDER[first]] if first % 2 == 0 else SHARDS)
    assert (files.weight_map is None) == (first % 2 == 0)


def test_use_safetensors(tmp_path):
    make(tmp_path, "model.safetensors", "pytorch_model.bin")
    assert find_weights(tmp_path, use_safetensors=False).kind == "bin"
    assert find_weights(tmp_path, use_safetensors=True).kind == "safetensors"
    (tmp_path / "model.safetensors").unlink()
    refusal(
        lambda: find_weights(tmp_path, use_safetensors=True), "model.safetensors", "holds pytorch_model.bin"
    )


def test_variant(tmp_path):
    make(tmp_path, "model.safetensors", "model.fp16.safetensors")
    assert find_weights(tmp_path, variant="fp16").paths == (tmp_path / "model.fp16.safetensors",)
    refusal(lambda: find_weights(tmp_path, variant="fp8"), "model.fp8.safetensors", "model.fp16.safetensors")


def test_variant_in_shards(tmp_path):
    make(tmp_path, *SHARDS)
    (tmp_path / "model.safetensors.index.fp16.json").write_bytes(INDEX)
    assert [p.name for p in find_weights(tmp_path, variant="fp16").paths] == SHARDS


def test_a_missing_local_shard_is_named(tmp_path):
    make(tmp_path, "model.safetensors.index.json", SHARDS[0], SHARDS[1])
    refusal(lambda: find_weights(tmp_path), SHARDS[2], str(tmp_path), error=CheckpointError)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "..\\b", "C:b", "", 3])
def test_index_with_paths_outside_its_folder_is_refused(tmp_path, name):
    index = json.dumps({"weight_map": {"t": name}})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    refusal(lambda: find_weights(tmp_path), "index.json", repr(name), error=CheckpointError)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "\x00", ""])
def test_invalid_index(tmp_path, text):
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    refusal(lambda: find_weights(tmp_path), "pytorch_model.bin.index.json", error=CheckpointError)


def test_preferred_format(tmp_path):
    make(tmp_path, "model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
    assert find_weights(tmp_path, prefer="msgpack").kind == "msgpack"
    assert find_weights(tmp_path, prefer=("safetensors", "msgpack")).kind == "safetensors"
    assert find_weights(tmp_path, prefer=("h5", "bin")).kind == "bin"
    assert find_weights(tmp_path, prefer="h5").kind == "safetensors"
    assert find_weights(tmp_path, prefer="msgpack", use_safetensors=True).kind == "safetensors"
    assert find_weights(tmp_path, prefer="h5", use_safetensors=False).kind == "bin"
    refusal(
        lambda: find_weights(tmp_path, prefer="pt"), "'pt'", "safetensors, bin, msgpack, h5", error=ValueError
    )


def test_folder_without_a_model(tmp_path):
    make(tmp_path / "src")
    refusal(
        lambda: find_weights(tmp_path),
        "model.safetensors or pytorch_model.bin or flax_model.msgpack or tf_model.h5",
        "it holds src/",
    )
    refusal(lambda: find_weights(tmp_path / "src"), "no other files are known")
    make(tmp_path, *(f"f{i}" for i in range(30)))
    assert "and 19 more" in refusal(lambda: find_weights(tmp_path), "f0")


@pytest.mark.parametrize(
    "name", ["./foo", "../foo", "/no/such/folder", "~/no-such-folder", "a/b/c", ".\\foo"]
)
def test_path_that_does_not_exist(name):
    refusal(lambda: find_file(name, "config.json"), "no folder", name)


def test_path_objects_are_local():
    refusal(lambda: find_file(Path("org/tiny"), "config.json"), "no folder", "org")


def test_file_instead_of_a_folder(tmp_path):
    make(tmp_path, "model.safetensors")
    refusal(lambda: find_weights(tmp_path / "model.safetensors"), "is a file", "folder")


def test_revision_of_a_local_folder_is_refused(tmp_path):
    make(tmp_path, "config.json")
    refusal(lambda: find_file(tmp_path, "config.json", HubOptions(revision="v2")), "'v2'", "local folder")
    assert find_file(tmp_path, "config.json", HubOptions(revision="main"))


@pytest.mark.parametrize("name", ["", "two words", "-dash"])
def test_invalid_repository_name(server, cache, name):
    refusal(lambda: find_file(name, "config.json", HubOptions(cache_dir=cache)), "name")


# --- options ---------------------------------------------------------------------------------------------


def test_hub_options_are_popped_from_keywords():
    kwargs = {
        "revision": "v2",
        "token": "t",
        "resume_download": True,
        "subfolder": None,
        "dtype": "auto",
        "proxies": None,
    }
    assert HubOptions.pop(kwargs) == HubOptions(revision="v2", token="t")
    assert kwargs == {"dtype": "auto"}


@pytest.mark.parametrize("name", ["use_auth_token", "proxies", "mirror"])
def test_unsupported_options_are_refused(name):
    with pytest.raises(TypeError, match=re.escape(name)):
        HubOptions.pop({name: "x"})


def test_gguf_files_and_their_parts(server, cache):
    names = [f"x-0000{i}-of-00002.gguf" for i in (1, 2)]
    server.add(NAME, MODEL | dict.fromkeys(names, b"GGUF") | {"one.gguf": b"GGUF"})
    paths = find_weights(NAME, HubOptions(gguf_file=names[0], cache_dir=cache)).paths
    assert [path.name for path in paths] == names
    assert [path.name for path in find_gguf(NAME, HubOptions(gguf_file="one.gguf", cache_dir=cache))] == [
        "one.gguf"
    ]
    refusal(
        lambda: find_gguf(NAME, HubOptions(gguf_file="two.gguf", cache_dir=cache)),
        "has no two.gguf",
        "one.gguf",
    )


@pytest.mark.parametrize("subfolder", ["../x", "/x", "a\\b"])
def test_subfolder_outside_the_repository_is_refused(subfolder):
    with pytest.raises(ValueError, match="subfolder"):
        HubOptions(subfolder=subfolder)
