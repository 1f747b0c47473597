"""Resolves the config of one call (call > passed config > the model's file > defaults) and refuses the unsupported."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from monoblock.errors import UnsupportedConfig
from monoblock.field_types import brief
from monoblock.generation.checks import SAMPLING_FIELDS, plain
from monoblock.generation.config import GenerationConfig

log = logging.getLogger("monoblock")

# transformers' defaults for unset fields.
DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "use_cache": True,
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
DEFAULT_NEW_TOKENS = 20

# The supported values of an option (None is always one), and the reason why others are refused.
Unsupported = Mapping[str, tuple[tuple[Any, ...], str]]
# Fields, in every backend; a backend's own entries (`GenerativeModel.unsupported`) override these.
UNSUPPORTED: Unsupported = {
    "num_beam_groups": ((1,), "diverse beam search is not implemented"),
    "diversity_penalty": ((0,), "diverse beam search is not implemented"),
    "constraints": ((), "constrained beam search is not implemented"),
    "force_words_ids": ((), "constrained beam search is not implemented"),
    "penalty_alpha": ((0,), "contrastive search is not implemented"),
    "low_memory": ((False,), "contrastive search is not implemented"),
    "dola_layers": ((), "DoLa decoding is not implemented"),
    "watermarking_config": ((), "watermarking is not implemented"),
    "token_healing": ((False,), "token healing is not implemented"),
    "is_assistant": ((False,), "pass the draft model to the call: generate(..., assistant_model=model)"),
    "assistant_early_exit": ((), "no supported model can exit at an earlier layer"),
    "assistant_ensemble_weight": (
        (),
        "speculative decoding here keeps the model's distribution, which a weight would not",
    ),
    "assistant_lookbehind": ((10,), "an assistant with another tokenizer is not implemented"),
    "target_lookbehind": ((10,), "an assistant with another tokenizer is not implemented"),
    "speculation_type": (
        (),
        "speculative decoding is enabled by speculation, assistant_model or prompt_lookup_num_tokens",
    ),
    "use_mtp": ((False,), "no supported model has multi-token prediction"),
    "cache_implementation": (
        ("dynamic", "static", "quantized"),
        "the caches here are 'dynamic', 'static' and 'quantized'",
    ),
    "compile_config": ((), "generate() does not call torch.compile: compile the model yourself"),
    "continuous_batching_config": ((), "continuous batching is not implemented"),
}
# The same for arguments of the call that are not fields.
UNSUPPORTED_ARGUMENTS: Unsupported = {
    "assistant_tokenizer": ((), "an assistant with another tokenizer is not implemented"),
    "custom_generate": ((), "remote code is never run"),
    "trust_remote_code": ((False,), "remote code is never run"),
    "synced_gpus": ((False,), "generation across sharded processes is not implemented"),
}


# A condition in words, and whether a resolved config meets it.
Condition = tuple[str, Callable[[GenerationConfig], Any]]

_SAMPLES: Condition = ("do_sample=True", lambda c: c.do_sample)
_BEAMS: Condition = ("num_beams > 1", lambda c: (c.num_beams or 1) > 1)
_LOOKUP: Condition = ("prompt_lookup_num_tokens", lambda c: c.prompt_lookup_num_tokens)
_ASSISTED: Condition = ("assistant_model", lambda _: False)  # an argument of the call
_AS_DICT: Condition = ("return_dict_in_generate=True", lambda c: c.return_dict_in_generate)
_STATIC: Condition = ("cache_implementation='static'", lambda c: c.cache_implementation == "static")
_QUANTIZED: Condition = ("cache_implementation='quantized'", lambda c: c.cache_implementation == "quantized")

# Fields that have an effect only together with another one, and their values without effect.
NEEDS: dict[str, tuple[Condition, tuple[Any, ...]]] = {
    **dict.fromkeys(SAMPLING_FIELDS, (_SAMPLES, (1.0, 0.0))),
    "top_k": (_SAMPLES, (50, 0)),
    "length_penalty": (_BEAMS, (1.0,)),
    "early_stopping": (_BEAMS, (False,)),
    "num_assistant_tokens": (_ASSISTED, (20,)),
    "num_assistant_tokens_schedule": (_ASSISTED, ("constant",)),
    "assistant_confidence_threshold": (_ASSISTED, (0.4,)),
    "max_matching_ngram_size": (_LOOKUP, ()),
    "max_cache_len": (_STATIC, ()),
    "cache_config": (_QUANTIZED, ({},)),
    **dict.fromkeys(
        ("output_scores", "output_logits", "output_attentions", "output_hidden_states"), (_AS_DICT, (False,))
    ),
}
# Two fields of one meaning; a source that sets one overrides either of them in sources of lower priority.
TWINS = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))


def resolve(
    arguments: Mapping[str, Any],
    passed: GenerationConfig | None,
    model: GenerationConfig | None,
    *,
    assisted: bool = False,
    unsupported: Unsupported | None = None,
) -> GenerationConfig:
    """The validated config of one call, with the defaults filled in.

    `arguments`: keywords of the call that are fields; `passed`: its `generation_config`; `model`: the model's own
    config; `assisted`: whether the call has an assistant_model; `unsupported`: the backend's own entries. A keyword
    that is None unsets its field, as in transformers. Lengths stay as they were set: see `new_tokens`.
    UnsupportedConfig (a ValueError) for a field that is not supported; ValueError for a value out of range.
    """
    given = [arguments, passed.set_fields() if passed else {}, model.set_fields() if model else {}]
    sources = [{name: plain(name, value) for name, value in fields.items()} for fields in given]
    arguments = sources[0]
    values: dict[str, Any] = {}
    for source in sources:
        settled = set(values)
        for pair in TWINS:
            if any(values.get(name) is not None for name in pair):
                settled |= set(pair)
        values |= {name: value for name, value in source.items() if name not in settled}
    # A model's file does not disable the cache: published files do so for models whose implementation had none.
    own = (passed.own_fields() if passed else {}) | {n: v for n, v in arguments.items() if v is not None}
    values["use_cache"] = own.get("use_cache", True)
    config = GenerationConfig()
    for name, value in (DEFAULTS | values).items():
        setattr(config, name, copy.copy(value))
    refuse_unsupported(config.set_fields(), UNSUPPORTED, unsupported, "GenerationConfig.")
    config.validate()
    _check_chunks(config)
    _warn_of_no_effect(config, own, assisted)
    return config


def _check_chunks(config: GenerationConfig) -> None:
    """ValueError where the prompt cannot be processed in chunks."""
    if (chunk := config.prefill_chunk_size) is None:
        return
    names = ("output_attentions", "output_hidden_states")
    asked = [f"{name}=True" for name in names if config.return_dict_in_generate and getattr(config, name)]
    if asked or not config.use_cache:
        raise ValueError(
            f"prefill_chunk_size={chunk} cannot be combined with {asked[0] if asked else 'use_cache=False'}: leave out "
            "one of them"
        )


def refuse_unsupported(
    given: Mapping[str, Any], table: Unsupported, own: Unsupported | None = None, prefix: str = ""
) -> None:
    """UnsupportedConfig for the first value that the table does not allow. `own`: entries of a backend, which override
    the table's."""
    for name, row in table.items():
        allowed, reason = (own or {}).get(name, row)
        value = given.get(name)
        if value is not None and not any(value is supported or value == supported for supported in allowed):
            raise UnsupportedConfig(f"{prefix}{name}={brief(value)}: {reason}")


def _warn_of_no_effect(config: GenerationConfig, own: Mapping[str, Any], assisted: bool) -> None:
    for name in own.keys() & NEEDS.keys():
        needed, harmless = NEEDS[name]
        condition, holds = needed
        if own[name] not in harmless and not (holds(config) or (assisted and needed is _ASSISTED)):
            log.warning("%s=%r has no effect without %s", name, own[name], condition)
    for total, new in TWINS:
        if total in own and new in own and own[total] != DEFAULTS.get(total):
            log.warning("both %s and %s are set: %s=%r decides", total, new, new, own[new])


def new_tokens(config: GenerationConfig, prompt_length: int, max_positions: int | None = None) -> int:
    """The number of tokens to generate after a prompt of that length, by default no more than fit `max_positions`.

    ValueError if the prompt is too long.
    """
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    if config.max_length is not None:
        if prompt_length >= config.max_length:
            raise ValueError(
                f"the prompt has {prompt_length} tokens and max_length={config.max_length} counts them too: "
                "nothing could be generated; raise max_length, or set max_new_tokens"
            )
        return config.max_length - prompt_length
    log.warning(
        "no length was set: at most %d new tokens are generated; set max_new_tokens", DEFAULT_NEW_TOKENS
    )
    room = DEFAULT_NEW_TOKENS if max_positions is None else max_positions - prompt_length
    return max(1, min(DEFAULT_NEW_TOKENS, room))


def refuse_unknown(names: Collection[str], known: Collection[str]) -> None:
    """ValueError for the first unknown name, with the closest known one."""
    for name in names:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else "it is neither a field of GenerationConfig nor a model input"
        )
        raise ValueError(f"generate() got an unknown argument {name!r}: {hint}")
