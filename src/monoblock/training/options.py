"""Every option of a fine-tuning run: its default, its check and its help; and recipes, YAML files of options."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from monoblock.field_types import brief
from monoblock.seeds import checked_seed

TASKS = ("lm", "chat", "classification", "token-classification", "qa", "fill-mask", "embedding", "preference")
SCHEDULES = ("linear", "cosine", "constant")
DTYPES = ("float32", "bfloat16")
ADAMW_8BIT = "adamw_8bit"
OPTIMIZERS = ("adamw", ADAMW_8BIT)
PROBLEMS = ("single-label", "multi-label", "regression")
QUANTIZED = ("int8", "int4")
REPORTS = ("tensorboard",)
PARALLEL = ("fsdp", "ddp")
AXES = ("data", "fsdp", "tensor")  # of a mesh on JAX
FRAMEWORKS = ("pt", "flax", "tf")
FALLING = ("loss", "perplexity", "mse")  # metrics that are better if lower

# The metrics of each task beside the loss; some depend on the data.
METRICS: dict[str, tuple[str, ...]] = {
    "lm": ("perplexity",),
    "chat": ("perplexity",),
    "classification": ("accuracy", "f1"),
    "token-classification": ("accuracy", "precision", "recall", "f1"),
    "qa": ("exact_match", "f1"),
    "fill-mask": ("perplexity", "accuracy"),
    "embedding": ("accuracy", "recall@1", "recall@10", "mrr", "spearman"),
    "preference": ("accuracy", "margin"),
}
_REGRESSION = ("mse", "pearson", "spearman")

EPOCHS = 3  # without epochs and max_steps
MAX_LENGTH = 512  # tokens, without max_length; fewer if the model has fewer positions

_MAX_RECIPE = 1 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The help of an option, and the values that it takes."""

    help: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def problem(self, value: Any) -> str | None:
        """What the value must be, if it is not; None for a valid one."""
        if self.choices and value not in self.choices:
            return f"one of {', '.join(self.choices)}"
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                return "a finite number"
            if self.least is not None and value < self.least:
                return f"at least {self.least:g}"
            if self.above is not None and value <= self.above:
                return f"above {self.above:g}"
            if self.most is not None and value > self.most:
                return f"at most {self.most:g}"
            if self.below is not None and value >= self.below:
                return f"below {self.below:g}"
        return None


def _option(default: Any, help: str, **limits: Any) -> Any:
    return field(default=default, metadata={"rule": Rule(help=help, **limits)})


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The options of a run; ValueError names the one that has a wrong value or no effect."""

    # What is trained, and on what
    model: str | None = _option(None, "Folder, or name on the hub; default: the embedded demo model.")
    task: str = _option("lm", f"What is learnt: {', '.join(TASKS)}.", choices=TASKS)
    data: str | None = _option(
        None,
        "Training data: a file, for lm also a folder; or a dataset, OWNER/NAME or NAME[@REVISION][:CONFIG]:SPLIT.",
    )
    output: str | None = _option(
        None, "Folder for the model, the checkpoints, the metrics and their picture."
    )
    eval_data: str | None = _option(None, "Evaluation data, a file or a dataset.")
    eval_fraction: float = _option(
        0.0, "Part of the training data that is held out for evaluation.", least=0, below=1
    )
    text_column: str | None = _option(None, "Field or column of the text; default: text.")
    label_column: str | None = _option(None, "Field or column of the label; default: label.")
    columns: tuple[str, ...] = _option(
        (), "FIELD=COLUMN: the column of the data that holds a field, such as anchor=question."
    )
    streaming: bool = _option(False, "Read a dataset over the network, without files in the cache.")
    labels: tuple[str, ...] = _option((), "Names of the labels, in order; default: those of the data.")
    problem: str = _option(
        "single-label", f"Kind of classification: {', '.join(PROBLEMS)}.", choices=PROBLEMS
    )
    chat_template: str | None = _option(
        None, "File with a chat template (Jinja) for a model without one; it is saved with the model."
    )
    max_length: int | None = _option(
        None, f"Tokens of a row at most; default: {MAX_LENGTH}, or fewer if the model has fewer.", least=2
    )
    packing: bool = _option(False, "Several texts in one row, without attention between them.")
    doc_stride: int = _option(128, "Tokens by which windows of a long context overlap (qa).", least=0)
    mask_probability: float = _option(
        0.15, "Part of the tokens that are hidden (fill-mask).", above=0, most=1
    )
    whole_word: bool = _option(False, "Hide all tokens of a word together (fill-mask).")
    similarity_scale: float = _option(20.0, "Factor of the similarities in the loss (embedding).", above=0)
    matryoshka: str | None = _option(
        None,
        "Widths such as 64,128: the loss is the sum of those of the vectors cut off there and whole (embedding).",
    )
    chunk_size: int | None = _option(
        None,
        "Texts of a batch whose activations exist at a time, so that batches may be large (embedding).",
        least=1,
    )
    dpo_beta: float = _option(0.1, "Strength of the tie to the reference (preference).", above=0)
    # The steps
    epochs: int | None = _option(None, f"Passes over the data; default: {EPOCHS}.", least=1)
    max_steps: int | None = _option(None, "Number of steps, instead of epochs.", least=1)
    batch_size: int = _option(8, "Rows of a batch.", least=1)
    accumulation: int = _option(1, "Batches whose gradients are added up before a step.", least=1)
    learning_rate: float = _option(5e-5, "Highest learning rate.", above=0)
    schedule: str = _option(
        "linear", f"Learning rate after warm-up: {', '.join(SCHEDULES)}.", choices=SCHEDULES
    )
    warmup_steps: int | None = _option(None, "Steps until the highest learning rate.", least=0)
    warmup_ratio: float = _option(0.0, "The same, as a part of all steps.", least=0, most=1)
    optimizer: str = _option(
        "adamw",
        f"adamw, or {ADAMW_8BIT}: AdamW whose means of gradients and squares take 8 bits a value.",
        choices=OPTIMIZERS,
    )
    weight_decay: float = _option(0.01, "AdamW's decay of matrices; norms and biases have none.", least=0)
    mean_decay: float = _option(0.9, "AdamW's beta1, the decay of the mean of gradients.", least=0, below=1)
    square_decay: float = _option(
        0.999, "AdamW's beta2, the decay of the mean of squared gradients.", least=0, below=1
    )
    epsilon: float = _option(1e-8, "AdamW's addend to the denominator.", above=0)
    framework: str = _option(
        "pt",
        "pt (PyTorch), or flax (JAX) or tf (TensorFlow) for the tasks lm and classification.",
        choices=FRAMEWORKS,
    )
    max_grad_norm: float = _option(1.0, "Norm to which gradients are clipped; 0: no clipping.", least=0)
    seed: int = _option(0, "The same seed gives the same run.")
    dtype: str = _option("float32", f"Type of weights and activations: {', '.join(DTYPES)}.", choices=DTYPES)
    device: str = _option("auto", "auto (an accelerator if there is one), cpu, cuda, cuda:1, mps, ...")
    gradient_checkpointing: bool = _option(
        False, "Compute activations again in the backward pass, to save memory."
    )
    freeze: tuple[str, ...] = _option((), "Patterns (glob) of parameter names that are not trained.")
    # Evaluation and saving
    eval_every: int | None = _option(None, "Steps between evaluations; default: an epoch.", least=1)
    early_stopping: int | None = _option(
        None, "Stop after this many evaluations without a better one.", least=1
    )
    keep_best: bool = _option(False, "Save the weights of the best evaluation instead of the last ones.")
    best_metric: str = _option(
        "loss", "Metric of the evaluation by which keep_best and early_stopping compare."
    )
    sample_prompt: tuple[str, ...] = _option(
        (), "Text that the model continues, or answers (chat), at each evaluation, into samples.jsonl."
    )
    sample_tokens: int = _option(64, "Tokens of a sample at most.", least=1)
    save_every: int | None = _option(None, "Steps between checkpoints; default: an epoch.", least=1)
    keep: int = _option(1, "Number of checkpoints that are kept.", least=1)
    log_every: int = _option(1, "Steps between lines of metrics.jsonl.", least=1)
    report_to: str | None = _option(
        None, "Write the metrics also for tensorboard, into the output's folder runs.", choices=REPORTS
    )
    # Adapters
    lora_rank: int | None = _option(
        None, "Train a LoRA adapter of this rank instead of the weights.", least=1
    )
    lora_alpha: float | None = _option(None, "LoRA's scale; default: twice the rank.", above=0)
    lora_dropout: float = _option(0.0, "Dropout of the adapter's inputs.", least=0, below=1)
    lora_targets: tuple[str, ...] = _option(
        (), "Names of the matrices with an adapter; default: all of the blocks."
    )
    rslora: bool = _option(False, "Scale by the square root of the rank.")
    dora: bool = _option(False, "Train also the matrices' magnitudes (DoRA).")
    merge: bool = _option(False, "Save the model with the adapter merged instead of the adapter.")
    quantize: str | None = _option(
        None, "Weights under the adapter: int8 or int4 (QLoRA).", choices=QUANTIZED
    )
    # Several processes
    parallel: str | None = _option(
        None,
        "How processes share a model: fsdp divides weights, gradients and optimizer states, with ddp each has all; "
        "default: fsdp, but ddp for embedding, with quantize and with adamw_8bit.",
        choices=PARALLEL,
    )
    tensor_parallel: int = _option(
        1, "Processes, on JAX devices, that divide each matrix (tensor parallelism).", least=1
    )
    mesh: str | None = _option(
        None,
        "JAX: the devices along each axis, such as data=2,fsdp=2,tensor=1, in place of parallel and tensor_parallel.",
    )
    # The hub
    revision: str | None = _option(None, "Branch, tag or commit of a model on the hub.")
    offline: bool = _option(False, "Use only files that are on this machine.")

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            value = _fitted(name, getattr(self, name), kind)
            object.__setattr__(self, name, value)
            if value is not None and (problem := RULES[name].problem(value)) is not None:
                raise ValueError(f"{name} must be {problem}, got {brief(value)}")
        checked_seed(self.seed)
        self._check_conflicts()

    def _check_conflicts(self) -> None:
        """Refuse options that another one leaves without effect."""
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps exclude each other: give one")
        if self.warmup_steps is not None and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio exclude each other: give one")
        if self.eval_data is not None and self.eval_fraction:
            raise ValueError("eval_data and eval_fraction exclude each other: give one")
        pairs = [pair.split("=") for pair in self.columns]
        if not all(len(pair) == 2 and all(pair) for pair in pairs) or len(dict(pairs)) != len(pairs):
            raise ValueError(
                f"columns must be FIELD=COLUMN, each field once, got {brief(list(self.columns))}"
            )
        if not self.evaluates:
            for name in ("eval_every", "early_stopping", "keep_best", "sample_prompt"):
                self._refuse(name, "needs eval_data or eval_fraction")
        if not self.sample_prompt:
            self._refuse("sample_tokens", "needs sample_prompt")
        if not all(text.strip() for text in self.sample_prompt):
            raise ValueError("sample_prompt must be a text, got an empty one")
        if not self.keep_best and self.early_stopping is None:
            self._refuse("best_metric", "needs keep_best or early_stopping")
        known = ("loss", *(_REGRESSION if self.problem == "regression" else METRICS[self.task]))
        known += tuple(f"{name}_{width}" for name in ("mrr", "spearman") for width in self.widths)
        if self.best_metric not in known:
            raise ValueError(
                f"best_metric must be one of {', '.join(known)} with task={self.task}, got {self.best_metric!r}"
            )
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_dropout", "lora_targets", "rslora", "dora", "merge", "quantize"):
                self._refuse(name, "needs lora_rank")
        elif self.freeze:
            raise ValueError("freeze has no effect with lora_rank: only the adapter is trained; drop it")
        self._check_processes()
        if self.quantize is not None and (self.merge or self.dora):
            name = "merge" if self.merge else "dora"
            raise ValueError(f"{name} needs unquantised weights: drop it or quantize={self.quantize}")
        for name, tasks in OF_TASKS.items():
            if self.task not in tasks:
                self._refuse(name, f"has no effect with task={self.task}")
        if self.problem == "regression":
            self._refuse("labels", "has no effect with problem=regression")
        if any(width < 1 for width in self.widths) or len(set(self.widths)) != len(self.widths):
            raise ValueError(
                f"matryoshka must be different widths from 1, such as 64,128, got {brief(self.matryoshka)}"
            )
        if self.task == "embedding":
            self._refuse("lora_rank", "has no effect with task=embedding, which trains all weights")
        if self.framework != "pt":
            if self.task not in OF_ALL:
                raise ValueError(
                    f"framework={self.framework} trains the tasks {' and '.join(OF_ALL)}, not {self.task}: use pt"
                )
            for name in PYTORCH_ONLY:
                self._refuse(name, "needs framework=pt")
        self._check_layout()
        if self.packing and self.task not in ("lm", "chat"):
            raise ValueError(f"packing is for the tasks lm and chat, not for {self.task}")

    def _check_processes(self) -> None:
        """Refuse what several processes cannot divide."""
        whole = "embedding" if self.task == "embedding" else "quantize" if self.quantize is not None else None
        if whole is not None and self.parallel == "fsdp":
            raise ValueError(f"parallel=fsdp does not divide the weights of {whole}: use parallel=ddp")
        if (
            self.optimizer == ADAMW_8BIT
        ):  # blocks of values would be cut, or depend on the number of processes
            for name, without in (
                ("parallel", self.parallel != "fsdp"),
                ("tensor_parallel", self.tensor_parallel == 1),
            ):
                if not without:
                    raise ValueError(
                        f"{name}={getattr(self, name)} does not divide the states of optimizer={ADAMW_8BIT}: use "
                        "parallel=ddp alone, or optimizer=adamw"
                    )
        if self.tensor_parallel == 1:
            return
        if self.task == "embedding":
            raise ValueError(
                "tensor_parallel does not divide the modules of task=embedding: use parallel=ddp alone"
            )
        if self.lora_rank is not None:
            raise ValueError(
                "tensor_parallel does not divide the matrices of an adapter: use parallel=fsdp with lora_rank"
            )

    def _check_layout(self) -> None:
        """Refuse layouts of processes that a framework does not have."""
        if self.framework == "tf":
            self._refuse("tensor_parallel", "needs framework=pt or flax")
            if self.parallel == "fsdp":
                raise ValueError(
                    "parallel=fsdp needs framework=pt or flax: with tf each process has all weights (ddp)"
                )
        if self.mesh is None:
            return
        if self.framework != "flax":
            self._refuse("mesh", "needs framework=flax")
        for name in ("parallel", "tensor_parallel"):
            self._refuse(name, "has no effect with mesh")
        if not self.mesh_sizes:
            raise ValueError(
                f"mesh must be the devices along the axes {', '.join(AXES)}, such as data=2,tensor=2, got "
                f"{brief(self.mesh)}"
            )

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """The devices along each axis that `mesh` names; empty if it is not well formed."""
        found: dict[str, int] = {}
        for part in (self.mesh or "").split(","):
            name, _, size = (x.strip() for x in part.partition("="))
            if (
                name not in AXES
                or name in found
                or not (size.isascii() and size.isdigit() and 0 < int(size) < 10**6)
            ):
                return {}
            found[name] = int(size)
        return found

    @property
    def has_mesh(self) -> bool:
        """Whether a layout of devices is asked for, which one process on JAX may have too."""
        return self.framework == "flax" and (
            self.mesh is not None or self.parallel is not None or self.tensor_parallel > 1
        )

    @property
    def divides_weights(self) -> bool:
        """Whether several processes divide the weights of the model, by FSDP2."""
        whole = self.task == "embedding" or self.quantize is not None or self.optimizer == ADAMW_8BIT
        return self.parallel == "fsdp" or (self.parallel is None and not whole)

    def _refuse(self, name: str, why: str) -> None:
        if getattr(self, name) != DEFAULTS[name]:
            raise ValueError(f"{name} {why}: drop it, or change the other option")

    @property
    def evaluates(self) -> bool:
        """Whether there is evaluation data."""
        return self.eval_data is not None or self.eval_fraction > 0

    @property
    def fields_of_columns(self) -> dict[str, str]:
        """The columns of fields, of `columns`."""
        return {name: column for name, _, column in (pair.partition("=") for pair in self.columns)}

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of `matryoshka`; 0 for one that is no number."""
        parts = () if self.matryoshka is None else self.matryoshka.split(",")
        return tuple(
            int(x) if x.isascii() and x.isdigit() and len(x) < 10 else 0 for x in map(str.strip, parts)
        )

    def hub(self, source: str) -> dict[str, Any]:
        """The arguments of from_pretrained for a folder, or a name on the hub."""
        found: dict[str, Any] = {"local_files_only": self.offline}
        if self.revision is not None and not Path(source).is_dir():
            found["revision"] = self.revision
        return found

    def changed(self, values: Mapping[str, Any]) -> TrainingOptions:
        """These options with other values; ValueError for a name that is none."""
        check_names(values, "an option")
        return dataclasses.replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """All options as plain values."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()
        }


def help_of(name: str) -> str:
    """The help of an option, with its default."""
    value = DEFAULTS[name]
    if value is None or isinstance(value, bool | tuple):
        return RULES[name].help
    return f"{RULES[name].help} Default: {value}."


KINDS: dict[str, Any] = typing.get_type_hints(TrainingOptions)
RULES: dict[str, Rule] = {f.name: f.metadata["rule"] for f in fields(TrainingOptions)}
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(TrainingOptions)}


# Options of some tasks only.
_LABELLED = ("classification", "token-classification")
OF_TASKS: dict[str, tuple[str, ...]] = {
    "text_column": ("lm", "fill-mask", *_LABELLED),
    "labels": _LABELLED,
    "label_column": _LABELLED,
    "problem": ("classification",),
    "chat_template": ("chat", "preference"),
    "sample_prompt": ("lm", "chat"),
    "doc_stride": ("qa",),
    "mask_probability": ("fill-mask",),
    "whole_word": ("fill-mask",),
    "similarity_scale": ("embedding",),
    "matryoshka": ("embedding",),
    "chunk_size": ("embedding",),
    "dpo_beta": ("preference",),
}

# The tasks of all frameworks, and the options of PyTorch only.
OF_ALL = ("lm", "classification")
PYTORCH_ONLY = ("packing", "dtype", "optimizer", "freeze", "lora_rank")

# The options of an evaluation.
EVALUATION = (
    "model",
    "task",
    "data",
    "text_column",
    "label_column",
    "columns",
    "streaming",
    "problem",
    "chat_template",
    "max_length",
    "doc_stride",
    "mask_probability",
    "whole_word",
    "similarity_scale",
    "matryoshka",
    "batch_size",
    "seed",
    "framework",
    "dtype",
    "device",
    "revision",
    "offline",
)


def check_names(values: Mapping[str, Any], what: str) -> None:
    """ValueError for the first name that is no option."""
    for name in values:
        if name not in KINDS:
            raise ValueError(f"{name!r} is not {what}; there are: {', '.join(KINDS)}")


def _fitted(name: str, value: Any, kind: Any) -> Any:
    """The value in the option's type; ValueError if it is of another one."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in kinds:
        return None
    (kind,) = (k for k in kinds if k is not type(None))
    if kind is bool or isinstance(value, bool):
        if kind is not bool or not isinstance(value, bool):
            raise ValueError(f"{name} must be {_WORDS.get(kind, 'a list of strings')}, got {brief(value)}")
        return value
    if kind is float and isinstance(value, int | float):
        return float(value)
    if kind in (int, str):
        if kind is str and isinstance(value, Path):
            return str(value)
        if isinstance(value, kind):
            return value
    elif isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise ValueError(f"{name} must be {_WORDS.get(kind, 'a list of strings')}, got {brief(value)}")


_WORDS: dict[Any, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


# ---------------------------------------------------------------------------- recipes


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The options of a YAML file, by name. ValueError: the file is no mapping of options."""
    yaml = _yaml()
    path = Path(path)
    raw = path.read_bytes()
    if len(raw) > _MAX_RECIPE:
        raise ValueError(f"{path} has {len(raw):,} bytes; a recipe has at most {_MAX_RECIPE:,}")
    try:
        values = yaml.safe_load(raw)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path}: a recipe is a mapping of options to values, such as `task: lm`")
    try:
        check_names(values, "an option of a recipe")
        for name, value in values.items():
            _fitted(name, value, KINDS[name])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return values


def write_recipe(options: TrainingOptions) -> str:
    """A recipe with every option, each under its help."""
    yaml = _yaml()
    lines: list[str] = []
    for name, value in options.to_dict().items():
        text = yaml.safe_dump({name: value}, default_flow_style=False, allow_unicode=True, width=4096)
        lines += [f"# {help_of(name)}", text.rstrip("\n")]
    return "\n".join(lines) + "\n"


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError('recipes need the package PyYAML: pip install "pyyaml>=6,<7"') from error
    return yaml
