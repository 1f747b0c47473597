"""`generate` inside a user's `tf.function`: the prompt's pass and the loop over tokens become part of its graph.

Prompts have shapes there and no values. Their length must be known, and all rows get the room for all new tokens: rows
that end before are filled with the pad token. Nothing can be raised for a value: where a row has no token that can be
drawn, the texts end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from monoblock.backends.tf.arrays import shown
from monoblock.backends.tf.binding import tensors
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
    "generate() inside a tf.function is one graph, and this call needs Python between two tokens (streamers, "
    "criteria or processors of your own, recorded scores, guidance, an assistant, use_cache=False or "
    "disable_compile=True): call it outside, where it compiles by itself"
)


@dataclass(frozen=True)
class Prompt:
    """The prompts of a call: ids (rows, tokens), of which the rows may be open, and their mask (None: no padding but
    pad tokens). Prompts that are embeddings have no ids."""

    ids_bn: Tensor | None
    mask_bn: Tensor | None

    def stand_ins(self) -> dict[str, Any]:
        """What has the same shape, and values."""
        if self.ids_bn is None:
            return {}
        shape = (self.ids_bn.shape[0] or 1, self.ids_bn.shape[1])
        return {"input_ids": np.zeros(shape, np.int64), "attention_mask": np.ones(shape, np.int64)}

    def mask(self, config: GenerationConfig) -> Tensor | None:
        """1 for tokens; without a mask, pad tokens are padding unless they also end texts. A row of pad tokens alone
        has its last one."""
        pad, ids_bn = config.pad_token_id, self.ids_bn
        if self.mask_bn is not None or ids_bn is None or pad is None or pad < 0 or pad in config.eos_ids:
            return self.mask_bn
        real_bn = ids_bn != pad
        last_n = tf.range(ids_bn.shape[1]) == ids_bn.shape[1] - 1
        none_b1 = ~tf.reduce_any(real_bn, axis=1, keepdims=True)
        return tf.cast(real_bn | (none_b1 & last_n), tf.int32)


def prompt(inputs: Any, arguments: dict[str, Any]) -> Prompt:
    """The prompts, taken out of the arguments. ValueError unless their length is known."""
    given = arguments.pop("input_ids", None) if inputs is None else inputs
    mask = arguments.pop("attention_mask", None)
    if given is None:
        if mask is not None:
            arguments["attention_mask"] = mask
        return Prompt(None, None)
    ids = tf.cast(tensors("input_ids", given), tf.int32)
    if len(ids.shape) != 2 or ids.shape[1] is None:
        raise ValueError(
            f"inside a tf.function the prompts must be (rows, tokens) of a known length, got {ids.shape}: pad them to "
            "one length, and give the tf.function an input_signature that says it"
        )
    return Prompt(ids, None if mask is None else tf.cast(tensors("attention_mask", mask), tf.int32))


class GraphDecoder:
    """What the framework-free loop asks for; the tokens are made by `run`."""

    attentions = hidden_states = None

    def __init__(
        self, model: Any, plan: GenerationPlan, inputs: dict[str, Any], max_positions: int | None
    ) -> None:
        self.model, self.plan, self.inputs = model, plan, inputs
        self.past_key_values: Cache | None = None
        last = plan.max_length - 1
        if max_positions is not None and last > max_positions:
            raise ValueError(
                f"the model has {max_positions} learned positions, but the text may come to {last} tokens (inside a "
                "tf.function, padding counts): shorten the prompts, or say a smaller max_new_tokens"
            )
        if plan.config.prefill_chunk_size is not None:
            raise ValueError("prefill_chunk_size goes into generate() outside of a tf.function")
        if "past_key_values" in inputs:
            raise ValueError("past_key_values go into generate() outside of a tf.function")

    def prefill(self, ids_bn: Any, mask_bm: Any) -> Any:
        """ValueError: what asks for it needs the host."""
        del ids_bn, mask_bm
        raise ValueError(HOST)

    step = extend = reorder = crop = prefill


def run(prompt: Prompt, generation: Any, program: Program) -> Any:
    """A whole call as a part of the graph."""
    decoder, plan = generation.decoder, generation.plan
    given, count = _given(prompt, decoder, plan.config)
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    rows, new = size(tokens, 0), plan.new_tokens
    if not isinstance(rows, int) and (names := _of_known_rows(program)):
        raise ValueError(
            f"{', '.join(names)}: inside a tf.function this needs a known number of rows: say it in the input_signature"
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
    setting = generation.context
    numbers = program.inputs(generation.fields, setting.prompt_bn, None, new)
    start = LoopStart(
        scores_bv=scores,
        cache=found.cache if plan.copies == 1 else found.cache.reorder(copy_of),
        fixed_inputs=fixed_inputs,
        buffer=_placed(program.token_buffer(setting.prompt_bn, None), ids, valid),
        inputs=numbers._replace(prompt=_placed(numbers.prompt, ids, valid)),
        limits=tf.constant((new, new)),
        rng_state=LOOP_OPS.rng_state(generation.generator, needed=True),
    )
    record = OutputCollector(plan.config, generation.make_result)
    if program.search is not None:
        return _searched(generation, program, start, ids, record)
    state = compiled_loop(decoder.model, program, start)
    decoder.past_key_values = state.cache
    return record.output(tf.concat((ids, state.tokens_br[:, :new]), axis=1), decoder)


def _searched(
    generation: Any, program: Program, start: LoopStart, ids: Tensor, record: OutputCollector
) -> Any:
    """The best texts of a search; `ids` have a row for each beam."""
    decoder, plan = generation.decoder, generation.plan
    count = plan.config.num_return_sequences or 1
    beam_start = tf.nest.map_structure(shown, compiled_beams.beam_start(generation, program))
    state = compiled_loop(decoder.model, program, start._replace(search=beam_start))
    decoder.past_key_values = state.cache
    new, scores, rows = texts(state.beam_state, count, program.pad, plan.new_tokens)
    prompts = tf.repeat(ids[:: plan.copies], count, axis=0)
    return record.beam_output(tf.concat((prompts, new), axis=1), scores, rows, decoder)


def texts(running: search.BeamState, count: int, pad: int, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best `count` texts of each prompt as tensors: tokens (rows, new), pads after a text's end; scores; and the
    rows that the tokens were chosen from, -1 after the end."""
    (prompts, beams), room = running.ended_pw.shape, running.tokens_rn.shape[1]
    scores_pc = running.ended_pw[:, :count]
    possible_pc = scores_pc > -np.inf
    lengths_pc = tf.where(possible_pc, running.lengths_pw[:, :count], 0)
    real = tf.reshape(tf.range(new) < lengths_pc[:, :, None], (prompts * count, new))

    def best(held_rn: Tensor, fill: int) -> Tensor:
        held = tf.reshape(held_rn, (prompts, beams, room))[:, :count, :new]
        return tf.where(real, tf.reshape(held, (prompts * count, new)), fill)

    scores = tf.where(possible_pc, scores_pc, search.HOPELESS)
    return (
        best(running.ended_tokens_rn, pad),
        tf.reshape(scores, (prompts * count,)),
        best(running.ended_rows_rn, -1),
    )


def _of_known_rows(program: Program) -> list[str]:
    """What of a call cannot be without the number of its rows."""
    beams = ["num_beams"] if program.search else []
    return [*beams, *dict(program.fields), *(name for name in program.numbers if name != "temperature")]


def _given(prompt: Prompt, decoder: GraphDecoder, config: GenerationConfig) -> tuple[dict[str, Any], int]:
    """The prompt's inputs as the network takes them, and how many tokens they are."""
    arguments = dict(decoder.inputs)
    if prompt.ids_bn is not None and "inputs_embeds" not in arguments:
        arguments["input_ids"] = prompt.ids_bn
    if (mask := prompt.mask(config)) is not None:
        arguments["attention_mask"] = mask
    arguments = {name: tensors(name, value) for name, value in arguments.items()}
    given = check_inputs(
        decoder.model.spec, decoder.model.head_spec, arguments, None, False, documents=False
    ).given
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    assert tokens is not None
    return given, tokens.shape[1]


def _placed(text: TokenBuffer, ids_bn: Tensor, valid_bn: Tensor) -> TokenBuffer:
    """A stand-in's text with the real prompts in it."""
    text = TokenBuffer(*(shown(np.asarray(part)) for part in text))
    if not (columns := text.ids_bt.shape[1]):
        return text
    before = ((0, 0), (columns - ids_bn.shape[1], 0))
    return text._replace(
        ids_bt=tf.pad(ids_bn, before, constant_values=NO_TOKEN), valid_bt=tf.pad(valid_bn, before)
    )
