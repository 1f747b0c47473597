"""What a pipeline needs of JAX: loading a model, and running it on lists of rows."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from monoblock.backends.flax.options import computation
from monoblock.generation.buckets import bucket
from monoblock.heads import KINDS
from monoblock.spec import Learned

NO_PARAMS = "a pipeline needs a model that holds its params: make it without _do_init=False"


class Adapter:
    """Runs a Flax model on lists of ids: puts its parameters on their device, and gives NumPy back.

    What is compiled for one shape serves its neighbours: `run` rounds the number of tokens up to a bucket and the
    number of rows to 1, 2, 3, 4, 6, 8, 12, ... `generate` has buckets of its own for tokens.
    """

    def __init__(self, model: Any, device: Any) -> None:
        if not model._do_init:
            raise ValueError(NO_PARAMS)
        self.model = model
        self.accepts = frozenset(inspect.signature(type(model).__call__).parameters)
        held = self._devices()
        if device is not None or not held:
            if len(held) > 1:
                raise ValueError(
                    f"device={device!r}, but the parameters lie on {len(held)} devices already: leave device out"
                )
            # Put there even where they are, as only what was put on a device keeps a call on it; and NumPy's arrays
            # would go there anew for each call.
            model.params = jax.device_put(model.params, None if device is None else found_device(device))

    def _devices(self) -> set[Any]:
        first = jax.tree.leaves(self.model.params)[0]
        return first.devices() if isinstance(first, jax.Array) else set()

    @property
    def device(self) -> Any:
        """Where the parameters are: a device, or the set of them."""
        held = self._devices()
        return next(iter(held)) if len(held) == 1 else held

    @property
    def dtype(self) -> Any:
        """The type of the computation."""
        return jnp.dtype(self.model.dtype)

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """The model's output for these inputs, and for the padding after them."""
        return self.model(**self._padded({name: np.asarray(rows, np.int32) for name, rows in inputs.items()}))

    def generate(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> list[list[int]]:
        """The ids that the model's `generate` gives, one row for each sequence.

        Without a seed in the options each call has its own, from Python's `random`.
        """
        if options.get("seed") is None and options.get("generator") is None:
            options = {**options, "seed": random.getrandbits(31)}
        found = self.model.generate(**_arrays(inputs), **options)
        return np.asarray(getattr(found, "sequences", found)).tolist()

    def numpy(self, array: jax.Array) -> np.ndarray:
        """An output as NumPy, float32."""
        return np.asarray(array).astype(np.float32)

    def native(self, array: np.ndarray) -> jax.Array:
        """A NumPy array as JAX's, in the model's type."""
        return jnp.asarray(array, self.dtype)

    def _padded(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same rows with padding on the right, which their mask hides, and copies of the last row after them.

        No real token sees a masked one, positions count what is real, and a head that reads the last token finds it
        by the mask. Where that head got no mask, the pad id decides, which a mask of ours would overrule: such rows
        run as they are.
        """
        rows, count = inputs["input_ids"].shape
        head = self.model.module.head_spec
        if "attention_mask" not in inputs:
            if head is not None and KINDS[head.kind].pool == "last":
                return inputs
            inputs = {**inputs, "attention_mask": np.ones((rows, count), np.int32)}
        learned = self.model.spec.position(Learned)
        # Tables that tell padding by its id have no rows for more tokens than they hold.
        fills = {"input_ids": learned.pad_id if learned and learned.pad_id is not None else 0}
        more, places = rounded(rows) - rows, bucket(count) - count
        return {
            name: np.pad(
                np.pad(value, ((0, 0), (0, places)), constant_values=fills.get(name, 0)),
                ((0, more), (0, 0)),
                mode="edge",
            )
            for name, value in inputs.items()
        }


def load(auto: Any, source: Any, device: Any, *, config: Any, dtype: Any = None, **options: Any) -> Any:
    """The model of a name or folder, on its device, with parameters and computation of one type.

    dtype: "auto" and None are the config's, else that of the first parameter in the files.
    """
    if options.get("_do_init") is False:
        raise ValueError(NO_PARAMS)
    kind = config.dtype if dtype in (None, "auto") else _plain(dtype)
    place = contextlib.nullcontext() if device is None else jax.default_device(found_device(device))
    with place:
        model = auto.from_pretrained(source, config=config, **options)
        params = model.params
        kind = computation(kind or jax.tree.leaves(params)[0].dtype)
        if kind != model.dtype:
            typed = type(model)(model.config, model.input_shape, model.seed, dtype=kind)
            typed.generation_config = model.generation_config
            model = typed
        model.params = jax.tree.map(lambda leaf: leaf.astype(kind), params)
    return model


def found_device(device: Any) -> Any:
    """The device of that name or number; ValueError if there is none."""
    if isinstance(device, jax.Device):
        return device
    if isinstance(device, int) and not isinstance(device, bool):
        others = [one for one in jax.local_devices() if one.platform != "cpu"]
        if device < 0 or (device == 0 and not others):  # as the hub's pipelines do: 0 is the first, if any
            return jax.local_devices(backend="cpu")[0]
        if device >= len(others):
            raise ValueError(
                f"device={device}: there are {len(others)} accelerators here; use device='cpu' or -1"
            )
        return others[device]
    platform, _, number = str(device).partition(":")
    try:
        return jax.local_devices(backend=platform)[int(number or 0)]
    except (RuntimeError, ValueError, IndexError) as error:
        here = ", ".join(f"{one.platform}:{one.id}" for one in jax.local_devices())
        raise ValueError(
            f"device={device!r} is no device here ({here}); use one of them, 'cpu', a number or -1 for the CPU"
        ) from error


def rounded(rows: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is not below `rows`."""
    power = 1 << (rows - 1).bit_length()
    return power // 4 * 3 if power // 4 * 3 >= rows else power


def _plain(dtype: Any) -> Any:
    """A dtype of any framework as one that NumPy knows."""
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.") if not isinstance(dtype, type) else dtype


def _arrays(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of rows as arrays; arrays of different shapes, which come in lists, stay so."""
    return {
        name: rows if isinstance(rows[0], np.ndarray) else np.asarray(rows, np.int32)
        for name, rows in inputs.items()
    }
