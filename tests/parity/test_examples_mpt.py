"""Every example of MPT's two documentation pages, as it stands there, with only the import line and the checkpoint's
name changed: it runs here, and gives what it gives in transformers.

The pages: https://huggingface.co/docs/transformers/v4.37.2/en/model_doc/mpt and .../main/en/model_doc/mpt.
"""

from __future__ import annotations

import doctest
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomised
from measure import assert_close
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from monoblock import GPTNeoXTokenizerFast, MptConfig

EXAMPLES: dict[str, str] = {
    "MptConfig, page of 4.37": """
>>> from transformers import MptConfig, MptModel

>>> # Initializing a Mpt configuration
>>> configuration = MptConfig()

>>> # Initializing a model (with random weights) from the configuration
>>> model = MptModel(configuration)

>>> # Accessing the model configuration
>>> configuration = model.config
""",
    "MptModel, page of 4.37": """
>>> from transformers import AutoTokenizer, MptModel
>>> import torch

>>> tokenizer = AutoTokenizer.from_pretrained("mosaicml/mpt-7b")
>>> model = MptModel.from_pretrained("mosaicml/mpt-7b")

>>> inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
>>> outputs = model(**inputs)

>>> last_hidden_states = outputs.last_hidden_state
""",
    "MptForCausalLM, page of 4.37": """
>>> import torch
>>> from transformers import AutoTokenizer, MptForCausalLM

>>> tokenizer = AutoTokenizer.from_pretrained("mosaicml/mpt-7b")
>>> model = MptForCausalLM.from_pretrained("mosaicml/mpt-7b")

>>> inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
>>> outputs = model(**inputs, labels=inputs["input_ids"])
>>> loss = outputs.loss
>>> logits = outputs.logits
""",
    "MptForSequenceClassification, page of 4.37": """
>>> import torch
>>> from transformers import AutoTokenizer, MptForSequenceClassification

>>> tokenizer = AutoTokenizer.from_pretrained("mosaicml/mpt-7b")
>>> model = MptForSequenceClassification.from_pretrained("mosaicml/mpt-7b")

>>> inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")

>>> with torch.no_grad():
...     logits = model(**inputs).logits

>>> predicted_class_id = logits.argmax().item()

>>> # To train a model on `num_labels` classes, you can pass `num_labels=num_labels` to `.from_pretrained(...)`
>>> num_labels = len(model.config.id2label)
>>> model = MptForSequenceClassification.from_pretrained("mosaicml/mpt-7b", num_labels=num_labels)

>>> labels = torch.tensor([1])
>>> loss = model(**inputs, labels=labels).loss
""",
    "MptForSequenceClassification multi-label, page of 4.37": """
>>> import torch
>>> from transformers import AutoTokenizer, MptForSequenceClassification

>>> tokenizer = AutoTokenizer.from_pretrained("mosaicml/mpt-7b")
>>> model = MptForSequenceClassification.from_pretrained("mosaicml/mpt-7b", problem_type="multi_label_classification")

>>> inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")

>>> with torch.no_grad():
...     logits = model(**inputs).logits

>>> predicted_class_ids = torch.arange(0, logits.shape[-1])[torch.sigmoid(logits).squeeze(dim=0) > 0.5]

>>> # To train a model on `num_labels` classes, you can pass `num_labels=num_labels` to `.from_pretrained(...)`
>>> num_labels = len(model.config.id2label)
>>> model = MptForSequenceClassification.from_pretrained(
...     "mosaicml/mpt-7b", num_labels=num_labels, problem_type="multi_label_classification"
... )

>>> labels = torch.sum(
...     torch.nn.functional.one_hot(predicted_class_ids[None, :].clone(), num_classes=num_labels), dim=1
... ).to(torch.float)
>>> loss = model(**inputs, labels=labels).loss
""",
    "MptForTokenClassification, page of 4.37": """
>>> from transformers import AutoTokenizer, MptForTokenClassification
>>> import torch

>>> tokenizer = AutoTokenizer.from_pretrained("mosaicml/mpt-7b")
>>> model = MptForTokenClassification.from_pretrained("mosaicml/mpt-7b")

>>> inputs = tokenizer(
...     "HuggingFace is a company based in Paris and New York", add_special_tokens=False, return_tensors="pt"
... )

>>> with torch.no_grad():
...     logits = model(**inputs).logits

>>> predicted_token_class_ids = logits.argmax(-1)

>>> # Note that tokens are classified rather then input words which means that
>>> # there might be more predicted token classes than words.
>>> # Multiple token classes might account for the same word
>>> predicted_tokens_classes = [model.config.id2label[t.item()] for t in predicted_token_class_ids[0]]

>>> labels = predicted_token_class_ids
>>> loss = model(**inputs, labels=labels).loss
""",
    "MptConfig, page of main": """
>>> from transformers import MptConfig, MptModel

>>> # Initializing a Mpt configuration
>>> configuration = MptConfig()

>>> # Initializing a model (with random weights) from the configuration
>>> model = MptModel(configuration)

>>> # Accessing the model configuration
>>> configuration = model.config
""",
    "MptForSequenceClassification, page of main": """
>>> import torch
>>> from transformers import AutoTokenizer, MptForSequenceClassification

>>> tokenizer = AutoTokenizer.from_pretrained("mosaicml/mpt-7b")
>>> model = MptForSequenceClassification.from_pretrained("mosaicml/mpt-7b")

>>> inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")

>>> with torch.no_grad():
...     logits = model(**inputs).logits

>>> predicted_class_id = logits.argmax().item()
>>> model.config.id2label[predicted_class_id]
...

>>> # To train a model on `num_labels` classes, you can pass `num_labels=num_labels` to `.from_pretrained(...)`
>>> num_labels = len(model.config.id2label)
>>> model = MptForSequenceClassification.from_pretrained("mosaicml/mpt-7b", num_labels=num_labels)

>>> labels = torch.tensor([1])
>>> loss = model(**inputs, labels=labels).loss
>>> round(loss.item(), 2)
...
""",
    "MptForSequenceClassification multi-label, page of main": """
>>> import torch
>>> from transformers import AutoTokenizer, MptForSequenceClassification

>>> tokenizer = AutoTokenizer.from_pretrained("mosaicml/mpt-7b")
>>> model = MptForSequenceClassification.from_pretrained("mosaicml/mpt-7b", problem_type="multi_label_classification")

>>> inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")

>>> with torch.no_grad():
...     logits = model(**inputs).logits

>>> predicted_class_ids = torch.arange(0, logits.shape[-1])[torch.sigmoid(logits).squeeze(dim=0) > 0.5]

>>> # To train a model on `num_labels` classes, you can pass `num_labels=num_labels` to `.from_pretrained(...)`
>>> num_labels = len(model.config.id2label)
>>> model = MptForSequenceClassification.from_pretrained(
...     "mosaicml/mpt-7b", num_labels=num_labels, problem_type="multi_label_classification"
... )

>>> labels = torch.sum(
...     torch.nn.functional.one_hot(predicted_class_ids[None, :].clone(), num_classes=num_labels), dim=1
... ).to(torch.float)
>>> loss = model(**inputs, labels=labels).loss
""",
    "MptForTokenClassification, page of main": """
>>> from transformers import AutoTokenizer, MptForTokenClassification
>>> import torch

>>> tokenizer = AutoTokenizer.from_pretrained("mosaicml/mpt-7b")
>>> model = MptForTokenClassification.from_pretrained("mosaicml/mpt-7b")

>>> inputs = tokenizer(
...     "HuggingFace is a company based in Paris and New York", add_special_tokens=False, return_tensors="pt"
... )

>>> with torch.no_grad():
...     logits = model(**inputs).logits

>>> predicted_token_class_ids = logits.argmax(-1)

>>> # Note that tokens are classified rather then input words which means that
>>> # there might be more predicted token classes than words.
>>> # Multiple token classes might account for the same word
>>> predicted_tokens_classes = [model.config.id2label[t.item()] for t in predicted_token_class_ids[0]]
>>> predicted_tokens_classes
...

>>> labels = predicted_token_class_ids
>>> loss = model(**inputs, labels=labels).loss
>>> round(loss.item(), 2)
...
""",
    "MptForQuestionAnswering, page of main": """
>>> from transformers import AutoTokenizer, MptForQuestionAnswering
>>> import torch

>>> tokenizer = AutoTokenizer.from_pretrained("mosaicml/mpt-7b")
>>> model = MptForQuestionAnswering.from_pretrained("mosaicml/mpt-7b")

>>> question, text = "Who was Jim Henson?", "Jim Henson was a nice puppet"

>>> inputs = tokenizer(question, text, return_tensors="pt")
>>> with torch.no_grad():
...     outputs = model(**inputs)

>>> answer_start_index = outputs.start_logits.argmax()
>>> answer_end_index = outputs.end_logits.argmax()

>>> predict_answer_tokens = inputs.input_ids[0, answer_start_index : answer_end_index + 1]
>>> tokenizer.decode(predict_answer_tokens, skip_special_tokens=True)
...

>>> # target is "nice puppet"
>>> target_start_index = torch.tensor([14])
>>> target_end_index = torch.tensor([15])

>>> outputs = model(**inputs, start_positions=target_start_index, end_positions=target_end_index)
>>> loss = outputs.loss
>>> round(loss.item(), 2)
...
""",
}

# What an example leaves behind that must be what transformers leaves behind.
RESULTS = {
    "MptModel": ("last_hidden_states",),
    "MptForCausalLM": ("loss", "logits"),
    "MptForSequenceClassification": ("logits", "predicted_class_id", "loss"),
    "MptForSequenceClassification multi-label": ("logits", "predicted_class_ids", "labels", "loss"),
    "MptForTokenClassification": ("logits", "predicted_token_class_ids", "predicted_tokens_classes", "loss"),
    "MptForQuestionAnswering": ("answer_start_index", "answer_end_index", "predict_answer_tokens", "loss"),
}


def run(code: str, library: str, checkpoint: Path | None) -> dict[str, Any]:
    """The names that an example has defined in the end."""
    code = code.replace("from transformers import", f"from {library} import")
    code = code.replace('"mosaicml/mpt-7b"', repr(str(checkpoint)))
    names: dict[str, Any] = {}
    for example in doctest.DocTestParser().get_examples(code):
        exec(example.source, names)
    return names


@functools.cache
def tokenizer() -> Any:
    """Byte-level, as MPT's: every byte is a token, so that the question's answer lies where the example says."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return GPTNeoXTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a tiny model and its tokenizer for each class."""
    import monoblock

    @functools.cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        config = MptConfig(d_model=36, n_heads=6, n_layers=2, vocab_size=260, max_seq_len=96, eos_token_id=0)
        randomised(getattr(monoblock, name)(config)).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        return folder

    return made


@pytest.mark.parametrize("title", [title for title in EXAMPLES if not title.startswith("MptConfig")])
def test_example(title: str, checkpoints: Any) -> None:
    kind = title.partition(",")[0]
    folder = checkpoints(kind.partition(" ")[0])
    ours, theirs = run(EXAMPLES[title], "monoblock", folder), run(EXAMPLES[title], "transformers", folder)
    assert type(ours["model"]).__module__.startswith("monoblock")
    assert ours["inputs"]["input_ids"].tolist() == theirs["inputs"]["input_ids"].tolist()
    for name in RESULTS[kind]:
        a, b = ours[name], theirs[name]
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            assert torch.isfinite(a).all()
            assert_close(f"example's {name}", a, b, 1e-5)
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b), name
        else:
            assert a == b, name


@pytest.mark.parametrize("title", [title for title in EXAMPLES if title.startswith("MptConfig")])
def test_example_of_the_config(title: str) -> None:
    with torch.device("meta"):  # the default config is a model of 1.3 billion weights
        names = run(EXAMPLES[title], "monoblock", None)
    assert names["configuration"] is names["model"].config
    assert names["configuration"].d_model == 2048
    assert names["model"].num_parameters() == 50368 * 2048 + 24 * (12 * 2048**2 + 2 * 2048) + 2048


def test_no_example_is_left_out(pytestconfig: pytest.Config) -> None:
    """The pages themselves, where they lie beside the repository."""
    pages = pytestconfig.rootpath.parent / "shared/seeds"
    found = [
        code
        for page in sorted(pages.glob("00[01]_*.txt"))
        for code in re.findall(r"```(?:py|python)\n(>>>.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ]
    have = [code.lstrip("\n") for code in EXAMPLES.values()]
    assert not found or found == have
