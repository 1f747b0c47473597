"""Fine-tuning on pairs of texts (sentence embeddings), and on preferences between answers."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_runs
import transformers
from safetensors.torch import load_file
from training_runs import jsonl, losses, metrics, run

import monoblock
import monoblock.training
from monoblock.training import Trainer, TrainingOptions

torch.set_num_threads(1)

WORDS = {"the": "over", "quick": "lazy", "fox": "dog"}
STEADY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts, and the same in other words."""
    rng = random.Random(seed)
    anchors = [rng.choices(list(WORDS), k=rng.randint(2, 6)) for _ in range(count)]
    return [{"anchor": " ".join(a), "positive": " ".join(WORDS[word] for word in a)} for a in anchors]


def test_chunks_of_a_batch_have_its_gradients(tmp_path: Path) -> None:
    model = training_runs.folder(tmp_path / "model", "MPNetModel", **STEADY)
    data = jsonl(tmp_path / "data.jsonl", pairs(40))
    for name, more in (("whole", {}), ("chunks", {"chunk_size": 5})):
        run(model, data, tmp_path / name, task="embedding", max_steps=4, batch_size=12, **more)
    assert losses(tmp_path / "chunks") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    norms = [
        [line["grad_norm"] for line in metrics(tmp_path / n) if "loss" in line] for n in ("whole", "chunks")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


class Stop(Exception):
    """Ends a run between two checkpoints."""


def whole_and_broken(model: Path, data: Path, folder: Path, **more: Any) -> None:
    """A run of six steps, and one that fails after five and is resumed after its checkpoint of four."""

    def stop(progress: Any) -> None:
        if progress.step == 5:
            raise Stop

    run(model, data, folder / "whole", **more)
    options = training_runs.options(model, data, folder / "broken", **more)
    with pytest.raises(Stop):
        Trainer(options).train(show=stop)
    assert Trainer(options).train(resume=True).step == 6
    assert losses(folder / "whole") == losses(folder / "broken")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_runs.folder(tmp_path_factory.mktemp("encoder"), "MPNetModel", **STEADY)


def test_embeddings_of_pairs(encoder: Path, tmp_path: Path) -> None:
    data, held = jsonl(tmp_path / "train.jsonl", pairs(200)), jsonl(tmp_path / "eval.jsonl", pairs(32, 1))
    more = {"task": "embedding", "eval_data": held, "epochs": 10, "learning_rate": 3e-3, "batch_size": 16}
    result = run(encoder, data, tmp_path / "out", **more, keep_best=True, best_metric="mrr")
    lines = [line for line in metrics(tmp_path / "out") if "eval_mrr" in line]
    assert lines[0]["eval_accuracy"] < 0.6 and result.metrics["accuracy"] >= 0.8
    assert lines[0]["eval_mrr"] < 0.7 < 0.85 < result.metrics["mrr"]
    assert result.metrics["mrr"] == max(line["eval_mrr"] for line in lines)
    trained = monoblock.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    one, other, far = trained.encode(["the quick fox", "over lazy dog", "over over over"])
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.9
    assert one @ far / np.linalg.norm(one) / np.linalg.norm(far) < 0.8
    settings = TrainingOptions(
        model=str(tmp_path / "out"), task="embedding", data=str(held), device="cpu", batch_size=16
    )
    assert monoblock.training.evaluate_file(settings) == pytest.approx(result.metrics, rel=1e-5)


def test_the_loss_of_pairs_and_negatives(encoder: Path, tmp_path: Path) -> None:
    """The cross-entropy of scaled cosines over positives and negatives; equal positives are no negatives."""
    rows = [
        {"anchor": "the fox", "positive": "over dog", "negative": "lazy lazy"},
        {"anchor": "fox", "positive": "dog", "negative": ["over", "the dog"]},
        {"anchor": "quick", "positive": "dog"},
    ]
    data = jsonl(tmp_path / "data.jsonl", rows)
    run(encoder, data, tmp_path / "out", task="embedding", max_steps=1, similarity_scale=7.0)
    model = monoblock.SentenceTransformer(str(encoder), device="cpu")

    def vectors(texts: list[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.tensor(model.encode(texts)), dim=-1)

    anchors = vectors([row["anchor"] for row in rows])
    positives = [row["positive"] for row in rows]
    scores = 7 * anchors @ vectors([*positives, "lazy lazy", "over", "the dog"]).T
    scores[1, 2] = scores[2, 1] = -torch.inf
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(3))
    assert losses(tmp_path / "out")[0] == pytest.approx(float(expected), abs=1e-4)


def test_the_search_of_evaluation_data(encoder: Path, tmp_path: Path) -> None:
    """All positives and negatives are searched, whatever the batches; an anchor may have several positives."""
    rows = [
        {"anchor": "the fox", "positive": "over dog", "negative": "the lazy fox"},
        {"anchor": "the fox", "positive": "lazy lazy", "negative": ["the fox", "quick fox"]},
        {"anchor": "quick", "positive": "quick dog"},
        {"anchor": "dog", "positive": "quick dog"},
    ]
    data = jsonl(tmp_path / "data.jsonl", rows)
    settings = {"model": str(encoder), "task": "embedding", "data": str(data), "device": "cpu"}
    found = monoblock.training.evaluate_file(TrainingOptions(**settings, batch_size=3))
    model = monoblock.SentenceTransformer(str(encoder), device="cpu")
    texts = ["over dog", "the lazy fox", "lazy lazy", "the fox", "quick fox", "quick dog"]
    anchors = model.encode(["the fox", "quick", "dog"], normalize_embeddings=True)
    similar = anchors @ model.encode(texts, normalize_embeddings=True).T
    order = [[texts[i] for i in row.argsort()[::-1]] for row in similar]
    ranks = [[order[0].index(t) + 1 for t in ("over dog", "lazy lazy")]]
    ranks += [[order[i].index("quick dog") + 1] for i in (1, 2)]
    assert found["mrr"] == pytest.approx(np.mean([1 / min(one) for one in ranks]))
    assert found["recall@1"] == pytest.approx(np.mean([np.mean(np.array(one) == 1) for one in ranks]))
    assert found["recall@10"] == 1


def test_pairs_with_scores(encoder: Path, tmp_path: Path) -> None:
    """The loss is the squared difference of cosine and score, and the cosines come to have the scores' order."""
    rows = [{**one, "score": 1.0} for one in pairs(60)]
    rows += [
        {"anchor": one["anchor"], "positive": other["positive"], "score": -0.5}
        for one, other in zip(pairs(60), pairs(60, 9), strict=True)
    ]
    data, held = jsonl(tmp_path / "train.jsonl", rows), jsonl(tmp_path / "eval.jsonl", rows[40:80])
    more = {"task": "embedding", "eval_data": held, "epochs": 6, "learning_rate": 3e-3, "batch_size": 16}
    result = run(encoder, data, tmp_path / "out", **more, keep_best=True, best_metric="spearman")
    before = next(line for line in metrics(tmp_path / "out") if line["step"] == 0)
    for folder, values in (
        (encoder, {name: before[f"eval_{name}"] for name in ("loss", "spearman")}),
        (tmp_path / "out", result.metrics),
    ):
        model = monoblock.SentenceTransformer(str(folder), device="cpu")
        one, other = (
            model.encode([row[name] for row in rows[40:80]], normalize_embeddings=True)
            for name in ("anchor", "positive")
        )
        cosines, targets = (one * other).sum(-1), np.array([row["score"] for row in rows[40:80]])
        ranks = [(x[:, None] > x).sum(-1) + (x[:, None] == x).sum(-1) / 2 for x in (cosines, targets)]
        assert values["loss"] == pytest.approx(np.square(cosines - targets).mean(), rel=1e-4)
        assert values["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-5)
    assert set(result.metrics) == {"loss", "spearman"}
    assert result.metrics["spearman"] > before["eval_spearman"] + 0.1 and result.metrics["loss"] < 0.3


def test_the_metric_must_be_that_of_the_data(encoder: Path, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", pairs(8))
    more = {"task": "embedding", "eval_fraction": 0.5, "keep_best": True, "best_metric": "spearman"}
    with pytest.raises(
        ValueError, match="best_metric=spearman: the evaluation of this data has loss, accuracy, recall@1"
    ):
        run(encoder, data, tmp_path / "out", **more)
    assert not losses(tmp_path / "out")


@pytest.mark.parametrize("scored", [False, True])
def test_matryoshka(scored: bool, encoder: Path, tmp_path: Path) -> None:
    """The loss is the sum of those of the whole vectors and of their scaled beginnings; each is evaluated."""
    rows = [{**row, "score": (-1) ** i / 2} if scored else row for i, row in enumerate(pairs(5, 4))]
    data = jsonl(tmp_path / "data.jsonl", rows)
    run(
        encoder,
        data,
        tmp_path / "out",
        task="embedding",
        batch_size=5,
        max_steps=1,
        matryoshka="4,9",
        eval_data=data,
    )
    model, expected = monoblock.SentenceTransformer(str(encoder), device="cpu"), 0.0
    one, other = (torch.tensor(model.encode([row[name] for row in rows])) for name in ("anchor", "positive"))
    for width in (4, 9, one.shape[1]):
        a, b = (torch.nn.functional.normalize(x[:, :width], dim=-1) for x in (one, other))
        if scored:
            targets = torch.tensor([row["score"] for row in rows])
            expected += float(((a * b).sum(-1) - targets).square().mean())
        else:
            expected += float(torch.nn.functional.cross_entropy(20 * a @ b.T, torch.arange(5)))
    assert losses(tmp_path / "out")[0] == pytest.approx(expected, abs=2e-4)
    before = metrics(tmp_path / "out")[0]
    assert before["eval_loss"] == pytest.approx(expected, abs=2e-4)
    names = {"spearman"} if scored else {"accuracy", "recall@1", "recall@10", "mrr"}
    cut = {f"{'spearman' if scored else 'mrr'}_{width}" for width in (4, 9)}
    assert {name.removeprefix("eval_") for name in before} == {"step", "loss"} | names | cut
    if not scored:
        narrow = (
            torch.nn.functional.normalize(one[:, :4], dim=-1)
            @ torch.nn.functional.normalize(other[:, :4], dim=-1).T
        )
        ranks = (narrow >= narrow.diag()[:, None]).sum(-1)
        assert before["eval_mrr_4"] == pytest.approx(float((1 / ranks).mean()))


def test_widths_must_be_those_of_the_model(encoder: Path, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", pairs(4))
    with pytest.raises(ValueError, match=r"matryoshka=4,900: the vectors have .* give smaller widths"):
        run(encoder, data, tmp_path / "out", task="embedding", matryoshka="4,900")


def test_a_model_with_a_dense_module_resumes(encoder: Path, tmp_path: Path) -> None:
    """All modules are trained, and the result is that of an unbroken run."""
    from monoblock.embeddings import Dense, Pooling, Transformer

    transformer = Transformer(encoder)
    width = transformer.get_embedding_dimension()
    model = monoblock.SentenceTransformer(
        modules=[transformer, Pooling(width, "mean"), Dense(width, 8)], device="cpu"
    )
    model.save_pretrained(tmp_path / "model")
    data = jsonl(tmp_path / "data.jsonl", pairs(32))
    more = {"task": "embedding", "max_steps": 6, "save_every": 2}

    whole_and_broken(tmp_path / "model", data, tmp_path, **more)
    found = [
        dict(monoblock.SentenceTransformer(str(tmp_path / n)).named_parameters()) for n in ("whole", "broken")
    ]
    first = dict(model.named_parameters())
    assert found[0].keys() == found[1].keys() == first.keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in first)
    assert not torch.equal(first["2.linear.weight"].cpu(), found[0]["2.linear.weight"].cpu())


# ---------------------------------------------------------------------------- preferences

PREFERENCES = [
    {"prompt": prompt, "chosen": "quick.", "rejected": "lazy dog!"}
    for prompt in ("the fox ", "who? ", "over ")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_runs.folder(tmp_path_factory.mktemp("model"), "MistralForCausalLM")


@pytest.mark.parametrize("chat", [False, True])
def test_preferences(chat: bool, model: Path, tmp_path: Path) -> None:
    """The loss begins at log 2, the answers that are chosen win, and the margin is that of transformers' models."""
    rows: list[dict[str, Any]] = PREFERENCES
    if chat:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows = [{k: [{"role": roles[k], "content": v}] for k, v in row.items()} for row in rows]
    data = jsonl(tmp_path / "data.jsonl", rows * 4)
    more = {"task": "preference", "eval_data": data, "max_steps": 20, "max_length": 60, "dpo_beta": 0.3}
    settings = training_runs.options(model, data, tmp_path / "out", **more)
    trainer = Trainer(settings)
    result = trainer.train()
    before = next(line for line in metrics(tmp_path / "out") if line["step"] == 0)
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-5) and before[
        "eval_margin"
    ] == pytest.approx(0, abs=1e-4)
    assert losses(tmp_path / "out")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert result.metrics["accuracy"] == 1 and result.metrics["loss"] < 0.3
    margins = []
    for example in trainer.task.examples(trainer.records)[:3]:
        found = []
        for folder in (tmp_path / "out", model):
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
            for row in example.rows:
                ids = torch.tensor(row.ids[None].astype(np.int64))
                with torch.no_grad():
                    scores = theirs(ids).logits[0, :-1].log_softmax(-1)
                labels = torch.tensor(row.labels)[1:]
                own = labels != -100
                found.append(float(scores[own].gather(1, labels[own][:, None]).sum()))
        margins.append(0.3 * ((found[0] - found[2]) - (found[1] - found[3])))
    assert sum(margins) / 3 == pytest.approx(result.metrics["margin"], abs=1e-3)


def test_a_prompt_that_fills_the_row_is_skipped(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"prompt": "the quick brown fox jumps", "chosen": "a", "rejected": "b"}
    data = jsonl(tmp_path / "data.jsonl", [*PREFERENCES, long])
    run(model, data, tmp_path / "out", task="preference", max_steps=1, max_length=20)
    assert "1 of 4 records have nothing to learn and are skipped" in caplog.text
    with pytest.raises(
        ValueError, match="no prompt leaves room for an answer in 20 tokens; raise max_length"
    ):
        run(
            model,
            jsonl(tmp_path / "long.jsonl", [long]),
            tmp_path / "other",
            task="preference",
            max_length=20,
        )


# task -> class, rows of data, options
RESUMED: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "classification": (
        "MPNetForSequenceClassification",
        [{"text": row["anchor"], "label": i % 3} for i, row in enumerate(pairs(30))],
        {},
    ),
    "fill-mask": (
        "MPNetForMaskedLM",
        [{"text": row["anchor"] + " dog"} for row in pairs(30)],
        {"whole_word": True},
    ),
    "preference": ("GPTNeoForCausalLM", PREFERENCES * 8, {"max_length": 60}),
}


@pytest.mark.parametrize("task", RESUMED)
def test_tasks_resume(task: str, tmp_path: Path) -> None:
    """Over models with dropout: new heads, random masks and the reference are those of the unbroken run."""
    name, rows, more = RESUMED[task]
    model = training_runs.folder(tmp_path / "model", name)
    data = jsonl(tmp_path / "data.jsonl", rows)
    whole_and_broken(model, data, tmp_path, task=task, max_steps=6, save_every=2, **more)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
