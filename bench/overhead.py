"""What `generate` costs over a bare loop of forward calls, per token, on a model so small that it shows.

    python bench/overhead.py [--layers 12] [--width 64] [--new 200] [--runs 7] [--threads 1]

The bare loop calls the model with one token and the cache and takes the argmax, nothing else. Both take turns in one
process, and the table gives medians. `forward only` is that loop without argmax and without reading tokens back.
"""

from __future__ import annotations

import argparse
import statistics
import time


def main() -> None:
    """Time each way in turn and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {"layers": 12, "width": 64, "new": 200, "runs": 7, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()

    import torch

    from monoblock import MptConfig, MptForCausalLM

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = MptForCausalLM(
        MptConfig(d_model=args.width, n_heads=4, n_layers=args.layers, vocab_size=1000, max_seq_len=1024)
    ).eval()
    prompt = torch.randint(3, 1000, (1, 16))

    @torch.inference_mode()
    def bare(read: bool) -> None:
        out = model(prompt, use_cache=True)
        for _ in range(args.new - 1):
            token = out.logits[:, -1].argmax(-1) if read else prompt[:, 0]
            if read:
                token.tolist()
            out = model(token[:, None], past_key_values=out.past_key_values, use_cache=True)

    def generate() -> None:
        model.generate(prompt, max_new_tokens=args.new, do_sample=False, eos_token_id=None)

    ways = {"forward only": lambda: bare(False), "bare loop": lambda: bare(True), "generate": generate}
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.runs + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            took[name].append((time.perf_counter() - start) / args.new * 1e6)
    medians = {name: statistics.median(times[1:]) for name, times in took.items()}  # the first warms up
    # Ratios of neighbours in time, so that a machine that drifts does not decide.
    ratios = [g / b for g, b in zip(took["generate"][1:], took["bare loop"][1:], strict=True)]
    print(
        f"MPT of {args.layers} layers, {args.width} wide; torch {torch.__version__}, {args.threads} threads"
    )
    print("| way | µs per token | over the bare loop |\n|---|---|---|")
    for name, time_of in medians.items():
        over = statistics.median(ratios) - 1 if name == "generate" else time_of / medians["bare loop"] - 1
        print(f"| {name} | {time_of:.0f} | {100 * over:+.1f}% |")


if __name__ == "__main__":
    main()
