"""Exports a training run: the model folder within the package, and docs/demo.md with the loss curve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import demo_corpus as corpus
import demo_data as data
import demo_report as report
import torch
from tokenizers import Tokenizer

from monoblock import AutoTokenizer, MptForCausalLM

if TYPE_CHECKING:
    from train_demo import Trainer

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / "src" / "monoblock" / "demo"
SIZE_LIMIT = 12_000_000  # bytes in the folder
PROMPTS = ("def fibonacci(n):", "class Stack:", "for line in lines:")
REQUESTS = ("Return True if the stack is empty.", "def add(a, b):")
LENGTHS = (256, 512, 1024)  # window lengths of the held-out evaluation

# A system message is prepended to the next user message, since the model was trained on requests and replies only.
CHAT_TEMPLATE = (
    "{%- set state = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{%- set state.system = message['content'] + '\\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '<|user|>' + state.system + message['content'] -}}{%- set state.system = '' -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' + message['content'] + '<|endoftext|>' -}}"
    "{%- else -%}"
    "{{- raise_exception('roles are system, user and assistant, got ' + message['role']) -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
GENERATION = {
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "do_sample": True,
    "temperature": 0.8,
    "top_p": 0.9,
    "repetition_penalty": 1.05,  # larger values would suppress indentation
    "max_new_tokens": 200,
}


def write(trainer: Trainer, documents: Sequence[corpus.Document], tokenizer: Tokenizer) -> None:
    """Writes the model folder, loads it, evaluates the loaded model, and writes the report."""
    save_folder(trainer.model, tokenizer)
    size = sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file())
    if size > SIZE_LIMIT:
        raise SystemExit(f"{FOLDER} has {size:,} bytes; it may have {SIZE_LIMIT:,}: make the model smaller")
    trainer.model = MptForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    trainer.options.bf16 = False
    held_out = {}
    for length in sorted({trainer.options.length, *LENGTHS}):
        trainer.held_out = data.held_out(documents, tokenizer, length)
        held_out[length] = trainer.evaluate()
    facts = report.Facts(
        run=trainer.options,
        log=trainer.state.log,
        config=trainer.model.config,
        documents=documents,
        params=sum(param.numel() for param in trainer.model.parameters()),
        size=size,
        epoch_tokens=sum(len(segment.ids) * segment.repeats for segment in trainer.segments),
        held_out=held_out,
        bytes_per_token=trainer.held_out.bytes_per_token,
        samples=samples(),
    )
    report.write(facts, REPOSITORY / "docs")
    print(f"{size:,} bytes in {FOLDER}; held-out loss by window: {held_out}")


def save_folder(model: MptForCausalLM, tokenizer: Tokenizer) -> None:
    """bf16 weights, config, generation config and tokenizer, in transformers' files."""
    model.to(torch.bfloat16).save_pretrained(FOLDER)
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    end, padding, *talk = corpus.SPECIALS
    # Not GPTNeoXTokenizerFast, MPT's usual tokenizer: transformers 5 would use that class's pre-tokenizer instead of
    # the one in tokenizer.json, so that the ids would differ.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "pad_token": padding,
        "additional_special_tokens": talk,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # required for generation in batches
        "model_max_length": model.config.max_seq_len,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(FOLDER / "tokenizer_config.json", settings)
    write_json(FOLDER / "generation_config.json", GENERATION)
    shutil.rmtree(FOLDER / "__pycache__", ignore_errors=True)


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def samples() -> list[tuple[str, str, str]]:
    """(title, text before the reply, reply) of completions of PROMPTS and chat replies to REQUESTS."""
    model = MptForCausalLM.from_pretrained(FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)

    def reply(text: str) -> str:
        torch.manual_seed(0)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=120)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    found = [("A completion", prompt, reply(prompt)) for prompt in PROMPTS]
    for request in REQUESTS:
        turn = [{"role": "user", "content": request}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        found.append((f"A chat turn: {request}", "", reply(text)))
    return found
