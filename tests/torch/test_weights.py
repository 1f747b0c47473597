"""The weights of a model in memory: state dicts by both naming schemes, copies, ties, embeddings, sizes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from helpers import batch, model, same

from monoblock import CheckpointError, MptForCausalLM, ShapeMismatch


def test_state_dicts_by_both_names() -> None:
    one, two = model(seed=1), model(seed=2)
    two.load_state_dict(one.hub_state_dict())
    assert same(one, two)
    three = model(seed=3)
    three.load_state_dict(one.state_dict())
    assert same(one, three)
    bare = model("MptModel", seed=4)
    bare.load_state_dict({name.removeprefix("transformer."): t for name, t in one.hub_state_dict().items()})
    assert same(one.bare, bare)
    with pytest.raises(CheckpointError, match=r"blocks\.7\.norm_1\.weight"):
        one.load_state_dict({**one.hub_state_dict(), "transformer.blocks.7.norm_1.weight": torch.zeros(36)})
    partial = one.hub_state_dict()
    del partial["transformer.norm_f.weight"]
    with pytest.raises(RuntimeError, match="norm_f"):
        two.load_state_dict(partial)
    assert two.load_state_dict(partial, strict=False).missing_keys == [
        "transformer.norm_f.weight",
        "lm_head.weight",
    ]
    wrong = {**one.hub_state_dict(), "transformer.norm_f.weight": torch.zeros(35)}
    with pytest.raises((ShapeMismatch, RuntimeError), match=r"35"):
        two.load_state_dict(wrong)


def test_hub_state_dict_shares_the_parameters_memory() -> None:
    made = model(attn={"attn_type": "multiquery_attention", "fused_qkv": False})
    state = made.hub_state_dict()
    assert state["transformer.blocks.0.attn.Wk.weight"].shape == (6, 36)
    pointers = {p.untyped_storage().data_ptr() for p in made.parameters()}
    assert {t.untyped_storage().data_ptr() for t in state.values()} == pointers
    assert not any(t.requires_grad for t in state.values())


def test_models_can_be_pickled_and_copied() -> None:
    made = model(attn={"clip_qkv": 0.7})
    ids, _ = batch("none")
    expected = made(ids).logits
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(again) is MptForCausalLM
        assert torch.equal(again(ids).logits, expected)
        assert again.at("head_out").weight is again.get_input_embeddings().weight
        assert again.config == made.config
        again.get_input_embeddings().weight.data.zero_()
    assert torch.equal(made(ids).logits, expected)


def test_saved_state_dict(tmp_path: Path) -> None:
    made, other = model(seed=1), model(seed=2)
    torch.save(made.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(made, other)
    assert other.at("head_out").weight is other.get_input_embeddings().weight


def test_ties_and_embeddings() -> None:
    made = model()
    assert made.get_output_embeddings().weight is made.get_input_embeddings().weight
    table = torch.nn.Embedding(89, 36)
    made.set_input_embeddings(table)
    assert made.get_input_embeddings() is table
    assert made.get_output_embeddings().weight is table.weight
    untied = model(tie_word_embeddings=False)
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight
    head = torch.nn.Linear(36, 89, bias=False)
    untied.set_output_embeddings(head)
    ids, _ = batch("none")
    assert torch.equal(untied(ids).logits, head(untied(ids, output_hidden_states=True).hidden_states[-1]))
    bare = model("MptModel")
    assert bare.get_output_embeddings() is None
    with pytest.raises(ValueError, match="MptModel has no projection to the vocabulary"):
        bare.set_output_embeddings(head)


def test_hooks_on_the_embedding() -> None:
    made = model()
    for p in made.parameters():
        p.requires_grad_(False)
    made.enable_input_require_grads()
    ids, _ = batch("none")
    assert made(ids).logits.requires_grad
    made.get_input_embeddings().register_forward_hook(lambda *_: torch.zeros(3, 23, 36))
    assert not made(ids, output_hidden_states=True).hidden_states[0].any()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_resizing_the_vocabulary(tied: bool, tmp_path: Path) -> None:
    made = model(tie_word_embeddings=tied)
    before = made.get_input_embeddings().weight.detach().clone()
    ids, _ = batch("none")
    logits = made(ids).logits
    table = made.resize_token_embeddings(95)
    assert table is made.get_input_embeddings()
    assert table.weight.shape == (95, 36)
    assert (
        made.config.vocab_size
        == made.spec.vocab
        == table.num_embeddings
        == made.get_output_embeddings().out_features
        == 95
    )
    assert torch.equal(table.weight[:89], before)
    assert torch.allclose(table.weight[89:], before.mean(0).expand(6, -1), atol=1e-6)
    assert (made.get_output_embeddings().weight is table.weight) == tied
    assert torch.equal(made(ids).logits[..., :89], logits)
    assert made(torch.tensor([[94]])).logits.shape == (1, 1, 95)
    made.save_pretrained(tmp_path)
    assert MptForCausalLM.from_pretrained(tmp_path).config.vocab_size == 95
    made.resize_token_embeddings(50)
    assert torch.equal(made.get_input_embeddings().weight, before[:50])
    assert made.resize_token_embeddings(pad_to_multiple_of=64).weight.shape[0] == 64
    assert made.resize_token_embeddings().weight.shape[0] == 64
    random = made.resize_token_embeddings(200, mean_resizing=False).weight[64:]
    assert 0.01 < random.std() < 0.03
    with pytest.raises(ValueError, match="at least 1"):
        made.resize_token_embeddings(0)


def test_attributes_of_models() -> None:
    made = model()
    assert made.num_parameters() == sum({p: p.numel() for p in made.parameters()}.values())
    assert made.num_parameters() - made.num_parameters(exclude_embeddings=True) == 89 * 36
    made.get_input_embeddings().weight.requires_grad_(False)
    assert made.num_parameters(only_trainable=True) == made.num_parameters() - 89 * 36
    assert made.get_memory_footprint() == 4 * made.num_parameters()
    assert made.device.type == "cpu"
    assert made.can_generate()
    assert not model("MptModel").can_generate()
    assert made.base_model is made.transformer is made.bare
