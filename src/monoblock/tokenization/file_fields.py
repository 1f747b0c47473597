"""Types of the fields in a tokenizer's files; unlisted fields may have any type, and are kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from tokenizers import AddedToken

from monoblock.errors import FieldError
from monoblock.field_types import brief, checked, checked_fields, declared, in_file

Token = str | AddedToken
OWNER = "tokenizer"  # prefix of field names in error messages
MOST_ID = 2**32 - 1  # maximum of a token id in the backend


class AddedFields(TypedDict, total=False):
    """The fields of an added token."""

    content: str
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class TemplateFields(TypedDict, total=False):
    """One of several chat templates."""

    name: str
    template: str


class ConfigFields(TypedDict, total=False):
    """tokenizer_config.json, with tokens as objects; the same names are arguments of the constructor."""

    tokenizer_class: str | None
    bos_token: Token | None
    eos_token: Token | None
    unk_token: Token | None
    sep_token: Token | None
    pad_token: Token | None
    cls_token: Token | None
    mask_token: Token | None
    extra_special_tokens: list[Token] | dict[str, Token] | None
    additional_special_tokens: list[Token] | dict[str, Token] | None
    model_specific_special_tokens: dict[str, Token] | None
    added_tokens_decoder: dict[str, AddedFields | AddedToken] | None
    padding_side: Literal["left", "right"]
    truncation_side: Literal["left", "right"]
    model_input_names: list[str] | None
    add_bos_token: bool | None
    add_eos_token: bool | None
    add_prefix_space: bool | None
    clean_up_tokenization_spaces: bool | None
    split_special_tokens: bool | None
    legacy: bool | None
    chat_template: str | list[TemplateFields] | dict[str, str] | None
    do_lower_case: bool | None
    strip_accents: bool | None
    tokenize_chinese_chars: bool | None
    errors: str
    original: bool | None


def check_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json, with tokens as objects; FieldError names the file and the field."""
    with in_file(path):
        fields = {name: _with_tokens(name, value) for name, value in config.items()}
        for name in ("model_max_length", "max_len"):
            if name in fields:
                fields[name] = length(name, fields[name])
        return checked_fields(OWNER, fields, declared(ConfigFields))


def _with_tokens(name: str, value: Any) -> Any:
    """Converts objects marked `"__type": "AddedToken"`, at any depth."""
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        if fields.get("__type") == "AddedToken":
            return added(name, {key: item for key, item in fields.items() if key != "__type"})
        return {key: _with_tokens(name, item) for key, item in fields.items()}
    if isinstance(value, list):
        return [_with_tokens(name, item) for item in cast("list[Any]", value)]
    return value


def length(name: str, value: Any) -> int | None:
    """A length in tokens; 1e30 and similar values stand for no limit."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if value is None or (whole and not isinstance(value, bool) and value > 0):
        return None if value is None else int(value)
    raise FieldError(f"{OWNER}.{name} must be an integer above 0 or None, got {brief(value)}", name)


def added(name: str, token: Any) -> AddedToken:
    """An added token, from itself or from its fields in a file; `name`: of the containing field."""
    if isinstance(token, AddedToken):
        return token
    fields = checked(OWNER, name, token, AddedFields)
    if "content" not in fields:
        raise FieldError(f"{OWNER}.{name} must be a token with a content, got {brief(token)}", name)
    if unknown := sorted(fields.keys() - declared(AddedFields)):
        raise FieldError(f"{OWNER}.{name} must be a token, which has no field {brief(unknown[0])}", name)
    return AddedToken(**fields)


def token_id(name: str, value: Any) -> int:
    """The id of a token; as a JSON key it is a string."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12:
        value = int(value)
    found = checked(OWNER, name, value, int)
    if not 0 <= found <= MOST_ID:
        raise FieldError(f"{OWNER}.{name} must have ids from 0 to {MOST_ID}, got {found}", name)
    return found
