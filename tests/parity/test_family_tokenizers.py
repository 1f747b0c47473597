"""The families' tokenizers against transformers, SentencePiece and mistral-common, on 10,000 lines of mixed text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from mixed_text import mixed_lines

from monoblock import (
    AutoTokenizer,
    GPT2TokenizerFast,
    LlamaTokenizer,
    MPNetTokenizer,
    OpenAIGPTTokenizer,
)

transformers = pytest.importorskip("transformers")

DATA = Path(__file__).parents[2] / "../shared/data"
LINES = mixed_lines()


def data(name: str) -> Path:
    if not (path := DATA / name).exists():
        pytest.skip(f"the published tokenizer {name} is not available")
    return path


@cache
def mistral(name: str) -> Path:
    """A tokenizer file inside mistral-common."""
    package = pytest.importorskip("mistral_common")
    return Path(package.__file__).parent / "data" / name


def assert_equal(mine: Sequence[Any], theirs: Sequence[Any], lines: Sequence[str] = LINES) -> None:
    assert len(mine) == len(theirs) == len(lines)
    wrong = [index for index, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]]
    if wrong:
        first = wrong[0]
        raise AssertionError(
            f"{len(wrong)} of {len(lines)} lines differ: {lines[first]!r}\n{mine[first]}\n{theirs[first]}"
        )


def ids(tokenizer: Any, **options: Any) -> list[list[int]]:
    return tokenizer(LINES, **options)["input_ids"]


def compare(mine: Any, theirs: Any) -> list[list[int]]:
    """Ids and decoded text of all lines, and the ids of pairs."""
    rows = ids(mine, verbose=False)
    assert_equal(rows, ids(theirs))
    for skip in (False, True):
        decoded = [tokenizer.batch_decode(rows, skip_special_tokens=skip) for tokenizer in (mine, theirs)]
        assert_equal(*decoded)
    first, second = LINES[:500], LINES[500:1000]
    pairs = [
        t(first, second, return_offsets_mapping=True, return_token_type_ids=True) for t in (mine, theirs)
    ]
    for key in pairs[0]:
        assert_equal(pairs[0][key], pairs[1][key], first)
    return rows


def mpnet_vocab(folder: Path) -> Path:
    """The vocab.txt of the hub, derived from the upstream dict.txt."""
    lines = data("mpnet/dict.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(line.rpartition(" ")[0] for line in lines), "<mask>"]
    assert len(tokens) == 30_527
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return folder


# --- transformers


def test_gpt2_is_lossless() -> None:
    folder = data("gpt2")
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder)
    mine = GPT2TokenizerFast.from_pretrained(folder)
    assert_equal(mine.batch_decode(compare(mine, theirs)), LINES)
    assert AutoTokenizer.from_pretrained(folder, tokenizer_type="gpt_neo").vocab_size == 50_257


def test_gpt2_with_prefix_space_and_bos() -> None:
    options = {"add_prefix_space": True, "add_bos_token": True}
    folder = data("gpt2")
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder, **options)
    compare(GPT2TokenizerFast.from_pretrained(folder, **options), theirs)


def test_gpt_neox() -> None:
    folder = data("gpt-neox")
    theirs = transformers.GPTNeoXTokenizerFast.from_pretrained(folder)
    compare(AutoTokenizer.from_pretrained(folder, tokenizer_type="mpt"), theirs)


def test_openai_gpt() -> None:
    folder = data("openai-gpt")
    theirs = transformers.OpenAIGPTTokenizer.from_pretrained(folder)
    mine = OpenAIGPTTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), original=False)
    compare(mine, theirs)
    assert mine.do_lower_case and mine.vocab_size == 40_478


def test_mpnet(tmp_path: Path) -> None:
    theirs = transformers.MPNetTokenizer.from_pretrained(mpnet_vocab(tmp_path))
    compare(MPNetTokenizer.from_pretrained(tmp_path), theirs)
    assert MPNetTokenizer(data("mpnet/dict.txt")).get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize(
    "options",
    [{"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}],
)
def test_mpnet_options(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = mpnet_vocab(tmp_path)
    theirs = transformers.MPNetTokenizer.from_pretrained(folder, **options)
    lines = LINES[:2000]
    mine = MPNetTokenizer.from_pretrained(folder, **options)
    assert_equal(mine(lines)["input_ids"], theirs(lines)["input_ids"], lines)
    mine = MPNetTokenizer.from_pretrained(folder)
    mine.save_pretrained(tmp_path / "saved")
    mine = MPNetTokenizer.from_pretrained(tmp_path / "saved", **options)
    assert_equal(mine(lines)["input_ids"], theirs(lines)["input_ids"], lines)


# --- SentencePiece

V1, V2, V3, V7 = (
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_instruct_tokenizer_241114.model.v7",
)
TEKKEN = "tekken_240718.json"
MODELS: dict[str, Callable[[], Path]] = {
    "llama2": lambda: data("spm/llama2_tokenizer_full.spm"),
    "word model": lambda: data("spm/mistral_test_vocab.spm"),
    **{name.rpartition(".")[2]: lambda name=name: mistral(name) for name in (V1, V2, V3, V7)},
}


@pytest.mark.parametrize("name", MODELS)
def test_sentencepiece(name: str) -> None:
    path = MODELS[name]()
    theirs = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(path))
    mine = LlamaTokenizer.from_pretrained(path)
    rows = ids(mine, add_special_tokens=False, split_special_tokens=True, verbose=False)
    assert_equal(rows, theirs.encode(LINES))
    assert ids(mine, split_special_tokens=True, verbose=False)[5] == [1, *rows[5]]
    if name != "word model":
        # The strings that SentencePiece decodes. No text that looks like a special token is skipped.
        assert_equal(mine.batch_decode(rows), theirs.decode(rows))
        lossless = [index for index, line in enumerate(LINES) if "▁" not in line]
        assert len(lossless) > 9_000
        assert all(mine.decode(rows[index]) == LINES[index] for index in lossless)


def trained(tmp_path: Path, **options: Any) -> Path:
    """A SentencePiece model of the mixed lines, trained here."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(line.replace("\0", "") for line in mixed_lines(2_000, seed=3)), encoding="utf-8"
    )
    trainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=1_500,
        character_coverage=0.98,
        minloglevel=2,
        max_sentence_length=100_000,
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **options},
    )
    return tmp_path / "tokenizer.model"


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["[X]", "</s", "  "]}, 0),
        ({"model_type": "bpe", "add_dummy_prefix": False}, 0),
        # The backend adds scores in float64, SentencePiece in float32, so they break ties ("aa" + "a") differently.
        ({"model_type": "unigram", "byte_fallback": True}, 40),
        ({"model_type": "unigram", "user_defined_symbols": ["[X]", "<tool>"]}, 40),
        # The backend's normalisation table drops the second of two combining marks on a letter.
        ({"model_type": "bpe", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}, 80),
    ],
)
def test_trained_sentencepiece(tmp_path: Path, options: dict[str, Any], allowed: int) -> None:
    path = trained(tmp_path, **options)
    theirs = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(path))
    mine = LlamaTokenizer.from_pretrained(tmp_path)
    lines = [
        *(f"{line}[X]<tool>" for line in LINES[:500]),
        *LINES[:3_000],
        "",
        " ",
        "  ",
        "[X]",
        " [X] </s a",
    ]
    rows = mine(lines, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    differ = [line for line, a, b in zip(lines, rows, theirs.encode(lines), strict=True) if a != b]
    assert len(differ) <= allowed, differ[:3]


# --- mistral-common


def reference(name: str) -> Any:
    return pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer.from_file(
        str(mistral(name))
    )


@pytest.mark.parametrize("name", [TEKKEN, "tekken_240911.json"])
def test_tekken_is_lossless(name: str) -> None:
    theirs = reference(name).instruct_tokenizer.tokenizer
    mine = LlamaTokenizer(str(mistral(name)))
    rows = ids(mine, split_special_tokens=True, verbose=False)
    assert_equal(rows, [theirs.encode(line, bos=True, eos=False) for line in LINES])
    assert_equal(mine.batch_decode(rows, skip_special_tokens=True), LINES)
    assert len(mine) == 131_072 and mine.pad_token_id == 11


def conversation(seed: int, version: int) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """A random chat: system prompts, consecutive messages of one role, tool calls with results of all types."""
    import random

    rng = random.Random(seed)
    texts = [line.strip() or "x" for line in LINES if not any(token in line for token in "<[▁")]
    function = {"name": "f", "description": "d é", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}] if version > 1 and rng.random() < 0.6 else None
    chat = [{"role": "system", "content": rng.choice(texts)}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 4)):
        blocks = [{"type": "text", "text": rng.choice(texts)}, {"type": "text", "text": "b"}]
        chat.append({"role": "user", "content": rng.choice([rng.choice(texts), blocks])})
        chat += [{"role": "user", "content": rng.choice(texts)}] if rng.random() < 0.15 else []
        if tools and rng.random() < 0.6:
            names = ["".join(rng.choices("abcXYZ019", k=9)) for _ in range(rng.randint(1, 2))]
            arguments = rng.choice(['{"a":"x, y: z"}', '{"a": 1.50, "b":[1,2]}', "{}", ""])
            called = {"name": "f", "arguments": arguments}
            calls = [{"id": name, "type": "function", "function": called} for name in names]
            chat.append({"role": "assistant", "tool_calls": calls})
            for name in names:
                content = rng.choice(["22", "plain text", '{"k":"v,w:é"}', "[1,2]", '"q"', "3.0", "null"])
                chat.append({"role": "tool", "tool_call_id": name, "name": "f", "content": content})
        chat.append({"role": "assistant", "content": rng.choice(texts) + rng.choice(["", " ", "  "])})
    return [*chat, {"role": "user", "content": rng.choice(texts)}], tools


@pytest.mark.parametrize(("name", "version"), [(V1, 1), (V2, 2), (V3, 3), (TEKKEN, 3)])
def test_conversations(name: str, version: int) -> None:
    request = pytest.importorskip("mistral_common.protocol.instruct.request").ChatCompletionRequest
    theirs, mine = reference(name), LlamaTokenizer.from_pretrained(mistral(name))
    for seed in range(100):
        chat, tools = conversation(seed, version)
        expected = theirs.encode_chat_completion(request(messages=chat, tools=tools)).tokens
        assert mine.apply_chat_template(chat, tools=tools)["input_ids"] == expected, chat


@pytest.mark.parametrize("version", [1, 2, 3])
def test_published_samples(version: int) -> None:
    mine = LlamaTokenizer.from_pretrained(mistral({1: V1, 2: V2, 3: V3}[version]))
    samples = 0
    for folder in sorted(data("mistral/samples").iterdir()):
        if not (folder / f"text_v{version}.txt").exists():
            continue
        sample = json.loads((folder / "sample.json").read_text(encoding="utf-8"))
        tools = sample["tools"] or None
        text = mine.apply_chat_template(sample["messages"], tools=tools, tokenize=False)
        expected = (folder / f"text_v{version}.txt").read_text(encoding="utf-8")
        assert text == expected.replace("▁", " ").replace("<0x0A>", "\n")  # SentencePiece's spelling
        expected = json.loads((folder / f"tokens_v{version}.json").read_text(encoding="utf-8"))["tokens"]
        assert mine.apply_chat_template(sample["messages"], tools=tools)["input_ids"] == expected
        samples += 1
    assert samples == {1: 1, 2: 4, 3: 4}[version]


def test_our_chat_template_in_transformers(tmp_path: Path) -> None:
    mine = LlamaTokenizer.from_pretrained(mistral(V3))
    mine.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    sample = json.loads(data("mistral/samples/parallel_calls/sample.json").read_text(encoding="utf-8"))
    # transformers cannot parse JSON in a template; these arguments already have the spaces.
    for tokenizer in (mine, theirs):
        text = tokenizer.apply_chat_template(sample["messages"], tools=sample["tools"], tokenize=False)
        assert '[TOOL_RESULTS] {"content": "Email sent to' in text
    assert text == mine.apply_chat_template(sample["messages"], tools=sample["tools"], tokenize=False)


# --- files


SAVED: dict[str, Callable[[Path], Any]] = {
    "gpt_neo": lambda _: GPT2TokenizerFast.from_pretrained(data("gpt2")),
    "openai-gpt": lambda _: OpenAIGPTTokenizer.from_pretrained(data("openai-gpt"), original=False),
    "mpnet": lambda _: MPNetTokenizer.from_pretrained(data("mpnet")),
    "mistral": lambda _: LlamaTokenizer.from_pretrained(mistral(V3)),
    "llama": lambda _: LlamaTokenizer.from_pretrained(mistral(V1), legacy=True, add_eos_token=True),
    "fuyu": lambda folder: LlamaTokenizer.from_pretrained(
        trained(folder, model_type="unigram", byte_fallback=True)
    ),
    "tekken": lambda _: LlamaTokenizer.from_pretrained(mistral(TEKKEN)),
}


@pytest.mark.parametrize(
    ("kind", "with_config"), [*((kind, True) for kind in SAVED), ("mistral", False), ("mpnet", False)]
)
def test_saved_files_open_in_both_libraries(tmp_path: Path, kind: str, with_config: bool) -> None:
    tokenizer = SAVED[kind](tmp_path)
    folder = tmp_path / "saved"
    tokenizer.save_pretrained(folder)
    if with_config:
        model_type = "mistral" if kind == "tekken" else kind
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    lines = LINES[:1_000]
    rows = tokenizer(lines, verbose=False)["input_ids"]
    for auto in (AutoTokenizer, transformers.AutoTokenizer):
        again = auto.from_pretrained(folder)
        assert_equal(again(lines)["input_ids"], rows, lines)
        assert_equal(again.batch_decode(rows), tokenizer.batch_decode(rows), lines)
        assert again.bos_token == tokenizer.bos_token and again.pad_token == tokenizer.pad_token
        assert again.padding_side == tokenizer.padding_side
