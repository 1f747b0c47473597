"""Checkpoints of transformers 4's Flax classes in the classes of the same names: outputs, tokens, and saved again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from v4_checkpoints import FLAX, FOLDER, atol, difference, inputs, outputs, prompt, record

import monoblock


def loaded(name: str, folder: Path = FOLDER, **kwargs: Any) -> Any:
    return getattr(monoblock, name).from_pretrained(folder / name, **kwargs)


@pytest.mark.parametrize("name", FLAX)
def test_outputs(name: str) -> None:
    model = loaded(name)
    out = model(**inputs(name), output_hidden_states=True, output_attentions=True)
    found = outputs(name)
    assert {field for field, _ in found} >= {"hidden_states", "attentions"}
    for (field, layer), wanted in found.items():
        got = out[field] if layer is None else out[field][layer]
        assert difference(name, field, np.asarray(got), wanted) <= atol(name, model.spec), (field, layer)


@pytest.mark.parametrize("name", [name for name in FLAX if "gen.input_ids" in record(name)])
def test_tokens(name: str) -> None:
    ids, sequences = prompt(name) or (None, None)
    found = loaded(name).generate(ids, max_new_tokens=12, do_sample=False)
    np.testing.assert_array_equal(np.asarray(found.sequences), sequences)


@pytest.mark.parametrize("name", FLAX)
@pytest.mark.parametrize("safe", [True, False])
def test_saved_again(name: str, safe: bool, tmp_path: Path) -> None:
    """As safetensors or msgpack, the parameters are bitwise equal."""
    model = loaded(name)
    model.save_pretrained(tmp_path / name, safe_serialization=safe)
    assert (tmp_path / name / ("model.safetensors" if safe else "flax_model.msgpack")).is_file()
    again = loaded(name, tmp_path)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model.params, again.params))
