"""POST /attention against the attentions of one forward pass over the whole text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import server_models
import tiny_families
import torch
from live_server import LiveServer, live

import monoblock
from monoblock import demo
from monoblock.backends.pytorch.engine_adapter import attention_weights
from monoblock.serving.attention_view import MOST_TOKENS

TEXT = "def fibonacci(n):\n    return"
ATOL = 2e-6  # float32, three layers; rounded to 6 digits in the answer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("models")
    tools = server_models.tools_model(folder / "tools")
    vectors = server_models.vector_model(folder)
    with live(
        None,
        tools,
        vectors,
        names=["demo", "tools", "vectors"],
        loading={"device": "cpu", "dtype": "float32"},
    ) as server:
        yield server


def whole(source: Path, ids: list[int]) -> np.ndarray:
    """The attentions of a forward pass, [layers, heads, tokens] of the last token."""
    model = monoblock.AutoModelForCausalLM.from_pretrained(source, dtype="float32").eval()
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    return np.stack([weights[0, :, -1].numpy() for weights in found])


@pytest.mark.parametrize("name", tiny_families.GENERATING)
@pytest.mark.parametrize("count", [1, 5, 30])
def test_weights_are_those_of_a_whole_pass(name: str, count: int) -> None:
    """30 tokens are more than the windows of every family."""
    model = tiny_families.monoblock_model(name, **tiny_families.fields(tiny_families.MODEL_TYPES[name]))
    ids = torch.randint(8, tiny_families.VOCAB, (1, count), generator=torch.Generator().manual_seed(count))
    with torch.inference_mode():
        attentions = model(input_ids=ids, output_attentions=True).attentions
    expected = np.stack([weights[0, :, -1].numpy() for weights in attentions])
    assert np.abs(attention_weights(model, ids[0].tolist()) - expected).max() < ATOL


def test_an_answer_has_labels_and_weights(server: LiveServer) -> None:
    tokenizer = monoblock.AutoTokenizer.from_pretrained(demo.path())
    ids = tokenizer(TEXT)["input_ids"]
    expected = whole(demo.path(), ids)
    found = server.ok("/attention", model="demo", prompt=TEXT)
    assert "".join(found["tokens"]).replace("␣", " ").replace("↵", "\n") == TEXT
    assert (found["layers"], found["heads"]) == expected.shape[:2]
    assert (found["position"], found["skipped"]) == (len(ids) - 1, 0)
    assert np.abs(np.array(found["weights"]) - expected.mean((0, 1))).max() < ATOL
    found = server.ok("/attention", model="demo", prompt=TEXT, layer=2, head=1)
    assert np.abs(np.array(found["weights"]) - expected[2, 1]).max() < ATOL
    found = server.ok("/attention", model="demo", prompt=TEXT, head=1)
    assert np.abs(np.array(found["weights"]) - expected[:, 1].mean(0)).max() < ATOL


def test_another_token_can_attend(server: LiveServer) -> None:
    tokenizer = monoblock.AutoTokenizer.from_pretrained(demo.path())
    ids = tokenizer(TEXT)["input_ids"]
    found = server.ok("/attention", model="demo", prompt=TEXT, position=3, layer=0, head=0)
    assert len(found["tokens"]) == len(ids) and len(found["weights"]) == 4
    assert np.abs(np.array(found["weights"]) - whole(demo.path(), ids[:4])[0, 0]).max() < ATOL


def test_a_conversation_ends_with_the_last_token_of_the_reply(server: LiveServer) -> None:
    asked = {"role": "user", "content": "What?"}
    found = server.ok("/attention", model="demo", messages=[asked, {"role": "assistant", "content": "x = 1"}])
    assert "".join(found["tokens"]).endswith("<|assistant|>x␣=␣1")
    found = server.ok("/attention", model="demo", messages=[asked])
    assert found["tokens"][-1] == "<|assistant|>"


def test_a_long_text_is_cut_at_its_beginning(server: LiveServer) -> None:
    text = "x = 1\n" * 400
    found = server.ok("/attention", model="demo", prompt=text)
    count = len(monoblock.AutoTokenizer.from_pretrained(demo.path())(text)["input_ids"])
    assert len(found["tokens"]) == len(found["weights"]) == MOST_TOKENS
    assert found["skipped"] == count - MOST_TOKENS
    assert sum(found["weights"]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "layer": 99}, "layer"),
        ({"prompt": "a", "head": -1}, "head"),
        ({"prompt": "a", "head": "most"}, "head"),
        ({"prompt": "a b", "position": 50}, "position"),
        ({"prompt": ""}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ({"prompt": "a", "unknown": 1}, "unknown"),
    ],
)
def test_wrong_requests_are_refused_by_name(server: LiveServer, body: dict[str, Any], param: str) -> None:
    assert server.error("/attention", model="demo", **body)["param"] == param


def test_models_that_do_not_generate_are_refused(server: LiveServer) -> None:
    assert server.error("/attention", model="vectors", prompt="a")["code"] == "model_not_supported"
    assert server.error("/attention", 404, model="other", prompt="a")["code"] == "model_not_found"


def test_generation_goes_on_beside_it(server: LiveServer) -> None:
    body = {"model": "demo", "prompt": TEXT, "max_tokens": 40, "temperature": 0}
    alone = server.ok("/v1/completions", **body)["choices"][0]["text"]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        texts = [pool.submit(server.ok, "/v1/completions", **body) for _ in range(2)]
        views = [pool.submit(server.ok, "/attention", model="demo", prompt=f"x = {i}") for i in range(6)]
        assert all(view.result()["weights"] for view in views)
        assert [text.result()["choices"][0]["text"] for text in texts] == [alone] * 2
