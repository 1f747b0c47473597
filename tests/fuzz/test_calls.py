"""Random arguments of `forward` and `generate` of PyTorch models: the outputs are finite, or an error of this library
names an argument. `MONOBLOCK_FUZZ_CALLS=20000` sets the number of calls for each model."""

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
SECONDS = 5.0  # processor time for one call
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


@functools.cache
def random_model(name: str, quantised: bool = False) -> Any:
    ours = (
        model(name, num_labels=4)
        if name.startswith("Mpt")
        else monoblock_model(name, **fields(CLASSES[name]))
    )
    return ours.quantize("int8") if quantised else ours


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
INTEGERS = ("int64", "int32", "int16", "uint8", "bool")


def tensor(shape: tuple[int, ...], value: float, dtype: str) -> Any:
    """A constant tensor; integers are clamped to the range of the dtype."""
    info = np.iinfo(dtype) if dtype in INTEGERS[:4] else None
    if info is not None and isinstance(value, int):
        value = min(max(value, info.min), info.max)
    return torch.full(shape, value, dtype=getattr(torch, dtype))


def rising(shape: tuple[int, ...]) -> Any:
    """Integers from 5 on, all within the vocabularies."""
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
        tensor, st.sampled_from(SHAPES + MORE_SHAPES), st.sampled_from(NUMBERS), st.sampled_from(INTEGERS)
    ),
    st.builds(
        tensor,
        st.sampled_from(SHAPES + MORE_SHAPES),
        st.sampled_from(FLOATS),
        st.sampled_from(("float32", "bfloat16")),
    ),
)
values = st.one_of(tensors, tensors, st.sampled_from(sorted(OTHERS)).map(OTHERS.__getitem__))

# ---------------------------------------------------------------------- accepted outcomes


def describe(given: dict[str, Any]) -> str:
    def one(x: Any) -> str:
        return (
            f"{x.dtype}{tuple(x.shape)} of {x.flatten()[:1].tolist()}"
            if isinstance(x, torch.Tensor)
            else repr(x)[:60]
        )

    return ", ".join(f"{name}={one(x)}" for name, x in given.items())


def judge(call: Any, given: dict[str, Any], names: frozenset[str]) -> None:
    """The call ends in time, with finite outputs, or with a one-line error of this library that names an argument."""
    error: list[BaseException] = []
    out: list[Any] = []

    def read() -> None:
        try:
            out.append(call(**given))
        except Exception as raised:
            error.append(raised)
            raise

    outcome = attempt(read, seconds=SECONDS, memory=2 << 30)
    what = f"{outcome.what} for {describe(given)}"
    if not error:
        assert outcome.kind == "read", what
        numbers = (
            [x for x in out[0].values() if isinstance(x, torch.Tensor)] if isinstance(out[0], dict) else []
        )
        for x in numbers if not unbounded(given) else ():
            assert bool(x.isfinite().all()), f"not finite for {describe(given)}"
        return
    [raised] = error
    assert deliberate(raised, (ValueError, TypeError, OSError, ImportError, NotImplementedError)), what
    assert any(name in str(raised) for name in names), f"no argument is named: {what}"
    assert len(str(raised)) < 1000 and "\n" not in str(raised), what


def unbounded(given: dict[str, Any]) -> bool:
    """Whether float arguments that affect the outputs hold NaN or large values, so that outputs may not be finite."""
    own = ("inputs_embeds", "head_mask", "labels", "num_items_in_batch")
    return any(
        isinstance(x := given.get(name), torch.Tensor)
        and x.is_floating_point()
        and bool((x.abs() > 1e3).logical_or(x.isnan()).any())
        for name in own
    ) or any(isinstance(x := given.get(n), torch.Tensor) or x is not None for n in ("num_items_in_batch",))


# ---------------------------------------------------------------------- forward


@pytest.mark.parametrize("quantised", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_forward(name: str, quantised: bool) -> None:
    ours = random_model(name, quantised)
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

# Values of plausible types, some of them out of range.
OPTION_VALUES: tuple[Any, ...] = (
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
    ours = random_model(name)
    every = sorted({*GenerationConfig.FIELDS, *CALL, *MORE, "nonsense"} - {"max_time"})
    # Without max_time, which would allow long runs.
    options = st.sampled_from(OPTION_VALUES)
    known = frozenset(every) | {"input_ids", "prompt", "pad token", "num_beams", "scores", "rows", "tokens"}
    prompts = st.one_of(st.just(rising((ROWS, TOKENS))), st.just(rising((1, TOKENS))), values)

    @QUIET
    @given(
        prompts,
        st.dictionaries(st.sampled_from(every), st.one_of(options, options, values), min_size=1, max_size=3),
        st.booleans(),
    )
    def run(prompt: Any, more: dict[str, Any], sample: bool) -> None:
        given = {"input_ids": prompt, "do_sample": sample, "max_new_tokens": 3, "pad_token_id": 3, **more}
        judge(ours.generate, given, known)

    run()
