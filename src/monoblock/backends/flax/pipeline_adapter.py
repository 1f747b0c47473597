"""The interface of pipelines to JAX: loading a model, and running it on lists of rows."""

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

NO_PARAMS = "a pipeline needs a model with params: make it without _do_init=False"


class Adapter:
    """Runs a Flax model on lists of ids: moves its parameters to a device, and returns NumPy arrays.

    To limit the number of compiled shapes, `run` rounds the number of tokens up to a bucket and the number of rows to
    1, 2, 3, 4, 6, 8, 12, ... `generate` has separate buckets for tokens.
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
                    f"device={device!r}, but the parameters are already on {len(held)} devices: leave device out"
                )
            # Also if they are already there: only committed arrays keep a call on their device, and NumPy arrays would
            # be transferred at each call.
            model.params = jax.device_put(model.params, None if device is None else found_device(device))

    def _devices(self) -> set[Any]:
        first = jax.tree.leaves(self.model.params)[0]
        return first.devices() if isinstance(first, jax.Array) else set()

    @property
    def device(self) -> Any:
        """The device of the parameters, or the set of devices."""
        held = self._devices()
        return next(iter(held)) if len(held) == 1 else held

    @property
    def dtype(self) -> Any:
        """The dtype of the computation."""
        return jnp.dtype(self.model.dtype)

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """The model's output for these inputs, including right padding."""
        return self.model(**self._padded({name: np.asarray(rows, np.int32) for name, rows in inputs.items()}))

    def generate(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> list[list[int]]:
        """The ids from the model's `generate`, one row per sequence.

        Without a seed in the options, each call gets one from Python's `random`.
        """
        if options.get("seed") is None and options.get("generator") is None:
            options = {**options, "seed": random.getrandbits(31)}
        found = self.model.generate(**_arrays(inputs), **options)
        return np.asarray(getattr(found, "sequences", found)).tolist()

    def numpy(self, array: jax.Array) -> np.ndarray:
        """An output as a NumPy array in float32."""
        return np.asarray(array).astype(np.float32)

    def native(self, array: np.ndarray) -> jax.Array:
        """A NumPy array as a JAX array in the model's dtype."""
        return jnp.asarray(array, self.dtype)

    def _padded(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs, right-padded with masked tokens, and with copies of the last row appended.

        Real tokens do not attend to masked ones, positions count real tokens only, and a head that pools the last token
        finds it by the mask. If that head gets no mask, it uses the pad id, which an added mask would override: such
        inputs are not padded.
        """
        rows, count = inputs["input_ids"].shape
        head = self.model.module.head_spec
        if "attention_mask" not in inputs:
            if head is not None and KINDS[head.kind].pool == "last":
                return inputs
            inputs = {**inputs, "attention_mask": np.ones((rows, count), np.int32)}
        learned = self.model.spec.position(Learned)
        # Position embeddings with a padding id have no rows for padding counted as tokens.
        fills = {"input_ids": learned.pad_id if learned and learned.pad_id is not None else 0}
        extra_rows, padding = rounded(rows) - rows, bucket(count) - count
        return {
            name: np.pad(
                np.pad(value, ((0, 0), (0, padding)), constant_values=fills.get(name, 0)),
                ((0, extra_rows), (0, 0)),
                mode="edge",
            )
            for name, value in inputs.items()
        }


def load(auto: Any, source: Any, device: Any, *, config: Any, dtype: Any = None, **options: Any) -> Any:
    """Load a model from a name or folder onto a device, with parameters and computation in one dtype.

    dtype: "auto" and None mean the config's dtype, else that of the first parameter in the files.
    """
    if options.get("_do_init") is False:
        raise ValueError(NO_PARAMS)
    kind = config.dtype if dtype in (None, "auto") else _plain(dtype)
    context = contextlib.nullcontext() if device is None else jax.default_device(found_device(device))
    with context:
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
    """The device of a name or index; ValueError if there is none."""
    if isinstance(device, jax.Device):
        return device
    if isinstance(device, int) and not isinstance(device, bool):
        others = [one for one in jax.local_devices() if one.platform != "cpu"]
        if device < 0 or (
            device == 0 and not others
        ):  # as in transformers' pipelines: 0 is the first accelerator, if any
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
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least `rows`."""
    power = 1 << (rows - 1).bit_length()
    return power // 4 * 3 if power // 4 * 3 >= rows else power


def _plain(dtype: Any) -> Any:
    """A dtype of any framework as a dtype name."""
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.") if not isinstance(dtype, type) else dtype


def _arrays(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of rows as arrays; lists of arrays, whose shapes may differ, stay lists."""
    return {
        name: rows if isinstance(rows[0], np.ndarray) else np.asarray(rows, np.int32)
        for name, rows in inputs.items()
    }
