"""GGUF files that are written: weights, tokenizer, metadata, and what has no form in GGUF."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import text_tokenizers
import torch
from tiny_families import randomised
from tokenizers import normalizers, pre_tokenizers

import monoblock
from monoblock import AutoModelForCausalLM, AutoTokenizer, demo
from monoblock.backends.pytorch.quantization.modules import QuantizedMatrix
from monoblock.conversion.gguf import KINDS, GgufOptions, convert_to_gguf
from monoblock.conversion.k_quants import encode_q4_k
from monoblock.errors import CheckpointError, UnsupportedConfig
from monoblock.tokenization.gguf_metadata import tokenizer_metadata

torch.set_num_threads(1)

SENTENCES = ["the quick brown fox jumps over the lazy dog", "Grüße aus Köln 🎉", "def f(n): return n + 1"]
TEXTS = [*SENTENCES, " two  spaces", "a\n\tb", "", "[INST] x", "1234 😀"]
TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
IDS = torch.arange(5, 17)[None]


def save_mistral(folder: Path, **options: Any) -> Any:
    """A tiny Mistral with a SentencePiece tokenizer."""
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
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = monoblock.LlamaTokenizer.from_pretrained(folder / "tokenizer.model", chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 352}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rope_theta": 3000.0}
    given = {**sizes, **heads, "sliding_window": None, "rms_norm_eps": 1e-5} | options
    made = randomised(monoblock.MistralForCausalLM(monoblock.MistralConfig(**given)))
    made.save_pretrained(folder)
    return made.eval()


def save_mpt(folder: Path, attention: dict[str, Any] | None = None, **options: Any) -> Any:
    """A tiny MPT with a tokenizer as GPT-NeoX's."""
    backend = text_tokenizers.byte_level("the", " quick", " brown", "Grüße", "1 + 23", "return")
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    folder.mkdir()
    monoblock.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    attn_config = {"clip_qkv": 3.0, "alibi_bias_max": 6} | (attention or {})
    sizes = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 352, "learned_pos_emb": False}
    made = randomised(
        monoblock.MptForCausalLM(monoblock.MptConfig(**sizes | options, attn_config=attn_config))
    )
    made.save_pretrained(folder)
    return made.eval()


def expected(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The weights after rounding to a type, by the package's quantiser."""
    if kind in ("f16", "bf16"):
        return weight.to(torch.float16 if kind == "f16" else torch.bfloat16).float()
    own = gguf.GGMLQuantizationType[kind.upper()]
    if kind == "q4_k":
        return torch.from_numpy(gguf.dequantize(encode_q4_k(weight.detach().numpy()), own))
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), own), own))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("save", [save_mistral, save_mpt])
@torch.no_grad()
def test_written_and_read_back(save: Any, kind: str, tmp_path: Path) -> None:
    model = save(tmp_path / "in")
    result = convert_to_gguf(tmp_path / "in", tmp_path / "out.gguf", GgufOptions(kind=kind))
    assert (result.target_format, result.dtype, result.files) == ("gguf", kind, ("out.gguf",))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out.gguf")
    for name, module in again.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Embedding | QuantizedMatrix):
            continue
        packed = isinstance(module, QuantizedMatrix)
        found = module.dequantize() if packed else module.weight.float()
        outside = name.endswith(("lm_head", "embed_tokens", "wte"))
        whole = module.in_features % 256 == 0 if kind == "q4_k" and not outside else True
        own = "q8_0" if kind.startswith("q4") and (outside or not whole) else kind
        assert torch.equal(found, expected(model.get_submodule(name).weight, own)), name
        assert packed == kind.startswith("q"), name
    norm = [m for n, m in again.named_modules() if n.endswith(("norm", "norm_f"))][-1]
    assert norm.weight.dtype == again.dtype
    # Random weights are the hardest; measured up to 0.001, 0.01, 0.05 and 0.39, with activations in 8 bits.
    close = {"f16": 0.01, "bf16": 0.03, "q8_0": 0.08, "q4_0": 0.6, "q4_k": 0.5}[kind]
    wanted, got = model(IDS).logits, again.float()(IDS).logits
    assert float((got - wanted).norm() / wanted.norm()) < close
    before, after = (
        AutoTokenizer.from_pretrained(tmp_path / "in"),
        AutoTokenizer.from_pretrained(tmp_path / "out.gguf"),
    )
    for text in TEXTS:
        assert after(text).input_ids == before(text).input_ids, text
        assert after.decode(after(text).input_ids) == before.decode(before(text).input_ids), text
    assert after.chat_template == before.chat_template
    assert (after.bos_token, after.eos_token) == (before.bos_token, before.eos_token)


@pytest.mark.parametrize("shape", ["normal", "tails", "shifted", "negative", "zero", "one"])
def test_encoder_of_q4_k(shape: str) -> None:
    """Read by the package's dequantiser; closer than Q4_0, except where that is exact."""
    random = np.random.default_rng(0)
    weights = {
        "normal": random.standard_normal((16, 512)),
        "tails": random.standard_t(4, (16, 512)),
        "shifted": random.standard_normal((16, 512)) + 3,
        "negative": -np.abs(random.standard_normal((16, 512))),
        "zero": np.zeros((16, 512)),
        "one": np.full((16, 512), 0.3),
    }[shape].astype(np.float32)
    kinds = gguf.GGMLQuantizationType
    found = gguf.dequantize(encode_q4_k(weights), kinds.Q4_K)
    coarse = gguf.dequantize(gguf.quantize(weights, kinds.Q4_0), kinds.Q4_0)
    error, other = (float(np.sqrt(np.mean((weights - x) ** 2))) for x in (found, coarse))
    if shape == "one":
        assert error < 0.002  # 6 bits of the scale
    else:
        assert (
            error
            <= {"normal": 0.85, "tails": 0.78, "shifted": 0.5, "negative": 0.5, "zero": 1}[shape] * other
        )


@torch.no_grad()
def test_q4_k_in_a_file(tmp_path: Path) -> None:
    """Matrices of 256 inputs; those of 96 are Q8_0."""
    model = save_mistral(tmp_path / "in", hidden_size=256, num_attention_heads=8)
    convert_to_gguf(tmp_path / "in", tmp_path / "out.gguf", GgufOptions(kind="q4_k"))
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {kinds[f"blk.0.{name}.weight"] for name in ("attn_q", "attn_v", "ffn_up")} == {"Q4_K"}
    assert kinds["blk.0.ffn_down.weight"] == kinds["output.weight"] == "Q8_0"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out.gguf")
    found = again.model.layers[0].mlp.up_proj.dequantize()
    wanted = model.model.layers[0].mlp.up_proj.weight
    coded = gguf.dequantize(encode_q4_k(wanted.numpy()), gguf.GGMLQuantizationType.Q4_K)
    assert torch.equal(found, torch.from_numpy(coded))
    assert float((found - wanted).norm() / wanted.norm()) < 0.08  # 4.5 bits


def test_metadata(tmp_path: Path) -> None:
    save_mistral(tmp_path / "in", rope_scaling={"rope_type": "linear", "factor": 2.0}, sliding_window=9)
    path = tmp_path / "in/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 5]}))
    convert_to_gguf(tmp_path / "in", tmp_path / "sub/out.gguf", GgufOptions(kind="q8_0"))
    reader = gguf.GGUFReader(tmp_path / "sub/out.gguf")
    found = {name: field.contents() for name, field in reader.fields.items()}
    assert found["general.architecture"] == "llama" and found["general.file_type"] == 7
    assert found["llama.rope.scaling.type"] == "linear" and found["llama.attention.sliding_window"] == 9
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.eot_token_id"] == 5
    assert found["tokenizer.ggml.add_bos_token"] is True and len(found["tokenizer.ggml.tokens"]) == 352
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q8_0" and kinds["output_norm.weight"] == "F32"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sub/out.gguf")
    assert again.config.sliding_window == 9 and again.generation_config.eos_token_id == [2, 5]


@torch.no_grad()
def test_options_of_mpt(tmp_path: Path) -> None:
    """Learned positions, biases, grouped heads, q/k norms, separate matrices."""
    attention = {"alibi": False, "qk_ln": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2}
    options = {"learned_pos_emb": True, "no_bias": False, "max_seq_len": 48, "expansion_ratio": 3}
    model = save_mpt(tmp_path / "in", attention | {"fused_qkv": False}, **options)
    convert_to_gguf(tmp_path / "in", tmp_path / "out.gguf", GgufOptions(kind="bf16"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out.gguf", dtype=torch.float32)
    assert again.spec.positions == model.spec.positions and again.spec.attention.kv_heads == 2
    wanted = model(IDS).logits
    assert float((again(IDS).logits - wanted).norm() / wanted.norm()) < 0.03


def test_rows_that_are_no_blocks(tmp_path: Path) -> None:
    save_mistral(tmp_path / "in", intermediate_size=72)
    convert_to_gguf(tmp_path / "in", tmp_path / "out.gguf", GgufOptions(kind="q4_0"))
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.1.ffn_down.weight"] == "F16" and kinds["blk.1.ffn_up.weight"] == "Q4_0"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out.gguf").decoding_path() == "native step"


def test_models_without_a_form(tmp_path: Path) -> None:
    cases = [
        (save_mpt, {"attention": {"softmax_scale": 0.5}}, "attention.scale is 0.5"),
        (save_mpt, {"logit_scale": 0.5}, "logit_scale is 0.5"),
        (save_mistral, {"hidden_act": "gelu"}, "mlp.act is gelu"),
        (
            save_mistral,
            {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
            "windows is",
        ),
        (save_mistral, {"vocab_size": 300}, "but the model has 300 embeddings"),
    ]
    for number, (save, options, message) in enumerate(cases):
        folder = tmp_path / str(number)
        save(folder, **options)
        with pytest.raises(UnsupportedConfig, match=message):
            convert_to_gguf(folder, tmp_path / "out.gguf", GgufOptions(kind="f16"))
    with pytest.raises(UnsupportedConfig, match="its pre-tokenizer has no name there"):
        convert_to_gguf(demo.path(), tmp_path / "out.gguf", GgufOptions(kind="f16"))
    model = monoblock.MPNetForMaskedLM(
        monoblock.MPNetConfig(hidden_size=12, num_attention_heads=2, num_hidden_layers=1)
    )
    model.save_pretrained(tmp_path / "mpnet")
    with pytest.raises(UnsupportedConfig, match="only causal mistral and mpt models can"):
        convert_to_gguf(tmp_path / "mpnet", tmp_path / "out.gguf", GgufOptions(kind="f16"))
    with pytest.raises(ValueError, match="kind='q2': expected one of f16"):
        convert_to_gguf(tmp_path / "0", tmp_path / "out.gguf", GgufOptions(kind="q2"))
    assert not (tmp_path / "out.gguf").exists()


def test_a_published_tokenizer() -> None:
    """Mistral's first one, whose vocabulary has user-defined and unused spellings."""
    common = pytest.importorskip("mistral_common")
    path = next((Path(common.__file__).parent / "data").glob("tokenizer.model.v1"))
    found = tokenizer_metadata(monoblock.LlamaTokenizer.from_pretrained(path), 32000)
    assert found["tokenizer.ggml.tokens"][:3] == ["<unk>", "<s>", "</s>"]
    assert found["tokenizer.ggml.add_space_prefix"] and found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_mistral(tmp_path / "in")
    target = tmp_path / "out.gguf"
    target.write_bytes(b"old")
    with pytest.raises(CheckpointError, match="exists: choose another name"):
        convert_to_gguf(tmp_path / "in", target, GgufOptions(kind="q8_0"))
    calls: list[Any] = []

    def fail(array: np.ndarray, kind: Any) -> np.ndarray:
        calls.append(kind)
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "quantize", fail)
        with pytest.raises(CheckpointError, match="failed: no space left"):
            convert_to_gguf(tmp_path / "in", target, GgufOptions(kind="q8_0", force=True))
    assert calls and target.read_bytes() == b"old"
    convert_to_gguf(tmp_path / "in", target, GgufOptions(kind="q8_0", force=True))
    assert target.read_bytes()[:4] == b"GGUF"
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["in", "out.gguf"]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "monoblock.cli", "convert", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_command(tmp_path: Path) -> None:
    save_mistral(tmp_path / "in")
    source, target = str(tmp_path / "in"), str(tmp_path / "out.gguf")
    done = run(source, target, "--type", "q8_0")
    assert done.returncode == 0 and "to: gguf" in done.stdout, done.stderr
    assert AutoModelForCausalLM.from_pretrained(target).quantization_config.bits == 8
    for arguments, message in [
        ((source, str(tmp_path / "x.gguf")), "whose type is needed"),
        ((source, str(tmp_path / "folder"), "--type", "f16"), "is for GGUF files"),
        ((source, str(tmp_path / "x.gguf"), "--type", "f16", "--check"), "--check is for folders"),
    ]:
        refused = run(*arguments)
        assert refused.returncode == 2 and message in " ".join(refused.stderr.split()), refused.stderr
