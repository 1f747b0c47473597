"""A tokenizer's files, read into the constructor's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer

from monoblock.checkpoint.hub import HubOptions, find_file, read_json
from monoblock.errors import CheckpointError, HubError
from monoblock.tokenization.families import Built, TokenizerFamily
from monoblock.tokenization.special import EXTRA, NAMES

BACKEND_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
TEMPLATE_NAMES = ("tool_use", "rag")  # looked for on the hub, where a folder cannot be listed file by file

# What the loading code of other libraries writes into tokenizer_config.json and what says nothing here.
_NOT_ARGUMENTS = (
    "tokenizer_class",
    "init_inputs",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "name_or_path",
)
# Accepted by from_pretrained and without effect: there is one class, and no code from the hub is run.
_NO_EFFECT = ("use_fast", "trust_remote_code", "code_revision", "_from_auto", "_commit_hash")


def load(name: str | Path, family: TokenizerFamily, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments for the tokenizer of a folder, of the hub or of a tokenizer.json.

    `overrides` are the user's arguments, those of `HubOptions` among them; they win over the files.
    """
    overrides = dict(overrides)
    options = HubOptions.pop(overrides)
    for key in _NO_EFFECT:
        overrides.pop(key, None)
    if Path(name).is_file():
        key = "vocab_file" if is_vocabulary(name) else "tokenizer_file"
        return {key: str(name), "name_or_path": str(name), **overrides}
    backend = find_file(name, BACKEND_FILE, options, required=False)
    config = read_config(name, options)
    for key in _NOT_ARGUMENTS:
        config.pop(key, None)
    if backend is not None:
        config["tokenizer_file"] = str(backend)
        if not family.owns_template:  # the template in tokenizer.json is the one that counts
            config.pop("add_bos_token", None)
            config.pop("add_eos_token", None)
    elif not overrides.keys() & {"tokenizer_object", "tokenizer_file", "vocab", "vocab_file"}:
        config |= _vocab_files(name, family, options)
    if (templates := _templates(name, options)) is not None:
        config["chat_template"] = templates
    added = _added_tokens(name, backend, config, overrides, options)
    kwargs = {**config, **overrides, "name_or_path": str(name)}
    flags = {str(token): token for token in added.values()}
    for key in [key for key in kwargs if key in NAMES and kwargs[key] is not None]:
        kwargs[key] = flags.get(str(kwargs[key]), kwargs[key])
    return {**kwargs, "added_tokens_decoder": added}


def is_vocabulary(path: str | Path) -> bool:
    """Whether a file is a vocabulary by itself: SentencePiece's `tokenizer.model`, `tekken.json`."""
    name = Path(path).name
    return ".model" in name or name.endswith(".spm") or name.startswith("tekken")


def read_config(name: str | Path, options: HubOptions) -> dict[str, Any]:
    """The content of tokenizer_config.json with its tokens as objects, {} without one."""
    path = find_file(name, CONFIG_FILE, options, required=False)
    return {} if path is None else {key: _token(value) for key, value in read_json(path).items()}


def _token(value: Any) -> Any:
    """Tokens are written as objects marked `"__type": "AddedToken"`."""
    if isinstance(value, dict):
        fields = cast(dict[str, Any], value)
        if fields.get("__type") == "AddedToken":
            return AddedToken(**{key: item for key, item in fields.items() if key != "__type"})
        return {key: _token(item) for key, item in fields.items()}
    return [_token(item) for item in cast(list[Any], value)] if isinstance(value, list) else value


def _vocab_files(name: str | Path, family: TokenizerFamily, options: HubOptions) -> dict[str, str]:
    for files in family.vocab_files:
        found = {key: find_file(name, file, options, required=False) for key, file in files.items()}
        if all(found.values()):
            return {key: str(path) for key, path in found.items()}
    also = "".join(f", nor {' and '.join(files.values())}" for files in family.vocab_files)
    raise HubError(f"{name} has no {BACKEND_FILE}{also}: give a folder or a model that has a tokenizer")


def _templates(name: str | Path, options: HubOptions) -> str | dict[str, str] | None:
    """The chat templates that are files of their own: one text, or several by name."""
    paths: dict[str, Path] = {}
    if (default := find_file(name, TEMPLATE_FILE, options, required=False)) is not None:
        paths["default"] = default
    folder = Path(name) / options.subfolder / TEMPLATE_FOLDER
    if folder.is_dir():
        paths |= {path.stem: path for path in sorted(folder.glob("*.jinja"))}
    elif paths and not Path(name).is_dir():
        for extra in TEMPLATE_NAMES:
            path = find_file(name, f"{TEMPLATE_FOLDER}/{extra}.jinja", options, required=False)
            paths |= {extra: path} if path is not None else {}
    texts = {key: path.read_text(encoding="utf-8") for key, path in paths.items()}
    return texts.get("default") if len(texts) < 2 and "default" in texts else texts or None


def _added_tokens(
    name: str | Path,
    backend: Path | None,
    config: dict[str, Any],
    overrides: Mapping[str, Any],
    options: HubOptions,
) -> dict[int, AddedToken]:
    """Id -> added token, by the newest of the places where files say it; special tokens go into `config`."""
    decoder = overrides.get("added_tokens_decoder", config.pop("added_tokens_decoder", None))
    if decoder is not None:
        return {int(index): _as_added(token) for index, token in decoder.items()}
    if (path := find_file(name, "special_tokens_map.json", options, required=False)) is not None:
        for key, value in read_json(path).items():
            if not overrides.get(key):
                config["extra_special_tokens" if key in EXTRA else key] = _special(value)
    added: dict[int, AddedToken] = {}
    if (path := find_file(name, "added_tokens.json", options, required=False)) is not None:
        special = {str(config[key]) for key in NAMES if config.get(key)}
        special |= {str(token) for token in config.get("extra_special_tokens") or config.get(EXTRA[1]) or ()}
        for content, index in read_json(path).items():
            added[index] = AddedToken(content, normalized=content not in special, special=content in special)
        for token in cast(
            list[dict[str, Any]], read_json(backend).get("added_tokens") or [] if backend else []
        ):
            added[token["id"]] = _as_added({key: value for key, value in token.items() if key != "id"})
    return added


def _as_added(token: Any) -> AddedToken:
    """An added token, or its fields as files write them."""
    if isinstance(token, AddedToken):
        return token
    if isinstance(token, dict) and "content" in token:
        return AddedToken(**cast(dict[str, Any], token))
    raise CheckpointError(
        f"an added token in the tokenizer's files is {token!r}; expected an object with a content"
    )


def _special(value: Any) -> Any:
    """What special_tokens_map.json holds: strings, objects with an AddedToken's fields, lists of those."""
    if isinstance(value, list):
        return [_special(item) for item in cast(list[Any], value)]
    fields = cast(dict[str, Any], value) if isinstance(value, dict) else {}
    return _as_added({**fields, "special": True}) if "content" in fields else cast(Any, value)


def read_backend(source: Mapping[str, Any], family: TokenizerFamily, options: Mapping[str, Any]) -> Built:
    """The backend of the constructor's arguments: an object, a tokenizer.json, or vocabulary files."""
    if (given := source.get("tokenizer_object")) is not None:
        if not isinstance(given, Tokenizer):
            raise TypeError(f"tokenizer_object must be a tokenizers.Tokenizer; got {type(given).__name__}")
        backend = Tokenizer.from_str(given.to_str())
    elif (path := source.get("tokenizer_file")) is not None:
        backend = _parse(Path(path))
    elif family.build is not None and source:
        for key in ("vocab_file", "merges_file"):
            if key in source and not Path(source[key]).is_file():
                raise HubError(f"{key}={str(source[key])!r} does not exist; give the path of a file")
        built = family.build(source, options)
        if family.adjust is not None:
            family.adjust(built.backend, options)
        return built
    else:
        raise ValueError("a tokenizer needs tokenizer_object or tokenizer_file, or use from_pretrained(name)")
    prefix = options.get("add_prefix_space")
    if prefix is not None and getattr(backend.pre_tokenizer, "add_prefix_space", prefix) != prefix:
        backend.pre_tokenizer.add_prefix_space = prefix  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    if family.adjust is not None:
        family.adjust(backend, options)
    return Built(backend)


def _parse(path: Path) -> Tokenizer:
    if not path.is_file():
        raise HubError(f"{path} does not exist; give the path of a {BACKEND_FILE}")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the backend raises plain exceptions
        raise CheckpointError(f"{path} is not a tokenizer file ({error}): fetch or write it again") from error
