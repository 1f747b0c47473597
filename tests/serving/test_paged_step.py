"""The native step over a paged cache (engine_adapter.py): logits against tests/oracle.py and the modules, for every
option, family and weight format; and that a token's scores have the same bits whatever shares the step."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import expected, expected_logits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measure import assert_close
from mpt_cases import CASES, mpt_model
from tiny_families import FAMILY_NAMES, GENERATING, MODEL_TYPES, VOCAB, fields, monoblock_model

import monoblock
from monoblock import native
from monoblock.backends.pytorch.engine_adapter import ModuleRunner, NativeRunner, runner
from monoblock.generation.batches import BLOCK, SequenceChunk
from monoblock.serving.engine.blocks import blocks_for

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no native kernels: {native.status()}")

ATOL = 1e-5  # float32, up to 3 layers, logits of about 5: measured 5e-6
MEMORY = 1 << 25
OTHERS = 12
CLASSES = (*GENERATING, "MptForCausalLM")
FORMATS = ("float32", "bfloat16", "int8", "int4", "lossless")
_tables = itertools.count()


@pytest.fixture
def kernels(level: str) -> str:
    """Each instruction set."""
    if level == "0":
        pytest.skip("without native kernels")
    return level


def native_runner(model: Any) -> NativeRunner:
    found = runner(model, MEMORY)
    assert isinstance(found, NativeRunner), found.why
    return found


def table_of(steps: NativeRunner, tokens: int) -> list[int]:
    """Blocks in no order, as an engine has them; the last OTHERS blocks are those of other sequences."""
    count, start = blocks_for(tokens), 7 * next(_tables)
    return [(start + 5 * i) % (steps.blocks - OTHERS) for i in range(count)]


def ids_of(length: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    return np.random.default_rng(seed).integers(10, vocab, length).tolist()


def logits(steps: NativeRunner, ids: list[int]) -> torch.Tensor:
    """(tokens, vocabulary), in one chunk, alone."""
    table = table_of(steps, len(ids))
    return steps.run([SequenceChunk(key=0, tokens=ids, past=0, table=table, wanted=len(ids))])


# ---------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("case", [case for case in CASES if case != "rope, dynamic"])
def test_every_option(case: str) -> None:
    model = mpt_model(case)
    ids = ids_of(23)
    found = logits(native_runner(model), ids)
    run = expected(model, np.array([ids]))
    assert_close(f"paged, {case}", found[None].numpy(), expected_logits(model, run), ATOL)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.usefixtures("kernels")
def test_every_class(name: str) -> None:
    model = monoblock_model(name, **fields(MODEL_TYPES[name]))
    ids = ids_of(23)
    run = expected(model, np.array([ids]))
    found = logits(native_runner(model), ids)
    assert_close(f"paged, {name}", found[None].numpy(), expected_logits(model, run), ATOL)


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_several_blocks(name: str) -> None:
    """Longer than a block and than any window; many rows of inputs."""
    length = 3 * BLOCK + 19
    longer = dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), length)
    own = fields(MODEL_TYPES[name])
    model = monoblock_model(name, **{**own, **{key: v for key, v in longer.items() if key in own}})
    ids = ids_of(length)
    wanted = model(input_ids=torch.tensor([ids])).logits[0]
    # Two float32 computations of sums of up to 211 terms.
    assert_close(f"paged, long, {name}", logits(native_runner(model), ids), wanted, 2 * ATOL)


def test_dynamic_rope_uses_the_modules() -> None:
    """Its cached keys would have to be rotated again; below the original length it has no effect."""
    model = mpt_model("rope, dynamic")
    found = runner(model, MEMORY)
    assert isinstance(found, ModuleRunner)
    assert found.why is not None and "max_model_len to at most 8" in found.why
    assert isinstance(runner(model, MEMORY, 8), NativeRunner)


def test_ids_outside_of_the_vocabulary_are_refused() -> None:
    steps = native_runner(monoblock_model("MistralForCausalLM", **fields("mistral")))
    with pytest.raises(ValueError, match="outside of its table"):
        steps.run([SequenceChunk(key=0, tokens=[VOCAB], past=0, table=[0], wanted=1)])
    with pytest.raises(ValueError, match="outside of its table"):
        steps.run([SequenceChunk(key=0, tokens=[10], past=0, table=[steps.blocks], wanted=1)])


# ---------------------------------------------------------------------------- independence


def in_format(kind: str, folder: Path) -> Any:
    """A Mistral whose weights are in that format."""
    own = {**fields("mistral"), "hidden_size": 256, "intermediate_size": 336, "max_position_embeddings": 300}
    model = monoblock_model("MistralForCausalLM", **own)
    if kind in ("float32", "bfloat16"):
        return model.to(getattr(torch, kind))
    model.save_pretrained(folder)
    dtype = torch.bfloat16 if kind == "lossless" else torch.float32
    return monoblock.MistralForCausalLM.from_pretrained(folder, quantization_config=kind, dtype=dtype)


def divided(steps: NativeRunner, ids: list[int], sizes: list[int], seed: int) -> torch.Tensor:
    """The logits of a sequence in chunks of these sizes, each computed beside other sequences."""
    rng = np.random.default_rng(seed)
    table, found, past = table_of(steps, len(ids)), list[torch.Tensor](), 0
    for size in sizes:
        tokens = ids[past : past + size]
        own = SequenceChunk(key=0, tokens=tokens, past=past, table=table, wanted=len(tokens))
        others: list[SequenceChunk] = []
        for key in range(int(rng.integers(0, OTHERS))):
            length = int(rng.integers(1, 20))
            blocks = [steps.blocks - 1 - key]  # far from the sequence's own
            others.append(
                SequenceChunk(key=1 + key, tokens=ids_of(length, seed + key), past=0, table=blocks, wanted=1)
            )
        at = int(rng.integers(0, len(others) + 1))
        scores = steps.run([*others[:at], own, *others[at:]])
        found.append(scores[at : at + len(tokens)])
        past += size
    return torch.cat(found)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.usefixtures("kernels")
def test_scores_do_not_depend_on_what_shares_the_step(kind: str, tmp_path: Path) -> None:
    """In every weight format and instruction set, to the bit: other sequences, chunks of any sizes."""
    model = in_format(kind, tmp_path)
    steps = runner(model, MEMORY)
    assert isinstance(steps, NativeRunner), steps.why
    ids = ids_of(2 * BLOCK + 11)
    alone = logits(steps, ids)
    assert alone.isfinite().all()
    for seed, sizes in enumerate(
        [[1] * 30 + [len(ids) - 30], [70, 1, 1, len(ids) - 72], [5, 9, len(ids) - 14]]
    ):
        assert torch.equal(divided(steps, ids, sizes, seed), alone), (kind, sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("kernels")
def test_matrices_of_any_size(dtype: torch.dtype) -> None:
    """Outputs that fill no vector, an odd number of inputs, and more than a packed block has."""
    own = {**fields("mistral"), "hidden_size": 72, "intermediate_size": 3211, "max_position_embeddings": 300}
    steps = runner(monoblock_model("MistralForCausalLM", **own).to(dtype), MEMORY)
    assert isinstance(steps, NativeRunner), steps.why
    ids = ids_of(93)
    alone = logits(steps, ids)
    for seed, sizes in enumerate([[1, 2, 3, 4, 7, 12, 13, 51], [33, 60], [32, 61]]):
        assert torch.equal(divided(steps, ids, sizes, seed), alone), sizes


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("name", CLASSES)
def test_any_chunks_give_the_same_bits(name: str, data: st.DataObject) -> None:
    """A property of every family: windows, ALiBi, learned positions, post-norm, q and k by head."""
    steps = _runner_of(name)
    length = data.draw(st.integers(1, 60))
    ids = ids_of(length, data.draw(st.integers(0, 9)))
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(data.draw(st.integers(1, length - sum(sizes))))
    assert torch.equal(divided(steps, ids, sizes, data.draw(st.integers(0, 99))), logits(steps, ids))


_RUNNERS: dict[str, NativeRunner] = {}


def _runner_of(name: str) -> NativeRunner:
    if name not in _RUNNERS:
        _RUNNERS[name] = native_runner(monoblock_model(name, **fields(MODEL_TYPES[name])))
    return _RUNNERS[name]


def test_every_family_is_here() -> None:
    assert {MODEL_TYPES[name] for name in CLASSES} == {*FAMILY_NAMES, "mpt"} - {"mpnet"}
