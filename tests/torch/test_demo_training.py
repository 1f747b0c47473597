"""Training of the demo: corpus, loss, optimizers, and bitwise resumption."""

import argparse
import ast
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import demo_corpus as corpus
import demo_curve as curve
import demo_data as data
import demo_optim as optim
import train_demo
from demo_loss import ROWS, SlicedCrossEntropy

CODE = '''def first(items):
    """Return the first item of a list. It must not be empty."""
    if not items:
        raise ValueError("no items")
    return items[0]


def second(items):
    return items[1]


class Box:
    def volume(self):
        """Return the volume in litres."""
        return self.a * self.b * self.c
'''


@pytest.fixture
def library(tmp_path):
    """A small standard library with something of each kind that is left out."""
    files = {
        "good.py": CODE,
        "copy.py": CODE,
        "other.py": CODE.replace("first", "uno") + "\n\n\n\n\n\nx = 1\t\t# tab \r\n",
        "broken.py": CODE + "def (:\n",
        "short.py": "x = 1\n",
        "table.py": "T = [" + "1234, " * 200 + "]\n",
        "encodings/cp1.py": CODE.replace("first", "cp"),
        "test/test_long.py": "\n\n".join(CODE.replace("first", f"f{i}") for i in range(300)),
    }
    for name, text in files.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "lib" / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n" * 20)
    return tmp_path / "lib"


def test_corpus_filters_and_deduplicates(library):
    documents = corpus.collect(library)
    assert [document.name for document in documents] == ["copy.py", "other.py", "test/test_long.py"]
    assert [document.is_test for document in documents] == [False, False, True]
    assert corpus.digest(documents) == corpus.digest(corpus.collect(library))
    assert documents[1].text.endswith(".c\n\n\nx = 1           # tab\n")


def test_long_tests_are_cut_between_statements(library):
    text = corpus.collect(library)[-1].text
    assert corpus.TEST_FILE_LIMIT - 1000 < len(text) <= corpus.TEST_FILE_LIMIT
    ast.parse(text)


def test_dialogues_are_docstrings_and_their_code():
    document = corpus.Document(name="a.py", text=CODE, is_test=False)
    assert list(corpus.dialogues(document)) == [
        (
            "Return the first item of a list.",
            'def first(items):\n    if not items:\n        raise ValueError("no items")\n    return items[0]\n',
        ),
        ("def second(items):", "def second(items):\n    return items[1]\n"),
        ("class Box:", CODE[CODE.index("class") :]),
        ("Return the volume in litres.", "def volume(self):\n    return self.a * self.b * self.c\n"),
    ]


def test_held_out_depends_on_the_name():
    documents = [corpus.Document(name=f"m{i}.py", text=CODE, is_test=False) for i in range(5000)]
    assert 60 < sum(document.held_out for document in documents) < 140  # 100 expected, deviation 10
    assert corpus.Document(name="ast.py", text="", is_test=True).held_out


def test_windows_begin_at_lines():
    """With its line break and indentation, or at column 0: every prompt begins at column 0."""
    documents = [corpus.Document(name=f"m{i}.py", text=CODE, is_test=False) for i in (0, 1, 3)]
    assert not any(document.held_out for document in documents)
    tokenizer = corpus.train_tokenizer((document.text for document in documents), 300)
    segments, kinds = data.segments(documents, tokenizer), data.line_breaks(tokenizer)
    batches = data.batches(segments, kinds, seed=1, length=16, batch=4)
    windows = torch.cat([next(batches) for _ in range(40)])
    texts = {tokenizer.decode(ids, skip_special_tokens=False) for ids in windows.tolist()}
    for text in texts:
        assert text.lstrip("\n").startswith(("    ", "def ", "class ", corpus.ENDOFTEXT, corpus.USER)), text
    assert len(texts) > 20


def test_order_depends_on_the_seed():
    kinds = np.full(64, 2, dtype=np.int8)  # as if every token were a line: a window may begin anywhere
    segments = [data.Segment(ids=np.arange(i, i + 50, dtype=np.uint16), repeats=1 + i % 2) for i in range(9)]
    one, same, other = (next(data.batches(segments, kinds, seed=s, length=10, batch=8)) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_sliced_loss_equals_cross_entropy():
    torch.manual_seed(0)
    count = ROWS + 100  # more than one slice, and a partial one
    hidden, weight = torch.randn(count, 16, dtype=torch.float64), torch.randn(40, 16, dtype=torch.float64)
    labels = torch.randint(0, 40, (count,))
    grads = []
    for loss in (
        lambda h, w: F.cross_entropy(h @ w.T, labels),
        lambda h, w: SlicedCrossEntropy.apply(h, w, labels, torch.float64),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = loss(h, w)
        (3 * value).backward()
        grads.append((value.float(), h.grad, w.grad))
    for plain, sliced in zip(*grads, strict=True):
        # The softmax is taken in float32 whatever the products are in.
        torch.testing.assert_close(plain, sliced, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(32, 32), (24, 64), (64, 24), (3, 32, 32)])
def test_muon_singular_values_are_close_to_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(optim.orthogonal(torch.randn(shape)))
    assert values.min() > 0.3 and values.max() < 1.3  # five steps leave the smallest ones short of 0.7


def test_muon_optimises_block_matrices_only():
    embedding = torch.nn.Embedding(10, 4)
    model = torch.nn.Sequential(
        embedding, torch.nn.Linear(4, 4, bias=False), torch.nn.LayerNorm(4, bias=False)
    )
    muon, adam = optim.optimizers(model, embedding.weight, lr=1.0, muon_lr=1.0)
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(4, 4)]
    assert [(group["params"][0].shape, group["weight_decay"]) for group in adam.param_groups] == [
        ((10, 4), 0.1),
        ((4,), 0.0),
    ]


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Makes trainers of a two-layer model on a corpus of a few kilobytes; nothing is held out by chance."""
    monkeypatch.setattr(train_demo, "SHAPE", {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 32})
    monkeypatch.setattr(train_demo, "WARMUP_STEPS", 5)
    monkeypatch.setattr(train_demo, "EVALUATE_EVERY", 4)
    names = [f"m{i}.py" for i in range(12)] + ["ast.py"]
    documents = [corpus.Document(name=n, text=CODE.replace("Box", n[:2]), is_test=False) for n in names]
    tokenizer = corpus.train_tokenizer((document.text for document in documents), 300)

    def make(steps):
        options = argparse.Namespace(
            seed=3,
            steps=steps,
            minutes=None,
            batch=4,
            length=32,
            lr=3e-3,
            muon_lr=0.02,
            bf16=False,
            build=tmp_path,
        )
        return train_demo.Trainer(options, documents, tokenizer)

    return make


def test_resumed_training_is_bitwise_equal(trainer):
    whole = trainer(8)
    whole.run()
    cut = trainer(8)
    step, cut.calls = cut.step, 0

    def interrupted(windows):
        cut.calls += 1
        if cut.calls > 5:
            raise KeyboardInterrupt
        return step(windows)

    cut.step = interrupted
    with pytest.raises(SystemExit, match="--resume"):
        cut.run()
    options = argparse.Namespace(build=cut.options.build, steps=100)
    checkpoint = train_demo.read_checkpoint(options)
    assert (options.steps, options.seed) == (8, 3)
    resumed = trainer(8)
    resumed.load(checkpoint)
    assert resumed.state.step == 5
    resumed.run()
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [e["loss"] for e in resumed.state.log] == [e["loss"] for e in whole.state.log]
    assert [e["step"] for e in whole.state.log if "held_out" in e] == [4, 8]


def test_a_short_run_learns(trainer):
    run = trainer(30)
    before = run.evaluate()
    run.run()
    assert run.evaluate() < before - 0.5


def test_resuming_without_a_checkpoint_raises(tmp_path):
    with pytest.raises(SystemExit, match="no checkpoint"):
        train_demo.read_checkpoint(argparse.Namespace(build=tmp_path))


def test_ticks_are_round_and_few():
    assert curve.ticks(1.0, 8.3) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert curve.ticks(0.0, 31.7) == [0, 5, 10, 15, 20, 25, 30]


def test_smoothing_keeps_the_mean():
    points = [(float(i), float(i % 2)) for i in range(1000)]
    smooth = curve.smoothed(points, 100)
    assert len(smooth) == 100
    assert {y for _, y in smooth} == {0.5}
