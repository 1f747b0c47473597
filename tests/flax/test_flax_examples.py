"""The Flax examples of transformers' pages of Mistral and GPT Neo: only the import line and the checkpoint differ."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_models import flax_model
from page_examples import run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import monoblock
from monoblock.tokenization.tensors import converter

# The examples by what they end with; CLASS stands for a class.
BODY = r"""
>>> from transformers import AutoTokenizer, CLASS

>>> tokenizer = AutoTokenizer.from_pretrained("EleutherAI/gpt-neo-1.3B")
>>> model = CLASS.from_pretrained("EleutherAI/gpt-neo-1.3B")

>>> inputs = tokenizer("Hello, my dog is cute", return_tensors="jax")
>>> outputs = model(**inputs)

>>> last_hidden_states = outputs.last_hidden_state
"""
CAUSAL = r"""
>>> from transformers import AutoTokenizer, CLASS

>>> tokenizer = AutoTokenizer.from_pretrained("EleutherAI/gpt-neo-1.3B")
>>> model = CLASS.from_pretrained("EleutherAI/gpt-neo-1.3B")

>>> inputs = tokenizer("Hello, my dog is cute", return_tensors="np")
>>> outputs = model(**inputs)

>>> # retrieve logts for next token
>>> next_token_logits = outputs.logits[:, -1]
"""


def tokenizer(folder: Path) -> None:
    """Saves a byte-level tokenizer of the first 80 bytes, without merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda x: (len(x.encode()), x))[:80]
    vocab = {letter: i for i, letter in enumerate(["<|endoftext|>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    monoblock.GPT2Tokenizer(tokenizer_object=backend).save_pretrained(folder)


@pytest.mark.parametrize("head", ["Model", "ForCausalLM"])
@pytest.mark.parametrize("stem", ["Mistral", "GPTNeo"])
def test_example(stem: str, head: str, tmp_path: Path) -> None:
    flax_model(stem + head).save_pretrained(tmp_path)
    tokenizer(tmp_path)
    code = (BODY if head == "Model" else CAUSAL).replace("CLASS", f"Flax{stem}{head}")
    names = run(code, "monoblock", tmp_path)
    ids = names["inputs"]["input_ids"]
    assert ids.shape[1] == len("Hello, my dog is cute")
    assert isinstance(ids, jax.Array if head == "Model" else np.ndarray)
    result = names.get("next_token_logits", names.get("last_hidden_states"))
    assert isinstance(result, jax.Array) and result.shape[0] == 1


def test_jax_tensors() -> None:
    """Lists and arrays become one int32 array; ragged lists, strings and integers beyond int32 raise."""
    convert = converter("jax")
    for rows in ([[1, 2]], np.array([[1, 2]]), [np.array([1, 2])], jnp.array([[1, 2]])):
        made = convert("input_ids", rows)
        assert isinstance(made, jax.Array) and made.dtype == jnp.int32 and made.tolist() == [[1, 2]]
    assert convert("input_ids", [[], []]).dtype == jnp.int32
    assert convert("bbox", [[0.5]]).dtype == jnp.float32
    with pytest.raises(ValueError, match="pass padding=True"):
        convert("input_ids", [[1], [1, 2]])
    for wrong in ([["a"]], [[2**40]]):
        with pytest.raises(ValueError, match="input_ids cannot become a tensor: expected lists of integers"):
            convert("input_ids", wrong)
