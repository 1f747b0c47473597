"""Validates the arguments of a `generate` call and prepares its run, before any forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from monoblock.generation import drafts, guidance, limits, processors, stopping, structured
from monoblock.generation.arrays import Array
from monoblock.generation.config import GenerationConfig, as_own_config
from monoblock.generation.decoder import GenerationPlan, GenerativeModel
from monoblock.generation.outputs import GeneratedSequences, OutputCollector, ResultFn, ids_only
from monoblock.generation.prompt import (
    ARGUMENT_NAMES,
    GenerateArguments,
    check_functions,
    check_positions,
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


def prepare(
    model: GenerativeModel, arguments: Mapping[str, Any], make_result: ResultFn = ids_only
) -> GenerationRun:
    """The run for these arguments of `loop.generate`.

    ValueError for arguments that are unknown, out of range or not supported.
    """
    given = dict(arguments)
    given["generation_config"] = as_own_config(given.get("generation_config"))
    refuse_unsupported(given, UNSUPPORTED_ARGUMENTS, model.unsupported)
    known = ARGUMENT_NAMES | GenerationConfig.FIELDS | model.input_names
    refuse_unknown(given.keys() - UNSUPPORTED_ARGUMENTS.keys(), known)
    call = GenerateArguments(**{name: value for name, value in given.items() if name in ARGUMENT_NAMES})
    check_functions(call)
    model_inputs = {n: v for n, v in given.items() if n in model.input_names and v is not None}
    config = resolve(
        {name: value for name, value in given.items() if name in GenerationConfig.FIELDS},
        call.generation_config,
        as_own_config(model.generation_config, "model.generation_config"),
        assisted=call.assistant_model is not None,
        unsupported=model.unsupported,
    )
    call.speculation, given_method = drafts.check_method(call.speculation), call.speculation
    if given_method == "off":  # also where the model's own config sets it
        config.prompt_lookup_num_tokens = None
    if _is_speculative(call, config) and (config.num_beams or 1) > 1:
        raise ValueError(
            "speculative decoding and beam search cannot be combined: leave out num_beams, or assistant_model, "
            "prompt_lookup_num_tokens and speculation"
        )
    own = call.generation_config.own_fields() if call.generation_config else {}
    explicit = frozenset({*own, *(name for name, value in given.items() if value is not None)})
    return GenerationRun(model, call, config, model_inputs, make_result, explicit)


def _is_speculative(call: GenerateArguments, config: GenerationConfig) -> bool:
    return (
        call.assistant_model is not None
        or config.prompt_lookup_num_tokens is not None
        or call.speculation is not None
    )


def _copies(config: GenerationConfig) -> int:
    """Rows for each prompt."""
    beams, returned = config.num_beams or 1, config.num_return_sequences or 1
    if beams > 1 and returned > beams:
        raise ValueError(f"num_return_sequences={returned} is more than num_beams={beams}: search more beams")
    if beams == 1 and returned > 1 and not config.do_sample:
        raise ValueError(
            f"num_return_sequences={returned} without sampling would give equal sequences: set do_sample=True or "
            "num_beams"
        )
    return max(beams, returned)


class GenerationRun:
    """The state of one `generate` call; its constructor makes all checks."""

    def __init__(
        self,
        model: GenerativeModel,
        call: GenerateArguments,
        config: GenerationConfig,
        inputs: dict[str, Any],
        make_result: ResultFn,
        explicit: frozenset[str],
    ):
        """`explicit`: the arguments of the call and the fields that its config sets."""
        self.ops = ops = model.ops
        self.config, self.make_result = config, make_result
        self.streamer = call.streamer
        limits.check_ids(config, model.vocab, explicit)
        self.prompt_bn = prompt_ids(ops, call, config, inputs, model.vocab)
        self.mask_bm = prompt_mask(ops, self.prompt_bn, call, config, inputs)
        batch, columns = (int(size) for size in self.prompt_bn.shape)
        self.embedded = embedded_length(inputs)
        given = self.embedded or columns
        if (positions := inputs.get("position_ids")) is not None:
            check_positions(ops, positions, batch, given)
        self.speculative = _is_speculative(call, config)
        copies = _copies(config)
        limits.check_rows(batch, copies)
        self.plan = GenerationPlan(
            config=config,
            # A mask with more columns includes the tokens of past_key_values.
            prompt_length=given if self.mask_bm is None else max(given, int(self.mask_bm.shape[1])),
            new_tokens=self._new_tokens(model, given, inputs, explicit),
            batch=batch,
            copies=copies,
            rewinds=self.speculative,
        )
        if self.streamer is not None and self.plan.rows > 1:
            raise ValueError(f"a streamer takes one sequence at a time, got {self.plan.rows} rows")
        self.user_criteria: list[Any] = list(call.stopping_criteria or ())
        self.eos = frozenset(config.eos_ids)
        self.pad = self._pad()
        if self.plan.rows > 1 and (
            self.user_criteria or config.stop_strings or self._eos_possible(model.vocab)
        ):
            limits.check_pad(self.pad, model.vocab)
        self.generator = random_source(ops, call)
        self.copy_of = ops.array([row // self.plan.copies for row in range(self.plan.rows)])
        self.context = self._context()
        self.guidance = guidance.build(model, call, self.plan, self.prompt_bn, self.expand)
        self.processors = [self.guidance] if self.guidance else []
        grammar = structured.build(ops, columns, call.response_format, call.tokenizer, config)
        self.user_processors = [*(call.logits_processor or ()), *([grammar] if grammar else [])]
        self.fields = processors.wanted(config, call.prefix_allowed_tokens_fn)
        self.processors += processors.build(self.context, self.fields, self.user_processors)
        self.criteria = stopping.build(
            config.max_time, config.stop_strings, self.user_criteria, call.tokenizer
        )
        self.assistant, self.speculation = call.assistant_model, call.speculation
        self.vocab = 0  # set from the first scores
        self.decoder = model.decoder(self.plan, inputs)

    def _new_tokens(
        self, model: GenerativeModel, given: int, inputs: Mapping[str, Any], explicit: frozenset[str]
    ) -> int:
        """The number of tokens to generate after `given` positions. ValueError if the call requests more than the table
        of learned positions allows; a number from the model's own files is lowered to what fits."""
        new = new_tokens(self.config, given, model.max_positions)
        if (positions := model.max_positions) is None:
            return new
        used = self._used(given, inputs)
        if not {"max_new_tokens", "max_length"} & explicit and used <= positions:
            new = min(new, positions - used + 1)
        limits.check_room("the prompt", used, new, positions)
        return new

    def _used(self, given: int, inputs: Mapping[str, Any]) -> int:
        """The number of learned positions that the longest prompt takes: by position_ids, else its tokens without
        padding."""
        if (positions := inputs.get("position_ids")) is not None:
            return int(self.ops.to_numpy(self.ops.array(positions)).max()) + 1
        return given if self.mask_bm is None else int((self.ops.to_numpy(self.mask_bm) != 0).sum(1).max())

    def _eos_possible(self, vocab: int | None) -> bool:
        """Whether an eos token may finish a row before others."""
        return any(vocab is None or token < vocab for token in self.eos)

    def _pad(self) -> int:
        if self.config.pad_token_id is not None and self.config.pad_token_id >= 0:
            return self.config.pad_token_id
        if self.config.eos_ids:
            return self.config.eos_ids[0]
        per_row = any(not isinstance(own, stopping.ENDS_ALL_ROWS) for own in self.user_criteria)
        returned = self.plan.batch * (self.config.num_return_sequences or 1)
        if returned > 1 and (self.config.stop_strings or per_row):
            raise ValueError(
                "rows of a batch can finish at different times, and there is no token to pad them with: set "
                "pad_token_id"
            )
        return 0  # never used: all rows finish together

    def _context(self) -> processors.ProcessorContext:
        columns = int(self.prompt_bn.shape[1])
        if self.config.min_length:  # counts embedded positions, which the ids of processors do not include
            self.config.min_length = max(0, self.config.min_length - max(0, self.embedded - columns))
        is_mask = self.mask_bm is not None and self.mask_bm.shape == self.prompt_bn.shape
        return processors.ProcessorContext(
            ops=self.ops,
            config=self.config,
            prompt_bn=self.expand(self.prompt_bn),
            valid_bn=self.expand(self.mask_bm != 0) if is_mask else None,
            prompt_length=columns,
            max_length=columns + self.plan.new_tokens,
            copies=self.plan.copies,
            keep=1 if (self.config.num_beams or 1) == 1 else 1 + max(1, len(self.eos)),
        )

    def expand(self, x: Array) -> Array:
        """An array with a row for each prompt, expanded to a row for each copy."""
        return x if self.plan.copies == 1 else self.ops.take_rows(x, self.copy_of)

    # ------------------------------------------------------------------ steps of every decoding strategy

    def prefill(self) -> tuple[GeneratedSequences, OutputCollector, Array]:
        """Run the prompts through the model: sequences, collector, and scores (rows, vocab) of the first new token."""
        sequences, outputs = self.start()
        return sequences, outputs, self.first(self.decoder.prefill(self.prompt_bn, self.mask_bm), outputs)

    def start(self) -> tuple[GeneratedSequences, OutputCollector]:
        """Sequences and collector before the forward pass; the streamer receives the prompt."""
        sequences = GeneratedSequences(self.ops, self.expand(self.prompt_bn), wants_rows=bool(self.criteria))
        if self.streamer is not None:
            self.streamer.put(self.ops.host(self.prompt_bn))
        return sequences, OutputCollector(self.config, self.make_result)

    def first(self, scores_bv: Array, outputs: OutputCollector) -> Array:
        """Scores of the first new token with a row for each copy, from those with a row for each prompt."""
        self.vocab = int(scores_bv.shape[-1])
        outputs.add_forward(self.decoder)
        if self.plan.copies > 1:
            scores_bv = self.expand(scores_bv)
            self.decoder.reorder(self.copy_of)
            outputs.expand(self.expand)
        return scores_bv

    def reorder(self, rows: list[int]) -> None:
        """Continue row i from the state of row rows[i]."""
        if rows != list(range(len(rows))):
            index_b = self.ops.array(rows)
            self.decoder.reorder(index_b)
            if self.guidance is not None:
                self.guidance.reorder(index_b)

    def processed(self, scores_bv: Array, ids: Callable[[], Array]) -> Array:
        """The scores after all processors; `ids` returns the sequences so far."""
        if self.processors:
            ids_bn = ids()
            for processor in self.processors:
                scores_bv = processor(ids_bn, scores_bv)
        return scores_bv

    def ended(
        self, tokens: list[int], rows: stopping.Rows, ids: Callable[[], Array], outputs: OutputCollector
    ) -> list[bool]:
        """Whether each row ends with its last token; `rows` and `ids` are the sequences that include it."""
        done = [token in self.eos for token in tokens]
        for criterion in self.criteria:
            if isinstance(criterion, stopping.HostCriteria):
                verdict = criterion.after(rows)
            else:
                verdict = criterion(self.ops.to_framework(ids()), outputs.all_scores())
            answers = stopping.per_row(verdict, len(done), criterion)
            done = [before or now for before, now in zip(done, answers, strict=True)]
        return done
