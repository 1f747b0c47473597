"""Peak memory and time of one long forward pass of a small MPT: attention must not build heads x queries x keys.

    python bench/long_context.py [--tokens 16384] [--width 512] [--heads 8] [--layers 4] [--who monoblock]
                                 [--max-seq-len 2048]

`--who transformers` runs the hub's library on the same model (its limit is max_seq_len, so raise that too).
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import Any


def peak_during(work: Any) -> tuple[float, float]:
    """Seconds of `work()`, and the most MB that this process held beyond what it held before."""
    before, most, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return seconds, (most - before) / 1e6


def _resident() -> int:
    import resource

    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    """Run one pass and print one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"tokens": 16384, "width": 512, "heads": 8, "layers": 4, "max-seq-len": 2048}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--who", choices=("monoblock", "transformers"), default="monoblock")
    args = parser.parse_args()

    import torch

    if args.who == "monoblock":
        from monoblock import MptConfig, MptModel
    else:
        from transformers import MptConfig, MptModel
    config = MptConfig(
        d_model=args.width,
        n_heads=args.heads,
        n_layers=args.layers,
        vocab_size=1000,
        max_seq_len=args.max_seq_len,
    )
    model = MptModel(config).eval()
    ids = torch.randint(0, 1000, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids[:, :64])
        seconds, megabytes = peak_during(lambda: model(ids))
    print(f"{args.who}: {args.tokens} tokens in {seconds:.2f} s, {megabytes:.0f} MB over the idle process")


if __name__ == "__main__":
    main()
