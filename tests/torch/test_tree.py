"""Parameter names and shapes of MPT models: transformers' and canonical ones; documented signatures."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from helpers import CLASSES, KIND, model
from helpers import canonical as canonical_of

import monoblock
from monoblock import tree
from monoblock.families import family

GROUPED = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "untied": ({}, {"tie_word_embeddings": False}),
    "biases": ({"qk_ln": True}, {"no_bias": False}),
    "grouped, gated": ({**GROUPED, "qk_gn": True}, {"ffn_config": {"ffn_type": "mptglu"}, "head_dim": 10}),
    "learned": ({"alibi": False}, {"norm_type": "rmsnorm"}),
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("name", CLASSES)
def test_names_and_shapes(name: str, case: str) -> None:
    attn, fields = CONFIGS[case]
    module = model(name, attn, **fields, num_labels=5)
    head = module.config.to_head(KIND[name]) if KIND[name] else None
    canonical = tree.parameters(module.spec, head)
    own = {path: tuple(p.shape) for path, p in module.named_parameters()}
    assert set(module.parameter_names()) == own.keys()
    assert {n: t.shape for n, t in canonical_of(module).items()} == canonical
    assert {name: tuple(t.shape) for name, t in module.hub_state_dict().items()} == own
    assert list(module.hub_state_dict()) == [n for c in canonical for n in module.keymap().source(c).names]


# The documented forward signatures; every default is None except that of logits_to_keep. Arguments that only the newer
# page has come last.
IN = "input_ids past_key_values attention_mask inputs_embeds"
OUT = "use_cache output_attentions output_hidden_states return_dict"
DOCUMENTED = {
    "MptModel": f"{IN} {OUT} cache_position",
    "MptForCausalLM": f"{IN} labels {OUT} cache_position logits_to_keep",
    "MptForSequenceClassification": f"{IN} labels {OUT}",
    "MptForTokenClassification": f"{IN} labels {OUT}",
    "MptForQuestionAnswering": "input_ids attention_mask inputs_embeds start_positions end_positions "
    "output_attentions output_hidden_states return_dict",
}


@pytest.mark.parametrize("name", CLASSES)
def test_documented_signatures(name: str) -> None:
    made = getattr(monoblock, name)
    parameters = list(inspect.signature(made.forward).parameters.values())
    assert [p.name for p in parameters] == ["self", *DOCUMENTED[name].split(), "kwargs"]
    for p in parameters[1:-1]:
        assert p.default == (0 if p.name == "logits_to_keep" else None)
        assert p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert list(inspect.signature(made).parameters) == ["config"]
    assert made.config_class is monoblock.MptConfig
    assert made.base_model_prefix == "transformer"
    assert made.__name__ == name
    assert name in made.__doc__


def test_every_documented_class() -> None:
    assert {c.name for c in family("mpt").classes} == set(CLASSES) == DOCUMENTED.keys()
