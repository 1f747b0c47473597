"""POST /v1/embeddings, /v1/rerank and /classify."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from monoblock.embeddings.arrays import HOST
from monoblock.embeddings.similarity import all_pairs
from monoblock.serving.server import choices
from monoblock.serving.server.answers import timed_answer
from monoblock.serving.server.endpoints import CLASSIFY, EMBEDDINGS, RERANK
from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.kinds import ModelKind
from monoblock.serving.server.models import Row, ScoreModel, VectorModel
from monoblock.serving.server.service import ServerState, check_count, state_of
from monoblock.serving.server.threads import in_thread

LONG = 2**20  # characters, which take about a second to tokenise
QUERY, DOCUMENTS = ("query",), ("document", "passage", "corpus")  # names of prompts


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row["input_ids"]) for row in rows)


def _usage(count: int) -> dict[str, int]:
    return {"prompt_tokens": count, "total_tokens": count}


async def embeddings(request: Request) -> Response:
    """The vectors of texts or token ids."""
    state = state_of(request)
    body = await state.read(request, EMBEDDINGS)

    async def work() -> dict[str, Any]:
        async with state.registry.use(body.model, ModelKind.EMBED) as model:
            return await _embedded(body, model, state.registry.find(body.model, ModelKind.EMBED).name, state)

    return await timed_answer(request, state, work())


async def _embedded(body: Any, model: VectorModel, name: str, state: ServerState) -> dict[str, Any]:
    given = body.input
    single = isinstance(given, str) or isinstance(given[0], int)
    texts: list[Any] = [given] if single else list(given)
    check_count(texts, state.settings.limits.inputs, "input")
    if body.dimensions is not None and model.width is not None and body.dimensions > model.width:
        raise ApiError(
            f"the model's vectors have {model.width} values, fewer than dimensions={body.dimensions}",
            param="dimensions",
            code="invalid_value",
        )
    prompt = _prompt(model, body.prompt_name)
    if isinstance(texts[0], str):
        prompted = [prompt + text for text in texts]
        slow = sum(map(len, prompted)) > LONG
        rows = await in_thread(model.rows, prompted, body.truncate_prompt_tokens, "input", slow=slow)
    elif body.prompt_name is not None:
        raise ApiError(
            "prompt_name is for texts, not for token ids", param="prompt_name", code="invalid_value"
        )
    else:
        rows, prompt = model.id_rows(texts, body.truncate_prompt_tokens, "input"), ""
    vectors = np.asarray(await model.batcher.submit(rows, _tokens(rows), prompt), np.float32)
    if body.dimensions is not None:
        vectors = HOST.normalized(vectors[:, : body.dimensions])
    state.metrics.prompt_tokens.labels(name).inc(_tokens(rows))
    written = _base64 if body.encoding_format == "base64" else _numbers
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": written(vector)}
            for index, vector in enumerate(vectors)
        ],
        "model": name,
        "usage": _usage(_tokens(rows)),
    }


def _prompt(model: VectorModel, name: str | None) -> str:
    try:
        return model.model.prompt_text(None, name)
    except ValueError as error:
        raise ApiError(str(error), param="prompt_name", code="invalid_value") from None


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _numbers(vector: np.ndarray) -> list[float]:
    return vector.tolist()


async def rerank(request: Request) -> Response:
    """Documents by decreasing score with a query."""
    state = state_of(request)
    body = await state.read(request, RERANK)
    check_count(body.documents, state.settings.limits.inputs, "documents")

    async def work() -> dict[str, Any]:
        async with state.registry.use(body.model, ModelKind.CLASSIFY, ModelKind.EMBED) as model:
            if isinstance(model, VectorModel):
                scores, tokens = await _similarities(body, model)
            else:
                scores, tokens = await _pair_scores(body, model)
            return _ranked(
                body,
                state.registry.find(body.model, ModelKind.CLASSIFY, ModelKind.EMBED).name,
                scores,
                tokens,
            )

    return await timed_answer(request, state, work())


async def _pair_scores(body: Any, model: ScoreModel) -> tuple[np.ndarray, int]:
    """The scores of a cross-encoder [documents], and the number of tokens."""
    if model.model.num_labels != 1:
        raise ApiError(
            f"the model has {model.model.num_labels} labels; documents are ranked by a model with one: use /classify",
            param="model",
            code="model_not_supported",
        )
    pairs = [(body.query, document) for document in body.documents]
    rows = await in_thread(model.rows, pairs, body.truncate_prompt_tokens, "documents")
    _need_tokens(rows, "documents")
    logits = np.asarray(await model.batcher.submit(rows, _tokens(rows)))
    return model.scores(logits), _tokens(rows)


async def _similarities(body: Any, model: VectorModel) -> tuple[np.ndarray, int]:
    """The similarities of vectors, with the model's prompts for queries and documents, if it has them."""
    cut = body.truncate_prompt_tokens
    prompts = model.model.prompts
    found: list[np.ndarray] = []
    count = 0
    for texts, names, param in (([body.query], QUERY, "query"), (body.documents, DOCUMENTS, "documents")):
        prompt = _prompt(model, next((name for name in names if name in prompts), None))
        rows = await in_thread(model.rows, [prompt + text for text in texts], cut, param)
        found.append(np.asarray(await model.batcher.submit(rows, _tokens(rows), prompt), np.float32))
        count += _tokens(rows)
    name = model.model.similarity_fn_name or "cosine"
    query, documents = found
    return np.asarray(all_pairs(name, query, documents, HOST), np.float32)[0], count


def _ranked(body: Any, name: str, scores: np.ndarray, tokens: int) -> dict[str, Any]:
    order = np.argsort(-scores, kind="stable")[: body.top_n].tolist()
    results: list[dict[str, Any]] = []
    for index in order:
        results.append({"index": index, "relevance_score": float(scores[index])})
        if body.return_documents:
            results[-1]["document"] = {"text": body.documents[index]}
    return {
        "id": choices.identifier("rerank-"),
        "model": name,
        "results": results,
        "usage": {"total_tokens": tokens, "prompt_tokens": tokens},
    }


async def classify(request: Request) -> Response:
    """The labels of texts with their probabilities."""
    state = state_of(request)
    body = await state.read(request, CLASSIFY)
    texts = [body.input] if isinstance(body.input, str) else body.input
    check_count(texts, state.settings.limits.inputs, "input")

    async def work() -> dict[str, Any]:
        async with state.registry.use(body.model, ModelKind.CLASSIFY) as model:
            rows = await in_thread(model.rows, texts, body.truncate_prompt_tokens, "input")
            _need_tokens(rows, "input")
            logits = np.asarray(await model.batcher.submit(rows, _tokens(rows)))
            scores = model.probabilities(logits) if body.use_activation else logits
            labels = model.labels
            return {
                "id": choices.identifier("classify-"),
                "object": "list",
                "created": choices.now(),
                "model": state.registry.find(body.model, ModelKind.CLASSIFY).name,
                "data": [
                    {
                        "index": index,
                        "label": labels[int(row.argmax())],
                        "probs": row.tolist(),
                        "num_classes": len(labels),
                    }
                    for index, row in enumerate(scores)
                ],
                "usage": {**_usage(_tokens(rows)), "completion_tokens": 0},
            }

    return await timed_answer(request, state, work())


def _need_tokens(rows: Sequence[Row], param: str) -> None:
    for index, row in enumerate(rows):
        if not row["input_ids"]:
            raise ApiError(f"{param}[{index}] has no tokens", param=f"{param}[{index}]", code="invalid_value")
