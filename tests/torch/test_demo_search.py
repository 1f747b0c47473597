"""The embedded search model, its index, and the corpus that both are made from."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from monoblock import SentenceTransformer, demo_embeddings
from monoblock.checkpoint.hub import HubOptions
from monoblock.vectors.identity import model_fingerprint
from monoblock.vectors.index import open_index
from monoblock.vectors.nearest import nearest

ROOT = Path(__file__).parents[2]

SOURCE = '''
class Reader:
    """Read rows from a file."""

    def nextRow(self, skip_blank=True):
        """Return the next row. Raise StopIteration at the end."""
        return next(self._rows)

    def _plain(self):
        return None


def reader(file):
    "Return the next row. Raise StopIteration at the end."
'''


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    return SentenceTransformer(demo_embeddings.NAME, device="cpu")


def tool(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_small() -> None:
    folder, index = demo_embeddings.path(), demo_embeddings.index()
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 4_000_000
    assert sum(p.stat().st_size for p in index.parent.glob("library.npy*")) < 1_900_000
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["bits"] == 8


def test_the_index_is_of_the_model(model: SentenceTransformer) -> None:
    index = open_index(demo_embeddings.index())
    assert index.description["fingerprint"] == model_fingerprint(str(demo_embeddings.path()), HubOptions())
    (vectors,) = index.blocks()
    rows = range(0, len(vectors), 97)
    texts = index.texts(rows)
    found = model.encode([texts[row] for row in rows], normalize_embeddings=True)
    stored = vectors[list(rows)] / np.linalg.norm(vectors[list(rows)], axis=1, keepdims=True)
    # 15 levels on each side cost 0.2% of the cosine; another kernel's int8 products differ by less.
    assert (found * stored).sum(1).min() > 0.995


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("read a csv file", "csv"),
        ("parse a json string", "json"),
        ("square root of a number", "math.sqrt"),
        ("list the files in a directory", "os.listdir"),
        ("compile a regular expression", "re.compile"),
    ],
)
def test_queries_find_their_function(model: SentenceTransformer, query: str, name: str) -> None:
    index = open_index(demo_embeddings.index())
    _, rows = nearest(index.blocks(), model.encode([query]), 10)
    texts = index.texts([int(row) for row in rows[0]])
    assert any(re.match(rf"{re.escape(name)}\b", text) for text in texts.values()), texts


def test_the_documented_recall_is_above_the_baselines() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = re.findall(
        r"^\| ([^|]*TF-IDF[^|]*|\*\*[^|]*) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M
    )
    words, split, own = table
    assert "split" in split[0] and own[0].startswith("**the model")
    assert float(own[2]) > float(split[2]) > float(words[2])  # recall@10 of code to documentation
    assert float(own[4]) > float(words[4])


def test_definitions_and_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tool("search_corpus", monkeypatch)
    document = corpus.corpus.Document(name="rows/__init__.py", text=SOURCE, is_test=False)
    found = corpus.definitions([document])
    # The second text of the same words is left out, as are functions without any.
    assert [(one.title, one.documentation) for one in found] == [
        ("rows.Reader", "Read rows from a file."),
        (
            "rows.Reader.nextRow(self, skip_blank=True)",
            "Return the next row. Raise StopIteration at the end.",
        ),
    ]
    assert corpus.code_pairs(found)[1] == {
        "anchor": "def nextRow(self, skip_blank=True):\nreturn next(self._rows)",
        "positive": "Return the next row. Raise StopIteration at the end.",
    }
    assert corpus.search_pairs(found)[1] == {
        "anchor": "Return the next row.",
        "positive": "rows.Reader.nextRow(self, skip_blank=True) Raise StopIteration at the end.",
    }
    assert corpus.split_words("nextRow skip_blank2") == ["next", "row", "skip", "blank", "2"]


def test_modules_are_held_out_with_their_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tool("search_corpus", monkeypatch)
    for one, other in (
        ("decimal", "_pydecimal"),
        ("io", "_pyio"),
        ("csv", "_csv"),
        ("xml", "xml.dom.minidom"),
    ):
        assert corpus.is_held_out(one) == corpus.is_held_out(other)
    names = sorted(sys.stdlib_module_names)
    assert 0.05 < sum(map(corpus.is_held_out, names)) / len(names) < 0.15
    held = next(name for name in names if corpus.is_held_out(name))
    monkeypatch.setattr(corpus, "public_modules", lambda: [held])
    assert list(corpus.introspected_pairs()) == []


def test_training_starts_from_tf_idf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before training, texts that share a rare word are nearer than texts that share frequent ones."""
    trainer = tool("train_search", monkeypatch)
    texts = [
        f"return the {word} of the file" for word in ("owner", "size", "name", "mode", "lines", "path")
    ] * 2
    texts += ["the owner pays", "getHTTPHeader"] * 2
    trainer.start(tmp_path, texts)
    own = SentenceTransformer(str(tmp_path), device="cpu")
    assert own.tokenizer.tokenize("getFileSize")[0] == "get"
    rare, frequent = (
        own.encode(["owner pays", "the size of the file"]) @ own.encode(["the owner of the file"]).T
    )
    assert rare > frequent


def test_baseline_and_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tool("train_search", monkeypatch)
    pairs = [{"anchor": f"w{i} x", "positive": f"w{i} y z"} for i in range(30)]
    assert trainer.recalls(pairs, trainer.tf_idf(str.split))["recall@1"] == 1.0
    reversed_pairs = [{"anchor": f"w{i} x", "positive": f"w{29 - i} y z"} for i in range(30)]
    assert trainer.recalls(reversed_pairs, trainer.tf_idf(str.split))["recall@1"] == 0.0
