"""Fields of requests to the engine's `SamplingParams`."""

from __future__ import annotations

import re
from typing import Any

from monoblock.serving.engine.params import SamplingParams
from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.models import TextModel
from monoblock.serving.server.settings import Limits

# Fields whose defaults are the model's.
OWN_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Fields that have the same name and meaning in SamplingParams.
SAME = (
    "n",
    "min_tokens",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
    "speculative_tokens",
    "speculation",
)


def sampling_params(
    body: Any, model: TextModel, limits: Limits, limit_field: str, **given: Any
) -> SamplingParams:
    """The parameters of a request; `given` ones come before the body's. Sampling options that a request leaves out are
    those of the model's generation_config.json. ApiError names the field that is wrong; `limit_field`: the one with the
    number of new tokens."""
    values = {name: getattr(body, name) for name in SAME if hasattr(body, name)}
    if values.get("stop") == "":
        values["stop"] = ()
    for name in OWN_DEFAULTS:
        value = getattr(body, name, None)
        value = model.defaults.get(name) if value is None else value
        if value is not None:
            values[name] = value
    if (bias := getattr(body, "logit_bias", None)) is not None:
        values["logit_bias"] = {int(token): number for token, number in bias.items()}
        model.check_ids(list(values["logit_bias"]), "logit_bias", model.vocabulary)
    model.check_ids(list(values.get("stop_token_ids", ())), "stop_token_ids", model.vocabulary)
    values |= given
    most, wanted = limits.new_tokens, getattr(body, limit_field)
    if most is not None and wanted is not None and wanted > most:
        raise ApiError(
            f"{limit_field}={wanted} is more than the {most} that this server allows", param=limit_field
        )
    if most is not None:
        values["max_tokens"] = min(values.get("max_tokens") or most, most)
    try:
        return SamplingParams(**values)
    except ValueError as error:
        raise refused_value(error, values) from None


def refused_value(error: ValueError, names: Any = ()) -> ApiError:
    """400 for a ValueError of the engine; the field is the one that the message begins with, if it is one of these."""
    message = " ".join(str(error).split())[:1000]
    word = re.match(r"[a-z_]+", message)
    param = word[0] if word and word[0] in {*names, "response_format", "prompt"} else None
    return ApiError(message, param=param, code="invalid_value")


def room(model: TextModel, count: int, wanted: int | None, param: str) -> None:
    """ApiError for a prompt of `count` tokens that leaves no room for `wanted` new ones (None: for any)."""
    most = model.max_length
    if count + (wanted or 1) > most:
        new = f" and {wanted:,} new ones" if wanted else ""
        raise ApiError(
            f"the model's context has {most:,} tokens; the prompt has {count:,}{new}: shorten it, or ask for fewer",
            param=param,
            code="context_length_exceeded",
        )
