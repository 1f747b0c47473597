"""Tokenizer files: selection of a class, loading, saving, invalid files, failed saves, the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from trained_tokenizers import TEXT, backend, tokenizer

from monoblock.checkpoint.transaction import Staging
from monoblock.errors import CheckpointError, FieldError, HubError
from monoblock.tokenization import AutoTokenizer, GPTNeoXTokenizerFast, PreTrainedTokenizerFast


def write(folder: Path, **files: Any) -> Path:
    """A folder with tokenizer.json and the given JSON files."""
    folder.mkdir(exist_ok=True)
    backend().save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return folder


# --- class selection


@pytest.mark.parametrize(
    ("files", "options", "expected"),
    [
        ({}, {}, PreTrainedTokenizerFast),
        ({"tokenizer_config": {"tokenizer_class": "GPTNeoXTokenizer"}}, {}, GPTNeoXTokenizerFast),
        ({"tokenizer_config": {"tokenizer_class": "GPTNeoXTokenizerFast"}}, {}, GPTNeoXTokenizerFast),
        ({"tokenizer_config": {"tokenizer_class": "TokenizersBackend"}}, {}, PreTrainedTokenizerFast),
        ({"tokenizer_config": {"tokenizer_class": "UnknownTokenizer"}}, {}, PreTrainedTokenizerFast),
        ({"config": {"model_type": "mpt"}}, {}, GPTNeoXTokenizerFast),
        ({"config": {"model_type": "unknown"}}, {}, PreTrainedTokenizerFast),
        (
            {"config": {"model_type": "unknown", "tokenizer_class": "GPTNeoXTokenizer"}},
            {},
            GPTNeoXTokenizerFast,
        ),
        (
            {
                "config": {"model_type": "mpt"},
                "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"},
            },
            {},
            PreTrainedTokenizerFast,
        ),
        ({}, {"tokenizer_type": "mpt"}, GPTNeoXTokenizerFast),
        ({}, {"use_fast": False, "trust_remote_code": True}, PreTrainedTokenizerFast),
    ],
)
def test_class_of_auto_tokenizer(
    tmp_path: Path, files: dict[str, Any], options: dict[str, Any], expected: type
) -> None:
    loaded = AutoTokenizer.from_pretrained(write(tmp_path, **files), **options)
    assert type(loaded) is expected
    assert loaded.batch_decode(loaded(TEXT)["input_ids"]) == TEXT


def test_model_type_of_a_config_object(tmp_path: Path) -> None:
    class Config:
        model_type = "mpt"

    assert type(AutoTokenizer.from_pretrained(write(tmp_path), config=Config())) is GPTNeoXTokenizerFast


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (
            {"tokenizer_config": {"tokenizer_class": "UnknownTokenizer"}},
            {},
            "tokenizer_class='UnknownTokenizer', which",
        ),
        ({"config": {"model_type": "unknown"}}, {}, "model_type='unknown', which is not known"),
        ({}, {"tokenizer_type": "unknown"}, "tokenizer_type='unknown' is not known"),
    ],
)
def test_unknown_tokenizers_are_refused(
    tmp_path: Path, files: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    (write(tmp_path, **files) / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"known classes: PreTrainedTokenizerFast, .*GPTNeoXTokenizer"
    ) as caught:
        AutoTokenizer.from_pretrained(tmp_path, **options)
    assert message in str(caught.value)


def test_auto_tokenizer_has_no_constructor() -> None:
    with pytest.raises(OSError, match="from_pretrained"):
        AutoTokenizer()


# --- loading


def test_tokenizer_json_alone(tmp_path: Path) -> None:
    write(tmp_path)
    for loaded in (
        AutoTokenizer.from_pretrained(tmp_path / "tokenizer.json", eos_token="</s>"),
        PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="</s>"),
    ):
        assert loaded.eos_token_id == 1 and loaded.name_or_path in ("", str(tmp_path / "tokenizer.json"))


def test_subfolder_and_overrides(tmp_path: Path) -> None:
    write(
        tmp_path / "inner",
        tokenizer_config={"pad_token": "<pad>", "padding_side": "right", "model_max_length": 9},
    )
    loaded = AutoTokenizer.from_pretrained(
        tmp_path, subfolder="inner", padding_side="left", pad_token="</s>", odd=3
    )
    assert (loaded.padding_side, loaded.pad_token_id, loaded.model_max_length) == ("left", 1, 9)
    assert loaded.init_kwargs["odd"] == 3 and loaded.name_or_path == str(tmp_path)


def test_settings_inside_tokenizer_json_become_defaults(tmp_path: Path) -> None:
    inner = backend()
    inner.enable_padding(direction="left", pad_id=2, pad_token="<pad>", length=8)
    inner.enable_truncation(4, direction="left")
    inner.save(str(tmp_path / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.padding_side, loaded.truncation_side, loaded.pad_token) == ("left", "left", "<pad>")
    assert len(loaded(TEXT[0])["input_ids"]) > 4  # calls pad and truncate on request only


def test_chat_templates_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"chat_template": "old"})
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "old"
    (tmp_path / "chat_template.jinja").write_text("new\n")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "new\n"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("tools")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == {"default": "new\n", "tool_use": "tools"}


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"tokenizer": "{"}, CheckpointError, "tokenizer.json is not a tokenizer file"),
        ({"tokenizer": '{"version": "1.0"}'}, CheckpointError, "tokenizer.json is not a tokenizer file"),
        ({"tokenizer_config": "{"}, CheckpointError, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config": "[]"}, CheckpointError, "expected an object"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"3": "x"}}},
            FieldError,
            "must be a dict or an AddedToken",
        ),
        ({"tokenizer_config": {"padding_side": "top"}}, FieldError, "'left' or 'right', got 'top'"),
        ({"tokenizer_config": {"pad_token": 3}}, FieldError, "pad_token must be a string"),
    ],
)
def test_invalid_files(tmp_path: Path, files: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        AutoTokenizer.from_pretrained(write(tmp_path, **files))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"has no tokenizer\.json: "):
        PreTrainedTokenizerFast.from_pretrained(tmp_path)
    with pytest.raises(HubError, match=r"has no tokenizer\.json, nor vocab\.json and merges\.txt"):
        GPTNeoXTokenizerFast.from_pretrained(tmp_path)
    with pytest.raises(HubError, match="does not exist"):
        PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    with pytest.raises((HubError, ValueError)):
        AutoTokenizer.from_pretrained(tmp_path / "nowhere")


def test_vocabulary_files(tmp_path: Path) -> None:
    model = json.loads(backend().to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
    loaded = GPTNeoXTokenizerFast.from_pretrained(tmp_path)
    assert loaded.batch_decode(loaded(TEXT)["input_ids"]) == TEXT
    assert loaded.pad_token == "<|padding|>" and loaded.eos_token_id == loaded.bos_token_id == len(
        model["vocab"]
    )
    same = GPTNeoXTokenizerFast(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    assert same(TEXT) == loaded(TEXT)
    loaded.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(TEXT) == loaded(TEXT)
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(CheckpointError, match="a merge is two tokens"):
        GPTNeoXTokenizerFast.from_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        GPTNeoXTokenizerFast.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs both vocab"):
        GPTNeoXTokenizerFast(vocab={"a": 0})


# --- saving


def test_settings_survive_a_round_trip(tmp_path: Path) -> None:
    t = tokenizer(template=True, odd=[1, {"a": None}], image_token="<image>", model_max_length=50)
    t.add_special_tokens({"sep_token": "<sep>", "extra_special_tokens": ["<x>"]})
    t.add_tokens(["foxdog"])
    t.pad_token, t.bos_token, t.padding_side, t.truncation_side = t.eos_token, None, "left", "left"
    t.chat_template = "{{ messages }}"
    t(TEXT, padding=True, truncation=True, max_length=3)  # its settings remain in the backend
    paths = t.save_pretrained(tmp_path, filename_prefix=None)
    assert [Path(path).name for path in paths] == [
        "tokenizer_config.json",
        "chat_template.jinja",
        "tokenizer.json",
    ]
    again = AutoTokenizer.from_pretrained(tmp_path)
    for name in (
        "special_tokens_map",
        "extra_special_tokens",
        "image_token",
        "padding_side",
        "truncation_side",
    ):
        assert getattr(again, name) == getattr(t, name), name
    assert again.chat_template == t.chat_template and again.init_kwargs["odd"] == t.init_kwargs["odd"]
    assert again.model_max_length == 50 and again.bos_token is None and len(again) == len(t)
    assert again("foxdog <x><sep>") == t("foxdog <x><sep>")
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    assert written["padding"] is None and written["truncation"] is None
    assert "name_or_path" not in (tmp_path / "tokenizer_config.json").read_text()


def test_older_files_in_the_folder_are_not_used_after_saving(tmp_path: Path) -> None:
    write(tmp_path, special_tokens_map={"pad_token": "<old>"}, added_tokens={"<older>": 999})
    t = tokenizer()
    t.add_tokens(["<new>"])
    t.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.pad_token == "<pad>" and len(again) == len(t) and again.get_vocab() == t.get_vocab()


def test_a_failed_save_leaves_the_folder_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = tokenizer(chat_template={"default": "a", "tool_use": "b"})
    t.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    t.chat_template = {"default": "c", "tool_use": "d"}
    t.add_tokens(["more"])
    write = Staging.write

    def full(self: Staging, name: str, content: str | bytes) -> None:
        if "tool_use" in name:
            raise OSError(28, "No space left on device")
        write(self, name, content)

    monkeypatch.setattr(Staging, "write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        t.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_invalid_saves_are_refused(tmp_path: Path) -> None:
    t = tokenizer()
    (tmp_path / "file").write_text("")
    for call, message in (
        (lambda: t.save_pretrained(tmp_path / "file"), "is a file"),
        (lambda: t.save_pretrained(tmp_path, legacy_format=True), "legacy_format"),
        (lambda: t.save_pretrained(tmp_path, push_to_hub=True), "push_to_hub"),
        (lambda: t.push_to_hub("me/model"), "hf upload me/model"),
    ):
        with pytest.raises((ValueError, NotImplementedError), match=message):
            call()
    t.chat_template = {"../escape": "x"}
    with pytest.raises(ValueError, match="not a file name"):
        t.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- the hub


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    folder = write(
        tmp_path / "here", tokenizer_config={"tokenizer_class": "GPTNeoXTokenizer", "pad_token": "<pad>"}
    )
    (folder / "chat_template.jinja").write_text("hub")
    with HubServer() as hub:
        hub.add("me/model", {path.name: path.read_bytes() for path in folder.iterdir()})
        hub.add("me/model", {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}, branch="bare")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()  # an existing session ignores NO_PROXY
        loaded = AutoTokenizer.from_pretrained("me/model", cache_dir=tmp_path / "cache")
        assert (
            type(loaded) is GPTNeoXTokenizerFast
            and loaded.pad_token == "<pad>"
            and loaded.chat_template == "hub"
        )
        assert loaded.name_or_path == "me/model"
        bare = AutoTokenizer.from_pretrained("me/model", revision="bare", cache_dir=tmp_path / "cache")
        assert type(bare) is PreTrainedTokenizerFast and bare.chat_template is None
    huggingface_hub.close_session()
    again = AutoTokenizer.from_pretrained("me/model", cache_dir=tmp_path / "cache", local_files_only=True)
    assert again(TEXT) == loaded(TEXT)
    with pytest.raises(HubError):
        AutoTokenizer.from_pretrained("me/other", cache_dir=tmp_path / "cache", local_files_only=True)
    with pytest.raises((TypeError, ValueError), match="proxies"):
        AutoTokenizer.from_pretrained("me/model", proxies={"http": "x"})
