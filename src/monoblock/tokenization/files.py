"""Reads a tokenizer's files into the constructor's arguments."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer

from monoblock.checkpoint.gguf.header import read_gguf
from monoblock.checkpoint.hub import HubOptions, find_file, find_gguf, in_gguf, read_json
from monoblock.errors import FieldError, HubError
from monoblock.field_types import brief, checked, declared, in_file
from monoblock.tokenization import gguf
from monoblock.tokenization.backend import read_backend as backend_of_file
from monoblock.tokenization.families import BuiltBackend, TokenizerFamily, read_text
from monoblock.tokenization.file_fields import OWNER, ConfigFields, Token, check_config, token_id
from monoblock.tokenization.file_fields import added as as_added
from monoblock.tokenization.special import EXTRA, NAMES

log = logging.getLogger("monoblock")

BACKEND_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MAP_FILE, ADDED_FILE = "special_tokens_map.json", "added_tokens.json"
LENGTHS = ("model_max_length", "max_len")
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
TEMPLATE_NAMES = ("tool_use", "rag")  # requested by name from the hub, where a folder is not listed

# Entries that other libraries write into tokenizer_config.json and that are not arguments here.
_NOT_ARGUMENTS = (
    "tokenizer_class",
    "init_inputs",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "name_or_path",
    # A file must not choose which files are read.
    "tokenizer_object",
    "vocab",
    "merges",
)
# Accepted by from_pretrained without effect: there is one class, and remote code is never run.
_NO_EFFECT = ("use_fast", "code_revision", "_from_auto", "_commit_hash")


def load(name: str | Path, family: TokenizerFamily, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments for the tokenizer of a folder, of the hub or of a tokenizer.json.

    `overrides` are the user's arguments, including those of `HubOptions`; they override the files.
    """
    overrides = dict(overrides)
    options = HubOptions.pop(overrides)
    for key in _NO_EFFECT:
        overrides.pop(key, None)
    if in_gguf(name, options):
        found = gguf.arguments(read_gguf(find_gguf(name, options)[0]))
        return {**found, **overrides, "name_or_path": str(name)}
    if Path(name).is_file():
        key = "vocab_file" if is_vocabulary(name) else "tokenizer_file"
        return {key: str(name), "name_or_path": str(name), **overrides}
    backend = find_file(name, BACKEND_FILE, options, required=False)
    config = read_config(name, options)
    for key in _NOT_ARGUMENTS:
        config.pop(key, None)
    for names in (
        EXTRA,
        LENGTHS,
    ):  # two names of one option: an argument overrides the file's under either name
        if overrides.keys() & set(names):
            config = {key: value for key, value in config.items() if key not in names}
    if backend is not None:
        config["tokenizer_file"] = str(backend)
        if not (family.owns_template or family.options_win):
            _drop_ignored_options(config, family)
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


def _drop_ignored_options(config: dict[str, Any], family: TokenizerFamily) -> None:
    """Remove the options that transformers' class of the family ignores when a tokenizer.json has a post-processor."""
    for key in ("add_bos_token", "add_eos_token"):
        if config.pop(key, None):
            log.info("%s=True in %s: %s leaves it to %s", key, CONFIG_FILE, family.names[0], BACKEND_FILE)


def is_vocabulary(path: str | Path) -> bool:
    """Whether a file is a complete vocabulary: SentencePiece's `tokenizer.model`, `tekken.json`."""
    name = Path(path).name
    return ".model" in name or name.endswith(".spm") or name.startswith("tekken")


def read_config(name: str | Path, options: HubOptions) -> dict[str, Any]:
    """The content of tokenizer_config.json with tokens as objects; {} if it is missing."""
    path = find_file(name, CONFIG_FILE, options, required=False)
    return {} if path is None else check_config(read_json(path), path)


def _vocab_files(name: str | Path, family: TokenizerFamily, options: HubOptions) -> dict[str, str]:
    for files in family.vocab_files:
        found = {key: find_file(name, file, options, required=False) for key, file in files.items()}
        if all(found.values()):
            return {key: str(path) for key, path in found.items()}
    also = "".join(f", nor {' and '.join(files.values())}" for files in family.vocab_files)
    raise HubError(f"{name} has no {BACKEND_FILE}{also}: pass a folder or a model that has a tokenizer")


def _templates(name: str | Path, options: HubOptions) -> str | dict[str, str] | None:
    """The chat templates in separate files: one, or several by name."""
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
    texts = {key: read_text(path) for key, path in paths.items()}
    return texts.get("default") if len(texts) < 2 and "default" in texts else texts or None


def _added_tokens(
    name: str | Path,
    backend: Path | None,
    config: dict[str, Any],
    overrides: Mapping[str, Any],
    options: HubOptions,
) -> dict[int, AddedToken]:
    """Id -> added token, from the newest file format that is present; special tokens are stored in `config`."""
    decoder = overrides.get("added_tokens_decoder", config.pop("added_tokens_decoder", None))
    if decoder is not None:
        field = "added_tokens_decoder"
        return {token_id(field, index): as_added(field, token) for index, token in decoder.items()}
    if (path := find_file(name, MAP_FILE, options, required=False)) is not None:
        with in_file(path):
            for key, value in _special_tokens(read_json(path)).items():
                if not any(overrides.get(same) for same in (EXTRA if key in EXTRA else (key,))):
                    config["extra_special_tokens" if key in EXTRA else key] = value
    added: dict[int, AddedToken] = {}
    if (path := find_file(name, ADDED_FILE, options, required=False)) is not None:
        special = {str(config[key]) for key in NAMES if config.get(key)}
        for extra in EXTRA:
            listed: Any = config.get(extra) or ()
            tokens = cast(Mapping[str, Any], listed).values() if isinstance(listed, Mapping) else listed
            special |= set(map(str, tokens))
        with in_file(path):
            for content, index in read_json(path).items():
                normal = content not in special
                added[token_id(content, index)] = AddedToken(content, normalized=normal, special=not normal)
        if backend is not None:
            with in_file(backend):
                added |= _of_backend(read_json(backend).get("added_tokens"))
    return added


def _of_backend(listed: Any) -> dict[int, AddedToken]:
    """The added tokens of a tokenizer.json, by id."""
    rows: list[dict[str, Any]] = checked(OWNER, "added_tokens", listed or [], list[dict[str, Any]])
    return {
        token_id("added_tokens", row.get("id")): as_added(
            "added_tokens", {key: value for key, value in row.items() if key != "id"}
        )
        for row in rows
    }


def _special_tokens(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of special_tokens_map.json: names of tokens -> strings or AddedTokens, or lists of those."""
    kinds = declared(ConfigFields)
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key not in EXTRA and not key.endswith("_token"):
            raise FieldError(f"{OWNER} has no special token {brief(key)}", key)
        kind = kinds[key] if key in EXTRA else Token | None
        found[key] = checked(OWNER, key, _special(key, value), kind)
    return found


def _special(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_special(name, item) for item in cast(list[Any], value)]
    fields = cast(dict[str, Any], value) if isinstance(value, dict) else {}
    return as_added(name, {**fields, "special": True}) if "content" in fields else cast(Any, value)


def read_backend(
    source: Mapping[str, Any], family: TokenizerFamily, options: Mapping[str, Any]
) -> BuiltBackend:
    """The backend of the constructor's arguments: an object, a tokenizer.json, or vocabulary files."""
    if (given := source.get("tokenizer_object")) is not None:
        if not isinstance(given, Tokenizer):
            raise TypeError(f"tokenizer_object must be a tokenizers.Tokenizer; got {type(given).__name__}")
        backend = Tokenizer.from_str(given.to_str())
    elif (path := source.get("tokenizer_file")) is not None:
        backend = backend_of_file(Path(path))
    elif family.build is not None and source:
        for key in ("vocab_file", "merges_file"):
            if key in source and not Path(source[key]).is_file():
                raise HubError(f"{key}={str(source[key])!r} does not exist; pass the path of a file")
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
    return BuiltBackend(backend)
