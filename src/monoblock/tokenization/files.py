"""A tokenizer's files: read into the constructor's arguments, and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tokenizers import AddedToken, Tokenizer

from monoblock.checkpoint.files import staged
from monoblock.checkpoint.hub import HubOptions, find_file, read_json
from monoblock.errors import CheckpointError, HubError
from monoblock.tokenization.families import TokenizerFamily
from monoblock.tokenization.special import EXTRA, NAMES

if TYPE_CHECKING:
    from monoblock.tokenization.fast import PreTrainedTokenizerFast

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
_NO_EFFECT = ("use_fast", "trust_remote_code", "legacy", "code_revision", "_from_auto", "_commit_hash")


def load(name: str | Path, family: TokenizerFamily, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments for the tokenizer of a folder, of the hub or of a tokenizer.json.

    `overrides` are the user's arguments, those of `HubOptions` among them; they win over the files.
    """
    overrides = dict(overrides)
    options = HubOptions.pop(overrides)
    for key in _NO_EFFECT:
        overrides.pop(key, None)
    if Path(name).is_file():
        return {"tokenizer_file": str(name), "name_or_path": str(name), **overrides}
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
    found = {key: find_file(name, file, options, required=False) for key, file in family.vocab_files.items()}
    if found and all(found.values()):
        return {key: str(path) for key, path in found.items()}
    also = f", nor {' and '.join(family.vocab_files.values())}" if family.vocab_files else ""
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
    if (decoder := config.pop("added_tokens_decoder", None)) is not None:
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
    if backend is not None:
        for token in read_json(backend).get("added_tokens") or []:
            added[token["id"]] = AddedToken(**{key: value for key, value in token.items() if key != "id"})
    return added


def _as_added(token: Any) -> AddedToken:
    if isinstance(token, AddedToken):
        return token
    if isinstance(token, dict) and "content" in token:
        return AddedToken(**cast(dict[str, Any], token))
    raise CheckpointError(
        f"added_tokens_decoder in {CONFIG_FILE} holds {token!r}; expected an object with a content"
    )


def _special(value: Any) -> Any:
    """A token of special_tokens_map.json: a string, or an object of an AddedToken's fields."""
    if isinstance(value, list):
        return [_special(item) for item in cast(list[Any], value)]
    if isinstance(value, dict) and "content" in value:
        return AddedToken(**{**cast(dict[str, Any], value), "special": True})
    return value


def read_backend(source: Mapping[str, Any], family: TokenizerFamily, options: Mapping[str, Any]) -> Tokenizer:
    """The `tokenizers.Tokenizer` of the constructor's arguments: an object, a tokenizer.json, or vocabulary files."""
    if (given := source.get("tokenizer_object")) is not None:
        if not isinstance(given, Tokenizer):
            raise TypeError(f"tokenizer_object must be a tokenizers.Tokenizer; got {type(given).__name__}")
        backend = Tokenizer.from_str(given.to_str())
    elif (path := source.get("tokenizer_file")) is not None:
        backend = _parse(Path(path))
    elif family.build is not None and source:
        return family.build(source, options)
    else:
        raise ValueError("a tokenizer needs tokenizer_object or tokenizer_file, or use from_pretrained(name)")
    prefix = options.get("add_prefix_space")
    if prefix is not None and getattr(backend.pre_tokenizer, "add_prefix_space", prefix) != prefix:
        backend.pre_tokenizer.add_prefix_space = prefix  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    return backend


def _parse(path: Path) -> Tokenizer:
    if not path.is_file():
        raise HubError(f"{path} does not exist; give the path of a {BACKEND_FILE}")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the backend raises plain exceptions
        raise CheckpointError(f"{path} is not a tokenizer file ({error}): fetch or write it again") from error


def save(tokenizer: PreTrainedTokenizerFast, folder: Path, prefix: str, jinja_files: bool) -> tuple[str, ...]:
    """Write a tokenizer's files and return their paths: the config, the chat templates, tokenizer.json."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; save_pretrained needs a folder")
    config = _config(tokenizer)
    template = tokenizer.chat_template
    templates: dict[str, str] = {}
    if jinja_files and template:
        templates = dict(template) if isinstance(template, dict) else {"default": template}
    elif isinstance(template, dict):
        config["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
    elif template:
        config["chat_template"] = template
    if wrong := [name for name in templates if Path(name).name != name or name in (".", "..")]:
        raise ValueError(f"the chat template {wrong[0]!r} cannot be saved: its name is no file name")
    default, more = templates.pop("default", None), templates
    paths: list[Path] = []
    with staged(folder) as stage:
        names = [
            prefix + CONFIG_FILE,
            *([prefix + TEMPLATE_FILE] if default is not None else []),
            prefix + BACKEND_FILE,
        ]
        texts = [
            json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
            *([default] if default else []),
        ]
        for name, text in zip(names, texts, strict=False):
            stage.path(name).write_text(text, encoding="utf-8", newline="")
        stage.path(names[-1]).write_text(tokenizer.backend_json(), encoding="utf-8", newline="")
        if more:
            with staged(folder / (prefix + TEMPLATE_FOLDER)) as extra:
                for name, text in more.items():
                    extra.path(f"{name}.jinja").write_text(text, encoding="utf-8", newline="")
        paths = [folder / name for name in names]
        paths[-1:-1] = [folder / (prefix + TEMPLATE_FOLDER) / f"{name}.jinja" for name in more]
    return tuple(map(str, paths))


# Constructor arguments that belong to this process or to other files, not to tokenizer_config.json.
_UNSAVED = ("name_or_path", "added_tokens_decoder", "chat_template", "files_loaded", "device_map", *EXTRA)


def _config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    config = {key: value for key, value in tokenizer.init_kwargs.items() if key not in _UNSAVED}
    config |= {key: None for key in tokenizer.init_kwargs if key in NAMES}
    config.pop("model_specific_special_tokens", None)
    for key in ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces"):
        config[key] = getattr(tokenizer, key)
    config |= tokenizer.special_tokens_map
    # The older name of the list: every version of the hub's libraries reads it, as a list.
    if tokenizer.extra_special_tokens:
        config[EXTRA[1]] = tokenizer.extra_special_tokens
    family, name = tokenizer.family, tokenizer.family.names[0]
    config.pop("add_bos_token", None)
    config.pop("add_eos_token", None)
    if tokenizer.add_bos_token or tokenizer.add_eos_token:
        # transformers rebuilds the template of these families without what the config says, so the class is
        # the generic one, which keeps the template in tokenizer.json.
        name = "PreTrainedTokenizerFast" if family.owns_template else name
    config["tokenizer_class"] = name
    return {key: _as_json(value) for key, value in config.items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, AddedToken):
        return {**value.__getstate__(), "__type": "AddedToken"}
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in cast(dict[str, Any], value).items()}
    return [_as_json(item) for item in cast(list[Any], value)] if isinstance(value, list | tuple) else value
