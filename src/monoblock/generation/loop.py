"""The generation loop, once for all frameworks.

A backend plugs in with two objects. A `Model` describes what `generate` runs on:

    class TorchModel:                          # one per model, made once
        ops = TorchOps(device)                 # arrays.ArrayOps
        generation_config = ...                # the model's own GenerationConfig, or None
        input_names = frozenset({"past_key_values", "position_ids", "inputs_embeds"})
        max_positions = None                   # the length of a position table, if there is one
        def decoder(self, plan, inputs): ...   # a Decoder for one call; `inputs` hold some of input_names

and a `Decoder` computes scores: `prefill(ids, mask)` once, then `step(ids)` for each new token. It owns the cache,
positions and mask, reads `plan.config.use_cache`, `cache_implementation`, `output_attentions` and so on, and knows
from `plan.rows` and `plan.max_length` how large a static cache must be. Then `model.generate(...)` is

    def generate(self, inputs=None, generation_config=None, **kwargs):
        with torch.inference_mode():
            return loop.generate(TorchModel(self), inputs, generation_config, **kwargs)

Each step reads the new tokens back to the host once: finishing, stop strings and streamers work on Python lists.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from monoblock.generation import processors, stopping
from monoblock.generation.arrays import Array, ArrayOps
from monoblock.generation.config import GenerationConfig
from monoblock.generation.decoder import Decoder, Model, Plan
from monoblock.generation.prompt import (
    CALL_NAMES,
    Call,
    embedded_length,
    prompt_ids,
    prompt_mask,
    random_source,
)
from monoblock.generation.resolve import (
    UNSUPPORTED_ARGUMENTS,
    new_tokens,
    refuse_unknown,
    refuse_unsupported,
    resolve,
)
from monoblock.generation.streamers import streaming
from monoblock.outputs import ModelOutput


@dataclass
class GenerateDecoderOnlyOutput(ModelOutput):
    """What `return_dict_in_generate=True` gives.

    sequences (rows, prompt + new); scores and logits one (rows, vocab) for each new token, after and before the
    processors; attentions and hidden_states one tuple over layers for each forward pass.
    """

    sequences: Any = None
    scores: tuple[Any, ...] | None = None
    logits: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    past_key_values: Any = None


def generate(
    model: Model, inputs: Any = None, generation_config: GenerationConfig | None = None, **arguments: Any
) -> Any:
    """Continue prompts: token ids (rows, prompt + new), or a GenerateDecoderOnlyOutput if the config says so.

    `arguments` are the hub's: `input_ids`, `attention_mask`, `logits_processor`, `stopping_criteria`,
    `prefix_allowed_tokens_fn`, `streamer`, `tokenizer` (for stop strings), the model's own inputs, and every field
    of `GenerationConfig`; besides, `seed` or `generator` for sampling. Rows that are finished are filled with
    `pad_token_id`. ValueError for what is unknown, impossible or not supported.
    """
    streamer = arguments.get("streamer")
    with streaming(streamer) if streamer is not None else nullcontext():
        given: dict[str, Any] = {**arguments, "inputs": inputs, "generation_config": generation_config}
        refuse_unsupported(given, UNSUPPORTED_ARGUMENTS)
        known = CALL_NAMES | GenerationConfig.FIELDS | model.input_names
        refuse_unknown(given.keys() - UNSUPPORTED_ARGUMENTS.keys(), known)
        call = Call(**{name: value for name, value in given.items() if name in CALL_NAMES})
        model_inputs = {n: v for n, v in given.items() if n in model.input_names and v is not None}
        config = resolve(
            {name: value for name, value in given.items() if name in GenerationConfig.FIELDS},
            call.generation_config,
            model.generation_config,
        )
        return _Generation(model, call, config, model_inputs).run()


class _Generation:
    """One call, prepared: everything is checked here, before the model computes anything."""

    def __init__(self, model: Model, call: Call, config: GenerationConfig, inputs: dict[str, Any]):
        self.ops = ops = model.ops
        self.config = config
        self.streamer = call.streamer
        self.prompt_bn = prompt_ids(ops, call, config, inputs)
        self.mask_bm = prompt_mask(ops, self.prompt_bn, call, config, inputs)
        batch, columns = (int(size) for size in self.prompt_bn.shape)
        self.embedded = embedded_length(inputs)
        given = self.embedded or columns
        self.plan = Plan(
            config=config,
            # A mask with more columns speaks of tokens that are in the cache already.
            prompt_length=given if self.mask_bm is None else max(given, int(self.mask_bm.shape[1])),
            new_tokens=new_tokens(config, given, model.max_positions),
            batch=batch,
            copies=config.num_return_sequences or 1,
        )
        if self.plan.copies > 1 and not config.do_sample:
            raise ValueError(
                f"num_return_sequences={self.plan.copies} without sampling would give equal sequences: say "
                "do_sample=True"
            )
        if self.streamer is not None and self.plan.rows > 1:
            raise ValueError(f"a streamer takes one sequence at a time, got {self.plan.rows} rows")
        self.own_criteria: list[Any] = list(call.stopping_criteria or ())
        self.eos = frozenset(config.eos_ids)
        self.pad = self._pad()
        self.generator = random_source(ops, call)
        self.copy_of = ops.array([row // self.plan.copies for row in range(self.plan.rows)])
        self.processors = self._processors(call)
        self.criteria = stopping.build(
            config.max_time, config.stop_strings, self.own_criteria, call.tokenizer
        )
        self.decoder = model.decoder(self.plan, inputs)

    def _pad(self) -> int:
        if self.config.pad_token_id is not None and self.config.pad_token_id >= 0:
            return self.config.pad_token_id
        if self.config.eos_ids:
            return self.config.eos_ids[0]
        apart = any(not isinstance(own, stopping.ENDS_ALL_ROWS) for own in self.own_criteria)
        if self.plan.rows > 1 and (self.config.stop_strings or apart):
            raise ValueError(
                "rows of a batch can finish at different times, and there is no token to fill them with: say "
                "pad_token_id"
            )
        return 0  # never used: all rows finish together

    def _processors(self, call: Call) -> list[processors.Processor]:
        columns = int(self.prompt_bn.shape[1])
        if self.config.min_length:  # it counts embedded positions; the ids that processors see do not
            self.config.min_length = max(0, self.config.min_length - max(0, self.embedded - columns))
        is_mask = self.mask_bm is not None and self.mask_bm.shape == self.prompt_bn.shape
        setting = processors.Setting(
            ops=self.ops,
            config=self.config,
            prompt_bn=self._copied(self.prompt_bn),
            valid_bn=self._copied(self.mask_bm != 0) if is_mask else None,
            max_length=columns + self.plan.new_tokens,
            copies=self.plan.copies,
        )
        return processors.build(setting, call.logits_processor or (), call.prefix_allowed_tokens_fn)

    def _copied(self, x: Array) -> Array:
        return x if self.plan.copies == 1 else self.ops.take_rows(x, self.copy_of)

    # ------------------------------------------------------------------ the loop itself

    def run(self) -> Any:
        """Prefill, then one token after the other until every row is finished."""
        ops, decoder, plan = self.ops, self.decoder, self.plan
        text = _Text(ops, self._copied(self.prompt_bn), wants_rows=bool(self.criteria))
        record = _Record(self.config)
        if self.streamer is not None:
            self.streamer.put(ops.host(self.prompt_bn))
        finished = [False] * plan.rows
        scores_bv = decoder.prefill(self.prompt_bn, self.mask_bm)
        record.forward(decoder)
        if plan.copies > 1:
            scores_bv = self._copied(scores_bv)
            decoder.reorder(self.copy_of)
            record.repeat(self._copied)
        for left in range(plan.new_tokens - 1, -1, -1):
            token_b, tokens = self._choose(scores_bv, text, record, finished)
            text.append(token_b, tokens)
            if self.streamer is not None:
                self.streamer.put(ops.host(token_b))
            self._finish(finished, tokens, text, record)
            if left == 0 or all(finished):
                break
            scores_bv = decoder.step(token_b[:, None])
            record.forward(decoder)
        return record.output(text.ids(), decoder)

    def _choose(
        self, scores_bv: Array, text: _Text, record: _Record, finished: list[bool]
    ) -> tuple[Array, list[int]]:
        """The next token of each row, on the device and on the host."""
        ops = self.ops
        chosen_bv = scores_bv
        if self.processors:
            ids_bn = text.ids()
            for processor in self.processors:
                chosen_bv = processor(ids_bn, chosen_bv)
        record.choice(scores_bv, chosen_bv)
        token_b = ops.sample(chosen_bv, self.generator) if self.config.do_sample else ops.argmax(chosen_bv)
        tokens: list[int] = ops.to_list(token_b)
        if True in finished:
            tokens = [self.pad if done else token for done, token in zip(finished, tokens, strict=True)]
            token_b = ops.array(tokens)
        return token_b, tokens

    def _finish(self, finished: list[bool], tokens: list[int], text: _Text, record: _Record) -> None:
        if self.eos:
            for row, token in enumerate(tokens):
                if token in self.eos:
                    finished[row] = True
        for criterion in self.criteria:
            if isinstance(criterion, stopping.HostCriteria):
                verdict = criterion.after(text.rows)
            else:
                verdict = criterion(text.ids(), _tuple(record.scores))
            for row, done in enumerate(stopping.per_row(verdict, len(finished), criterion)):
                finished[row] = finished[row] or done


class _Text:
    """All token ids so far: on the device, joined only when someone looks, and on the host if criteria want."""

    def __init__(self, ops: ArrayOps, prompt_bn: Array, wants_rows: bool):
        self._ops = ops
        self._ids = prompt_bn
        self._new: list[Array] = []
        self.rows: stopping.Rows = ops.to_list(prompt_bn) if wants_rows else []

    def append(self, token_b: Array, tokens: list[int]) -> None:
        self._new.append(token_b[:, None])
        for row, token in zip(self.rows, tokens, strict=False):
            row.append(token)

    def ids(self) -> Array:
        if self._new:
            self._ids = self._ops.concat([self._ids, *self._new])
            self._new = []
        return self._ids


class _Record:
    """What the call wants back besides the sequences."""

    def __init__(self, config: GenerationConfig):
        wanted = bool(config.return_dict_in_generate)
        self.as_dict = wanted
        self.scores: list[Array] | None = [] if wanted and config.output_scores else None
        self.logits: list[Array] | None = [] if wanted and config.output_logits else None
        self.attentions: list[Any] | None = [] if wanted and config.output_attentions else None
        self.hidden_states: list[Any] | None = [] if wanted and config.output_hidden_states else None

    def forward(self, decoder: Decoder) -> None:
        if self.attentions is not None:
            self.attentions.append(decoder.attentions)
        if self.hidden_states is not None:
            self.hidden_states.append(decoder.hidden_states)

    def repeat(self, copied: Callable[[Array], Array]) -> None:
        """The prompt's forward pass, as if it had been run on every copy."""
        for kept in (self.attentions, self.hidden_states):
            if kept:
                kept[0] = tuple(copied(layer) for layer in kept[0])

    def choice(self, logits_bv: Array, scores_bv: Array) -> None:
        if self.scores is not None:
            self.scores.append(scores_bv)
        if self.logits is not None:
            self.logits.append(logits_bv)

    def output(self, ids_bn: Array, decoder: Decoder) -> Any:
        if not self.as_dict:
            return ids_bn
        return GenerateDecoderOnlyOutput(
            sequences=ids_bn,
            scores=_tuple(self.scores),
            logits=_tuple(self.logits),
            attentions=_tuple(self.attentions),
            hidden_states=_tuple(self.hidden_states),
            past_key_values=decoder.past_key_values,
        )


def _tuple(kept: list[Any] | None) -> tuple[Any, ...] | None:
    return None if kept is None else tuple(kept)
