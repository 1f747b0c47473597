"""A model's parameters: storage, initialisation, casts, counts, and conversion to transformers' names."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from monoblock import tree
from monoblock.backends.flax import loading
from monoblock.backends.flax.loading import LeafGroup, LeafPath, ParamLeaf, Tree
from monoblock.backends.flax.processes import on_host
from monoblock.checkpoint.keymap import KeyMap
from monoblock.checkpoint.save import LazyTensor
from monoblock.errors import ShapeMismatch
from monoblock.seeds import checked_seed, signed

if TYPE_CHECKING:
    from monoblock.backends.flax.network import Network
    from monoblock.families import Family, ModelClass
    from monoblock.spec import ArchSpec


class Parameters:
    """Parameter methods of a model, based on its network and the family's tables."""

    family: ClassVar[Family]
    row: ClassVar[ModelClass]
    config: Any
    spec: ArchSpec
    module: Network
    seed: int
    _do_init: bool
    _params: Tree | None

    # ------------------------------------------------------------------ names and shapes

    def keymap(self) -> KeyMap:
        """The map between canonical and transformers' parameter names, for this class and config."""
        return self.family.keymap(self.config, self.row.head)

    def canonical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape, with tied parameters once."""
        return tree.parameters(self.spec, self.module.head_spec)

    def tied(self) -> dict[str, str]:
        """Tied parameters: canonical name -> the canonical parameter that it shares."""
        return tree.tied(self.spec, self.module.head_spec)

    @functools.cached_property
    def groups(self) -> dict[str, LeafGroup]:
        """Canonical name -> the leaves that store it; tied parameters once."""
        return loading.groups(self.keymap(), self.canonical_shapes(), self.module.layout)

    @functools.cached_property
    def leaves(self) -> dict[LeafPath, ParamLeaf]:
        """The leaves by path."""
        return {leaf.path: leaf for group in self.groups.values() for leaf in group.leaves}

    def _leaf_shapes(self) -> dict[LeafPath, tuple[int, ...]]:
        return {path: leaf.shape for path, leaf in self.leaves.items()}

    @property
    def required_params(self) -> set[LeafPath]:
        """The paths of all leaves."""
        return set(self._leaf_shapes())

    @property
    def params_shape_tree(self) -> Tree:
        """The tree of parameters with a `jax.ShapeDtypeStruct` for each leaf."""
        shapes = self._leaf_shapes().items()
        return loading.nested({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes})

    # ------------------------------------------------------------------ values

    @functools.cached_property
    def key(self) -> jax.Array:
        """The PRNG key of `seed`."""
        with jax.ensure_compile_time_eval():  # a stored array must not belong to an active trace
            return jax.random.PRNGKey(signed(checked_seed(self.seed)))

    @property
    def params(self) -> Tree:
        """The parameters as nested dicts, randomly initialised at the first access.

        Settable: ShapeMismatch or ValueError names the first leaf that does not fit.
        """
        if not self._do_init:
            raise ValueError(
                "this model was made with _do_init=False and has no params: take them from init_weights(key) or from "
                "from_pretrained's second result, and pass them: model(input_ids, params=params)"
            )
        if self._params is None:
            with jax.ensure_compile_time_eval():  # a stored array must not belong to an active trace
                self._params = self.init_weights(self.key)
        return self._params

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        if not self._do_init:
            raise ValueError(
                "this model was made with _do_init=False and has no params: pass them to each call"
            )
        self._params = self.checked_params(params)

    def checked_params(self, params: Mapping[str, Any]) -> Tree:
        """The tree as plain dicts, after checking its names and shapes; ShapeMismatch or ValueError."""
        leaves, shapes = loading.flat(params), self._leaf_shapes()
        for path in shapes:
            if path not in leaves:
                raise ValueError(f"params lack {'/'.join(path)}{_others(shapes.keys() - leaves.keys())}")
        for path, leaf in leaves.items():
            name = "/".join(path)
            if path not in shapes:
                more = _others(leaves.keys() - shapes.keys())
                raise ValueError(f"params hold {name}{more}, which {type(self).__name__} does not have")
            if tuple(np.shape(leaf)) != shapes[path]:
                raise ShapeMismatch(f"{name} is {list(np.shape(leaf))}, expected {list(shapes[path])}")
        return loading.nested(leaves)

    def init_weights(
        self,
        rng: jax.Array,
        input_shape: tuple[int, ...] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Tree:
        """New parameters in float32: matrices and embeddings from a normal distribution with the spec's standard
        deviation, biases 0, norm weights 1. `params`: a partial tree to complete. Works under `jit`.

        `input_shape`: transformers' argument; no parameter's shape depends on it.
        """
        del input_shape
        given = loading.flat(params or {})
        leaves: dict[LeafPath, Any] = {}
        for number, (path, shape) in enumerate(self._leaf_shapes().items()):
            leaves[path] = given[path] if path in given else self._init_leaf(rng, number, path, shape)
        return self.checked_params(loading.nested({**given, **leaves}))

    def _init_leaf(self, rng: jax.Array, number: int, path: LeafPath, shape: tuple[int, ...]) -> jax.Array:
        if len(shape) == 1:
            return jnp.full(shape, 0.0 if path[-1] == "bias" else 1.0, jnp.float32)
        count = int(np.prod(shape))
        # Drawn in powers of two, so that parameters of many shapes share few compiled programs.
        drawn = _normal(rng, number, self.spec.init_std, 1 << (count - 1).bit_length())
        if not isinstance(drawn, Tracer):
            return jnp.asarray(np.asarray(drawn)[:count].reshape(shape))
        return drawn[:count].reshape(shape)

    # ------------------------------------------------------------------ casts and counts

    def to_bf16(self, params: Mapping[str, Any], mask: Any = None) -> Tree:
        """The tree in bfloat16. `mask`: a tree of booleans of the same structure; leaves with False are unchanged."""
        return _cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Mapping[str, Any], mask: Any = None) -> Tree:
        """The tree in float16; `mask` as in `to_bf16`."""
        return _cast(params, jnp.float16, mask)

    def to_fp32(self, params: Mapping[str, Any], mask: Any = None) -> Tree:
        """The tree in float32; `mask` as in `to_bf16`."""
        return _cast(params, jnp.float32, mask)

    def num_params(self, params: Mapping[str, Any] | None = None) -> int:
        """The number of parameters of the model or of the given tree, tied ones once."""
        if params is None:
            return sum(int(np.prod(shape)) for shape in self.canonical_shapes().values())
        return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))

    # ------------------------------------------------------------------ transformers' names

    def hub_tensors(self, params: Mapping[str, Any] | None = None) -> dict[str, LazyTensor]:
        """A lazy NumPy tensor in PyTorch's layout for each of transformers' parameter names."""
        leaves = loading.flat(self.params if params is None else self.checked_params(params))
        return loading.file_tensors(leaves, self.leaves.values(), lambda path: on_host(leaves[path]))

    def hub_state_dict(self, params: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
        """NumPy arrays by transformers' parameter names in PyTorch's layouts, tied ones once."""
        return {name: make() for name, make in self.hub_tensors(params).items()}

    def params_from_hub(self, state: Mapping[str, Any]) -> Tree:
        """The tree from arrays (NumPy, or PyTorch on the CPU) by transformers' parameter names; the inverse of
        `hub_state_dict`. CheckpointError if they do not fit."""
        arrays = loading.Arrays({name: np.array(array) for name, array in state.items()})
        made, report = loading.load(
            arrays,
            self.keymap(),
            self.canonical_shapes(),
            self.tied(),
            self.groups,
            lambda _, array: jnp.asarray(array),
        )
        if report.missing or report.unused:
            bad = report.missing or report.unused
            what = "lacks" if report.missing else "also holds"
            raise ValueError(f"the state dict {what} {bad[0]}{_others(bad)}")
        return made


@functools.partial(jax.jit, static_argnames="count")
def _normal(rng: jax.Array, number: int, std: float, count: int) -> jax.Array:
    return std * jax.random.normal(jax.random.fold_in(rng, number), (count,), jnp.float32)


def _cast(params: Mapping[str, Any], dtype: Any, mask: Any) -> Tree:
    def cast(leaf: Any, chosen: Any = True) -> Any:
        floats = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf, dtype) if floats and chosen else leaf

    return jax.tree.map(cast, params) if mask is None else jax.tree.map(cast, params, mask)


def _others(names: Any) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
