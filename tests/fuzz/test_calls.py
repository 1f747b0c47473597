"""Calls with any arguments: what `forward` and `generate` of PyTorch models are given is computed, with finite results,
or refused by an error of ours that names an argument. `MONOBLOCK_FUZZ_CALLS=20000` tries so many of each."""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from fuzz.harness import attempt, deliberate  # noqa: E402
from helpers import model  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tiny_families import CLASSES, fields, monoblock_model  # noqa: E402

from monoblock.generation.config import GenerationConfig  # noqa: E402

EXAMPLES = int(os.environ.get("MONOBLOCK_FUZZ_CALLS", "150"))
SECONDS = 5.0  # of the processor, for one call
ROWS, TOKENS = 2, 6
QUIET = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
MODELS = (
    "MptForCausalLM",
    "MistralForCausalLM",
    "GPTNeoForCausalLM",
    "OpenAIGPTLMHeadModel",
    "MPNetForMaskedLM",
    "MistralForSequenceClassification",
    "GPTNeoForTokenClassification",
    "MptForQuestionAnswering",
    "OpenAIGPTDoubleHeadsModel",
    "MPNetForMultipleChoice",
    "FuyuForCausalLM",
)
GENERATING = MODELS[:4]
PACKED = "int8"


@functools.cache
def made(name: str, packed: bool = False) -> Any:
    ours = (
        model(name, num_labels=4)
        if name.startswith("Mpt")
        else monoblock_model(name, **fields(CLASSES[name]))
    )
    return ours.quantize(PACKED) if packed else ours


# ---------------------------------------------------------------------- values

SHAPES = (
    (ROWS, TOKENS),
    (1, TOKENS),
    (ROWS, 1),
    (TOKENS,),
    (),
    (0, TOKENS),
    (ROWS, 0),
    (3, TOKENS),
    (ROWS, TOKENS + 1),
)
MORE_SHAPES = (
    (ROWS,),
    (ROWS, 4),
    (ROWS, 1, TOKENS, TOKENS),
    (1, ROWS, TOKENS),
    (ROWS, TOKENS, 36),
    (1,),
    (6,),
    (3, 6),
)
NUMBERS = (0, 1, 2, 5, 12, -1, -100, 88, 89, 255, 2**31, 2**40, 2**62, -(2**62))
FLOATS = (0.0, 1.0, 0.5, -1.0, math.nan, math.inf, -math.inf, 1e30)
WHOLE = ("int64", "int32", "int16", "uint8", "bool")


def tensor(shape: tuple[int, ...], value: float, dtype: str) -> Any:
    """That number everywhere, but for values that differ where it is None."""
    info = np.iinfo(dtype) if dtype in WHOLE[:4] else None
    if info is not None and isinstance(value, int):
        value = min(max(value, info.min), info.max)
    return torch.full(shape, value, dtype=getattr(torch, dtype))


def rising(shape: tuple[int, ...]) -> Any:
    """Numbers from 5 on, all ids of the vocabularies."""
    return (torch.arange(math.prod(shape)) % 80 + 5).reshape(shape)


OTHERS: dict[str, Any] = {
    "None": None,
    "True": True,
    "0": 0,
    "-3": -3,
    "2**70": 2**70,
    "nan": math.nan,
    "text": "text",
    "surrogate": "\ud800",
    "[]": [],
    "[[5, 6]]": [[5, 6]],
    "ragged": [[5, 6], [7]],
    "{}": {},
    "object": object(),
    "ndarray": np.ones((ROWS, TOKENS)),
    "set": {1},
}
tensors = st.one_of(
    st.builds(rising, st.sampled_from(SHAPES + MORE_SHAPES)),
    st.builds(
        tensor, st.sampled_from(SHAPES + MORE_SHAPES), st.sampled_from(NUMBERS), st.sampled_from(WHOLE)
    ),
    st.builds(
        tensor,
        st.sampled_from(SHAPES + MORE_SHAPES),
        st.sampled_from(FLOATS),
        st.sampled_from(("float32", "bfloat16")),
    ),
)
values = st.one_of(tensors, tensors, st.sampled_from(sorted(OTHERS)).map(OTHERS.__getitem__))

# ---------------------------------------------------------------------- what is fine


def shown(given: dict[str, Any]) -> str:
    def one(x: Any) -> str:
        return (
            f"{x.dtype}{tuple(x.shape)} of {x.flatten()[:1].tolist()}"
            if isinstance(x, torch.Tensor)
            else repr(x)[:60]
        )

    return ", ".join(f"{name}={one(x)}" for name, x in given.items())


def judge(call: Any, given: dict[str, Any], names: frozenset[str]) -> None:
    """The call ends in time, with finite numbers, or with a sentence of ours that names one of the arguments."""
    error: list[BaseException] = []
    out: list[Any] = []

    def read() -> None:
        try:
            out.append(call(**given))
        except Exception as raised:
            error.append(raised)
            raise

    ended = attempt(read, seconds=SECONDS, memory=2 << 30)
    what = f"{ended.what} for {shown(given)}"
    if not error:
        assert ended.kind == "read", what
        numbers = (
            [x for x in out[0].values() if isinstance(x, torch.Tensor)] if isinstance(out[0], dict) else []
        )
        for x in numbers if not strange(given) else ():
            assert bool(x.isfinite().all()), f"not finite for {shown(given)}"
        return
    [raised] = error
    assert deliberate(raised, (ValueError, TypeError, OSError, ImportError, NotImplementedError)), what
    assert any(name in str(raised) for name in names), f"no argument is named: {what}"
    assert len(str(raised)) < 1000 and "\n" not in str(raised), what


def strange(given: dict[str, Any]) -> bool:
    """Whether numbers that are no numbers, or larger than any, are put in where numbers of the user's own belong: they
    come out again."""
    own = ("inputs_embeds", "head_mask", "labels", "num_items_in_batch")
    return any(
        isinstance(x := given.get(name), torch.Tensor)
        and x.is_floating_point()
        and bool((x.abs() > 1e3).logical_or(x.isnan()).any())
        for name in own
    ) or any(isinstance(x := given.get(n), torch.Tensor) or x is not None for n in ("num_items_in_batch",))


# ---------------------------------------------------------------------- forward


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_forward(name: str, packed: bool) -> None:
    ours = made(name, packed)
    arguments = sorted(
        ours.arguments - {"past_key_values"} | {"sequence_id", "cu_seq_lens_q", "num_items_in_batch"}
    )
    choices = ours.row.head in ("choice", "double")
    ids = rising((1, ROWS, TOKENS) if choices else (ROWS, TOKENS))
    known = frozenset(arguments) | {
        "input",
        "the model's vocabulary",
        "tokens",
        "padding",
        "past_key_values",
        "image",
    }

    @QUIET
    @given(st.dictionaries(st.sampled_from([*arguments, "nonsense"]), values, min_size=1, max_size=3))
    def run(more: dict[str, Any]) -> None:
        call = {"input_ids": ids, **more}
        with torch.no_grad():
            judge(ours, call, known | {"nonsense"})

    run()


# ---------------------------------------------------------------------- generate

# Beside values of any kind: those of the right kind, which may be absurd.
WORDS: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 5, 88, 89, 10**12, 10**30, -(10**30)),
    *(0.0, 0.5, 1.0, 1.5, -0.5, 1e-300, 1e300, math.nan, math.inf),
    *("text", "", "never", "static", "dynamic", "quantized", "constant", "\ud800"),
    *([], [5], [5, 500], [-1], [[5]], [[5, 6], [500]], [[]], [[[5], 1.0]], ["a"]),
    *(
        (1, 1.5),
        (0, 1e300),
        {},
        {(5,): 1.0},
        {(5, 6): math.nan},
        {(500,): 1.0},
        {"type": "regex", "pattern": "[a"},
    ),
    *(object(), np.ones(2)),
)
CALL = (
    "seed",
    "generator",
    "logits_processor",
    "stopping_criteria",
    "streamer",
    "tokenizer",
    "response_format",
)
MORE = (
    "assistant_model",
    "negative_prompt_ids",
    "prefix_allowed_tokens_fn",
    "position_ids",
    "inputs_embeds",
    "attention_mask",
)


@pytest.mark.parametrize("name", GENERATING)
def test_generate(name: str) -> None:
    ours = made(name)
    every = sorted({*GenerationConfig.FIELDS, *CALL, *MORE, "nonsense"} - {"max_time"})
    # Numbers that would be computed for a long time are no faults.
    words = st.sampled_from(WORDS)
    known = frozenset(every) | {"input_ids", "prompt", "pad token", "num_beams", "scores", "rows", "tokens"}
    prompts = st.one_of(st.just(rising((ROWS, TOKENS))), st.just(rising((1, TOKENS))), values)

    @QUIET
    @given(
        prompts,
        st.dictionaries(st.sampled_from(every), st.one_of(words, words, values), min_size=1, max_size=3),
        st.booleans(),
    )
    def run(prompt: Any, more: dict[str, Any], sample: bool) -> None:
        given = {"input_ids": prompt, "do_sample": sample, "max_new_tokens": 3, "pad_token_id": 3, **more}
        judge(ours.generate, given, known)

    run()
