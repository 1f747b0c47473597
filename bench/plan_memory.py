"""Compares `monoblock plan` with the measured memory of training and inference on this machine's CPU.

    python bench/plan_memory.py [NAME ...]        (all cases of CASES without a name)

Each case runs in a process of its own. Measured is the peak of the resident set (VmHWM of Linux) minus the resident set
before the model is made, when the libraries are loaded and a tiny model has run. glibc returns freed tensors to the
system at once (a fixed MALLOC_MMAP_THRESHOLD_); with its defaults the heap keeps 5 to 30% more. Prints a Markdown
table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

GPT_NEO_125M = {
    "hidden_size": 768,
    "num_layers": 12,
    "num_heads": 12,
    "attention_types": [[["global", "local"], 6]],
    "max_position_embeddings": 2048,
    "vocab_size": 50257,
}
MISTRAL_20M = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "sliding_window": None,
}
MPT_125M = {"d_model": 768, "n_heads": 12, "n_layers": 12, "max_seq_len": 2048, "vocab_size": 50368}
MPNET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# Name -> class, fields of the config, and the workload.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Mistral 20M, training": ("MistralForCausalLM", MISTRAL_20M, {"train": True, "batch": 4, "context": 512}),
    "Mistral 20M, training, bfloat16": (
        "MistralForCausalLM",
        MISTRAL_20M,
        {"train": True, "batch": 4, "context": 512, "dtype": "bfloat16"},
    ),
    "Mistral 20M, training, checkpointing": (
        "MistralForCausalLM",
        MISTRAL_20M,
        {"train": True, "batch": 8, "context": 512, "checkpointing": True},
    ),
    "Mistral 20M, prompt": ("MistralForCausalLM", MISTRAL_20M, {"batch": 4, "context": 1024}),
    "GPT Neo 125M, training": (
        "GPTNeoForCausalLM",
        GPT_NEO_125M,
        {"train": True, "batch": 2, "context": 256},
    ),
    "GPT Neo 125M, training, checkpointing": (
        "GPTNeoForCausalLM",
        GPT_NEO_125M,
        {"train": True, "batch": 4, "context": 512, "checkpointing": True},
    ),
    "GPT Neo 125M, prompt": ("GPTNeoForCausalLM", GPT_NEO_125M, {"batch": 8, "context": 512}),
    "MPT 125M, training": ("MptForCausalLM", MPT_125M, {"train": True, "batch": 2, "context": 256}),
    "MPT 125M, prompt, bfloat16": (
        "MptForCausalLM",
        MPT_125M,
        {"batch": 8, "context": 512, "dtype": "bfloat16"},
    ),
    "MPNet 110M, training": ("MPNetForMaskedLM", MPNET, {"train": True, "batch": 8, "context": 128}),
}


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run(model: Any, work: Any, steps: int) -> None:
    """Training steps, or one prompt and one more token."""
    import torch

    from monoblock.backends.pytorch.training import losses
    from monoblock.backends.pytorch.training.optimizer import Optimizer
    from monoblock.training.options import TrainingOptions

    ids = torch.randint(5, model.spec.vocab - 1, (work.batch, work.context))
    if not work.train:
        model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
        return
    model.train()
    if work.checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = Optimizer(dict(model.named_parameters()), TrainingOptions())
    for _ in range(steps):
        given = {"input_ids": ids, **({"use_cache": False} if model.spec.causal else {})}
        (losses.token_loss(model, given, ids, model.spec.causal) / ids.numel()).backward()
        optimizer.gradient_norm()
        optimizer.step(1e-4)


def measured(name: str) -> None:
    """Print the case's planned and measured bytes as JSON."""
    import torch

    import monoblock
    from monoblock import scaling
    from monoblock.families import family_of

    torch.set_num_threads(1)
    cls_name, fields, options = CASES[name]
    cls, make = getattr(monoblock, cls_name), family_of(cls_name).config
    work = scaling.Workload(**{"dtype": "float32", "recomputed": True, **options})
    config = make(**fields)
    dtype = getattr(torch, work.dtype)
    with tempfile.TemporaryDirectory() as folder:
        tiny = {key: value for key, value in fields.items() if key == "attention_types"}
        small = make(**{**fields, **_small(cls_name), **tiny})
        # With checkpointing too, which imports 40 MB of PyTorch's modules at its first use.
        small_work = replace(work, batch=1, context=32)
        if work.train:
            run(cls(small).to(dtype), small_work, 2)
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
            model = cls._from_config(config, dtype=dtype)
        else:
            cls._from_config(config, dtype=dtype).save_pretrained(folder)
            run(cls(small).to(dtype), small_work, 1)
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            model = cls.from_pretrained(folder)
        run(model, work, 3)
        peak = resident("VmHWM") - before
    plan = scaling.memory(config.to_spec(), model.head_spec, scaling.DeviceLayout(), work)
    print(json.dumps({"plan": plan.peak, "measured": peak}))


def _small(cls_name: str) -> dict[str, Any]:
    """Fields of a tiny model of the class."""
    if cls_name.startswith("Mpt"):
        return {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 99}
    if cls_name.startswith("GPTNeo"):
        return {"hidden_size": 96, "vocab_size": 99}
    return {"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 99}


def main(names: list[str]) -> None:
    """Run the cases and print the table."""
    print("| model and work | plan, MB | measured, MB | difference |\n|---|---|---|---|")
    for name in names or CASES:
        command = [sys.executable, __file__, "--case", name]
        allocator = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **allocator})
        if result.returncode:
            raise SystemExit(result.stderr)
        found = json.loads(result.stdout.splitlines()[-1])
        share = found["plan"] / found["measured"] - 1
        sizes = f"{found['plan'] / 1e6:,.0f} | {found['measured'] / 1e6:,.0f}"
        print(f"| {name} | {sizes} | {share:+.1%} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        measured(sys.argv[2])
    else:
        main(sys.argv[1:])
