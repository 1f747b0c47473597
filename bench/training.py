"""Training steps of monoblock beside those of transformers, alternating in one run: tokens per second, peak memory, and
the share of the matrix rate of the machine.

    python bench/training.py                          GPT Neo 125M, all weights, 4 x 512 tokens, float32 and bfloat16
    python bench/training.py --vocab 256000           the same with another vocabulary
    python bench/training.py --adapter lora           LoRA of rank 8 on a Mistral of 1.1 billion parameters in bfloat16
    python bench/training.py --adapter qlora          ... on int4 weights, beside peft on bitsandbytes' nf4
    python bench/training.py --adapter lora --checkpointing       ... with gradient checkpointing
    python bench/training.py --adapter lora --folder MODEL --batch 2 --length 128     another Mistral
    python bench/training.py --optimizer adamw_8bit   moments in 8 bits, beside bitsandbytes' AdamW8bit

transformers trains float32 weights with AdamW, in bfloat16 by autocast; monoblock is what `monoblock finetune` runs.
Peak memory is that of the process, with its imports. `--adapter` needs peft for the comparison, qlora also
bitsandbytes; "peft" is peft on transformers. Every library runs in a process of its own; those of one form are alive
together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEO: dict[str, Any] = {
    "hidden_size": 768,
    "num_layers": 12,
    "num_heads": 12,
    "attention_types": [[["global", "local"], 6]],
    "max_position_embeddings": 2048,
    "attention_dropout": 0.0,
    "embed_dropout": 0.0,
    "resid_dropout": 0.0,
}
MISTRAL: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 8
Step = Callable[[], float]


def ours(given: argparse.Namespace) -> Step:
    """A step as `monoblock finetune` runs it."""
    import torch

    import monoblock
    from monoblock.backends.pytorch.training import lora, losses, memory
    from monoblock.backends.pytorch.training.optimizer import Optimizer
    from monoblock.training.options import TrainingOptions

    dtype, adapter = getattr(torch, given.form), given.adapter
    options = TrainingOptions(lora_rank=RANK if adapter else None, optimizer=given.optimizer)
    if adapter:
        packed = {"quantization_config": "int4"} if adapter == "qlora" else {}
        model: Any = monoblock.MistralForCausalLM.from_pretrained(given.folder, dtype=dtype, **packed)
        model.requires_grad_(False)
        lora.add(model, options)
    else:
        model = monoblock.GPTNeoForCausalLM(monoblock.GPTNeoConfig(vocab_size=given.vocab, **NEO)).to(dtype)
    if given.checkpointing:
        if adapter == "qlora":  # as `monoblock finetune --quantize` does
            memory.return_large_blocks()
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = Optimizer(dict(model.named_parameters()), options)
    ids = torch.randint(0, given.vocab, (given.batch, given.length))

    def step() -> float:
        loss = losses.token_loss(model, {"input_ids": ids, "use_cache": False}, ids, causal=True)
        loss = loss / (given.batch * (given.length - 1))
        value = float(loss.detach())
        loss.backward()
        optimizer.gradient_norm()
        optimizer.step(1e-4)
        return value

    return step


def theirs(given: argparse.Namespace) -> Step:
    """A step of transformers, or of peft on it: LoRA on bfloat16, QLoRA on nf4 with double quantisation."""
    import torch
    import transformers

    dtype, adapter = getattr(torch, given.form), given.adapter
    autocast = given.form == "bfloat16" and not adapter
    if adapter:
        from peft import (  # pyright: ignore[reportMissingImports]
            LoraConfig,
            get_peft_model,
            prepare_model_for_kbit_training,
        )

        packed: dict[str, Any] = {}
        if adapter == "qlora":
            packed["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        base = transformers.MistralForCausalLM.from_pretrained(given.folder, dtype=dtype, **packed)
        if adapter == "qlora":  # gradient checkpointing is switched on below
            base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        model: Any = get_peft_model(base, LoraConfig(r=RANK, target_modules=TARGETS))
    else:
        model = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(vocab_size=given.vocab, **NEO))
    if given.checkpointing:
        model.gradient_checkpointing_enable()
        if adapter:
            model.enable_input_require_grads()
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if given.optimizer == "adamw_8bit":
        import bitsandbytes

        optimizer: Any = bitsandbytes.optim.AdamW8bit(parameters, lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = torch.randint(0, given.vocab, (given.batch, given.length))

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def matrix_rate(form: str) -> float:
    """The best rate of products of 2048 x 2048 matrices, in FLOP/s."""
    import torch

    a = torch.randn(2048, 2048, dtype=getattr(torch, form))
    best = float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - begin)
    return 2 * 2048**3 / best


def peak() -> float:
    """The peak memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


def worker(given: argparse.Namespace) -> None:
    """Answers each line on standard input with a step's seconds, its loss and the peak memory."""
    import torch

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.manual_seed(0)
    rate = matrix_rate(given.form)
    step = (ours if given.worker == "monoblock" else theirs)(given)
    step()
    print(json.dumps({"rate": rate}), file=answers, flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = step()
        found = {"seconds": time.perf_counter() - begin, "loss": loss, "MB": peak()}
        print(json.dumps(found), file=answers, flush=True)


class TrainingProcess:
    """A process that trains."""

    def __init__(self, name: str, form: str, given: argparse.Namespace, folder: str | None) -> None:
        command = [sys.executable, __file__, "--worker", name, "--form", form, "--vocab", str(given.vocab)]
        command += [
            "--batch",
            str(given.batch),
            "--length",
            str(given.length),
            "--optimizer",
            given.optimizer,
        ]
        command += ["--checkpointing"] if given.checkpointing else []
        command += ["--adapter", given.adapter, "--folder", str(folder)] if given.adapter else []
        self.name = name
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("SHOW") else subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"},
        )
        self.rate = self.answer()["rate"]
        self.steps: list[dict[str, float]] = []

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} failed: run again with SHOW=1 for its messages")
        return json.loads(line)

    def step(self) -> None:
        """One step."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        self.steps.append(self.answer())


def flops(given: argparse.Namespace) -> float:
    """Of the matrix products of a step of GPT Neo: 2 per weight and token, and twice that in the backward pass; and
    those of the attention's scores and values over all earlier tokens."""
    width, layers = NEO["hidden_size"], NEO["num_layers"]
    weights = 12 * width**2 * layers + given.vocab * width
    attention = 2 * width * given.length * layers  # causal: half of 2 products of length x width
    return given.batch * given.length * 3 * (2 * weights + attention)


def stored_mistral(folder: Path) -> str:
    """A folder with random weights in bfloat16."""
    import torch

    import monoblock

    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        model = monoblock.MistralForCausalLM(monoblock.MistralConfig(**MISTRAL))
        model.to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Measures and prints a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--form", default="float32,bfloat16", help="of the weights")
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--adapter", choices=("lora", "qlora"))
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--folder", default="build/training-mistral", help="for the weights under an adapter")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--optimizer", choices=("adamw", "adamw_8bit"), default="adamw")
    parser.add_argument("--only", help="default: monoblock and transformers, with an adapter peft")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    if given.worker:
        worker(given)
        return
    folder, peer = None, "peft" if given.adapter else "transformers"
    if given.adapter:
        folder = stored_mistral(Path(given.folder))
        config = json.loads((Path(folder) / "config.json").read_text())
        given.form, given.vocab = "bfloat16", config["vocab_size"]
    of = "peft's" if given.adapter else "transformers'"
    print(f"| | tokens per second | of {of} | share of the matrix rate | peak memory, MB | loss |")
    print("|---|---|---|---|---|---|")
    for form in given.form.split(","):
        processes = [
            TrainingProcess(name, form, given, folder)
            for name in (given.only or f"monoblock,{peer}").split(",")
        ]
        for _ in range(given.runs):
            for process in processes:
                process.step()
        seconds = {c.name: [step["seconds"] for step in c.steps] for c in processes}
        base = seconds.get(peer)
        for c in processes:
            rates = sorted(given.batch * given.length / s for s in seconds[c.name])
            ratio = (
                statistics.median(b / s for b, s in zip(base, seconds[c.name], strict=True)) if base else None
            )
            share = f"{flops(given) / min(seconds[c.name]) / c.rate:.0%}" if not given.adapter else ""
            cells = [
                f"{c.name}, {form}{' ' + given.adapter if given.adapter else ''}",
                f"{statistics.median(rates):.0f} ({rates[0]:.0f}-{rates[-1]:.0f})",
                f"{ratio:.2f}" if ratio else "",
                share,
                f"{max(step['MB'] for step in c.steps):.0f}",
                f"{c.steps[-1]['loss']:.3f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
            c.process.kill()


if __name__ == "__main__":
    main()
