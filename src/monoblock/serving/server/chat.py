"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from monoblock.serving.engine.params import SamplingParams
from monoblock.serving.engine.results import Completion
from monoblock.serving.server import choices
from monoblock.serving.server.answers import stream_while_used, timed_answer
from monoblock.serving.server.endpoints import CHAT
from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.generating import AnswerRun
from monoblock.serving.server.kinds import ModelKind
from monoblock.serving.server.models import TextModel
from monoblock.serving.server.prompts import PreparedPrompt, TemplateOptions, chat_prompt
from monoblock.serving.server.sampling import room, sampling_params
from monoblock.serving.server.schemas import check_grammar, check_schema, engine_format
from monoblock.serving.server.service import ServerState, check_count, state_of
from monoblock.serving.server.streaming import event
from monoblock.serving.server.threads import in_thread
from monoblock.serving.server.tools import ToolCall, ToolParser, forced_schema, offered


@dataclass(frozen=True)
class ToolUse:
    """How a request uses tools. `names`: of the functions that may be called; `forced`: a call must come."""

    names: frozenset[str] = frozenset()
    forced: bool = False
    single: bool = False
    hidden: tuple[str, ...] = ()

    def parser(self) -> ToolParser | None:
        """A parser for one choice; None without tools."""
        if not self.names:
            return None
        return ToolParser(self.names, inside=self.forced, single=self.single, hidden=self.hidden)


@dataclass
class ChatJob:
    """A checked request with its prompt and its sampling parameters."""

    model: TextModel
    name: str
    prompt: PreparedPrompt
    params: SamplingParams
    tools: ToolUse = field(default_factory=ToolUse)

    def run(self, state: ServerState) -> AnswerRun:
        """The submitted generation."""
        run = AnswerRun(self.model, self.name, state.metrics, state.settings.limits.request_seconds)
        run.submit([self.prompt], self.params)
        return run


@dataclass(frozen=True, kw_only=True)
class ChatTask:
    """What chat and responses ask for, in one form. `functions`: (name, schema of the arguments)."""

    messages: Sequence[Any]
    max_tokens: int | None
    max_tokens_field: str
    logprobs: int | None
    response_format: Any
    format_field: str
    tools: Sequence[dict[str, Any]]
    functions: Sequence[tuple[str, dict[str, Any] | None]]
    strict: bool
    tool_choice: Any
    parallel: bool
    messages_field: str = "messages"


async def prepare(body: Any, task: ChatTask, model: TextModel, name: str, state: ServerState) -> ChatJob:
    """The job of a request; ApiError for what the model or the server does not do."""
    limits = state.settings.limits
    check_count(task.messages, limits.messages, task.messages_field)
    tools, wanted = await _tools(body, task, model, state)
    if wanted is None:
        wanted = engine_format(task.response_format, limits, task.format_field)
        await check_grammar(wanted, model, limits, task.format_field)
    options = TemplateOptions(
        tools=task.tools if tools.names else None,
        add_generation_prompt=getattr(body, "add_generation_prompt", True),
        continue_final_message=getattr(body, "continue_final_message", False),
        chat_template=getattr(body, "chat_template", None),
        chat_template_kwargs=getattr(body, "chat_template_kwargs", None),
        documents=getattr(body, "documents", None),
        add_special_tokens=getattr(body, "add_special_tokens", False),
    )
    prompt = await in_thread(
        chat_prompt, model, task.messages, options, state.settings, task.messages_field,
        slow=options.chat_template is not None,
    )  # fmt: skip
    limit = task.max_tokens
    if limit is None:
        limit = model.new_tokens
    if not isinstance(prompt.ids, str):
        ids = list(prompt.ids)
        keep = getattr(body, "truncate_prompt_tokens", None)
        ids = ids if keep is None else ids[-keep:]
        if tools.forced and model.tool_marker is not None:
            ids.append(model.tool_marker)  # the constrained text is a list of calls, which the marker begins
        if not ids:
            raise ApiError("the conversation has no tokens", param=task.messages_field, code="invalid_value")
        room(model, len(ids), task.max_tokens, task.messages_field)
        limit = min(limit or model.max_length, model.max_length - len(ids))
        prompt = PreparedPrompt(ids)
    given: dict[str, Any] = {"logprobs": task.logprobs, "response_format": wanted, "max_tokens": limit}
    if tools.names:
        given["skip_special_tokens"] = False  # Mistral's marker is one
    params = sampling_params(body, model, limits, task.max_tokens_field, **given)
    return ChatJob(model, name, prompt, params, tools)


async def _tools(
    body: Any, task: ChatTask, model: TextModel, state: ServerState
) -> tuple[ToolUse, dict[str, Any] | None]:
    """How the request uses tools, and the format that forces a call."""
    limits = state.settings.limits
    choice = task.tool_choice
    if not task.tools:
        if choice not in (None, "none"):
            raise ApiError("tool_choice needs tools", param="tool_choice", code="invalid_value")
        return ToolUse(), None
    check_count(task.tools, limits.tools, "tools")
    names, wanted = offered(task.functions, choice)
    for index, (_, parameters) in enumerate(task.functions):
        check_schema(parameters or {}, limits, f"tools[{index}]")
    if choice == "none":
        return ToolUse(), None
    if not model.knows_tools(getattr(body, "chat_template", None)):
        raise ApiError("this model's chat template knows no tools", param="tools", code="model_not_supported")
    forced = wanted is not None or choice == "required"
    if task.strict and not forced:
        raise ApiError(
            'strict tools need tool_choice "required" or a tool\'s name, which constrain the output; with "auto" the '
            "arguments are the model's own",
            param="tools",
            code="unsupported_parameter",
        )
    hidden = model.special_tokens if getattr(body, "skip_special_tokens", True) else ()
    use = ToolUse(names, forced, not task.parallel or wanted is not None, hidden)
    if not forced:
        return use, None
    if task.response_format is not None and task.response_format.type != "text":
        raise ApiError(
            "a response_format and a tool_choice that requires a call exclude each other",
            param=task.format_field,
            code="invalid_value",
        )
    chosen = [pair for pair in task.functions if wanted is None or pair[0] == wanted]
    form = {"type": "json_schema", "schema": forced_schema(chosen, several=not use.single)}
    await check_grammar(form, model, limits, "tools")
    return use, form


def chat_task(body: Any) -> ChatTask:
    """The task of a chat request; ApiError for fields that contradict one another."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    if body.stream_options is not None and not body.stream:
        raise ApiError("stream_options needs stream: true", param="stream_options", code="invalid_value")
    if body.prompt_logprobs is not None and body.stream:
        raise ApiError(
            "prompt_logprobs is not returned with stream", param="prompt_logprobs", code="invalid_value"
        )
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise ApiError(
            "max_tokens is the older name of max_completion_tokens: pass one",
            param="max_tokens",
            code="invalid_value",
        )
    tools: list[Any] = body.tools or []
    return ChatTask(
        messages=body.messages,
        max_tokens=old if new is None else new,
        max_tokens_field="max_tokens" if new is None else "max_completion_tokens",
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        response_format=body.response_format,
        format_field="response_format",
        tools=[tool.model_dump(exclude_none=True) for tool in tools],
        functions=[(tool.function.name, tool.function.parameters) for tool in tools],
        strict=any(tool.function.strict for tool in tools),
        tool_choice=body.tool_choice,
        parallel=body.parallel_tool_calls,
    )


async def chat_completions(request: Request) -> Response:
    """The next message of a conversation, whole or as events."""
    state = state_of(request)
    body = await state.read(request, CHAT)
    task = chat_task(body)
    name = state.registry.find(body.model, ModelKind.GENERATE).name
    if body.stream:
        return await stream_while_used(
            state, request, body.model, lambda m: _stream(body, task, m, name, state)
        )

    async def work() -> dict[str, Any]:
        async with state.registry.use(body.model, ModelKind.GENERATE) as model:
            job = await prepare(body, task, model, name, state)
            return await _whole(body, job, state)

    return await timed_answer(request, state, work())


def _frame(name: str, kind: str) -> dict[str, Any]:
    return {
        "id": choices.identifier("chatcmpl-"),
        "object": kind,
        "created": choices.now(),
        "model": name,
        "system_fingerprint": choices.fingerprint(name),
    }


def finished(finish: str | None, calls: Sequence[ToolCall]) -> str:
    """OpenAI's finish_reason."""
    return "tool_calls" if calls and finish == "stop" else finish or "stop"


async def _whole(body: Any, job: ChatJob, state: ServerState) -> dict[str, Any]:
    run = job.run(state)
    [sequences] = await run.completions()
    answer: dict[str, Any] = {
        **_frame(job.name, "chat.completion"),
        "choices": [_choice(body, job, sequence) for sequence in sequences],
        "usage": run.usage(),
    }
    [generation] = run.generations
    if body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = choices.prompt_logprobs(generation.prompt_logprobs, job.model.spelling)
    if body.return_token_ids:
        answer["prompt_token_ids"] = list(generation.prompt)
    return answer


def _choice(body: Any, job: ChatJob, sequence: Completion) -> dict[str, Any]:
    text, calls = sequence.text, list[ToolCall]()
    if (parser := job.tools.parser()) is not None:
        first, some = parser.add(text)
        rest, more = parser.end()
        text, calls = first + rest, [*some, *more]
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message |= {"content": text.strip() or None, "tool_calls": [call.content() for call in calls]}
    choice: dict[str, Any] = {
        "index": sequence.index,
        "message": message,
        "logprobs": _logprobs(body, job, sequence.logprobs),
        "finish_reason": finished(sequence.finish, calls),
        "stop_reason": sequence.stop,
    }
    if body.return_token_ids:
        choice["token_ids"] = list(sequence.tokens)
    return choice


def _logprobs(body: Any, job: ChatJob, found: Any) -> dict[str, Any] | None:
    if not body.logprobs:
        return None
    content = choices.chat_logprobs(
        found, job.model.spelling, bool(body.top_logprobs), body.return_tokens_as_token_ids
    )
    return {"content": content, "refusal": None}


async def started(
    body: Any, task: ChatTask, model: TextModel, name: str, state: ServerState
) -> tuple[ChatJob, AnswerRun]:
    """The job and the submitted generation of a stream; of an image it has begun, so that its errors have a status."""
    job = await prepare(body, task, model, name, state)
    run = job.run(state)
    if job.prompt.image is not None:
        await run.begin()
    return job, run


async def _stream(
    body: Any, task: ChatTask, model: TextModel, name: str, state: ServerState
) -> tuple[AsyncGenerator[bytes], AnswerRun]:
    job, run = await started(body, task, model, name, state)
    return _events(body, job, run), run


async def _events(body: Any, job: ChatJob, run: AnswerRun) -> AsyncGenerator[bytes]:
    """The chunks: a role for each choice, then text and calls, and at the end the usage if requested."""
    options = body.stream_options
    counted = options is not None and options.include_usage
    always = options is not None and options.continuous_usage_stats
    frame = _frame(job.name, "chat.completion.chunk")
    parsers: dict[int, ToolParser | None] = {}

    def chunk(choice: dict[str, Any]) -> bytes:
        usage = {"usage": run.usage() if always else None} if counted or always else {}
        return event({**frame, "choices": [choice], **usage})

    def part(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}

    deltas = run.deltas()
    try:
        for index in range(job.params.n):
            parsers[index] = job.tools.parser()
            yield chunk(part(index, {"role": "assistant", "content": "", "refusal": None}))
        async for _, delta in deltas:
            index, text, calls = delta.index, delta.text, list[ToolCall]()
            parser = parsers[index]
            sent = 0
            if parser is not None:
                sent = len(parser.calls)
                text, calls = parser.add(text)
                if delta.finish is not None:
                    rest, more = parser.end()
                    text, calls = text + rest, [*calls, *more]
            content: dict[str, Any] = {"content": text} if text or not calls else {}
            if calls:
                content["tool_calls"] = [
                    {"index": sent + i, **call.content()} for i, call in enumerate(calls)
                ]
            extra: dict[str, Any] = {"logprobs": _logprobs(body, job, delta.logprobs)}
            if body.return_token_ids:
                extra["token_ids"] = list(delta.tokens)
            if text or calls or (delta.tokens and (body.logprobs or body.return_token_ids)):
                yield chunk(part(index, content, **extra))
            if delta.finish is not None:
                reason = finished(delta.finish, parser.calls if parser is not None else ())
                yield chunk(part(index, {}, finish_reason=reason, stop_reason=delta.stop))
        if counted:
            yield event({**frame, "choices": [], "usage": run.usage()})
    finally:
        await deltas.aclose()
