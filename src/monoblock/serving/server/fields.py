"""Endpoints as tables of fields: each is honoured, accepted without effect, or refused by name.

Pydantic checks the values; `tools/make_api_fields.py` writes the tables to docs/api-fields.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from monoblock.field_types import brief
from monoblock.serving.server.errors import ApiError

CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class RequestPart(BaseModel):
    """A JSON object inside a field; unknown keys are refused."""

    model_config = CONFIG


class Status(StrEnum):
    """What becomes of a field."""

    HONOURED = "honoured"
    ACCEPTED = "accepted"  # it has no effect here, and its absence harms nobody
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class ApiField:
    """A field of a request.

    `kind`: its type, with pydantic's constraints. `about`: its effect, or the reason why it has none or is refused.
    `idle`: values of a refused field that ask for nothing and are accepted. `example`: a value of a field that is not
    honoured, for tests. null is the same as the field's absence.
    """

    name: str
    kind: Any
    about: str
    status: Status = Status.HONOURED
    default: Any = None
    required: bool = False
    idle: tuple[Any, ...] = ()
    example: Any = None


def honoured(name: str, kind: Any, about: str, default: Any = None, *, required: bool = False) -> ApiField:
    """A field that has its documented effect."""
    return ApiField(name=name, kind=kind, about=about, default=default, required=required)


def accepted(name: str, kind: Any, about: str, example: Any) -> ApiField:
    """A field without effect."""
    return ApiField(name=name, kind=kind, about=about, status=Status.ACCEPTED, example=example)


def refused(name: str, about: str, example: Any, *idle: Any) -> ApiField:
    """A field that is refused, except for its `idle` values."""
    return ApiField(name=name, kind=Any, about=about, status=Status.REFUSED, example=example, idle=idle)


@dataclass(frozen=True)
class Endpoint:
    """A route with a JSON body. `title`: the name of its body's schema."""

    path: str
    title: str
    about: str
    fields: tuple[ApiField, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, ApiField]:
        """The fields by name."""
        return {field.name: field for field in self.fields}

    @functools.cached_property
    def model(self) -> type[BaseModel]:
        """The pydantic model of the fields that are not refused."""
        described: dict[str, Any] = {}
        for field in self.fields:
            if field.status is not Status.REFUSED:
                default = ... if field.required else field.default
                described[field.name] = (
                    Annotated[field.kind, Field(description=field.about)],
                    default,
                )
        return create_model(self.title, __config__=CONFIG, **described)

    def read(self, body: Mapping[str, Any]) -> Any:
        """The values of a body as attributes, with the defaults; ApiError names the field that is wrong."""
        given = {name: value for name, value in body.items() if value is not None}
        for name, value in given.items():
            field = self.by_name.get(name)
            if field is None:
                raise ApiError(
                    f"unknown field {brief(name)}: {self.path} takes no such field",
                    param=name if len(name) <= 100 else None,
                    code="unknown_parameter",
                )
            if field.status is Status.REFUSED and not _among(value, field.idle):
                raise ApiError(
                    f"{name} is not supported: {field.about}", param=name, code="unsupported_parameter"
                )
        given = {n: v for n, v in given.items() if self.by_name[n].status is not Status.REFUSED}
        try:
            return self.model.model_validate(given)
        except ValidationError as error:
            raise _explained(error, given) from None


def _among(value: Any, idle: tuple[Any, ...]) -> bool:
    """Whether a value is one of those, of the same type: True is not 1."""
    return any(type(value) is type(other) and value == other for other in idle)


def _explained(error: ValidationError, body: Any) -> ApiError:
    """The deepest of pydantic's errors: of a union, the member that fits best."""
    found = cast("list[dict[str, Any]]", error.errors(include_url=False, include_context=False))
    paths = [_path(item["loc"], body, item["type"] in ("missing", "extra_forbidden")) for item in found]
    best = max(range(len(found)), key=lambda i: (len(paths[i]), -i))
    item, path = found[best], paths[best]
    name = spelled(path)
    if item["type"] == "missing":
        return ApiError(f"{name} is missing", param=name, code="missing_required_parameter")
    if item["type"] == "extra_forbidden":
        return ApiError(f"unknown field {brief(name)}", param=name, code="unknown_parameter")
    message = item["msg"].removeprefix("Value error, ")
    return ApiError(
        f"invalid value of {name}: {message}, got {brief(item['input'])}", param=name, code="invalid_value"
    )


def _path(location: Sequence[str | int], body: Any, absent: bool) -> list[str | int]:
    """The keys and indices of a location, without pydantic's names of union members. `absent`: the last key may be one
    that the body does not have."""
    path: list[str | int] = []
    value = body
    for index, step in enumerate(location):
        last = index == len(location) - 1
        if isinstance(value, dict) and (step in value or (last and absent)):
            path.append(step)
            value = cast("dict[Any, Any]", value).get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(cast("list[Any]", value)):
            path.append(step)
            value = cast("list[Any]", value)[step]
    return path


def spelled(path: Sequence[str | int]) -> str:
    """messages, 0, content -> "messages[0].content"; long keys are cut."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step[:100]}"
    return text.removeprefix(".")[:400]
