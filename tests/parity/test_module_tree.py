"""The module tree equals transformers': names, classes, shapes, ties and the order of calls, for all 26 classes."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import monoblock
from monoblock.families import FAMILIES, class_names, family

SIZES: dict[str, dict[str, Any]] = {
    "mpt": {"d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 32},
    "mistral": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "fuyu": {
        "text_config": {
            "model_type": "persimmon",
            "vocab_size": 40,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "patch_size": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "openai-gpt": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "num_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "window_size": 4,
    },
    "mpnet": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
    },
}
CLASSES = {name: kind for kind in FAMILIES for name in class_names(kind)}
assert len(CLASSES) == 26


def theirs_of(name: str) -> Any:
    torch.manual_seed(0)
    made = getattr(transformers, name)
    pad = 1 if CLASSES[name] == "mpnet" else 0  # transformers has MPNet's pad id hard-coded
    return made(made.config_class(vocab_size=40, pad_token_id=pad, **SIZES[CLASSES[name]])).eval()


def pair(name: str) -> tuple[Any, Any]:
    """transformers' model and ours, from its config object and state dict."""
    theirs = theirs_of(name)
    ours = getattr(monoblock, name)(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tied(module: nn.Module) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = defaultdict(set)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups[id(parameter)].add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def shared(name: str, path: str) -> bool:
    """All blocks of transformers' GPT-1 share one activation module, which is listed in the first block only."""
    return name.startswith("OpenAIGPT") and path.endswith("mlp.act")


def batch(name: str) -> torch.Tensor:
    ids = torch.arange(3, 21).view(2, 9)
    return ids[:, None] if family(CLASSES[name]).model_class(name).head in ("choice", "double") else ids


def calls(module: nn.Module, ids: torch.Tensor) -> tuple[list[str], Any]:
    """The names of the modules in the order in which their calls return, and the output."""
    order: list[str] = []
    hooks = [
        part.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, part in module.named_modules()
    ]
    with torch.no_grad():
        out = module(ids)
    for hook in hooks:
        hook.remove()
    return order, out


@pytest.mark.parametrize("name", CLASSES)
def test_names_classes_shapes_and_ties(name: str) -> None:
    theirs, ours = pair(name)
    kinds = [
        [(path, type(part).__name__) for path, part in module.named_modules() if not shared(name, path)]
        for module in (theirs, ours)
    ]
    assert kinds[1] == kinds[0]
    states = [[(key, tuple(x.shape)) for key, x in module.state_dict().items()] for module in (theirs, ours)]
    assert states[1] == states[0]
    # The state of an optimizer is stored in this order.
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert tied(ours) == tied(theirs)
    assert (ours._tied_weights_keys or {}).keys() == (
        theirs._tied_weights_keys or {}
    ).keys() or name.startswith(
        "OpenAIGPT"  # transformers lists the other name of the pair
    )
    assert all(torch.equal(x, theirs.state_dict()[key]) for key, x in ours.state_dict().items())
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", CLASSES)
def test_hooks_are_called_in_the_same_order(name: str) -> None:
    theirs, ours = pair(name)
    ids = batch(name)
    (expected, there), (found, here) = calls(theirs, ids), calls(ours, ids)
    # Dropout of attention weights happens inside the fused kernels, as in transformers'.
    skipped = (".attn_dropout", ".attn.dropout", ".attention_dropout")
    wanted = [path for path in expected if not path.endswith(skipped)]
    assert [p for p in found if not shared(name, p)] == [p for p in wanted if not shared(name, p)]
    plain = ours(ids)
    for key, value in there.items():
        if torch.is_tensor(value):
            # fp32, two layers of 16 channels: a few ulp of values below 4.
            torch.testing.assert_close(here[key], value, atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(plain[key], value, atol=2e-6, rtol=1e-5)


GROUPS = {
    "mistral": [("q", "k", "v"), ("gate", "up")],
    "gpt_neo": [("q", "k", "v")],
    "mpnet": [("q", "k", "v")],
}
JOINT = {kind: next(name for name in CLASSES if CLASSES[name] == kind) for kind in GROUPS}


def joint(model: Any, kind: str) -> bool:
    parts = [model.at("attention", 1), model.at("mlp", 1) if ("gate", "up") in GROUPS[kind] else None]
    return all(part.fused(group) is not None for part, group in zip(parts, GROUPS[kind], strict=False))


@pytest.mark.parametrize("kind", GROUPS)
def test_matrices_are_adjacent_in_memory(kind: str) -> None:
    """After copies, casts and moves; each with a separate storage, so that tools do not treat them as one tensor."""
    theirs, ours = pair(JOINT[kind])
    assert joint(ours, kind)
    storages = [ours.at(role, 1).weight.untyped_storage().data_ptr() for role in GROUPS[kind][0]]
    assert len(set(storages)) == 3
    moved = copy.deepcopy(ours).to(torch.bfloat16)
    assert joint(moved, kind) and joint(moved.float(), kind)
    assert joint(pickle.loads(pickle.dumps(ours)), kind)
    other = getattr(monoblock, JOINT[kind])(theirs.config)
    other.load_state_dict(theirs.state_dict(), assign=True)
    assert joint(other, kind)
    empty = ours.to("meta").to_empty(device="cpu")
    assert joint(empty, kind)


@pytest.mark.parametrize("kind", GROUPS)
@torch.no_grad()
def test_changes_to_modules_take_effect(kind: str) -> None:
    """A replaced module, a hook, an overridden forward, a reassigned parameter: each changes the output."""
    _, ours = pair(JOINT[kind])
    ids = batch(JOINT[kind])
    before = ours(ids)[0].clone()
    owner = ours.at("attention", 1)
    first = owner.role("k")
    hook = first.register_forward_hook(lambda _, __, out: out * 0)
    silenced = ours(ids)[0].clone()
    assert not torch.equal(silenced, before)
    hook.remove()
    assert torch.equal(ours(ids)[0], before)
    first.forward = lambda x: nn.functional.linear(x, first.weight, first.bias) * 0
    torch.testing.assert_close(ours(ids)[0], silenced, atol=1e-5, rtol=0)
    del first.forward
    first.weight.data = first.weight.data * 0
    if first.bias is not None:
        first.bias.data = first.bias.data * 0
    torch.testing.assert_close(ours(ids)[0], silenced, atol=1e-5, rtol=0)
    setattr(owner, owner.roles["k"], nn.Identity())
    if owner.sizes[0] == owner.sizes[1]:
        assert not torch.equal(ours(ids)[0], silenced)


@pytest.mark.parametrize("kind", GROUPS)
def test_gradients_of_joint_products(kind: str) -> None:
    """First and second derivatives of each matrix equal those of separate products."""
    _, ours = pair(JOINT[kind])
    ours = ours.double()
    ours.set_attn_implementation("eager")  # the fused kernels have no second derivative
    other = copy.deepcopy(ours)
    for part in other.modules():
        if hasattr(part, "fused_tensors"):
            part.fused_tensors = {}
    ids = batch(JOINT[kind])
    results = []
    for model in (ours, other):
        out = model(ids)[0]
        weights = [model.at(role, 1).weight for role in GROUPS[kind][0]]
        # Cubes: the sum of squares after a norm is constant, so its gradient would be rounding error alone.
        grads = torch.autograd.grad(out.pow(3).sum(), weights, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), weights)
        results.append([*grads, *second])
    for one, two in zip(*results, strict=True):
        assert two.abs().max() > 0
        # float64; sums of at most a few thousand terms.
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10 * float(two.detach().abs().max()))


def test_models_are_instances_of_transformers_classes() -> None:
    _, ours = pair("MistralForCausalLM")
    assert isinstance(ours, transformers.PreTrainedModel)
    assert type(ours) is monoblock.MistralForCausalLM
    assert type(ours.__class__(ours.config)) is monoblock.MistralForCausalLM
    assert type(copy.deepcopy(ours)) is type(pickle.loads(pickle.dumps(ours))) is monoblock.MistralForCausalLM
    gpt = pair("OpenAIGPTLMHeadModel")[1]
    conv = gpt.transformer.h[0].attn.c_attn
    assert isinstance(conv, transformers.pytorch_utils.Conv1D)
    assert not isinstance(conv, nn.Linear)
