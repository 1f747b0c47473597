"""`Trainer`: a run from options to a folder with the model, its metrics and its checkpoints."""

from __future__ import annotations

import functools
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from monoblock.auto import AutoConfig
from monoblock.checkpoint.adapter_files import base_of, is_adapter
from monoblock.checkpoint.options import HubOptions
from monoblock.checkpoint.transaction import staged
from monoblock.demo import path as demo_path
from monoblock.field_types import brief
from monoblock.pipelines import frameworks
from monoblock.spec import Learned
from monoblock.tokenization.auto import AutoTokenizer
from monoblock.training import boards, data
from monoblock.training.checkpoints import FOLDER, SHARED, Checkpoints, SharedCheckpoints, check_same
from monoblock.training.evaluation import evaluate
from monoblock.training.log import SAMPLES, MetricsLog
from monoblock.training.options import FALLING, MAX_LENGTH, TrainingOptions, write_recipe
from monoblock.training.packing import packed
from monoblock.training.processes import Processes, processes
from monoblock.training.schedule import Plan, learning_rate
from monoblock.training.tasks import make_task
from monoblock.training.tasks.base import Example, NotFinite, Task

log = logging.getLogger("monoblock")

RECIPE = "recipe.yaml"

# Options that do not change the weights of a step, so that a resumed run may change them.
FREE = (
    "output",
    "eval_data",
    "save_every",
    "keep",
    "log_every",
    "report_to",
    "sample_prompt",
    "sample_tokens",
    "merge",
    "device",
    "offline",
    "streaming",
    "data",
    "model",
    "parallel",
    "tensor_parallel",
    "mesh",
)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The state of a run after a step: its loss, tokens per second since it was started, and the seconds that are
    left."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the model continues a prompt with after a step, or answers to it (chat)."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """A finished or interrupted run. `metrics`: of the last evaluation, with keep_best of the best one. `interrupted`:
    the number of the signal that ended the run after its checkpoint."""

    output: Path
    step: int
    steps: int
    loss: float
    metrics: dict[str, float]
    stopped_early: bool = False
    interrupted: int | None = None


@dataclass
class _State:
    """What a checkpoint stores beside weights, optimizer and random states."""

    step: int = 0
    tokens: int = 0
    loss: float = math.nan
    best: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict[str, float])
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    worse: int = 0  # evaluations since the best one
    summed: float = 0.0  # losses since the last line of the metrics
    summed_steps: int = 0

    def stops(self, patience: int | None) -> bool:
        """Whether early stopping ends the run."""
        return patience is not None and self.worse >= patience


class Trainer:
    """Fine-tunes a model on a file.

    The constructor checks options and data, before a model is loaded; `train` runs. In a program that a launcher
    started in several processes, these train one model together, and the first one writes and shows. ValueError: an
    option or the data is wrong. FileNotFoundError: there is no such file.
    """

    def __init__(self, options: TrainingOptions, among: Processes | None = None) -> None:
        """`among`: the processes of `monoblock.training.processes.processes`, if they are joined already."""
        for name in ("data", "output"):
            if getattr(options, name) is None:
                raise ValueError(f"{name} is needed")
        self.options = options
        self.output = Path(str(options.output))
        if self.output.is_file():
            raise ValueError(f"output must be a folder, but {self.output} is a file")
        if options.report_to is not None:
            boards.need()
        self.processes = processes(options) if among is None else among
        self.task: Task = make_task(options)
        self.records = self.task.read(str(options.data))
        self.eval_records = (
            self.task.read(options.eval_data, train=False) if options.eval_data is not None else []
        )
        several = self.processes.size > 1
        self.checkpoints = (
            SharedCheckpoints(self.output, options.keep, self.processes)
            if several
            else Checkpoints(self.output, options.keep)
        )

    def train(
        self,
        *,
        resume: bool = False,
        show: Callable[[Progress], None] | None = None,
        show_sample: Callable[[Sample], None] | None = None,
    ) -> TrainingResult:
        """Train, evaluate and save. `resume`: continue after the last checkpoint of the output, if there is one; the
        weights are then those of a run that was not interrupted, bit for bit on the same machine. `show` is called
        after each step, `show_sample` for each sample of an evaluation. SIGINT and SIGTERM end the run after the step,
        with a checkpoint."""
        options, task = self.options, self.task
        several, first = self.processes.size > 1, self.processes.first
        steps = self.processes.agreed(self.checkpoints.steps())
        if steps and not resume:
            raise ValueError(
                f"{self.output} holds the checkpoints of another run: resume it, or choose another output"
            )
        prepared = prepare(options, task)
        examples = _examples(task, self.records, prepared)
        if task.skipped and first:
            log.warning(
                "%d of %d records have nothing to learn and are skipped", task.skipped, len(self.records)
            )
        examples, held = self._divided(examples, prepared)
        prompts = _prompts(task, prepared)
        if options.packing:
            units = packed(examples, task.limit, options.seed)
        else:
            units = [[example] for example in examples]
        plan = Plan.of(options, len(units))
        decisive = self._decisive()
        state, source = _State(), prepared.base
        if steps:
            stored = self.checkpoints.progress(steps[-1])
            last = self.checkpoints.path(steps[-1])
            check_same(stored["options"], decisive, last)
            state = _State(**stored["state"])
            if not (last / SHARED).is_dir():
                source = str(last)
            if several and state.best is not None and options.keep_best and options.framework == "pt":
                self._check_best()
        learner = prepared.learner(
            task, options, prepared.fields, source=source, base=prepared.base, processes=self.processes
        )
        if steps:
            learner.restore(self.checkpoints.path(steps[-1]))
        trained, total = learner.count()
        if first:
            log.info(
                "%d examples in %d rows; %d of %d parameters are trained",
                len(examples),
                len(units),
                trained,
                total,
            )
        board = None
        if options.report_to is not None and first:
            board = boards.TensorBoard(self.output, state.step, state.tokens)
        metrics = MetricsLog(self.output, until=state.step, writes=first, board=board)
        run = TrainingRun(
            options,
            task,
            plan,
            units,
            held,
            learner,
            state,
            self.checkpoints,
            metrics,
            decisive,
            self.processes,
        )
        if prompts:
            samples = MetricsLog(self.output, until=state.step, name=SAMPLES, writes=first)

            def sample(text: str, ids: list[int]) -> None:
                found = learner.generate(ids, options.sample_tokens)
                decoded = task.tokenizer.decode(found, skip_special_tokens=True)
                made = Sample(step=state.step, prompt=text, text=decoded)
                samples.write(vars(made))
                if show_sample is not None and first:
                    show_sample(made)

            run.samples = [functools.partial(sample, text, ids) for text, ids in prompts.items()]
        if first:
            with staged(self.output) as stage:
                stage.write(RECIPE, write_recipe(options))
        try:
            interrupted = run.steps(show if first else None)
        except ValueError:  # in all processes alike
            self.checkpoints.finish()
            metrics.close()
            raise
        self.checkpoints.finish()
        self.processes.agreed(None)  # the files are in place when a process goes on
        if interrupted is None:
            if options.keep_best and state.best is not None:
                learner.load_weights(self.checkpoints.best)
                state.metrics = state.best_metrics
            learner.finish()
            learner.save(self.output)
        metrics.draw()
        metrics.close()
        self.processes.agreed(None)
        return TrainingResult(
            output=self.output,
            step=state.step,
            steps=plan.steps,
            loss=state.loss,
            metrics=state.metrics,
            stopped_early=interrupted is None and state.step < plan.steps,
            interrupted=interrupted,
        )

    def _check_best(self) -> None:
        """ValueError: one process wrote the best weights so far, which several cannot load."""
        best = self.checkpoints.best
        if not (best / SHARED).is_dir():
            raise ValueError(
                f"{best} was written by one process, and keep_best would load it into several: resume in one process"
            )

    def _divided(self, examples: list[Example], prepared: Prepared) -> tuple[list[Example], list[Example]]:
        """The examples for training and for evaluation."""
        if self.eval_records:
            return examples, _examples(self.task, self.eval_records, prepared)
        if not self.options.eval_fraction:
            return examples, []
        groups = sorted({example.group for example in examples})
        held = max(1, round(len(groups) * self.options.eval_fraction))
        if held >= len(groups):
            raise ValueError(
                f"eval_fraction={self.options.eval_fraction} of {len(groups)} examples leaves none for training"
            )
        order = np.random.default_rng([self.options.seed % 2**64, 2**32]).permutation(len(groups))
        chosen = {groups[i] for i in order[:held]}
        return (
            [example for example in examples if example.group not in chosen],
            [example for example in examples if example.group in chosen],
        )

    def _decisive(self) -> dict[str, Any]:
        """The options and digests of the data, which a resumed run may not change."""
        found = {name: value for name, value in self.options.to_dict().items() if name not in FREE}
        documents = self.task.documents
        found["digest of data"] = data.digest(str(self.options.data), self.records, documents=documents)
        if (held := self.options.eval_data) is not None:
            found["digest of eval_data"] = data.digest(held, self.eval_records, documents=documents)
        return found


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is known of a model before its weights are loaded: its folder or name, fields of its config to set, and the
    numbers of its token ids and positions, and the backend's class `Learner`."""

    base: str
    vocab: int
    positions: float
    fields: dict[str, Any]
    learner: Any


def prepare(options: TrainingOptions, task: Task, *, adopt: bool = False) -> Prepared:
    """Read config and tokenizer of the options' model, and bind the task to them. `adopt`: the labels are the model's.
    ValueError: the model does not fit the options."""
    framework = frameworks.chosen(options.framework, "fine-tuning")
    base = str(demo_path()) if options.model is None else options.model
    hub: dict[str, Any] = {"local_files_only": options.offline}
    if options.revision is not None:
        hub["revision"] = options.revision
    files = HubOptions.pop(dict(hub))
    tokenizer: Any = AutoTokenizer.from_pretrained(base, **hub)
    adapter = is_adapter(base, files)
    if adapter and not adopt:
        raise ValueError(
            f"{base} is an adapter: train from its base model, or from a model that it is merged with"
        )
    config = AutoConfig.from_pretrained(base_of(base, files) if adapter else base, **hub)
    spec = config.to_spec()
    learned = spec.position(Learned)
    most = math.inf if learned is None else learned.size - learned.offset
    limit = options.max_length or int(min(MAX_LENGTH, most, tokenizer.model_max_length or math.inf))
    if limit > most:
        raise ValueError(f"max_length={limit}, but the model has {most:.0f} positions: choose fewer tokens")
    if adopt:
        task.adopt(config)
    task.bind(tokenizer, limit)
    fields = {} if adopt else task.settings()
    if task.auto == "AutoModelForSequenceClassification" and config.pad_token_id is None:
        # A decoder's classifier finds the last token by the padding id.
        pad = tokenizer.pad_token_id
        fields["pad_token_id"] = tokenizer.eos_token_id if pad is None else pad
        if fields["pad_token_id"] is None:
            raise ValueError(
                "the tokenizer has neither a padding token nor an end token: classification needs one"
            )
    return Prepared(
        base=base, vocab=spec.vocab, positions=most, fields=fields, learner=framework.learners[task.loss]
    )


def evaluate_file(
    options: TrainingOptions, show: Callable[[int, int], None] | None = None
) -> dict[str, float]:
    """The loss and the metrics of a model on the options' data; labels are those of the model's config.
    `show(done, examples)` is called after each batch. ValueError: an option or the data is wrong."""
    if options.data is None:
        raise ValueError("data is needed")
    task = make_task(options)
    if task.loss == "preferences":
        raise ValueError(
            "preferences are measured against the model before training: evaluate while training, with eval_data"
        )
    prepared = prepare(options, task, adopt=True)
    records = task.read(options.data, train=False)
    examples = _examples(task, records, prepared)
    if task.skipped:
        log.warning("%d of %d records have nothing to evaluate and are skipped", task.skipped, len(records))
    learner = prepared.learner(
        task, options, prepared.fields, source=prepared.base, base=prepared.base, train=False
    )
    report = None if show is None else lambda done: show(done, len(examples))
    return evaluate(learner, task, examples, options.batch_size, report)


def _examples(task: Task, records: list[data.Record], prepared: Prepared) -> list[Example]:
    """The examples of records; ValueError: one has a token id that the model does not have."""
    found = task.examples(records)
    for example in found:
        for row in example.rows:
            if int(row.ids.max()) >= prepared.vocab:
                raise ValueError(
                    f"{example.where}: the tokenizer gives the id {int(row.ids.max())}, but the model has "
                    f"{prepared.vocab} ids: resize its embeddings, or use its own tokenizer"
                )
    return found


def _prompts(task: Task, prepared: Prepared) -> dict[str, list[int]]:
    """The ids of the prompts of samples; ValueError: the model cannot continue one."""
    found = {text: task.prompt(text) for text in task.options.sample_prompt}
    for text, ids in found.items():
        if not ids or max(ids) >= prepared.vocab:
            what = f"the id {max(ids)}, but the model has {prepared.vocab} ids" if ids else "no token"
            raise ValueError(f"sample_prompt {brief(text)}: the tokenizer gives {what}")
        if (total := len(ids) + task.options.sample_tokens) > prepared.positions:
            raise ValueError(
                f"sample_prompt {brief(text)} has {len(ids)} tokens, with sample_tokens {total}, but the model has "
                f"{prepared.positions:.0f} positions: shorten it, or lower sample_tokens"
            )
    return found


class TrainingRun:
    """The loop over the steps."""

    def __init__(
        self,
        options: TrainingOptions,
        task: Task,
        plan: Plan,
        units: list[list[Example]],
        held: list[Example],
        learner: Any,
        state: _State,
        checkpoints: Checkpoints,
        metrics: MetricsLog,
        decisive: dict[str, Any],
        among: Processes,
    ) -> None:
        self.options, self.task, self.plan, self.units, self.held = options, task, plan, units, held
        self.learner, self.state, self.checkpoints, self.metrics = learner, state, checkpoints, metrics
        self.decisive, self.processes = decisive, among
        self.samples: list[Callable[[], None]] = []

    def steps(self, show: Callable[[Progress], None] | None) -> int | None:
        """Run the steps that are left; the number of a signal that ended them, else None."""
        state, plan, options = self.state, self.plan, self.options
        begin, first, tokens = time.monotonic(), state.step, 0
        with _signals(again=self.processes.size > 1) as received:
            if not state.step and self.held:  # what the model can do already
                self._evaluate()
            while state.step < plan.steps and not state.stops(options.early_stopping):
                tokens += self._step()
                self.checkpoints.poll()
                spent = max(time.monotonic() - begin, 1e-9)
                self._log(spent)
                if self.held and (self._due(options.eval_every) or state.step == plan.steps):
                    self._evaluate()
                last = state.step == plan.steps or state.stops(options.early_stopping)
                if saved := last or self._due(options.save_every):
                    self._save()
                if show is not None:
                    left = (plan.steps - state.step) * spent / (state.step - first)
                    show(
                        Progress(
                            step=state.step,
                            steps=plan.steps,
                            loss=state.loss,
                            tokens_per_second=tokens / spent,
                            seconds_left=left,
                        )
                    )
                # The processes end after the same step.
                if self.processes.any(bool(received)) and not last:
                    if not saved:
                        self._save()
                    return received[0] if received else signal.SIGTERM
        return None

    def _step(self) -> int:
        """One step; returns its number of tokens."""
        state, plan = self.state, self.plan
        rows = plan.batches(state.step)
        epoch = plan.epoch(state.step)
        batches = [[self._unit(index, epoch) for index in batch] for batch in rows]
        self.rate = learning_rate(self.options, state.step, plan.steps)
        self.processes.seed_step(self.options.seed, state.step)
        try:
            state.loss, self.norm = self.learner.step(batches, self.rate)
        except NotFinite as error:
            chosen = batches if error.batch is None else [batches[error.batch]]
            where = [example.where for batch in chosen for unit in batch for example in unit]
            more = f" and {len(where) - 8} others" if len(where) > 8 else ""
            raise ValueError(
                f"step {state.step + 1} (epoch {epoch + 1}): {error}, for the batch of {'; '.join(where[:8])}"
                f"{more}; the weights are unchanged since the step before: lower learning_rate, or look at this data"
            ) from None
        tokens = sum(example.tokens for batch in batches for unit in batch for example in unit)
        state.step += 1
        state.tokens += tokens
        state.summed += state.loss
        state.summed_steps += 1
        return tokens

    def _unit(self, index: int, epoch: int) -> list[Example]:
        """The examples of a row in this epoch."""
        seed = self.options.seed % 2**64
        return [
            self.task.drawn(example, np.random.default_rng([seed, epoch, index, number]))
            for number, example in enumerate(self.units[index])
        ]

    def _due(self, every: int | None) -> bool:
        """Whether something is done after this step: at every so many, else at the end of an epoch."""
        return self.state.step % (every or self.plan.steps_per_epoch) == 0

    def _log(self, spent: float) -> None:
        state = self.state
        if state.step % self.options.log_every and state.step != self.plan.steps:
            return
        line = {
            "step": state.step,
            "epoch": round(state.step / self.plan.steps_per_epoch, 4),
            "loss": state.summed / state.summed_steps,
            "learning_rate": self.rate,
            "grad_norm": self.norm,
            "tokens": state.tokens,
            "seconds": round(spent, 3),
        }
        state.summed, state.summed_steps = 0.0, 0
        self.metrics.write(line)

    def _evaluate(self) -> None:
        state, options = self.state, self.options
        state.metrics = evaluate(
            self.learner, self.task, self.held, options.batch_size, processes=self.processes
        )
        self.metrics.write(
            {"step": state.step, **{f"eval_{name}": value for name, value in state.metrics.items()}}
        )
        for sample in self.samples:
            sample()
        value = state.metrics.get(options.best_metric)
        if value is None:
            raise ValueError(
                f"best_metric={options.best_metric}: the evaluation of this data has {', '.join(state.metrics)}"
            )
        sign = -1 if options.best_metric in FALLING else 1
        if state.best is None or sign * value > sign * state.best:
            state.best, state.best_metrics, state.worse = value, state.metrics, 0
            if options.keep_best:
                self.checkpoints.write_best(self._best)
        else:
            state.worse += 1

    def _best(self, folder: Path) -> Any:
        if self.processes.size > 1:
            return self.learner.start_saving(folder, weights_only=True)
        return self.learner.save(folder)

    def _save(self) -> None:
        progress = {"step": self.state.step, "state": dict(vars(self.state)), "options": self.decisive}
        if isinstance(self.checkpoints, SharedCheckpoints):
            self.checkpoints.start(self.state.step, progress, self.learner.start_saving)
            self.metrics.draw()
            return

        def save(folder: Path) -> None:
            self.learner.save(folder)
            self.learner.save_state(folder)

        self.checkpoints.write(self.state.step, progress, save)
        self.metrics.draw()


@contextmanager
def _signals(again: bool = False) -> Iterator[list[int]]:
    """The numbers of the signals SIGINT and SIGTERM received in the block. A second one has its usual effect, unless
    `again`: a launcher passes on to its processes what they may have received themselves."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.getsignal(number) for number in numbers}

    def receive(number: int, frame: Any) -> None:
        del frame
        received.append(number)
        for one in () if again else numbers:
            signal.signal(one, old[one] if old[one] is not None else signal.SIG_DFL)

    for number in numbers:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number in numbers:
            signal.signal(number, old[number] if old[number] is not None else signal.SIG_DFL)


__all__ = [
    "FOLDER",
    "Prepared",
    "Progress",
    "Sample",
    "Trainer",
    "TrainingResult",
    "evaluate_file",
    "prepare",
]
