"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from monoblock.serving.server.answers import timed_answer
from monoblock.serving.server.endpoints import DETOKENIZE, TOKENIZE
from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.models import TextModel
from monoblock.serving.server.prompts import TemplateOptions, chat_prompt, encoded
from monoblock.serving.server.service import ServerState, check_count, state_of
from monoblock.serving.server.threads import in_thread

LONG = 2**18  # characters of a text


async def tokenize(request: Request) -> Response:
    """The token ids of a text or a conversation."""
    state = state_of(request)
    body = await state.read(request, TOKENIZE)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError("pass either prompt or messages", param="prompt", code="invalid_value")

    async def work() -> dict[str, Any]:
        async with state.registry.use(body.model) as model:
            ids = await in_thread(_ids, body, model, state, slow=_slow(body))
            answer: dict[str, Any] = {"count": len(ids), "max_model_len": model.max_length, "tokens": ids}
            if body.return_token_strs:
                answer["token_strs"] = model.tokenizer.convert_ids_to_tokens(ids)
            return answer

    return await timed_answer(request, state, work())


def _slow(body: Any) -> bool:
    """Whether tokenising may take seconds."""
    return body.chat_template is not None or len(body.prompt or "") > LONG


def _ids(body: Any, model: Any, state: ServerState) -> list[int]:
    special = body.add_special_tokens
    if body.prompt is not None:
        given = {name: getattr(body, name) for name in ("tools", "chat_template", "documents")}
        if unused := next((name for name, value in given.items() if value is not None), None):
            raise ApiError(f"{unused} belongs to messages, not to prompt", param=unused, code="invalid_value")
        return list(
            model.tokenizer(body.prompt, add_special_tokens=special is not False, verbose=False)["input_ids"]
        )
    if not isinstance(model, TextModel):
        raise ApiError(
            "messages are for models that generate text", param="messages", code="model_not_supported"
        )
    check_count(body.messages, state.settings.limits.messages, "messages")
    options = TemplateOptions(
        tools=None if body.tools is None else [tool.model_dump(exclude_none=True) for tool in body.tools],
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template=body.chat_template,
        chat_template_kwargs=body.chat_template_kwargs,
        documents=body.documents,
        add_special_tokens=bool(special),
    )
    prompt = chat_prompt(model, body.messages, options, state.settings)
    if prompt.image is not None:
        raise ApiError(
            "a conversation with an image has no ids of its own", param="messages", code="invalid_value"
        )
    return list(
        encoded(model, prompt.ids, bool(special), "messages") if isinstance(prompt.ids, str) else prompt.ids
    )


async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    state = state_of(request)
    body = await state.read(request, DETOKENIZE)

    async def work() -> dict[str, Any]:
        async with state.registry.use(body.model) as model:
            model.check_ids(body.tokens, "tokens", model.vocabulary)
            text = await in_thread(
                lambda: model.tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
            )
            return {"prompt": text}

    return await timed_answer(request, state, work())
