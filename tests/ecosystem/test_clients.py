"""lm-eval and LangChain as clients of the server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_openai import ChatOpenAI
from live_server import LiveServer, live
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from monoblock import LLM, SamplingParams, demo

QUESTION = "Write a function that adds two numbers."


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    with live(None) as server:
        yield server


def test_lm_eval_local_completions(server: LiveServer) -> None:
    """Log-likelihoods and texts are those of the model in this process."""
    harness = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="demo", tokenizer=str(demo.path())
    )
    pairs = [("def add(a, b):", " return a"), ("import", " os"), ("x =", " 1\n")]
    found = harness.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    llm = LLM(device="cpu", cache_memory="16MB")
    tokenizer = llm.get_tokenizer()
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        first = tokenizer(context)["input_ids"]
        ids = first + tokenizer(continuation)["input_ids"]
        [output] = llm.generate([ids], SamplingParams(prompt_logprobs=1, max_tokens=1))
        assert output.prompt_logprobs is not None
        rows = [(output.prompt_logprobs[i] or {})[ids[i]] for i in range(len(first), len(ids))]
        assert value == pytest.approx(sum(row.logprob for row in rows), abs=1e-4)
        assert greedy == all(row.rank == 1 for row in rows)
    wanted: Any = {"until": ["\n\n"], "max_gen_toks": 10, "temperature": 0}
    [text] = harness.generate_until([Instance("generate_until", {}, ("def add(a, b):", wanted), 0)])
    params = llm.get_default_sampling_params().replaced(temperature=0, max_tokens=10, stop="\n\n")
    [output] = llm.generate("def add(a, b):", params)
    assert text == output.outputs[0].text


def test_langchain(server: LiveServer) -> None:
    llm = ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="demo", temperature=0, max_completion_tokens=12
    )
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 12}
    own = server.ok("/v1/chat/completions", **body)
    answer = llm.invoke(QUESTION)
    assert answer.content == own["choices"][0]["message"]["content"]
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == own["usage"]["completion_tokens"]
    assert "".join(str(part.content) for part in llm.stream(QUESTION)) == answer.content
