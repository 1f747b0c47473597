"""`generate` inside a user's `tf.function`: the prefill and the loop over tokens become part of its graph.

Prompts have shapes but no values. Their length must be static, and all rows have columns for all new tokens, filled
with the pad token after their end. No error can be raised for a value: if a row has no token to sample, generation
stops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from monoblock.backends.tf.arrays import to_tensor
from monoblock.backends.tf.binding import to_tensors
from monoblock.backends.tf.cache import Cache, init_cache
from monoblock.backends.tf.checked import check_inputs
from monoblock.backends.tf.compiled import LOOP_OPS
from monoblock.backends.tf.ops import Tensor, size
from monoblock.backends.tf.passes import compiled_loop, forward_pass
from monoblock.backends.xla import compiled_beams
from monoblock.backends.xla.compiled import LoopStart
from monoblock.backends.xla.inputs import ForwardOptions
from monoblock.generation import beam_program as search
from monoblock.generation.compiled_loop import NO_TOKEN, Program, TokenBuffer
from monoblock.generation.config import GenerationConfig
from monoblock.generation.decoder import GenerationPlan
from monoblock.generation.outputs import OutputCollector

HOST = (
    "generate() inside a tf.function is one graph, and this call needs Python between tokens (streamers, "
    "custom criteria or processors, returned scores, guidance, an assistant, use_cache=False or "
    "disable_compile=True): call it outside, where it compiles by itself"
)


@dataclass(frozen=True)
class Prompt:
    """The prompts of a call: ids (rows, tokens), with a static or dynamic number of rows, and their mask (None: padding
    is marked by pad tokens). Prompts given as embeddings have no ids."""

    ids_bn: Tensor | None
    mask_bn: Tensor | None

    def placeholders(self) -> dict[str, Any]:
        """Placeholder inputs of the same shape, with values."""
        if self.ids_bn is None:
            return {}
        shape = (self.ids_bn.shape[0] or 1, self.ids_bn.shape[1])
        return {"input_ids": np.zeros(shape, np.int64), "attention_mask": np.ones(shape, np.int64)}

    def mask(self, config: GenerationConfig) -> Tensor | None:
        """The attention mask. Without a given mask, pad tokens are padding unless they are also eos tokens; in a row of
        pad tokens only, the last one counts as a token."""
        pad, ids_bn = config.pad_token_id, self.ids_bn
        if self.mask_bn is not None or ids_bn is None or pad is None or pad < 0 or pad in config.eos_ids:
            return self.mask_bn
        real_bn = ids_bn != pad
        last_n = tf.range(ids_bn.shape[1]) == ids_bn.shape[1] - 1
        none_b1 = ~tf.reduce_any(real_bn, axis=1, keepdims=True)
        return tf.cast(real_bn | (none_b1 & last_n), tf.int32)


def prompt(inputs: Any, arguments: dict[str, Any]) -> Prompt:
    """Remove the prompts from the arguments. ValueError unless their length is static."""
    given = arguments.pop("input_ids", None) if inputs is None else inputs
    mask = arguments.pop("attention_mask", None)
    if given is None:
        if mask is not None:
            arguments["attention_mask"] = mask
        return Prompt(None, None)
    ids = tf.cast(to_tensors("input_ids", given), tf.int32)
    if len(ids.shape) != 2 or ids.shape[1] is None:
        raise ValueError(
            f"inside a tf.function the prompts must be (rows, tokens) of a static length, got {ids.shape}: pad them to "
            "one length, and give it in the tf.function's input_signature"
        )
    return Prompt(ids, None if mask is None else tf.cast(to_tensors("attention_mask", mask), tf.int32))


class GraphDecoder:
    """The decoder that the framework-free loop requires; `run` generates the tokens."""

    attentions = hidden_states = None

    def __init__(
        self, model: Any, plan: GenerationPlan, inputs: dict[str, Any], max_positions: int | None
    ) -> None:
        self.model, self.plan, self.inputs = model, plan, inputs
        self.past_key_values: Cache | None = None
        last = plan.max_length - 1
        if max_positions is not None and last > max_positions:
            raise ValueError(
                f"the model has {max_positions} learned positions, but the sequence may reach {last} tokens (inside a "
                "tf.function, padding counts): shorten the prompts, or reduce max_new_tokens"
            )
        if plan.config.prefill_chunk_size is not None:
            raise ValueError("prefill_chunk_size is not supported inside a tf.function")
        if "past_key_values" in inputs:
            raise ValueError("past_key_values are not supported inside a tf.function")

    def prefill(self, ids_bn: Any, mask_bm: Any) -> Any:
        """ValueError: the caller needs the host between tokens."""
        del ids_bn, mask_bm
        raise ValueError(HOST)

    step = extend = reorder = crop = prefill


def run(prompt: Prompt, generation: Any, program: Program) -> Any:
    """A whole call as part of the graph."""
    decoder, plan = generation.decoder, generation.plan
    given, count = _network_inputs(prompt, decoder, plan.config)
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    rows, new = size(tokens, 0), plan.new_tokens
    if not isinstance(rows, int) and (names := _needs_static_rows(program)):
        raise ValueError(
            f"{', '.join(names)}: inside a tf.function this needs a static number of rows (see its input_signature)"
        )
    mask = given.get("attention_mask", tf.ones((rows, count), tf.int32))
    mask = tf.concat((mask, tf.ones((rows, new), mask.dtype)), axis=1)
    cache = init_cache(decoder.model.spec, rows, count + new, decoder.model.compute_dtype)
    found = forward_pass(decoder.model, {**given, "attention_mask": mask}, cache, ForwardOptions(keep=1))
    assert found.cache is not None
    copy_of = tf.repeat(tf.range(rows), plan.copies)
    ids = tf.zeros((rows, 0), tf.int32) if prompt.ids_bn is None else prompt.ids_bn
    ids, mask, scores = (tf.gather(x, copy_of) for x in (ids, mask, found.scores))
    fixed_inputs = {"attention_mask": mask} | {
        name: tf.gather(given[name][:, -1:], copy_of) if given[name].shape[0] != 1 else given[name][:, -1:]
        for name in ("token_type_ids", "position_ids")
        if name in given
    }
    valid = mask[:, : ids.shape[1]] != 0
    context = generation.context
    numbers = program.inputs(generation.fields, context.prompt_bn, None, new)
    start = LoopStart(
        scores_bv=scores,
        cache=found.cache if plan.copies == 1 else found.cache.reorder(copy_of),
        fixed_inputs=fixed_inputs,
        buffer=_with_prompts(program.token_buffer(context.prompt_bn, None), ids, valid),
        inputs=numbers._replace(prompt=_with_prompts(numbers.prompt, ids, valid)),
        limits=tf.constant((new, new)),
        rng_state=LOOP_OPS.rng_state(generation.generator, needed=True),
    )
    collector = OutputCollector(plan.config, generation.make_result)
    if program.search is not None:
        return _beam_search(generation, program, start, ids, collector)
    state = compiled_loop(decoder.model, program, start)
    decoder.past_key_values = state.cache
    return collector.output(tf.concat((ids, state.tokens_br[:, :new]), axis=1), decoder)


def _beam_search(
    generation: Any, program: Program, start: LoopStart, ids: Tensor, collector: OutputCollector
) -> Any:
    """The best sequences of a beam search; `ids` have one row per beam."""
    decoder, plan = generation.decoder, generation.plan
    count = plan.config.num_return_sequences or 1
    beam_start = tf.nest.map_structure(to_tensor, compiled_beams.beam_start(generation, program))
    state = compiled_loop(decoder.model, program, start._replace(search=beam_start))
    decoder.past_key_values = state.cache
    new, scores, rows = best_sequences(state.beam_state, count, program.pad, plan.new_tokens)
    prompts = tf.repeat(ids[:: plan.copies], count, axis=0)
    return collector.beam_output(tf.concat((prompts, new), axis=1), scores, rows, decoder)


def best_sequences(state: search.BeamState, count: int, pad: int, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best `count` sequences of each prompt as tensors: tokens (rows, new), padded after their end; scores; and the
    beam rows from which the tokens were selected, -1 after the end."""
    (prompts, beams), room = state.ended_pw.shape, state.tokens_rn.shape[1]
    scores_pc = state.ended_pw[:, :count]
    possible_pc = scores_pc > -np.inf
    lengths_pc = tf.where(possible_pc, state.lengths_pw[:, :count], 0)
    real = tf.reshape(tf.range(new) < lengths_pc[:, :, None], (prompts * count, new))

    def select(x_rn: Tensor, fill: int) -> Tensor:
        x = tf.reshape(x_rn, (prompts, beams, room))[:, :count, :new]
        return tf.where(real, tf.reshape(x, (prompts * count, new)), fill)

    scores = tf.where(possible_pc, scores_pc, search.HOPELESS)
    return (
        select(state.ended_tokens_rn, pad),
        tf.reshape(scores, (prompts * count,)),
        select(state.ended_rows_rn, -1),
    )


def _needs_static_rows(program: Program) -> list[str]:
    """The options of a call that need a static number of rows."""
    beams = ["num_beams"] if program.search else []
    return [*beams, *dict(program.fields), *(name for name in program.numbers if name != "temperature")]


def _network_inputs(
    prompt: Prompt, decoder: GraphDecoder, config: GenerationConfig
) -> tuple[dict[str, Any], int]:
    """The network's inputs for the prompts, and the number of tokens."""
    arguments = dict(decoder.inputs)
    if prompt.ids_bn is not None and "inputs_embeds" not in arguments:
        arguments["input_ids"] = prompt.ids_bn
    if (mask := prompt.mask(config)) is not None:
        arguments["attention_mask"] = mask
    arguments = {name: to_tensors(name, value) for name, value in arguments.items()}
    given = check_inputs(
        decoder.model.spec, decoder.model.head_spec, arguments, None, False, documents=False
    ).given
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    assert tokens is not None
    return given, tokens.shape[1]


def _with_prompts(buffer: TokenBuffer, ids_bn: Tensor, valid_bn: Tensor) -> TokenBuffer:
    """The token buffer of the placeholder prompts with the real prompts in it."""
    buffer = TokenBuffer(*(to_tensor(np.asarray(array)) for array in buffer))
    if not (columns := buffer.ids_bt.shape[1]):
        return buffer
    before = ((0, 0), (columns - ids_bn.shape[1], 0))
    return buffer._replace(
        ids_bt=tf.pad(ids_bn, before, constant_values=NO_TOKEN), valid_bt=tf.pad(valid_bn, before)
    )
