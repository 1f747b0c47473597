"""Vectors, scores and labels over a socket are those of the classes, alone and together."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from embedding_models import TEXTS
from live_server import LiveServer

import monoblock
from monoblock.serving.server.batching import Batcher
from monoblock.serving.server.errors import ApiError

SHORT = [TEXTS[index] for index in (0, 1, 2, 4, 5)]
QUERY = "the cat"


def folder(server: LiveServer, name: str) -> str:
    source = server.app.state.registry.entries[name].source
    assert source is not None
    return source


@pytest.fixture(scope="module")
def encoder(server: LiveServer) -> Any:
    return monoblock.SentenceTransformer(folder(server, "vectors"), device="cpu")


@pytest.fixture(scope="module")
def cross_encoder(server: LiveServer) -> Any:
    return monoblock.CrossEncoder(folder(server, "rank"), device="cpu")


def vectors(server: LiveServer, **body: Any) -> np.ndarray:
    data = server.ok("/v1/embeddings", model="vectors", **body)["data"]
    return np.array([item["embedding"] for item in data], np.float32)


def test_embeddings(server: LiveServer, encoder: Any) -> None:
    assert np.array_equal(vectors(server, input=SHORT), encoder.encode(SHORT))
    expected = encoder.encode(SHORT, prompt_name="passage")
    assert np.array_equal(vectors(server, input=SHORT, prompt_name="passage"), expected)
    cut = encoder.encode(TEXTS)
    assert np.array_equal(vectors(server, input=TEXTS, truncate_prompt_tokens=-1), cut)
    small = encoder.encode(SHORT, truncate_dim=5, normalize_embeddings=True)
    assert np.allclose(vectors(server, input=SHORT, dimensions=5), small, atol=1e-6)


def test_requests_at_once_are_those_alone(server: LiveServer, encoder: Any) -> None:
    alone = encoder.encode(SHORT)
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda i: vectors(server, input=SHORT[i % len(SHORT)])[0], range(64)))
    for index, vector in enumerate(found):
        assert np.array_equal(vector, alone[index % len(SHORT)])


def test_rerank(server: LiveServer, cross_encoder: Any) -> None:
    expected = cross_encoder.rank(QUERY, SHORT)
    answer = server.ok("/v1/rerank", model="rank", query=QUERY, documents=SHORT)
    assert [item["index"] for item in answer["results"]] == [item["corpus_id"] for item in expected]
    scores = [item["relevance_score"] for item in answer["results"]]
    assert np.allclose(scores, [float(item["score"]) for item in expected], atol=1e-6)
    assert answer["results"][0]["document"]["text"] == SHORT[expected[0]["corpus_id"]]
    assert answer["usage"]["total_tokens"] > 20
    some = server.ok("/rerank", model="rank", query=QUERY, documents=SHORT, top_n=2, return_documents=False)
    assert [item["index"] for item in some["results"]] == [item["corpus_id"] for item in expected[:2]]
    assert "document" not in some["results"][0]
    long = {"model": "rank", "query": QUERY, "documents": [TEXTS[3]]}
    assert server.error("/v1/rerank", **long)["code"] == "context_length_exceeded"
    assert server.ok("/v1/rerank", **long, truncate_prompt_tokens=-1)["usage"]["total_tokens"] == 48
    assert server.ok("/v1/rerank", **long, truncate_prompt_tokens=20)["usage"]["total_tokens"] == 20
    assert server.error("/v1/rerank", **long, truncate_prompt_tokens=3)["param"] == "truncate_prompt_tokens"
    assert (
        server.error("/v1/rerank", model="labels", query=QUERY, documents=SHORT)["code"]
        == "model_not_supported"
    )


def test_rerank_by_similarity(server: LiveServer, encoder: Any) -> None:
    scores = encoder.similarity(encoder.encode_query([QUERY]), encoder.encode_document(SHORT))[0]
    answer = server.ok("/v1/rerank", model="vectors", query=QUERY, documents=SHORT)
    order = np.argsort(-np.asarray(scores), kind="stable").tolist()
    assert [item["index"] for item in answer["results"]] == order
    found = [item["relevance_score"] for item in answer["results"]]
    assert np.allclose(found, np.asarray(scores)[order], atol=1e-6)


def test_classify(server: LiveServer) -> None:
    classifier = monoblock.pipeline("text-classification", folder(server, "labels"), device=-1)
    answer = server.ok("/classify", model="labels", input=SHORT)
    for text, item in zip(SHORT, answer["data"], strict=True):
        expected = {row["label"]: row["score"] for row in classifier({"text": text}, top_k=None)}
        assert item["num_classes"] == 3 and item["label"] == max(expected, key=lambda name: expected[name])
        assert np.allclose(item["probs"], [expected[f"label {index}"] for index in range(3)], atol=1e-6)
    logits = server.ok("/classify", model="labels", input=SHORT[0], use_activation=False)["data"][0]["probs"]
    powers = np.exp(logits)
    assert np.allclose(powers / powers.sum(), answer["data"][0]["probs"], atol=1e-6)
    assert server.error("/classify", model="labels", input=[])["param"] == "input"
    assert server.error("/classify", model="labels", input=TEXTS[3])["code"] == "context_length_exceeded"
    assert server.ok("/classify", model="labels", input=TEXTS[3], truncate_prompt_tokens=-1)["data"]


def test_tokens(server: LiveServer) -> None:
    text = "def f(x):\n    return 'ä'"
    answer = server.ok("/tokenize", model="demo", prompt=text, return_token_strs=True)
    assert (
        answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        and answer["max_model_len"] == 1024
    )
    assert server.ok("/detokenize", model="demo", tokens=answer["tokens"])["prompt"] == text
    with_bos = server.ok("/tokenize", model="tools", prompt="the")["tokens"]
    assert (
        server.ok("/tokenize", model="tools", prompt="the", add_special_tokens=False)["tokens"]
        == with_bos[1:]
    )
    assert server.ok("/detokenize", model="tools", tokens=with_bos)["prompt"] == "<s>the"
    assert (
        server.ok("/detokenize", model="tools", tokens=with_bos, skip_special_tokens=True)["prompt"] == "the"
    )
    chat = server.ok("/tokenize", model="demo", messages=[{"role": "user", "content": "hi"}])["tokens"]
    assert server.ok("/detokenize", model="demo", tokens=chat)["prompt"] == "<|user|>hi<|assistant|>"
    assert server.error("/tokenize", model="demo")["param"] == "prompt"
    assert (
        server.error("/tokenize", model="demo", prompt="x", documents=[{"text": "y"}])["param"] == "documents"
    )
    assert server.error("/detokenize", model="demo", tokens=[10**9])["param"] == "tokens[0]"
    assert (
        server.error("/tokenize", model="vectors", messages=[{"role": "user", "content": "x"}])["param"]
        == "messages"
    )


# ---------------------------------------------------------------------------- batches


def test_waiting_jobs_are_computed_together() -> None:
    sizes: list[int] = []
    first = threading.Event()

    def run(rows: list[int], key: Any) -> list[int]:
        sizes.append(len(rows))
        assert first.wait(30)
        if -1 in rows:
            raise ValueError("a bad row")
        return [row * 10 + key for row in rows]

    async def main() -> None:
        batcher = Batcher(run, 6)
        started = asyncio.create_task(batcher.submit([0], 1, 0))
        while not sizes:
            await asyncio.sleep(0.01)
        jobs = [asyncio.create_task(batcher.submit([i], 1, 0)) for i in (1, 2, -1, 3)]
        gone = asyncio.create_task(batcher.submit([4], 1, 0))
        other = asyncio.create_task(batcher.submit([5], 1, 1))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(ApiError) as full:
            await batcher.submit([6], 1, 0)
        assert full.value.status == 429
        first.set()
        results = await asyncio.gather(started, *jobs, other, return_exceptions=True)
        assert [r if isinstance(r, list) else str(r) for r in results] == [
            [0],
            [10],
            [20],
            "a bad row",
            [30],
            [51],
        ]
        await batcher.close()

    asyncio.run(main())
    assert sizes == [1, 4, 1, 1, 1, 1, 1]  # the batch with the bad row, each of its jobs, and the other key
