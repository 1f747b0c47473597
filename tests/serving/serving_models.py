"""Small random models with a byte-level tokenizer, and engines on them, for the tests of serving."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from helpers import randomised
from text_tokenizers import byte_level
from tiny_families import MODEL_TYPES, fields

import monoblock
from monoblock.families import family_of
from monoblock.serving.engine.engine import Engine
from monoblock.serving.engine.loading import make_engine
from monoblock.serving.engine.options import EngineOptions
from monoblock.serving.engine.params import SamplingParams
from monoblock.serving.engine.results import Completion, Delta

CLASSES = (
    "MptForCausalLM",
    "MistralForCausalLM",
    "GPTNeoForCausalLM",
    "OpenAIGPTLMHeadModel",
    "FuyuForCausalLM",
)
LENGTH = 256  # positions: several times each window, four blocks
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")


@functools.cache
def tokenizer() -> Any:
    """Every byte is a token; some words are; the last is <eos>."""
    return monoblock.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(" the", "ing", " of", '": "', "true"),
        eos_token="<eos>",
        pad_token="<eos>",
    )


@functools.cache
def model(name: str, dtype: str = "float32", seed: int = 0) -> Any:
    """A model whose scores are spread widely, so that its choices are clear."""
    own = fields(MODEL_TYPES[name])
    own |= {key: LENGTH for key in _LENGTHS if key in own}
    eos = tokenizer().eos_token_id
    own |= {"vocab_size": len(tokenizer()), "eos_token_id": eos, "pad_token_id": eos, "bos_token_id": eos}
    config = family_of(name).config(**{key: value for key, value in own.items() if key != "num_labels"})
    made = randomised(getattr(monoblock, name)(config).eval(), seed=seed, std=0.3)
    return made.to(getattr(torch, dtype))


def engine(name: str, dtype: str = "float32", *, blocks: int | None = None, **options: Any) -> Engine:
    """An engine with `blocks` blocks of cache."""
    found = model(name, dtype)
    memory = 1 << 25
    if blocks is not None:
        from monoblock.backends.pytorch.engine_adapter import block_bytes

        memory = blocks * block_bytes(found.spec, found.dtype.itemsize)
    return make_engine(found, tokenizer(), name=name, options=EngineOptions(cache_memory=memory, **options))


class Answer:
    """Collects the deltas of a request."""

    def __init__(self, params: SamplingParams) -> None:
        self.completions = [Completion(index) for index in range(params.sequences)]
        self.deltas: list[Delta] = []

    def __call__(self, delta: Delta) -> None:
        self.deltas.append(delta)
        self.completions[delta.index].add(delta)

    @property
    def result(self) -> list[tuple[list[int], str, Any, Any]]:
        return [(one.tokens, one.text, one.finish, one.stop) for one in self.completions]


def run(core: Engine, prompt: list[int], params: SamplingParams) -> Answer:
    """A request alone, to its end."""
    answer = Answer(params)
    request = core.add(prompt, params, sink=answer)
    while core.step():
        pass
    assert request.done
    if request.error is not None:
        raise request.error
    return answer


def prompt_of(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(0, len(tokenizer()) - 1, length).tolist()


def together(core: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
    """The results of requests that are computed at once, of which some begin later."""
    answers = [Answer(one) for one in params]
    for prompt, one, answer in zip(prompts, params, answers, strict=True):
        core.add(prompt, one, sink=answer)
        core.step()
    while core.step():
        pass
    return [answer.result for answer in answers]
