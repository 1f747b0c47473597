"""The Flax examples of the families' pages, as they stand there: only the import line and the checkpoint differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_models import flax_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import monoblock
from monoblock.tokenization.tensors import converter

# Class -> its example; {name} is a tiny checkpoint.
EXAMPLES = {
    "FlaxMistralModel": """
from monoblock import AutoTokenizer, FlaxMistralModel

tokenizer = AutoTokenizer.from_pretrained({name!r})
model = FlaxMistralModel.from_pretrained({name!r})

inputs = tokenizer("Hello, my dog is cute", return_tensors="jax")
outputs = model(**inputs)

last_hidden_states = outputs.last_hidden_state
""",
    "FlaxMistralForCausalLM": """
from monoblock import AutoTokenizer, FlaxMistralForCausalLM

tokenizer = AutoTokenizer.from_pretrained({name!r})
model = FlaxMistralForCausalLM.from_pretrained({name!r})

inputs = tokenizer("Hello, my dog is cute", return_tensors="np")
outputs = model(**inputs)

# retrieve logts for next token
next_token_logits = outputs.logits[:, -1]
""",
    "FlaxGPTNeoModel": """
from monoblock import AutoTokenizer, FlaxGPTNeoModel

tokenizer = AutoTokenizer.from_pretrained({name!r})
model = FlaxGPTNeoModel.from_pretrained({name!r})

inputs = tokenizer("Hello, my dog is cute", return_tensors="jax")
outputs = model(**inputs)

last_hidden_states = outputs.last_hidden_state
""",
    "FlaxGPTNeoForCausalLM": """
from monoblock import AutoTokenizer, FlaxGPTNeoForCausalLM

tokenizer = AutoTokenizer.from_pretrained({name!r})
model = FlaxGPTNeoForCausalLM.from_pretrained({name!r})

inputs = tokenizer("Hello, my dog is cute", return_tensors="np")
outputs = model(**inputs)

# retrieve logts for next token
next_token_logits = outputs.logits[:, -1]
""",
}


def tokenizer(folder: Path) -> None:
    """One token for each byte's letter, of which the tiny vocabulary holds the first 80."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda x: (len(x.encode()), x))[:80]
    vocab = {letter: i for i, letter in enumerate(["<|endoftext|>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    monoblock.GPT2Tokenizer(tokenizer_object=backend).save_pretrained(folder)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_pages_examples(name: str, tmp_path: Path) -> None:
    model = flax_model(name.removeprefix("Flax"))
    model.save_pretrained(tmp_path)
    tokenizer(tmp_path)
    space: dict[str, Any] = {}
    exec(EXAMPLES[name].format(name=str(tmp_path)), space)
    tokens = space["inputs"]["input_ids"].shape[1]
    assert tokens == len("Hello, my dog is cute")
    result = space.get("next_token_logits", space.get("last_hidden_states"))
    assert isinstance(result, jax.Array) and result.shape[0] == 1
    kind = np.ndarray if 'return_tensors="np"' in EXAMPLES[name] else jax.Array
    assert isinstance(space["inputs"]["input_ids"], kind)


def test_jax_tensors() -> None:
    """Any list or array becomes int32, in one piece; what does not fit is refused."""
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
