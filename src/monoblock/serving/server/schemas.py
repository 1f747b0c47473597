"""`response_format`: OpenAI's form to the engine's, with limits on schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.models import TextModel
from monoblock.serving.server.settings import Limits
from monoblock.serving.server.threads import first_of, in_thread

UNIONS = ("anyOf", "oneOf", "allOf", "enum")
OPTIONS = "x-guidance"  # a key by which a schema would change the grammar library's options


def engine_format(wanted: Any, limits: Limits, param: str = "response_format") -> dict[str, Any] | None:
    """The engine's `response_format` of a request's; ApiError for a schema over the limits."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "regex":
        return {"type": "regex", "pattern": wanted.pattern}
    if wanted.type == "json_object":
        return {"type": "json_object"}
    named = getattr(wanted, "json_schema", None)
    place = f"{param}.schema" if named is None else f"{param}.json_schema.schema"
    schema: dict[str, Any] = (wanted if named is None else named).schema_
    check_schema(schema, limits, place)
    return {"type": "json_schema", "schema": schema}


def check_schema(schema: Mapping[str, Any], limits: Limits, param: str) -> None:
    """ApiError for a schema that is too long, too deep, or has too many alternatives."""
    if len(json.dumps(schema)) > limits.schema:
        raise _over(f"has more than {limits.schema:,} characters", param)
    alternatives = 0
    level: list[Any] = [schema]
    for _ in range(limits.schema_depth):
        below: list[Any] = []
        for value in level:
            if isinstance(value, list):
                below += cast("list[Any]", value)
                continue
            entries = cast("dict[str, Any]", value)
            if OPTIONS in entries:
                raise ApiError(f"{OPTIONS} is not supported in a schema", param=param, code="invalid_schema")
            for name in UNIONS:
                branches = entries.get(name)
                alternatives += len(cast("list[Any]", branches)) if isinstance(branches, list) else 0
            below += entries.values()
        if alternatives > limits.schema_alternatives:
            raise _over(f"has more than {limits.schema_alternatives:,} alternatives", param)
        level = [value for value in below if isinstance(value, dict | list)]
        if not level:
            return
    raise _over(f"is nested more than {limits.schema_depth} levels deep", param)


def _over(what: str, param: str) -> ApiError:
    return ApiError(f"the schema {what}", param=param, code="schema_too_complex")


async def check_grammar(
    wanted: dict[str, Any] | None, model: TextModel, limits: Limits, param: str = "response_format"
) -> None:
    """Compile a format once, in a thread: ApiError if it is invalid, or takes too long."""
    if wanted is None:
        return
    try:
        if not model.grammars_ready:
            # The library's form of the tokenizer takes a second for a large vocabulary, which is not the schema's.
            await in_thread(_compile, {"type": "regex", "pattern": "a"}, model, slow=True)
            model.grammars_ready = True
        await first_of(in_thread(_compile, wanted, model, slow=True), limits.schema_seconds)
    except TimeoutError:
        raise _over(f"takes longer than {limits.schema_seconds:g} s to compile", param) from None
    except ImportError as error:
        raise ApiError(str(error), status=501, param=param) from None
    except (ValueError, RuntimeError) as error:
        raise ApiError(str(error)[:1000], param=param, code="invalid_schema") from None


def _compile(wanted: dict[str, Any], model: TextModel) -> None:
    """ValueError for a grammar that the library refuses, when it is compiled or at its first token."""
    from monoblock.generation.structured import build

    core = model.engine.core
    made = build(cast(Any, None), 0, wanted, model.tokenizer, core.generation_config)
    assert made is not None
    matcher = made.matcher(core.vocab)
    matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(f"response_format cannot be used: {' '.join(matcher.get_error().split())}")
