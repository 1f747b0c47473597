"""Fine-tuning: the loss curve of transformers' Trainer, and a score on a task with a known answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_runs
import transformers
from documents import DOCS, blocks
from safetensors.torch import load_file
from torch.utils.data import Sampler
from training_runs import jsonl, losses, run, sentences

import monoblock
import monoblock.training
from monoblock.training import Trainer
from monoblock.training.schedule import Plan, learning_rate
from monoblock.training.trainer import prepare

torch.set_num_threads(1)

STEPS = 50
STEADY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class InOrder(Sampler[int]):
    """The rows of the plan's first epoch."""

    def __init__(self, plan: Plan) -> None:
        self.order = plan.order(0).tolist()

    def __iter__(self) -> Any:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def transformers_losses(model: Path, settings: Any, output: Path) -> list[float]:
    """The losses of transformers' Trainer with our examples, in our order."""
    trainer = Trainer(settings)
    prepared = prepare(settings, trainer.task)
    examples = trainer.task.examples(trainer.records)
    auto = getattr(transformers, trainer.task.auto)
    rows = []
    for example in examples:
        (row,) = example.rows
        names = trainer.task.targets
        if row.labels is not None:
            found: dict[str, Any] = {"labels": row.labels.tolist()}
        else:
            found = dict(zip(names, example.target if len(names) > 1 else [example.target], strict=True))
        rows.append({"input_ids": row.ids.tolist(), **found})

    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)

        def padded(values: list[int], value: int) -> list[int]:
            return values + [value] * (longest - len(values))

        found = {
            "input_ids": [padded(row["input_ids"], trainer.task.tokenizer.pad_token_id) for row in batch],
            "attention_mask": [padded([1] * len(row["input_ids"]), 0) for row in batch],
        }
        for name in batch[0].keys() - {"input_ids"}:
            values = [row[name] for row in batch]
            found[name] = values if isinstance(values[0], int) else [padded(v, -100) for v in values]
        return {name: torch.tensor(values) for name, values in found.items()}

    plan = Plan.of(settings, len(examples))

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return InOrder(plan)

    transformers.set_seed(settings.seed)
    theirs = auto.from_pretrained(model, **prepared.fields)
    arguments = transformers.TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps or 0,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    made = Ordered(theirs, arguments, train_dataset=rows, data_collator=collate)
    made.train()
    return [line["loss"] for line in made.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    ("name", "schedule", "more"),
    [
        ("MistralForCausalLM", "linear", {"warmup_steps": 5, "accumulation": 2}),
        ("GPTNeoForCausalLM", "cosine", {"max_grad_norm": 0.5}),
    ],
)
def test_lm_has_the_loss_curve_of_transformers(name: str, schedule: str, more: Any, tmp_path: Path) -> None:
    model = training_runs.folder(tmp_path / "model", name)
    per_step = 4 * more.get("accumulation", 1)
    data = jsonl(tmp_path / "data.jsonl", ({"text": text} for text in sentences(STEPS * per_step)))
    settings = training_runs.options(
        model,
        data,
        tmp_path / "out",
        max_steps=STEPS,
        schedule=schedule,
        weight_decay=0.1,
        max_length=24,
        **more,
    )
    Trainer(settings).train()
    expected = transformers_losses(model, settings, tmp_path / "theirs")
    assert len(expected) == STEPS and expected[-1] < expected[0] - 0.5
    np.testing.assert_allclose(losses(tmp_path / "out"), expected, atol=1e-4)


def labelled(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts, and whether they have the word fox."""
    return [{"text": text, "label": "fox" if "fox" in text else "none"} for text in sentences(count, seed)]


@pytest.mark.parametrize("name", ["MPNetForSequenceClassification", "MistralForSequenceClassification"])
def test_classification_has_the_loss_curve_of_transformers(name: str, tmp_path: Path) -> None:
    dropout = STEADY if "MPNet" in name else {}
    model = training_runs.folder(tmp_path / "model", name, num_labels=2, **dropout)
    data = jsonl(tmp_path / "data.jsonl", labelled(STEPS * 4))
    settings = training_runs.options(model, data, tmp_path / "out", max_steps=STEPS, task="classification")
    Trainer(settings).train()
    expected = transformers_losses(model, settings, tmp_path / "theirs")
    np.testing.assert_allclose(losses(tmp_path / "out"), expected, atol=1e-4)


def test_qa_has_the_loss_curve_of_transformers(tmp_path: Path) -> None:
    model = training_runs.folder(tmp_path / "model", "MPNetForQuestionAnswering", num_labels=2, **STEADY)
    data = jsonl(tmp_path / "data.jsonl", questions(STEPS * 4))
    more = {"max_steps": STEPS, "task": "qa", "max_length": 20, "doc_stride": 3}
    settings = training_runs.options(model, data, tmp_path / "out", **more)
    Trainer(settings).train()
    expected = transformers_losses(model, settings, tmp_path / "theirs")
    np.testing.assert_allclose(losses(tmp_path / "out"), expected, atol=1e-4)


# ---------------------------------------------------------------------------- scores


def test_lm_learns_a_text(tmp_path: Path) -> None:
    """A text that repeats: each token after the first few is certain, so the perplexity tends to 1."""
    model = training_runs.folder(tmp_path / "model", "GPTNeoForCausalLM")
    data = tmp_path / "data.txt"
    data.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    result = run(
        model,
        data,
        tmp_path / "out",
        epochs=20,
        learning_rate=5e-3,
        max_length=60,
        eval_fraction=0.1,
        batch_size=4,
    )
    assert result.metrics["perplexity"] < 1.2
    tuned = monoblock.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = monoblock.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("the quick brown fox", return_tensors="pt")["input_ids"]
    found = tokenizer.decode(tuned.generate(ids, max_new_tokens=10, do_sample=False)[0])
    assert found.endswith(" jumps ove")


def test_windows_predict_each_token_once(tmp_path: Path) -> None:
    model = training_runs.folder(tmp_path / "model", "GPTNeoForCausalLM")
    texts = ["the quick brown fox " * 5, "the lazy dog"]
    data = jsonl(tmp_path / "data.jsonl", ({"body": text} for text in texts))
    settings = training_runs.options(model, data, tmp_path / "out", text_column="body", max_length=10)
    trainer = Trainer(settings)
    prepare(settings, trainer.task)
    tokenizer = trainer.task.tokenizer
    predicted = [
        int(label)
        for example in trainer.task.examples(trainer.records)
        for label in example.rows[0].labels  # pyright: ignore[reportOptionalIterable]
        if label != -100
    ]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    assert predicted == [token for row in ids for token in row[1:]]


@pytest.mark.parametrize("name", ["MPNetForSequenceClassification", "GPTNeoForSequenceClassification"])
def test_single_label(name: str, tmp_path: Path) -> None:
    model = training_runs.folder(tmp_path / "model", name)
    data = jsonl(tmp_path / "train.jsonl", labelled(160))
    held = jsonl(tmp_path / "eval.jsonl", labelled(40, seed=1))
    more = {"task": "classification", "eval_data": held, "epochs": 8, "learning_rate": 5e-3, "batch_size": 16}
    result = run(model, data, tmp_path / "out", **more)
    assert result.metrics["accuracy"] >= 0.95 and result.metrics["f1"] >= 0.9
    classify = monoblock.pipeline("text-classification", str(tmp_path / "out"))
    assert classify("the quick fox")[0]["label"] == "fox"
    assert classify("the lazy dog")[0]["label"] == "none"


def test_multi_label(tmp_path: Path) -> None:
    model = training_runs.folder(tmp_path / "model", "MPNetForSequenceClassification")
    rows = [
        {"text": text, "label": [word for word in ("fox", "the") if word in text.split()]}
        for text in sentences(200)
    ]
    data, held = jsonl(tmp_path / "train.jsonl", rows[:160]), jsonl(tmp_path / "eval.jsonl", rows[160:])
    more = {"task": "classification", "problem": "multi-label", "eval_data": held}
    result = run(model, data, tmp_path / "out", epochs=8, learning_rate=5e-3, batch_size=16, **more)
    assert result.metrics["accuracy"] >= 0.9 and result.metrics["f1"] >= 0.95


def test_regression_of_a_csv_file(tmp_path: Path) -> None:
    model = training_runs.folder(tmp_path / "model", "MPNetForSequenceClassification")
    lines = [f"{text},{len(text.split()) / 4}" for text in sentences(200)]
    data, held = tmp_path / "train.csv", tmp_path / "eval.csv"
    for path, part in ((data, lines[:160]), (held, lines[160:])):
        path.write_text("\n".join(["sentence,words", *part]) + "\n")
    more = {
        "task": "classification",
        "problem": "regression",
        "text_column": "sentence",
        "label_column": "words",
    }
    result = run(
        model, data, tmp_path / "out", epochs=10, learning_rate=5e-3, batch_size=16, eval_data=held, **more
    )
    assert result.metrics["mse"] < 0.03 and result.metrics["spearman"] > 0.9


CHATS = [
    {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": answer}]}
    for word, answer in (("the fox", "quick."), ("the dog", "lazy!"), ("who?", "fox, dog."))
]
GENERATION = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "</s>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("template", [None, GENERATION])
def test_chat_answers(template: str | None, tmp_path: Path) -> None:
    model = training_runs.folder(tmp_path / "model", "GPTNeoForCausalLM")
    data = jsonl(tmp_path / "data.jsonl", CHATS * 10)
    more: dict[str, Any] = {"task": "chat", "max_length": 64, "epochs": 14, "learning_rate": 1e-2}
    if template is not None:
        (tmp_path / "template.jinja").write_text(template)
        more["chat_template"] = tmp_path / "template.jinja"
    settings = training_runs.options(model, data, tmp_path / "out", **more)
    trainer = Trainer(settings)
    result = trainer.train()
    assert result.loss < 0.1
    tokenizer = trainer.task.tokenizer
    for example, chat in zip(trainer.task.examples(trainer.records[:3]), CHATS, strict=True):
        (row,) = example.rows
        assert row.labels is not None
        answer = chat["messages"][1]["content"]
        assert tokenizer.decode(row.labels[row.labels != -100].tolist()) == answer + (
            "</s>" if template else ""
        )
    tuned = monoblock.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded = monoblock.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = [{"role": "user", "content": "the dog"}]
    ids = loaded.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    found = tuned.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert loaded.decode(found, skip_special_tokens=True).startswith("lazy!")


@pytest.mark.parametrize("task", ["lm", "chat"])
def test_samples(task: str, tmp_path: Path) -> None:
    """They are what the saved model generates, and change neither the losses nor the weights. A resumed run has each
    once."""
    model = training_runs.folder(tmp_path / "model", "MistralForCausalLM")
    rows = CHATS if task == "chat" else [{"text": text} for text in sentences(12)]
    data = jsonl(tmp_path / "data.jsonl", rows * 2)
    prompts = ["the dog", "the quick"]
    more: dict[str, Any] = {
        "task": task,
        "eval_data": data,
        "max_steps": 4,
        "eval_every": 1,
        "max_length": 48,
    }
    run(model, data, tmp_path / "plain", **more)
    settings = training_runs.options(
        model, data, tmp_path / "out", **more, sample_prompt=prompts, sample_tokens=5, save_every=2
    )
    shown: list[Any] = []

    def stop(progress: Any) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(settings).train(show=stop, show_sample=shown.append)
    shown = [sample for sample in shown if sample.step <= 2]
    Trainer(settings).train(resume=True, show_sample=shown.append)
    assert losses(tmp_path / "out") == losses(tmp_path / "plain")
    for name, weight in load_file(tmp_path / "plain" / "model.safetensors").items():
        assert torch.equal(weight, load_file(tmp_path / "out" / "model.safetensors")[name])
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert lines == [vars(sample) for sample in shown]
    assert [(line["step"], line["prompt"]) for line in lines] == [(s, p) for s in range(5) for p in prompts]
    tuned = monoblock.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded = monoblock.AutoTokenizer.from_pretrained(tmp_path / "out")
    for line in lines[-2:]:
        if task == "chat":
            chat = [{"role": "user", "content": line["prompt"]}]
            ids = loaded.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")[
                "input_ids"
            ]
        else:
            ids = loaded(line["prompt"], return_tensors="pt")["input_ids"]
        found = tuned.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert line["text"] == loaded.decode(found, skip_special_tokens=True)


def test_a_prompt_must_fit_the_positions(tmp_path: Path) -> None:
    model = training_runs.folder(tmp_path / "model", "GPTNeoForCausalLM")
    data = jsonl(tmp_path / "data.jsonl", [{"text": text} for text in sentences(8)])
    with pytest.raises(
        ValueError, match=r"sample_prompt 'the dog' has .* tokens, with sample_tokens .* positions"
    ):
        run(
            model,
            data,
            tmp_path / "out",
            max_length=16,
            eval_data=data,
            sample_prompt=["the dog"],
            sample_tokens=10_000,
        )


def test_schedules_are_those_of_transformers() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1))]
    for name in ("linear", "cosine", "constant"):
        for warmup in (0, 4):
            settings = monoblock.training.TrainingOptions(
                learning_rate=0.5, schedule=name, warmup_steps=warmup
            )
            optimizer = torch.optim.SGD(weights, lr=0.5)
            kind = "constant_with_warmup" if name == "constant" else name
            theirs = transformers.get_scheduler(kind, optimizer, warmup, 20)
            for step in range(20):
                assert learning_rate(settings, step, 20) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
                optimizer.step()
                theirs.step()


def test_the_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of docs/training.md, with one step over one page."""
    (code,) = blocks(DOCS / "training.md", "python")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "demo.md").write_text((DOCS / "demo.md").read_text()[:2000])
    monkeypatch.chdir(tmp_path)
    exec(code.replace("max_steps=60", "max_steps=1, max_length=32"), {})
    assert monoblock.AutoModelForCausalLM.from_pretrained("my-model").config.n_layers == 4


# ---------------------------------------------------------------------------- tokens, questions, masks

NAMES = ("köln", "fox", "dog")


def tagged(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Words, and entities: a name, perhaps with "quick" before it."""
    rows = []
    for text in sentences(count, seed):
        words = text.replace("jump", "köln").split()
        tags = ["O"] * len(words)
        for i, word in enumerate(words):
            if word in NAMES:
                begins = i == 0 or words[i - 1] != "quick"
                tags[i] = "B-NAME" if begins else "I-NAME"
                if not begins:
                    tags[i - 1] = "B-NAME"
        rows.append({"tokens": words, "tags": tags})
    return rows


def test_token_classification(tmp_path: Path) -> None:
    model = training_runs.folder(tmp_path / "model", "MPNetForTokenClassification", **STEADY)
    data = jsonl(tmp_path / "train.jsonl", tagged(200))
    held = jsonl(tmp_path / "eval.jsonl", tagged(40, seed=1))
    more = {"task": "token-classification", "eval_data": held, "epochs": 12, "learning_rate": 5e-3}
    result = run(model, data, tmp_path / "out", batch_size=16, **more)
    assert result.metrics["f1"] >= 0.9 and result.metrics["accuracy"] >= 0.95
    find = monoblock.pipeline("token-classification", str(tmp_path / "out"), aggregation_strategy="simple")
    assert [group["word"] for group in find("over the fox the lazy dog the")] == ["fox", "dog"]


def questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The answer is the word after "the" of the context; without "the" there is none."""
    rows = []
    for text in sentences(count, seed):
        words = text.split()
        words = [*(w for w in words if w != "the"), "dog"]
        at = 7 * len(rows) % len(words)
        answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
        if len(rows) % 4:
            before = " ".join([*words[:at], "the", ""])
            answers = {"text": [words[at]], "answer_start": [len(before)]}
            words.insert(at, "the")
        rows.append({"question": "who?", "context": " ".join(words), "answers": answers})
    return rows


def test_question_answering_with_windows(tmp_path: Path) -> None:
    """Contexts are longer than a row, so they have several windows."""
    model = training_runs.folder(tmp_path / "model", "MPNetForQuestionAnswering", num_labels=2, **STEADY)
    nested = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": row["context"],
                        "qas": [
                            {
                                "question": row["question"],
                                "is_impossible": not row["answers"]["text"],
                                "answers": [
                                    {"text": text, "answer_start": start}
                                    for text, start in zip(*row["answers"].values(), strict=True)
                                ],
                            }
                        ],
                    }
                    for row in questions(300)
                ]
            }
        ]
    }
    (tmp_path / "train.json").write_text(json.dumps(nested))
    held = jsonl(tmp_path / "eval.jsonl", questions(40, seed=1))
    settings = training_runs.options(
        model,
        tmp_path / "train.json",
        tmp_path / "out",
        task="qa",
        eval_data=held,
        epochs=10,
        learning_rate=5e-3,
        batch_size=32,
        max_length=12,
        doc_stride=3,
    )
    trainer = Trainer(settings)
    result = trainer.train()
    assert result.metrics["exact_match"] >= 0.9 and result.metrics["f1"] >= 0.9
    examples = trainer.task.examples(trainer.records)
    assert len(examples) > len({example.group for example in examples}) == 300
    for example in examples:  # the tokens of each target are the answer's
        start, end = example.target
        if (start, end) != (0, 0):
            offsets = example.notes["offsets"]
            text = example.notes["context"][offsets[start, 0] : offsets[end, 1]]
            assert text == example.notes["answers"][0]


@pytest.mark.parametrize("whole_word", [False, True])
def test_fill_mask(whole_word: bool, tmp_path: Path) -> None:
    """In a text that repeats, each hidden word follows from its neighbours."""
    model = training_runs.folder(tmp_path / "model", "MPNetForMaskedLM", **STEADY)
    data = tmp_path / "data.txt"
    data.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    more = {"task": "fill-mask", "whole_word": whole_word, "eval_fraction": 0.2, "epochs": 25}
    settings = training_runs.options(model, data, tmp_path / "out", learning_rate=5e-3, **more)
    trainer = Trainer(settings)
    if not whole_word:
        assert trainer.train().metrics["accuracy"] >= 0.8
    else:
        prepare(settings, trainer.task)
    example = trainer.task.examples(trainer.records)[0]
    drawn = [trainer.task.drawn(example, np.random.default_rng(i)) for i in range(300)]
    labels = np.stack([one.rows[0].labels for one in drawn])
    ids = np.stack([one.rows[0].ids for one in drawn])
    chosen = labels != -100
    assert not chosen[:, [0, -1]].any() and chosen.any(1).all()
    assert 0.12 < chosen[:, 1:-1].mean() < 0.18
    mask = trainer.task.tokenizer.mask_token_id
    assert 0.75 < (ids == mask)[chosen].mean() < 0.85 and 0.07 < (ids == labels)[chosen].mean() < 0.13
    assert (ids[~chosen] == np.broadcast_to(example.rows[0].ids, ids.shape)[~chosen]).all()
    if whole_word:
        pairs = np.diff(example.notes["words"]) == 0
        assert pairs.any() and (chosen[:, 1:] == chosen[:, :-1])[:, pairs].all()


def test_evaluate_is_the_trainers_evaluation(tmp_path: Path) -> None:
    """The metrics of a saved model on the same data are those of the run."""
    model = training_runs.folder(tmp_path / "model", "MPNetForSequenceClassification")
    data = jsonl(tmp_path / "train.jsonl", labelled(80))
    held = jsonl(tmp_path / "eval.jsonl", labelled(40, seed=1))
    result = run(model, data, tmp_path / "out", task="classification", eval_data=held, epochs=2)
    settings = monoblock.training.TrainingOptions(
        model=str(tmp_path / "out"), data=str(held), task="classification", device="cpu"
    )
    assert monoblock.training.evaluate_file(settings) == pytest.approx(result.metrics, rel=1e-5)
