# ruff: noqa: E501
"""The PyTorch examples on transformers' documentation pages of MPT, Mistral, OpenAI GPT, GPT Neo and Fuyu, word for word
(https://huggingface.co/docs/transformers, main and v4.37.2; Apache License 2.0), and a function that runs one.

The pages instantiate a few templates with a class and a checkpoint; so does this file.
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

# Head -> its example. Lines that begin with "?" stand on some pages only: those with `shown=True`.
TEMPLATES = {
    "model": r"""
>>> from transformers import AutoTokenizer, CLASS
>>> import torch

>>> tokenizer = AutoTokenizer.from_pretrained("CHECKPOINT")
>>> model = CLASS.from_pretrained("CHECKPOINT")

>>> inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
>>> outputs = model(**inputs)

>>> last_hidden_states = outputs.last_hidden_state
""",
    "causal": r"""
>>> import torch
>>> from transformers import AutoTokenizer, CLASS

>>> tokenizer = AutoTokenizer.from_pretrained("CHECKPOINT")
>>> model = CLASS.from_pretrained("CHECKPOINT")

>>> inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
>>> outputs = model(**inputs, labels=inputs["input_ids"])
>>> loss = outputs.loss
>>> logits = outputs.logits
""",
    "sequence": r"""
>>> import torch
>>> from transformers import AutoTokenizer, CLASS

>>> tokenizer = AutoTokenizer.from_pretrained("CHECKPOINT")
>>> model = CLASS.from_pretrained("CHECKPOINT")

>>> inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")

>>> with torch.no_grad():
...     logits = model(**inputs).logits

>>> predicted_class_id = logits.argmax().item()
?>>> model.config.id2label[predicted_class_id]
?...

>>> # To train a model on `num_labels` classes, you can pass `num_labels=num_labels` to `.from_pretrained(...)`
>>> num_labels = len(model.config.id2label)
>>> model = CLASS.from_pretrained("CHECKPOINT", num_labels=num_labels)

>>> labels = torch.tensor([1])
>>> loss = model(**inputs, labels=labels).loss
?>>> round(loss.item(), 2)
?...
""",
    "several labels": r"""
>>> import torch
>>> from transformers import AutoTokenizer, CLASS

>>> tokenizer = AutoTokenizer.from_pretrained("CHECKPOINT")
>>> model = CLASS.from_pretrained("CHECKPOINT", problem_type="multi_label_classification")

>>> inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")

>>> with torch.no_grad():
...     logits = model(**inputs).logits

>>> predicted_class_ids = torch.arange(0, logits.shape[-1])[torch.sigmoid(logits).squeeze(dim=0) > 0.5]

>>> # To train a model on `num_labels` classes, you can pass `num_labels=num_labels` to `.from_pretrained(...)`
>>> num_labels = len(model.config.id2label)
>>> model = CLASS.from_pretrained(
...     "CHECKPOINT", num_labels=num_labels, problem_type="multi_label_classification"
... )

>>> labels = torch.sum(
...     torch.nn.functional.one_hot(predicted_class_ids[None, :].clone(), num_classes=num_labels), dim=1
... ).to(torch.float)
>>> loss = model(**inputs, labels=labels).loss
""",
    "token": r"""
>>> from transformers import AutoTokenizer, CLASS
>>> import torch

>>> tokenizer = AutoTokenizer.from_pretrained("CHECKPOINT")
>>> model = CLASS.from_pretrained("CHECKPOINT")

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
?>>> predicted_tokens_classes
?...

>>> labels = predicted_token_class_ids
>>> loss = model(**inputs, labels=labels).loss
?>>> round(loss.item(), 2)
?...
""",
    "span": r"""
>>> from transformers import AutoTokenizer, CLASS
>>> import torch

>>> tokenizer = AutoTokenizer.from_pretrained("CHECKPOINT")
>>> model = CLASS.from_pretrained("CHECKPOINT")

>>> question, text = "Who was Jim Henson?", "Jim Henson was a nice puppet"

>>> inputs = tokenizer(question, text, return_tensors="pt")
>>> with torch.no_grad():
...     outputs = model(**inputs)

>>> answer_start_index = outputs.start_logits.argmax()
>>> answer_end_index = outputs.end_logits.argmax()

>>> predict_answer_tokens = inputs.input_ids[0, answer_start_index : answer_end_index + 1]
?>>> tokenizer.decode(predict_answer_tokens, skip_special_tokens=True)
?...

>>> # target is "nice puppet"
>>> target_start_index = torch.tensor([14])
>>> target_end_index = torch.tensor([15])

>>> outputs = model(**inputs, start_positions=target_start_index, end_positions=target_end_index)
>>> loss = outputs.loss
?>>> round(loss.item(), 2)
?...
""",
    "mpt config": r"""
>>> from transformers import MptConfig, MptModel

>>> # Initializing a Mpt configuration
>>> configuration = MptConfig()

>>> # Initializing a model (with random weights) from the configuration
>>> model = MptModel(configuration)

>>> # Accessing the model configuration
>>> configuration = model.config
""",
    "mistral config": r"""
>>> from transformers import MistralModel, MistralConfig

>>> # Initializing a Mistral 7B style configuration
>>> configuration = MistralConfig()

>>> # Initializing a model from the Mistral 7B style configuration
>>> model = MistralModel(configuration)

>>> # Accessing the model configuration
>>> configuration = model.config
""",
    "openai config": r"""
>>> from transformers import OpenAIGPTConfig, OpenAIGPTModel

>>> # Initializing a GPT configuration
>>> configuration = OpenAIGPTConfig()

>>> # Initializing a model (with random weights) from the configuration
>>> model = OpenAIGPTModel(configuration)

>>> # Accessing the model configuration
>>> configuration = model.config
""",
    "gpt neo config": r"""
>>> from transformers import GPTNeoConfig, GPTNeoModel

>>> # Initializing a GPTNeo EleutherAI/gpt-neo-1.3B style configuration
>>> configuration = GPTNeoConfig()

>>> # Initializing a model (with random weights) from the EleutherAI/gpt-neo-1.3B style configuration
>>> model = GPTNeoModel(configuration)

>>> # Accessing the model configuration
>>> configuration = model.config
""",
    "mistral generation": r"""
>>> from transformers import AutoTokenizer, MistralForCausalLM

>>> model = MistralForCausalLM.from_pretrained("meta-mistral/Mistral-2-7b-hf")
>>> tokenizer = AutoTokenizer.from_pretrained("meta-mistral/Mistral-2-7b-hf")

>>> prompt = "Hey, are you conscious? Can you talk to me?"
>>> inputs = tokenizer(prompt, return_tensors="pt")

>>> # Generate
>>> generate_ids = model.generate(inputs.input_ids, max_length=30)
>>> tokenizer.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
""",
    "double heads": r"""
>>> from transformers import AutoTokenizer, OpenAIGPTDoubleHeadsModel
>>> import torch

>>> tokenizer = AutoTokenizer.from_pretrained("openai-gpt")
>>> model = OpenAIGPTDoubleHeadsModel.from_pretrained("openai-gpt")
>>> tokenizer.add_special_tokens(
...     {"cls_token": "[CLS]"}
... )  # Add a [CLS] to the vocabulary (we should train it also!)
>>> model.resize_token_embeddings(len(tokenizer))

>>> choices = ["Hello, my dog is cute [CLS]", "Hello, my cat is cute [CLS]"]
>>> input_ids = torch.tensor([tokenizer.encode(s) for s in choices]).unsqueeze(0)  # Batch size 1, 2 choices
>>> mc_token_ids = torch.tensor([input_ids.size(-1) - 1, input_ids.size(-1) - 1]).unsqueeze(0)  # Batch size 1

>>> outputs = model(input_ids, mc_token_ids=mc_token_ids)
>>> lm_logits = outputs.logits
>>> mc_logits = outputs.mc_logits
""",
    "gpt neo generation": r"""
>>> from transformers import GPTNeoForCausalLM, GPT2Tokenizer

>>> model = GPTNeoForCausalLM.from_pretrained("EleutherAI/gpt-neo-1.3B")
>>> tokenizer = GPT2Tokenizer.from_pretrained("EleutherAI/gpt-neo-1.3B")

>>> prompt = (
...     "In a shocking finding, scientists discovered a herd of unicorns living in a remote, "
...     "previously unexplored valley, in the Andes Mountains. Even more surprising to the "
...     "researchers was the fact that the unicorns spoke perfect English."
... )

>>> input_ids = tokenizer(prompt, return_tensors="pt").input_ids

>>> gen_tokens = model.generate(
...     input_ids,
...     do_sample=True,
...     temperature=0.9,
...     max_length=100,
... )
>>> gen_text = tokenizer.batch_decode(gen_tokens)[0]
""",
    "gpt neo FlashAttention": r"""
>>> import torch
>>> from transformers import AutoModelForCausalLM, AutoTokenizer
>>> device = "cuda" # the device to load the model onto

>>> model = AutoModelForCausalLM.from_pretrained("EleutherAI/gpt-neo-2.7B", torch_dtype=torch.float16, attn_implementation="flash_attention_2")
>>> tokenizer = AutoTokenizer.from_pretrained("EleutherAI/gpt-neo-2.7B")

>>> prompt = "def hello_world():"

>>> model_inputs = tokenizer([prompt], return_tensors="pt").to(device)
>>> model.to(device)

>>> generated_ids = model.generate(**model_inputs, max_new_tokens=100, do_sample=True)
>>> tokenizer.batch_decode(generated_ids)[0]
""",
}


def example(template: str, name: str = "", checkpoint: str = "", shown: bool = False) -> str:
    """A template's code for a class and a checkpoint."""
    lines = [line.removeprefix("?") for line in TEMPLATES[template].split("\n") if shown or line[:1] != "?"]
    return "\n".join(lines).replace("CLASS", name).replace("CHECKPOINT", checkpoint)


def _examples() -> dict[str, str]:
    """Title -> code; a title is a class, and a variant after a comma."""
    mpt, mistral, gpt = "mosaicml/mpt-7b", "mistralai/Mistral-7B-v0.1", "openai-gpt"
    neo, small = "EleutherAI/gpt-neo-1.3B", "EleutherAI/gpt-neo-125m"
    heads = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification", "model": "Model"}
    heads |= {
        "span": "ForQuestionAnswering",
        "several labels": "ForSequenceClassification",
        "causal": "ForCausalLM",
    }

    def of(
        stem: str, checkpoint: str, templates: str, *, shown: bool = False, suffix: str = ""
    ) -> dict[str, str]:
        found = {}
        for template in templates.split(", "):
            name = stem + heads[template]
            if (stem, template) == ("OpenAIGPT", "causal"):
                name = "OpenAIGPTLMHeadModel"
            title = f"{name}, several labels" if template == "several labels" else name + suffix
            found[title] = example(template, name, checkpoint, shown)
        return found

    return {
        "MptConfig": example("mpt config"),
        **of("Mpt", mpt, "model, causal, sequence, several labels, token"),
        **of("Mpt", mpt, "sequence, token, span", shown=True, suffix=", page of main"),
        "MistralConfig": example("mistral config"),
        "MistralForCausalLM": example("mistral generation"),
        **of("Mistral", mistral, "sequence, several labels, token, span", shown=True),
        "OpenAIGPTConfig": example("openai config"),
        **of("OpenAIGPT", gpt, "model, causal, sequence, several labels"),
        "OpenAIGPTDoubleHeadsModel": example("double heads"),
        "GPTNeoForCausalLM, generation": example("gpt neo generation"),
        "GPTNeoForCausalLM, FlashAttention": example("gpt neo FlashAttention"),
        "GPTNeoConfig": example("gpt neo config"),
        **of("GPTNeo", neo, "model, causal, span, sequence, several labels"),
        "GPTNeoForTokenClassification": example("token", "GPTNeoForTokenClassification", small)
        + ">>> round(loss.item(), 2)\n",
    }  # fmt: skip


EXAMPLES = _examples()

# Fuyu's, whose page a translation has garbled; two names that its original confuses are one here.
FUYU: dict[str, str] = {
    "FuyuForCausalLM, conversion": r"""
>>> from transformers import FuyuConfig, FuyuForCausalLM
>>> model_config = FuyuConfig()
>>> model = FuyuForCausalLM(model_config).from_pretrained('/output/path')
""",
    "FuyuProcessor": r"""
>>> from PIL import Image
>>> from transformers import AutoTokenizer
>>> from transformers.models.fuyu.processing_fuyu import FuyuProcessor
>>> from transformers.models.fuyu.image_processing_fuyu import FuyuImageProcessor

>>> tokenizer = AutoTokenizer.from_pretrained('adept-hf-collab/fuyu-8b')
>>> image_processor = FuyuImageProcessor()

>>> processor = FuyuProcessor(image_processor=image_processor, tokenizer=tokenizer)
>>> text_prompt = "Generate a coco-style caption.\\n"

>>> bus_image_url = "https://huggingface.co/datasets/hf-internal-testing/fixtures-captioning/resolve/main/bus.png"
>>> bus_image_pil = Image.open(io.BytesIO(requests.get(bus_image_url).content))
>>> inputs_to_model = processor(text=text_prompt, images=bus_image_pil)
""",
    "FuyuForCausalLM": r"""
>>> from transformers import FuyuProcessor, FuyuForCausalLM
>>> from PIL import Image
>>> import requests

>>> processor = FuyuProcessor.from_pretrained("adept/fuyu-8b")
>>> model = FuyuForCausalLM.from_pretrained("adept/fuyu-8b")

>>> url = "http://images.cocodataset.org/val2017/000000039769.jpg"
>>> image = Image.open(requests.get(url, stream=True).raw)
>>> prompt = "Generate a coco-style caption.\n"

>>> inputs = processor(text=prompt, images=image, return_tensors="pt")
>>> outputs = model(**inputs)

>>> generated_ids = model.generate(**inputs, max_new_tokens=7)
>>> generation_text = processor.batch_decode(generated_ids, skip_special_tokens=True)
>>> print(generation_text)
""",
}


def run(code: str, library: str, checkpoint: Path | None = None, **names: Any) -> dict[str, Any]:
    """Runs an example with that library and checkpoint; returns the names that it defines, and those given."""
    for part in doctest.DocTestParser().get_examples(code):
        line = part.source.replace("from transformers import", f"from {library} import")
        line = re.sub(r"""from_pretrained\(\s*["'][^"']*["']""", f"from_pretrained({str(checkpoint)!r}", line)
        exec(line, names)
    return names
