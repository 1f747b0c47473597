"""Fine-tuning without a framework: options, recipes, data files, the order of the data, packing and metrics."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monoblock.training.data import Reading, read_documents, read_records
from monoblock.training.hub_datasets import dataset_source
from monoblock.training.log import curves
from monoblock.training.options import DEFAULTS, KINDS, TrainingOptions, read_recipe, write_recipe
from monoblock.training.packing import packed
from monoblock.training.schedule import Plan
from monoblock.training.scores import (
    answers,
    correlation,
    entities,
    multi_label,
    ranks,
    regression,
    retrieval,
    single_label,
    spans,
)
from monoblock.training.tasks.base import Example, TokenRow
from monoblock.training.trainer import Trainer

needs_yaml = pytest.mark.skipif(importlib.util.find_spec("yaml") is None, reason="needs PyYAML")


def test_the_package_imports_no_framework() -> None:
    code = (
        "import sys; from monoblock.training import Trainer, TrainingOptions; "
        "assert not {'torch', 'jax', 'tensorflow', 'peft', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# ---------------------------------------------------------------------------- datasets


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("owner/name", ("owner/name", None, None, None)),
        ("owner/name:train[:10%]+test", ("owner/name", None, None, "train[:10%]+test")),
        ("name@v1.0:part:train", ("name", "v1.0", "part", "train")),
        ("name:train", ("name", None, None, "train")),
        ("name", None),  # more likely a path that is mistyped
        ("folder/texts.jsonl", None),
        ("/folder/texts", None),
        ("../texts", None),
        ("a/b/c", None),
    ],
)
def test_names_of_datasets(given: str, found: tuple[str | None, ...] | None) -> None:
    source = dataset_source(given)
    assert found == (source and (source.name, source.revision, source.config, source.split))


def test_folders_of_datasets(tmp_path: Path) -> None:
    """A folder with files of records is a dataset; for documents only if a README.md declares it as one."""
    (tmp_path / "README.md").write_text("# Notes")
    assert dataset_source(str(tmp_path)) is None
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    assert dataset_source(str(tmp_path)) and not dataset_source(str(tmp_path), documents=True)
    assert [record.values["text"] for record in read_documents(str(tmp_path), None)] == ["# Notes"]
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---")
    assert dataset_source(str(tmp_path), documents=True)
    with pytest.raises(
        ValueError, match=r"a split is for datasets, but .*train.jsonl is a file: leave it out"
    ):
        read_records(f"{tmp_path / 'train.jsonl'}:train")


def test_datasets_need_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monoblock.training.hub_datasets.installed", lambda package: False)
    with pytest.raises(ImportError, match=r'owner/name: there is no such file .* "monoblock\[datasets\]"'):
        read_records("owner/name")
    options = TrainingOptions(data="owner/name", output=str(tmp_path / "out"))
    with pytest.raises(ImportError, match="datasets are read by the package datasets: pip install"):
        Trainer(options)


def test_tensorboard_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read."""
    monkeypatch.setattr("monoblock.training.boards.installed", lambda package: False)
    options = TrainingOptions(data="none", output=str(tmp_path / "out"), report_to="tensorboard")
    with pytest.raises(ImportError, match="report_to=tensorboard needs tensorboardX, which is not installed"):
        Trainer(options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_columns(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_text(
        '{"question": "a", "text": "b"}\n{"question": "c"}'
        if suffix == ".jsonl"
        else "question,text\na,b\nc,"
    )
    how = Reading(columns={"text": "question"})
    assert [record.values for record in read_records(str(path), how)] == [{"text": "a"}, {"text": "c"}]
    assert [record.values for record in read_documents(str(path), None, how)] == [
        {"text": "a"},
        {"text": "c"},
    ]
    with pytest.raises(
        ValueError, match=r"columns=text=body: .* has no column 'body'; it has 'question', 'text'"
    ):
        read_records(str(path), Reading(columns={"text": "body"}))
    with pytest.raises(ValueError, match=r"streaming is for datasets; .* is none: drop it"):
        read_records(str(path), Reading(streaming=True))
    (tmp_path / "plain.txt").write_text("a")
    with pytest.raises(
        ValueError, match=r"columns=.* is for JSONL, CSV and Parquet files and datasets; .* plain"
    ):
        read_documents(str(tmp_path / "plain.txt"), None, how)


# ---------------------------------------------------------------------------- options

WRONG: dict[str, dict[str, Any]] = {
    "task must be one of lm, .*, got 'sing'": {"task": "sing"},
    "batch_size must be at least 1, got 0": {"batch_size": 0},
    "batch_size must be an integer, got 'four'": {"batch_size": "four"},
    "batch_size must be an integer, got True": {"batch_size": True},
    "learning_rate must be above 0, got 0.0": {"learning_rate": 0},
    "learning_rate must be a finite number, got nan": {"learning_rate": float("nan")},
    "packing must be true or false, got 1": {"packing": 1},
    "freeze must be a list of strings, got 'wte'": {"freeze": "wte"},
    "square_decay must be below 1": {"square_decay": 1},
    "seed must be an integer of 64 bits": {"seed": 2**64},
    "epochs and max_steps exclude each other": {"epochs": 1, "max_steps": 1},
    "early_stopping needs eval_data or eval_fraction": {"early_stopping": 2},
    "best_metric needs keep_best or early_stopping": {"best_metric": "perplexity", "eval_fraction": 0.5},
    "best_metric must be one of loss, perplexity with task=lm, got 'mrr'": {
        "best_metric": "mrr",
        "eval_fraction": 0.5,
        "keep_best": True,
    },
    "columns must be FIELD=COLUMN, each field once, got .*text": {"columns": ["text"]},
    "columns must be FIELD=COLUMN, each field once": {"columns": ["text=a", "text=b"]},
    "lora_alpha needs lora_rank": {"lora_alpha": 2},
    "quantize must be one of int8, int4, got 'int2'": {"quantize": "int2", "lora_rank": 2},
    "chunk_size has no effect with task=lm": {"chunk_size": 2},
    "lora_rank has no effect with task=embedding": {"task": "embedding", "lora_rank": 2},
    "matryoshka has no effect with task=lm": {"matryoshka": "8"},
    "matryoshka must be different widths from 1, such as 64,128, got '8,x'": {
        "matryoshka": "8,x",
        "task": "embedding",
    },
    "matryoshka must be different widths from 1, such as 64,128, got '8, 8'": {
        "matryoshka": "8, 8",
        "task": "embedding",
    },
    "sample_prompt has no effect with task=qa": {
        "task": "qa",
        "sample_prompt": ["a"],
        "eval_fraction": 0.5,
    },
    "sample_prompt needs eval_data or eval_fraction": {"sample_prompt": ["a"]},
    "sample_prompt must be a text, got an empty one": {"sample_prompt": [" "], "eval_fraction": 0.5},
    "sample_tokens needs sample_prompt": {"sample_tokens": 3},
    "quantize needs lora_rank": {"quantize": "int4"},
    "merge needs unquantised weights: drop it or quantize=int8": {
        "quantize": "int8",
        "lora_rank": 2,
        "merge": True,
    },
    "freeze has no effect with lora_rank": {"freeze": ["a"], "lora_rank": 2},
    "problem has no effect with task=lm": {"problem": "regression"},
    "packing is for the tasks lm and chat, not for classification": {
        "packing": True,
        "task": "classification",
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**WRONG[message])


@needs_yaml
def test_a_recipe_holds_every_option(tmp_path: Path) -> None:
    options = TrainingOptions(task="classification", labels=["no", "yes"], learning_rate=1e-5, epochs=2)
    path = tmp_path / "recipe.yaml"
    path.write_text(write_recipe(options))
    assert set(read_recipe(path)) == set(KINDS) == set(DEFAULTS)
    assert TrainingOptions(**read_recipe(path)) == options


@needs_yaml
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "'learning_rat' is not an option of a recipe; there are: model, task"),
        ("epochs: many", "epochs must be an integer, got 'many'"),
        ("- lm", "a recipe is a mapping of options"),
        ("a: [", "is no YAML"),
        ("!!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_wrong_recipes_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(path)
    assert str(error.value).startswith(str(path))


# ---------------------------------------------------------------------------- data

RECORD = json.dumps({"text": "the fox", "label": "a"})
CLASSES: dict[str, Any] = {"task": "classification"}
CHAT: dict[str, Any] = {"task": "chat"}

# file name, content, options, message
BAD: list[tuple[str, str, dict[str, Any], str]] = [
    ("d.jsonl", RECORD + "\n{text", CLASSES, r"d.jsonl, line 2: no JSON \("),
    ("d.jsonl", "[" * 100_000, CLASSES, r"line 1: no JSON \("),
    ("d.jsonl", "[1]", CLASSES, "line 1: expected a JSON object, found list"),
    ("d.jsonl", '{"body": "a"}', CLASSES, "line 1: there is no field 'text'; the record has 'body'"),
    ("d.jsonl", '{"text": 3}', CLASSES, "line 1: 'text' must be a text, got 3"),
    ("d.jsonl", '{"text": "a", "label": null}', CLASSES, "line 1: there is no field 'label'"),
    (
        "d.jsonl",
        '{"text": "a", "label": 1.5}',
        CLASSES,
        "a label must be a name or an integer from 0, got 1.5",
    ),
    ("d.jsonl", '{"text": "a", "label": -1}', CLASSES, "integer labels count up from 0"),
    (
        "d.jsonl",
        '{"text": "a", "label": 9}',
        {**CLASSES, "labels": ["a", "b"]},
        "label 9 is none of the 2 known",
    ),
    ("d.jsonl", RECORD, CLASSES, "needs at least two different labels, found 1"),
    ("d.jsonl", "\n\n", CLASSES, "d.jsonl is empty: training needs at least one record"),
    ("d.csv", "text,label\na,b,c", CLASSES, "line 2: expected 2 fields, found 3"),
    ("d.csv", "words,label\na,b", CLASSES, "there is no field 'text'; the record has 'words', 'label'"),
    ("d.json", '{"a": 1', CLASSES, "d.json: no JSON"),
    ("d.xlsx", "PK", CLASSES, "this task reads .jsonl, .json, .csv, .tsv or .parquet files, not .xlsx"),
    ("d.txt", "  \n", {}, "d.txt is empty"),
    ("d.txt", "text", {"text_column": "body"}, "text_column='body' is for JSONL, CSV and Parquet files"),
    ("d.jsonl", '{"messages": []}', CHAT, "'messages' must be a list of {role, content}"),
    ("d.jsonl", '{"messages": [{"role": "user"}]}', CHAT, "each message must have a 'role' and a 'content'"),
    (
        "d.jsonl",
        '{"messages": [{"role": "user", "content": "a"}]}',
        CHAT,
        "no message has the role 'assistant'",
    ),
    (
        "d.jsonl",
        '{"text": "a", "label": "many"}',
        {**CLASSES, "problem": "regression"},
        "'label' must be a number or a list of numbers, got 'many'",
    ),
    (
        "d.jsonl",
        '{"text": "a", "label": [1, 2]}\n{"text": "b", "label": 1}',
        {**CLASSES, "problem": "regression"},
        "line 2: expected 2 numbers in 'label', found 1",
    ),
    (
        "d.jsonl",
        '{"text": "a", "label": "x"}',
        {**CLASSES, "problem": "multi-label"},
        "needs at least two different labels",
    ),
]

TAGS: dict[str, Any] = {"task": "token-classification"}
QUESTIONS: dict[str, Any] = {"task": "qa"}
PAIRS: dict[str, Any] = {"task": "embedding"}
PREFERENCES: dict[str, Any] = {"task": "preference"}

# rows of a .jsonl file, options, message
BAD_ROWS: list[tuple[list[Any], dict[str, Any], str]] = [
    ([{"tokens": "a b", "tags": [0, 1]}], TAGS, "'tokens' must be a list of words, got 'a b'"),
    ([{"tokens": ["a"], "tags": ["O", "O"]}], TAGS, "there are 1 words, but 2 labels"),
    ([{"tokens": ["a"], "tags": [1.5]}], TAGS, "'tags' must be a list of names or integers"),
    (
        [{"tokens": ["a"], "tags": [5]}],
        {**TAGS, "labels": ["O", "B-X"]},
        "label 5 is none of the 2 known ones",
    ),
    ([{"question": "who?", "context": "a dog", "answers": "dog"}], QUESTIONS, "'answers' must be an object"),
    (
        [{"question": "who?", "context": "a dog", "answers": {"text": ["dog"], "answer_start": [0]}}],
        QUESTIONS,
        "the context does not have the answer 'dog' at character 0",
    ),
    (
        [{"question": "who?", "context": "", "answers": {"text": [], "answer_start": []}}],
        QUESTIONS,
        "'context' must be a",
    ),
    (
        [{"data": [{"paragraphs": [{"context": "a"}]}]}],
        QUESTIONS,
        r"data\[0\].paragraphs\[0\]: 'qas' must be a list",
    ),
    ([{"anchor": "a"}] * 2, PAIRS, "there is no field 'positive'"),
    ([{"anchor": "a", "positive": "b"}], PAIRS, "at least two pairs, found one"),
    (
        [{"anchor": "a", "positive": "b", "negative": [1]}] * 2,
        PAIRS,
        "'negative' must be a text or a list of texts",
    ),
    (
        [{"anchor": "a", "positive": "b", "score": 1}, {"anchor": "a", "positive": "b"}],
        PAIRS,
        "line 2: some records of the file have a 'score', others have none",
    ),
    (
        [{"anchor": "a", "positive": "b", "score": 4.5}] * 2,
        PAIRS,
        "'score' must be a number from -1 to 1, as cosines are, got 4.5: scale the scores",
    ),
    ([{"anchor": "a", "positive": "b", "score": "high"}] * 2, PAIRS, "'score' must be a number"),
    ([{"anchor": "a", "positive": "b", "score": True}] * 2, PAIRS, "'score' must be a number"),
    ([{"anchor": "a", "positive": "b", "negative": "c", "score": 0}] * 2, PAIRS, "has no 'negative'"),
    (
        [{"anchor": "a", "positive": "b", "score": 0}] * 2,
        {**PAIRS, "similarity_scale": 2},
        "similarity_scale has no effect on pairs with a score: drop it",
    ),
    ([{"prompt": "a", "chosen": "b", "rejected": "b"}], PREFERENCES, "are the same answer"),
    (
        [{"prompt": "a", "chosen": [], "rejected": "b"}],
        PREFERENCES,
        "must be texts, or lists of {role, content}",
    ),
]


@pytest.mark.parametrize(("rows", "more", "message"), BAD_ROWS)
def test_bad_records_are_refused(rows: list[Any], more: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message) as error:
        Trainer(TrainingOptions(model="no-such-model", data=str(path), output=str(tmp_path / "out"), **more))
    assert "d.jsonl" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "content", "more", "message"), BAD)
def test_bad_data_is_refused_before_a_model_is_loaded(
    name: str, content: str, more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    options = TrainingOptions(
        model="no-such-model", data=str(tmp_path / name), output=str(tmp_path / "out"), **more
    )
    with pytest.raises(ValueError, match=message) as error:
        Trainer(options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_evaluation_labels_must_be_known(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(RECORD + '\n{"text": "b", "label": "b"}')
    (tmp_path / "eval.jsonl").write_text('{"text": "c", "label": "c"}')
    data, held = str(tmp_path / "train.jsonl"), str(tmp_path / "eval.jsonl")
    with pytest.raises(
        ValueError, match=r"eval.jsonl, line 1: the label 'c' is none of the 2 known ones \(a, b\)"
    ):
        Trainer(
            TrainingOptions(task="classification", data=data, eval_data=held, output=str(tmp_path / "out"))
        )


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    for name in ("d.txt", "d.jsonl", "d.csv"):
        (tmp_path / name).write_bytes(b'{"text": "\xff\xfe"}\n')
        with pytest.raises(ValueError, match="UTF-8"):
            Trainer(TrainingOptions(data=str(tmp_path / name), output=str(tmp_path / "out")))


def test_documents_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in (
        ("b.txt", "two"),
        ("a.md", "one"),
        ("sub/c.py", "three"),
        ("image.png", "none"),
        ("e.txt", " "),
    ):
        (tmp_path / name).write_text(text)
    found = read_documents(str(tmp_path), None)
    assert [record.values["text"] for record in found] == ["one", "two", "three"]
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        read_documents(str(tmp_path / "none"), None)
    with pytest.raises(ValueError, match="is a folder without files of records"):
        read_records(str(tmp_path))


def test_a_csv_file_has_quoted_fields(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('\ufefftext,label\n"a, ""b""\nc",1\n')
    (record,) = read_records(str(tmp_path / "d.csv"))
    assert record.values == {"text": 'a, "b"\nc', "label": "1"} and record.where.endswith("d.csv, line 3")


def test_a_parquet_file_has_nested_records(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows: list[dict[str, Any]] = [
        {"text": "one", "messages": [{"role": "user", "content": "a"}], "label": 1},
        {"text": "two", "messages": [], "label": None},
        {"text": "three", "messages": None, "label": 3},
    ]
    path = tmp_path / "d.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=2)
    records = read_records(str(path))
    assert [record.values for record in records] == rows
    with pytest.raises(ValueError, match=r"d.parquet, row 2: there is no field 'label'"):
        records[1].get("label")
    assert [record.values for record in read_documents(str(path), None)] == [
        {"text": r["text"]} for r in rows
    ]
    with pytest.raises(ValueError, match=r"d.parquet, row 1: 'label' must be a text, got 1"):
        read_documents(str(path), "label")
    with pytest.raises(
        ValueError, match="expected one column 'body'; the file has 'text', 'messages', 'label'"
    ):
        read_documents(str(path), "body")
    twice = arrow.Table.from_arrays([arrow.array(["a"])] * 2, names=["text", "text"])
    parquet.write_table(twice, path)
    with pytest.raises(ValueError, match="a column is there twice"):
        read_records(str(path))
    parquet.write_table(arrow.table({"text": arrow.array([], arrow.string())}), path)
    for read in (read_records, lambda path: read_documents(path, None)):
        with pytest.raises(ValueError, match=r"d.parquet is empty"):
            read(str(path))
    broken = arrow.Array.from_buffers(
        arrow.string(), 1, [None, arrow.py_buffer(b"\0\0\0\0\2\0\0\0"), arrow.py_buffer(b"\xff\xfe")]
    )
    parquet.write_table(arrow.table({"text": broken}), path)
    with pytest.raises(ValueError, match=r"d.parquet: a text is not UTF-8"):
        read_records(str(path))


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    """Files with wrong bytes are read, or refused with an error that names the file."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "d.parquet"
    parquet.write_table(arrow.table({"text": ["a fox", "a dog"] * 20}), path)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(150):
        content = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            content[at] = rng.integers(256)
        path.write_bytes(content[: rng.integers(1, len(whole))] if rng.random() < 0.2 else content)
        try:
            read_records(str(path))
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            refused += 1
    assert refused > 20


def test_parquet_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monoblock.vectors.parquet.installed", lambda _: False)
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    for task in ("lm", "classification"):
        with pytest.raises(ImportError, match=r'pip install "monoblock\[parquet\]"'):
            Trainer(
                TrainingOptions(task=task, data=str(tmp_path / "d.parquet"), output=str(tmp_path / "out"))
            )


# ---------------------------------------------------------------------------- order, packing, metrics


def test_each_epoch_has_all_rows_in_another_order() -> None:
    options = TrainingOptions(batch_size=3, accumulation=2, epochs=2, seed=5)
    plan = Plan.of(options, 20)
    assert plan.steps_per_epoch == 4 and plan.steps == 8
    epochs = [
        [row for step in range(4 * e, 4 * e + 4) for b in plan.batches(step) for row in b] for e in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20)) and epochs[0] != epochs[1]
    assert [len(batch) for batch in plan.batches(3)] == [2]
    assert plan.batches(5) == Plan.of(options, 20).batches(5)


def test_packed_rows_hold_every_example_once() -> None:
    rng = np.random.default_rng(0)
    examples = [
        Example((TokenRow(np.zeros(int(n), np.int32)),), "", i)
        for i, n in enumerate(rng.integers(1, 60, 500))
    ]
    rows = packed(examples, 64, seed=1)
    assert sorted(example.group for row in rows for example in row) == list(range(500))
    lengths = [sum(example.tokens for example in row) for row in rows]
    assert max(lengths) <= 64 and sum(lengths) / (64 * len(rows)) > 0.9
    assert packed(examples, 64, seed=1) == rows != packed(examples, 64, seed=2)


def test_metrics() -> None:
    found = single_label(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]), 4)
    assert found == pytest.approx({"accuracy": 0.75, "f1": (1 + 2 / 3 + 2 / 3) / 3})
    predicted, targets = np.array([[1, 0], [1, 1]]) > 0, np.array([[1, 0], [1, 0]]) > 0
    assert multi_label(predicted, targets) == pytest.approx({"accuracy": 0.5, "f1": 0.8})
    x, y = np.array([1.0, 2, 2, 9]), np.array([1.0, 3, 3, 4])
    assert ranks(x).tolist() == [0, 1.5, 1.5, 3]
    assert regression(x, y)["spearman"] == pytest.approx(1) and regression(x, y)["mse"] == pytest.approx(
        27 / 4
    )
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1]) and correlation(x, np.ones(4)) == 0


def test_metrics_of_entities_and_answers() -> None:
    tags = ["B-X", "I-X", "O", "I-Y", "I-X", "B-X", "O"]
    assert entities(tags) == [("X", 0, 2), ("Y", 3, 4), ("X", 4, 5), ("X", 5, 6)]
    found = spans([(["B-X", "O", "O"], ["B-X", "I-X", "O"]), (["O", "B-Y"], ["O", "B-Y"])])
    assert found == pytest.approx({"accuracy": 0.8, "precision": 0.5, "recall": 0.5, "f1": 0.5})
    assert spans([(["a"], ["b"])]) == {"accuracy": 0.0}
    pairs = [("The dog!", ["dog", "a cat"]), ("", [""]), ("dog", [""]), ("big dog", ["dog house"])]
    assert answers(pairs) == pytest.approx({"exact_match": 0.5, "f1": (1 + 1 + 0 + 0.5) / 4})


def test_metrics_of_a_search() -> None:
    """Against a sorted list; among equal similarities the relevant text is the last."""
    rng = np.random.default_rng(0)
    queries, texts = rng.normal(size=(40, 5)), rng.normal(size=(60, 5))
    relevant = [rng.choice(60, size=rng.integers(1, 4), replace=False).tolist() for _ in queries]
    parts: dict[str, list[float]] = {"recall@1": [], "recall@10": [], "mrr": []}
    for query, own in zip(queries, relevant, strict=True):
        order = sorted(range(60), key=lambda i: -(query @ texts[i]) / np.linalg.norm(texts[i]))
        parts["recall@1"].append(len({*order[:1]} & {*own}) / len(own))
        parts["recall@10"].append(len({*order[:10]} & {*own}) / len(own))
        parts["mrr"].append(1 / (1 + min(order.index(i) for i in own)))
    expected = {name: float(np.mean(values)) for name, values in parts.items()}
    assert retrieval(queries, texts, relevant, block=7) == pytest.approx(expected)
    same = np.ones((20, 3))
    assert retrieval(same, same, [[i] for i in range(20)]) == pytest.approx(
        {"recall@1": 0, "recall@10": 0, "mrr": 0.05}
    )


def test_curves_are_drawn() -> None:
    lines = [{"step": i, "loss": 3 / i, "extra": 1} for i in range(1, 2000)] + [
        {"step": 9, "eval_loss": float("nan")}
    ]
    text = curves(lines)
    assert (
        text.startswith("<svg") and "training loss" in text and "evaluation" not in text and "nan" not in text
    )
    assert text.count("L") < 500
    assert "<svg" in curves([]) and "<svg" in curves([{"step": 1, "loss": 2.0}])
