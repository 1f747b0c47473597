"""4- and 8-bit weights by bitsandbytes, with transformers' arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import monoblock
from monoblock import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast
from monoblock.backends.pytorch.quantization.bitsandbytes import layer

bitsandbytes = pytest.importorskip("bitsandbytes")

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 300}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))

EIGHT = BitsAndBytesConfig(load_in_8bit=True)
SKIPPING = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "r_proj"])
UNKNOWN_DTYPE = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "f"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mistral with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("mistral")
    tiny_families.randomised(
        monoblock.MistralForCausalLM(monoblock.MistralConfig(**SIZES, **HEADS))
    ).save_pretrained(path)
    backend = Tokenizer(models.BPE())
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["a b c"], trainer)
    template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template).save_pretrained(path)
    return path


def logits(folder: Path, **how: Any) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **how)(IDS).logits


@pytest.mark.parametrize(
    ("how", "bound"),
    [
        # Random weights are the hardest; measured 0.999, 0.92 and 0.86, where another model's would be near 0.
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, 0.995),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}, 0.85),
        ({"load_in_4bit": True}, 0.75),
    ],
)
def test_quantised_logits_are_close(folder: Path, how: dict[str, Any], bound: float) -> None:
    plain, packed = logits(folder), logits(folder, **how)
    alike = torch.nn.functional.cosine_similarity(plain.flatten(), packed.flatten(), dim=0)
    assert bound < alike < 0.9999


def test_quantised_modules(folder: Path) -> None:
    how = BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=["down_proj", "lm_head"], bnb_4bit_compute_dtype="float32"
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how)
    packed = {n for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    roles = ("q", "k", "v", "out", "gate", "up")
    assert packed == {model.module_path(role, i) for i in range(2) for role in roles}
    assert model.at("q", 0).weight.dtype == torch.uint8
    with pytest.raises(ValueError, match="save the model before quantising"):
        model.save_pretrained(folder / "packed")


def test_8_bit_products_do_not_say_each_time_that_they_take_float16(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logits(folder, quantization_config=EIGHT, dtype=torch.bfloat16)
    assert not caplog.records


def test_documented_example(folder: Path) -> None:
    """Mistral's page, with its misprint mended (`quantization_config=True`) and on the device that is here."""
    quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="torch.float16",
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization_config, torch_dtype=torch.bfloat16, device_map="auto"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "user", "content": "What is your favourite condiment?"},
        {"role": "assistant", "content": "Well, I'm quite partial to a good squeeze of fresh lemon juice."},
        {"role": "user", "content": "Do you have mayonnaise recipes?"},
    ]
    model_inputs = tokenizer.apply_chat_template(messages, return_tensors="pt").to(model.device)
    generated_ids = model.generate(model_inputs, max_new_tokens=100, do_sample=True)
    assert generated_ids.shape[1] > model_inputs["input_ids"].shape[1]
    assert tokenizer.batch_decode(generated_ids)[0].startswith("[user] What is your favourite condiment?")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: BitsAndBytesConfig(), "one of load_in_4bit=True and load_in_8bit=True"),
        (
            lambda _: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="int4"),
            "'fp4' or 'nf4', got 'int4'",
        ),
        (lambda folder: logits(folder, quantization_config=EIGHT, load_in_8bit=True), "not both"),
        (
            lambda folder: logits(folder, quantization_config=SKIPPING),
            "'r_proj', which is no module of this model",
        ),
        (lambda folder: logits(folder, quantization_config=True), "a BitsAndBytesConfig, got True"),
        (
            lambda folder: logits(
                folder, quantization_config={"load_in_4bit": True, "bnb_4bit_compute_dtype": "f"}
            ),
            "'f'",
        ),
    ],
)
def test_invalid_settings_raise(folder: Path, make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(folder)


def test_transformers_config_object(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32"
    )
    ours = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    assert torch.equal(logits(folder, quantization_config=theirs), logits(folder, quantization_config=ours))
    with pytest.raises(ValueError, match="'torchao' is not supported"):
        logits(folder, quantization_config={"quant_method": "torchao", "quant_type": "int8_weight_only"})


@pytest.mark.parametrize("width", [64, 96, 288])
def test_widths_that_are_no_multiple_of_64(width: int) -> None:
    """On a CPU, bitsandbytes' own default blocks give an error of 0.24 at widths of 96 and 288, and 0.09 at 64."""
    weight = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    linear = torch.nn.Linear(width, 40, bias=False)
    linear.weight = torch.nn.Parameter(weight)
    packed = layer(linear, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    with torch.no_grad():
        found = packed(torch.eye(width)).T
    assert (found - weight).norm() / weight.norm() < 0.12


def test_unsupported_widths_raise() -> None:
    with pytest.raises(ValueError, match=r'rows of 36 weights on a CPU .*quantization_config="int4"'):
        layer(torch.nn.Linear(36, 8), BitsAndBytesConfig(load_in_4bit=True))
