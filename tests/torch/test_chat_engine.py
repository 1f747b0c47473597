"""The chat engine with real models: reuse of the cache, limits of positions, and images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fuyu_tokenizer
import numpy as np
import pytest
import tiny_families
import tiny_pipelines
from PIL import Image
from tiny_families import monoblock_model

from monoblock import FuyuImageProcessor, FuyuProcessor, PreTrainedTokenizerFast, pipeline
from monoblock.cli import engine
from monoblock.cli.conversation import Conversation
from monoblock.cli.options import DownloadOptions, FrameworkModelOptions

GREEDY = {"do_sample": False, "max_new_tokens": 24}


def discard(text: str) -> None:
    del text


@pytest.fixture(scope="module")
def demo() -> engine.ChatEngine:
    return engine.load(FrameworkModelOptions(device="cpu"), DownloadOptions())


def converse(
    loaded: engine.ChatEngine, monkeypatch: pytest.MonkeyPatch, *, reuse: bool
) -> tuple[list[str], list[int]]:
    conversation, replies, fed = Conversation(), [], []
    real = type(loaded.model).forward

    def counting(self: Any, input_ids: Any = None, **more: Any) -> Any:
        fed.append(input_ids.shape[1])
        return real(self, input_ids, **more)

    monkeypatch.setattr(type(loaded.model), "forward", counting)
    for text in ("def add(a, b):", "def sub(a, b):", "Return True if the stack is empty."):
        conversation.say(text)
        if not reuse:
            loaded.past.cache = None
        reply = loaded.answer(conversation.messages(), GREEDY, discard)
        conversation.answer(reply.text)
        replies.append(reply.text)
    monkeypatch.undo()
    return replies, [count for count in fed if count > 1]


def test_greedy_replies_are_equal_with_and_without_reuse(
    demo: engine.ChatEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, whole = converse(demo, monkeypatch, reuse=False)
    again, reused = converse(demo, monkeypatch, reuse=True)
    assert again == plain
    assert reused[0] == whole[0]
    assert sum(reused) < sum(whole)  # the cache was reused


def test_cache_of_another_prefix_is_discarded(demo: engine.ChatEngine) -> None:
    demo.past.cache, demo.past.ids = object(), [1, 2, 3]
    assert demo.past.take([1, 2, 4, 5]) is None
    demo.past.cache, demo.past.ids = object(), [1, 2, 3]
    assert demo.past.take([1, 2, 3]) is None  # nothing new to feed
    assert demo.past.cache is None


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 learned positions."""
    return tiny_pipelines.folder(tmp_path_factory.mktemp("short"), "GPTNeoForCausalLM", eos_token_id=None)


def test_replies_end_at_the_last_position(short: Path) -> None:
    """The default number of tokens is limited; an explicit one that does not fit raises before any output."""
    loaded, shown = engine.load(FrameworkModelOptions(model=str(short), device="cpu"), DownloadOptions()), []
    greedy = {"do_sample": False}
    reply = loaded.complete("abcd" * 5, loaded.limits(128) | greedy, shown.append)
    assert (reply.prompt_tokens, reply.tokens) == (20, 45)
    messages = [{"role": "user", "content": "abcd"}]
    assert loaded.answer(messages, loaded.limits(512) | greedy, shown.append).tokens > 0
    assert loaded.model.generation_config.max_new_tokens is None
    shown.clear()
    with pytest.raises(
        ValueError, match=r"46 new tokens do not fit: .* takes 20 of them, so that at most 45 can follow"
    ):
        loaded.complete("abcd" * 5, loaded.limits(128) | greedy | {"max_new_tokens": 46}, shown.append)
    with pytest.raises(
        ValueError, match="the prompt has 80 tokens, and the model has 64 learned positions: shorten it"
    ):
        loaded.complete("abcd" * 20, loaded.limits(128) | greedy, shown.append)
    assert "".join(shown) == ""


def test_pipelines_end_at_the_last_position(short: Path) -> None:
    pipe = pipeline("text-generation", str(short), device="cpu")
    new = {"return_tensors": True, "do_sample": False}
    [[one], [two]] = pipe(["abcd" * 5, "abcd" * 10], batch_size=2, **new)
    assert [len(row["generated_token_ids"]) for row in (one, two)] == [65, 65]
    with pytest.raises(ValueError, match="46 new tokens do not fit"):
        pipe("abcd" * 5, max_new_tokens=46)
    with pytest.raises(ValueError, match="the prompt has 80 tokens"):
        pipe("abcd" * 20)


def test_fuyu_answers_about_an_image(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fuyu_tokenizer.backend(), **fuyu_tokenizer.SPECIAL)
    images = FuyuImageProcessor(patch_size={"height": 4, "width": 4}, size={"height": 20, "width": 24})
    processor = FuyuProcessor(images, tokenizer)
    fields = tiny_families.fields("fuyu", vocab_size=len(tokenizer), eos_token_id=None)
    fields["image_token_id"] = tokenizer.convert_tokens_to_ids("|SPEAKER|")
    folder = tmp_path / "fuyu"
    monoblock_model("FuyuForCausalLM", **fields).save_pretrained(folder)
    processor.save_pretrained(folder)
    path = tmp_path / "cat.png"
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    loaded = engine.load(FrameworkModelOptions(model=str(folder), device="cpu"), DownloadOptions())
    conversation = Conversation()
    conversation.say("what is in the box", str(path))
    options = {"do_sample": False, "max_new_tokens": 4}
    reply = loaded.answer(conversation.messages(), options, discard)
    inputs = loaded.processor(text=["what is in the box"], images=[str(path)], return_tensors="pt")
    ids = loaded.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert reply.tokens == 4
    assert reply.text == loaded.tokenizer.decode(ids, skip_special_tokens=True)
    assert reply.prompt_tokens == inputs["input_ids"].shape[1]
