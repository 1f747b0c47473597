"""The generation loop of all frameworks.

A backend implements two protocols. A `GenerativeModel` describes the model:

    class TorchModel:                          # one per model
        ops = TorchOps(device)                 # arrays.ArrayOps
        generation_config = ...                # the model's own GenerationConfig, or None
        input_names = frozenset({"past_key_values", "position_ids", "inputs_embeds"})
        max_positions = None                   # the size of the table of learned positions, if there is one
        vocab = 89                             # the size of the vocabulary
        unsupported = {}                       # options that this backend does not support
        compiled = None                        # runs a call as one compiled program, if the backend can
        def decoder(self, plan, inputs): ...   # a Decoder for one run; `inputs` hold some of input_names

and a `Decoder` computes scores: `prefill(ids, mask)` once, then `step(ids)` for each new token. It owns the cache,
positions and mask, reads `plan.config.use_cache`, `cache_implementation`, `output_attentions` and so on, and takes the
size of a static cache from `plan.rows` and `plan.max_length`. Then `model.generate(...)` is

    def generate(self, inputs=None, generation_config=None, **kwargs):
        with torch.inference_mode():
            return loop.generate(TorchModel(self), inputs, generation_config, **kwargs)

Each step copies the new tokens to the host once: eos tokens, stop strings and streamers work on Python lists.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from monoblock.generation import beams, compiled_loop, speculative
from monoblock.generation.config import GenerationConfig
from monoblock.generation.decoder import GenerationPlan, GenerativeModel
from monoblock.generation.outputs import GenerateDecoderOnlyOutput, ResultFn, ids_only
from monoblock.generation.preparation import prepare
from monoblock.generation.streamers import streaming

__all__ = ["GenerateDecoderOnlyOutput", "GenerationPlan", "GenerativeModel", "generate"]


def generate(
    model: GenerativeModel,
    inputs: Any = None,
    generation_config: GenerationConfig | None = None,
    *,
    make_result: ResultFn = ids_only,
    **arguments: Any,
) -> Any:
    """Continue prompts: token ids (rows, prompt + new), or an output object with `return_dict_in_generate=True`.

    `arguments` are transformers': `input_ids`, `attention_mask`, `logits_processor`, `stopping_criteria`,
    `prefix_allowed_tokens_fn`, `streamer`, `tokenizer` (for stop strings), `assistant_model` (a `GenerativeModel`),
    `negative_prompt_ids`, the model's own inputs, and every field of `GenerationConfig`; in addition `seed` or
    `generator` for sampling, `response_format`, and `speculation` ("suffix", "lookup" or "off"). Finished rows are
    filled with `pad_token_id`.
    `make_result` builds the return value where no output object is requested.
    ValueError for arguments that are unknown, out of range or not supported.
    """
    streamer = arguments.get("streamer")
    with streaming(streamer) if streamer is not None else nullcontext():
        given = {**arguments, "inputs": inputs, "generation_config": generation_config}
        run = prepare(model, given, make_result)
        if model.compiled is not None and (program := compiled_loop.program_of(run)) is not None:
            return model.compiled(run, program)
        if (run.config.num_beams or 1) > 1:
            return beams.run(run)
        if run.speculative:
            return speculative.run(run)

        # Greedy decoding and sampling: one token per step until every row is finished.
        ops, decoder = run.ops, run.decoder
        sequences, outputs = run.start()
        scores_bv = run.first(decoder.prefill(run.prompt_bn, run.mask_bm), outputs)
        finished = [False] * run.plan.rows
        for left in range(run.plan.new_tokens - 1, -1, -1):
            chosen_bv = run.processed(scores_bv, sequences.ids)
            outputs.add_scores(scores_bv, chosen_bv)
            token_b = ops.sample(chosen_bv, run.generator) if run.config.do_sample else ops.argmax(chosen_bv)
            tokens: list[int] = ops.to_list(token_b)
            if True in finished:
                tokens = [run.pad if done else token for done, token in zip(finished, tokens, strict=True)]
                token_b = ops.array(tokens)
            sequences.append(token_b, tokens)
            if run.streamer is not None:
                run.streamer.put(ops.host(token_b))
            now = run.ended(tokens, sequences.rows, sequences.ids, outputs)
            finished = [before or ends for before, ends in zip(finished, now, strict=True)]
            if left == 0 or all(finished):
                break
            scores_bv = decoder.step(token_b[:, None])
            outputs.add_forward(decoder)
        return outputs.output(sequences.ids(), decoder)
