"""The arguments of one `generate` call, and its prompts: token ids and padding mask."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from monoblock.call_checks import check_mask
from monoblock.field_types import brief
from monoblock.generation.arrays import Array, ArrayOps
from monoblock.generation.config import GenerationConfig
from monoblock.generation.limits import check_prompt
from monoblock.seeds import checked_seed

log = logging.getLogger("monoblock")


@dataclass(kw_only=True)
class GenerateArguments:
    """The arguments of `generate` that are neither config fields nor model inputs."""

    inputs: Any = None
    input_ids: Any = None
    attention_mask: Any = None
    generation_config: GenerationConfig | None = None
    logits_processor: Any = None
    stopping_criteria: Any = None
    prefix_allowed_tokens_fn: Callable[[int, Array], Any] | None = None
    streamer: Any = None
    tokenizer: Any = None
    response_format: Any = None
    assistant_model: Any = None
    speculation: str | None = None
    negative_prompt_ids: Any = None
    negative_prompt_attention_mask: Any = None
    seed: int | None = None
    generator: Any = None


ARGUMENT_NAMES = frozenset(field.name for field in fields(GenerateArguments))


def embedded_length(inputs: Mapping[str, Any]) -> int:
    """The length of a prompt that is given as embeddings (rows, positions, width); 0 without embeddings."""
    if (embeds := inputs.get("inputs_embeds")) is None:
        return 0
    if len(shape := np.shape(embeds)) != 3 or 0 in shape:
        raise ValueError(
            f"inputs_embeds must be (rows, positions, width), none of them 0, got {tuple(shape)}"
        )
    return int(shape[1])


def prompt_ids(
    ops: ArrayOps,
    call: GenerateArguments,
    config: GenerationConfig,
    inputs: Mapping[str, Any],
    vocab: int | None = None,
) -> Array:
    """The prompts' ids (rows, tokens), on the device; by default one row with the bos token.

    A prompt of embeddings alone has no tokens. ValueError without any prompt, or for an id outside the vocabulary of
    size `vocab`.
    """
    if call.inputs is not None and call.input_ids is not None:
        raise ValueError("generate() got both inputs and input_ids, which are the same argument: pass one")
    given = call.input_ids if call.inputs is None else call.inputs
    embedded_length(inputs)
    embeds = inputs.get("inputs_embeds")
    if given is None and embeds is not None:
        return ops.array(np.zeros((int(embeds.shape[0]), 0), dtype=np.int64))
    if given is None:
        if config.bos_token_id is None or config.bos_token_id < 0:
            raise ValueError("generate() has no prompt: pass input_ids, or set bos_token_id")
        return ops.array([[config.bos_token_id]])
    if isinstance(given, str):
        raise TypeError("generate() takes token ids, got a string: pass tokenizer(text, return_tensors=...)")
    ids_bn = as_array(ops, "input_ids", given, "token ids of shape (rows, tokens), rows of equal length")
    if len(ids_bn.shape) != 2 or ids_bn.shape[0] == 0:
        raise ValueError(f"input_ids must have the shape (rows, tokens), got {tuple(ids_bn.shape)}")
    if ids_bn.shape[1] == 0 and embeds is None:
        raise ValueError("the prompt is empty: pass at least one token, such as the bos token")
    if "int" not in str(ids_bn.dtype):
        raise ValueError(f"input_ids must be integers, got {ids_bn.dtype}")
    if ids_bn.shape[1] > 0:
        values = ops.to_numpy(ids_bn)
        check_prompt("input_ids", int(values.min()), int(values.max()), vocab)
    return ids_bn


def as_array(ops: ArrayOps, name: str, value: Any, expected: str) -> Array:
    """The argument `name` as an array of numbers; ValueError for other values."""
    try:
        array = ops.array(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{name} must be {expected}, got {brief(value)}: {why}") from error
    if not any(kind in str(array.dtype) for kind in ("int", "float", "bool")):
        raise ValueError(f"{name} must be {expected}, got {array.dtype}")
    return array


def check_positions(ops: ArrayOps, positions: Any, rows: int, columns: int) -> None:
    """ValueError unless there is an integer position for each token of the prompts (or of one row for all)."""
    array = as_array(ops, "position_ids", positions, "integers (rows, tokens)")
    if tuple(array.shape) not in ((rows, columns), (1, columns)) or "int" not in str(array.dtype):
        raise ValueError(
            f"position_ids must be integers (rows, tokens) = ({rows}, {columns}), got {array.dtype} "
            f"{tuple(array.shape)}"
        )


def check_functions(call: GenerateArguments) -> None:
    """TypeError for an argument that must be callable, or hold callables, and does not."""
    for name in ("logits_processor", "stopping_criteria"):
        value = getattr(call, name)
        if value is not None and (not isinstance(value, Sequence) or isinstance(value, str)):
            raise TypeError(f"{name} must be a list of callables, got {brief(value)}")
    if call.prefix_allowed_tokens_fn is not None and not callable(call.prefix_allowed_tokens_fn):
        got = brief(call.prefix_allowed_tokens_fn)
        raise TypeError(f"prefix_allowed_tokens_fn must be a function of a row and its ids, got {got}")
    streamer = call.streamer
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise TypeError(f"streamer must have put and end, as TextStreamer has, got {brief(streamer)}")
    if call.tokenizer is not None and not callable(getattr(call.tokenizer, "decode", None)):
        raise TypeError(f"tokenizer must be the model's, which has decode, got {brief(call.tokenizer)}")


def prompt_mask(
    ops: ArrayOps, ids_bn: Array, call: GenerateArguments, config: GenerationConfig, inputs: Mapping[str, Any]
) -> Array | None:
    """1 for tokens and 0 for padding (rows, positions); None without padding.

    Without an `attention_mask`, pad tokens in the prompt are padding unless the pad token is also an eos token.
    """
    columns = embedded_length(inputs) or int(ids_bn.shape[1])
    if call.attention_mask is not None:
        given = ops.to_numpy(
            as_array(
                ops, "attention_mask", call.attention_mask, "1 for tokens and 0 for padding (rows, tokens)"
            )
        )
        check_mask(given)
        mask = given != 0
        _check_shape(mask.shape, int(ids_bn.shape[0]), columns, longer="past_key_values" in inputs)
    elif config.pad_token_id is not None and ids_bn.shape[1] > 0:
        ids = ops.to_numpy(ids_bn)
        if config.pad_token_id in config.eos_ids:
            if len(ids) > 1 and (ids[:, 0] == config.pad_token_id).any():
                log.warning(
                    "the prompts begin with the pad token %d, which is also an eos token: pass attention_mask to mark "
                    "the padding",
                    config.pad_token_id,
                )
            return None
        mask = ids != config.pad_token_id
        mask[~mask.any(axis=1), -1] = (
            True  # a prompt of one pad token is not padding: some models begin with it
        )
    else:
        return None
    if not mask.any(axis=1).all():
        raise ValueError(
            f"row {int(mask.any(axis=1).argmin())} of the prompt is all padding; it needs at least one token"
        )
    if mask.all() and mask.shape[1] == columns:
        return None
    if not mask[:, -1].all():
        log.warning(
            "the prompts are padded on the right; generation continues after the padding: pad on the left"
        )
    return ops.array(mask.astype(np.int64))


def _check_shape(shape: tuple[int, ...], rows: int, columns: int, longer: bool) -> None:
    fits = len(shape) == 2 and shape[0] == rows and (shape[1] == columns or (longer and shape[1] > columns))
    if not fits:
        raise ValueError(
            f"attention_mask must have the prompt's shape ({rows}, {columns}), or more columns for the tokens in "
            f"past_key_values; got {tuple(shape)}"
        )


def random_source(ops: ArrayOps, call: GenerateArguments) -> Any:
    """The random generator for sampling: the call's generator, a new one for its seed, or None (the global one)."""
    if call.seed is None:
        return call.generator
    if call.generator is not None:
        raise ValueError("generate() got both seed and generator: pass one")
    return ops.generator(checked_seed(call.seed))
