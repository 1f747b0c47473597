"""Structured output: generated strings parse and match the schema."""

import json
import re

import pytest
import torch

pytest.importorskip("llguidance")

from monoblock import AutoTokenizer, MptConfig, MptForCausalLM, demo

torch.set_num_threads(1)  # more only wait for each other at models this small

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["function", "class", None]},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "ratio": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
        "tags": {
            "type": "array",
            "items": {"type": "string", "pattern": "^[a-z]{1,5}$"},
            "minItems": 1,
            "maxItems": 3,
        },
        "inner": {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}, "at": {"anyOf": [{"type": "null"}, {"const": 7}]}},
            "required": ["ok", "at"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "kind", "size", "tags", "inner"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "schema": SCHEMA}
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
}


def fits(value, schema):
    """Whether a value is valid, for the keywords that are used here; written from the standard only."""
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    if "anyOf" in schema:
        return any(fits(value, option) for option in schema["anyOf"])
    kind = schema["type"]
    if kind in ("integer", "number"):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (whole or kind == "number")
            and schema["minimum"] <= value <= schema["maximum"]
            and value % schema.get("multipleOf", value or 1) == 0
        )
    if not isinstance(value, TYPES[kind]):
        return False
    if kind == "object":
        known = schema["properties"]
        return set(schema["required"]) <= set(value) <= set(known) and all(
            fits(inner, known[name]) for name, inner in value.items()
        )
    if kind == "array":
        return schema["minItems"] <= len(value) <= schema["maxItems"] and all(
            fits(item, schema["items"]) for item in value
        )
    if kind == "string":
        return len(value) <= schema.get("maxLength", 99) and bool(re.search(schema.get("pattern", ""), value))
    return True


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.path())


@pytest.fixture(scope="module")
def demo_model():
    return MptForCausalLM.from_pretrained(demo.path(), dtype=torch.float32)


def tiny(seed, vocab=4096):
    torch.manual_seed(seed)
    model = MptForCausalLM(MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=vocab))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)  # sure of itself, and wrong
    return model.eval()


def texts(model, tokenizer, inputs, **options):
    options = {"response_format": FORMAT, "eos_token_id": 0, "pad_token_id": 1, **options}
    out = model.generate(**inputs, tokenizer=tokenizer, **options)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# The longest text of the schema in tokens of one byte.
ENOUGH = {"max_new_tokens": 300}


def assert_all_fit(generated, schema=SCHEMA):
    for text in generated:
        assert fits(json.loads(text), schema), text


def test_fits_detects_invalid_values():
    good = {"name": "f", "kind": None, "size": 3, "tags": ["a"], "inner": {"ok": True, "at": 7}}
    assert fits(good, SCHEMA)
    assert fits({**good, "ratio": 0.75}, SCHEMA)
    for wrong in (
        {"name": 3},
        {"size": 1000},
        {"size": 1.5},
        {"ratio": 0.3},
        {"tags": []},
        {"tags": ["A"]},
        {"more": 1},
        {"inner": {"ok": True}},
        {"kind": "x"},
    ):
        assert not fits({**good, **wrong}, SCHEMA), wrong


@pytest.mark.parametrize("first", range(0, 50, 10))
def test_random_models(tokenizer, first):
    """Ten models at each time, greedily and sampled, on a padded batch of two: 200 runs in all."""
    inputs = tokenizer(["x", "def f(a, b):"], return_tensors="pt", padding=True, padding_side="left")
    for seed in range(first, first + 10):
        model = tiny(seed)
        assert_all_fit(texts(model, tokenizer, inputs, **ENOUGH, do_sample=False))
        sampled = {"do_sample": True, "top_k": 0, "seed": seed, "temperature": 1.5}
        assert_all_fit(texts(model, tokenizer, inputs, **ENOUGH, **sampled))


PROMPTS = ["def area(r):", "class Stack:", "The JSON of it: ", "import os", "{"]


@pytest.mark.parametrize("seed", range(8))
def test_the_demo(demo_model, tokenizer, seed):
    """25 runs each time, 200 in all."""
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    sampled = {"do_sample": True, "seed": seed, "num_return_sequences": 5}
    assert_all_fit(texts(demo_model, tokenizer, inputs, **ENOUGH, **sampled))


def test_a_regular_expression(demo_model, tokenizer):
    inputs = tokenizer("Call ", return_tensors="pt")
    for pattern in (r"\d{3}-\d{4}", r"(yes|no), [A-Z][a-z]{2,8}\.", "[à-ÿ]{2,5}!"):
        options = {"max_new_tokens": 40, "response_format": {"type": "regex", "pattern": pattern}}
        for text in texts(
            demo_model, tokenizer, inputs, **options, do_sample=True, seed=1, num_return_sequences=8
        ):
            assert re.fullmatch(pattern, text)


def test_speculative_decoding_and_beams(demo_model, tokenizer):
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    greedy = {**ENOUGH, "do_sample": False}
    plain = texts(demo_model, tokenizer, inputs, **greedy)
    assert_all_fit(plain)
    assert texts(demo_model, tokenizer, inputs, **greedy, prompt_lookup_num_tokens=5) == plain
    assert texts(demo_model, tokenizer, inputs, **greedy, assistant_model=demo_model) == plain
    for sampled in ({"do_sample": False}, {"do_sample": True, "seed": 3}):
        found = texts(demo_model, tokenizer, inputs, **ENOUGH, num_beams=3, num_return_sequences=3, **sampled)
        assert_all_fit(found)


def test_forms_of_chat_apis(demo_model, tokenizer):
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    answer = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    answer["additionalProperties"] = False
    for form in (
        {"type": "json_schema", "json_schema": {"name": "answer", "schema": answer}},
        {"type": "json_schema", "json_schema": answer},
        {"type": "json_schema", "schema": json.dumps(answer)},
    ):
        [text] = texts(demo_model, tokenizer, inputs, max_new_tokens=20, response_format=form)
        assert json.loads(text)["a"] in (True, False)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"type": "xml"}, r'response_format must be \{"type": "json_schema"'),
        ({"type": "json_schema"}, "response_format must be"),
        ({"type": "regex", "pattern": "a", "schema": {}}, "response_format must be"),
        ("json", "response_format must be"),
        ({"type": "regex", "pattern": "(a"}, "cannot be used: .*unclosed group"),
        ({"type": "regex", "pattern": ""}, "must be a string"),
        ({"type": "json_schema", "schema": {"type": "strange"}}, "cannot be used: Invalid type: strange"),
        ({"type": "json_schema", "schema": "{"}, "is not valid JSON"),
        ({"type": "json_schema", "schema": [1]}, "a dict or a JSON string, got list"),
    ],
    ids=str,
)
def test_invalid_formats_raise(demo_model, tokenizer, form, message):
    inputs = tokenizer("x", return_tensors="pt")
    with pytest.raises(ValueError, match=message) as error:
        texts(demo_model, tokenizer, inputs, max_new_tokens=2, response_format=form)
    assert "\n" not in str(error.value)


def test_missing_arguments_raise(demo_model, tokenizer):
    ids = torch.tensor([[5, 6]])
    form = {"type": "regex", "pattern": "a+"}
    with pytest.raises(ValueError, match="tokenizer=tokenizer"):
        demo_model.generate(ids, response_format=form)
    with pytest.raises(ValueError, match="set eos_token_id"):
        demo_model.generate(ids, response_format=form, tokenizer=tokenizer, eos_token_id=None)
    with pytest.raises(ValueError, match="a model of 89 tokens"):
        tiny(0, 89).generate(ids, response_format=form, tokenizer=tokenizer, eos_token_id=0)
    [letter] = tokenizer("a")["input_ids"]
    one = {"type": "regex", "pattern": "a"}
    with pytest.raises(ValueError, match="leaves no token"):
        demo_model.generate(ids, response_format=one, tokenizer=tokenizer, suppress_tokens=[letter])


def test_missing_library_raises(demo_model, tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ImportError, match=r'pip install "monoblock\[structured\]"'):
        demo_model.generate(torch.tensor([[5]]), response_format={"type": "json_object"}, tokenizer=tokenizer)
