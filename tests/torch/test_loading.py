"""from_pretrained and save_pretrained of MPT: round trips, missing and mismatched tensors, dtypes, device maps, errors,
and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import oversized_configs
import pytest
import torch
from extra_tensors import FEWER, check_strict
from helpers import CLASSES, KIND, batch, config, model, same
from safetensors.torch import load_file, save_file
from tiny_families import fields, monoblock_model

import monoblock
from monoblock import (
    AutoConfig,
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
    pipeline,
)
from monoblock.checkpoint import options

WEIGHTS = "model.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A causal model's folder."""
    model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def rewritten(folder: Path, change: Any) -> None:
    """Applies `change` to the dict of a folder's tensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# ---------------------------------------------------------------------------- round trips and classes


@pytest.mark.parametrize("name", CLASSES)
def test_round_trip(name: str, tmp_path: Path) -> None:
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
    "grouped, unfused": (
        {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "fused_qkv": False},
        {"no_bias": False},
    ),
    "gated, qk_ln, learned": ({"alibi": False, "qk_ln": True}, {"ffn_config": {"ffn_type": "mptglu"}}),
    "untied, rope": ({"rope": True}, {"tie_word_embeddings": False, "head_dim": 8}),
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("shard", ["50GB", 5000])
def test_round_trip_of_upstream_options(case: str, shard: Any, tmp_path: Path) -> None:
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
    assert chosen.at("head_out").out_features == 3
    assert type(AutoModelForCausalLM.from_config(config())) is MptForCausalLM
    with pytest.raises(TypeError, match="cannot be instantiated"):
        AutoModel()


@pytest.mark.parametrize("name", [name for name in CLASSES if KIND[name] not in (None, "causal")])
def test_missing_heads_are_initialised_with_a_warning(
    name: str, saved: Path, logs: pytest.LogCaptureFixture
) -> None:
    made = getattr(monoblock, name).from_pretrained(saved, num_labels=3)
    new = {"sequence": "score", "token": "classifier", "span": "qa_outputs"}[KIND[name]] + ".weight"
    warnings = [r.getMessage() for r in logs.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert name in warnings[0]
    assert new in warnings[0]
    weight = made.at("head_out").weight
    assert weight.shape[0] == (2 if KIND[name] == "span" else 3)
    assert 0.005 < weight.std() < 0.06, "the initial standard deviation is 0.02"
    assert torch.equal(
        made.get_input_embeddings().weight,
        MptForCausalLM.from_pretrained(saved).get_input_embeddings().weight,
    )


def test_bare_model_of_a_checkpoint_with_a_head(tmp_path: Path, logs: pytest.LogCaptureFixture) -> None:
    made = model("MptForSequenceClassification")
    made.save_pretrained(tmp_path)
    bare = MptModel.from_pretrained(tmp_path)
    assert same(made.bare, bare)
    assert any("score.weight" in message for message in logs.messages), "logged as info"
    assert not [r for r in logs.records if r.levelname == "WARNING"]


# ---------------------------------------------------------------------------- arguments


def test_num_labels_and_other_fields_override(tmp_path: Path) -> None:
    model("MptForSequenceClassification", num_labels=4).save_pretrained(tmp_path)
    with pytest.raises(ShapeMismatch, match=r"score\.weight .*\[4, 36\] in model\.safetensors.*\[7, 36\]"):
        MptForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    made = MptForSequenceClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert made.at("head_out").weight.shape == (7, 36)
    assert made.config.num_labels == 7
    changed = MptForSequenceClassification.from_pretrained(
        tmp_path, problem_type="regression", output_hidden_states=True, attn_config={"alibi_bias_max": 16}
    )
    assert changed.config.problem_type == "regression"
    assert "hidden_states" in changed(torch.tensor([[5, 6]]))
    assert changed.spec.positions[0].bias_max == 16


def test_ignore_mismatched_sizes(saved: Path, logs: pytest.LogCaptureFixture) -> None:
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
    assert made.get_input_embeddings().weight.shape == (89, 36)
    assert made.get_input_embeddings().weight.abs().max() > 0
    assert made.at("head_out").weight is made.get_input_embeddings().weight
    assert any("transformer.wte.weight" in message for message in logs.messages)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("given", "expected"),
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
def test_dtypes(name: str, given: Any, expected: torch.dtype, tmp_path: Path) -> None:
    made = model().to(torch.bfloat16)
    made.save_pretrained(tmp_path)
    loaded = MptForCausalLM.from_pretrained(tmp_path, **{name: given})
    assert {p.dtype for p in loaded.parameters()} == {expected}
    assert loaded.config.dtype == str(expected).removeprefix("torch.")
    assert torch.equal(loaded.get_input_embeddings().weight, made.get_input_embeddings().weight.to(expected))


def test_without_a_dtype_in_the_config_the_files_determine_it(tmp_path: Path) -> None:
    model().half().save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    del data["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert MptForCausalLM.from_pretrained(tmp_path).dtype == torch.float16


@pytest.mark.parametrize("given", ["float99", "int8", torch.int64, "bf16"])
def test_unknown_dtypes(given: Any, saved: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be"):
        MptForCausalLM.from_pretrained(saved, dtype=given)


@pytest.mark.parametrize(
    "device_map",
    [
        None,
        "cpu",
        "auto",
        torch.device("cpu"),
        {"": "cpu"},
        {"transformer": "cpu"},
        {"transformer": "cpu", "lm_head": "cpu"},
    ],
    ids=str,
)
def test_device_maps(device_map: Any, saved: Path) -> None:
    made = MptForCausalLM.from_pretrained(saved, device_map=device_map)
    assert {p.device.type for p in made.parameters()} == {"cpu"}
    ids, _ = batch("none")
    assert torch.equal(made(ids).logits, MptForCausalLM.from_pretrained(saved)(ids).logits)


def test_device_map_by_parameter_names(tmp_path: Path) -> None:
    made = model("MptForTokenClassification")
    made.save_pretrained(tmp_path)
    modules = ("transformer.wte", "transformer.blocks", "transformer.norm_f", "classifier")
    loaded = monoblock.MptForTokenClassification.from_pretrained(
        tmp_path, device_map=dict.fromkeys(modules, "cpu")
    )
    assert same(made, loaded)
    with pytest.raises(ValueError, match=r"gives no device to transformer\.norm_f\.weight; add the key ''"):
        monoblock.MptForTokenClassification.from_pretrained(
            tmp_path, device_map={"transformer.wte": "cpu", "transformer.blocks": "cpu"}
        )


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({}, "at least one module"),
        ("quick", "no device; try 'cpu'"),
        ({"": "disk"}, "give offload_folder="),
        ({"decoder": "cpu"}, "names no module of this model: decoder"),
        (3.5, "must be 'auto', a device or a dict"),
    ],
)
def test_invalid_device_maps(device_map: Any, message: str, saved: Path) -> None:
    with pytest.raises(ValueError, match=message):
        MptForCausalLM.from_pretrained(saved, device_map=device_map)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_unavailable_gpu(saved: Path) -> None:
    with pytest.raises(ValueError, match="no CUDA GPU is there"):
        MptForCausalLM.from_pretrained(saved, device_map="cuda:0")


def test_a_given_config_is_used_and_not_modified(saved: Path) -> None:
    given = MptConfig.from_pretrained(saved, attn_config={"alibi_bias_max": 16})
    before = given.to_dict()
    made = MptForCausalLM.from_pretrained(saved, config=given, use_cache=True, dtype="float16")
    assert made.spec.positions[0].bias_max == 16
    assert made.config.use_cache
    assert given.to_dict() == before
    by_path = MptForCausalLM.from_pretrained(saved, config=saved / "config.json")
    assert by_path.spec == MptForCausalLM.from_pretrained(saved).spec


def test_attn_implementation_argument(saved: Path) -> None:
    made = MptForCausalLM.from_pretrained(saved, attn_implementation="eager")
    assert made.at("attention", 1).implementation == "eager"
    assert "eager" not in made.config.to_json_string(), "not stored in the config"
    with pytest.raises(ValueError, match="attn_implementation must be one of"):
        MptForCausalLM.from_pretrained(saved, attn_implementation="quick")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"gguf_file": "x.gguf"}, HubError, "has no x.gguf"),
        ({"no_such_argument": 1}, TypeError, "does not know the argument 'no_such_argument'"),
    ],
)
def test_unknown_and_unsupported_arguments(
    given: dict[str, Any], error: Any, message: str, saved: Path
) -> None:
    with pytest.raises(error, match=message):
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
        match=r"out_proj\.weights, .*no parameter of this family; the nearest is .*out_proj\.weight",
    ):
        MptForCausalLM.from_pretrained(saved)
    (saved / WEIGHTS).write_bytes(original)
    rewritten(saved, lambda tensors: tensors.update({name.replace("1", "2"): torch.zeros(36, 36)}))
    with pytest.raises(UnreadKeys, match=r"blocks\.2\.attn\.out_proj.*the config does not allow for"):
        MptForCausalLM.from_pretrained(saved)
    (saved / WEIGHTS).write_bytes(original)
    assert MptForCausalLM.from_pretrained(saved)
    assert all(
        issubclass(kind, ValueError) for kind in (MissingKeys, UnexpectedKeys, UnreadKeys, ShapeMismatch)
    )


def test_inconsistent_config_fields(saved: Path) -> None:
    data = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**data, "n_heads": 5}))
    with pytest.raises(ValueError, match=r"d_model.*36.*n_heads.*5"):
        MptForCausalLM.from_pretrained(saved)
    (saved / "config.json").write_text(json.dumps({**data, "n_heads": 6, "expansion_ratio": 3}))
    with pytest.raises(ShapeMismatch, match=r"up_proj\.weight .*\[144, 36\].*\[108, 36\]"):
        MptForCausalLM.from_pretrained(saved)


def test_folders_without_a_model(tmp_path: Path, saved: Path) -> None:
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


def test_a_failed_save_keeps_the_earlier_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    other = model(seed=3, attn={"clip_qkv": 2})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    for function in ("monoblock.checkpoint.save._write", "monoblock.config.PretrainedConfig.to_json_string"):
        with monkeypatch.context() as patch:
            patch.setattr(function, fail)
            with pytest.raises((OSError, CheckpointError), match="no space left"):
                other.save_pretrained(saved)
        assert {path.name: path.read_bytes() for path in saved.iterdir()} == before, function


def test_a_failed_save_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("monoblock.checkpoint.save._write", fail)
    with pytest.raises((OSError, CheckpointError)):
        model().save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_invalid_arguments_of_save_pretrained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="needs a folder"):
        model().save_pretrained(tmp_path / "file")
    for given in ({"safe_serialization": False}, {"save_peft_format": False}):
        with pytest.raises(ValueError, match=next(iter(given))):
            model().save_pretrained(tmp_path / "x", **given)
    with pytest.raises(TypeError, match="repo_id"):
        model().save_pretrained(tmp_path / "x", repo_id="a/b")
    model().save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "other").exists()


def test_save_pretrained_with_a_state_dict(saved: Path, tmp_path: Path) -> None:
    made = MptForCausalLM.from_pretrained(saved)
    state = {name: torch.zeros_like(tensor) for name, tensor in made.hub_state_dict().items()}
    made.save_pretrained(tmp_path / "zeros", state_dict=state)
    assert not MptForCausalLM.from_pretrained(tmp_path / "zeros").get_input_embeddings().weight.any()


def test_tied_weights_are_saved_once(saved: Path) -> None:
    assert "lm_head.weight" not in load_file(saved / WEIGHTS)
    assert (
        sum(path.stat().st_size for path in saved.glob("*.safetensors"))
        < 1.05 * model().get_memory_footprint() + 4096
    )


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
def test_loading_makes_no_second_copy(tmp_path: Path) -> None:
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
        # 40 MB for the first forward pass of PyTorch. A dtype conversion holds one tensor (62 MB) twice.
        assert peak < 1.15 * share * megabytes + 40 + (62 if share < 1 else 0), (
            f"{dtype}: {peak:.0f} of {megabytes:.0f} MB"
        )
        if dtype == "float32":
            assert anonymous < 60, "the weights are memory-mapped"


def test_loaded_parameters_are_memory_mapped(saved: Path) -> None:
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
        made.get_input_embeddings().weight.zero_()
    assert MptForCausalLM.from_pretrained(saved).get_input_embeddings().weight.any(), "the mapping is private"


def test_keyword_arguments_override_a_given_config(saved: Path) -> None:
    config = monoblock.MptConfig.from_pretrained(saved)
    before = config.to_dict()
    made = monoblock.MptForCausalLM.from_pretrained(saved, config=config, attn_config={"clip_qkv": 0.25})
    assert made.spec.attention.clip == 0.25
    assert config.to_dict() == before
    with pytest.raises(TypeError, match="does not know the argument 'no_such'"):
        monoblock.MptForCausalLM.from_pretrained(saved, config=config, no_such=1)


def test_extra_tensors_and_fewer_layers(tmp_path: Path, logs: pytest.LogCaptureFixture) -> None:
    neo = monoblock_model("GPTNeoForCausalLM", **fields("gpt_neo"))
    neo.save_pretrained(tmp_path / "saved")
    whole, short = check_strict(monoblock.GPTNeoForCausalLM, tmp_path / "saved", tmp_path, logs)
    assert same(whole, neo)
    kept = short.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in neo.state_dict().items() if name in kept)
    assert len(short.transformer.h) == 1


def test_fewer_quantised_layers(tmp_path: Path, logs: pytest.LogCaptureFixture) -> None:
    monoblock_model("GPTNeoForCausalLM", **fields("gpt_neo")).quantize("int8").save_pretrained(tmp_path)
    with pytest.raises(UnreadKeys, match=r"strict=False\) ignores them"):
        monoblock.GPTNeoForCausalLM.from_pretrained(tmp_path, **FEWER)
    short, info = monoblock.GPTNeoForCausalLM.from_pretrained(
        tmp_path, strict=False, output_loading_info=True, **FEWER
    )
    assert "transformer.h.2.attn.attention.k_proj.weight.codes" in info["unexpected_keys"]
    assert all(".h.1." in name or ".h.2." in name for name in info["unexpected_keys"])
    assert short(torch.arange(10, 20)[None]).logits.isfinite().all()
    assert sum("strict=False passes over" in message for message in logs.messages) == 1


def test_the_warning_of_many_extra_tensors_is_short(saved: Path, logs: pytest.LogCaptureFixture) -> None:
    rewritten(saved, lambda tensors: tensors.update({f"extra.{i}": torch.ones(1) for i in range(70)}))
    _, info = MptForCausalLM.from_pretrained(saved, strict=False, output_loading_info=True)
    assert len(info["unexpected_keys"]) == 70
    [warning] = [message for message in logs.messages if "strict=False" in message]
    assert warning.endswith(" and 20 more")


def test_the_code_of_upstream_model_cards(saved: Path, logs: pytest.LogCaptureFixture) -> None:
    """`config.attn_config["attn_impl"] = ...` and `trust_remote_code=True`."""
    options.warn_of_remote_code.cache_clear()
    config = AutoConfig.from_pretrained(saved, trust_remote_code=True)
    config.attn_config["attn_impl"] = "triton"
    config.init_device = "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(
        saved, config=config, torch_dtype=torch.float32, trust_remote_code=True
    )
    assert same(loaded, model())
    ids = torch.arange(10, 20)[None]
    assert torch.equal(loaded(ids).logits, model()(ids).logits)
    AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    with pytest.raises(TypeError, match="no argument 'nonsense'"):
        pipeline("text-generation", nonsense=1, trust_remote_code=True)
    assert sum("trust_remote_code=True has no effect" in message for message in logs.messages) == 1


def test_a_config_larger_than_its_files_raises(tmp_path: Path) -> None:
    oversized_configs.check(monoblock.MistralForCausalLM, tmp_path)
