"""Exports models as ONNX files, and as OpenVINO's, in folders that optimum and sentence-transformers open."""

import importlib
import logging
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import monoblock
from monoblock import families
from monoblock.auto import AutoConfig
from monoblock.checkpoint.contents import SENTENCE_TRANSFORMERS
from monoblock.checkpoint.folder import check_target, copy_files, new_folder
from monoblock.checkpoint.formats import class_of, companions, config_to_write
from monoblock.checkpoint.hub import HubOptions, find_file, find_weights, in_gguf
from monoblock.checkpoint.stages import scratch
from monoblock.checkpoint.store import open_store
from monoblock.conversion.convert import Progress, check_apart
from monoblock.conversion.logits import GraphComparison
from monoblock.embeddings import files as sentence_files
from monoblock.errors import CheckpointError, UnsupportedConfig
from monoblock.generation.config import GENERATION_CONFIG_NAME
from monoblock.installed import installed

__all__ = ["TASKS", "ExportOptions", "Exported", "export_onnx"]

# Task, by optimum's name -> the kinds of head, and the class that selects the model's.
TASKS: dict[str, tuple[tuple[str | None, ...], str]] = {
    "feature-extraction": ((None, "pooler"), "AutoModel"),
    "fill-mask": (("masked",), "AutoModelForMaskedLM"),
    "text-generation": (("causal",), "AutoModelForCausalLM"),
    "text-generation-with-past": (("causal",), "AutoModelForCausalLM"),
    "text-classification": (("sequence", "first"), "AutoModelForSequenceClassification"),
    "token-classification": (("token",), "AutoModelForTokenClassification"),
    "question-answering": (("span",), "AutoModelForQuestionAnswering"),
    "multiple-choice": (("choice", "double"), "AutoModelForMultipleChoice"),
}
FORMATS = ("onnx", "openvino")
FILES = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}
_PACKAGES = {
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "export"),
    "openvino": (("onnx", "onnxscript", "openvino"), "openvino"),
}
_TORCH = (2, 13)  # the first version whose exporter takes these models
# A protobuf file has at most 2 GiB; the rest is left for the graph.
EMBEDDED = (1 << 31) - (1 << 26)
# Share of the largest logit; float32 rounding is about a hundredth of it, a wrong mask or position far above it.
ALLOWED = 1e-3
# Files of a sentence-transformers module, and of the transformer's module in addition to `companions`.
_MODULE = ("config.json", "model.safetensors", "pytorch_model.bin")

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `export_onnx`.

    `task`: a key of `TASKS`; None: that of the class in config.json, with the KV cache for causal language models.
    `format`: "onnx" or "openvino". `quantize`: None, or "int8" for ONNX: matrices in 8 bits, activations quantised as
    they occur. `force`: replace an existing target folder. `hub`: download options of the source.
    """

    task: str | None = None
    format: str = "onnx"
    quantize: str | None = None
    force: bool = False
    hub: HubOptions = field(default_factory=HubOptions)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Result of an export: task, class, format, the files written, the names of the graph's inputs and outputs, and the
    comparison of the written file with the model."""

    task: str
    architecture: str
    format: str
    files: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    comparison: GraphComparison


def export_onnx(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Export a model into a new folder, atomically, in float32, for all batch sizes and lengths.

    `source`: a folder, a GGUF file or a name on the hub; quantised weights are dequantised. A folder of
    sentence-transformers keeps its modules, with the graph in `onnx/` or `openvino/`. The written file is run and
    compared with the model. ValueError: an option, or the task does not fit the model. CheckpointError: the target
    exists, the model lacks the task's head, or the comparison failed. ImportError: a package is missing.
    """
    options, show = options or ExportOptions(), progress or _silent
    check_options(options)
    _check_packages(options.format)
    target = Path(os.path.abspath(Path(target).expanduser()))  # noqa: PTH100  # resolve() would follow a link
    name = os.fspath(source)
    check_target(target, replace=options.force)
    check_apart(name, target)
    modules = _Modules(name, options.hub, options.task)
    show(0, 1, "loading")
    task, model = _model(name, modules.hub, options.task or modules.task)
    show(1, 1, "loading")
    export = importlib.import_module("monoblock.backends.pytorch.export")
    names = export.interface(model, past=task.endswith("-with-past"))
    with new_folder(target, replace=options.force) as folder:
        inner = folder / modules.folder
        place = inner / options.format if modules.found else inner
        place.mkdir(parents=True, exist_ok=True)
        file = place / FILES[options.format]
        with scratch(target) as temporary:
            show(0, 1, "exporting")
            graph = _graph(export, model, names)
            _write(graph, file, options, temporary, export)
            del graph
        show(1, 1, "exporting")
        show(0, 1, "checking")
        comparison = _compared(model, names, file, options)
        show(1, 1, "checking")
        _companions(model, name, modules, folder)
        written = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    inputs, outputs = names.names
    return Exported(
        task=task,
        architecture=model.row.name,
        format=options.format,
        files=tuple(written),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        comparison=comparison,
    )


def _silent(done: int, of: int, what: str) -> None:
    del done, of, what


# ---------------------------------------------------------------------- options and packages


def check_options(options: ExportOptions) -> None:
    """ValueError for options that are invalid for every model."""
    if options.task is not None and options.task not in TASKS:
        raise ValueError(f"task={options.task!r}: expected one of {', '.join(TASKS)}")
    if options.format not in FORMATS:
        raise ValueError(f"format={options.format!r}: expected one of {', '.join(FORMATS)}")
    if options.quantize not in (None, "int8"):
        raise ValueError(f"quantize={options.quantize!r}: expected None or 'int8'")
    if options.quantize and options.format != "onnx":
        raise ValueError(
            "quantize='int8' is for ONNX: export to OpenVINO without it, and compress the weights with NNCF"
        )


def _check_packages(form: str) -> None:
    """ImportError with the pip line for a missing package."""
    packages, extra = _PACKAGES[form]
    missing = [name for name in packages if not installed(name)]
    if not installed("torch"):
        missing = ["torch", *missing]
    pip = f'pip install "monoblock[{extra}]"'
    if missing:
        raise ImportError(f"exporting to {form} needs {' and '.join(missing)}: {pip}")
    version = importlib.import_module("torch").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _TORCH:
        needed = ".".join(map(str, _TORCH))
        raise ImportError(f"exporting needs PyTorch {needed} or newer, and {version} is installed: {pip}")


# ---------------------------------------------------------------------- the model


class _Modules:
    """The modules of a sentence-transformers folder, which is exported for feature extraction; `found` is False for
    others, and if another task is asked for. `folder`: that of the transformer."""

    def __init__(self, name: str, hub: HubOptions, task: str | None) -> None:
        self.folder, self.hub, self.entries, self.task = "", hub, list[sentence_files.Entry](), task
        if task not in (None, "feature-extraction") or in_gguf(name, hub):
            return
        entries = sentence_files.read_entries(name, hub)
        if entries is None:
            return
        if not entries[0].type.endswith(".Transformer"):
            raise UnsupportedConfig(
                f"{SENTENCE_TRANSFORMERS}: the first module is {entries[0].type}; only a Transformer can be exported"
            )
        self.task, self.entries, self.folder = "feature-extraction", entries, entries[0].folder
        self.root, self.hub = hub, sentence_files.inside(hub, self.folder)

    @property
    def found(self) -> bool:
        """Whether there are modules."""
        return bool(self.entries)

    def copied(self, name: str) -> dict[str, Path]:
        """The files of the modules and of the whole model: name -> path."""
        wanted = [(self.root, "", file) for file in (SENTENCE_TRANSFORMERS, sentence_files.CONFIG)]
        wanted += [(self.hub, self.folder, file) for file in sentence_files.TRANSFORMER_NAMES]
        for entry in self.entries[1:]:
            inside = sentence_files.inside(self.root, entry.folder)
            wanted += [(inside, entry.folder, file) for file in _MODULE]
        found = {
            "/".join(part for part in (folder, file) if part): find_file(name, file, hub, required=False)
            for hub, folder, file in wanted
        }
        return {file: path for file, path in found.items() if path is not None}


def _model(name: str, hub: HubOptions, task: str | None) -> tuple[str, Any]:
    """The task and the float32 model, with the class's head in the files."""
    given = {key: value for key, value in asdict(hub).items() if value}
    config = AutoConfig.from_pretrained(name, **given)
    row = class_of(config, open_store(find_weights(name, hub), "np"))
    if task is None:  # of two tasks of a causal head, the second one
        task = [one for one, (heads, _) in TASKS.items() if row.head in heads][-1]
    heads, auto = TASKS[task]
    chosen = row.name if row.head in heads else families.auto_class(auto, config)
    model, info = getattr(monoblock, chosen).from_pretrained(
        name, config=config, dtype="float32", output_loading_info=True, **given
    )
    pooler = model.module_paths.get("pooler") if row.head != "pooler" else None
    if missing := [key for key in info["missing_keys"] if pooler is None or not key.startswith(f"{pooler}.")]:
        raise CheckpointError(
            f"{name} has no weights for {chosen}, which the task {task} needs ({missing[0]}, ...): it holds a "
            f"{row.name}; give its task"
        )
    if model.quantization_config is not None:
        model.dequantize()
    return task, model.float().eval()


# ---------------------------------------------------------------------- files


def _graph(export: Any, model: Any, names: Any) -> Any:
    errors = importlib.import_module("torch.onnx").errors
    try:
        return export.onnx_model(model, names)
    except errors.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise UnsupportedConfig(
            f"PyTorch's exporter cannot express this {model.row.name}: {str(cause).strip().splitlines()[0]}"
        ) from error


def _write(graph: Any, file: Path, options: ExportOptions, temporary: Path, export: Any) -> None:
    export.fold_transposes(graph, shared=options.quantize is not None)
    if options.format == "openvino":
        _save(graph, temporary / "model.onnx")
        openvino = importlib.import_module("openvino")
        openvino.save_model(openvino.convert_model(temporary / "model.onnx"), file, compress_to_fp16=False)
    elif options.quantize is None:
        _save(graph, file)
    else:
        _save(graph, temporary / "model.onnx")
        quantization = importlib.import_module("onnxruntime.quantization")
        with _without_warnings():
            quantization.quantize_dynamic(
                temporary / "model.onnx",
                temporary / "quantized.onnx",
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                use_external_data_format=(temporary / f"model.onnx{_DATA}").exists(),
            )
        _save(importlib.import_module("onnx_ir").load(temporary / "quantized.onnx"), file)


_DATA = "_data"  # the ending of the file of weights, by which optimum finds it


def _save(graph: Any, file: Path) -> None:
    """Write an ONNX file; with the weights in a file of their own if one file cannot hold them."""
    values = (value.const_value for value in graph.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in values if tensor is not None)
    external = {} if size <= EMBEDDED else {"external_data": file.name + _DATA}
    importlib.import_module("onnx_ir").save(graph, file, **external)


@contextmanager
def _without_warnings() -> Generator[None]:
    """Without onnxruntime's advice on the root logger to prepare each model for its quantiser."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _companions(model: Any, name: str, modules: _Modules, folder: Path) -> None:
    """Write config, tokenizer, generation config, and the files of sentence-transformers beside the graph."""
    inner = folder / modules.folder
    model.record_quantization()
    config_to_write(model.config, model.row, "float32").save_pretrained(inner)
    found = companions(name, modules.hub)
    copy_files(inner, found)
    if in_gguf(name, modules.hub):
        given = {key: value for key, value in asdict(modules.hub).items() if value}
        monoblock.AutoTokenizer.from_pretrained(name, **given).save_pretrained(inner)
    if model.row.head == "causal" and GENERATION_CONFIG_NAME not in found:
        model.generation_config.save_pretrained(inner)
    if modules.found:
        copy_files(folder, modules.copied(name))


# ---------------------------------------------------------------------- the check


def _compared(model: Any, names: Any, file: Path, options: ExportOptions) -> GraphComparison:
    """The comparison; CheckpointError if a float32 file computes something else."""
    check = importlib.import_module("monoblock.backends.pytorch.export_check")
    with _opened(file, options.format) as run:
        found: GraphComparison = check.compare_graph(model, names, run)
    bound = np.inf if options.quantize else ALLOWED * max(1.0, found.magnitude)
    if not found.difference <= bound:
        raise CheckpointError(
            f"the check failed: the exported {model.row.name} differs by {found.difference:.3g} from the model, whose "
            f"largest output is {found.magnitude:.3g}; nothing was written"
        )
    return found


@contextmanager
def _opened(file: Path, form: str) -> Generator[Run]:
    """The written file as a function of arrays."""
    if form == "onnx":
        runtime = importlib.import_module("onnxruntime")
        session: Any = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        outputs = [value.name for value in session.get_outputs()]
        yield lambda given: dict(zip(outputs, session.run(outputs, given), strict=True))
        return
    openvino = importlib.import_module("openvino")
    core = openvino.Core()
    # CPUs with bfloat16 units would round to it by default.
    compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = compiled(given)
        return {output.get_any_name(): np.array(results[output]) for output in compiled.outputs}

    yield run
