"""POST /attention: the tokens that one token of a text attends to, for the page."""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from monoblock.pipelines.frameworks import of_model
from monoblock.serving.engine.async_engine import AsyncEngine
from monoblock.serving.server.answers import timed_answer
from monoblock.serving.server.content import ChatMessage
from monoblock.serving.server.endpoints import MODEL
from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.fields import Endpoint, honoured
from monoblock.serving.server.kinds import ModelKind
from monoblock.serving.server.models import TextModel
from monoblock.serving.server.prompts import TemplateOptions, chat_prompt, encoded
from monoblock.serving.server.service import ServerState, check_count, state_of
from monoblock.serving.server.threads import in_thread
from monoblock.utils.labels import TokenLabels

MOST_TOKENS = 512  # of a text; of a longer one, the last ones
KEPT = 8  # results per model: choosing another layer or head computes nothing
DIGITS = 6

Index = Annotated[int, Field(ge=0, le=2**31 - 1)] | Literal["mean"]

ATTENTION = Endpoint(
    "/attention",
    "AttentionRequest",
    "The attention weights of one token of a text or a conversation.",
    (
        MODEL,
        honoured("prompt", str, "a text; either this or `messages`"),
        honoured("messages", Annotated[list[ChatMessage], Field(min_length=1)], "a conversation"),
        honoured("layer", Index, "a layer's index, or `mean` of all", "mean"),
        honoured("head", Index, "a head's index, or `mean` of all", "mean"),
        honoured(
            "position",
            Annotated[int, Field(ge=0, le=2**31 - 1)],
            "the index in `tokens` of the token that attends; default: the last",
        ),
    ),
)

_kept: WeakKeyDictionary[AsyncEngine, OrderedDict[tuple[int, ...], np.ndarray[Any, Any]]] = (
    WeakKeyDictionary()
)


async def attention(request: Request) -> Response:
    """The tokens of the text, and the weight that the chosen one gives to each up to itself.

    {"tokens": labels, "weights": [position + 1], "position", "skipped": tokens left out before the first, "layer",
    "head", "layers": count, "heads": count, "model"}
    """
    state = state_of(request)
    body = await state.read(request, ATTENTION)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError("pass either prompt or messages", param="prompt", code="invalid_value")

    async def work() -> dict[str, Any]:
        async with state.registry.use(body.model, ModelKind.GENERATE) as model:
            name = state.registry.find(body.model).name
            return {"model": name, **await _answer(body, model, state)}

    return await timed_answer(request, state, work())


async def _answer(body: Any, model: TextModel, state: ServerState) -> dict[str, Any]:
    whole = model.engine.core.model
    if whole.tensor_group is not None or whole.pipeline_stage is not None:
        raise ApiError(
            "attention weights are not shown for a model in several processes: serve it by one",
            param="model",
            code="model_not_supported",
        )
    spec = model.engine.core.model.spec
    for name, count in (("layer", spec.layers), ("head", spec.attention.heads)):
        value = getattr(body, name)
        if value != "mean" and value >= count:
            raise ApiError(
                f"{name} must be 0 to {count - 1} or 'mean', got {value}", param=name, code="invalid_value"
            )
    ids = await in_thread(_ids, body, model, state)
    if not ids:
        raise ApiError("the text has no tokens", param="prompt", code="invalid_value")
    shown = ids[-min(MOST_TOKENS, model.max_length) :]
    position = len(shown) - 1 if body.position is None else body.position
    if position >= len(shown):
        raise ApiError(
            f"position must be 0 to {len(shown) - 1}, got {position}", param="position", code="invalid_value"
        )
    weights = await _weights(model.engine, tuple(shown[: position + 1]))
    for axis, choice in ((0, body.layer), (0, body.head)):
        weights = weights.mean(axis) if choice == "mean" else weights[choice]
    labels = await in_thread(lambda: list(map(TokenLabels(model.tokenizer), shown)))
    return {
        "tokens": labels,
        "weights": [round(value, DIGITS) for value in weights.tolist()],
        "position": position,
        "skipped": len(ids) - len(shown),
        "layer": body.layer,
        "head": body.head,
        "layers": spec.layers,
        "heads": spec.attention.heads,
    }


def _ids(body: Any, model: TextModel, state: ServerState) -> list[int]:
    """The tokens of the request. A conversation that ends with a reply ends with that reply's last token."""
    if body.prompt is not None:
        return encoded(model, body.prompt, True, "prompt", truncated=True)
    check_count(body.messages, state.settings.limits.messages, "messages")
    reply = body.messages[-1].role == "assistant"
    options = TemplateOptions(add_generation_prompt=not reply, continue_final_message=reply)
    prompt = chat_prompt(model, body.messages, options, state.settings)
    if isinstance(prompt.ids, str):
        raise ApiError(
            "attention to images is not shown: leave them out", param="messages", code="invalid_value"
        )
    return list(prompt.ids)


async def _weights(engine: AsyncEngine, ids: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The weights of the last of these tokens, [layers, heads, tokens]; computed between steps of the engine."""
    kept = _kept.setdefault(engine, OrderedDict())
    if ids not in kept:
        model = engine.core.model
        adapter = of_model(model).engine_adapter
        kept[ids] = await engine.run(lambda: adapter.attention_weights(model, ids))
        while len(kept) > KEPT:
            kept.popitem(last=False)
    kept.move_to_end(ids)
    return kept[ids]
