"""GGUF files as models: every type against the reference dequantiser, architectures, parts, tokenizers, metadata."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_files as files
import numpy as np
import pytest
import sentencepiece
import text_tokenizers
import torch
from documents import DOCS, blocks
from tiny_families import randomised
from tokenizers import pre_tokenizers

import monoblock
from monoblock import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from monoblock.backends.pytorch.quantization.modules import QuantizedMatrix
from monoblock.checkpoint.gguf.files import opened
from monoblock.checkpoint.gguf.header import read_gguf
from monoblock.cli.info import describe
from monoblock.cli.options import DownloadOptions
from monoblock.conversion.convert import Options, convert
from monoblock.errors import CheckpointError, HubError, UnsupportedConfig
from monoblock.tokenization.protobuf import read_model

torch.set_num_threads(1)

IDS = torch.arange(3, 15)[None]
PACKED = tuple(kind for kind in files.KINDS if kind not in ("IQ3_XXS", "TQ2_0"))
MISTRAL_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MPT_NAMES = {
    "attn_qkv": "attn.Wqkv",
    "attn_output": "attn.out_proj",
    "ffn_up": "ffn.up_proj",
    "ffn_down": "ffn.down_proj",
}


def path_of(name: str, mpt: bool) -> str:
    """The module of a tensor's ggml name."""
    block, _, own = name.removesuffix(".weight").rpartition(".")
    if not block:
        where = {"token_embd": "transformer.wte"} if mpt else {"token_embd": "model.embed_tokens"}
        return {**where, "output": "lm_head"}[own]
    number = block.split(".")[1]
    return (
        f"transformer.blocks.{number}.{MPT_NAMES[own]}"
        if mpt
        else f"model.layers.{number}.{MISTRAL_NAMES[own]}"
    )


def restored(name: str, weight: np.ndarray) -> np.ndarray:
    """The rows of q and k in transformers' order, one by one: pair p of a head is rows p and p + d / 2."""
    kind = name.split(".")[-2]
    if kind not in ("attn_q", "attn_k"):
        return weight
    half, made = files.HEAD_DIM // 2, np.empty_like(weight)
    for row in range(len(weight)):
        head, at = divmod(row, files.HEAD_DIM)
        made[head * files.HEAD_DIM + at // 2 + at % 2 * half] = weight[row]
    return made


def check_weights(
    model: Any, expected: dict[str, np.ndarray], *, mpt: bool = False, exact: bool = True
) -> None:
    """The model's matrices are the reference's, to the bit, or (`exact=False`) rounded to bfloat16."""
    for name, reference in expected.items():
        if reference.ndim < 2:
            continue
        module = model.get_submodule(path_of(name, mpt))
        packed = isinstance(module, QuantizedMatrix)
        found = module.dequantize() if packed else module.weight.detach()
        wanted = torch.from_numpy(reference if mpt else restored(name, reference))
        assert packed == exact, name
        assert torch.equal(found.float(), wanted if exact else wanted.bfloat16().float()), name


@pytest.mark.parametrize("kind", files.KINDS)
@pytest.mark.parametrize("architecture", ["llama", "mpt"])
def test_weights_of_every_type(kind: str, architecture: str, tmp_path: Path) -> None:
    mpt = architecture == "mpt"
    expected = files.write(tmp_path / "model.gguf", kind, architecture=architecture)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model.gguf")
    check_weights(model, expected, mpt=mpt, exact=kind in PACKED)
    assert model.dtype == torch.bfloat16 and model.decoding_path() == "native step"
    assert (model.quantization_config is not None) == (kind in PACKED)
    norm = model.transformer.norm_f.weight if mpt else model.model.norm.weight
    assert torch.equal(norm, torch.from_numpy(expected["output_norm.weight"]).bfloat16())
    tokens = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, IDS.shape[1] + 3)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_weights_that_are_not_quantised(kind: str, dtype: str, tmp_path: Path) -> None:
    expected = files.write(tmp_path / "model.gguf", kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model.gguf")
    assert model.dtype == getattr(torch, dtype) and model.quantization_config is None
    for name, reference in expected.items():
        if reference.ndim == 2:
            found = model.get_submodule(path_of(name, False)).weight.detach().float()
            assert torch.equal(found, torch.from_numpy(restored(name, reference))), name


MIXED = [
    # As files of several types are made: another type for v, and other pairs.
    {"attn_q": "Q4_K", "attn_k": "Q4_K", "attn_v": "Q6_K"},
    {"attn_q": "Q4_K", "attn_k": "Q5_K", "attn_v": "Q8_0"},
    {"attn_q": "Q2_K", "attn_k": "Q3_K", "attn_v": "Q4_0"},
    {"attn_q": "Q5_0", "attn_k": "Q5_1", "attn_v": "Q4_1"},
    {"attn_q": "IQ4_NL", "attn_k": "Q6_K", "attn_v": "Q8_0", "ffn_gate": "Q4_0", "ffn_up": "Q5_1"},
]


@pytest.mark.parametrize("mixed", MIXED)
def test_fused_matrices_of_several_types(mixed: dict[str, str], tmp_path: Path) -> None:
    """They are held in one format, in which each keeps its weights."""
    expected = files.write(tmp_path / "x.gguf", lambda name: mixed.get(name.split(".")[-2], "Q4_K"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x.gguf")
    check_weights(model, expected)
    assert model.decoding_path() == "native step"
    q, v = model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.v_proj
    assert q.quantized[3:] == v.quantized[3:]


def test_a_matrix_beside_one_that_is_not_quantised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = files.write(tmp_path / "x.gguf", lambda name: "F16" if "attn_v" in name else "Q8_0")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x.gguf")
    [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "4 quantised tensors (blk.0.attn_q.weight, ...)" in record.getMessage()
    attention = model.model.layers[0].self_attn
    wanted = torch.from_numpy(restored("blk.0.attn_q.weight", expected["blk.0.attn_q.weight"])).bfloat16()
    assert torch.equal(attention.q_proj.weight, wanted)
    assert isinstance(attention.o_proj, QuantizedMatrix) and model.decoding_path() == "native step"


# ---------------------------------------------------------------------------- the models' results


def converted(model: Any, path: Path, **metadata: Any) -> None:
    """Write a float32 model of this library as GGUF, with transformers' names in the table of the `gguf` package."""
    mpt = model.config.model_type == "mpt"
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MPT if mpt else gguf.MODEL_ARCH.LLAMA, 8)
    writer = gguf.GGUFWriter(path, "mpt" if mpt else "llama")
    config = model.config
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if mpt:
        writer.add_feed_forward_length(4 * config.d_model)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        writer.add_clamp_kqv(config.attn_config.clip_qkv)
        writer.add_max_alibi_bias(config.attn_config.alibi_bias_max)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for key, value in metadata.items():
        writer.add_key_value(key.replace("__", "."), *value)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        for kind, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", 0 if mpt else config.num_key_value_heads),
        ):
            if kind in name:
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        own = table.get_name(name.removesuffix(".weight"))
        assert own is not None, name
        if not (mpt and name == "lm_head.weight"):
            writer.add_tensor(f"{own}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mistral(**options: Any) -> Any:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "vocab_size": 40}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "rope_theta": 700.0}
    config = monoblock.MistralConfig(
        **sizes, **heads, rms_norm_eps=1e-4, **{"sliding_window": None} | options
    )
    return randomised(monoblock.MistralForCausalLM(config)).eval()


def mpt() -> Any:
    attention = {"clip_qkv": 0.9, "alibi_bias_max": 6}
    sizes = {"d_model": 48, "n_heads": 6, "n_layers": 3, "vocab_size": 40, "layer_norm_epsilon": 1e-4}
    config = monoblock.MptConfig(**sizes, attn_config=attention, learned_pos_emb=False)
    return randomised(monoblock.MptForCausalLM(config)).eval()


@pytest.mark.parametrize("make", [mistral, mpt])
@torch.no_grad()
def test_logits_of_a_converted_model(make: Callable[[], Any], tmp_path: Path) -> None:
    """RoPE's pairs, ALiBi, clipping, grouped heads, head dimension, eps: as in the model that was converted."""
    model = make()
    converted(model, tmp_path / "model.gguf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model.gguf")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    bare = AutoModel.from_pretrained(tmp_path / "model.gguf")
    states = model.base_model(IDS).last_hidden_state
    torch.testing.assert_close(bare(IDS).last_hidden_state, states, rtol=0, atol=1e-6)


@torch.no_grad()
def test_windows_and_scaled_rope(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    model = mistral(sliding_window=5, rope_scaling=scaling)
    number, text = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING
    converted(
        model,
        tmp_path / "model.gguf",
        llama__attention__sliding_window=(5, number),
        llama__rope__scaling__type=("yarn", text),
        llama__rope__scaling__factor=(4.0, gguf.GGUFValueType.FLOAT32),
        llama__rope__scaling__original_context_length=(16, number),
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model.gguf")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)


# What a matrix of each type takes, in bits per weight: codes and, by groups, scales and lows.
BITS = {"Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5.0, "Q5_K": 8.625, "Q6_K": 8.5625}
BITS |= {"Q4_K": 4.625, "Q3_K": 4.5625, "Q2_K": 5.125}


@pytest.mark.parametrize("kind", BITS)
def test_size_in_memory(kind: str, tmp_path: Path) -> None:
    files.write(tmp_path / "model.gguf", kind)
    down = AutoModelForCausalLM.from_pretrained(tmp_path / "model.gguf").model.layers[0].mlp.down_proj
    assert down.quantized.nbytes * 8 == BITS[kind] * down.rows * down.columns


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
@torch.no_grad()
def test_saved_and_loaded_again(kind: str, tmp_path: Path) -> None:
    expected = files.write(tmp_path / "model.gguf", kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model.gguf")
    model.save_pretrained(tmp_path / "folder")
    stored = json.loads((tmp_path / "folder/config.json").read_text())["quantization_config"]
    assert stored["source"] == "gguf" and "quant_method" not in stored
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    check_weights(again, expected)
    assert again.decoding_path() == "native step"
    plain = again.dequantize()
    check_weights(plain, expected, exact=False)
    # As JAX and TensorFlow need it, by NumPy.
    convert(tmp_path / "folder", tmp_path / "new", Options(dtype="float32"))
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    for name in (name for name, reference in expected.items() if reference.ndim == 2):
        found = new.get_submodule(path_of(name, False)).weight
        assert torch.equal(found, torch.from_numpy(restored(name, expected[name]))), name


@torch.no_grad()
def test_native_step_computes_with_the_weights_of_the_file(tmp_path: Path) -> None:
    files.write(tmp_path / "model.gguf", lambda name: "Q6_K" if "_v" in name else "Q4_K")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model.gguf", dtype=torch.float32)
    asked = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(IDS, **asked)
    assert model.decoding_path() == "native step"
    wanted = model.dequantize()(out.sequences).logits[:, IDS.shape[1] - 1 : -1]
    found = torch.stack(out.logits, 1)
    assert float((found - wanted).norm() / wanted.norm()) < 0.03  # activations in 8 bits: measured 0.008


# ---------------------------------------------------------------------------- where the file is


def test_folder_and_parts(tmp_path: Path) -> None:
    expected = files.write(tmp_path / "model.gguf", "Q8_0", parts=9)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for given in ({"gguf_file": names[0]}, {}):
        where = tmp_path if given else tmp_path / names[0]
        check_weights(AutoModelForCausalLM.from_pretrained(where, **given), expected)
    assert AutoConfig.from_pretrained(tmp_path, gguf_file=names[0]).model_type == "mistral"
    with pytest.raises(CheckpointError, match=f"give the first one, {names[0]}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / names[1])
    with pytest.raises(HubError, match=r"load it with gguf_file='model-00001-of-00003.gguf'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    second = (tmp_path / names[1]).read_bytes()
    (tmp_path / names[1]).write_bytes((tmp_path / names[2]).read_bytes())
    with pytest.raises(CheckpointError, match="is not part 2 of 3"):
        AutoModelForCausalLM.from_pretrained(tmp_path / names[0])
    (tmp_path / names[1]).unlink()
    with pytest.raises(HubError, match=f"has no {names[1]}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / names[0])
    (tmp_path / "alone.gguf").write_bytes(second)
    with pytest.raises(CheckpointError, match="is one of 3 parts"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "alone.gguf")


def test_documented_example(spm: Path, tmp_path: Path) -> None:
    """The one for GGUF in docs/formats.md, with the path of a tiny file."""
    example = blocks(DOCS / "formats.md", "python")[0]
    path = tmp_path / "model.gguf"
    files.write(path, "Q4_K", tokenizer=sentencepiece_metadata(spm))
    assert example.count("mistral-7b-instruct-q4_k_m.gguf") == 2
    scope: dict[str, Any] = {}
    exec(example.replace("mistral-7b-instruct-q4_k_m.gguf", str(path)), scope)
    assert scope["model"].decoding_path() == "native step" and scope["tokenizer"]("a").input_ids[0] == 1


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    files.write(tmp_path / "model.gguf", "Q8_0")
    load = AutoModelForCausalLM.from_pretrained
    with pytest.raises(ValueError, match="the name of a file"):
        load(tmp_path, gguf_file="../model.gguf")
    with pytest.raises(ValueError, match="is for folders and models on the hub"):
        load(tmp_path / "model.gguf", gguf_file="model.gguf")
    with pytest.raises(ValueError, match="already quantised, by WeightOnlyConfig"):
        load(tmp_path / "model.gguf", quantization_config="int4")
    with pytest.raises(ValueError, match="variant='fp16' is for folders"):
        load(tmp_path / "model.gguf", variant="fp16")
    with pytest.raises(HubError, match=r"has no other.gguf"):
        load(tmp_path, gguf_file="other.gguf")


def test_quantise_what_a_file_has_in_16_bits(tmp_path: Path) -> None:
    files.write(tmp_path / "model.gguf", "BF16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model.gguf", quantization_config="int8")
    assert model.quantization_config.source is None and model.decoding_path() == "native step"


def test_info(tmp_path: Path) -> None:
    files.write(tmp_path / "model.gguf", lambda name: "Q6_K" if "_v" in name else "Q4_K")
    found = describe(str(tmp_path / "model.gguf"), DownloadOptions())
    assert found["family"] == "mistral" and found["files"].keys() == {"model.gguf"}
    assert found["stored"].keys() == {"Q4_K", "Q6_K", "F32"}
    assert found["stored"]["Q6_K"] == files.LAYERS * files.KV_HEADS * files.HEAD_DIM * files.WIDTH
    assert found["quantization"]["summary"].startswith("by GGUF")
    assert describe(str(tmp_path), DownloadOptions(gguf_file="model.gguf")) == found


# ---------------------------------------------------------------------------- metadata


def rewritten(path: Path, change: Callable[[gguf.GGUFWriter], None], *left_out: str, **options: Any) -> None:
    """The file with other metadata."""

    class Writer(gguf.GGUFWriter):
        def add_key_value(self, key: str, *args: Any, **kwargs: Any) -> None:
            if key not in left_out:
                super().add_key_value(key, *args, **kwargs)

    original, gguf.GGUFWriter = gguf.GGUFWriter, Writer
    try:
        metadata = options.pop("metadata", files.mistral_metadata)
        files.write(path, "F16", metadata=lambda w: (metadata(w), change(w)), **options)
    finally:
        gguf.GGUFWriter = original


@pytest.mark.parametrize(
    "key",
    [
        *("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"),
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_missing_metadata_are_named(key: str, tmp_path: Path) -> None:
    rewritten(tmp_path / "x.gguf", lambda _: None, f"llama.{key}")
    with pytest.raises(CheckpointError, match=f"lacks llama.{key}"):
        AutoConfig.from_pretrained(tmp_path / "x.gguf")


def test_defaults_of_llama_cpp_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    missing = ("llama.rope.freq_base", "llama.attention.head_count_kv")
    rewritten(tmp_path / "x.gguf", lambda _: None, *missing)
    config = AutoConfig.from_pretrained(tmp_path / "x.gguf")
    assert config.rope_theta == 10000 and config.num_key_value_heads == files.HEADS
    for key in missing:
        assert sum(f"lacks {key}" in record.getMessage() for record in caplog.records) == 1


REFUSED = {
    "llama.expert_count=8": lambda w: w.add_expert_count(8),
    "llama.attention.temperature_scale": lambda w: w.add_key_value(
        "llama.attention.temperature_scale", 0.1, gguf.GGUFValueType.FLOAT32
    ),
    "llama.rope.scaling.type='longrope'": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
    "llama.attention.value_length=32": lambda w: w.add_value_length(32),
    "llama.rope.scaling.attn_factor=2.0": lambda w: (
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
        w.add_rope_scaling_factor(2.0),
        w.add_rope_scaling_orig_ctx_len(8),
        w.add_rope_scaling_attn_factors(2.0),
    ),
}


@pytest.mark.parametrize("named", REFUSED)
def test_options_that_are_not_supported(named: str, tmp_path: Path) -> None:
    rewritten(tmp_path / "x.gguf", REFUSED[named])
    with pytest.raises(UnsupportedConfig, match=named):
        AutoConfig.from_pretrained(tmp_path / "x.gguf")


def test_architectures_that_are_not_supported(tmp_path: Path) -> None:
    files.write(tmp_path / "x.gguf", "F16", architecture="qwen2")
    with pytest.raises(
        UnsupportedConfig, match=r"general.architecture='qwen2' is not supported; known are llama"
    ):
        AutoConfig.from_pretrained(tmp_path / "x.gguf")
    files.write(tmp_path / "y.gguf", "Q8_0", architecture="mistral3")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "y.gguf").config.model_type == "mistral"
    shapes = files.mistral_shapes() | {"blk.0.attn_q.bias": (256,)}
    files.write(tmp_path / "z.gguf", "Q8_0", shapes=shapes)
    with pytest.raises(
        CheckpointError, match=r"model.layers.0.self_attn.q_proj.bias, which the config does not allow for"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "z.gguf")
    shapes = files.mistral_shapes() | {"rope_freqs.weight": (32,)}
    files.write(tmp_path / "z.gguf", "Q8_0", shapes=shapes)
    with pytest.raises(UnsupportedConfig, match=r"has rope_freqs.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "z.gguf", strict=False)


def test_generation_config(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(7)
        writer.add_pad_token_id(0)
        writer.add_key_value("general.sampling.temp", 0.5, gguf.GGUFValueType.FLOAT32)
        writer.add_key_value("general.sampling.top_k", 3, gguf.GGUFValueType.INT32)

    rewritten(tmp_path / "x.gguf", change)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "x.gguf").generation_config
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, [2, 7], 0)
    assert (found.do_sample, found.temperature, found.top_k) == (True, 0.5, 3)


# ---------------------------------------------------------------------------- tokenizers

TEXTS = [
    "the quick brown fox",
    " two  spaces",
    "Grüße 🎉 ☃",
    "a\n\tb",
    "",
    " ",
    "</s> in a text",
    "f(n): 1 + 23",
]
SENTENCES = ["the quick brown fox jumps over the lazy dog", "Grüße aus Köln 🎉", "def f(n): return n + 1"]
TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model as Llama's: BPE, byte fallback, user-defined pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 50),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["[INST]"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def sentencepiece_metadata(path: Path, *unused: str) -> Callable[[gguf.GGUFWriter], None]:
    model = read_model(path)

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([*model.pieces, *unused])
        writer.add_token_scores([*model.scores, *(-1000.0 for _ in unused)])
        writer.add_token_types([*model.types, *(gguf.TokenType.UNUSED for _ in unused)])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        writer.add_chat_template(TEMPLATE)

    return write


def test_sentencepiece_tokenizer(spm: Path, tmp_path: Path) -> None:
    files.write(tmp_path / "x.gguf", "F16", tokenizer=sentencepiece_metadata(spm, "[PAD330]"))
    found = AutoTokenizer.from_pretrained(tmp_path / "x.gguf")
    reference: Any = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    ours = monoblock.LlamaTokenizer.from_pretrained(spm)
    assert type(found) is type(ours)
    for text in TEXTS:
        assert found(text).input_ids == ours(text).input_ids, text
        assert found.decode(found(text).input_ids) == ours.decode(ours(text).input_ids), text
        if "</s>" not in text:
            assert found(text, add_special_tokens=False).input_ids == reference.encode(text), text
    assert (found.bos_token, found.eos_token, found.unk_token, found.pad_token) == (
        "<s>",
        "</s>",
        "<unk>",
        None,
    )
    assert found("[INST] a").input_ids[1:] == ours("[INST] a").input_ids[1:]
    assert (
        "[PAD330]" in found.get_vocab() and found.get_vocab()["[PAD330]"] not in found("[PAD330]").input_ids
    )
    chat = [{"role": "user", "content": "hi"}]
    assert found.apply_chat_template(chat, tokenize=False) == "[user] hi\n"
    by_name = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf", padding_side="right")
    assert by_name("a b").input_ids == found("a b").input_ids and by_name.padding_side == "right"
    found.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [again(text).input_ids for text in TEXTS] == [found(text).input_ids for text in TEXTS]


def byte_level() -> monoblock.PreTrainedTokenizerFast:
    backend = text_tokenizers.byte_level("the", " quick", " brown", "Grüße", "1 + 23", "return")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return monoblock.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def byte_level_metadata(pre: str | None = "gpt-2", **changes: Any) -> Callable[[gguf.GGUFWriter], None]:
    backend = byte_level().backend_tokenizer
    vocab = backend.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    types = [gguf.TokenType.CONTROL if token == "<eos>" else gguf.TokenType.NORMAL for token in tokens]
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    given = {"tokens": tokens, "types": types, "merges": merges, "special": vocab["<eos>"]} | changes

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(given.get("model", "gpt2"))
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(given["tokens"])
        writer.add_token_types(given["types"])
        writer.add_token_merges(given["merges"])
        writer.add_bos_token_id(given.get("bos", given["special"]))
        writer.add_eos_token_id(given["special"])

    return write


def test_byte_level_tokenizer(tmp_path: Path) -> None:
    files.write(tmp_path / "x.gguf", "F16", tokenizer=byte_level_metadata())
    found, wanted = AutoTokenizer.from_pretrained(tmp_path / "x.gguf"), byte_level()
    for text in [*TEXTS, "a<eos>b"]:
        assert found(text).input_ids == wanted(text).input_ids, text
        assert found.decode(found(text).input_ids) == text
    assert found.bos_token_id == found.eos_token_id == wanted.eos_token_id
    assert found.pad_token is None and found.unk_token is None and found.all_special_tokens == ["<eos>"]


def test_pre_tokenizers_split_as_their_patterns(tmp_path: Path) -> None:
    """Tekken splits digits one by one and words at capitals, Llama 3 digits by threes."""
    words = {
        "gpt-2": ["ab", "1234", "!"],
        "tekken": ["ab", "1", "2", "3", "4", "!"],
        "llama-bpe": ["ab", "123", "4", "!"],
    }
    for pre, expected in words.items():
        files.write(tmp_path / "x.gguf", "F16", tokenizer=byte_level_metadata(pre))
        found = AutoTokenizer.from_pretrained(tmp_path / "x.gguf")
        split = found.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab1234!")
        assert [word for word, _ in split] == expected
        assert (found("a").input_ids[0] == found.bos_token_id) == (pre != "gpt-2")


def test_tekken_pattern_is_that_of_the_published_file() -> None:
    common = pytest.importorskip("mistral_common")
    from monoblock.tokenization.gguf import PATTERNS

    path = next((Path(common.__file__).parent / "data").glob("tekken*.json"))
    assert json.loads(path.read_text())["config"]["pattern"] == PATTERNS["tekken"][0]


BROKEN = {
    "lacks tokenizer.ggml.pre": byte_level_metadata(None),
    "tokenizer.ggml.pre='qwen2' is not supported": byte_level_metadata("qwen2"),
    "tokenizer.ggml.model='bert' is not supported": byte_level_metadata(model="bert"),
    "token_type has 2 entries": byte_level_metadata(types=[1, 1]),
    "bos_token_id=999, but there are": byte_level_metadata(bos=999),
    "is not two tokens and a space": byte_level_metadata(merges=["a"]),
    "is rejected by the tokenizers library": byte_level_metadata(merges=["zz yy"]),
    "occurs twice": byte_level_metadata(tokens=["a", "a"], types=[1, 1], merges=[], special=0),
    "has an empty token": byte_level_metadata(tokens=["a", ""], types=[1, 1], merges=[], special=0),
}


@pytest.mark.parametrize("named", BROKEN)
def test_tokenizers_that_are_refused(named: str, tmp_path: Path) -> None:
    files.write(tmp_path / "x.gguf", "F16", tokenizer=BROKEN[named])
    with pytest.raises((CheckpointError, UnsupportedConfig), match=named):
        AutoTokenizer.from_pretrained(tmp_path / "x.gguf")


# ---------------------------------------------------------------------------- damaged files


def fields_of(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def test_header_is_that_of_the_package(spm: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    files.write(path, "Q5_K", tokenizer=sentencepiece_metadata(spm))
    header, reader = read_gguf(path), gguf.GGUFReader(path)
    assert header.metadata == fields_of(path)
    for tensor in reader.tensors:
        own = header.tensors[tensor.name]
        assert own.type == tensor.tensor_type.name and own.shape == tuple(tensor.shape.tolist()[::-1])
        assert (own.begin, own.end - own.begin) == (tensor.data_offset, tensor.n_bytes)
    assert len(header.tensors) == len(reader.tensors)


def patched(path: Path, at: int, form: str, value: int) -> Path:
    data = bytearray(path.read_bytes())
    size = {"I": 4, "Q": 8}[form]
    data[at : at + size] = value.to_bytes(size, "little")
    path.write_bytes(data)
    return path


def test_headers_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    files.write(path, "Q8_0")
    good = path.read_bytes()
    key = good.index(b"llama.context_length")
    name = good.index(b"token_embd.weight")
    at = name + len(b"token_embd.weight")  # dimensions, type, offset
    cases = [
        (0, "I", 0, "no GGUF file"),
        (4, "I", 1, "it has version 1"),
        (4, "I", 3 << 24, "it is big-endian"),
        (8, "Q", 1 << 60, "tensors and"),
        (16, "Q", 1 << 40, "metadata entries"),
        (key - 8, "Q", 1 << 63, "a text of"),
        (key + 20, "I", 77, "unknown type 77"),
        (key + 20, "I", 9, "array|elements"),
        (name - 8, "Q", 300, "a text of 300 bytes"),
        (at, "I", 9, "9 dimensions"),
        (at + 4, "Q", 1 << 62, "dimensions"),
        (at + 4, "Q", 1 << 39, "is truncated"),
        (at + 4, "Q", 33, "rows of 33 weights"),
        (at + 20, "I", 99, "unknown type 99"),
        (at + 24, "Q", 7, "not aligned"),
        (at + 24, "Q", 1 << 50, "is truncated"),
        (at + 24, "Q", 1 << 14, "overlaps"),
    ]
    for where, form, value, message in cases:
        path.write_bytes(good)
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(patched(path, where, form, value))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K"])
def test_scales_that_are_not_finite(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.gguf"
    files.write(path, kind)
    begin = read_gguf(path).tensors["blk.0.ffn_down.weight"].begin
    data = bytearray(path.read_bytes())
    for bits in (0x7C00, 0x7E00):  # infinite, NaN
        data[begin : begin + 2] = bits.to_bytes(2, "little")
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="scales that are not finite"):
            AutoModelForCausalLM.from_pretrained(path)


def test_truncated_and_changed_files_end_in_one_sentence(spm: Path, tmp_path: Path) -> None:
    """A file that is cut anywhere, or has other bytes in its header, loads or ends in an error of this library."""
    path = tmp_path / "x.gguf"
    files.write(path, "Q4_0", tokenizer=sentencepiece_metadata(spm))
    good, random = path.read_bytes(), np.random.default_rng(0)
    header = min(tensor.begin for tensor in read_gguf(path).tensors.values())
    for end in [0, 3, 4, 20, 24, *random.integers(25, len(good), 60)]:
        path.write_bytes(good[:end])
        with pytest.raises((CheckpointError, HubError)):
            AutoConfig.from_pretrained(path)
            AutoModelForCausalLM.from_pretrained(path)
    for _ in range(150):
        data = bytearray(good)
        for at in random.integers(0, header, random.integers(1, 4)):
            data[at] = random.integers(0, 256)
        path.write_bytes(data)
        for load in (
            AutoTokenizer.from_pretrained,
            lambda p: opened((p,)).kinds(),
            AutoConfig.from_pretrained,
        ):
            try:
                load(path)
            except (CheckpointError, UnsupportedConfig, HubError, monoblock.errors.FieldError) as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
