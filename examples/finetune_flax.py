"""Fine-tune a classifier on JAX with optax, checkpoint its training state with Orbax, and save it for transformers.

    python examples/finetune_flax.py                                   a toy task on the embedded model: is this Python?
    python examples/finetune_flax.py --data texts.jsonl --model NAME   lines like {"text": "...", "label": "..."}
    python examples/finetune_flax.py --state run                       resumes from the last state in run/, if any
    python examples/finetune_flax.py --model NAME --set hidden_dropout_prob=0.2   fields of the model's config

Rows of a batch are sharded over all devices; with --tensor N the parameters are sharded over groups of N devices.
docs/jax.md explains this file step by step.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import typer
from flax.training import train_state
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from monoblock import AutoTokenizer, FlaxAutoModelForSequenceClassification, demo

Batch = dict[str, Any]
COLUMNS = (
    TextColumn("step"),
    MofNCompleteColumn(),
    BarColumn(),
    TextColumn("loss {task.fields[loss]:.3f}"),
    TimeElapsedColumn(),
)


@dataclass(frozen=True)
class Data:
    """Examples as arrays: ids and masks (count, tokens), labels (count,), and the names of the labels."""

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    names: list[str]

    def batch(self, rows: np.ndarray) -> Batch:
        return {"input_ids": self.ids[rows], "attention_mask": self.mask[rows], "labels": self.labels[rows]}

    def split(self, share: float, seed: int) -> tuple[Data, Data]:
        """Training examples, and the given share of held-out examples."""
        order = np.random.default_rng(seed).permutation(len(self.labels))
        held_out = max(1, int(share * len(order)))
        return self._of(order[held_out:]), self._of(order[:held_out])

    def _of(self, rows: np.ndarray) -> Data:
        return Data(self.ids[rows], self.mask[rows], self.labels[rows], self.names)


# ---------------------------------------------------------------------------- data


def toy() -> list[tuple[str, str]]:
    """Lines of the standard library, half of them with shuffled words."""
    generator, found = np.random.default_rng(0), []
    for module in (argparse_source(), json_source()):
        lines = [line.strip() for line in module.splitlines()]
        for line in lines:
            words = re.findall(r"\w+|[^\w\s]+|\s+", line)
            if len(words) < 8 or line.startswith(("#", '"')):
                continue
            python = len(found) % 2 == 0
            text = line if python else "".join(generator.permutation(words))
            found.append((text, "python" if python else "shuffled"))
    return found


def argparse_source() -> str:
    import argparse

    return Path(argparse.__file__).read_text(encoding="utf-8")


def json_source() -> str:
    return "".join(
        path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))
    )


def read(path: Path) -> list[tuple[str, str]]:
    """Texts and labels from a file of JSON lines."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if not {"text", "label"} <= row.keys():
            raise typer.BadParameter(
                f"{path}:{number}: a line must have a text and a label, got {sorted(row)}"
            )
        found.append((str(row["text"]), str(row["label"])))
    return found


def encoded(examples: list[tuple[str, str]], tokenizer: Any, length: int) -> Data:
    """All texts padded to one length, so that the step is compiled once."""
    texts, labels = zip(*examples, strict=True)
    names = sorted(set(labels))
    made = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="np"
    )
    numbers = np.array([names.index(label) for label in labels], np.int32)
    return Data(made["input_ids"], made["attention_mask"], numbers, names)


def batches(data: Data, size: int, seed: int, first: int = 0) -> Iterator[Batch]:
    """An infinite iterator of batches from step `first`; an epoch's order depends on the seed and its number only."""
    per_epoch = len(data.labels) // size
    if not per_epoch:
        raise typer.BadParameter(f"{len(data.labels)} examples are fewer than a batch of {size}")
    for step in itertools.count(first):
        epoch, index = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(data.labels))
        yield data.batch(order[index * size : (index + 1) * size])


# ---------------------------------------------------------------------------- training


class TrainState(train_state.TrainState):
    """Parameters, optimizer state, step number, and the base key for dropout."""

    key: jax.Array


def make_mesh(tensor: int = 1) -> Mesh:
    """A mesh of all devices: parameters are sharded over `tensor` devices, rows of the batch over the other axis."""
    return jax.make_mesh(
        (jax.device_count() // tensor, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
    )


def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up over a tenth of the steps and cosine decay; no weight decay for norms and biases."""
    warmup = max(1, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule, weight_decay=0.01, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
        ),
    )


def make_state(
    model: Any, params: Any, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """The state of step 0, on the mesh: moments have the sharding of their parameters, the rest is replicated.

    The first step donates its buffers, possibly those of `params` too."""
    params = model.shard_params(mesh, model.to_fp32(params))
    state = TrainState.create(
        apply_fn=model.__call__, params=params, tx=optimizer, key=jax.random.PRNGKey(seed)
    )
    state = state.replace(step=jnp.zeros((), jnp.int32))
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: leaf if isinstance(_sharding(leaf), NamedSharding) else jax.device_put(leaf, replicated),
        state,
    )


def _sharding(leaf: Any) -> Any:
    return getattr(leaf, "sharding", None)


def make_step(model: Any) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
    """A compiled training step: the next state, and the loss. The buffers of the given state are donated."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        key = jax.random.fold_in(state.key, state.step)

        def loss(params: Any) -> jax.Array:
            out = model(
                batch["input_ids"], batch["attention_mask"], params=params, dropout_rng=key, train=True
            )
            return model.compute_loss(out, labels=batch["labels"])

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    return jax.jit(step, donate_argnums=0)


def accuracy(model: Any, params: Any, data: Data, size: int) -> float:
    """The share of correctly classified examples."""
    correct = 0
    for start in range(0, len(data.labels), size):
        rows = np.arange(start, start + size) % len(data.labels)  # the last batch has the same shape
        batch = data.batch(rows)
        logits = model(batch["input_ids"], batch["attention_mask"], params=params).logits
        found = np.asarray(jnp.argmax(logits, -1)) == batch["labels"]
        correct += int(found[: len(data.labels) - start].sum())
    return correct / len(data.labels)


# ---------------------------------------------------------------------------- the state on disk


def open_states(folder: Path) -> ocp.CheckpointManager:
    """A folder of training states that keeps the last two."""
    return ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2))


def save(states: ocp.CheckpointManager, state: TrainState) -> None:
    states.save(int(state.step), args=ocp.args.StandardSave(state))
    states.wait_until_finished()


def restored(states: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """The last state in the folder, with the shardings of the given one; the given state if there is none."""
    if states.latest_step() is None:
        return state
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    found: Any = states.restore(states.latest_step(), args=ocp.args.StandardRestore(shapes))
    return found


# ---------------------------------------------------------------------------- the command


def fields(settings: list[str] | None, embedded: bool) -> dict[str, Any]:
    """Fields of the config; the embedded model is fine-tuned with dropout."""
    found: dict[str, Any] = {"resid_pdrop": 0.1, "emb_pdrop": 0.1} if embedded else {}
    for setting in settings or ():
        name, equals, value = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"--set takes FIELD=VALUE, got {setting!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def train(
    model: Any,
    state: TrainState,
    given: Iterator[Batch],
    mesh: Mesh,
    steps: int,
    after: Callable[[TrainState, float], None],
) -> TrainState:
    """Train until that step; `after` is called with each state and its loss."""
    step = make_step(model)
    for batch in itertools.islice(given, steps - int(state.step)):
        state, loss = step(state, model.shard_batch(batch, mesh))
        after(state, float(loss))
    return state


def main(
    model: Annotated[str, typer.Option(help="Folder or hub name; by default the embedded model.")] = "",
    data: Annotated[
        Path | None, typer.Option(help="JSON lines with text and label; by default a toy task.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the trained model.")] = Path("finetuned"),
    state: Annotated[
        Path | None, typer.Option(help="Folder of training states; resumes from the last one.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 60,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens per text.")] = 32,
    learning_rate: float = 3e-4,
    save_every: Annotated[int, typer.Option(min=1)] = 50,
    tensor: Annotated[
        int, typer.Option(min=1, help="Number of devices that the parameters are sharded over.")
    ] = 1,
    seed: int = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="FIELD=VALUE of the model's config.")
    ] = None,
) -> None:
    """Fine-tune a classifier."""
    console, name = Console(), model or str(demo.path())
    tokenizer = AutoTokenizer.from_pretrained(name)
    everything = encoded(read(data) if data else toy(), tokenizer, length)
    labels = dict(enumerate(everything.names))
    network, params = FlaxAutoModelForSequenceClassification.from_pretrained(
        name,
        _do_init=False,
        id2label=labels,
        label2id={v: k for k, v in labels.items()},
        **fields(settings, not model),
    )
    training, held_out = everything.split(0.1, seed)
    mesh = make_mesh(tensor)
    params = network.init_weights(jax.random.PRNGKey(seed), params=params)  # the head is new
    now = make_state(network, params, make_optimizer(learning_rate, steps), mesh, seed)
    states = open_states(state) if state else None
    now = restored(states, now) if states else now
    console.print(f"{name}: {len(training.labels)} texts, labels {everything.names}, {dict(mesh.shape)}")

    with Progress(*COLUMNS, console=console) as progress:
        bar = progress.add_task("", total=steps, completed=int(now.step), loss=float("nan"))

        def after(state: TrainState, loss: float) -> None:
            progress.update(bar, advance=1, loss=loss)
            if states and (int(state.step) % save_every == 0 or int(state.step) == steps):
                save(states, state)

        given = batches(training, batch_size, seed, int(now.step))
        now = train(network, now, given, mesh, steps, after)
    if states:
        states.close()
    share = accuracy(network, now.params, held_out, batch_size)
    network.save_pretrained(output, params=now.params)
    tokenizer.save_pretrained(output)
    console.print(f"{share:.0%} of {len(held_out.labels)} held-out texts correct; the model is in {output}")


if __name__ == "__main__":
    typer.run(main)
