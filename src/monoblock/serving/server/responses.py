"""POST /v1/responses: text and calls of functions; nothing is stored."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from monoblock.serving.engine.results import Completion
from monoblock.serving.server import choices
from monoblock.serving.server.answers import stream_while_used, timed_answer
from monoblock.serving.server.chat import ChatJob, ChatTask, prepare, started
from monoblock.serving.server.content import (
    CalledFunction,
    ChatMessage,
    ImagePart,
    ImageUrl,
    PastToolCall,
    TextPart,
)
from monoblock.serving.server.endpoints import RESPONSES
from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.generating import AnswerRun
from monoblock.serving.server.kinds import ModelKind
from monoblock.serving.server.models import TextModel
from monoblock.serving.server.service import ServerState, state_of
from monoblock.serving.server.streaming import event
from monoblock.serving.server.tools import ToolCall

LOGPROBS = "message.output_text.logprobs"


async def responses(request: Request) -> Response:
    """The answer to a text or a conversation, whole or as events."""
    state = state_of(request)
    body = await state.read(request, RESPONSES)
    if body.top_logprobs is not None and LOGPROBS not in body.include:
        raise ApiError(
            f'top_logprobs needs include: ["{LOGPROBS}"]', param="top_logprobs", code="invalid_value"
        )
    task = _task(body)
    name = state.registry.find(body.model, ModelKind.GENERATE).name
    if body.stream:
        return await stream_while_used(
            state, request, body.model, lambda m: _stream(body, task, m, name, state), done=False
        )

    async def work() -> dict[str, Any]:
        async with state.registry.use(body.model, ModelKind.GENERATE) as model:
            job = await prepare(body, task, model, name, state)
            run = job.run(state)
            [[sequence]] = await run.completions()
            return _whole(body, job, run, sequence)

    return await timed_answer(request, state, work())


def _task(body: Any) -> ChatTask:
    messages = _messages(body)
    tools: list[Any] = body.tools or []
    return ChatTask(
        messages=messages,
        max_tokens=body.max_output_tokens,
        max_tokens_field="max_output_tokens",
        logprobs=(body.top_logprobs or 0) if LOGPROBS in body.include else None,
        response_format=None if body.text is None else body.text.format,
        format_field="text.format",
        tools=[
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in tools
        ],
        functions=[(tool.name, tool.parameters) for tool in tools],
        strict=any(tool.strict for tool in tools),
        tool_choice=body.tool_choice,
        parallel=body.parallel_tool_calls,
        messages_field="input",
    )


def _messages(body: Any) -> list[ChatMessage]:
    """The conversation as messages of /v1/chat/completions."""
    found: list[ChatMessage] = []
    if body.instructions is not None:
        found.append(ChatMessage(role="system", content=body.instructions))
    if isinstance(body.input, str):
        return [*found, ChatMessage(role="user", content=body.input)]
    for item in body.input:
        if item.type == "message":
            found.append(ChatMessage(role=item.role, content=_content(item.content)))
        elif item.type == "function_call_output":
            found.append(ChatMessage(role="tool", tool_call_id=item.call_id, content=item.output))
        else:
            call = PastToolCall(
                id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments)
            )
            last = found[-1] if found else None
            if last is not None and last.tool_calls and not last.content:
                last.tool_calls.append(call)  # calls in a row are one message
            else:
                found.append(ChatMessage(role="assistant", tool_calls=[call]))
    return found


def _content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    parts: list[Any] = []
    for part in content:
        if part.type == "input_image":
            parts.append(ImagePart(type="image_url", image_url=ImageUrl(url=part.image_url)))
        else:
            parts.append(
                TextPart(type="text", text=getattr(part, "text", None) or getattr(part, "refusal", ""))
            )
    return parts


# ---------------------------------------------------------------------------- objects


def _response(body: Any, job: ChatJob, identity: str, created: int) -> dict[str, Any]:
    """The response object before its output."""
    form = None if body.text is None else body.text.format
    tools: list[Any] = body.tools or []
    choice = body.tool_choice
    return {
        "id": identity,
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "model": job.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": None,
        "store": False,
        "temperature": job.params.temperature,
        "top_p": job.params.top_p,
        "top_logprobs": body.top_logprobs,
        "text": {
            "format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)
        },
        "tool_choice": "auto"
        if choice is None
        else choice
        if isinstance(choice, str)
        else choice.model_dump(),
        "tools": [tool.model_dump() for tool in tools],
        "truncation": "disabled",
        "usage": None,
    }


def _usage(run: AnswerRun) -> dict[str, Any]:
    usage = run.usage()
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }


def _ended(response: dict[str, Any], run: AnswerRun, finish: str | None, output: list[Any]) -> dict[str, Any]:
    """The response object at the end."""
    cut = finish == "length"
    return {
        **response,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output,
        "usage": _usage(run),
    }


def _text_part(text: str, logprobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _message(identity: str, status: str, content: list[Any]) -> dict[str, Any]:
    return {"id": identity, "type": "message", "role": "assistant", "status": status, "content": content}


def _call(call: ToolCall, identity: str, status: str, arguments: str | None = None) -> dict[str, Any]:
    return {
        "id": identity,
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments if arguments is None else arguments,
    }


def _logprobs(body: Any, job: ChatJob, found: Any) -> list[dict[str, Any]]:
    if LOGPROBS not in body.include:
        return []
    return choices.chat_logprobs(found, job.model.spelling, bool(body.top_logprobs))


def _whole(body: Any, job: ChatJob, run: AnswerRun, sequence: Completion) -> dict[str, Any]:
    text, calls = sequence.text, list[ToolCall]()
    if (parser := job.tools.parser()) is not None:
        first, some = parser.add(text)
        rest, more = parser.end()
        text, calls = first + rest, [*some, *more]
    status = "incomplete" if sequence.finish == "length" else "completed"
    output: list[Any] = []
    if text.strip() or not calls:
        part = _text_part(text, _logprobs(body, job, sequence.logprobs))
        output.append(_message(choices.identifier("msg_"), status, [part]))
    output += [_call(call, choices.identifier("fc_"), "completed") for call in calls]
    response = _response(body, job, choices.identifier("resp_"), choices.now())
    return _ended(response, run, sequence.finish, output)


# ---------------------------------------------------------------------------- events


async def _stream(
    body: Any, task: ChatTask, model: TextModel, name: str, state: ServerState
) -> tuple[AsyncGenerator[bytes], AnswerRun]:
    job, run = await started(body, task, model, name, state)
    return _events(body, job, run), run


class EventWriter:
    """Numbers the events, and keeps the output items that they describe."""

    def __init__(self) -> None:
        self.number = 0
        self.output: list[Any] = []
        self.message: str | None = None  # the id of the message that is being written
        self.text = ""
        self.logprobs: list[dict[str, Any]] = []

    def event(self, kind: str, **values: Any) -> bytes:
        """An event with the next number."""
        data = event({"type": kind, "sequence_number": self.number, **values}, kind)
        self.number += 1
        return data

    def _part_event(self, kind: str, **values: Any) -> bytes:
        return self.event(
            kind, item_id=self.message, output_index=len(self.output), content_index=0, **values
        )

    def add_text(self, text: str, logprobs: list[dict[str, Any]]) -> list[bytes]:
        """The events of new text; the first text begins a message."""
        events: list[bytes] = []
        if self.message is None:
            self.message, self.text, self.logprobs = choices.identifier("msg_"), "", []
            item = _message(self.message, "in_progress", [])
            events.append(self.event("response.output_item.added", output_index=len(self.output), item=item))
            events.append(self._part_event("response.content_part.added", part=_text_part("", [])))
        self.text += text
        self.logprobs += logprobs
        events.append(self._part_event("response.output_text.delta", delta=text, logprobs=logprobs))
        return events

    def end_text(self, status: str) -> list[bytes]:
        """The events at the end of a message, if one is being written."""
        if self.message is None:
            return []
        part = _text_part(self.text, self.logprobs)
        item = _message(self.message, status, [part])
        events = [
            self._part_event("response.output_text.done", text=self.text, logprobs=self.logprobs),
            self._part_event("response.content_part.done", part=part),
            self.event("response.output_item.done", output_index=len(self.output), item=item),
        ]
        self.output.append(item)
        self.message = None
        return events

    def add_call(self, call: ToolCall) -> list[bytes]:
        """The events of a call."""
        identity, index = choices.identifier("fc_"), len(self.output)
        where = {"item_id": identity, "output_index": index}
        done = _call(call, identity, "completed")
        self.output.append(done)
        return [
            self.event(
                "response.output_item.added",
                output_index=index,
                item=_call(call, identity, "in_progress", ""),
            ),
            self.event("response.function_call_arguments.delta", **where, delta=call.arguments),
            self.event(
                "response.function_call_arguments.done", **where, name=call.name, arguments=call.arguments
            ),
            self.event("response.output_item.done", output_index=index, item=done),
        ]


async def _events(body: Any, job: ChatJob, run: AnswerRun) -> AsyncGenerator[bytes]:
    writer = EventWriter()
    response = _response(body, job, choices.identifier("resp_"), choices.now())
    parser = job.tools.parser()
    finish: str | None = None
    deltas = run.deltas()
    try:
        yield writer.event("response.created", response=response)
        yield writer.event("response.in_progress", response=response)
        async for _, delta in deltas:
            text, calls = delta.text, list[ToolCall]()
            if parser is not None:
                text, calls = parser.add(text)
                if delta.finish is not None:
                    rest, more = parser.end()
                    text, calls = text + rest, [*calls, *more]
            finish = delta.finish or finish
            found = _logprobs(body, job, delta.logprobs)
            if text or (found and not calls):
                for data in writer.add_text(text, found):
                    yield data
            for call in calls:
                for data in (*writer.end_text("completed"), *writer.add_call(call)):
                    yield data
        if writer.message is None and not writer.output:
            for data in writer.add_text("", []):
                yield data
        for data in writer.end_text("incomplete" if finish == "length" else "completed"):
            yield data
        ended = _ended(response, run, finish, writer.output)
        kind = "response.incomplete" if finish == "length" else "response.completed"
        yield writer.event(kind, response=ended)
    except ApiError as error:
        content = error.content()["error"]
        failed = {
            **response,
            "status": "failed",
            "error": {"code": "server_error", "message": content["message"]},
        }
        yield writer.event("response.failed", response=failed)
    finally:
        await deltas.aclose()
