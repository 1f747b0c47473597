"""Models with quantised weights: every class; saving, loading, casting, training adapters, and errors."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import helpers
import pytest
import tiny_families
import torch
from safetensors.torch import load_file

import monoblock
from monoblock import (
    AutoModelForCausalLM,
    MistralForSequenceClassification,
    WeightOnlyConfig,
    demo,
    native,
    pipeline,
)
from monoblock.backends.pytorch.quantization import formats
from monoblock.backends.pytorch.quantization.modules import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedMatrix,
)
from monoblock.errors import CheckpointError, MissingKeys, ShapeMismatch, UnsupportedConfig

torch.set_num_threads(1)

CLASSES = (*helpers.CLASSES, *tiny_families.CLASSES)
FORMS: dict[str, Any] = {"int8": "int8", "int4": WeightOnlyConfig(bits=4, group_size=64)}
MISTRAL = "MistralForCausalLM"


def plain(name: str) -> Any:
    if name in helpers.CLASSES:
        return helpers.model(name)
    return tiny_families.monoblock_model(name, **tiny_families.fields(tiny_families.CLASSES[name]))


def answer(name: str, model: Any) -> torch.Tensor:
    if name in helpers.CLASSES:
        ids, mask = helpers.batch("right")
    else:
        ids, mask = tiny_families.model_inputs(name, "right")
    with torch.no_grad():
        return tiny_families.logits_of(model(ids, attention_mask=mask)).float()


def packed_names(model: Any) -> dict[str, int]:
    return {name: m.bits for name, m in model.named_modules() if isinstance(m, QuantizedMatrix)}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


# ---------------------------------------------------------------------------- every class


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_quantises_saves_and_loads(
    name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plain(name)
    model.save_pretrained(tmp_path / "plain")
    before = answer(name, model)
    weights = {matrix: weight_of(model, matrix) for matrix in matrices(model)}
    cls = getattr(monoblock, name)
    model.quantize(FORMS[form])
    loaded = cls.from_pretrained(tmp_path / "plain", quantization_config=FORMS[form])
    same_bits(loaded.hub_state_dict(), model.hub_state_dict())

    after = answer(name, loaded)
    loaded.save_pretrained(tmp_path / "packed")
    again = cls.from_pretrained(tmp_path / "packed")
    same_bits(again.hub_state_dict(), model.hub_state_dict())
    assert packed_names(again) == packed_names(loaded) == packed_names(model)
    assert torch.equal(answer(name, again), after)
    assert again.quantization_config == loaded.quantization_config == model.quantization_config

    # What it computes is what plain matrices with the same numbers give. Native kernels may round what goes in to 8
    # bits, which after three random layers of 36 is up to a twentieth of the answer; measured 0.04.
    native_off(monkeypatch)
    exact = answer(name, again)
    for matrix in packed_names(again):
        packed = again.get_submodule(matrix)
        assert rms(packed.dequantize() - weights[matrix]) <= half_steps(weights[matrix], packed), matrix
    numbers = answer(name, again.dequantize())
    assert not packed_names(again) and again.quantization_config is None
    assert error(exact, numbers) < 1e-4  # fp32; measured 3e-6
    assert error(after, numbers) < 0.06
    assert error(numbers, before) > 1e-6, "something was packed"


def matrices(model: Any) -> list[str]:
    """The modules that hold a matrix."""
    return [name for name, m in model.named_modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2]


def weight_of(model: Any, name: str) -> torch.Tensor:
    """A module's matrix as it is packed, (outputs, inputs)."""
    module = model.get_submodule(name)
    weight = module.weight.detach()
    return (weight.T if type(module).__name__ == "Conv1D" else weight).clone()


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def half_steps(weight: torch.Tensor, packed: Any) -> float:
    """What rounding to the nearest of a group's evenly spaced numbers costs at most, as a root mean square: half a step
    each. 8 bits are symmetric about 0, 4 bits span the group's range; 1e-3 for the scales' 11 bits (fp16)."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 128))
    groups = padded.unflatten(1, (-1, packed.group))
    if packed.bits == 8:
        steps = groups.abs().amax(-1) / 127
    else:
        steps = (groups.amax(-1) - groups.amin(-1)) / 15
    return rms((steps / 2)[..., None].expand_as(groups).flatten(1)[:, : weight.shape[1]]) * (1 + 1e-3)


def native_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products by PyTorch only."""
    monkeypatch.setattr(native, "_opened", lambda: (None, None, "off: a test"))


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CLASSES)
def test_quantised_modules(name: str, form: str) -> None:
    """Every matrix of the blocks; the token embedding and the projection to the vocabulary in 8 bits; no other."""
    model = plain(name).quantize(FORMS[form])
    bits = {"int8": 8, "int4": 4}[form]
    expected = {model.module_path("embed"): 8}
    for i in range(model.spec.layers):
        roles = ("q", "k", "v", "qkv", "qkv_by_head", "out", "gate", "up", "down")
        expected |= {model.module_path(role, i): bits for role in roles if model.at(role, i) is not None}
    if model.row.head in ("causal", "masked", "double"):
        expected[model.module_path("head_out")] = 8
    assert packed_names(model) == expected
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not {n for n in trainable if n.removesuffix(".weight") in expected}
    assert model.num_parameters() == plain(name).num_parameters()


# ---------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mistral")
    plain(MISTRAL).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed")
    AutoModelForCausalLM.from_pretrained(folder, quantization_config="int4").save_pretrained(path)
    return path


def test_names_and_dtypes_in_the_file(packed: Path) -> None:
    """transformers' names, one per matrix of the file format."""
    tensors = load_file(packed / "model.safetensors")
    width, heads, mlp = 36, 60, 50
    for matrix, rows in (("self_attn.q_proj", heads), ("self_attn.k_proj", 20), ("mlp.up_proj", mlp)):
        name = f"model.layers.1.{matrix}.weight"
        assert name not in tensors
        assert tensors[f"{name}.codes"].shape == (rows, 64) and tensors[f"{name}.codes"].dtype == torch.uint8
        for suffix in ("scale", "low"):
            assert tensors[f"{name}.{suffix}"].shape == (rows, 1)
            assert tensors[f"{name}.{suffix}"].dtype == torch.float16
    assert tensors["lm_head.weight.codes"].shape == (tiny_families.VOCAB, 128)  # 8 bits
    assert "lm_head.weight.low" not in tensors
    assert tensors["model.norm.weight"].shape == (width,)
    config = json.loads((packed / "config.json").read_text())
    how = {"method": "monoblock", "bits": 4, "group_size": 128, "modules_to_not_convert": None}
    assert config["quantization_config"] == how


def test_codes_are_not_transposed(tmp_path: Path) -> None:
    plain("OpenAIGPTLMHeadModel").quantize("int8").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.weight.codes"].shape == (3 * 36, 128)


@pytest.mark.parametrize("name", ["MptForCausalLM", "OpenAIGPTLMHeadModel", "MPNetForMaskedLM"])
def test_a_tied_head_is_one_table_in_memory_and_in_the_file(name: str, tmp_path: Path) -> None:
    model = plain(name).quantize("int8")
    table, head = model.get_input_embeddings(), model.at("head_out")
    assert isinstance(table, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
    model.save_pretrained(tmp_path)
    again = getattr(monoblock, name).from_pretrained(tmp_path)
    moved = getattr(monoblock, name).from_pretrained(tmp_path).to(torch.bfloat16).to("cpu")
    for made_ in (model, again, moved):
        assert made_.at("head_out").codes is made_.get_input_embeddings().codes
        assert made_.at("head_out").scale is made_.get_input_embeddings().scale
    rows = [t for t in load_file(tmp_path / "model.safetensors").values() if len(t) == model.spec.vocab]
    assert len(rows) == (3 if name == "MPNetForMaskedLM" else 2)  # codes, scale; MPNet's head has a bias
    assert moved.dtype == moved.get_input_embeddings()(torch.tensor([1])).dtype == torch.bfloat16
    assert moved.get_input_embeddings().scale.dtype == torch.float16  # a part of the format


def test_shards(packed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    same_bits(AutoModelForCausalLM.from_pretrained(tmp_path).hub_state_dict(), model.hub_state_dict())


def test_codes_are_memory_mapped(packed: Path) -> None:
    """What is one matrix here and in the file is not copied."""
    model = AutoModelForCausalLM.from_pretrained(packed)
    codes = model.at("down", 0).codes
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(packed) in line]
    spans = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in maps]
    assert any(begin <= codes.data_ptr() < end for begin, end in spans)


def test_plain_matrices_are_freed_while_quantising(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a model is packed, one plain matrix is there at a time."""
    storages: list[Any] = []
    original = formats.pack

    def pack(weight: torch.Tensor, bits: int, group: int) -> formats.QuantizedTensor:
        assert not any(reference() is not None for reference in storages)
        storages.append(weakref.ref(weight.untyped_storage()))
        return original(weight, bits, group)

    monkeypatch.setattr(formats, "pack", pack)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config="int8")
    assert len(storages) == 3 * 7 + 2


def test_dtypes_of_other_parameters(folder: Path, packed: Path) -> None:
    ids = torch.arange(5, 25)[None]
    for path, how in ((folder, {"quantization_config": "int8"}), (packed, {})):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **how)
        assert model.dtype == model(ids).logits.dtype == torch.bfloat16
        assert {t.dtype for m in model.modules() if isinstance(m, QuantizedMatrix) for t in m.buffers()} <= {
            torch.uint8,
            torch.float16,
        }


def test_state_dicts_by_both_names(packed: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    other = plain(MISTRAL).quantize("int4")
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    for state in (model.hub_state_dict(), model.state_dict()):
        other.load_state_dict(state)
        same_bits(other.hub_state_dict(), model.hub_state_dict())
    with pytest.raises(CheckpointError, match="which this model does not have"):
        other.load_state_dict(AutoModelForCausalLM.from_pretrained(folder).hub_state_dict())


def test_another_head_on_a_quantised_backbone(packed: Path, logs: pytest.LogCaptureFixture) -> None:
    """As with plain files: a missing head is initialised, unquantised; the one of the files is unused."""
    model: Any = MistralForSequenceClassification.from_pretrained(packed, num_labels=3)
    assert model.at("head_out").weight.shape == (3, 36)
    assert "newly initialised" in logs.text and "score.weight" in logs.text
    assert packed_names(model)["model.embed_tokens"] == 8
    assert model(torch.arange(5, 25)[None]).logits.isfinite().all()


# ---------------------------------------------------------------------------- use


def test_forms_of_quantization_config(folder: Path) -> None:
    forms: list[Any] = [
        "int4",
        {"bits": 4},
        {"method": "monoblock", "bits": 4, "group_size": 128},
        {"quant_method": "monoblock", "bits": 4, "group_size": 128},
        WeightOnlyConfig(bits=4),
    ]
    models = [AutoModelForCausalLM.from_pretrained(folder, quantization_config=way) for way in forms]
    assert {str(m.quantization_config) for m in models} == {str(WeightOnlyConfig(bits=4))}


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["lm_head"], {"lm_head"}),
        (["model.embed_tokens"], {"model.embed_tokens"}),
        (["k_proj"], {f"model.layers.{i}.self_attn.{x}_proj" for i in range(3) for x in "qkv"}),
        (
            ["mlp.down_proj", "q_proj"],
            {f"model.layers.{i}.mlp.down_proj" for i in range(3)}
            | {f"model.layers.{i}.self_attn.{x}_proj" for i in range(3) for x in "qkv"},
        ),
        (["layers.1.mlp"], {f"model.layers.1.mlp.{m}_proj" for m in ("gate", "up", "down")}),
    ],
)
def test_modules_that_are_not_converted(
    names: list[str], kept: set[str], folder: Path, tmp_path: Path
) -> None:
    """By a name, its end, or a part of it; what kernels take as one stays together."""
    how = WeightOnlyConfig(bits=8, modules_to_not_convert=names)
    everything = packed_names(AutoModelForCausalLM.from_pretrained(folder, quantization_config="int8"))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how)
    assert everything.keys() - packed_names(model).keys() == kept
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert packed_names(again) == packed_names(model)
    same_bits(again.hub_state_dict(), model.hub_state_dict())


@pytest.mark.parametrize("name", ["lm_head", "wte"])
def test_tied_matrices_are_excluded_by_both_names(name: str) -> None:
    model = plain("MptForCausalLM").quantize(WeightOnlyConfig(modules_to_not_convert=[name]))
    state = model.state_dict(keep_vars=True)
    assert state["lm_head.weight"] is state["transformer.wte.weight"]
    assert "transformer.blocks.0.ffn.up_proj" in packed_names(model)


def test_generation_and_caches(packed: Path) -> None:
    """Cached tokens are those of one pass over the whole text."""
    model = AutoModelForCausalLM.from_pretrained(packed).dequantize()  # the same numbers on the plain path
    native = AutoModelForCausalLM.from_pretrained(packed)
    ids = torch.arange(5, 17)[None]
    for each in (model, native):
        out = each.generate(ids, max_new_tokens=8, do_sample=False)
        slow = each.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
        assert torch.equal(out, slow)


def test_adapters_train_on_quantised_weights(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a low-rank adapter is that on the dequantised model; nothing else changes."""

    class Adapted(torch.nn.Module):
        def __init__(self, base: torch.nn.Module, width: int, out: int) -> None:
            super().__init__()
            self.base = base
            self.a = torch.nn.Parameter(torch.full((width, 2), 0.01))
            self.b = torch.nn.Parameter(torch.full((2, out), 0.02))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + x @ self.a @ self.b

    native_off(monkeypatch)
    gradients = []
    ids = torch.arange(5, 25)[None]
    for dequantize in (False, True):
        model = AutoModelForCausalLM.from_pretrained(packed)
        model = model.dequantize() if dequantize else model
        model.requires_grad_(False)
        attn = model.at("attention", 0)
        attn.q_proj = Adapted(attn.q_proj, 36, attn.q_proj.out_features)
        model(ids, labels=ids).loss.backward()
        gradients.append(attn.q_proj.a.grad)
    torch.testing.assert_close(
        *gradients, rtol=2e-2, atol=1e-5
    )  # fp32; up to 8-bit activations in the forward pass


def test_pipeline() -> None:
    made_ = pipeline("text-generation", model=str(demo.path()), model_kwargs={"quantization_config": "int8"})
    assert isinstance(made_.model.at("head_out"), QuantizedLinear)
    assert made_("def add(", max_new_tokens=4)[0]["generated_text"].startswith("def add(")


def test_footprint_and_device(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config="int4")
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    assert model.get_memory_footprint() == sum(t.numel() * t.element_size() for t in held.values())
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert "bits=4, group=128" in repr(model)


# ---------------------------------------------------------------------------- errors


def load(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **how)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("int3", '"int8", "int4", "lossless", a WeightOnlyConfig or a BitsAndBytesConfig, got .int3'),
        (True, "got True"),
        ({"bits": 3}, "bits must be 8, 4 or 12, got 3"),
        ({"bits": 4, "group_size": 32}, "group_size must be 128 or 64, got 32"),
        ({"bits": 4, "desc_act": True}, "no field 'desc_act'"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq' is not supported"),
        ({"bits": 8, "modules_to_not_convert": "lm_head"}, "must be a list of names"),
        ({"bits": 8, "modules_to_not_convert": ["lm_heat"]}, "'lm_heat', which is no module of this model"),
    ],
)
def test_wrong_arguments(folder: Path, config: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load(folder, quantization_config=config)


@pytest.mark.parametrize("method", ["hqq", "quanto", None])
def test_checkpoints_of_other_tools(folder: Path, method: str | None, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"bits": 4} | ({"quant_method": method} if method else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UnsupportedConfig, match=f"{method or 'bits'}.*load the checkpoint's unquantised weights"
    ):
        load(tmp_path)


def copied(source: Path, target: Path, **changes: Any) -> Path:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_quant_method_of_earlier_files(packed: Path, tmp_path: Path) -> None:
    how = {"quant_method": "monoblock", "bits": 4, "group_size": 128, "modules_to_not_convert": None}
    model = load(copied(packed, tmp_path, quantization_config=how))
    assert model.quantization_config == WeightOnlyConfig(bits=4)
    states = (model.state_dict(), load(packed).state_dict())
    assert all(torch.equal(one, states[1][name]) for name, one in states[0].items())


def test_mismatched_quantised_files(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json has no quantization_config"):
        load(copied(packed, tmp_path / "a", quantization_config=None))
    how = {"quant_method": "monoblock", "bits": 4, "group_size": 64}
    with pytest.raises(ShapeMismatch, match=r"do config\.json and the weights belong together"):
        load(copied(packed, tmp_path / "b", quantization_config=how))
    state = load_file(packed / "model.safetensors")
    del state["model.layers.0.self_attn.o_proj.weight.scale"]
    path = copied(packed, tmp_path / "c")
    from safetensors.torch import save_file

    save_file(state, path / "model.safetensors")
    with pytest.raises(MissingKeys, match=r"o_proj\.weight"):
        load(path)


def test_quantising_twice_raises(packed: Path) -> None:
    assert load(packed, quantization_config="int4").quantization_config == WeightOnlyConfig(bits=4)
    with pytest.raises(ValueError, match="already quantised"):
        load(packed, quantization_config="int8")
    model = load(packed)
    with pytest.raises(ValueError, match="quantised already: call its dequantize"):
        model.quantize("int8")
    with pytest.raises(ValueError, match="this model's are not"):
        model.dequantize().dequantize()


def test_quantised_embeddings_do_not_resize(packed: Path) -> None:
    model = load(packed)
    with pytest.raises(ValueError, match="resize first, then quantise"):
        model.resize_token_embeddings(100)
    assert model.dequantize().resize_token_embeddings(100).weight.shape == (100, 36)


def test_a_plain_model_saves_no_quantization_config(packed: Path, tmp_path: Path) -> None:
    """A config tells how weights are packed only where they are."""
    config = monoblock.AutoConfig.from_pretrained(packed)
    getattr(monoblock, MISTRAL)(config).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not packed_names(load(tmp_path))
