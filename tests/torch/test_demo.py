"""The embedded demo model: its files, that it is trained, its tokenizer and chat template."""

import ast
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monoblock import AutoConfig, AutoTokenizer, GenerationConfig, MptForCausalLM, demo

REPOSITORY = Path(__file__).parents[2]
SIZE_LIMIT = 12_000_000  # bytes: the design's limit for the wheel

# Written for this test, in the ordinary manner of Python; it is in no standard library.
UNSEEN = '''class Inventory:
    """Keep count of the items in a store."""

    def __init__(self, items=None):
        self.items = dict(items or {})

    def add(self, name, count=1):
        """Add some of an item."""
        if count < 0:
            raise ValueError("count must not be negative")
        self.items[name] = self.items.get(name, 0) + count

    def remove(self, name):
        try:
            del self.items[name]
        except KeyError:
            raise KeyError("no such item: %r" % name) from None

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        for name in sorted(self.items):
            yield name
'''

REQUESTS = (
    "Return the length of the list.",
    "Return True if the stack is empty.",
    "Close the file.",
    "Add two numbers.",
    "def add(a, b):",
    "Read a line from the file.",
)


@pytest.fixture(scope="module")
def model():
    return MptForCausalLM.from_pretrained(demo.path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.path())


def bits_per_byte(model, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    return loss * (ids.shape[1] - 1) / math.log(2) / len(text.encode())


def greedy(model, tokenizer, prompt, count):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, do_sample=False, repetition_penalty=1.0, max_new_tokens=count)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def test_files_of_the_checkpoint():
    shipped = [path for path in demo.path().rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.name for path in shipped} == {
        "__init__.py",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in shipped) <= SIZE_LIMIT


def test_architecture_and_dtype():
    model = MptForCausalLM.from_pretrained(demo.path())
    assert AutoConfig.from_pretrained(demo.path()).model_type == "mpt"
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert 4e6 < sum(param.numel() for param in model.parameters()) < 6e6


def test_loss_on_unseen_python(model, tokenizer):
    """The same shape untrained needs log2(4096) bits for a token of some 3.5 bytes: about 3.5 bits a byte."""
    torch.manual_seed(0)
    untrained = bits_per_byte(MptForCausalLM(model.config), tokenizer, UNSEEN)
    assert untrained > 3.0
    assert bits_per_byte(model, tokenizer, UNSEEN) < 1.5


def test_loss_is_lower_than_on_reversed_lines(model, tokenizer):
    lines = UNSEEN.splitlines()
    backwards = "\n".join(reversed(lines)) + "\n"
    assert bits_per_byte(model, tokenizer, UNSEEN) < 0.9 * bits_per_byte(model, tokenizer, backwards)


@pytest.mark.parametrize("prompt", ["def fibonacci(n):", "class Stack:", "def __init__(self, name):"])
def test_completions_parse(model, tokenizer, prompt):
    """The first line is indented below the prompt, and what is complete of the statement parses."""
    text = greedy(model, tokenizer, prompt, 60)
    assert text.startswith(prompt + "\n    ")
    lines = text.split("\n")[:-1]  # the last line may be cut off
    assert any(parses("\n".join(lines[:count])) for count in range(2, len(lines) + 1)), text


def parses(text):
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def test_sequences_longer_than_in_training(model, tokenizer):
    """Trained on 256 tokens, ALiBi reads on: the end of a long text is no harder than its beginning."""
    text = UNSEEN * 6
    assert len(tokenizer(text)["input_ids"]) > 1000
    assert bits_per_byte(model, tokenizer, text) < bits_per_byte(model, tokenizer, UNSEEN)


@given(text=st.text())
def test_tokenizer_is_lossless(text):
    tokenizer = AutoTokenizer.from_pretrained(demo.path())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    "text", ["\r\n\t x  \n   \n", "\ufeffé 中 🙂", "\x00\x7f", "    pass  \n", " <|end|> don't"]
)
def test_tokenizer_is_lossless_on_special_characters(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokens_of_code(tokenizer):
    """A line break with its indentation is one token, digits are single tokens, and pad is not eos."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("if x:\n        return 2048\n")["input_ids"])
    assert "Ċ" + 8 * "Ġ" in tokens
    assert tokens[-5:] == ["Ġ2", "0", "4", "8", "Ċ"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)


def test_config_and_tokenizer_agree(model, tokenizer):
    config, defaults = model.config, GenerationConfig.from_pretrained(demo.path())
    assert config.vocab_size == len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, name) == getattr(defaults, name) == getattr(tokenizer, name)


def test_chat_template(tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add two numbers."},
        {"role": "assistant", "content": "def add(a, b):\n    return a + b\n"},
        {"role": "user", "content": "Subtract them."},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|user|>Be brief.\nAdd two numbers.<|assistant|>def add(a, b):\n    return a + b\n<|endoftext|>"
        "<|user|>Subtract them.<|assistant|>"
    )


def test_other_roles_raise(tokenizer):
    with pytest.raises(ValueError, match="got tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_chat_replies_are_functions_that_end(model, tokenizer):
    """Asked with what docstrings say, it writes a function, and in most cases one that parses and is then over."""
    ended = 0
    for request in REQUESTS:
        turn = [{"role": "user", "content": request}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        new = model.generate(ids, do_sample=False, repetition_penalty=1.0, max_new_tokens=150)[
            0, ids.shape[1] :
        ]
        reply = tokenizer.decode(new, skip_special_tokens=True)
        assert reply.startswith(("def ", "async def ", "class ")), reply
        ended += bool(new[-1] == tokenizer.eos_token_id and parses(reply))
    assert ended >= len(REQUESTS) // 2


def test_documentation_matches_the_model(model):
    page = (REPOSITORY / "docs" / "demo.md").read_text(encoding="utf-8")
    assert f"| {sum(param.numel() for param in model.parameters()):,} |" in page
    assert "demo-loss.svg" in page
    picture = ET.fromstring((REPOSITORY / "docs" / "demo-loss.svg").read_text(encoding="utf-8"))
    assert len(picture.findall("{http://www.w3.org/2000/svg}polyline")) == 2


def test_weights_are_bfloat16_with_transformers_names():
    with (demo.path() / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__")
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert "transformer.wte.weight" in header
    assert "lm_head.weight" not in header  # tied, written once
