"""Key maps: operations are bijections, all spellings of names are found, missing and unexpected keys are reported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monoblock import MistralConfig, MptConfig, OpenAIGPTConfig, tree
from monoblock.checkpoint import quantized
from monoblock.checkpoint.keymap import (
    Interleaved,
    KeyMap,
    Op,
    PerHead,
    Same,
    Spelling,
    Split,
    SplitEach,
    Transposed,
    nearest,
    row,
)
from monoblock.checkpoint.matching import match_weights
from monoblock.errors import CheckpointError
from monoblock.families import FAMILIES, family

sizes = st.integers(1, 5)


@st.composite
def ops_and_tensors(draw: st.DrawFn) -> tuple[Op, np.ndarray]:
    """An op and a tensor of matching shape, a matrix or a bias, with distinct elements."""
    heads, half, columns = draw(sizes), draw(sizes), draw(st.none() | sizes)
    sizes_of_split = tuple(draw(st.lists(sizes, min_size=1, max_size=4)))
    op, rows = draw(
        st.sampled_from(
            [
                (Same(), heads),
                (Transposed(), heads),
                (Split(sizes_of_split), sum(sizes_of_split)),
                (PerHead(heads), 3 * heads * half),
                (Interleaved(heads), 2 * heads * half),
                (
                    SplitEach((2 * heads * half, heads), (Interleaved(heads), Same())),
                    2 * heads * half + heads,
                ),
            ]
        )
    )
    shape = (rows,) if columns is None else (rows, columns)
    return op, np.arange(np.prod(shape)).reshape(shape)


@settings(deadline=None)
@given(ops_and_tensors())
def test_views_hold_every_element_once(case: tuple[Op, np.ndarray]) -> None:
    op, tensor = case
    views = op.views(tensor)
    assert sorted(x for view in views for x in view.ravel().tolist()) == tensor.ravel().tolist()
    assert all(np.shares_memory(view, tensor) for view in views), "a copy"


@settings(deadline=None)
@given(ops_and_tensors())
def test_loading_inverts_saving(case: tuple[Op, np.ndarray]) -> None:
    op, tensor = case
    stored = [view.copy() for view in op.views(tensor)]  # as written to a file
    loaded = np.full_like(tensor, -1)
    for view, from_file in zip(op.views(loaded), stored, strict=True):
        view[...] = from_file
    assert np.array_equal(loaded, tensor)


def test_per_head_interleaves_q_k_v_by_head() -> None:
    q, k, v = np.arange(4) + 10, np.arange(4) + 20, np.arange(4) + 30
    (stored,) = PerHead(2).views(np.concatenate((q, k, v)))
    assert stored.reshape(-1).tolist() == [10, 11, 20, 21, 30, 31, 12, 13, 22, 23, 32, 33]


def test_interleaved_pairs_neighbouring_channels() -> None:
    (stored,) = Interleaved(2).views(np.array([0, 2, 1, 3, 10, 12, 11, 13]))
    assert stored.reshape(-1).tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


# ---------------------------------------------------------------------------- MPT's key map

HEADS = (None, "causal", "sequence", "token", "span")
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"no_bias": False},
    "learned": {"attn_config": {"alibi": False}},
    "qk_ln": {"attn_config": {"qk_ln": True}, "no_bias": False},
    "grouped": {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "fused_qkv": False}},
    "gated": {"ffn_config": {"ffn_type": "mptglu"}},
}


def tiny_mpt(
    fields: dict[str, Any], head: str | None
) -> tuple[KeyMap, dict[str, tuple[int, ...]], dict[str, str]]:
    """The key map, the canonical parameters and the tied names of a tiny MPT."""
    config = MptConfig(d_model=24, n_heads=4, n_layers=2, vocab_size=50, num_labels=3, **fields)
    mpt = family("mpt")
    spec, kind = config.to_spec(), config.to_head(head) if head else None
    return mpt.keymap(config, head), tree.parameters(spec, kind), tree.tied(spec, kind)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", CONFIGS)
def test_written_names_are_read(case: str, head: str | None) -> None:
    keymap, parameters, tied = tiny_mpt(CONFIGS[case], head)
    keys = [name for canonical in parameters for name in keymap.source(canonical).names]
    assert len(set(keys)) == len(keys), "two parameters under one name"
    match = keymap.match(parameters, keys, tied)
    assert match.sources == {name: keymap.source(name) for name in parameters}
    assert not (match.missing or match.unread or match.unknown)


def test_transformers_names() -> None:
    keymap, parameters, _ = tiny_mpt({}, "causal")
    keys = [name for canonical in parameters for name in keymap.source(canonical).names]
    block = ["norm_1", "attn.Wqkv", "attn.out_proj", "norm_2", "ffn.up_proj", "ffn.down_proj"]
    blocks = [f"transformer.blocks.{i}.{name}.weight" for i in (0, 1) for name in block]
    assert keys == ["transformer.wte.weight", *blocks, "transformer.norm_f.weight"]
    bare, parameters, _ = tiny_mpt({}, None)
    assert bare.source("embed.weight").names == ("wte.weight",)
    for head, name in (("sequence", "score"), ("token", "classifier"), ("span", "qa_outputs")):
        assert tiny_mpt({}, head)[0].source("head.out.weight").names == (f"{name}.weight",)


def spelled(keymap: KeyMap, parameters: Any, prefix: str, separate: bool, fused: bool) -> set[str]:
    """The backbone's names in one of the spellings of published files."""
    names = set()
    for canonical in parameters:
        (name, *_) = (n.removeprefix("transformer.") for n in keymap.source(canonical).names)
        if separate and ".attn.qkv." in canonical:
            end = canonical.rpartition(".")[2]
            stem = name.partition("attn.")[0] + "attn."
            keys = [f"{stem}W{x}.{end}" for x in "qkv"]
        else:
            keys = list(keymap.source(canonical).names)
        for key in keys:
            key = key.removeprefix("transformer.")
            moved = (
                any(x in key for x in ("attn.", "norm_1", "norm_2")) and fused and key.startswith("blocks.")
            )
            if moved:
                head, _, rest = key[len("blocks.") :].partition(".")
                key = f"blocks.{head}.norm_attn_norm.{rest}"
            names.add(prefix + key)
    return names


@pytest.mark.parametrize("fused", [False, True], ids=["", "norm_attn_norm"])
@pytest.mark.parametrize("separate", [False, True], ids=["Wqkv", "Wq Wk Wv"])
@pytest.mark.parametrize("prefix", ["", "transformer.", "model.transformer."])
@pytest.mark.parametrize("case", ["plain", "qk_ln", "biases"])
def test_every_spelling_is_found(case: str, prefix: str, separate: bool, fused: bool) -> None:
    for head in (None, "causal"):
        keymap, parameters, tied = tiny_mpt(CONFIGS[case], head)
        keys = spelled(keymap, parameters, prefix, separate, fused)
        match = keymap.match(parameters, keys, tied)
        assert not (match.missing or match.unread or match.unknown)
        assert {name for source in match.sources.values() for name in source.names} == keys
        if separate:
            assert match.sources["blocks.0.attn.qkv.weight"].op == Split((24, 24, 24))


def test_missing_unread_and_unknown_keys() -> None:
    keymap, parameters, tied = tiny_mpt({}, "causal")
    keys = {name for canonical in parameters for name in keymap.source(canonical).names}
    keys -= {"transformer.blocks.1.attn.out_proj.weight"}
    keys |= {
        "transformer.blocks.2.norm_1.weight",  # a layer beyond the config
        "score.weight",  # another class's head
        "transformer.blocks.0.attn.Wqvk.weight",  # not a name of the family
        "lm_head.weight",  # tied to the embedding
        "transformer.blocks.0.attn.rotary_embedding.inv_freq",  # a buffer
    }
    match = keymap.match(parameters, keys, tied)
    assert match.missing == ["blocks.1.attn.out.weight"]
    assert match.unread == ["score.weight", "transformer.blocks.2.norm_1.weight"]
    assert match.unknown == ["transformer.blocks.0.attn.Wqvk.weight"]
    assert [keymap.is_head(key) for key in match.unread] == [True, False]


def test_an_untied_head_is_read() -> None:
    keymap, parameters, tied = tiny_mpt({"tie_word_embeddings": False}, "causal")
    assert "head.out.weight" in parameters
    match = keymap.match(parameters, ["lm_head.weight"], tied)
    assert match.sources.keys() == {"head.out.weight"}


def test_the_nearest_name() -> None:
    assert nearest("transformer.wte.weight", ["transformer.wte.wieght", "x"]) == "transformer.wte.wieght"
    assert nearest("transformer.wte.weight", ["x"]) is None


def test_a_parameter_without_a_row_raises_key_error() -> None:
    with pytest.raises(KeyError, match=r"no row for 'pooler\.weight'"):
        tiny_mpt({}, None)[0].source("pooler.weight")


def test_rows_of_names_and_spellings() -> None:
    made = row("embed.{p}", "wte.{p}", Spelling(("a.{p}", "b.{p}"), Split((1, 2))))
    assert made.spellings[0] == Spelling(("wte.{p}",), Same())
    assert made.spellings[1].names == ("a.{p}", "b.{p}")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_maps_its_parameters_to_distinct_names(model_type: str) -> None:
    found = family(model_type)
    config = found.config()
    for public in found.classes:
        keymap = found.keymap(config, public.head)
        parameters = tree.parameters(config.to_spec(), config.to_head(public.head) if public.head else None)
        keys = [name for canonical in parameters for name in keymap.source(canonical).names]
        assert len(set(keys)) == len(keys), public.name
        match = keymap.match(parameters, keys, ())
        assert not (match.missing or match.unread or match.unknown), public.name


def test_quantised_weights_are_refused_by_readers_of_plain_tensors() -> None:
    """Readers are the Flax and TF classes and `monoblock convert`."""

    class Files:
        def __iter__(self) -> Iterator[str]:
            return iter(
                ("norm.weight", "layers.0.mlp.up_proj.weight.codes", "layers.0.mlp.up_proj.weight.scale")
            )

        def path(self, name: str) -> Path:
            return Path("folder") / f"{len(name)}.safetensors"

        def dtype(self, name: str) -> str:
            return "U8" if name.endswith(".codes") else "F16"

    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight\.codes\), which only the PyTorch classes read"
    ):
        match_weights(Files(), family("mistral").keymap(MistralConfig(), None), {}, ())  # pyright: ignore
    assert list(quantized.plain(Files())) == ["norm.weight"]  # pyright: ignore
    assert list(quantized.component(Files(), "codes")) == ["layers.0.mlp.up_proj.weight"]  # pyright: ignore
    assert list(quantized.component(Files(), "low")) == []  # pyright: ignore


def test_quantised_matrices_are_not_transposed() -> None:
    keymap = quantized.by_rows(family("openai-gpt").keymap(OpenAIGPTConfig(), "causal"))
    assert {type(keymap.source(f"blocks.0.{name}.weight").op) for name in ("attn.qkv", "mlp.down")} == {Same}
