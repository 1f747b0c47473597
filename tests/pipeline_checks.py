"""Comparison of pipelines of the same checkpoint on two frameworks, with calls of every task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fuyu_tokenizer
import numpy as np
import pytest
from PIL import Image
from tiny_families import CLASSES, TWO_LAYERS, fields, monoblock_model
from tiny_pipelines import LABELS, LONG, NLI, TEXT, folder

from monoblock import FuyuImageProcessor, FuyuProcessor, PreTrainedTokenizerFast, pipeline

# float32 scores of models whose logits agree to 1e-5; features and logits reach 10.
TOLERANCE = 2e-5
MANY = [TEXT, "the dog", "Who jumps over Köln?"]
QUESTIONS = [
    {"question": "who jumps?", "context": LONG},
    {"question": "the dog?", "context": TEXT},
]
GREEDY = {"do_sample": False, "max_new_tokens": 5}
NAMED = {"id2label": LABELS, "label2id": {label: i for i, label in LABELS.items()}}
ENTAILING = {"id2label": NLI, "label2id": {label: i for i, label in NLI.items()}}
Calls = tuple[Callable[[Any], Any], ...]


def left(pipe: Any, *inputs: Any, **options: Any) -> Any:
    """Outputs with left padding."""
    pipe.tokenizer.padding_side = "left"
    return pipe(*inputs, **options)


# task, class, config fields, calls.
CASES: tuple[tuple[str, str, dict[str, Any], Calls], ...] = (
    (
        "text-classification",
        "MPNetForSequenceClassification",
        {},
        (
            lambda pipe: pipe(TEXT, top_k=None),
            lambda pipe: pipe(MANY, function_to_apply="none", batch_size=3),
            lambda pipe: pipe({"text": TEXT, "text_pair": LONG}, truncation=True),
        ),
    ),
    (
        "text-classification",
        "MistralForSequenceClassification",
        {},
        (
            lambda pipe: pipe("a dog", top_k=None),
            lambda pipe: pipe(["the quick", "a dog jumps over"], function_to_apply="none", batch_size=2),
            lambda pipe: left(
                pipe, ["the quick", "a dog jumps over"], function_to_apply="none", batch_size=2
            ),
        ),
    ),
    (
        "zero-shot-classification",
        "MPNetForSequenceClassification",
        ENTAILING,
        (
            lambda pipe: pipe("the quick fox", "dog, fox", multi_label=True),
            lambda pipe: pipe(MANY, candidate_labels=["dog", "lazy"], batch_size=4),
        ),
    ),
    (
        "token-classification",
        "MPNetForTokenClassification",
        NAMED,
        (
            lambda pipe: pipe(MANY, ignore_labels=[], batch_size=2),
            lambda pipe: pipe(LONG, aggregation_strategy="max", stride=5, ignore_labels=[]),
        ),
    ),
    (
        "token-classification",
        "GPTNeoForTokenClassification",
        NAMED,
        (
            lambda pipe: pipe(["the quick", "a dog jumps"], ignore_labels=[], batch_size=2),
            lambda pipe: left(pipe, ["the quick", "a dog jumps"], ignore_labels=[], batch_size=2),
        ),
    ),
    (
        "question-answering",
        "MPNetForQuestionAnswering",
        {"num_labels": 2},
        (
            lambda pipe: pipe(**QUESTIONS[0], top_k=3, handle_impossible_answer=True),
            lambda pipe: pipe(QUESTIONS, batch_size=3, max_seq_len=16, doc_stride=3),
        ),
    ),
    (
        "fill-mask",
        "MPNetForMaskedLM",
        {},
        (
            lambda pipe: pipe("the <mask> fox", targets=["dog", "lazy"]),
            lambda pipe: pipe(["the <mask> fox", "<mask> jumps over Köln"], top_k=3, batch_size=2),
        ),
    ),
    (
        "feature-extraction",
        "MPNetModel",
        {},
        (
            lambda pipe: pipe("the fox"),
            lambda pipe: pipe(MANY, batch_size=3, truncation=True),
        ),
    ),
    (
        "text-generation",
        "MistralForCausalLM",
        {},
        (
            lambda pipe: pipe("the quick", **GREEDY),
            lambda pipe: pipe(["the quick", "a dog jumps over"], batch_size=2, return_tensors=True, **GREEDY),
        ),
    ),
    (
        "text-generation",
        "OpenAIGPTLMHeadModel",
        {},
        (
            lambda pipe: pipe("the quick", num_beams=2, num_return_sequences=2, **GREEDY),
            lambda pipe: pipe("the quick", min_new_tokens=5, stop_sequence="q", seed=1, **GREEDY),
        ),
    ),
)
NAMES = [f"{task}-{name}" for task, name, _, _ in CASES]


def assert_equivalent(ours: Any, theirs: Any) -> None:
    """Equal; floats within the tolerance."""
    if isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=TOLERANCE, rel=TOLERANCE)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        assert_equivalent(list(ours.values()), list(theirs.values()))
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_equivalent(one, other)
    else:
        assert ours == theirs


def compare(case: Any, framework: str, at: Any, **settings: Any) -> None:
    """The calls of a case have the same outputs on a framework (with these settings) and on PyTorch."""
    task, name, config_fields, calls = case
    path = str(folder(at, name, **TWO_LAYERS[CLASSES[name]], **config_fields))
    theirs = pipeline(task, path, framework="pt", device=-1)
    ours = pipeline(task, path, framework=framework, device=-1, **settings)
    assert ours.model.framework == framework
    for call in calls:
        for pipe in (ours, theirs):
            pipe.tokenizer.padding_side = "left" if task == "text-generation" else "right"
        assert_equivalent(call(ours), call(theirs))


def image_outputs(framework: str, at: Any, **settings: Any) -> list[Any]:
    """Outputs of a tiny Fuyu's pipeline for images, on a framework and on PyTorch."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fuyu_tokenizer.backend(), **fuyu_tokenizer.SPECIAL)
    patch = tokenizer.convert_tokens_to_ids("|SPEAKER|")
    model = monoblock_model(
        "FuyuForCausalLM",
        **fields("fuyu", vocab_size=len(tokenizer), eos_token_id=None, image_token_id=patch),
    )
    model.save_pretrained(at)
    sizes = {"patch_size": {"height": 4, "width": 4}, "size": {"height": 20, "width": 24}}
    processor = FuyuProcessor(FuyuImageProcessor(**sizes), tokenizer)
    inputs = [{"images": picture(12, 16), "text": "what is in the box"}, "the dog"]
    task, given = "image-text-to-text", {"processor": processor, "device": -1, "max_new_tokens": 4}
    return [
        pipeline(task, at, framework=framework, **given, **settings)(inputs, batch_size=2),
        pipeline(task, at, framework="pt", **given)(inputs, batch_size=2),
    ]


def picture(height: int, width: int) -> Image.Image:
    """A random image."""
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
