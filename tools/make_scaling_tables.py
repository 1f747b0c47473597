"""Writes the tables of docs/scaling.md from `monoblock.scaling`, between their markers.

python tools/make_scaling_tables.py
"""

from __future__ import annotations

from pathlib import Path

from monoblock import MistralConfig, scaling
from monoblock.scaling import DEVICES, Workload

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- tables: tools/make_scaling_tables.py -->\n", "<!-- end of tables -->\n"

# Shapes of published models, as Mistral configs: 7B, 22B, 70B, 123B.
SHAPES = {
    "7B": {},
    "22B": {
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "vocab_size": 32768,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "123B": {
        "hidden_size": 12288,
        "intermediate_size": 28672,
        "num_hidden_layers": 88,
        "num_attention_heads": 96,
        "vocab_size": 32768,
    },
}
COUNTS = (8, 64, 256, 1024)
DEVICE = DEVICES["h100"]


def cell(name: str, devices: int, work: Workload) -> str:
    """DeviceLayout, memory and tokens per second, or "-" if nothing fits."""
    config = MistralConfig(sliding_window=None, **SHAPES[name])
    spec, head = config.to_spec(), config.to_head("causal")
    try:
        layout = scaling.chosen(spec, head, devices, work, DEVICE.memory)
    except ValueError:
        return "-"
    found = scaling.as_dict(spec, head, layout, work, DEVICE)
    shards = f"T{layout.tensor}" + (f" F{layout.fsdp}" if work.train else "")
    peak = scaling.memory(spec, head, layout, work).peak / 1e9
    return f"{shards}, {peak:.0f} GB, {found['tokens_per_second']:,.3g}".replace("e+0", "e")


def table(title: str, train: bool, batch: int, context: int, dtype: str) -> str:
    """A row per shape, a column per number of devices."""
    lines = [
        f"{title}:\n",
        "| shape | " + " | ".join(f"{n} GPUs" for n in COUNTS) + " |",
        "|---|" + "---|" * len(COUNTS),
    ]
    for name in SHAPES:
        cells = [
            cell(
                name,
                n,
                Workload(batch=batch * n, context=context, dtype=dtype, train=train, checkpointing=train),
            )
            for n in COUNTS
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def tables() -> str:
    """All tables."""
    return "\n".join(
        (
            table("Training, 4,096 tokens, one sequence per GPU, bfloat16", True, 1, 4096, "bfloat16"),
            table("Training, 4,096 tokens, four sequences per GPU, bfloat16", True, 4, 4096, "bfloat16"),
            table("Generation, 8,192 tokens, four sequences per GPU, bfloat16", False, 4, 8192, "bfloat16"),
            table("Generation, 8,192 tokens, four sequences per GPU, int4", False, 4, 8192, "int4"),
        )
    )


def updated(text: str) -> str:
    """The page with current tables."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + tables() + END + after


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
