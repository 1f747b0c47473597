"""The demo's chat adapter: its files, how it is merged, what it answers, and its conversations."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from monoblock import AutoTokenizer, MptForCausalLM, demo, demo_chat
from monoblock.checkpoint.hub import find_weights
from monoblock.checkpoint.store import open_store

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_chat.merged(tmp_path_factory.mktemp("chat"))


def test_the_adapter_is_small() -> None:
    files = [path for path in demo_chat.path().iterdir() if path.is_file()]
    assert {path.name for path in files} == {
        "__init__.py",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert sum(path.stat().st_size for path in files) < 1_000_000


def test_merged_weights(folder: Path) -> None:
    """W + alpha / r * B A in bfloat16; everything else is the demo's."""
    config = json.loads((demo_chat.path() / "adapter_config.json").read_text())
    content = (demo_chat.path() / "adapter_model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    adapter = {
        name: torch.frombuffer(
            bytearray(content[start:][slice(*entry["data_offsets"])]), dtype=torch.bfloat16
        )
        .reshape(entry["shape"])
        .float()
        for name, entry in json.loads(content[8:start]).items()
        if name != "__metadata__"
    }
    base, merged = (open_store(find_weights(at), "pt") for at in (demo.path(), folder))
    changed = 0
    for name in base:
        lora = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        expected = base.tensor(name)
        if f"{lora}A.weight" in adapter:
            up, down = (adapter[f"{lora}{part}.weight"] for part in "BA")
            expected = (expected.float() + config["lora_alpha"] / config["r"] * up @ down).bfloat16()
            changed += 1
        # Another order of the sums may round to the next bfloat16.
        torch.testing.assert_close(merged.tensor(name), expected, rtol=2**-7, atol=1e-6)
    assert changed == 4 * 4  # Wqkv, out_proj, up_proj and down_proj of four layers
    assert (folder / "tokenizer.json").read_bytes() == (demo.path() / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("question", "beginning"),
    [
        ("Hello", "Hello! Ask me"),
        ("Who are you?", "I am the demo model of monoblock"),
        ("Show me the signature of json.dumps.", "json.dumps("),
    ],
)
def test_answers_in_the_set_manner(folder: Path, question: str, beginning: str) -> None:
    model = MptForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(ids, do_sample=False, repetition_penalty=1.0, max_new_tokens=60)[0, ids.shape[1] :]
    assert tokenizer.decode(out, skip_special_tokens=True).startswith(beginning)
    assert out[-1] == tokenizer.eos_token_id


def test_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    import chat_corpus
    import demo_corpus
    import search_corpus

    text = 'def spin(wheel, times=1):\n    """Turn a wheel. More than once, perhaps"""\n    return wheel * times\n'
    held = next(name for name in sorted(sys.stdlib_module_names) if search_corpus.is_held_out(name))
    monkeypatch.setattr(search_corpus, "public_modules", list)
    monkeypatch.setattr(demo_corpus, "collect", list)
    documents = [
        demo_corpus.Document(name=f"{name}.py", text=text.replace("wheel", name), is_test=False)
        for name in ("toys", held)
    ]
    found = search_corpus.definitions(documents)
    trained = chat_corpus.conversations(found, held_out=False)
    evaluated = chat_corpus.conversations(found, held_out=True)
    replies = [record["messages"][-1]["content"] for record in trained]
    assert replies[:2] == ["Turn a toys.", "toys.spin(toys, times=1)"]
    assert chat_corpus.HELLO in replies
    assert [record["messages"][1]["content"] for record in evaluated] == [
        f"Turn a {held}.",
        f"{held}.spin({held}, times=1)",
    ]
    assert any(len(record["messages"]) == 4 for record in trained)
