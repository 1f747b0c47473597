"""Pipelines against transformers: equal answers from the same checkpoint, character offsets included."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_pipelines import LABELS, LONG, NLI, TEXT, folder

from monoblock import pipeline

# Scores are float32 probabilities from logits that agree to 1e-5; measured differences are below 2e-6.
TOLERANCE = 2e-5
MANY = [TEXT, "the dog", "Who jumps over Köln?"]


def same(ours: Any, theirs: Any) -> None:
    """Equal structure, keys and strings; floats to the tolerance."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            same(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    elif isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
    elif hasattr(theirs, "dtype") or isinstance(theirs, float):
        assert ours == pytest.approx(float(theirs), abs=TOLERANCE)
    else:
        assert ours == theirs


class Pair:
    """The same pipeline of a class's checkpoint, ours and transformers'."""

    def __init__(self, factory: Any) -> None:
        self.factory, self.folders = factory, {}

    def __call__(self, task: str, name: str, made: dict[str, Any] | None = None, **options: Any) -> Any:
        key = (name, str(made))
        if key not in self.folders:
            self.folders[key] = folder(self.factory.mktemp(name), name, **(made or {}))
        path = str(self.folders[key])
        return (
            pipeline(task, path, device=-1, **options),
            transformers.pipeline(task, path, device="cpu", **options),
        )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory)


def compare(both: Any, *inputs: Any, **options: Any) -> Any:
    ours, theirs = (pipe(*inputs, **options) for pipe in both)
    same(ours, theirs)
    return ours


# ---------------------------------------------------------------------- text-generation


@pytest.mark.parametrize("name", ["MistralForCausalLM", "GPTNeoForCausalLM", "OpenAIGPTLMHeadModel"])
def test_text_generation(pair: Pair, name: str) -> None:
    both = pair("text-generation", name, do_sample=False, max_new_tokens=6)
    compare(both, "the quick")
    compare(both, ["the quick", "a dog jumps"], return_full_text=False)
    compare(both, "the quick", return_tensors=True)
    compare(both, "the quick", num_beams=3, num_return_sequences=2)
    compare(both, "the quick", skip_special_tokens=False, prefix="over ")
    compare(both, "the quick", max_length=20, prefix="over ")
    compare(both, "the quick brown fox jumps over", handle_long_generation="hole")
    compare(both, "the quick brown fox jumps", truncation=True, max_length=16)


def test_text_generation_in_batches(pair: Pair) -> None:
    """Left padding, as in transformers, whose padded rows are correct for Mistral's relative positions."""
    both = pair("text-generation", "MistralForCausalLM", do_sample=False, max_new_tokens=6)
    texts = ["the quick", "a dog jumps over", "fox"]
    alone = compare(both, texts)
    assert compare(both, texts, batch_size=2) == alone


def test_chats(pair: Pair) -> None:
    both = pair("text-generation", "MistralForCausalLM", do_sample=False, max_new_tokens=4)
    chat = [{"role": "user", "content": "who jumps?"}]
    compare(both, chat)
    compare(both, [chat, [*chat, {"role": "assistant", "content": "the fox"}]])
    compare(both, [*chat, {"role": "assistant", "content": "the fox"}], continue_final_message=False)
    compare(both, chat, return_full_text=False)


def test_stop_sequence(pair: Pair) -> None:
    both = pair("text-generation", "MistralForCausalLM", do_sample=False, max_new_tokens=12)
    whole = compare(both, "the quick", return_full_text=False)[0]["generated_text"]
    compare(both, "the quick", return_full_text=False, stop_sequence=whole[3])


# ---------------------------------------------------------------------- classification


@pytest.mark.parametrize("name", ["MPNetForSequenceClassification", "MistralForSequenceClassification"])
def test_text_classification(pair: Pair, name: str) -> None:
    both = pair("text-classification", name)
    compare(both, TEXT)
    compare(both, MANY)
    compare(both, MANY, top_k=2)
    compare(both, TEXT, top_k=None)
    compare(both, TEXT, top_k=1)
    compare(both, LONG, truncation=True)
    compare(both, {"text": TEXT, "text_pair": "the dog"}, truncation=True)
    compare(both, MANY, top_k=None, function_to_apply="sigmoid")
    compare(both, MANY, top_k=None, function_to_apply="none", batch_size=2)


@pytest.mark.parametrize(
    "fields", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}], ids=str
)
def test_problem_types(pair: Pair, fields: dict[str, Any]) -> None:
    compare(pair("sentiment-analysis", "MPNetForSequenceClassification", fields), TEXT, top_k=None)


def test_zero_shot(pair: Pair) -> None:
    made = {"id2label": NLI, "label2id": {label: i for i, label in NLI.items()}}
    both = pair("zero-shot-classification", "MPNetForSequenceClassification", made)
    labels = ["dog", "fox", "lazy"]
    compare(both, "the quick fox", candidate_labels=labels)
    compare(both, "the quick fox", "dog, fox", multi_label=True)
    compare(both, "the quick fox", "dog", hypothesis_template="over {}!")
    compare(both, MANY, candidate_labels=labels, hypothesis_template="the {}", batch_size=4)
    compare(both, LONG, candidate_labels=labels, hypothesis_template="the {}")


# ---------------------------------------------------------------------- token-classification


STRATEGIES = ("none", "simple", "first", "average", "max")
NAMED = {"id2label": LABELS, "label2id": {label: i for i, label in LABELS.items()}}


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("name", ["MPNetForTokenClassification", "GPTNeoForTokenClassification"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_token_classification(pair: Pair, name: str, strategy: str) -> None:
    both = pair("ner", name, NAMED, aggregation_strategy=strategy)
    found = compare(both, "The brownest fox, Köln!")
    assert all("The brownest fox, Köln!"[e["start"] : e["end"]] for e in found)
    compare(both, MANY, ignore_labels=[])
    compare(both, LONG)  # truncated
    compare(both, ["who", "jumps", "over", "Köln"], is_split_into_words=True, ignore_labels=["O", "PER"])
    if strategy != "none":
        whole = compare(both, LONG, stride=5, ignore_labels=[])
        assert whole[-1]["end"] > len(LONG) - 5
        compare(both, [LONG, "the dog"], stride=0)


def test_token_classification_in_batches(pair: Pair) -> None:
    both = pair("token-classification", "MPNetForTokenClassification", NAMED, aggregation_strategy="max")
    alone = both[0]([LONG, *MANY], stride=4)
    same(both[0]([LONG, *MANY], stride=4, batch_size=3), alone)
    same(both[1]([LONG, *MANY], stride=4, batch_size=3), alone)


# ---------------------------------------------------------------------- fill-mask, feature-extraction


def test_fill_mask(pair: Pair) -> None:
    both = pair("fill-mask", "MPNetForMaskedLM")
    compare(both, "the <mask> fox")
    compare(both, ["the <mask> fox", "<mask> jumps over Köln"], top_k=3, batch_size=2)
    compare(both, ["the <mask> fox"], top_k=2)
    compare(both, "the <mask> <mask>", top_k=2)
    compare(both, "the <mask> fox", targets=["dog", "lazy", "quickest"])
    compare(both, "the <mask> fox", targets="dog")
    compare(both, "the <mask> " + LONG, tokenizer_kwargs={"truncation": True})


@pytest.mark.parametrize("name", ["MPNetModel", "GPTNeoModel"])
def test_feature_extraction(pair: Pair, name: str) -> None:
    both = pair("feature-extraction", name)
    compare(both, "the fox")
    compare(both, MANY[1:], return_tensors=True)
    assert compare(both, LONG, truncation=True, return_tensors=True).shape[1] == 24
    compare(both, LONG, tokenize_kwargs={"truncation": True, "max_length": 9})


def test_generators_are_streamed(pair: Pair) -> None:
    both = pair("text-classification", "MPNetForSequenceClassification")
    ours, theirs = (pipe(text for text in MANY) for pipe in both)
    assert iter(ours) is ours
    same(list(itertools.islice(ours, 2)), list(itertools.islice(theirs, 2)))


# ---------------------------------------------------------------------- question-answering


def reference_answers(
    path: str, question: str, context: str, size: int, stride: int, longest: int, top_k: int
) -> Any:
    """The question-answering pipeline that transformers 5 has removed, span by span as documented, on its own model.

    Returns the top answers as (score, start, end, string), and the score of no answer.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(path)
    rows = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=size,
        stride=stride,
        return_overflowing_tokens=True,
    )
    answers: dict[str, list[Any]] = {}
    least = 1.0
    for i, ids in enumerate(rows["input_ids"]):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]))
        sides = rows.sequence_ids(i)
        masked = torch.tensor(
            [side != 1 and id != tokenizer.cls_token_id for side, id in zip(sides, ids, strict=True)]
        )
        start, end = (
            logits[0].masked_fill(masked, -10000.0).softmax(-1)
            for logits in (out.start_logits, out.end_logits)
        )
        least = min(least, float(start[0] * end[0]))
        spans = [
            (float(start[a] * end[b]), a, b)
            for a in range(len(ids))
            for b in range(a, min(a + longest, len(ids)))
            if sides[a] == 1 and sides[b] == 1
        ]
        for score, a, b in sorted(spans, reverse=True)[: 2 * top_k + 10]:
            first = rows.word_to_chars(i, rows.token_to_word(i, a), sequence_index=1).start
            last = rows.word_to_chars(i, rows.token_to_word(i, b), sequence_index=1).end
            words = context[first:last]
            answers.setdefault(words.lower(), [0.0, first, last, words])[0] += score
    return sorted(answers.values(), reverse=True)[:top_k], least


@pytest.mark.parametrize("context", [TEXT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("name", ["MPNetForQuestionAnswering", "GPTNeoForQuestionAnswering"])
def test_question_answering(tmp_path: Path, name: str, context: str, top_k: int) -> None:
    path = str(folder(tmp_path, name, num_labels=2))
    question = "who jumps?"
    for options, how in (
        ({}, (24, 12, 15)),
        ({"max_seq_len": 16, "doc_stride": 3, "max_answer_len": 2}, (16, 3, 2)),
    ):
        expected, least = reference_answers(path, question, context, *how, top_k)
        pipe = pipeline("question-answering", path, device=-1, **options)
        found = pipe(question=question, context=context, top_k=top_k)
        found = [found] if top_k == 1 else found
        keys = ("score", "start", "end", "answer")
        same(found, [dict(zip(keys, one, strict=True)) for one in expected])
        every = pipe(question=question, context=context, top_k=1000, handle_impossible_answer=True)
        [none] = [answer for answer in every if answer["answer"] == ""]
        same(none, {"score": least, "start": 0, "end": 0, "answer": ""})
