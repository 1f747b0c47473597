"""Trains the embedded demo: a tiny MPT, from scratch, on the sources of the standard library.

    python tools/train_demo.py                  trains, then writes src/monoblock/demo and docs/demo.md
    python tools/train_demo.py --minutes 10     the learning rate reaches zero after ten minutes of training
    python tools/train_demo.py --resume         continues from the last checkpoint in build/demo
    python tools/train_demo.py --export         exports the last checkpoint without training

A run is determined by its seed, its number of steps and the corpus, whose digest is in docs/demo.md.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import demo_corpus as corpus
import demo_data as data
import demo_optim as optim
import torch
from demo_loss import next_token_loss
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer
from torch import Tensor

from monoblock import MptConfig, MptForCausalLM

BUILD = Path(__file__).resolve().parent.parent / "build" / "demo"
VOCAB = 4096
SHAPE = {"d_model": 288, "n_heads": 6, "n_layers": 4, "expansion_ratio": 4, "max_seq_len": 1024}
WARMUP_STEPS = 100
CHECKPOINT_SECONDS = 180
EVALUATE_EVERY = 150  # steps
SETTINGS = (
    "seed",
    "steps",
    "minutes",
    "batch",
    "length",
    "lr",
    "muon_lr",
)  # stored in checkpoints
CURVE_WINDOWS = 64  # held-out windows for the loss curve; the final evaluation uses all


@dataclass
class State:
    """The state in a checkpoint in addition to weights and optimisers."""

    step: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """A run: the model, its optimisers and its progress."""

    def __init__(self, options: argparse.Namespace, documents: list[corpus.Document], tokenizer: Tokenizer):
        torch.manual_seed(options.seed)
        self.options = options
        self.segments = data.segments(documents, tokenizer)
        self.line_breaks = data.line_breaks(tokenizer)
        self.held_out = data.held_out(documents, tokenizer, options.length)
        self.model = MptForCausalLM(model_config(tokenizer))
        embedding = self.model.get_input_embeddings().weight
        self.optimizers = optim.optimizers(self.model, embedding, lr=options.lr, muon_lr=options.muon_lr)
        self.base_lrs = [[group["lr"] for group in each.param_groups] for each in self.optimizers]
        self.state = State()

    @property
    def progress(self) -> float:
        """The completed fraction of the run, the larger of that by steps and by minutes."""
        by_time = self.state.seconds / (60 * self.options.minutes) if self.options.minutes else 0.0
        return min(1.0, max(self.state.step / self.options.steps, by_time))

    def lr_factor(self) -> float:
        """Linear warm-up, then linear decay to zero."""
        return min(1.0, (self.state.step + 1) / WARMUP_STEPS) * (1.0 - self.progress)

    def step(self, windows: Tensor) -> float:
        """Runs one update; returns the training loss in nats per token."""
        factor = self.lr_factor()
        for optimizer, lrs in zip(self.optimizers, self.base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        loss = self.loss(windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        return loss.item()

    def loss(self, windows: Tensor) -> Tensor:
        """The mean next-token loss; matrix products in bf16 are twice as fast on CPUs with bf16 instructions."""
        dtype = torch.bfloat16 if self.options.bf16 else torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=self.options.bf16):
            out = self.model(input_ids=windows, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        return next_token_loss(
            out.hidden_states[-1], self.model.get_input_embeddings().weight, windows, dtype
        )

    @torch.no_grad()
    def evaluate(self, limit: int | None = None) -> float:
        """Held-out loss in nats per token, over `limit` evenly spaced windows or all of them."""
        every = self.held_out.windows
        chosen = every if limit is None else every[:: max(1, len(every) // limit)]
        self.model.eval()
        losses = [self.loss(batch).item() * len(batch) for batch in chosen.split(16)]
        self.model.train()
        return sum(losses) / len(chosen)

    def run(self) -> None:
        """Trains to the end of the schedule; saves a checkpoint every few minutes and on interrupt."""
        options = self.options
        sizes = {"length": options.length, "batch": options.batch}
        source = data.batches(self.segments, self.line_breaks, seed=options.seed, **sizes)
        source = islice(source, self.state.step, None)
        started, saved = time.monotonic() - self.state.seconds, time.monotonic()
        self.model.train()
        with progress_bar() as show, checkpoint_on_interrupt(self):
            for windows in source:
                if self.progress >= 1.0:
                    break
                loss = self.step(windows)
                self.state.seconds = time.monotonic() - started
                self.record(loss)
                show(self)
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def record(self, loss: float) -> None:
        """Appends this step to the log, with the held-out loss every EVALUATE_EVERY steps."""
        state = self.state
        entry = {"step": state.step, "loss": round(loss, 4), "seconds": round(state.seconds, 1)}
        entry["tokens"] = state.step * self.options.batch * self.options.length
        if state.step % EVALUATE_EVERY == 0 or self.progress >= 1.0:
            entry["held_out"] = round(self.evaluate(CURVE_WINDOWS), 4)
        state.log.append(entry)
        with (self.options.build / "log.jsonl").open("a") as out:
            out.write(json.dumps(entry) + "\n")

    def save(self) -> None:
        """Writes the checkpoint atomically."""
        temporary = self.options.build / "checkpoint.part"
        checkpoint = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "state": vars(self.state),
            "settings": {name: getattr(self.options, name) for name in SETTINGS},
        }
        torch.save(checkpoint, temporary)
        os.replace(temporary, self.options.build / "checkpoint.pt")  # noqa: PTH105

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Restores the state of a checkpoint."""
        self.model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.state = State(**checkpoint["state"])

    def rewrite_log(self) -> None:
        """Writes the log of the state to the file, which a crash may have left longer."""
        lines = (json.dumps(entry) + "\n" for entry in self.state.log)
        (self.options.build / "log.jsonl").write_text("".join(lines))


def read_checkpoint(options: argparse.Namespace) -> dict[str, Any]:
    """The last checkpoint; `options` are updated with its settings."""
    path = options.build / "checkpoint.pt"
    if not path.exists():
        raise SystemExit(f"no checkpoint at {path}: start a run without --resume or --export first")
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    vars(options).update(checkpoint["settings"])
    return checkpoint


def model_config(tokenizer: Tokenizer) -> MptConfig:
    """The demo's config: ALiBi, no biases, tied embeddings, as in published MPT models."""
    end = tokenizer.token_to_id(corpus.ENDOFTEXT)
    return MptConfig(
        **SHAPE,
        vocab_size=tokenizer.get_vocab_size(),
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=tokenizer.token_to_id(corpus.PADDING),
        use_cache=True,
    )


@contextmanager
def progress_bar() -> Iterator[Any]:
    """Yields a function that shows a trainer's progress in a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("training")

        def show(trainer: Trainer) -> None:
            state, entry = trainer.state, trainer.state.log[-1]
            rate = entry["tokens"] / max(state.seconds, 1e-9)
            bar.update(
                task,
                total=trainer.options.steps,
                completed=state.step,
                description=f"loss {entry['loss']:.3f}  {rate:,.0f} tokens/s",
            )

        yield show


@contextmanager
def checkpoint_on_interrupt(trainer: Trainer) -> Iterator[None]:
    """On Ctrl-C, saves a checkpoint and exits."""
    try:
        yield
    except KeyboardInterrupt:
        trainer.save()
        raise SystemExit("interrupted; continue with --resume") from None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=20, help="of the weights and of the order of the windows")
    parser.add_argument("--steps", type=int, default=4119)
    parser.add_argument("--minutes", type=float, default=None, help="end the schedule after this time")
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument(
        "--length", type=int, default=256, help="tokens per window; ALiBi extrapolates to longer ones"
    )
    parser.add_argument("--lr", type=float, default=3e-3, help="of AdamW, for the embedding and the norms")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="of Muon, for the matrices of the blocks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of checkpoint, tokenizer and log")
    parser.add_argument("--resume", action="store_true", help="continue a run with its settings")
    parser.add_argument("--export", action="store_true", help="export the last checkpoint without training")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    options.build.mkdir(parents=True, exist_ok=True)
    checkpoint = read_checkpoint(options) if options.resume or options.export else None
    documents = corpus.collect()
    training = [document for document in documents if not document.held_out]
    tokenizer = corpus.train_tokenizer((document.text for document in training), VOCAB)
    trainer = Trainer(options, documents, tokenizer)
    if checkpoint:
        trainer.load(checkpoint)
    if not options.export:
        trainer.rewrite_log()
        trainer.run()
    import demo_export as export

    export.write(trainer, documents, tokenizer)


if __name__ == "__main__":
    main()
