"""Runs the PyTorch examples of the pages of MPT, Mistral, OpenAI GPT, GPT Neo and Fuyu (tests/page_examples.py) and
compares their values with those in transformers; only the import line and the checkpoint differ.

tests/flax and tests/tf run the pages' examples of JAX and TensorFlow; the pipeline, 4-bit weights and the attention
mask visualizer have test files of their own.
"""

from __future__ import annotations

import functools
import io
import json
import re
import string
import sys
import types
from pathlib import Path
from typing import Any

import fuyu_tokenizer
import pytest
import torch
from helpers import randomised
from measure import assert_close
from page_examples import EXAMPLES, FUYU, run
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import monoblock
from monoblock.families import family_of

ATOL = 2e-5  # fp32 through the fused kernels


# The tokenizers train on the examples' strings, so that prompts are short; without the question's, whose answer must
# lie at the tokens that the example names.
TEXTS = [t for code in EXAMPLES.values() for t in re.findall(r'"([^"]+)"', code) if "Jim" not in t]


def gpt_neox(folder: Path) -> None:
    """Byte-level without merges, as MPT's but small: every byte is a token, so that the answer lies where it should."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    backend = byte_level(Tokenizer(models.BPE(vocab, [])))
    end = "<|endoftext|>"
    special = {"bos_token": end, "eos_token": end, "unk_token": end}
    monoblock.GPTNeoXTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def byte_level(backend: Tokenizer) -> Tokenizer:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def gpt2(folder: Path) -> None:
    """Byte-level BPE."""
    backend = byte_level(Tokenizer(models.BPE()))
    special, alphabet = ["<|endoftext|>"], pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    monoblock.GPT2Tokenizer(tokenizer_object=backend).save_pretrained(folder)


def openai_gpt(folder: Path) -> None:
    """Letters, each also as the last of its word, and two merges."""
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    tokens = ["<unk>", "\n</w>", *letters, *(letter + "</w>" for letter in letters), "do", "ca"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\nc a\n")
    monoblock.OpenAIGPTTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(
        folder
    )


def llama(folder: Path) -> None:
    """SentencePiece's BPE with byte fallback."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = [word for text in TEXTS for word in text.split()]
    backend.train_from_iterator(words, trainers.BpeTrainer(vocab_size=600, special_tokens=special))
    vocab = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in vocab["merges"]]
    monoblock.LlamaTokenizerFast(vocab=vocab["vocab"], merges=merges).save_pretrained(folder)


# model_type -> the function that saves its tokenizer, the fields of a tiny config.
TINY: dict[str, tuple[Any, dict[str, Any]]] = {
    "mpt": (
        gpt_neox,
        {"d_model": 36, "n_heads": 6, "n_layers": 2, "vocab_size": 260, "max_seq_len": 96, "eos_token_id": 0},
    ),
    "mistral": (
        llama,
        {
            "hidden_size": 36,
            "intermediate_size": 50,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "vocab_size": 600,
            "sliding_window": 11,
        },
    ),
    "openai-gpt": (
        openai_gpt,
        {"n_embd": 36, "n_layer": 2, "n_head": 6, "n_positions": 128, "vocab_size": 140},
    ),
    "gpt_neo": (
        gpt2,
        {
            "hidden_size": 36,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": 6,
            "vocab_size": 600,
            "window_size": 7,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "max_position_embeddings": 320,
        },
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a tiny model and its tokenizer for each class."""

    @functools.cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        family = family_of(name)
        assert family is not None
        tokenizer, fields = TINY[family.name]
        # No dropout is active in any example: loaded models are in evaluation mode.
        randomised(getattr(monoblock, name)(family.config(**fields))).save_pretrained(folder)
        tokenizer(folder)
        return folder

    return made


RUN = [t for t in EXAMPLES if not t.endswith("Config") and "FlashAttention" not in t]


@pytest.mark.parametrize("title", RUN)
def test_example(title: str, checkpoints: Any) -> None:
    folder = checkpoints(title.partition(",")[0])
    ours, theirs = run(EXAMPLES[title], "monoblock", folder), run(EXAMPLES[title], "transformers", folder)
    assert type(ours["model"]).__module__.startswith("monoblock")
    assert ours.keys() == theirs.keys()
    if "inputs" in ours:
        assert ours["inputs"]["input_ids"].tolist() == theirs["inputs"]["input_ids"].tolist()
    compared = 0
    # transformers initialises new rows randomly, very near the mean of the old ones, which they are here.
    bound = 1e-3 if "DoubleHeads" in title else ATOL
    for name in ours.keys() - {"gen_tokens", "gen_text"}:  # those are sampled
        a, b = ours[name], theirs[name]
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            assert torch.isfinite(a).all()
            assert_close(f"{title}: {name}", a, b, bound)
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b), name
        elif isinstance(a, int | float | str | list):
            assert a == b, name
        else:
            continue
        compared += 1
    assert compared > 0 or "generation" in title
    if "generation" in title:
        assert ours["gen_tokens"].shape[1] <= 320
        assert ours["gen_text"].startswith(ours["prompt"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="FlashAttention may be installed")
def test_flash_attention_needs_a_gpu(checkpoints: Any) -> None:
    """The example raises at its first line that needs one."""
    with pytest.raises(ImportError, match="attn_implementation='flash_attention_2' needs a CUDA GPU"):
        run(EXAMPLES["GPTNeoForCausalLM, FlashAttention"], "monoblock", checkpoints("GPTNeoForCausalLM"))


WEIGHTS = {
    "MptConfig": 50368 * 2048 + 24 * (12 * 2048**2 + 2 * 2048) + 2048,
    "MistralConfig": 7_110_660_096,
    "OpenAIGPTConfig": 116_534_784,
    "GPTNeoConfig": 1_315_575_808,
}


@pytest.mark.parametrize("title", WEIGHTS)
def test_example_of_a_config(title: str) -> None:
    with torch.device("meta"):  # the default configs have up to 7 billion weights
        names = run(EXAMPLES[title], "monoblock")
    assert names["configuration"] is names["model"].config
    assert names["model"].num_parameters() == WEIGHTS[title]


# ---------------------------------------------------------------------------- Fuyu


def photograph() -> bytes:
    from PIL import Image

    noise = torch.randint(0, 256, (70, 100, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise.numpy()).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def fuyu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuyu")
    tokenizer = monoblock.LlamaTokenizerFast(
        tokenizer_object=fuyu_tokenizer.backend(), **fuyu_tokenizer.SPECIAL
    )
    processor = monoblock.FuyuProcessor(image_processor=monoblock.FuyuImageProcessor(), tokenizer=tokenizer)
    processor.save_pretrained(folder)
    sizes = {"hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 6}
    speaker = tokenizer.convert_tokens_to_ids("|SPEAKER|")
    config = monoblock.FuyuConfig(**sizes, vocab_size=len(tokenizer), image_token_id=speaker)
    randomised(monoblock.FuyuForCausalLM(config)).save_pretrained(folder)
    return folder


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fake `requests` that returns the same photograph for every URL."""
    fake = types.ModuleType("requests")
    response = types.SimpleNamespace(content=photograph(), raw=io.BytesIO(photograph()))
    fake.__dict__["get"] = lambda *_, **__: response
    monkeypatch.setitem(sys.modules, "requests", fake)
    return fake


def test_fuyu_example(fuyu: Path, web: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    names = run(FUYU["FuyuForCausalLM"], "monoblock", fuyu)
    prompt, out = names["inputs"]["input_ids"], names["generated_ids"]
    assert torch.equal(out[:, : prompt.shape[1]], prompt)
    assert 1 <= out.shape[1] - prompt.shape[1] <= 7
    assert names["outputs"].logits.shape == (*prompt.shape, names["model"].config.vocab_size)
    assert len(names["generation_text"]) == 1
    assert repr(names["generation_text"]) in capsys.readouterr().out
    greedy = prompt
    for _ in range(out.shape[1] - prompt.shape[1]):
        inputs = {**names["inputs"].data, "input_ids": greedy, "attention_mask": torch.ones_like(greedy)}
        indices = inputs["image_patches_indices"]
        padding = torch.full((1, greedy.shape[1] - indices.shape[1]), -1)
        inputs["image_patches_indices"] = torch.cat((indices, padding), 1)
        greedy = torch.cat((greedy, names["model"](**inputs).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(greedy, out)


def test_fuyu_processor_example(fuyu: Path, web: Any) -> None:
    pytest.importorskip("PIL")
    modules = (
        "from transformers.models.fuyu.processing_fuyu import",
        "from transformers.models.fuyu.image_processing_fuyu import",
    )
    code = FUYU["FuyuProcessor"]
    for module in modules:
        code = code.replace(module, "from monoblock import")
    names = run(code, "monoblock", fuyu, io=io, requests=web)
    inputs = names["inputs_to_model"]
    assert {"input_ids", "attention_mask", "image_patches", "image_patches_indices"} <= set(inputs.keys())
    assert inputs["image_patches"][0].shape[-2:] == (3 * 4, 2700)


def test_fuyu_conversion_example(fuyu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`from_pretrained` of an instance. The default config has nine billion weights: they stay on the meta device."""
    code = FUYU["FuyuForCausalLM, conversion"]
    first, last = code.strip().rsplit("\n", 1)
    made = run(first, "monoblock")
    with torch.device("meta"):
        model = made["FuyuForCausalLM"](made["model_config"])
    assert model.num_parameters() == 9_408_238_592
    tiny = run(last.replace("FuyuForCausalLM(model_config)", "model"), "monoblock", fuyu, model=model)[
        "model"
    ]
    assert tiny.config.hidden_size == 48
    assert tiny.device.type == "cpu"


def test_every_example_of_the_pages_is_here(pytestconfig: pytest.Config) -> None:
    """Against copies of the pages, where these lie next to the repository."""
    pages = pytestconfig.rootpath.parent / "shared/seeds"
    have = {code.lstrip("\n") for code in EXAMPLES.values()}
    for page in sorted(pages.glob("00[01]_*.txt")):  # MPT's
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"```(?:py|python)\n(>>>.*?)```", text, re.DOTALL)) <= have
    elsewhere = r"TF[A-Z]|Flax|pipeline|BitsAndBytes|AttentionMaskVisualizer"
    for page in sorted([*pages.glob("002_*.txt"), *pages.glob("004_*.txt")]):
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith(">>> from transformers") and not re.search(elsewhere, line):
                assert any(line in code for code in have), line
