"""Load time, peak memory, and tokens per second of generation, each contestant in a process of its own.

    python bench/decode.py [--layers 20] [--width 2048] [--dtype bfloat16] [--prompt 128] [--new 32] [--runs 3]
                           [--who monoblock,transformers]

Makes a random MPT of that size in a temporary folder, runs the contestants in turn, `--runs` times each, and prints
one table with medians. Compare the ratios within a run; machines differ, and the same one drifts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WHO = ("monoblock", "transformers")


def make_checkpoint(folder: Path, layers: int, width: int, dtype: str) -> int:
    """A random checkpoint, written tensor by tensor; the bytes of its weights."""
    import torch

    from monoblock import MptConfig, MptForCausalLM
    from monoblock.checkpoint.save import save_tensors

    config = MptConfig(d_model=width, n_heads=width // 128, n_layers=layers, dtype=dtype)
    config.architectures = ["MptForCausalLM"]
    with torch.device("meta"):
        model = MptForCausalLM(config)
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: torch.Size):
        state = generator.get_state()

        def make():
            generator.set_state(state)
            scale = 0.02 if len(shape) > 1 else 1.0
            return (torch.randn(shape, generator=generator) * scale).to(getattr(torch, dtype))

        return make

    ghosts = model.hub_state_dict()
    save_tensors(folder, {name: drawn(t.shape) for name, t in ghosts.items()}, framework="pt")
    config.save_pretrained(folder)
    return sum(t.numel() for t in ghosts.values()) * getattr(torch, dtype).itemsize


def contestant(who: str, folder: str, dtype: str, prompt: int, new: int) -> dict[str, float]:
    """One run in this process: import, load, prefill, decode."""
    start = time.perf_counter()
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    if who == "monoblock":
        from monoblock import AutoModelForCausalLM
    else:
        from transformers import AutoModelForCausalLM
    imported = time.perf_counter()
    idle = _memory("VmRSS")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    loaded = time.perf_counter()
    ids = torch.randint(0, 50000, (1, prompt), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        first = time.perf_counter()
        model.generate(ids, max_new_tokens=1, do_sample=False, use_cache=True, pad_token_id=0)
        prefilled = time.perf_counter()
        model.generate(ids, max_new_tokens=1 + new, do_sample=False, use_cache=True, pad_token_id=0)
        done = time.perf_counter()
    prefill = prefilled - first
    return {
        "import s": imported - start,
        "load s": loaded - imported,
        "peak MB": (_memory("VmHWM") - idle) / 1e6,
        "prefill tok/s": prompt / prefill,
        "decode tok/s": new / (done - prefilled - prefill),
    }


def _memory(kind: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the system tells no {kind}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {"layers": 20, "width": 2048, "prompt": 128, "new": 32, "runs": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--who", default=",".join(WHO))
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Make the checkpoint, run everyone, print the table."""
    args = _arguments()
    if args.run:
        print(json.dumps(contestant(*args.run, args.dtype, args.prompt, args.new)))
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = make_checkpoint(Path(folder), args.layers, args.width, args.dtype)
        results: dict[str, list[dict[str, float]]] = {who: [] for who in args.who.split(",")}
        for _ in range(args.runs):
            for who, runs in results.items():
                size = [f"--{n}={getattr(args, n)}" for n in ("dtype", "prompt", "new")]
                command = [sys.executable, __file__, *size, "--run", who, folder]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{who} failed:\n{done.stderr}")
                runs.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"MPT of {weights / 1e6:.0f} MB in {args.dtype}; {_machine()}; medians of {args.runs}")
    columns = list(next(iter(results.values()))[0])
    print("| who | " + " | ".join(columns) + " | peak / weights |\n" + "|---" * (len(columns) + 2) + "|")
    for who, runs in results.items():
        medians = {column: statistics.median(run[column] for run in runs) for column in columns}
        cells = " | ".join(f"{medians[column]:.2f}" for column in columns)
        print(f"| {who} | {cells} | {medians['peak MB'] * 1e6 / weights:.2f} |")


def _machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip() if names else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
