"""Trains the demo's chat adapter by `monoblock finetune --task chat`, and writes it into the package, and its report.

    python tools/train_chat.py            data, training, export
    python tools/train_chat.py --export   exports the last run in build/chat

The run is determined by the recipe, tools/chat.yaml, and the running Python's library.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import chat_corpus
import search_corpus
import torch
from peft import load_peft_weights
from reports import Clock, replace_section

from monoblock import AutoModelForCausalLM, AutoTokenizer, demo_chat
from monoblock.checkpoint.save import save_tensors

REPOSITORY = Path(__file__).resolve().parent.parent
BUILD = REPOSITORY / "build" / "chat"
RECIPE = Path(__file__).with_name("chat.yaml")
PAGE, PICTURE = REPOSITORY / "docs" / "training.md", REPOSITORY / "docs" / "chat-loss.svg"
SIZE_LIMIT = 1_000_000  # bytes of the adapter
HELD_OUT = 4  # of the held-out questions, one in so many is evaluated
QUESTIONS = (
    "Hello",
    "Who are you?",
    "What does os.path.join do?",
    "What does random.shuffle do?",
    "Show me the signature of json.dumps.",
    "What does pathlib.Path.exists do?",  # of a held-out module
    "Return True if the stack is empty.",
)


def write_data() -> None:
    """Write the records of training and evaluation."""
    found = search_corpus.definitions()
    for name, held_out in (("train", False), ("held-out", True)):
        records = chat_corpus.conversations(found, held_out=held_out)[:: HELD_OUT if held_out else 1]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (BUILD / f"{name}.jsonl").write_text(text, encoding="utf-8")


def export() -> None:
    """Write the adapter in bfloat16, and the report."""
    trained, target = BUILD / "adapter", demo_chat.path()
    tensors = {
        name: tensor.to(torch.bfloat16)
        for name, tensor in load_peft_weights(str(trained), device="cpu").items()
    }
    save_tensors(BUILD / "bfloat16", tensors, framework="pt")
    shutil.copyfile(BUILD / "bfloat16" / "model.safetensors", target / "adapter_model.safetensors")
    config = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "demo"  # not a path of this machine
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in target.glob("adapter*"))
    if size > SIZE_LIMIT:
        raise SystemExit(f"the adapter has {size:,} bytes; it may have {SIZE_LIMIT:,}")
    report(size, sum(tensor.numel() for tensor in tensors.values()))


def report(size: int, parameters: int) -> None:
    """Replace the section of the page, and copy the curves."""
    lines = [json.loads(line) for line in (BUILD / "adapter" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    facts = json.loads((BUILD / "time.json").read_text(encoding="utf-8"))
    counts = {
        name: sum(1 for _ in (BUILD / f"{name}.jsonl").open(encoding="utf-8"))
        for name in ("train", "held-out")
    }
    steps = max(line["step"] for line in lines)
    answers = "\n".join(f"| {question} | {reply} |" for question, reply in replies())
    text = f"""
| held-out modules | loss of the answers, nats per token | perplexity |
|---|---|---|
| the demo | {losses[0]:.3f} | {2.718281828 ** losses[0]:.1f} |
| **with the adapter** | {losses[-1]:.3f} | {2.718281828 ** losses[-1]:.1f} |

{counts["train"]:,} conversations, {counts["held-out"]:,} of held-out modules for the evaluation; {steps} steps in
{facts["processor"] / 60:.0f} minutes of processor time on {facts["threads"]}; {parameters:,} parameters of rank
8, {size / 1e6:.1f} MB in bfloat16. Answers by the most probable token each time, not selected:

| asked | answered |
|---|---|
{answers}
"""
    replace_section(PAGE, "chat adapter", text)
    shutil.copyfile(BUILD / "adapter" / "curves.svg", PICTURE)
    print(text)


def replies() -> list[tuple[str, str]]:
    """The questions with the answers of the packaged adapter."""
    folder = demo_chat.merged(BUILD / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: list[tuple[str, str]] = []
    for question in QUESTIONS:
        turn = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        out = model.generate(ids, do_sample=False, repetition_penalty=1.0, max_new_tokens=60)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        found.append((question, "<br>".join(line.replace("|", "\\|") for line in text.strip().split("\n"))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--export", action="store_true", help="export the last run without training")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    if not options.export:
        if not (BUILD / "train.jsonl").exists():  # else a run that was interrupted continues
            write_data()
        command = [sys.executable, "-m", "monoblock.cli", "finetune", "--recipe", str(RECIPE), "--resume"]
        with Clock(BUILD / "time.json"):
            subprocess.run(command, check=True, cwd=REPOSITORY, env=os.environ | {"PYTHONHASHSEED": "0"})
    export()


if __name__ == "__main__":
    main()
