"""Fine-tuning on datasets through the real package `datasets`, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import training_runs
from training_runs import jsonl, losses, run, sentences

from monoblock.training import Trainer, evaluate_file
from monoblock.training.data import Reading, read_documents, read_records

torch.set_num_threads(1)

TEXTS = sentences(40)
CARD = """---
configs:
- config_name: colours
  default: true
  data_files:
  - {split: train, path: data/train-*.parquet}
  - {split: validation, path: data/validation.parquet}
- config_name: other
  data_files:
  - {split: test, path: other.parquet}
---
# A dataset
"""


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield


def rows(begin: int, end: int) -> datasets.Dataset:
    kinds = datasets.ClassLabel(names=["none", "fox"])  # not in alphabetical order
    features = datasets.Features({"sentence": datasets.Value("string"), "kind": kinds})
    values = {
        "sentence": TEXTS[begin:end],
        "kind": [int("fox" in text) for text in TEXTS[begin:end]],
    }
    return datasets.Dataset.from_dict(values, features=features)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of a dataset: two configs, splits in several files, a card."""
    folder = tmp_path_factory.mktemp("repository") / "colours"
    (folder / "data").mkdir(parents=True)
    for name, begin, end in (
        ("train-0-of-2", 0, 16),
        ("train-1-of-2", 16, 32),
        ("validation", 32, 40),
    ):
        rows(begin, end).to_parquet(folder / "data" / f"{name}.parquet")
    datasets.Dataset.from_dict({"text": TEXTS[:3]}).to_parquet(folder / "other.parquet")
    (folder / "README.md").write_text(CARD)
    return folder


def texts(data: str, **how: Any) -> list[str]:
    return [record.values["text"] for record in read_documents(data, None, Reading(**how))]


def test_splits_and_configs(repository: Path) -> None:
    mapping = {"columns": {"text": "sentence"}}
    assert texts(str(repository), **mapping) == TEXTS[:32]
    assert texts(f"{repository}:train[:4]", **mapping) == TEXTS[:4]
    assert texts(f"{repository}:validation", **mapping) == TEXTS[32:]
    assert texts(f"{repository}:train+validation", **mapping) == TEXTS
    assert texts(f"{repository}:other:test") == TEXTS[:3]
    assert texts(str(repository), **mapping, train=False) == TEXTS[32:]  # of an evaluation
    found = read_records(f"{repository}:train[:2]")
    assert [record.where for record in found] == [f"{repository}:train[:2], row {i}" for i in (1, 2)]
    assert found[0].values == {"sentence": TEXTS[0], "kind": "fox" if "fox" in TEXTS[0] else "none"}


def test_streaming(repository: Path) -> None:
    """The same rows, without files in the cache."""
    mapping = {"columns": {"text": "sentence"}, "streaming": True}
    before = set(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow"))
    assert texts(f"{repository}:colours:train", **mapping) == TEXTS[:32]
    assert texts(f"{repository}:train[:5]", **mapping) == TEXTS[:5]
    assert read_records(str(repository), Reading(streaming=True)).classes == {"kind": ["none", "fox"]}
    assert set(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")) == before
    with pytest.raises(ValueError, match="streaming takes a whole split or its first rows, such as train"):
        texts(f"{repository}:train[2:5]", **mapping)


def test_a_dataset_trains_as_its_file_does(repository: Path, tmp_path: Path) -> None:
    """The names of the classes have the dataset's order; a resumed run refuses other rows."""
    model = training_runs.folder(tmp_path / "model", "MPNetForSequenceClassification", num_labels=2)
    base = {"task": "classification", "max_steps": 6}
    mapping = {"columns": ["text=sentence", "label=kind"]}
    data = f"{repository}:train"
    result = run(model, Path(data), tmp_path / "out", **base, **mapping, eval_data=str(repository))
    assert 0 <= result.metrics["accuracy"] <= 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "none", "1": "fox"}
    plain = jsonl(tmp_path / "rows.jsonl", ({"text": x, "label": int("fox" in x)} for x in TEXTS[:32]))
    run(model, plain, tmp_path / "file", **base)
    assert losses(tmp_path / "out") == losses(tmp_path / "file")
    options = training_runs.options(model, Path(data), tmp_path / "out", **base, **mapping)
    changed = options.changed({"data": f"{repository}:train[:30]", "eval_data": str(repository)})
    with pytest.raises(ValueError, match="was written with digest of data="):
        Trainer(changed).train(resume=True)
    assert Trainer(options.changed({"eval_data": str(repository), "streaming": True})).train(resume=True)
    found = evaluate_file(
        options.changed({"model": str(tmp_path / "out"), "data": str(repository), "max_steps": None})
    )
    assert found["loss"] == pytest.approx(result.metrics["loss"], abs=1e-6)


def test_saved_datasets(tmp_path: Path) -> None:
    rows(0, 8).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows(0, 8), test=rows(8, 12)).save_to_disk(tmp_path / "several")
    mapping = {"columns": {"text": "sentence"}}
    assert texts(str(tmp_path / "one"), **mapping) == TEXTS[:8]
    assert texts(str(tmp_path / "several"), **mapping) == TEXTS[:8]
    assert texts(f"{tmp_path / 'several'}:test", **mapping) == TEXTS[8:12]
    assert texts(str(tmp_path / "several"), **mapping, train=False) == TEXTS[8:12]
    for data, how, problem in (
        ("one:train", {}, "the folder holds one dataset without splits: drop 'train'"),
        ("several:all", {}, "the dataset has no split 'all'; it has train, test"),
        ("several:train[:2]", {}, "only whole splits are read"),
        ("several", {"streaming": True}, "streaming has no effect on a dataset that save_to_disk wrote"),
    ):
        with pytest.raises(ValueError, match=problem):
            texts(str(tmp_path / data), **mapping, **how)


def test_lists_and_classes_of_lists(tmp_path: Path) -> None:
    """Conversations, answers and tags have the values of a JSONL file."""
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-FOX"]))
    made = datasets.Dataset.from_dict(
        {
            "messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]],
            "answers": [{"text": ["fox"], "answer_start": [4]}],
            "tags": [[0, 1]],
        }
    ).cast_column("tags", tags)
    made.to_parquet(tmp_path / "train.parquet")
    (record,) = read_records(str(tmp_path))
    assert record.values["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    assert record.values["answers"] == {"text": ["fox"], "answer_start": [4]}
    assert record.values["tags"] == ["O", "B-FOX"]


def test_what_is_refused(repository: Path, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.mkdir()
    jsonl(script / "data.jsonl", [{"text": "a"}])
    (script / "script.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(ValueError, match="is a loading script, whose code is not run: convert it to Parquet"):
        read_records(str(script))
    with pytest.raises(ValueError, match="the dataset has no split 'dev'; it has train, validation"):
        texts(f"{repository}:dev")
    (tmp_path / "rows").mkdir()
    rows(0, 4).to_parquet(tmp_path / "rows" / "test.parquet")
    with pytest.raises(ValueError, match=r"has no split train; name one of test, such as .*rows:test"):
        read_records(str(tmp_path / "rows"))
    broken = tmp_path / "broken"
    broken.mkdir()
    np.random.default_rng(0).integers(0, 255, 400, dtype=np.uint8).tofile(broken / "train.parquet")
    with pytest.raises(ValueError, match="broken: the dataset cannot be read: "):
        read_records(str(broken))


def test_names_without_a_network() -> None:
    with pytest.raises(FileNotFoundError, match=r"no dataset 'owner/name' in the cache \(offline\)"):
        read_records("owner/name", Reading(offline=True))
    assert not datasets.config.HF_HUB_OFFLINE


def test_names_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(Exception):
        response = SimpleNamespace(status_code=404)

    def asked(self: Any, name: str, *, revision: str | None, timeout: float) -> None:
        assert (name, revision) == ("owner/name", "v1") and timeout <= 10
        raise Missing

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", asked)
    with pytest.raises(FileNotFoundError, match="no such file or folder, and no dataset 'owner/name' on the"):
        read_records("owner/name@v1:train")
