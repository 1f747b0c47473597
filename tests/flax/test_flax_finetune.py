"""examples/finetune_flax.py: it learns, and training resumed from a checkpoint is bitwise equal."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import typer
from flax_tiny import VOCAB, tiny

import monoblock

ROOT = Path(__file__).parents[2]


def example() -> Any:
    """examples/finetune_flax.py as a module."""
    spec = importlib.util.spec_from_file_location("finetune_flax", ROOT / "examples" / "finetune_flax.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["finetune_flax"] = module
    spec.loader.exec_module(module)
    return module


finetune = example()
finetune.make_step = functools.cache(finetune.make_step)  # compiled once for all runs of a model
STEPS = 5
OPTIMIZER = finetune.make_optimizer(1e-2, STEPS)


def data() -> Any:
    """Sequences whose first token determines the label."""
    generator = np.random.default_rng(0)
    ids = generator.integers(10, VOCAB, (40, 8), np.int32)
    labels = generator.integers(0, 2, 40, np.int32)
    ids[:, 0] = 10 + labels
    return finetune.Data(ids, np.ones_like(ids), labels, ["no", "yes"])


def model() -> Any:
    return tiny("FlaxMptForSequenceClassification", num_labels=2, resid_pdrop=0.2, emb_pdrop=0.2)


def initial_state(made: Any, mesh: Any) -> Any:
    params = jax.tree.map(jax.numpy.copy, made.params)  # training donates them
    return finetune.make_state(made, params, OPTIMIZER, mesh, seed=3)


def trained(made: Any, state: Any, mesh: Any, until: int) -> tuple[Any, list[float]]:
    losses: list[float] = []
    given = finetune.batches(data(), 8, 3, int(state.step))
    after = lambda _, loss: losses.append(loss)  # noqa: E731
    return finetune.train(made, state, given, mesh, until, after), losses


def assert_same(one: Any, other: Any) -> None:
    """All arrays of two states: parameters, moments, counts and key."""
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), one, other)


def test_training_resumed_from_a_checkpoint_is_bitwise_equal(tmp_path: Path) -> None:
    made, mesh = model(), finetune.make_mesh()
    whole, losses = trained(made, initial_state(made, mesh), mesh, STEPS)
    half, first = trained(made, initial_state(made, mesh), mesh, 2)
    states = finetune.open_states(tmp_path / "run")
    finetune.save(states, half)
    states.close()
    states = finetune.open_states(tmp_path / "run")
    again = finetune.restored(states, initial_state(made, mesh))
    states.close()
    assert int(again.step) == 2
    assert_same(again, half)
    ended, second = trained(made, again, mesh, STEPS)
    assert first + second == losses
    assert len(set(losses)) == STEPS
    assert_same(ended, whole)


def test_without_a_checkpoint_training_starts_from_the_given_state(tmp_path: Path) -> None:
    made, mesh = model(), finetune.make_mesh()
    states, state = finetune.open_states(tmp_path / "run"), initial_state(made, mesh)
    assert finetune.restored(states, state) is state
    states.close()


def test_batches_are_determined_by_seed_and_step() -> None:
    some, later = finetune.batches(data(), 8, 1), finetune.batches(data(), 8, 1, first=6)
    skipped = [next(some) for _ in range(7)][6]
    np.testing.assert_array_equal(skipped["input_ids"], next(later)["input_ids"])
    epoch = [next(finetune.batches(data(), 8, 1, first=i))["input_ids"] for i in range(5)]
    assert len(np.unique(np.concatenate(epoch), axis=0)) == 40  # every sequence once
    with pytest.raises(typer.BadParameter, match="40 examples are fewer than a batch of 64"):
        next(finetune.batches(data(), 64, 1))


def test_the_command_trains_and_saves_a_checkpoint(tmp_path: Path) -> None:
    """The command with a JSONL file and the embedded model, for a few steps."""
    words = {"number": ["1", "22", "3.5", "404"], "name": ["alpha", "beta", "value", "result"]}
    lines = [
        json.dumps({"text": f"{left} = {right}", "label": label})
        for label, rights in words.items()
        for left in ("x", "y", "self.z", "count")
        for right in rights
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    finetune.main(
        data=tmp_path / "texts.jsonl",
        output=tmp_path / "out",
        state=tmp_path / "run",
        steps=12,
        batch_size=8,
        length=8,
        save_every=10,
    )
    model = monoblock.FlaxMptForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = monoblock.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "name", 1: "number"}
    kept = finetune.encoded([("total = 17", "number"), ("total = other", "name")], tokenizer, 8)
    assert finetune.accuracy(model, model.params, kept, 2) == 1.0
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["10", "12"]


def test_a_line_without_a_label_raises(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a", "label": "b"}\n{"text": "a"}\n')
    with pytest.raises(typer.BadParameter, match=r"texts.jsonl:2: a line must have a text and a label"):
        finetune.read(file)


def test_config_fields_of_the_command_line() -> None:
    assert finetune.fields(["a=0.5", "b=x"], embedded=False) == {"a": 0.5, "b": "x"}
    assert finetune.fields(None, embedded=True) == {"resid_pdrop": 0.1, "emb_pdrop": 0.1}
    with pytest.raises(typer.BadParameter, match="--set takes FIELD=VALUE, got 'a'"):
        finetune.fields(["a"], embedded=False)
