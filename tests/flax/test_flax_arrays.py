"""JAX's array operations against NumPy's, one by one: on the host, on the device, and inside a trace."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_calls import CALLS

from monoblock.backends.flax.arrays import JaxOps, Keys
from monoblock.generation.arrays import NumpyOps

JAX, NUMPY = JaxOps(), NumpyOps()
ON_DEVICE = [call for call in CALLS if call[0] not in ("mask", "array")]


def moved(value):
    if isinstance(value, np.ndarray):
        return jnp.asarray(value)
    return [moved(item) for item in value] if isinstance(value, list) else value


def equal(got, expected):
    pairs = zip(got, expected, strict=True) if isinstance(expected, tuple) else [(got, expected)]
    for mine, reference in pairs:
        assert np.asarray(mine).dtype.kind == reference.dtype.kind
        # float32 sums of 40 terms in another order
        np.testing.assert_allclose(np.asarray(mine), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("call", CALLS, ids=[call[0] for call in CALLS])
def test_what_lies_on_the_host_stays_there(call):
    name, *arguments = call
    got, expected = getattr(JAX, name)(*arguments), getattr(NUMPY, name)(*arguments)
    equal(got, expected)
    assert not isinstance(got, jax.Array)


@pytest.mark.parametrize("call", ON_DEVICE, ids=[call[0] for call in ON_DEVICE])
def test_the_same_as_numpy_on_the_device(call):
    name, *arguments = call
    got, expected = getattr(JAX, name)(*map(moved, arguments)), getattr(NUMPY, name)(*arguments)
    equal(got, expected)
    # Indices of tokens are the host's: the loop looks at them at once.
    assert isinstance(got, np.ndarray if name == "argmax" else jax.Array | tuple)


@pytest.mark.parametrize("call", ON_DEVICE, ids=[call[0] for call in ON_DEVICE])
def test_the_same_in_a_trace(call):
    name, *arguments = call
    places = [i for i, argument in enumerate(arguments) if isinstance(argument, np.ndarray | list)]

    @jax.jit
    def traced(arrays):
        given = dict(zip(places, arrays, strict=True))
        return getattr(JAX, name)(*(given.get(i, argument) for i, argument in enumerate(arguments)))

    equal(traced([moved(arguments[i]) for i in places]), getattr(NUMPY, name)(*arguments))


def test_a_choice_is_made_on_either_side():
    for run in (lambda f, x: f(x), lambda f, x: jax.jit(f)(x)):
        for x in (1.0, -1.0):
            chosen = run(lambda x: JAX.choose(x > 0, lambda: x + 1, lambda: x), jnp.asarray(x))
            assert float(chosen) == (x + 1 if x > 0 else x)


SCORES = np.random.default_rng(1).normal(size=(4, 50)).astype(np.float32)


def test_draws_are_the_keys():
    """Each draw splits the key and takes the first half, as transformers' Flax classes did."""
    key, left = jax.random.split(jax.random.PRNGKey(5))
    keys = JAX.generator(5)
    assert JAX.sample(SCORES, keys).tolist() == jax.random.categorical(key, SCORES, axis=-1).tolist()
    assert keys.key.tolist() == left.tolist()

    @jax.jit
    def twice(key):
        keys = Keys(key)
        return JAX.sample(SCORES, keys), JAX.sample(SCORES, keys), keys.fine

    *traced, fine = twice(jax.random.PRNGKey(5))
    eager = JAX.generator(5)
    assert [t.tolist() for t in traced] == [JAX.sample(SCORES, eager).tolist() for _ in range(2)]
    assert bool(fine)


def test_draws_follow_the_scores():
    scores = np.tile(np.log(np.array([0.5, 0.3, 0.2, 0.0], np.float32) + 1e-30), (4000, 1))
    share = np.bincount(JAX.sample(scores, JAX.generator(0)), minlength=4) / 4000
    # Three standard deviations of 4000 draws are 0.024.
    np.testing.assert_allclose(share, [0.5, 0.3, 0.2, 0.0], atol=0.024)
    drawn = JAX.draw(scores, 3, JAX.generator(0))
    assert (np.sort(drawn, axis=1) == [0, 1, 2]).all(), "without replacement"
    # The second of two draws: P(1 second) = .5 * .3/.5 + .2 * .3/.8
    assert abs((drawn[:, 1] == 1).mean() - (0.5 * 0.3 / 0.5 + 0.2 * 0.3 / 0.8)) < 0.024


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_without_a_token_to_draw_are_told(bad):
    for scores in (np.full((1, 5), -np.inf, np.float32), np.array([[bad, 0, 0]], np.float32)):
        with pytest.raises(ValueError, match="no token can be drawn"):
            JAX.sample(scores, JAX.generator(0))
