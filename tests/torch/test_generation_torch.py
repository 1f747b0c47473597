"""PyTorch's array operations, and the generation loop on them, against NumPy's."""

import numpy as np
import pytest
import torch
from array_calls import CALLS, RNG
from fakes import TableModel

from monoblock.backends.pytorch.arrays import TorchOps
from monoblock.generation import GenerationConfig, loop
from monoblock.generation.arrays import NumpyOps

TORCH, NUMPY = TorchOps(), NumpyOps()


def converted(value):
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return [converted(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("call", CALLS, ids=[call[0] for call in CALLS])
def test_operations_equal_numpys(call):
    name, *arguments = call
    theirs = [converted(argument) for argument in arguments]
    expected, got = getattr(NUMPY, name)(*arguments), getattr(TORCH, name)(*theirs)
    pairs = zip(got, expected, strict=True) if isinstance(expected, tuple) else [(got, expected)]
    for mine, reference in pairs:
        assert str(mine.dtype).removeprefix("torch.") == str(reference.dtype)
        # float32 sums of 40 terms in a different order
        np.testing.assert_allclose(TORCH.to_numpy(mine), reference, rtol=1e-5, atol=1e-6)
        assert TORCH.to_list(mine) == TORCH.to_numpy(mine).tolist()
    for before, after in zip(arguments, theirs, strict=True):
        if isinstance(before, np.ndarray):
            assert np.array_equal(before, after.numpy())  # the inputs are not modified


def test_sampling_is_torch_multinomial():
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    expected = torch.multinomial(scores.softmax(-1), 1)[:, 0]
    torch.manual_seed(3)
    assert TORCH.sample(scores, None).tolist() == expected.tolist()
    assert (
        TORCH.sample(scores, TORCH.generator(5)).tolist() == TORCH.sample(scores, TORCH.generator(5)).tolist()
    )
    with pytest.raises(ValueError, match="no token can be drawn"):
        TORCH.sample(torch.full((1, 5), -torch.inf), None)


class OnTorch(TableModel):
    """The fake model with scores and ids as tensors."""

    ops = TORCH

    def decoder(self, plan, inputs):
        inner = super().decoder(plan, inputs)

        class Wrapped:
            attentions = hidden_states = past_key_values = None

            def prefill(self, ids, mask):
                return torch.from_numpy(inner.prefill(ids.numpy(), None if mask is None else mask.numpy()))

            def step(self, ids):
                return torch.from_numpy(inner.step(ids.numpy()))

            def reorder(self, index):
                inner.reorder(index.numpy())

        return Wrapped()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
        {"bad_words_ids": [[3], [4, 5]], "sequence_bias": [[[6], 0.5]], "min_new_tokens": 3},
        {"forced_bos_token_id": 4, "forced_eos_token_id": 9, "suppress_tokens": [1]},
        {"encoder_repetition_penalty": 1.4, "exponential_decay_length_penalty": (2, 1.1)},
    ],
    ids=str,
)
def test_the_loop_returns_the_same_tokens(fields):
    table = RNG.normal(size=(31, 31))
    prompts = [[30, 30, 5, 8], [1, 2, 3, 4], [30, 7, 7, 7]]
    config = GenerationConfig(max_new_tokens=12, eos_token_id=[9, 10], pad_token_id=30, **fields)
    results = [
        kind(lambda ids: table[(7 * sum(ids) + len(ids)) % 31]).generate(prompts, config).tolist()
        for kind in (TableModel, OnTorch)
    ]
    assert results[0] == results[1]


def test_streamers_get_cpu_tensors():
    got = []

    class Streamer:
        def put(self, value):
            got.append(value)

        def end(self):
            got.append(None)

    loop.generate(OnTorch(lambda ids: np.arange(5.0)), [[1, 2]], max_new_tokens=2, streamer=Streamer())
    assert [None if v is None else (v.device.type, tuple(v.shape)) for v in got] == [
        ("cpu", (1, 2)),
        ("cpu", (1,)),
        ("cpu", (1,)),
        None,
    ]
