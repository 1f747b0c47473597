"""Pipelines: construction, datasets and batches, question answering, entities, and errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_families
import torch
from tiny_families import monoblock_model
from tiny_pipelines import LONG, TEXT, folder

import monoblock
from monoblock import AutoTokenizer, pipeline
from monoblock.pipelines import TASKS, KeyDataset
from monoblock.pipelines.entities import TokenGroup, merge_entities, merge_words, without_overlaps

TINY = monoblock_model("MPNetModel", **tiny_families.fields("mpnet"))
GREEDY = {"do_sample": False, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    names = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM")
    made = {f"MPNetFor{name}": {"num_labels": 2} if name.startswith("Q") else {} for name in names}
    made |= {"MistralForCausalLM": {}, "MPNetModel": {}}
    return {name: str(folder(tmp_path_factory.mktemp(name), name, **fields)) for name, fields in made.items()}


# ---------------------------------------------------------------------- construction


def test_default_task_is_that_of_the_model(paths: dict[str, str]) -> None:
    tasks = {name: pipeline(model=path, device="cpu").task for name, path in paths.items()}
    assert tasks == {
        "MPNetForSequenceClassification": "text-classification",
        "MPNetForTokenClassification": "token-classification",
        "MPNetForQuestionAnswering": "question-answering",
        "MPNetForMaskedLM": "fill-mask",
        "MistralForCausalLM": "text-generation",
        "MPNetModel": "feature-extraction",
    }


def test_sentence_transformers_checkpoints_get_no_random_head(
    paths: dict[str, str], tmp_path: Path, logs: Any
) -> None:
    """Their config names the class of the base model, whose head the files lack."""
    path = tmp_path / "model"
    shutil.copytree(paths["MPNetModel"], path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["MPNetForMaskedLM"]}))
    assert pipeline(model=str(path), device="cpu").task == "fill-mask"  # with a warning, as transformers does
    assert any("newly initialised" in message for message in logs.messages)
    logs.clear()
    (path / "modules.json").write_text("[]")
    made = pipeline(model=str(path), device="cpu")
    assert made.task == "feature-extraction"
    assert type(made.model).__name__ == "MPNetModel"
    with pytest.raises(
        ValueError, match="no head for 'fill-mask', only the weights that sentence-transformers"
    ):
        pipeline("fill-mask", str(path), device="cpu")
    assert not [message for message in logs.messages if "newly initialised" in message]
    whole = tmp_path / "whole"
    shutil.copytree(paths["MPNetForMaskedLM"], whole)
    (whole / "modules.json").write_text("[]")
    assert pipeline(model=str(whole), device="cpu").task == "fill-mask"


def test_objects_dtypes_and_default_arguments(paths: dict[str, str]) -> None:
    path = paths["MistralForCausalLM"]
    named = pipeline("text-generation", path, torch_dtype=torch.bfloat16, device=-1, **GREEDY)
    assert named.dtype == torch.bfloat16
    assert named.device == torch.device("cpu")
    model = monoblock.MistralForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    given = pipeline(model=model, tokenizer=tokenizer, device="cpu", **GREEDY)
    assert given.model is model
    assert given("the fox") == pipeline(model=path, device="cpu")("the fox", **GREEDY)
    assert given("the fox", max_new_tokens=1) != given("the fox")


def test_save_pretrained(paths: dict[str, str], tmp_path: Path) -> None:
    pipe = pipeline("ner", paths["MPNetForTokenClassification"], device=-1)
    pipe.save_pretrained(tmp_path)
    assert pipeline(model=tmp_path, device=-1)(TEXT) == pipe(TEXT)


def test_invalid_arguments_raise(paths: dict[str, str]) -> None:
    path = paths["MistralForCausalLM"]
    cases: tuple[tuple[type[Exception], str, dict[str, Any]], ...] = (
        (ValueError, "did you mean 'text-generation'", {"task": "text-generatoin"}),
        (ValueError, "did you mean 'ner'", {"task": "nerr", "model": path}),
        (ValueError, "no default model", {"task": "fill-mask"}),
        (ValueError, "pass a task", {}),
        (ValueError, "without a model", {"task": "ner", "tokenizer": path}),
        (TypeError, "did you mean 'max_new_tokens'", {"model": path, "max_new_token": 3}),
        (TypeError, "did you mean 'batch_size'", {"model": path, "batchsize": 3}),
        (TypeError, "no argument 'input_ids'", {"model": path, "input_ids": []}),
        (ValueError, "batch_size=0", {"model": path, "batch_size": 0}),
        (ValueError, "framework='jax': expected one of 'pt'", {"model": path, "framework": "jax"}),
        (ValueError, "the model is a MPNetModel, of framework='pt'", {"model": TINY, "framework": "flax"}),
        (ValueError, "exclude each other", {"model": path, "device": 0, "device_map": "auto"}),
        (ValueError, "is no device", {"model": path, "device": "nowhere"}),
        (ValueError, "are the same argument", {"model": path, "dtype": "float32", "torch_dtype": "float32"}),
        (ValueError, "given twice", {"model": path, "revision": "a", "model_kwargs": {"revision": "b"}}),
        (
            TypeError,
            "one of monoblock's models",
            {"task": "ner", "model": torch.nn.Linear(1, 1), "tokenizer": path},
        ),
        (
            ValueError,
            "'causal'",
            {"task": "text-generation", "model": TINY, "tokenizer": path},
        ),
        (ValueError, "needs a tokenizer", {"model": TINY}),
        (ValueError, "no effect", {"model": TINY, "tokenizer": path, "dtype": "float16"}),
    )
    for error, message, arguments in cases:
        with pytest.raises(error, match=re.escape(message)):
            pipeline(**arguments)


def test_every_task() -> None:
    import importlib

    for task, (name, auto) in TASKS.items():
        found = getattr(importlib.import_module(f"monoblock.pipelines.{task.replace('-', '_')}"), name)
        assert found.task == task
        assert hasattr(monoblock, auto)


# ---------------------------------------------------------------------- many inputs


def alike(ours: Any, theirs: Any) -> None:
    """Equal; floats to 2e-5, for float32 with and without padding."""
    if isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=2e-5)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        alike(list(ours.values()), list(theirs.values()))
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            alike(one, other)
    else:
        assert ours == theirs


class Data:
    """A dataset with a length whose `__getitem__` never raises IndexError."""

    def __init__(self, *items: Any) -> None:
        self.items, self.reads = items, 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return {"text": self.items[index % len(self.items)]}


def test_datasets_are_read_lazily(paths: dict[str, str]) -> None:
    pipe = pipeline(model=paths["MPNetForSequenceClassification"], device=-1)
    data = Data(TEXT, "the dog", "a fox", "over", "who?")
    answers = pipe(KeyDataset(data, "text"), batch_size=2)
    assert data.reads == 0
    first = next(answers)
    assert data.reads == 2
    alike([first, *answers], [pipe(text)[0] for text in data.items])


@pytest.mark.parametrize("size", [1, 2, 7])
def test_answers_do_not_depend_on_the_batch(paths: dict[str, str], size: int) -> None:
    texts = [TEXT, "the dog", "a lazy fox jumps"]
    for name in ("MPNetForTokenClassification", "MPNetModel", "MistralForCausalLM"):
        pipe = pipeline(model=paths[name], device=-1, **(GREEDY if name.startswith("Mistral") else {}))
        texts = [TEXT[:20], "the dog", "a lazy fox"] if name.startswith("Mistral") else texts
        for one, other in zip(pipe(texts, batch_size=size), map(pipe, texts), strict=True):
            alike(one, other)


def test_progress_bar_is_shown_on_a_terminal_only(
    paths: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = pipeline(model=paths["MPNetForSequenceClassification"], device=-1)
    pipe(["the dog", "a fox"])
    assert capsys.readouterr() == ("", "")
    shown = list(pipe((t for t in ("the dog", "a fox")), progress=True))
    assert shown == pipe(["the dog", "a fox"])
    assert capsys.readouterr().out == ""


def test_conversations_from_a_generator(paths: dict[str, str]) -> None:
    pipe = pipeline(model=paths["MistralForCausalLM"], device=-1, **GREEDY)
    chat = [{"role": "user", "content": "who?"}]
    assert pipe(message for message in chat) == pipe(chat)
    assert list(pipe(chat for chat in [chat, chat])) == [pipe(chat)] * 2
    assert list(pipe(tuple(chat))) == pipe(chat)
    assert list(pipe(iter([]))) == []


def test_generation_settings(paths: dict[str, str]) -> None:
    pipe = pipeline(model=paths["MistralForCausalLM"], device=-1)
    keywords, explicit = pipe.generation({})
    assert keywords == {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}
    assert "max_new_tokens" not in pipe.generation({"max_length": 9})[1]
    assert "temperature" not in pipe.generation({"do_sample": False})[1]
    assert explicit["do_sample"] is True
    config = monoblock.GenerationConfig(max_new_tokens=2, do_sample=False)
    held = pipeline(model=paths["MistralForCausalLM"], device=-1, max_new_tokens=9)
    [short] = held("the", generation_config=config, return_tensors=True)
    assert len(short["generated_token_ids"]) == 3 + 2
    assert held("the", seed=1) == held("the", seed=1)
    with pytest.raises(ValueError, match="exclude each other"):
        held("the", return_full_text=True, return_tensors=True)
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        held("the", return_dict_in_generate=True)
    assert isinstance(held("", **GREEDY)[0]["generated_text"], str)


# ---------------------------------------------------------------------- questions


def test_forms_of_questions(paths: dict[str, str]) -> None:
    pipe = pipeline(model=paths["MPNetForQuestionAnswering"], device=-1)
    one = {"question": "who jumps?", "context": LONG}
    found = pipe(one)
    assert LONG[found["start"] : found["end"]] == found["answer"]
    assert pipe(**one) == pipe([one]) == found
    two = [one, {"question": "the dog?", "context": TEXT}]
    both = pipe(two)
    assert both[0] == found
    assert both == pipe(question=["who jumps?", "the dog?"], context=[LONG, TEXT])
    assert pipe(question=["who jumps?", "the dog?"], context=TEXT)[1] == both[1]
    streamed = list(pipe((item for item in two), batch_size=4))
    for a, b in zip(streamed, both, strict=True):
        assert a["answer"] == b["answer"]
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_settings_of_answers(paths: dict[str, str]) -> None:
    pipe = pipeline(model=paths["MPNetForQuestionAnswering"], device=-1)
    ask = {"question": "who jumps over the lazy dog?", "context": TEXT}
    answers = pipe(**ask, top_k=30, max_answer_len=1, align_to_words=False)
    assert all(TEXT[a["start"] : a["end"]] == a["answer"] for a in answers)
    assert {len(a["answer"]) for a in answers} - {1} <= {len(w) for w in re.findall(r"\w+", TEXT)}
    assert [a["score"] for a in answers] == sorted((a["score"] for a in answers), reverse=True)
    words = pipe(**ask, top_k=30)
    assert all(re.fullmatch(r"(\W|\b).*(\W|\b)", a["answer"], re.DOTALL) for a in words)
    # With left padding, offsets are the same.
    pipe.tokenizer.padding_side = "left"
    left = pipe(**ask)
    assert TEXT[left["start"] : left["end"]] == left["answer"]
    for arguments, message in (
        ({"top_k": 0}, "top_k=0"),
        ({"doc_stride": 30, "max_seq_len": 20}, "doc_stride=30"),
        ({"doc_stride": 15}, "doc_stride=15 must be less than"),
        ({"max_seq_len": 9}, "max_question_len"),
        ({"max_answer_len": 0}, "max_answer_len=0"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**ask, **arguments)
    with pytest.raises(ValueError, match="needs a 'context'"):
        pipe(question="who?", context="")
    with pytest.raises(ValueError, match="pass question= and context="):
        pipe(question="who?")


# ---------------------------------------------------------------------- entities


def token(best: int, start: int, end: int, continues: bool = False, score: float = 0.9) -> TokenGroup:
    scores = np.full(3, (1 - score) / 2)
    scores[best] = score
    return TokenGroup(scores, [f"t{start}"], start, end, start, continues)


def test_entities_of_tags() -> None:
    labels = {0: "B-A", 1: "I-A", 2: "I-B"}
    tokens = [token(0, 0, 1), token(1, 1, 2), token(0, 2, 3), token(2, 3, 4), token(2, 4, 5)]
    found = merge_entities(tokens, labels, " ".join, words=False)
    assert [(e["entity_group"], e["start"], e["end"], e["word"]) for e in found] == [
        ("A", 0, 2, "t0 t1"),
        ("A", 2, 3, "t2"),
        ("B", 3, 5, "t3 t4"),
    ]
    word = [token(0, 0, 1, score=0.6), token(2, 1, 2, continues=True, score=0.8)]
    assert {s: merge_words(word, s)[0].best for s in ("first", "max", "average")} == {
        "first": 0,
        "max": 2,
        "average": 2,
    }


def test_of_overlapping_entities_the_longer_is_kept() -> None:
    spans = [(0, 4, 0.5), (2, 9, 0.4), (9, 12, 0.3), (9, 12, 0.9)]
    kept = without_overlaps([{"start": a, "end": b, "score": s} for a, b, s in spans])
    assert [(e["start"], e["end"], e["score"]) for e in kept] == [(2, 9, 0.4), (9, 12, 0.9)]


def test_invalid_calls_raise(paths: dict[str, str]) -> None:
    tokens = pipeline(model=paths["MPNetForTokenClassification"], device=-1)
    labels = pipeline(model=paths["MPNetForSequenceClassification"], device=-1)
    masks = pipeline(model=paths["MPNetForMaskedLM"], device=-1)
    for pipe, arguments, message in (
        (tokens, {"aggregation_strategy": "best"}, "aggregation_strategy='best'"),
        (tokens, {"stride": 3}, "other than 'none'"),
        (tokens, {"stride": 24, "aggregation_strategy": "simple"}, "stride=24"),
        (tokens, {"num_workers": 2}, "num_workers=2"),
        (labels, {"top_k": 0}, "top_k=0"),
        (labels, {"function_to_apply": "relu"}, "function_to_apply='relu'"),
        (masks, {}, "no mask"),
        (masks, {"targets": []}, "targets"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            pipe("the dog", **arguments)
    with pytest.raises(TypeError, match="takes strings"):
        labels(3)
    zero = pipeline("zero-shot-classification", paths["MPNetForSequenceClassification"], device=-1)
    with pytest.raises(ValueError, match="at least one label"):
        zero("the dog")
    with pytest.raises(ValueError, match=r"no \{\}"):
        zero("the dog", "fox", hypothesis_template="none")


def test_chat_in_half_precision(paths: dict[str, str]) -> None:
    """The first example of Mistral's documentation."""
    messages = [
        {"role": "user", "content": "what is your favourite condiment?"},
        {"role": "assistant", "content": "fresh lemon juice"},
        {"role": "user", "content": "do you have mayonnaise recipes?"},
    ]
    path = paths["MistralForCausalLM"]
    chatbot = pipeline("text-generation", model=path, torch_dtype=torch.bfloat16, device=0)
    [answer] = chatbot(messages, max_new_tokens=5)
    assert answer["generated_text"][:3] == messages
    assert answer["generated_text"][3].keys() == {"role", "content"}
    assert answer["generated_text"][3]["role"] == "assistant"


def test_given_offset_mapping(paths: dict[str, str]) -> None:
    pipe = pipeline(model=paths["MPNetForTokenClassification"], device=-1, ignore_labels=[])
    given = [(0, 0), (10, 13), (14, 17), (0, 0)]
    assert [(e["start"], e["end"]) for e in pipe("the dog", offset_mapping=given)] == given[1:3]
    both = pipe(["the dog", "the fox"], offset_mapping=[given, given])
    assert [[e["start"] for e in one] for one in both] == [[10, 14]] * 2
    for offsets, message in (([given] * 2, "2 lists for 1 texts"), (given[:2], "2 spans for 4 tokens")):
        with pytest.raises(ValueError, match=message):
            pipe("the dog", offset_mapping=offsets)
    with pytest.raises(ValueError, match="pass one of both"):
        pipe("the dog", offset_mapping=given, stride=1, aggregation_strategy="max")


def test_response_format(paths: dict[str, str]) -> None:
    pytest.importorskip("llguidance")
    pipe = pipeline(model=paths["MistralForCausalLM"], device=-1, **GREEDY)
    [answer] = pipe(
        "the fox", response_format={"type": "regex", "pattern": "[ab]{3}c"}, return_full_text=False
    )
    assert re.fullmatch("[ab]{3}c", answer["generated_text"])


def test_streamer(paths: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    pipe = pipeline(model=paths["MistralForCausalLM"], device=-1, **GREEDY)
    [whole] = pipe(
        "the fox", streamer=monoblock.TextStreamer(pipe.tokenizer, skip_prompt=True), return_full_text=False
    )
    assert capsys.readouterr().out.strip("\n") == whole["generated_text"].strip("\n")
