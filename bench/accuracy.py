"""Errors of a backend's logits and greedy tokens against the same weights in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plan import CHECKED, PROMPT
from runners import Failed, LlamaBench, Process, Tools, weights_for
from shapes import SHAPES
from worker import prompts_of

SEED = 77
BATCHES = (1, 8)


def sample(
    runner: Process | LlamaBench, model: str, form: str, vocab: int, folder: Path
) -> list[dict[str, Any]]:
    """The greedy tokens of a backend at batch sizes 1 and 8, and its logits if it returns them."""
    if isinstance(runner, LlamaBench):
        return []
    found = []
    for batch in BATCHES:
        file = folder / f"{runner.who}-{model}-{form}-{batch}.npy"
        sizes = {"batch": batch, "length": PROMPT, "vocab": vocab, "new": CHECKED, "seed": SEED}
        answer = runner.ask("step_logits", file=str(file), **sizes)
        found.append(
            {"who": runner.who, "model": model, "form": form, "batch": batch, "vocab": vocab} | answer
        )
    return found


def compare(samples: list[dict[str, Any]], sources: dict[str, Path], tools: Tools, folder: Path) -> list[Any]:
    """Compares each sample with transformers in float32 (or monoblock without native kernels), teacher-forced on the
    sample's tokens."""
    found: list[dict[str, Any]] = []
    who = "transformers" if not tools.missing("transformers") else "monoblock, plain"
    for model in dict.fromkeys(one["model"] for one in samples):
        reference = Process(who, tools)
        try:
            reference.start(SHAPES[model].model)
            reference.load(weights_for(who, sources[model], "float32", tools), "float32")
            found += [
                _row(one, reference, folder / "reference.npy") for one in samples if one["model"] == model
            ]
        except Failed as failure:
            print(f"accuracy of {model}: {failure}")
        finally:
            reference.close()
    _compare_with_plain(found)
    return [{k: v for k, v in one.items() if k not in ("tokens", "file", "scores")} for one in found]


def _row(sample: dict[str, Any], reference: Process, file: Path) -> dict[str, Any]:
    import numpy as np

    prompts = prompts_of(sample["batch"], PROMPT, sample["vocab"], SEED)
    sequences = [prompt + new for prompt, new in zip(prompts, sample["tokens"], strict=True)]
    reference.ask("logits", sequences=sequences, last=CHECKED, file=str(file))
    expected = np.load(file)
    spread = float(expected.std())
    tokens = np.array(sample["tokens"])
    chosen = np.take_along_axis(expected, tokens[..., None], -1)[..., 0]
    gaps = (expected.max(-1) - chosen) / spread
    row = sample | {
        "reference": reference.who,
        "tokens in all": int(tokens.size),
        "tokens equal": int((gaps == 0).sum()),
        # The largest margin by which the reference prefers its own token, in standard deviations of the logits.
        "largest gap": float(gaps.max()),
        "error": None,
        "worst": None,
        "scores": expected,
    }
    if sample["file"]:
        error = (np.load(sample["file"]) - expected) / spread
        row |= {"error": float(np.sqrt((error**2).mean())), "worst": float(np.abs(error).max())}
    return row


def _compare_with_plain(rows: list[dict[str, Any]]) -> None:
    """Adds the number of tokens before the native path and PyTorch diverge, and the margins where they do."""
    import numpy as np

    for row in rows:
        same = {"model": row["model"], "form": row["form"], "batch": row["batch"], "who": "monoblock, plain"}
        plain = next((r for r in rows if all(r[k] == v for k, v in same.items())), None)
        if row["who"] != "monoblock" or plain is None:
            continue
        gaps: list[float] = []
        equal = 0
        for sequence, (ours, theirs) in enumerate(zip(row["tokens"], plain["tokens"], strict=True)):
            diverged = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
            equal += CHECKED if diverged is None else diverged
            if diverged is not None:
                scores = row["scores"][sequence, diverged]
                gaps.append(
                    abs(float(scores[ours[diverged]] - scores[theirs[diverged]])) / float(np.std(scores))
                )
        row |= {"as plain": equal, "margins at divergence": gaps}
