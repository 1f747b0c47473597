"""Streamers: emitted text, its timing, iteration across threads, timeouts."""

import asyncio
import itertools
import queue
import threading

import numpy as np
import pytest
from fakes import TableModel, one_hot
from hypothesis import given, settings
from hypothesis import strategies as st
from text_tokenizers import byte_fallback, byte_level, bytes_of, word_piece

from monoblock.generation import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer
from monoblock.generation.streamers import MOST_PENDING, StreamTimeout

HARD = "Grüße, 世界! 👩‍👩‍👧 naïve\n\n  indented\tcafé 🇩🇪 क्षि end"


class Recorder(TextStreamer):
    """Records the emitted chunks of text."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.chunks, self.ends = [], 0

    def on_finalized_text(self, text, stream_end=False):
        self.chunks.append(text)
        self.ends += stream_end


def stream(tokenizer, ids, prompt=None, **kwargs):
    streamer = Recorder(tokenizer, **kwargs)
    if prompt is not None:
        streamer.put(np.array([prompt]))
    for id in ids:
        streamer.put(np.array([id]))
    streamer.end()
    assert streamer.ends == 1
    return streamer.chunks


# ---------------------------------------------------------------------- text


@pytest.mark.parametrize("merged", [(), ("世", "Grü", " indented", "naï", " 👩"), ("ï", "ve\n\n ")])
def test_chunks_of_a_byte_level_tokenizer_concatenate_to_the_text(merged):
    tokenizer = byte_level(*merged)
    ids = tokenizer.encode(HARD).ids
    chunks = stream(tokenizer, ids, prompt=ids[:1])  # the prompt may end inside a word
    assert "".join(chunks) == tokenizer.decode(ids[:1]) + HARD
    assert "\ufffd" not in "".join(chunks)


def test_chunks_of_a_byte_fallback_tokenizer_concatenate_to_the_text():
    tokenizer = byte_fallback("▁Hello", "▁world", "!", "▁", "lo")
    [hello, world, bang, space, lo] = [tokenizer.token_to_id(t) for t in ("▁Hello", "▁world", "!", "▁", "lo")]
    emoji = bytes_of(tokenizer, "é👋世👩‍👧")  # one long run of byte tokens
    ids = [hello, lo, space, *emoji, world, *bytes_of(tokenizer, "ü"), bang]
    chunks = stream(tokenizer, ids)
    assert "".join(chunks) == tokenizer.decode(ids) == "Hellolo é👋世👩‍👧 worldü!"
    assert all("\ufffd" not in chunk for chunk in chunks)
    assert chunks[:2] == ["Hello", "lo"]  # each token at once, not at the end of the word


def test_leading_spaces_are_kept_after_special_tokens():
    tokenizer = byte_fallback("▁a", "▁b")
    a, b, eos = (tokenizer.token_to_id(token) for token in ("▁a", "▁b", "<eos>"))
    assert stream(tokenizer, [eos, a, eos, eos, b, b, eos]) == ["a", " b", " b", ""]
    assert "".join(stream(tokenizer, [a, eos, b], skip_special_tokens=False)) == "a<eos> b"


def test_chunks_of_a_wordpiece_tokenizer_with_clean_up():
    tokenizer = word_piece("stream", "##ing", "is", "fun", ",", "do", "n't", ".")
    ids = [tokenizer.token_to_id(t) for t in ("stream", "##ing", "is", "fun", ",", "do", "n't", ".")]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == "streaming is fun, don't."


def test_a_character_is_emitted_with_its_last_byte():
    tokenizer = byte_level()
    ids = tokenizer.encode("a世b").ids
    assert stream(tokenizer, ids) == ["a", "世", "b", ""]


def test_incomplete_characters_are_emitted_at_the_end_or_with_the_next_character():
    tokenizer = byte_level()
    half = tokenizer.encode("世").ids[:2]
    assert stream(tokenizer, half) == ["\ufffd"]
    assert "".join(stream(tokenizer, [*half, *tokenizer.encode("ok").ids])) == "\ufffdok"
    broken = [half[1]] * (3 * MOST_PENDING)
    chunks = stream(tokenizer, broken)
    assert "".join(chunks) == "\ufffd" * len(broken)
    assert max(map(len, chunks)) <= MOST_PENDING + 1  # limits the delay of a reader


def test_a_replacement_character_in_the_text_is_emitted():
    tokenizer = byte_level("\ufffd")
    assert "".join(stream(tokenizer, tokenizer.encode("a\ufffdb\ufffd").ids)) == "a\ufffdb\ufffd"


def test_skip_prompt_for_several_sequences():
    tokenizer = byte_level()
    streamer = Recorder(tokenizer, skip_prompt=True)
    for _ in range(2):
        streamer.put(np.array([tokenizer.encode("prompt").ids]))
        streamer.put(np.array(tokenizer.encode("x").ids))
        streamer.end()
    assert streamer.chunks == ["x", "", "x", ""]


@pytest.mark.parametrize("value", [[65], [[65, 66]], np.array([65]), np.array([[65, 66]]), 65])
def test_put_accepts_arrays_lists_and_integers(value):
    streamer = Recorder(byte_level())
    streamer.put(value)
    assert len("".join(streamer.chunks)) == np.size(value)


def test_a_batch_is_refused():
    with pytest.raises(ValueError, match="one sequence at a time, got a batch of 2"):
        TextStreamer(byte_level()).put(np.array([[1], [2]]))


def test_printing(capsys):
    tokenizer = byte_level()
    streamer = TextStreamer(tokenizer)
    for id in tokenizer.encode("hé").ids:
        streamer.put([id])
    assert capsys.readouterr().out == "hé"
    streamer.end()
    assert capsys.readouterr().out == "\n"


@given(st.lists(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), max_size=8)))
@settings(max_examples=60, deadline=None)
def test_any_text_in_any_tokens(words):
    text = "".join(words)
    levels, fallback = byte_level(*(word for word in words if word)), byte_fallback("▁")
    assert "".join(stream(levels, levels.encode(text).ids)) == text
    # The fallback decoder strips one leading space, hence the leading "▁".
    ids = [
        fallback.token_to_id("▁"),
        *itertools.chain.from_iterable(bytes_of(fallback, word) for word in words),
    ]
    assert "".join(stream(fallback, ids)) == text


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self):
        self.inner, self.decoded = byte_level(), 0

    def decode(self, ids, **kwargs):
        self.decoded += len(ids)
        return self.inner.decode(ids, **kwargs)


@pytest.mark.parametrize(("prompt", "reply"), [(0, 4000), (4000, 50)])
def test_decoding_work_is_linear_in_the_length(prompt, reply):
    tokenizer = Counting()
    word = tokenizer.inner.encode("wörd ").ids
    stream(tokenizer, (word * reply)[:reply], prompt=(word * prompt)[:prompt] if prompt else None)
    # Each token is decoded several times with a few preceding tokens; the prompt twice more.
    assert tokenizer.decoded < 60 * reply + 4 * prompt


# ---------------------------------------------------------------------- iteration across threads


def replies(text, fail_at=None):
    """A model that generates `text` byte by byte, its tokenizer, and the number of tokens."""
    tokenizer = byte_level()
    ids = tokenizer.encode(text).ids

    def scores(row):
        if len(row) - 1 == fail_at:
            raise RuntimeError("the model broke")
        return one_hot(ids[min(len(row) - 1, len(ids) - 1)], 300)

    return TableModel(scores), tokenizer, len(ids)


def in_thread(function, *args, **kwargs):
    errors = []

    def run():
        try:
            function(*args, **kwargs)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def test_iteration_over_the_text_of_another_thread():
    model, tokenizer, length = replies("Grüße aus 世界")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    for _ in range(2):  # a streamer can be used again
        thread, errors = in_thread(model.generate, [[0]], max_new_tokens=length, streamer=streamer)
        chunks = list(streamer)
        thread.join()
        assert "".join(chunks) == "Grüße aus 世界"
        assert len(chunks) == len("Grüße aus 世界")
        assert errors == []
    with pytest.raises(StopIteration):
        next(streamer)


@pytest.mark.parametrize("arguments", [{"max_new_tokens": 9}, {"nonsense": 1}])
def test_errors_of_the_generating_thread_are_raised_in_the_reader(arguments):
    model, tokenizer, _ = replies("abcdefgh", fail_at=4)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread, errors = in_thread(model.generate, [[0]], streamer=streamer, **arguments)
    got = []
    with pytest.raises((RuntimeError, ValueError)) as error:
        for chunk in streamer:
            got.append(chunk)
    thread.join()
    assert errors == [error.value]  # the same error, in both threads
    assert "".join(got) == ("abcd" if "max_new_tokens" in arguments else "")


def test_timeout_of_an_iterator():
    streamer = TextIteratorStreamer(byte_level(), timeout=0.01)
    with pytest.raises(StreamTimeout, match=r"no text came within 0\.01 s"):
        next(streamer)
    with pytest.raises(queue.Empty):  # raised by transformers' class
        next(streamer)
    with pytest.raises(TimeoutError):
        next(streamer)


def test_async_iteration():
    model, tokenizer, length = replies("Grüße aus 世界")

    async def main():
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
        thread, _ = in_thread(model.generate, [[0]], max_new_tokens=length, streamer=streamer)
        chunks = [chunk async for chunk in streamer]
        thread.join()
        return chunks

    assert "".join(asyncio.run(main())) == "Grüße aus 世界"


def test_async_errors_and_timeouts():
    model, tokenizer, _ = replies("abcdefgh", fail_at=4)

    async def broken():
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
        thread, _ = in_thread(model.generate, [[0]], max_new_tokens=9, streamer=streamer)
        try:
            return [chunk async for chunk in streamer]
        finally:
            thread.join()

    with pytest.raises(RuntimeError, match="the model broke"):
        asyncio.run(broken())

    async def silent():
        return await anext(AsyncTextIteratorStreamer(tokenizer, timeout=0.01))

    with pytest.raises(StreamTimeout):
        asyncio.run(silent())
