"""Signatures, outputs and examples on transformers' pages of the Flax classes, where copies of the pages lie next to
the repository; test_flax_examples.py runs the examples."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_tiny import batch, tiny
from test_flax_examples import BODY, CAUSAL

import monoblock

CLASSES = ("FlaxMistralModel", "FlaxMistralForCausalLM", "FlaxGPTNeoModel", "FlaxGPTNeoForCausalLM")
# Spelling of defaults on the pages -> value.
VALUES = {
    "None": None,
    "False": False,
    "True": True,
    "0": 0,
    "(1, 1)": (1, 1),
    "<class 'jax.numpy.float32'>": jnp.float32,
}
# Class -> the documented output, and its fields beyond those of all outputs.
OUTPUTS = {
    "FlaxMistralModel": ("FlaxBaseModelOutputWithPast", {"last_hidden_state", "past_key_values"}),
    "FlaxMistralForCausalLM": (
        "FlaxCausalLMOutputWithCrossAttentions",
        {"logits", "cross_attentions", "past_key_values"},
    ),
    "FlaxGPTNeoModel": ("FlaxBaseModelOutput", {"last_hidden_state"}),
    "FlaxGPTNeoForCausalLM": ("FlaxMaskedLMOutput", {"logits"}),
}


@pytest.fixture(scope="module")
def pages(pytestconfig: pytest.Config) -> str:
    folder = pytestconfig.rootpath.parent / "shared/seeds"
    files = sorted([*folder.glob("002_*.txt"), *folder.glob("004_*.txt")])
    if not files:
        pytest.skip("no copies of the pages next to the repository")
    return "\n".join(Path(file).read_text(encoding="utf-8") for file in files)


def section(pages: str, name: str) -> str:
    """A page's section on a class."""
    start = re.search(rf"class transformers\.{name}\b", pages)
    assert start
    after = re.search(r"class transformers\.", pages[start.end() :])
    return pages[start.start() : start.end() + (after.start() if after else len(pages))]


def defaults(text: str, names: list[str]) -> dict[str, str | None]:
    """The defaults in a page's `( a: T b: T = 0 c = None )`, with types of any form, by these names in order."""
    following = [*(rf" {name}(?: =|: )" for name in names[1:]), "$"]
    found: dict[str, str | None] = {}
    for name, after in zip(names, following, strict=True):
        part = re.match(rf" ?{name}(.*?)(?={after})", text)
        assert part, f"{name} is missing in {text}"
        text = text[part.end() :]
        default = re.search(r"= (.*)$", part[1])
        found[name] = default[1] if default else None
    assert not text
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_signature_of_the_constructor(name: str, pages: str) -> None:
    text = re.search(r"\( (config: .*?) \*\*kwargs \)", section(pages, name))
    assert text
    _, *ours, last = inspect.signature(getattr(monoblock, name).__init__).parameters.values()
    assert last.kind is inspect.Parameter.VAR_KEYWORD
    documented = defaults(text[1], [argument.name for argument in ours])
    assert documented.pop("config") is None
    assert {n: VALUES[text or ""] for n, text in documented.items()} == {x.name: x.default for x in ours[1:]}


@pytest.mark.parametrize("name", CLASSES)
def test_signature_of_calls(name: str, pages: str) -> None:
    text = re.search(
        r"\( (input_ids attention_mask = None .*?return_dict: .*? = None) \) ", section(pages, name)
    )
    assert text
    ours = list(inspect.signature(getattr(monoblock, name).__call__).parameters.values())[1:11]
    documented = defaults(text[1], [argument.name for argument in ours])
    assert documented.pop("input_ids") is None
    assert {n: VALUES[text or ""] for n, text in documented.items()} == {x.name: x.default for x in ours[1:]}


@pytest.mark.parametrize("name", CLASSES)
def test_output_class_and_fields(name: str, pages: str) -> None:
    """Also as a tuple; hidden states and attentions have the documented shapes."""
    kind, own = OUTPUTS[name]
    text = section(pages, name)
    assert re.search(rf"modeling_flax_outputs\.{kind}\b", text)
    assert all(re.search(rf"{field}`? \(", text) for field in own)
    model, inputs = tiny(name), batch()
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert isinstance(out, getattr(monoblock, kind))
    assert own | {"hidden_states", "attentions"} <= {field.name for field in fields(out)}
    assert [x.shape for x in out.hidden_states] == [(4, 14, 32)] * 3
    assert [x.shape for x in out.attentions] == [(4, 4, 14, 14)] * 2
    plain = model(**inputs, return_dict=False)
    assert isinstance(plain, tuple)
    # Attention weights come from a different kernel: measured 2e-6.
    np.testing.assert_allclose(plain[0], out[0], atol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_cache_as_documented(name: str) -> None:
    """`past_key_values` from `init_cache`, then from each output; with given masks and positions."""
    model, ids = tiny(name), batch(padded=False)["input_ids"]
    mask, past, chunks = np.ones((4, 14), np.int32), model.init_cache(4, 14), []
    for start, stop in ((0, 9), (9, 10), (10, 14)):
        positions = np.broadcast_to(np.arange(start, stop), (4, stop - start))
        out = model(ids[:, start:stop], attention_mask=mask, position_ids=positions, past_key_values=past)
        past = out.past_key_values
        chunks.append(out[0])
    # fp32, 2 layers, one pass against three chunks: measured 3e-6
    np.testing.assert_allclose(np.concatenate(chunks, 1), model(ids)[0], atol=1e-5)


def test_transformations_named_on_the_pages(pages: str) -> None:
    """test_flax_transforms.py tests compilation, differentiation, vectorisation and parallelisation."""
    for term in ("jit", "vmap", "pmap"):
        assert term in pages and callable(getattr(jax, term))


def test_every_example_of_the_pages_is_run(pages: str) -> None:
    lines = re.findall(r"^>>> (.*\bFlax\w+\b.*)$", pages, re.MULTILINE)
    assert len(set(lines)) == 8  # an import and a load of each class
    for line in lines:
        line = re.sub(r'"[^"]*"', '"EleutherAI/gpt-neo-1.3B"', re.sub(r"Flax\w+", "CLASS", line))
        assert f">>> {line}\n" in BODY + CAUSAL
