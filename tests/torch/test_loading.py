"""from_pretrained, save_pretrained and the weights' own methods: what fits, what is made anew, what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSES, KIND, batch, config, model
from safetensors.torch import load_file, save_file

import monoblock
from monoblock import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CheckpointError,
    HubError,
    MissingKeys,
    MptConfig,
    MptForCausalLM,
    MptForSequenceClassification,
    MptModel,
    ShapeMismatch,
    UnexpectedKeys,
    UnreadKeys,
)

WEIGHTS = "model.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A causal model's folder."""
    model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def rewritten(folder: Path, change: Any) -> None:
    """The folder's tensors after `change`, which works on a dict of them."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def same(a: Any, b: Any) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---------------------------------------------------------------------------- round trips and classes


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_comes_back(name: str, tmp_path: Path) -> None:
    made = model(name, num_labels=4, attn={"clip_qkv": 0.7})
    made.save_pretrained(tmp_path)
    again = getattr(monoblock, name).from_pretrained(tmp_path)
    assert same(made, again)
    assert again.config.attn_config.clip_qkv == 0.7
    assert again.config.name_or_path == again.name_or_path == str(tmp_path)
    assert not again.training
    assert all(p.requires_grad for p in again.parameters())
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [name]


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grouped, apart": (
        {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "fused_qkv": False},
        {"no_bias": False},
    ),
    "gated, qk_ln, learned": ({"alibi": False, "qk_ln": True}, {"ffn_config": {"ffn_type": "mptglu"}}),
    "untied, rope": ({"rope": True}, {"tie_word_embeddings": False, "head_dim": 8}),
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("shard", ["50GB", 5000])
def test_the_makers_options_come_back(case: str, shard: Any, tmp_path: Path) -> None:
    attn, fields = OPTIONS[case]
    made = model(attn=attn, **fields)
    made.save_pretrained(tmp_path, max_shard_size=shard)
    again = MptForCausalLM.from_pretrained(tmp_path)
    assert same(made, again)
    ids, _ = batch("none")
    assert torch.equal(made(ids).logits, again(ids).logits)


def test_auto_classes(saved: Path) -> None:
    assert type(AutoModelForCausalLM.from_pretrained(saved)) is MptForCausalLM
    assert type(AutoModel.from_pretrained(saved, dtype="bfloat16")) is MptModel
    chosen = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=3)
    assert type(chosen) is MptForSequenceClassification
    assert chosen.head.out.out_features == 3
    assert type(AutoModelForCausalLM.from_config(config())) is MptForCausalLM
    with pytest.raises(TypeError, match="not made directly"):
        AutoModel()


@pytest.mark.parametrize("name", [name for name in CLASSES if KIND[name] not in (None, "causal")])
def test_another_head_is_made_anew_and_told(name: str, saved: Path, logs: pytest.LogCaptureFixture) -> None:
    made = getattr(monoblock, name).from_pretrained(saved, num_labels=3)
    new = {"sequence": "score", "token": "classifier", "span": "qa_outputs"}[KIND[name]] + ".weight"
    warnings = [r.getMessage() for r in logs.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert name in warnings[0]
    assert new in warnings[0]
    weight = made.head.out.weight
    assert weight.shape[0] == (2 if KIND[name] == "span" else 3)
    assert 0.005 < weight.std() < 0.06, "the initial deviation is 0.02"
    assert torch.equal(
        made.backbone.embed.weight, MptForCausalLM.from_pretrained(saved).backbone.embed.weight
    )


def test_the_bare_model_of_a_checkpoint_with_a_head(tmp_path: Path, logs: pytest.LogCaptureFixture) -> None:
    made = model("MptForSequenceClassification")
    made.save_pretrained(tmp_path)
    bare = MptModel.from_pretrained(tmp_path)
    assert same(made.backbone, bare.backbone)
    assert any("score.weight" in message for message in logs.messages), "said, not warned"
    assert not [r for r in logs.records if r.levelname == "WARNING"]


# ---------------------------------------------------------------------------- arguments


def test_num_labels_and_other_fields_override(tmp_path: Path) -> None:
    model("MptForSequenceClassification", num_labels=4).save_pretrained(tmp_path)
    with pytest.raises(ShapeMismatch, match=r"score\.weight .*\[4, 36\] in model\.safetensors.*\[7, 36\]"):
        MptForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    made = MptForSequenceClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert made.head.out.weight.shape == (7, 36)
    assert made.config.num_labels == 7
    changed = MptForSequenceClassification.from_pretrained(
        tmp_path, problem_type="regression", output_hidden_states=True, attn_config={"alibi_bias_max": 16}
    )
    assert changed.config.problem_type == "regression"
    assert "hidden_states" in changed(torch.tensor([[5, 6]]))
    assert changed.spec.positions[0].bias_max == 16


def test_mismatched_sizes_are_made_anew_only_if_asked(saved: Path, logs: pytest.LogCaptureFixture) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.wte.weight"] = torch.zeros(100, 36)

    rewritten(saved, widen)
    with pytest.raises(ShapeMismatch) as error:
        MptForCausalLM.from_pretrained(saved)
    assert str(error.value) == (
        "transformer.wte.weight (embed.weight) is [100, 36] in model.safetensors, but the config implies [89, 36]: do "
        "config.json and the weights belong together?"
    )
    made = MptForCausalLM.from_pretrained(saved, ignore_mismatched_sizes=True)
    assert made.backbone.embed.weight.shape == (89, 36)
    assert made.backbone.embed.weight.abs().max() > 0
    assert made.head.out.weight is made.backbone.embed.weight
    assert any("transformer.wte.weight" in message for message in logs.messages)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("auto", torch.bfloat16),
        (None, torch.bfloat16),
        ("float32", torch.float32),
        ("torch.float16", torch.float16),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes(name: str, asked: Any, expected: torch.dtype, tmp_path: Path) -> None:
    made = model().to(torch.bfloat16)
    made.save_pretrained(tmp_path)
    loaded = MptForCausalLM.from_pretrained(tmp_path, **{name: asked})
    assert {p.dtype for p in loaded.parameters()} == {expected}
    assert loaded.config.dtype == str(expected).removeprefix("torch.")
    assert torch.equal(loaded.backbone.embed.weight, made.backbone.embed.weight.to(expected))


def test_without_a_dtype_in_the_config_the_files_decide(tmp_path: Path) -> None:
    model().half().save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    del data["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert MptForCausalLM.from_pretrained(tmp_path).dtype == torch.float16


@pytest.mark.parametrize("asked", ["float99", "int8", torch.int64, "bf16"])
def test_unknown_dtypes(asked: Any, saved: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be"):
        MptForCausalLM.from_pretrained(saved, dtype=asked)


@pytest.mark.parametrize(
    "device_map",
    [
        None,
        "cpu",
        "auto",
        torch.device("cpu"),
        {"": "cpu"},
        {"transformer": "cpu"},
        {"backbone": "cpu", "head": "cpu"},
    ],
    ids=str,
)
def test_device_maps(device_map: Any, saved: Path) -> None:
    made = MptForCausalLM.from_pretrained(saved, device_map=device_map)
    assert {p.device.type for p in made.parameters()} == {"cpu"}
    ids, _ = batch("none")
    assert torch.equal(made(ids).logits, MptForCausalLM.from_pretrained(saved)(ids).logits)


def test_a_device_map_by_hub_names(tmp_path: Path) -> None:
    made = model("MptForTokenClassification")
    made.save_pretrained(tmp_path)
    parts = ("transformer.wte", "transformer.blocks", "transformer.norm_f", "classifier")
    loaded = monoblock.MptForTokenClassification.from_pretrained(
        tmp_path, device_map=dict.fromkeys(parts, "cpu")
    )
    assert same(made, loaded)
    with pytest.raises(ValueError, match=r"gives no device to backbone\.final_norm\.weight; add the key ''"):
        monoblock.MptForTokenClassification.from_pretrained(
            tmp_path, device_map={"transformer.wte": "cpu", "transformer.blocks": "cpu"}
        )


@pytest.mark.parametrize(
    ("device_map", "text"),
    [
        ({}, "at least one module"),
        ("quick", "no device; try 'cpu'"),
        ({"": "disk"}, "'disk' is not supported"),
        ({"decoder": "cpu"}, "names no module of this model: decoder"),
        (3.5, "must be 'auto', a device or a dict"),
    ],
)
def test_wrong_device_maps(device_map: Any, text: str, saved: Path) -> None:
    with pytest.raises(ValueError, match=text):
        MptForCausalLM.from_pretrained(saved, device_map=device_map)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(saved: Path) -> None:
    with pytest.raises(ValueError, match="no CUDA GPU is there"):
        MptForCausalLM.from_pretrained(saved, device_map="cuda:0")


def test_a_given_config_is_used_and_not_changed(saved: Path) -> None:
    given = MptConfig.from_pretrained(saved, attn_config={"alibi_bias_max": 16})
    before = given.to_dict()
    made = MptForCausalLM.from_pretrained(saved, config=given, use_cache=True, dtype="float16")
    assert made.spec.positions[0].bias_max == 16
    assert made.config.use_cache
    assert given.to_dict() == before
    by_path = MptForCausalLM.from_pretrained(saved, config=saved / "config.json")
    assert by_path.spec == MptForCausalLM.from_pretrained(saved).spec


def test_attn_implementation_is_chosen_while_loading(saved: Path) -> None:
    made = MptForCausalLM.from_pretrained(saved, attn_implementation="eager")
    assert made.backbone.blocks[1].attn.implementation == "eager"
    assert "eager" not in made.config.to_json_string(), "a choice of the machine, not of the checkpoint"
    with pytest.raises(ValueError, match="attn_implementation must be one of"):
        MptForCausalLM.from_pretrained(saved, attn_implementation="quick")


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"load_in_4bit": True}, ValueError, "does not support load_in_4bit=True"),
        ({"gguf_file": "x.gguf"}, TypeError, "gguf_file= is not supported"),
        ({"no_such_argument": 1}, TypeError, "does not know the argument 'no_such_argument'"),
    ],
)
def test_arguments_that_are_not_there(given: dict[str, Any], error: Any, text: str, saved: Path) -> None:
    with pytest.raises(error, match=text):
        MptForCausalLM.from_pretrained(saved, **given)
    with pytest.raises(TypeError, match="takes one positional argument, got 2"):
        MptForCausalLM.from_pretrained(saved, "more")


def test_remote_code_is_never_run(saved: Path) -> None:
    assert (
        MptForCausalLM.from_pretrained(saved, trust_remote_code=True, low_cpu_mem_usage=True).config.d_model
        == 36
    )


# ---------------------------------------------------------------------------- checkpoints that do not fit


def test_missing_unknown_and_unread_tensors(saved: Path) -> None:
    def rename(old: str, new: str) -> Any:
        return lambda tensors: tensors.update({new: tensors.pop(old)})

    name = "transformer.blocks.1.attn.out_proj.weight"
    original = (saved / WEIGHTS).read_bytes()
    rewritten(saved, rename(name, name.replace("out_proj", "out_prj")))
    with pytest.raises(MissingKeys, match=r"lacks transformer\.blocks\.1\.attn\.out_proj.*nearest.*out_prj"):
        MptForCausalLM.from_pretrained(saved)
    (saved / WEIGHTS).write_bytes(original)
    rewritten(saved, lambda tensors: tensors.update({name.replace("1", "0") + "s": torch.zeros(2)}))
    with pytest.raises(
        UnexpectedKeys,
        match=r"out_proj\.weights, .*no name of this family; the nearest is .*out_proj\.weight",
    ):
        MptForCausalLM.from_pretrained(saved)
    (saved / WEIGHTS).write_bytes(original)
    rewritten(saved, lambda tensors: tensors.update({name.replace("1", "2"): torch.zeros(36, 36)}))
    with pytest.raises(UnreadKeys, match=r"blocks\.2\.attn\.out_proj.*the config has no place"):
        MptForCausalLM.from_pretrained(saved)
    (saved / WEIGHTS).write_bytes(original)
    assert MptForCausalLM.from_pretrained(saved)
    assert all(
        issubclass(kind, ValueError) for kind in (MissingKeys, UnexpectedKeys, UnreadKeys, ShapeMismatch)
    )


def test_an_impossible_head_count_in_a_config(saved: Path) -> None:
    data = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**data, "n_heads": 5}))
    with pytest.raises(ValueError, match=r"d_model.*36.*n_heads.*5"):
        MptForCausalLM.from_pretrained(saved)
    (saved / "config.json").write_text(json.dumps({**data, "n_heads": 6, "expansion_ratio": 3}))
    with pytest.raises(ShapeMismatch, match=r"up_proj\.weight .*\[144, 36\].*\[108, 36\]"):
        MptForCausalLM.from_pretrained(saved)


def test_folders_that_hold_no_model(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(HubError):
        MptForCausalLM.from_pretrained(tmp_path / "nowhere")
    (saved / WEIGHTS).unlink()
    with pytest.raises(HubError, match=r"model\.safetensors"):
        MptForCausalLM.from_pretrained(saved)
    (saved / WEIGHTS).write_bytes(b"not weights at all")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        MptForCausalLM.from_pretrained(saved)
    with pytest.raises(ValueError, match="MptModel takes a MptConfig, got str"):
        MptModel("mosaicml/mpt-7b")


# ---------------------------------------------------------------------------- saving


def test_a_failing_save_leaves_the_earlier_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    other = model(seed=3, attn={"clip_qkv": 2})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    for place in ("monoblock.checkpoint.save._write", "monoblock.config.PretrainedConfig.to_json_string"):
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            with pytest.raises((OSError, CheckpointError), match="no space left"):
                other.save_pretrained(saved)
        assert {path.name: path.read_bytes() for path in saved.iterdir()} == before, place


def test_a_failing_save_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("monoblock.checkpoint.save._write", fail)
    with pytest.raises((OSError, CheckpointError)):
        model().save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_saving_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="needs a folder"):
        model().save_pretrained(tmp_path / "file")
    for given in ({"safe_serialization": False}, {"push_to_hub": True}):
        with pytest.raises(ValueError, match=next(iter(given))):
            model().save_pretrained(tmp_path / "x", **given)
    model().save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "other").exists()


def test_a_given_state_dict_is_saved_instead(saved: Path, tmp_path: Path) -> None:
    made = MptForCausalLM.from_pretrained(saved)
    state = {name: torch.zeros_like(tensor) for name, tensor in made.hub_state_dict().items()}
    made.save_pretrained(tmp_path / "zeros", state_dict=state)
    assert not MptForCausalLM.from_pretrained(tmp_path / "zeros").backbone.embed.weight.any()


def test_tied_weights_are_saved_once(saved: Path) -> None:
    assert "lm_head.weight" not in load_file(saved / WEIGHTS)
    assert (
        sum(path.stat().st_size for path in saved.glob("*.safetensors"))
        < 1.05 * model().get_memory_footprint() + 4096
    )


# ---------------------------------------------------------------------------- weights as they are held


def test_state_dicts_by_either_name() -> None:
    one, two = model(seed=1), model(seed=2)
    two.load_state_dict(one.hub_state_dict())
    assert same(one, two)
    three = model(seed=3)
    three.load_state_dict(one.state_dict())
    assert same(one, three)
    bare = model("MptModel", seed=4)
    bare.load_state_dict({name.removeprefix("transformer."): t for name, t in one.hub_state_dict().items()})
    assert same(one.backbone, bare.backbone)
    with pytest.raises(CheckpointError, match=r"blocks\.7\.norm_1\.weight"):
        one.load_state_dict({**one.hub_state_dict(), "transformer.blocks.7.norm_1.weight": torch.zeros(36)})
    partial = one.hub_state_dict()
    del partial["transformer.norm_f.weight"]
    with pytest.raises(RuntimeError, match="final_norm"):
        two.load_state_dict(partial)
    assert two.load_state_dict(partial, strict=False).missing_keys == ["backbone.final_norm.weight"]
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
        assert again.head.out.weight is again.backbone.embed.weight
        assert again.config == made.config
        again.backbone.embed.weight.data.zero_()
    assert torch.equal(made(ids).logits, expected)


def test_a_saved_state_dict_comes_back(tmp_path: Path) -> None:
    made, other = model(seed=1), model(seed=2)
    torch.save(made.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(made, other)
    assert other.head.out.weight is other.backbone.embed.weight


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


def test_hooks_on_the_embedding_act() -> None:
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
    before = made.backbone.embed.weight.detach().clone()
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
    assert torch.equal(made.backbone.embed.weight, before[:50])
    assert made.resize_token_embeddings(pad_to_multiple_of=64).weight.shape[0] == 64
    assert made.resize_token_embeddings().weight.shape[0] == 64
    random = made.resize_token_embeddings(200, mean_resizing=False).weight[64:]
    assert 0.01 < random.std() < 0.03
    with pytest.raises(ValueError, match="at least 1"):
        made.resize_token_embeddings(0)


def test_facts_about_a_model() -> None:
    made = model()
    assert made.num_parameters() == sum({p: p.numel() for p in made.parameters()}.values())
    assert made.num_parameters() - made.num_parameters(exclude_embeddings=True) == 89 * 36
    made.backbone.embed.weight.requires_grad_(False)
    assert made.num_parameters(only_trainable=True) == made.num_parameters() - 89 * 36
    assert made.get_memory_footprint() == 4 * made.num_parameters()
    assert made.device.type == "cpu"
    assert made.can_generate()
    assert not model("MptModel").can_generate()
    assert made.base_model is made.transformer is made.backbone


# ---------------------------------------------------------------------------- memory

MEMORY = """
import sys, torch
from monoblock import MptForCausalLM
folder, dtype = sys.argv[1:]
def used(what):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(what)).split()[1]) / 1024
ids = torch.arange(32)[None]
torch.set_num_threads(1)
base, anonymous = used("VmHWM"), used("RssAnon")
model = MptForCausalLM.from_pretrained(folder, dtype=dtype)
model(ids)
print(used("VmHWM") - base, used("RssAnon") - anonymous)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_a_model_is_loaded_without_a_second_copy(tmp_path: Path) -> None:
    sizes = {"d_model": 1024, "n_heads": 8, "n_layers": 3, "vocab_size": 16000}
    big = MptForCausalLM(MptConfig(**sizes))
    megabytes = big.get_memory_footprint() / 2**20
    big.save_pretrained(tmp_path)
    assert megabytes > 200
    del big
    for dtype, share in (("float32", 1.0), ("bfloat16", 0.5)):
        run = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path), dtype], capture_output=True, text=True, check=True
        )
        peak, anonymous = (float(x) for x in run.stdout.split())
        # 40 MB: what the first forward pass of PyTorch takes. A conversion holds one tensor (62 MB) twice.
        assert peak < 1.15 * share * megabytes + 40 + (62 if share < 1 else 0), (
            f"{dtype}: {peak:.0f} of {megabytes:.0f} MB"
        )
        if dtype == "float32":
            assert anonymous < 60, "the weights are the mapped file itself"


def test_loaded_parameters_lie_in_the_mapped_file(saved: Path) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("maps are read from Linux's /proc")
    made = MptForCausalLM.from_pretrained(saved)
    spans = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(saved / WEIGHTS) in line
    ]
    assert spans
    for name, p in made.named_parameters():
        assert any(low <= p.data_ptr() < high for low, high in spans), name
    with torch.no_grad():
        made.backbone.embed.weight.zero_()
    assert MptForCausalLM.from_pretrained(saved).backbone.embed.weight.any(), "the file is not written to"


# ---------------------------------------------------------------------------- inputs that are wrong

IDS = torch.arange(10, 22).reshape(2, 6)
WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    r"hold the token 89, but the model's vocabulary has the ids 0 to 88": (
        ValueError,
        {"input_ids": IDS + 68},
    ),
    r"hold the token -100": (ValueError, {"input_ids": torch.full((1, 3), -100)}),
    r"the input has no tokens": (ValueError, {"input_ids": torch.zeros(1, 0, dtype=torch.long)}),
    r"input_ids must be whole numbers \(batch, tokens\), got torch.float32": (
        ValueError,
        {"input_ids": IDS.float()},
    ),
    r"input_ids must be whole numbers \(batch, tokens\), got torch.int64 \(6,\)": (
        ValueError,
        {"input_ids": IDS[0]},
    ),
    r"inputs_embeds must be \(batch, tokens, 36\), got \(2, 6, 35\)": (
        ValueError,
        {"inputs_embeds": torch.zeros(2, 6, 35)},
    ),
    r"attention_mask must be \(batch, tokens\) = \(2, 6\), .* got \(2, 5\)": (
        ValueError,
        {"input_ids": IDS, "attention_mask": torch.ones(2, 5)},
    ),
    r"attention_mask must be .* got \(2, 1, 6, 6\)": (
        ValueError,
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 6, 6)},
    ),
    r"cache_position must be 0 to 5": (ValueError, {"input_ids": IDS, "cache_position": torch.arange(1, 7)}),
    r"position_ids must be \(batch, 6\), got \(1, 7\)": (
        ValueError,
        {"input_ids": IDS, "position_ids": torch.arange(7)[None]},
    ),
    r"past_key_values must hold 2 layers, got 1": (
        ValueError,
        {"input_ids": IDS, "past_key_values": ((IDS, IDS),)},
    ),
    r"past_key_values must hold keys of \(batch, heads, tokens, head_dim\) or .* got \(5, 6, 7\) for a batch of 2": (
        ValueError,
        {"input_ids": IDS, "past_key_values": ((torch.zeros(5, 6, 7),) * 2,) * 2},
    ),
    r"past_key_values must be a Cache or a tuple of layers, got dict": (
        ValueError,
        {"input_ids": IDS, "past_key_values": {}},
    ),
    r"labels of 5 tokens came with logits of 6": (ValueError, {"input_ids": IDS, "labels": IDS[:, :5]}),
    r"MptForCausalLM has no argument 'attn_mask'; it takes: input_ids": (
        TypeError,
        {"input_ids": IDS, "attn_mask": IDS},
    ),
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_inputs_get_one_clear_sentence(text: str) -> None:
    error, given = WRONG[text]
    with pytest.raises(error, match=text) as caught:
        model()(**given)
    assert "\n" not in str(caught.value)


def test_wrong_inputs_by_position() -> None:
    with pytest.raises(TypeError, match="takes at most 11 positional arguments, got 12"):
        model()(*[None] * 12)
    with pytest.raises(TypeError, match="got 'input_ids' twice"):
        model()(IDS, input_ids=IDS)


def test_a_static_cache_that_is_too_small() -> None:
    cache = monoblock.StaticCache(max_cache_len=8)
    out = model()(IDS, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="the static cache holds 8 tokens: 6 are in it and 6 more came"):
        model()(IDS, past_key_values=out.past_key_values)
    with pytest.raises(ValueError, match="max_cache_len of at least 1"):
        monoblock.StaticCache(max_cache_len=0)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no tokens|empty"):
        model().generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=3)


def test_a_class_that_predicts_nothing_does_not_generate() -> None:
    with pytest.raises(TypeError, match=r"generate with a \.\.\.ForCausalLM class"):
        model("MptForTokenClassification").generate(IDS)


def test_position_ids_without_positions_are_told(logs: pytest.LogCaptureFixture) -> None:
    model()(IDS, position_ids=torch.arange(6)[None])
    assert any("position_ids have no effect" in message for message in logs.messages)
