"""transformers' tools with our tokenizers: instance checks, data collators, Trainer, pipelines. The reference is the
same tokenizer loaded by transformers."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import monoblock
from monoblock import demo

TEXTS = ["def f(n):\n    return n", "import os", "class A:\n    x = [1, 2, 3]\n    y = None"]


@pytest.fixture
def ours(tmp_path: Path) -> Any:
    """The demo's tokenizer with a mask token."""
    made = monoblock.AutoTokenizer.from_pretrained(demo.path())
    made.add_special_tokens({"mask_token": "<|mask|>"})
    return made


@pytest.fixture
def theirs(ours: Any, tmp_path: Path) -> Any:
    ours.save_pretrained(tmp_path)
    return transformers.AutoTokenizer.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------- instance checks


def test_instances_of_transformers_classes(ours: Any) -> None:
    assert isinstance(ours, transformers.PreTrainedTokenizerBase)
    assert isinstance(ours, transformers.PreTrainedTokenizerFast)
    assert not isinstance(ours, transformers.PreTrainedTokenizer), "the slow class"
    assert not isinstance(ours, transformers.ProcessorMixin)
    assert isinstance(ours, monoblock.PreTrainedTokenizerFast)
    made = monoblock.MPNetTokenizer(vocab={"<s>": 0, "<pad>": 1, "</s>": 2, "[UNK]": 3, "<mask>": 4, "a": 5})
    assert made.__class__.__name__ == type(made).__name__ == "MPNetTokenizer"
    assert issubclass(made.__class__, monoblock.MPNetTokenizer)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_keep_the_class(copied: Any, ours: Any) -> None:
    again = copied(ours)
    assert type(again) is type(ours)
    assert again(TEXTS).input_ids == ours(TEXTS).input_ids
    assert again.mask_token == "<|mask|>"


def test_the_reported_class_creates_instances_of_ours(ours: Any) -> None:
    assert type(ours.__class__.from_pretrained(demo.path())) is type(ours)
    assert type(ours.__class__(tokenizer_object=ours.backend_tokenizer)) is type(ours)


def test_without_transformers_the_class_is_the_type() -> None:
    code = (
        "import sys; from monoblock import AutoTokenizer, demo; t = AutoTokenizer.from_pretrained(demo.path()); "
        "assert t.__class__ is type(t); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def rows(tokenizer: Any, **more: Any) -> list[dict[str, Any]]:
    return [
        {**tokenizer(text), **{name: value[i] for name, value in more.items()}}
        for i, text in enumerate(TEXTS)
    ]


def same(found: Any, wanted: Any) -> None:
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str, ours: Any, theirs: Any) -> None:
    ours.padding_side = theirs.padding_side = side
    labels = [0, 1, 2]
    found, wanted = (
        transformers.DataCollatorWithPadding(t, pad_to_multiple_of=8)(rows(t, label=labels))
        for t in (ours, theirs)
    )
    same(found, wanted)
    assert found["input_ids"].shape[1] % 8 == 0 and found["labels"].tolist() == labels


@pytest.mark.parametrize("mlm", [True, False])
def test_language_modeling(mlm: bool, ours: Any, theirs: Any) -> None:
    def batch(tokenizer: Any) -> Any:
        torch.manual_seed(0)
        return transformers.DataCollatorForLanguageModeling(tokenizer, mlm=mlm)(rows(tokenizer))

    same(batch(ours), batch(theirs))
    assert (batch(ours)["labels"] == -100).any()


def test_token_classification_seq2seq_and_multiple_choice_collators(ours: Any, theirs: Any) -> None:
    for kind, labels in (
        (transformers.DataCollatorForTokenClassification, "labels"),
        (transformers.DataCollatorForSeq2Seq, "labels"),
    ):
        found, wanted = (
            kind(t)(rows(t, **{labels: [[1] * len(ids) for ids in t(TEXTS).input_ids]}))
            for t in (ours, theirs)
        )
        same(found, wanted)
    choices = [
        transformers.DataCollatorForMultipleChoice(t)(
            [{**t([text, text[::-1]]), "labels": 1} for text in TEXTS]
        )
        for t in (ours, theirs)
    ]
    same(*choices)


# ---------------------------------------------------------------------------- Trainer


def test_trainer(ours: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Trainer(processing_class=ours)` pads, trains, and saves files that both libraries read."""
    config = transformers.GPTNeoConfig(
        vocab_size=len(ours), hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]],
        num_labels=3, pad_token_id=ours.pad_token_id,
    )  # fmt: skip
    model = transformers.GPTNeoForSequenceClassification(config)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=3, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=rows(ours, labels=[0, 1, 2]),
        processing_class=ours,
    )  # fmt: skip
    assert isinstance(trainer.data_collator, transformers.DataCollatorWithPadding)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for library in (transformers, monoblock):
        read = library.AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert read(TEXTS).input_ids == ours(TEXTS).input_ids


def test_pipelines_of_transformers_accept_it(ours: Any) -> None:
    config = transformers.GPTNeoConfig(
        vocab_size=len(ours), hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]
    )
    model = transformers.GPTNeoForCausalLM(config).eval()
    ids = ours(TEXTS[0], return_tensors="pt")
    wanted = model.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=ours)
    [[found]] = [pipe(TEXTS[0], max_new_tokens=4, do_sample=False, pad_token_id=0)]
    assert found["generated_text"] == ours.decode(wanted[0], skip_special_tokens=True)
