"""Checkpoints from one format into another: the makers' releases into hub folders, hub folders into what the makers
read, and hub folders into others of another type, shard size or number of key and value heads."""

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from monoblock.checkpoint import casts
from monoblock.checkpoint.array_adapters import Array
from monoblock.checkpoint.files import write_atomically
from monoblock.checkpoint.folder import check_target, copy_files, new_folder, unpacked
from monoblock.checkpoint.formats import Checkpoint, Format, Options, hub_config, read_hub
from monoblock.checkpoint.hub import WEIGHT_NAMES, find_file, read_json
from monoblock.checkpoint.journal import settle
from monoblock.checkpoint.save import parse_size, save_tensors
from monoblock.checkpoint.upstream import fuyu, llm_foundry, mistral, openai_gpt
from monoblock.checkpoint.weights import CanonicalWeights, CastWeights, PooledKVWeights, Shape, lazy_tensors
from monoblock.config import PretrainedConfig
from monoblock.conversion.compare import Comparison, compare
from monoblock.errors import CheckpointError, HubError
from monoblock.generation.config import GENERATION_CONFIG_NAME, GenerationConfig

__all__ = ["FORMATS", "Options", "Result", "convert"]

# (done, of, what is being done)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a conversion did: formats, class and dtype of the result, its size in numbers, its files, the names of
    tensors that the class has no place for, and what `check` found."""

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
    """Convert a checkpoint into a new folder, which appears whole or not at all.

    `source`: a folder, a file (.tar, .pt) or a model's name on the hub. `progress(done, of, what)` is called as it
    goes. HubError: files cannot be had. CheckpointError: they do not fit, or the target is taken. UnsupportedConfig
    and ValueError: the format, or an option, cannot do this model. ImportError: PyTorch is needed (for pickles) and
    absent.
    """
    options = options or Options()
    target = Path(os.path.abspath(Path(target).expanduser()))  # noqa: PTH100  # resolve() would follow a link
    to = _check(options)
    check_target(target, replace=options.force)
    check_apart(source, target)
    with ExitStack() as stack:
        given = _given(source)
        place = stack.enter_context(unpacked(given, target)) if isinstance(given, Path) else given
        found = _format(place, options)
        original = found.read(place, options.hub)
        exact = original if options.kv_heads is None else _pooled(original, options.kv_heads)
        expected = exact if options.dtype is None else _cast(exact, options.dtype)
        _check_target_format(expected, to)
        folder = stack.enter_context(new_folder(target, replace=options.force))
        watched = _Watched(expected.weights, progress or _silent)
        assert to.write is not None
        to.write(folder, replace(expected, weights=watched), options)
        watched.finish()
        comparison = _checked(original, exact, folder, to, progress or _silent) if options.check else None
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    dtypes = {expected.weights.dtype(name) for name in expected.weights.shapes()}
    return Result(
        source_format=found.name,
        target_format=to.name,
        architecture=expected.row.name,
        dtype=", ".join(sorted(casts.DTYPE_NAMES.get(name, name) for name in dtypes)),
        parameters=watched.parameters,
        files=tuple(files),
        left_out=original.left_out,
        comparison=comparison,
    )


# ---------------------------------------------------------------------- which formats, which changes


def _check(options: Options) -> Format:
    """Refuse options that can be nothing for any model; returns the target's format."""
    if options.source_format not in ("auto", *FORMATS):
        raise ValueError(
            f"source_format={options.source_format!r}: expected one of auto, {', '.join(FORMATS)}"
        )
    written = [name for name, form in FORMATS.items() if form.write]
    if options.target_format not in written:
        raise ValueError(f"target_format={options.target_format!r}: expected one of {', '.join(written)}")
    if options.dtype is not None:
        casts.hub_dtype(options.dtype)
    if options.max_shard_size is not None:
        parse_size(options.max_shard_size)
    if options.kv_heads is not None and options.kv_heads < 1:
        raise ValueError(f"kv_heads={options.kv_heads}: expected at least 1")
    return FORMATS[options.target_format]


def check_apart(source: str | os.PathLike[str], target: Path) -> None:
    """CheckpointError if the target is the source, or around it: it would be replaced while it is read."""
    place = Path(source).expanduser().resolve()
    if place.exists() and target.resolve() in (place, *place.parents):
        raise CheckpointError(f"{target} is the source or holds it: choose another target")


def _given(source: str | os.PathLike[str]) -> Path | str:
    """A local path, or a name on the hub."""
    path = Path(source).expanduser()
    settle(path)
    return path if path.exists() else os.fspath(source)


def _format(place: Path | str, options: Options) -> Format:
    if options.source_format != "auto":
        form = FORMATS[options.source_format]
        if isinstance(place, str) and form.model_type:  # only folders like the hub's can be fetched by name
            raise HubError(
                f"there is no folder {place}: a release is read from a local folder, download it first"
            )
        return form
    if isinstance(place, str):
        config = find_file(place, "config.json", options.hub)
        assert config is not None
        makers = llm_foundry.recognised(read_json(config))
        return llm_foundry.FORMAT if makers else HUB
    for form in FORMATS.values():
        if form.recognise(place):
            return form
    kinds = "; ".join(form.title for form in FORMATS.values())
    raise HubError(
        f"{place} is of no format that is known here ({kinds}): name it with --from (source_format=)"
    )


def _check_target_format(checkpoint: Checkpoint, to: Format) -> None:
    if to.model_type is None:
        return
    if checkpoint.config.model_type != to.model_type or checkpoint.row.head != "causal":
        raise ValueError(
            f"a {checkpoint.row.name} cannot be written as {to.title}: that holds {to.model_type} models which "
            "predict the next token"
        )


def _cast(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    return replace(checkpoint, weights=CastWeights(checkpoint.weights, casts.hub_dtype(dtype)))


def _pooled(checkpoint: Checkpoint, heads: int) -> Checkpoint:
    weights = PooledKVWeights(checkpoint.weights, checkpoint.config.to_spec(), heads)
    return replace(checkpoint, config=_with_kv_heads(checkpoint.config, heads), weights=weights)


def _mistral_kv_heads(config: Any, heads: int) -> None:
    config.num_key_value_heads = heads


def _mpt_kv_heads(config: Any, heads: int) -> None:
    config.attn_config.attn_type = "grouped_query_attention"
    config.attn_config.kv_n_heads = heads


# The families whose configs can say how many key and value heads there are, and how.
KV_HEADS: dict[str, Callable[[Any, int], None]] = {"mistral": _mistral_kv_heads, "mpt": _mpt_kv_heads}


def _with_kv_heads(config: PretrainedConfig, heads: int) -> PretrainedConfig:
    if config.model_type not in KV_HEADS:
        raise ValueError(
            f"kv_heads={heads}: a {config.model_type} model has as many key and value heads as heads; only "
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


# ---------------------------------------------------------------------- the hub's format


def _is_hub(path: Path) -> bool:
    return (
        path.is_dir()
        and (path / "config.json").is_file()
        and any((path / name).is_file() for name in WEIGHT_NAMES)
    )


def _write_hub(folder: Path, checkpoint: Checkpoint, options: Options) -> None:
    """Weights, config.json, and the files that go with them; generation_config.json also where the source has none
    of the hub's files."""
    tensors = lazy_tensors(checkpoint.weights, checkpoint.keymap())
    save_tensors(folder, tensors, framework="np", max_shard_size=options.max_shard_size or "50GB")
    names = [checkpoint.weights.dtype(name) for name in checkpoint.weights.shapes()]
    stored = next((casts.DTYPE_NAMES[name] for name in names if name in casts.FLOATS), None)
    hub_config(checkpoint.config, checkpoint.row, stored).save_pretrained(folder)
    copy_files(folder, checkpoint.companions)
    for name, text in checkpoint.texts.items():
        if name not in checkpoint.companions:
            write_atomically(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    makers = checkpoint.hub is None and checkpoint.row.head == "causal"
    if makers and GENERATION_CONFIG_NAME not in checkpoint.companions:
        GenerationConfig.from_model_config(checkpoint.config).save_pretrained(folder)


HUB = Format(name="hub", title="the hub's folders", recognise=_is_hub, read=read_hub, write=_write_hub)

# In the order in which a source is tried; a folder with both the hub's and a maker's files counts as the hub's.
FORMATS: Mapping[str, Format] = {
    form.name: form for form in (llm_foundry.FORMAT, HUB, fuyu.FORMAT, openai_gpt.FORMAT, mistral.FORMAT)
}


# ---------------------------------------------------------------------- progress and check


def _checked(
    original: Checkpoint, expected: Checkpoint, folder: Path, to: Format, progress: Progress
) -> Comparison:
    progress(0, 1, "checking")
    # As loaded by whoever opens the folder next: by its own config.json and names.
    written = to.read(folder, Options().hub)
    comparison = compare(original, expected, written)
    progress(1, 1, "checking")
    return comparison


def _silent(done: int, of: int, what: str) -> None:
    del done, of, what


class _Watched:
    """Weights that tell how many of them were read."""

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
