"""The TensorFlow examples of transformers' pages of OpenAI GPT and MPNet, word for word (https://huggingface.co/docs/transformers,
v4.37.2; Apache License 2.0): only the import line and the checkpoint's name differ."""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from page_examples import run
from tf_pairs import model

import monoblock

EXAMPLES: dict[str, str] = {
    "OpenAIGPTModel": r"""
>>> from transformers import AutoTokenizer, TFOpenAIGPTModel
>>> import tensorflow as tf

>>> tokenizer = AutoTokenizer.from_pretrained("openai-gpt")
>>> model = TFOpenAIGPTModel.from_pretrained("openai-gpt")

>>> inputs = tokenizer("Hello, my dog is cute", return_tensors="tf")
>>> outputs = model(inputs)

>>> last_hidden_states = outputs.last_hidden_state
""",
    "OpenAIGPTLMHeadModel": r"""
>>> from transformers import AutoTokenizer, TFOpenAIGPTLMHeadModel
>>> import tensorflow as tf

>>> tokenizer = AutoTokenizer.from_pretrained("openai-gpt")
>>> model = TFOpenAIGPTLMHeadModel.from_pretrained("openai-gpt")

>>> inputs = tokenizer("Hello, my dog is cute", return_tensors="tf")
>>> outputs = model(inputs)
>>> logits = outputs.logits
""",
    "OpenAIGPTDoubleHeadsModel": r"""
>>> import tensorflow as tf
>>> from transformers import AutoTokenizer, TFOpenAIGPTDoubleHeadsModel

>>> tokenizer = AutoTokenizer.from_pretrained("openai-gpt")
>>> model = TFOpenAIGPTDoubleHeadsModel.from_pretrained("openai-gpt")

>>> # Add a [CLS] to the vocabulary (we should train it also!)
>>> tokenizer.add_special_tokens({"cls_token": "[CLS]"})
>>> model.resize_token_embeddings(len(tokenizer))  # Update the model embeddings with the new vocabulary size
>>> print(tokenizer.cls_token_id, len(tokenizer))  # The newly token the last token of the vocabulary

>>> choices = ["Hello, my dog is cute [CLS]", "Hello, my cat is cute [CLS]"]
>>> encoding = tokenizer(choices, return_tensors="tf")
>>> inputs = {k: tf.expand_dims(v, 0) for k, v in encoding.items()}
>>> inputs["mc_token_ids"] = tf.constant(
...     [inputs["input_ids"].shape[-1] - 1, inputs["input_ids"].shape[-1] - 1]
... )[
...     None, :
... ]  # Batch size 1
>>> outputs = model(inputs)
>>> lm_prediction_scores, mc_prediction_scores = outputs[:2]
""",
    "OpenAIGPTForSequenceClassification": r"""
>>> from transformers import AutoTokenizer, TFOpenAIGPTForSequenceClassification
>>> import tensorflow as tf

>>> tokenizer = AutoTokenizer.from_pretrained("openai-gpt")
>>> model = TFOpenAIGPTForSequenceClassification.from_pretrained("openai-gpt")

>>> inputs = tokenizer("Hello, my dog is cute", return_tensors="tf")

>>> logits = model(**inputs).logits

>>> predicted_class_id = int(tf.math.argmax(logits, axis=-1)[0])

>>> # To train a model on `num_labels` classes, you can pass `num_labels=num_labels` to `.from_pretrained(...)`
>>> num_labels = len(model.config.id2label)
>>> model = TFOpenAIGPTForSequenceClassification.from_pretrained("openai-gpt", num_labels=num_labels)

>>> labels = tf.constant(1)
>>> loss = model(**inputs, labels=labels).loss
""",
    "MPNetForTokenClassification": r"""
>>> from transformers import AutoTokenizer, TFMPNetForTokenClassification
>>> import tensorflow as tf

>>> tokenizer = AutoTokenizer.from_pretrained("microsoft/mpnet-base")
>>> model = TFMPNetForTokenClassification.from_pretrained("microsoft/mpnet-base")

>>> inputs = tokenizer(
...     "HuggingFace is a company based in Paris and New York", add_special_tokens=False, return_tensors="tf"
... )

>>> logits = model(**inputs).logits
>>> predicted_token_class_ids = tf.math.argmax(logits, axis=-1)

>>> # Note that tokens are classified rather then input words which means that
>>> # there might be more predicted token classes than words.
>>> # Multiple token classes might account for the same word
>>> predicted_tokens_classes = [model.config.id2label[t] for t in predicted_token_class_ids[0].numpy().tolist()]

>>> labels = predicted_token_class_ids
>>> loss = tf.math.reduce_mean(model(**inputs, labels=labels).loss)
""",
    "MPNetForQuestionAnswering": r"""
>>> from transformers import AutoTokenizer, TFMPNetForQuestionAnswering
>>> import tensorflow as tf

>>> tokenizer = AutoTokenizer.from_pretrained("microsoft/mpnet-base")
>>> model = TFMPNetForQuestionAnswering.from_pretrained("microsoft/mpnet-base")

>>> question, text = "Who was Jim Henson?", "Jim Henson was a nice puppet"

>>> inputs = tokenizer(question, text, return_tensors="tf")
>>> outputs = model(**inputs)

>>> answer_start_index = int(tf.math.argmax(outputs.start_logits, axis=-1)[0])
>>> answer_end_index = int(tf.math.argmax(outputs.end_logits, axis=-1)[0])

>>> predict_answer_tokens = inputs.input_ids[0, answer_start_index : answer_end_index + 1]

>>> # target is "nice puppet"
>>> target_start_index = tf.constant([14])
>>> target_end_index = tf.constant([15])

>>> outputs = model(**inputs, start_positions=target_start_index, end_positions=target_end_index)
>>> loss = tf.math.reduce_mean(outputs.loss)
""",
}
LETTERS = [*string.ascii_lowercase, *string.punctuation]


def tokenizer(folder: Path, name: str) -> None:
    """A tokenizer of letters: BPE with two merges, or WordPiece."""
    if name.startswith("MPNet"):
        tokens = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>", *LETTERS, *("##" + c for c in LETTERS)]
        (folder / "vocab.txt").write_text("\n".join(tokens))
        monoblock.MPNetTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
        return
    letters = LETTERS[:32]
    tokens = ["<unk>", *letters, *(letter + "</w>" for letter in letters), "do", "ca"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\nc a\n")
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    monoblock.OpenAIGPTTokenizer(*files).save_pretrained(folder)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    model(name, **({"vocab_size": 130} if name.startswith("MPNet") else {})).save_pretrained(tmp_path)
    tokenizer(tmp_path, name)
    names = run(EXAMPLES[name], "monoblock", tmp_path)
    results = [
        names[key] for key in ("last_hidden_states", "logits", "lm_prediction_scores", "loss") if key in names
    ]
    assert results
    for result in results:
        assert tf.is_tensor(result)
        assert np.isfinite(result).all()
    if name == "OpenAIGPTDoubleHeadsModel":
        assert names["lm_prediction_scores"].shape[:2] == names["mc_prediction_scores"].shape == (1, 2)
    if name == "MPNetForTokenClassification":
        assert set(names["predicted_tokens_classes"]) <= set(names["model"].config.id2label.values())
