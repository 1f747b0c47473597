"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from monoblock.serving.engine.params import SamplingParams
from monoblock.serving.engine.results import Completion, TokenLogprob
from monoblock.serving.server import choices
from monoblock.serving.server.answers import stream_while_used, timed_answer
from monoblock.serving.server.endpoints import COMPLETIONS
from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.generating import AnswerRun
from monoblock.serving.server.kinds import ModelKind
from monoblock.serving.server.models import TextModel
from monoblock.serving.server.prompts import PreparedPrompt, text_prompts
from monoblock.serving.server.sampling import room, sampling_params
from monoblock.serving.server.schemas import check_grammar, engine_format
from monoblock.serving.server.service import ServerState, check_count, state_of
from monoblock.serving.server.streaming import event
from monoblock.serving.server.threads import in_thread


@dataclass
class CompletionJob:
    """A checked request. `echoes`: the text of each prompt, with `echo`. `silent`: max_tokens is 0."""

    body: Any
    model: TextModel
    name: str
    prompts: list[list[int]]
    params: SamplingParams
    echoes: list[str] = field(default_factory=list[str])

    @property
    def silent(self) -> bool:
        """Whether nothing is generated: one token is, which is not returned."""
        return self.body.max_tokens == 0

    def run(self, state: ServerState) -> AnswerRun:
        """The submitted generations."""
        run = AnswerRun(self.model, self.name, state.metrics, state.settings.limits.request_seconds)
        run.submit([PreparedPrompt(ids) for ids in self.prompts], self.params)
        return run

    def frame(self) -> dict[str, Any]:
        """The fields of an answer, and of each event, beside the choices."""
        return {
            "id": choices.identifier("cmpl-"),
            "object": "text_completion",
            "created": choices.now(),
            "model": self.name,
            "system_fingerprint": choices.fingerprint(self.name),
        }


def _check(body: Any) -> None:
    """ApiError for fields that contradict one another."""

    def refuse(message: str, param: str) -> ApiError:
        return ApiError(message, param=param, code="invalid_value")

    if body.best_of is not None and body.best_of < body.n:
        raise refuse(f"best_of={body.best_of} is less than n={body.n}", "best_of")
    if body.best_of is not None and body.best_of > body.n and body.stream:
        raise refuse("best_of is known at the end: it does not work with stream", "best_of")
    if body.stream_options is not None and not body.stream:
        raise refuse("stream_options needs stream: true", "stream_options")
    if body.max_tokens == 0 and not body.echo:
        raise refuse("max_tokens=0 generates nothing: it is for echo: true", "max_tokens")
    if body.prompt_logprobs is not None and body.stream:
        raise refuse("prompt_logprobs is not returned with stream", "prompt_logprobs")
    if body.echo and body.logprobs is not None and body.stream:
        raise refuse("the log-probabilities of an echo are not returned with stream", "echo")


async def _prepare(body: Any, model: TextModel, name: str, state: ServerState) -> CompletionJob:
    limits = state.settings.limits
    given: Any = body.prompt
    several = not isinstance(given, str) and not isinstance(given[0], int)
    if several:
        check_count(given, limits.prompts, "prompt")
    keep = body.truncate_prompt_tokens
    prompts = await in_thread(
        lambda: text_prompts(model, given, body.add_special_tokens, truncated=keep is not None)
    )
    if keep is not None:
        prompts = [ids[-keep:] for ids in prompts]
    wanted = engine_format(body.response_format, limits)
    await check_grammar(wanted, model, limits)
    for index, ids in enumerate(prompts):
        param = f"prompt[{index}]" if several else "prompt"
        if not ids:
            ids = prompts[index] = _beginning(model, param)
        room(model, len(ids), max(body.max_tokens, 1), param)
    found = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        found = max(body.logprobs, found or 0)
    params = sampling_params(
        body,
        model,
        limits,
        "max_tokens",
        best_of=body.best_of,
        logprobs=body.logprobs,
        prompt_logprobs=found,
        response_format=wanted,
        max_tokens=max(body.max_tokens, 1),
    )
    job = CompletionJob(body, model, name, prompts, params)
    if body.echo:
        job.echoes = await in_thread(lambda: _texts(body, model, prompts))
    return job


def _beginning(model: TextModel, param: str) -> list[int]:
    """The token that an empty text begins with: bos, else eos. ApiError for a model without either."""
    token = getattr(model.tokenizer, "bos_token_id", None)
    token = getattr(model.tokenizer, "eos_token_id", None) if token is None else token
    if token is None:
        raise ApiError("the prompt has no tokens", param=param, code="invalid_value")
    return [token]


def _texts(body: Any, model: TextModel, prompts: list[list[int]]) -> list[str]:
    """The texts of the prompts, as they were given."""
    given = body.prompt
    given = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    cut = body.truncate_prompt_tokens is not None
    return [
        item
        if isinstance(item, str) and not cut
        else model.tokenizer.decode(ids, skip_special_tokens=body.skip_special_tokens)
        for item, ids in zip(given, prompts, strict=True)
    ]


async def completions(request: Request) -> Response:
    """The continuations of texts, whole or as events."""
    state = state_of(request)
    body = await state.read(request, COMPLETIONS)
    _check(body)
    name = state.registry.find(body.model, ModelKind.GENERATE).name
    if body.stream:
        return await stream_while_used(state, request, body.model, lambda m: _stream(body, m, name, state))

    async def work() -> dict[str, Any]:
        async with state.registry.use(body.model, ModelKind.GENERATE) as model:
            return await _whole(await _prepare(body, model, name, state), state)

    return await timed_answer(request, state, work())


async def _whole(job: CompletionJob, state: ServerState) -> dict[str, Any]:
    run = job.run(state)
    found = await run.completions(job.params.best_of is not None)
    usage = run.usage()
    if job.silent:
        usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
    return {
        **job.frame(),
        "choices": [
            _choice(job, run.generations[prompt], prompt, number, sequence)
            for prompt, sequences in enumerate(found)
            for number, sequence in enumerate(sequences)
        ],
        "usage": usage,
    }


def _choice(
    job: CompletionJob, generation: Any, prompt: int, number: int, sequence: Completion
) -> dict[str, Any]:
    body = job.body
    text = "" if job.silent else sequence.text
    tokens = [] if job.silent else list(sequence.tokens)
    found: list[TokenLogprob | None] = [] if job.silent else list(sequence.logprobs)
    logged = list(tokens)
    if job.echoes:
        text = job.echoes[prompt] + text
        if body.logprobs is not None:
            found = [*generation.prompt_logprobs, *found]
            logged = [*job.prompts[prompt], *logged]
    choice: dict[str, Any] = {
        "index": prompt * body.n + number,
        "text": text,
        "logprobs": None,
        "finish_reason": "length" if job.silent else sequence.finish,
        "stop_reason": sequence.stop,
    }
    if body.logprobs is not None:
        choice["logprobs"] = choices.completion_logprobs(
            found, logged, job.model.spelling, body.logprobs, 0, body.return_tokens_as_token_ids
        )
    if body.prompt_logprobs is not None:
        kept = generation.prompt_logprobs
        choice["prompt_logprobs"] = choices.prompt_logprobs(kept, job.model.spelling)
    if body.return_token_ids:
        choice |= {"token_ids": tokens, "prompt_token_ids": list(job.prompts[prompt])}
    return choice


async def _stream(
    body: Any, model: TextModel, name: str, state: ServerState
) -> tuple[AsyncGenerator[bytes], AnswerRun]:
    job = await _prepare(body, model, name, state)
    run = job.run(state)
    return _events(job, run), run


async def _events(job: CompletionJob, run: AnswerRun) -> AsyncGenerator[bytes]:
    body, options = job.body, job.body.stream_options
    counted = options is not None and options.include_usage
    always = options is not None and options.continuous_usage_stats
    frame = job.frame()
    lengths: dict[int, int] = {}

    def chunk(choice: dict[str, Any]) -> bytes:
        usage = {"usage": run.usage() if always else None} if counted or always else {}
        return event({**frame, "choices": [choice], **usage})

    def choice(index: int, text: str, **more: Any) -> dict[str, Any]:
        lengths[index] = lengths.get(index, 0) + len(text)
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None, **more}

    deltas = run.deltas()
    try:
        for prompt, echo in enumerate(job.echoes):
            for number in range(body.n):
                yield chunk(choice(prompt * body.n + number, echo))
        async for prompt, delta in deltas:
            index = prompt * body.n + delta.index
            more: dict[str, Any] = {"finish_reason": delta.finish, "stop_reason": delta.stop}
            if body.logprobs is not None and not job.silent:
                more["logprobs"] = choices.completion_logprobs(
                    delta.logprobs,
                    [entry.token for entry in delta.logprobs],
                    job.model.spelling,
                    body.logprobs,
                    lengths.get(index, 0),
                    body.return_tokens_as_token_ids,
                )
            if body.return_token_ids:
                more["token_ids"] = [] if job.silent else list(delta.tokens)
            if job.silent:
                if delta.finish is not None:
                    yield chunk(choice(index, "", finish_reason="length"))
            elif delta.text or delta.finish is not None or body.logprobs is not None or body.return_token_ids:
                yield chunk(choice(index, delta.text, **more))
        if counted:
            yield event({**frame, "choices": [], "usage": run.usage()})
    finally:
        await deltas.aclose()
