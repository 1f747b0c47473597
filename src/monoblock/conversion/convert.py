"""Convert checkpoints: original release formats to transformers' format and back, and changes of dtype, shard size or
number of key and value heads."""

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import monoblock
from monoblock.checkpoint import casts
from monoblock.checkpoint.array_adapters import Array
from monoblock.checkpoint.files import write_atomically
from monoblock.checkpoint.folder import check_target, copy_files, new_folder, unpacked
from monoblock.checkpoint.formats import Checkpoint, Format, Options, config_to_write, read_hub
from monoblock.checkpoint.gguf import files
from monoblock.checkpoint.gguf.config import generation_config
from monoblock.checkpoint.gguf.header import is_gguf
from monoblock.checkpoint.hub import WEIGHT_NAMES, HubOptions, find_file, find_gguf, in_gguf, read_json
from monoblock.checkpoint.journal import settle
from monoblock.checkpoint.save import parse_size, save_tensors
from monoblock.checkpoint.stages import scratch
from monoblock.checkpoint.upstream import fuyu, llm_foundry, mistral, openai_gpt
from monoblock.checkpoint.weights import CanonicalWeights, CastWeights, PooledKVWeights, Shape, lazy_tensors
from monoblock.config import PretrainedConfig
from monoblock.conversion.compare import Comparison, compare
from monoblock.errors import CheckpointError, HubError
from monoblock.generation.config import GENERATION_CONFIG_NAME, GenerationConfig

__all__ = ["FORMATS", "Options", "Result", "convert"]

# Called with (steps done, steps in total, name of the phase).
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of a conversion: formats, class, dtype and number of parameters, the files written, the tensors `left_out`
    because the class does not use them, and the comparison of `check`."""

    source_format: str
    target_format: str
    architecture: str
    dtype: str
    parameters: int
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    comparison: Comparison | None


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: Options | None = None,
    progress: Progress | None = None,
) -> Result:
    """Convert a checkpoint into a new folder, atomically.

    `source`: a folder, a file (.tar, .pt) or a model's name on the hub. `progress(done, total, phase)` is called for
    each tensor. HubError: files are missing or cannot be downloaded. CheckpointError: tensors do not fit, or the target
    exists. UnsupportedConfig, ValueError: the format or an option does not support this model. ImportError: PyTorch is
    needed (for pickles) but not installed.
    """
    options = options or Options()
    target = Path(os.path.abspath(Path(target).expanduser()))  # noqa: PTH100  # resolve() would follow a link
    to = _check(options)
    check_target(target, replace=options.force)
    check_apart(source, target)
    with ExitStack() as stack:
        opened, found = open_source(
            source, options, lambda given: stack.enter_context(unpacked(given, target))
        )
        original = found.read(opened, options.hub)
        original = with_files(original, opened, options.hub, target)
        exact = original if options.kv_heads is None else pooled(original, options.kv_heads)
        dtype = options.dtype or ("bfloat16" if original.dequantized else None)
        expected = exact if dtype is None else _cast(exact, dtype)
        _check_target_format(expected, to)
        folder = stack.enter_context(new_folder(target, replace=options.force))
        monitored = _Monitored(expected.weights, progress or _silent)
        assert to.write is not None
        to.write(folder, replace(expected, weights=monitored), options)
        monitored.finish()
        comparison = _checked(original, exact, folder, to, progress or _silent) if options.check else None
        written = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    dtypes = {expected.weights.dtype(name) for name in expected.weights.shapes()}
    return Result(
        source_format=found.name,
        target_format=to.name,
        architecture=expected.row.name,
        dtype=", ".join(sorted(casts.DTYPE_NAMES.get(name, name) for name in dtypes)),
        parameters=monitored.parameters,
        files=tuple(written),
        left_out=original.left_out,
        comparison=comparison,
    )


def open_source(
    source: str | os.PathLike[str], options: Options, unpack: Callable[[Path], Path]
) -> tuple[Path | str, Format]:
    """The folder (archives are extracted by `unpack`) or the name on the hub of a source, and its format."""
    given = _given(source)
    opened = unpack(given) if isinstance(given, Path) else given
    return opened, _format(opened, options)


# ---------------------------------------------------------------------- formats and options


def _check(options: Options) -> Format:
    """ValueError for options that are invalid for every model; returns the target's format."""
    if options.source_format not in ("auto", *FORMATS):
        raise ValueError(
            f"source_format={options.source_format!r}: expected one of auto, {', '.join(FORMATS)}"
        )
    written = [name for name, form in FORMATS.items() if form.write]
    if options.target_format not in written:
        raise ValueError(f"target_format={options.target_format!r}: expected one of {', '.join(written)}")
    if options.dtype is not None:
        casts.safetensors_dtype(options.dtype)
    if options.max_shard_size is not None:
        parse_size(options.max_shard_size)
    if options.kv_heads is not None and options.kv_heads < 1:
        raise ValueError(f"kv_heads={options.kv_heads}: expected at least 1")
    return FORMATS[options.target_format]


def check_apart(source: str | os.PathLike[str], target: Path) -> None:
    """CheckpointError if the target is the source or one of its parents, which would be replaced while being read."""
    origin = Path(source).expanduser().resolve()
    if origin.exists() and target.resolve() in (origin, *origin.parents):
        raise CheckpointError(f"{target} is the source or contains it: choose another target")


def _given(source: str | os.PathLike[str]) -> Path | str:
    """A local path, or a name on the hub."""
    path = Path(source).expanduser()
    settle(path)
    return path if path.exists() else os.fspath(source)


def _format(source: Path | str, options: Options) -> Format:
    if options.source_format != "auto":
        form = FORMATS[options.source_format]
        if isinstance(source, str) and form.model_type:  # a format that is read only from local folders
            raise HubError(
                f"there is no folder {source}, and this format is not read from the hub: download it first"
            )
        return form
    if isinstance(source, str):
        config = find_file(source, "config.json", options.hub)
        assert config is not None
        return llm_foundry.FORMAT if llm_foundry.recognised(read_json(config)) else HUB
    for form in FORMATS.values():
        if form.recognise(source):
            return form
    kinds = "; ".join(form.title for form in FORMATS.values())
    raise HubError(f"{source} has no known format ({kinds}): name its format with --from (source_format=)")


def _check_target_format(checkpoint: Checkpoint, to: Format) -> None:
    if to.model_type is None:
        return
    if checkpoint.config.model_type != to.model_type or checkpoint.row.head != "causal":
        raise ValueError(
            f"a {checkpoint.row.name} cannot be written as {to.title}, which holds causal {to.model_type} "
            "models only"
        )


def with_files(checkpoint: Checkpoint, source: Path | str, hub: HubOptions, target: Path) -> Checkpoint:
    """The checkpoint with the files of its tokenizer and its generation config, if they are inside a GGUF file."""
    if not in_gguf(source, hub):
        return checkpoint
    given = {name: value for name, value in asdict(hub).items() if value}
    tokenizer: Any = monoblock.AutoTokenizer.from_pretrained(source, **given)
    with scratch(target) as folder:
        tokenizer.save_pretrained(folder)
        found = generation_config(files.opened(find_gguf(source, hub)))
        GenerationConfig.from_dict(found).save_pretrained(folder)
        texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())}
    return replace(checkpoint, texts={**checkpoint.texts, **texts})


def _cast(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    return replace(checkpoint, weights=CastWeights(checkpoint.weights, casts.safetensors_dtype(dtype)))


def pooled(checkpoint: Checkpoint, heads: int) -> Checkpoint:
    """The checkpoint with its key and value heads pooled to this number."""
    weights = PooledKVWeights(checkpoint.weights, checkpoint.config.to_spec(), heads)
    return replace(checkpoint, config=_with_kv_heads(checkpoint.config, heads), weights=weights)


def _mistral_kv_heads(config: Any, heads: int) -> None:
    config.num_key_value_heads = heads


def _mpt_kv_heads(config: Any, heads: int) -> None:
    config.attn_config.attn_type = "grouped_query_attention"
    config.attn_config.kv_n_heads = heads


# How to set the number of key and value heads, for the families whose configs have it.
KV_HEADS: dict[str, Callable[[Any, int], None]] = {"mistral": _mistral_kv_heads, "mpt": _mpt_kv_heads}


def _with_kv_heads(config: PretrainedConfig, heads: int) -> PretrainedConfig:
    if config.model_type not in KV_HEADS:
        raise ValueError(
            f"kv_heads={heads}: a {config.model_type} model has as many key and value heads as query heads; only "
            f"{' and '.join(KV_HEADS)} models can have fewer"
        )
    att = config.to_spec().attention
    if heads > att.kv_heads or att.kv_heads % heads:
        raise ValueError(
            f"kv_heads={heads} does not divide the model's {att.kv_heads} key and value heads into equal groups"
        )
    if att.qk_norm and att.qk_norm.span == "width":
        raise ValueError(
            f"kv_heads={heads}: this model normalises all key heads at once (qk_ln), so they cannot be pooled"
        )
    new = copy.deepcopy(config)
    KV_HEADS[config.model_type](new, heads)
    return new


# ---------------------------------------------------------------------- transformers' format


def _is_hub(path: Path) -> bool:
    return is_gguf(path) or (
        path.is_dir()
        and (path / "config.json").is_file()
        and any((path / name).is_file() for name in WEIGHT_NAMES)
    )


def _write_hub(folder: Path, checkpoint: Checkpoint, options: Options) -> None:
    """Write weights, config.json and accompanying files; for sources in another format, also generation_config.json."""
    tensors = lazy_tensors(checkpoint.weights, checkpoint.keymap())
    save_tensors(folder, tensors, framework="np", max_shard_size=options.max_shard_size or "50GB")
    names = [checkpoint.weights.dtype(name) for name in checkpoint.weights.shapes()]
    stored = next((casts.DTYPE_NAMES[name] for name in names if name in casts.FLOATS), None)
    config_to_write(checkpoint.config, checkpoint.row, stored).save_pretrained(folder)
    copy_files(folder, checkpoint.companions)
    for name, text in checkpoint.texts.items():
        if name not in checkpoint.companions:
            write_atomically(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    upstream = checkpoint.hub is None and checkpoint.row.head == "causal"
    if upstream and GENERATION_CONFIG_NAME not in (*checkpoint.companions, *checkpoint.texts):
        GenerationConfig.from_model_config(checkpoint.config).save_pretrained(folder)


HUB = Format(name="hub", title="transformers' folders", recognise=_is_hub, read=read_hub, write=_write_hub)

# In the order in which a source is tested: a folder with files of both kinds counts as transformers' format.
FORMATS: Mapping[str, Format] = {
    form.name: form for form in (llm_foundry.FORMAT, HUB, fuyu.FORMAT, openai_gpt.FORMAT, mistral.FORMAT)
}


# ---------------------------------------------------------------------- progress and check


def _checked(
    original: Checkpoint, expected: Checkpoint, folder: Path, to: Format, progress: Progress
) -> Comparison:
    progress(0, 1, "checking")
    # Read the folder as a later user would, by its own config.json and names.
    written = to.read(folder, Options().hub)
    comparison = compare(original, expected, written)
    progress(1, 1, "checking")
    return comparison


def _silent(done: int, of: int, what: str) -> None:
    del done, of, what


class _Monitored:
    """Weights that report progress as they are read."""

    def __init__(self, weights: CanonicalWeights, progress: Progress):
        self._weights = weights
        self._progress = progress
        self._done, self._of = 0, len(weights.shapes())
        self.parameters = sum(prod(shape) for shape in weights.shapes().values())

    def shapes(self) -> Mapping[str, Shape]:
        return self._weights.shapes()

    def dtype(self, canonical: str) -> str:
        return self._weights.dtype(canonical)

    def read(self, canonical: str) -> Array:
        self._progress(min(self._done, self._of - 1), self._of, "writing")
        self._done += 1
        return self._weights.read(canonical)

    def finish(self) -> None:
        self._progress(self._of, self._of, "writing")
