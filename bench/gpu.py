"""Decoding and prefill speed of 7B-shaped models on a GPU, as a Markdown table.

    pip install -e ".[torch]"
    python bench/gpu.py [MODEL ...] [--quantize int8 int4]

Random weights, bf16, batch size 1. Decoding reads all weights for each token; its speed is compared with the measured
bandwidth of copying a large tensor. `--check` runs tiny models on the CPU to test the script.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import monoblock
from monoblock.backends.pytorch.generation import cuda_graphs
from monoblock.backends.pytorch.quantization.quantize import quantize

# Config fields that differ from the defaults.
MISTRAL: dict[str, Any] = {"vocab_size": 32000, "sliding_window": 4096, "max_position_embeddings": 32768}
MPT: dict[str, Any] = {
    "d_model": 4096,
    "n_heads": 32,
    "n_layers": 32,
    "vocab_size": 50432,
    "max_seq_len": 16384,
}
TINY: dict[str, dict[str, Any]] = {
    "mistral": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 500,
    },
    "mpt": {"d_model": 128, "n_heads": 4, "n_layers": 2, "vocab_size": 500, "max_seq_len": 4096},
}
MODELS = {
    "mistral-7b": ("MistralConfig", "MistralForCausalLM", MISTRAL, "mistral"),
    "mpt-7b": ("MptConfig", "MptForCausalLM", MPT, "mpt"),
}


@dataclass
class Sizes:
    """Sizes of the measurements: bytes copied, prompt lengths, new tokens of the shorter and the longer generation."""

    device: str
    copied: int
    prompts: tuple[int, ...]
    new_tokens: tuple[int, int]
    repeats: int


FULL = Sizes("cuda", 4 << 30, (512, 2048, 8192), (32, 288), 5)
CHECK = Sizes("cpu", 1 << 24, (16, 32), (16, 40), 1)


def seconds(work: Callable[[], Any], sizes: Sizes) -> float:
    """The median time of several runs after a warm-up."""
    times = []
    for _ in range(sizes.repeats + 1):
        wait(sizes)
        start = time.perf_counter()
        work()
        wait(sizes)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def wait(sizes: Sizes) -> None:
    """Synchronises the device."""
    if sizes.device == "cuda":
        torch.cuda.synchronize()


def copy_rate(sizes: Sizes) -> float:
    """Bytes per second read and written by a copy."""
    source = torch.ones(sizes.copied, dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    return 2 * sizes.copied / seconds(lambda: target.copy_(source), sizes)


def random_model(name: str, sizes: Sizes) -> Any:
    """The model with random bf16 weights, created on the device."""
    config, model, fields, tiny = MODELS[name]
    if sizes.device == "cpu":
        fields = TINY[tiny]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(sizes.device):
            return getattr(monoblock, model)(getattr(monoblock, config)(**fields)).eval()
    finally:
        torch.set_default_dtype(before)


def bytes_read(model: Any) -> int:
    """Bytes of the weights read for a token: all but an embedding that is not tied to the head."""
    tensors = {x.data_ptr(): x.numel() * x.element_size() for x in [*model.parameters(), *model.buffers()]}
    if not model.tied():
        for x in [*model.get_input_embeddings().parameters(), *model.get_input_embeddings().buffers()]:
            tensors.pop(x.data_ptr(), None)
    return sum(tensors.values())


def token_seconds(model: Any, ids: torch.Tensor, sizes: Sizes, **given: Any) -> float:
    """The time per token including the host, from the difference of a longer and a shorter generation."""
    short, long = (
        seconds(
            lambda count=count: model.generate(ids, max_new_tokens=count, eos_token_id=-1, **given), sizes
        )
        for count in sizes.new_tokens
    )
    return (long - short) / (sizes.new_tokens[1] - sizes.new_tokens[0])


@torch.inference_mode()
def prompt_rate(model: Any, length: int, sizes: Sizes) -> float:
    """Prefill speed in tokens per second, with the logits of the last token."""
    ids = torch.randint(5, model.config.vocab_size, (1, length), device=sizes.device)
    return length / seconds(lambda: model(ids, use_cache=True, logits_to_keep=1), sizes)


def measure(name: str, kind: str, copied: float, sizes: Sizes) -> list[str]:
    """A row of the table."""
    model = random_model(name, sizes)
    if kind != "bf16":
        quantize(model, monoblock.WeightOnlyConfig(bits={"int8": 8, "int4": 4}[kind]))
    ids = torch.randint(5, model.config.vocab_size, (1, sizes.prompts[0]), device=sizes.device)
    token = token_seconds(model, ids, sizes)
    plain = token_seconds(model, ids, sizes, cache_implementation="dynamic")
    read = bytes_read(model)
    memory = torch.cuda.max_memory_allocated() / 1e9 if sizes.device == "cuda" else float("nan")
    captured = len(cuda_graphs._kept.get(model, []))
    prompts = [f"{prompt_rate(model, length, sizes):,.0f}" for length in sizes.prompts]
    cells = [
        f"{name} {kind}",
        f"{read / 1e9:.2f}",
        f"{1 / token:.1f}",
        f"{read / token / copied:.0%}",
        f"{1 / plain:.1f}",
        str(captured),
        *prompts,
        f"{memory:.1f}",
    ]
    cuda_graphs.release(model)
    return cells


def table(names: list[str], kinds: list[str], sizes: Sizes) -> str:
    """The table below a line on the hardware."""
    copied = copy_rate(sizes)
    device = torch.cuda.get_device_name() if sizes.device == "cuda" else "CPU (a check, no measurement)"
    head = ["model", "GB a token", "tok/s", "of the copy", "tok/s, without graphs", "captured graphs"]
    head += [f"prompt of {length}, tok/s" for length in sizes.prompts] + ["peak GB"]
    lines = [f"{device}, PyTorch {torch.__version__}; copies {copied / 1e9:,.0f} GB/s", ""]
    rows = [head, ["---"] * len(head)]
    for name in names:
        for kind in kinds:
            if sizes.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            rows.append(measure(name, kind, copied, sizes))
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def main() -> None:
    """Measures the models of the arguments, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[], help=f"of {', '.join(MODELS)}; all if none")
    parser.add_argument(
        "--quantize", nargs="*", default=[], choices=["int8", "int4"], help="in addition to bf16"
    )
    parser.add_argument("--check", action="store_true", help="tiny models on the CPU")
    given = parser.parse_args()
    if unknown := [name for name in given.models if name not in MODELS]:
        parser.error(f"there is no model {unknown[0]!r}; there are {', '.join(MODELS)}")
    if not given.check and not torch.cuda.is_available():
        sys.exit("bench/gpu.py needs a CUDA GPU, and there is none; --check runs tiny models on the CPU")
    sizes = CHECK if given.check else FULL
    torch.manual_seed(0)
    print(table(given.models or list(MODELS), ["bf16", *given.quantize], sizes))


if __name__ == "__main__":
    main()
