"""`generate` inside a trace (`jit`, `pmap`, `vmap`), where prompts and parameters have shapes but no values.

The call is checked with placeholder prompts; the prefill and the loop over tokens become part of the caller's program.
Values are not checked, and all rows have columns for all new tokens, filled with the pad token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array

from monoblock.backends.flax.passes import FlaxPasses, compiled_loop
from monoblock.backends.xla.compiled import LoopStart
from monoblock.backends.xla.inputs import ForwardOptions
from monoblock.backends.xla.runner import INPUTS, OPTIONAL_INPUTS, XlaRunner
from monoblock.generation.buckets import bucket
from monoblock.generation.compiled_loop import NO_TOKEN, Program, TokenBuffer
from monoblock.generation.config import GenerationConfig

INSIDE = "inside jit, pmap or vmap"
# Without donation of the cache, which is possible in the outermost program only.
_run_loop = jax.jit(compiled_loop, static_argnames=("network", "program"))


def is_traced(*trees: Any) -> bool:
    """Whether a leaf of the trees is traced."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


class TracedRunner(XlaRunner):
    """The `Model` of `loop.generate` for a model in a trace; `inputs` and `arguments` are those of the call."""

    def __init__(self, runner: Any, inputs: Any, arguments: Mapping[str, Any]) -> None:
        super().__init__(runner.model, ())
        self.runner, self.unsupported = runner, runner.unsupported
        given = dict(arguments)
        named = given.pop("input_ids", None)
        if (inputs is None) == (named is None):
            raise ValueError(f"generate() {INSIDE} takes one array of prompts: give input_ids")
        self.ids_bn = jnp.asarray(named if inputs is None else inputs)
        if self.ids_bn.ndim != 2 or not jnp.issubdtype(self.ids_bn.dtype, jnp.integer):
            raise ValueError(
                f"input_ids must be integers (batch, tokens), got {self.ids_bn.dtype} {self.ids_bn.shape}"
            )
        mask = given.pop("attention_mask", None)
        self.mask_bn = None if mask is None else jnp.asarray(mask) != 0
        if self.mask_bn is not None and self.mask_bn.shape != self.ids_bn.shape:
            raise ValueError(
                f"attention_mask must have the prompt's shape {self.ids_bn.shape}, got {self.mask_bn.shape}"
            )
        for name, value in given.items():
            if name in INPUTS | OPTIONAL_INPUTS or (name != "generator" and is_traced(value)):
                raise ValueError(
                    f"generate() {INSIDE} takes input_ids, attention_mask, params and a key, not {name}"
                )
        if given.get("return_dict_in_generate"):
            raise ValueError(f"generate() {INSIDE} returns sequences only: leave out return_dict_in_generate")
        self.arguments = given

    def placeholders(self) -> dict[str, Any]:
        """The call's arguments with placeholder prompts of the same shape, without padding."""
        ids_bn = np.zeros(self.ids_bn.shape, np.int32)
        return {**self.arguments, "input_ids": ids_bn, "attention_mask": ids_bn + 1}

    def decoder(self, plan: Any, inputs: dict[str, Any]) -> Any:
        """A decoder that refuses calls which are not a single program."""
        del plan, inputs
        return _HostLoopDecoder()

    def compiled(self, generation: Any, program: Program) -> Any:
        """The pass over the prompts and the loop; sequences (rows, prompt + new)."""
        if program.search is not None:
            raise ValueError(
                f"generate() {INSIDE} does not support beam search: call it outside, where it compiles by itself"
            )
        plan, new = generation.plan, generation.plan.new_tokens
        passes: FlaxPasses = self.runner.passes(generation.config)
        ids_bn = jnp.repeat(self.ids_bn.astype(jnp.int32), plan.copies, axis=0)
        valid_bn = jnp.repeat(self._valid(generation.config), plan.copies, axis=0)
        mask = jnp.pad(valid_bn.astype(jnp.int32), ((0, 0), (0, bucket(new))), constant_values=1)
        given = {"input_ids": ids_bn, "attention_mask": mask}
        found = passes.prefill(given, ForwardOptions(fresh=True, keep=1), passes.spec, mask.shape[1])
        placeholder = generation.context.prompt_bn
        buffer = program.token_buffer(placeholder, None)
        numbers = program.inputs(generation.fields, placeholder, None, new)
        start = LoopStart(
            scores_bv=found.scores,
            cache=None,
            fixed_inputs={"attention_mask": mask},
            buffer=_with_prompts(buffer, ids_bn, valid_bn),
            inputs=numbers._replace(prompt=_with_prompts(numbers.prompt, ids_bn, valid_bn)),
            limits=np.array([new, new], np.int32),
            rng_state=passes.loop_ops.rng_state(generation.generator, program.do_sample),
        )
        state = _run_loop(passes.network, program, passes.params, found.cache, start)
        return jnp.concatenate((ids_bn, state.tokens_br[:, :new]), axis=1)

    def _valid(self, config: GenerationConfig) -> Array:
        """The attention mask of the prompts, by the rules of `generation/prompt.py`."""
        if self.mask_bn is not None:
            return self.mask_bn
        pad = config.pad_token_id
        if pad is None or pad in config.eos_ids:
            return jnp.ones(self.ids_bn.shape, jnp.bool_)
        valid = self.ids_bn != pad
        return valid.at[:, -1].set(valid[:, -1] | ~valid.any(axis=1))


class _HostLoopDecoder:
    """The decoder of calls that need the host between tokens."""

    def prefill(self, ids_bn: Any, mask_bm: Any) -> Any:
        """ValueError: not supported in a trace."""
        del ids_bn, mask_bm
        raise ValueError(
            f"generate() {INSIDE} is one program: streamers, custom criteria and processors, an assistant, "
            "returned scores, use_cache=False and trace=False need the host between tokens; call it outside"
        )


def _with_prompts(buffer: TokenBuffer, ids_bn: Array, valid_bn: Array) -> TokenBuffer:
    """The token buffer with the prompts at its end, if it has columns."""
    columns, (rows, count) = buffer.ids_bt.shape[1], ids_bn.shape
    if columns == 0:
        empty = jnp.zeros((rows, 0), jnp.int32)
        return TokenBuffer(empty, empty != 0, buffer.length)
    before = ((0, 0), (columns - count, 0))
    return TokenBuffer(
        jnp.pad(ids_bn, before, constant_values=NO_TOKEN), jnp.pad(valid_bn, before), buffer.length
    )
