"""Quality of quantised weights: perplexity on held-out text, and KL divergence from the unquantised model.

Two models: the embedded demo, on its held-out files; and a larger model of another family, which is trained for a few
minutes on the same corpus (the sources of Python's standard library) and stored in --folder.

    python bench/perplexity.py
    MONOBLOCK_NATIVE=0 python bench/perplexity.py    # without quantised activations

bitsandbytes and torchao are included if installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monoblock import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MistralConfig,
    MistralForCausalLM,
    WeightOnlyConfig,
    demo,
    native,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import demo_corpus as corpus
import demo_data as data
from tokenizers import Tokenizer

LENGTH = 256  # tokens of a window, as in the demo's training
ROWS = 4
LARGER = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "sliding_window": None}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 1024}
LIMITS = {"int8": 0.005, "int4": 0.03}  # relative to bfloat16


@dataclass(frozen=True)
class Found:
    """A backend's bytes of weights, mean loss and KL divergence in nats per token, and seconds to load."""

    name: str
    size: int
    loss: float
    divergence: float
    seconds: float


def main() -> None:
    """Measures, prints the tables, and fails if a limit is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=48, help=f"of {LENGTH} held-out tokens")
    parser.add_argument("--steps", type=int, default=1000, help="of the larger model's training")
    parser.add_argument("--folder", type=Path, default=Path("build/perplexity"), help="of the larger model")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    documents = corpus.collect()
    tokenizer = Tokenizer.from_file(str(Path(demo.path()) / "tokenizer.json"))
    windows = data.held_out(documents, tokenizer, LENGTH).windows[: options.windows]
    if not (options.folder / "model.safetensors").exists():
        train(documents, tokenizer, options.steps, options.folder)
    results: dict[str, list[Found]] = {}
    for title, folder in (("the embedded demo", Path(demo.path())), ("the larger model", options.folder)):
        results[title] = measure(folder, windows)
        print(table(title, results[title], windows), flush=True)
    if options.json:
        plain = {title: [vars(found) for found in rows] for title, rows in results.items()}
        options.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    sys.exit("\n".join(exceeded) if (exceeded := above_limits(results)) else 0)


def train(documents: Any, tokenizer: Tokenizer, steps: int, folder: Path) -> None:
    """Trains the larger model on the corpus with AdamW, linear decay to zero, and bfloat16 autocast."""
    torch.manual_seed(0)
    texts = [d.text for d in documents if not d.held_out and not d.is_test]
    ids = torch.tensor([i for text in texts for i in tokenizer.encode(text + corpus.ENDOFTEXT).ids])
    model = MistralForCausalLM(
        MistralConfig(vocab_size=tokenizer.get_vocab_size(), **LARGER, **HEADS)
    ).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    start = time.perf_counter()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 20, 1 - step / steps)
        at = torch.randint(len(ids) - LENGTH, (ROWS,))
        batch = torch.stack([ids[i : i + LENGTH] for i in at.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 20 == 19:
            print(
                f"training: step {step + 1}, loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    model.to(torch.bfloat16).eval().save_pretrained(folder)


def measure(folder: Path, windows: Tensor) -> list[Found]:
    """Every backend on these windows, compared with the predictions in float32."""
    reference = [
        F.log_softmax(logits, -1) for logits in predictions(load(folder, dtype=torch.float32), windows)
    ]
    found: list[Found] = []
    for name, make in backends(folder).items():
        start = time.perf_counter()
        try:
            model = make()
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        seconds, loss, divergence = time.perf_counter() - start, 0.0, 0.0
        for logits, expected, rows in zip(
            predictions(model, windows), reference, windows.split(ROWS), strict=True
        ):
            log_p = F.log_softmax(logits, -1)
            loss += F.nll_loss(log_p.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
            divergence += (expected.exp() * (expected - log_p)).sum().item()
        count = windows[:, 1:].numel()
        found.append(Found(name, size_of(model), loss / count, divergence / count, seconds))
    return found


def backends(folder: Path) -> dict[str, Callable[[], Any]]:
    """Name -> function that loads the model; all compute in bfloat16, and the first has bfloat16 weights."""
    configs: dict[str, Any] = {
        "bf16": None,
        "int8": "int8",
        "int8, group 64": WeightOnlyConfig(bits=8, group_size=64),
        "int4": "int4",
        "int4, group 64": WeightOnlyConfig(bits=4, group_size=64),
        "bitsandbytes int8": BitsAndBytesConfig(load_in_8bit=True),
        "bitsandbytes nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "bitsandbytes fp4": BitsAndBytesConfig(load_in_4bit=True),
    }
    loaded = {
        name: lambda config=config: load(folder, quantization_config=config)
        for name, config in configs.items()
    }
    rounded = {"int4, rounded to nearest": lambda: nearest(folder)}
    return (
        loaded
        | rounded
        | {f"torchao {form}": lambda form=form: torchao(folder, form) for form in ("int8", "int4")}
    )


def load(folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """The model of a folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def nearest(folder: Path, group: int = 128) -> Any:
    """Round-to-nearest int4: 15 steps from the smallest to the largest weight of a group, without a search."""
    model = load(folder)
    for module in model.at("layers").modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            padded = F.pad(weight.float()[None], (0, -weight.shape[1] % group), mode="replicate")[0]
            grouped = padded.unflatten(1, (-1, group))
            low, high = grouped.aminmax(dim=-1, keepdim=True)
            step = ((high - low) / 15).half().float()
            rounded = ((grouped - low) / step).nan_to_num().round() * step + low.half().float()
            module.weight = nn.Parameter(rounded.flatten(1)[:, : weight.shape[1]].to(weight.dtype))
    return model


def torchao(folder: Path, form: str) -> Any:
    """The matrices of the blocks, quantised by torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]

    model = copy.deepcopy(load(folder))
    config: Any = Int8WeightOnlyConfig()
    if form == "int4":
        from torchao.quantization import IntxWeightOnlyConfig  # pyright: ignore[reportMissingImports]
        from torchao.quantization.granularity import PerGroup  # pyright: ignore[reportMissingImports]

        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(model.at("layers"), config)
    return model


@torch.inference_mode()
def predictions(model: Any, windows: Tensor) -> Any:
    """Yields float32 logits (ROWS, LENGTH - 1, vocabulary)."""
    for rows in windows.split(ROWS):
        yield model(rows).logits[:, :-1].float()


def size_of(model: Any) -> int:
    """Bytes of all tensors, including those inside quantised parameters."""
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    total = 0
    for tensor in held.values():
        inner = getattr(tensor, "__tensor_flatten__", None)
        storages = [getattr(tensor, name) for name in inner()[0]] if inner else [tensor]
        state = getattr(tensor, "quant_state", None)  # the scales of bitsandbytes
        storages += [state.absmax] if state is not None else []
        total += sum(one.numel() * one.element_size() for one in storages)
    return total


def table(title: str, rows: list[Found], windows: Tensor) -> str:
    """The figures of one model as Markdown."""
    base = rows[0].loss
    lines = [
        f"\n{title}; {windows.numel():,} held-out tokens; kernels: {native.status()}\n",
        "| weights | MB | perplexity | against bf16 | divergence from fp32, nats | loading, s |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.name} | {r.size / 1e6:.2f} | {math.exp(r.loss):.3f} | {math.expm1(r.loss - base):+.2%} | "
        f"{r.divergence:.5f} | {r.seconds:.1f} |"
        for r in rows
    ]
    return "\n".join(lines)


def above_limits(results: dict[str, list[Found]]) -> list[str]:
    """Messages on figures above their limit."""
    return [
        f"{row.name} of {title} is {math.expm1(row.loss - rows[0].loss):+.2%} from bfloat16; the limit is {limit:.1%}"
        for title, rows in results.items()
        for row in rows
        if (limit := LIMITS.get(row.name)) is not None and math.expm1(row.loss - rows[0].loss) > limit
    ]


if __name__ == "__main__":
    main()
