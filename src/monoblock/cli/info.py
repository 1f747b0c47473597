"""`monoblock info`: architecture, size and memory of a model, from its config and file headers; --runtime loads it."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, is_dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monoblock.checkpoint.contents import SENTENCE_TRANSFORMERS, explained
from monoblock.checkpoint.journal import hidden
from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.options import DownloadOptions, Json

if TYPE_CHECKING:
    from monoblock.checkpoint.hub import WeightFiles
    from monoblock.checkpoint.options import HubOptions
    from monoblock.config import PretrainedConfig
    from monoblock.spec import ArchSpec

app = sub_app()

# Bits per weight. The scales of the integer types, which add 2% and 6%, are not counted.
DTYPE_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
CACHE_BYTES = {"float32": 4, "bfloat16": 2}


@app.command(epilog=EXIT_CODES)
@console.command
def info(
    *,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="The model, as --model: a folder, a GGUF file, or a name on the hub.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Folder, GGUF file, or name on the hub; default: the embedded demo model."
        ),
    ] = None,
    hub: DownloadOptions,
    as_json: Json = False,
    with_runtime: Annotated[
        bool,
        typer.Option("--runtime", help="Load the model in PyTorch, and show how it would decode."),
    ] = False,
) -> None:
    """Show a model's family, architecture, size, and the memory for its weights and its KV cache.

    Reads config.json and the headers of safetensors files; for a model on the hub, nothing else is downloaded without
    --runtime. A GGUF file is described by its metadata and its table of tensors. For a folder with a PEFT adapter,
    shows the adapter and its base model.
    """
    from monoblock.checkpoint.adapter_files import is_adapter
    from monoblock.checkpoint.options import HubOptions
    from monoblock.cli.engine import locate

    if name is not None and model is not None:
        raise typer.BadParameter(f"two models are given, {name} and --model {model}; drop one")
    model = model or name
    path, name = locate(model)
    hub = hub if model else DownloadOptions()
    if is_adapter(path, HubOptions(**hub.kwargs())):
        if with_runtime:
            raise ValueError(f"{name} holds an adapter, but --runtime needs a model: give its base model")
        adapter = _adapter(Path(path))
        if as_json:
            print(json.dumps({"model": name} | adapter, indent=1))
        else:
            console.rows(name, _adapter_rows(adapter))
        return
    found = describe(path, hub)
    if with_runtime:
        found["runtime"] = runtime(path, hub)
    if as_json:
        print(json.dumps({"model": name} | found | {"spec": _plain(found["spec"])}, indent=1))
    else:
        _show(found, name)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A model's files with their sizes in bytes (None: unknown), and the number of `stored` elements by dtype in the
    weight files that a load reads (None if no file has a readable header).

    `read`: the names of those weight files. `note`: the reason if there are none.
    """

    files: dict[str, int | None]
    stored: dict[str, int] | None
    read: tuple[str, ...] = ()
    note: str | None = None


def describe(path: str, hub: DownloadOptions) -> dict[str, Any]:
    """All results of `monoblock info`, by name: JSON values, except the spec. Sizes in bytes."""
    from monoblock import AutoConfig
    from monoblock.checkpoint.hub import in_gguf
    from monoblock.checkpoint.options import HubOptions
    from monoblock.quantization import stored_form

    config = AutoConfig.from_pretrained(path, **hub.kwargs())
    spec = config.to_spec()
    options = HubOptions(**hub.kwargs())
    if in_gguf(path, options):
        contents = _gguf(path, options)
    else:
        contents = _local(Path(path)) if Path(path).is_dir() else _remote(path, hub)
    count = _parameters(config, spec)
    # A bidirectional model has no KV cache.
    widths = CACHE_BYTES if spec.causal else {}
    per_token = {name: _cache_per_token(spec, width) for name, width in widths.items()}
    return {
        "family": config.model_type,
        "architectures": config.architectures or [],
        "spec": spec,
        "parameters": count,
        "stored": contents.stored,
        "weights": list(contents.read),
        "note": contents.note,
        "kind": "sentence-transformers" if SENTENCE_TRANSFORMERS in contents.files else None,
        "quantization": stored_form(config),
        "memory": {name: count * bits // 8 for name, bits in DTYPE_BITS.items()},
        "cache_per_token": per_token,
        "files": contents.files,
    }


def runtime(path: str, hub: DownloadOptions) -> dict[str, Any]:
    """Facts about the loaded model, on the default device of the other commands: its decoding path, or why it has no
    fast one; dtype, device, PyTorch's threads, and the native kernels' status."""
    from monoblock.cli.engine import device_map, need_pytorch

    need_pytorch("monoblock info --runtime")
    import torch

    import monoblock
    from monoblock import AutoConfig, native
    from monoblock.families import family

    config = AutoConfig.from_pretrained(path, **hub.kwargs())
    rows = family(config.model_type).classes
    causal = next((row.name for row in rows if row.head == "causal"), rows[0].name)
    where = {"device_map": device} if (device := device_map("auto")) else {}
    loaded = getattr(monoblock, causal).from_pretrained(path, **hub.kwargs(), **where)
    return {
        "decoding": loaded.decoding_path(),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "threads": torch.get_num_threads(),
        "native_kernels": native.status(),
    }


def _parameters(config: PretrainedConfig, spec: ArchSpec) -> int:
    """Number of parameters of the config's architecture, or of the bare model if it names none."""
    from monoblock.families import named_classes
    from monoblock.tree import parameters

    heads = [row.head for row in named_classes(config) if row.head]
    head = config.to_head(heads[0]) if heads else None
    return sum(prod(shape) for shape in parameters(spec, head).values())


def _cache_per_token(spec: ArchSpec, item_bytes: int) -> int:
    """Bytes of the keys and values of one token in all layers, without the limit of sliding windows."""
    return 2 * spec.attention.kv_heads * spec.attention.head_dim * spec.layers * item_bytes


def _local(folder: Path) -> Contents:
    from monoblock.checkpoint.hub import find_weights
    from monoblock.errors import HubError

    files: dict[str, int | None] = {
        p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file() and not hidden(p.name)
    }
    try:
        found = find_weights(folder)
    except HubError as error:
        return Contents(files=files, stored=None, note=explained(files) or console.message_of(error))
    return Contents(files=files, stored=_stored(found), read=tuple(path.name for path in found.paths))


def _gguf(path: str, options: HubOptions) -> Contents:
    from monoblock.checkpoint.gguf.config import element_counts
    from monoblock.checkpoint.gguf.files import opened
    from monoblock.checkpoint.hub import find_gguf

    paths = find_gguf(path, options)
    return Contents(
        files={file.name: file.stat().st_size for file in paths},
        stored=dict(element_counts(opened(paths))),
        read=tuple(file.name for file in paths),
    )


def _stored(weights: WeightFiles) -> dict[str, int] | None:
    """Number of elements by dtype, from the files' headers; None for formats without readable headers."""
    from monoblock.checkpoint.header import read_header
    from monoblock.checkpoint.msgpack import read_msgpack

    if weights.kind not in ("safetensors", "msgpack"):
        return None
    read = read_header if weights.kind == "safetensors" else read_msgpack
    stored: dict[str, int] = {}
    for path in weights.paths:
        for entry in read(path).entries.values():
            stored[entry.dtype] = stored.get(entry.dtype, 0) + prod(entry.shape)
    return stored


def _adapter(folder: Path) -> dict[str, Any]:
    """Facts about an adapter, from its files: type, base model, rank and size."""
    from monoblock.checkpoint.adapter_files import ADAPTER_CONFIG_NAME
    from monoblock.checkpoint.files import read_json
    from monoblock.checkpoint.hub import WeightFiles

    config = read_json(folder / ADAPTER_CONFIG_NAME)
    weights = folder / "adapter_model.safetensors"
    exists = weights.is_file()
    return {
        "adapter": str(config.get("peft_type") or "peft"),
        "base": config.get("base_model_name_or_path"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": config.get("target_modules"),
        "stored": _stored(WeightFiles(kind="safetensors", paths=(weights,))) if exists else None,
        "files": {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()},
    }


def _adapter_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    targets, stored = found["targets"], found["stored"]
    rows = [
        ("adapter", f"{found['adapter']} (PEFT), without a base model"),
        ("base model", str(found["base"] or "none named")),
        ("rank", found["rank"]),
        ("alpha", found["alpha"]),
        ("target modules", ", ".join(map(str, targets)) if isinstance(targets, list) else targets),
        ("stored", _counts(stored) if stored else "no safetensors header to read"),
        *((f"file {file}", _size(size)) for file, size in found["files"].items()),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def _remote(name: str, hub: DownloadOptions) -> Contents:
    """The files of a model on the hub; only their headers are downloaded.

    If they cannot be listed, a note is printed; all other facts come from config.json.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    api = HfApi(token=hub.token)
    try:
        if hub.offline:
            raise ValueError("--offline")
        found = api.model_info(name, revision=hub.revision, files_metadata=True)
    except Exception as error:  # the classes depend on the HTTP library that huggingface_hub uses
        console.note(f"The files of {name} cannot be listed: {console.message_of(error)}")
        return Contents(files={}, stored=None)
    files = {file.rfilename: file.size for file in found.siblings or []}
    try:
        counts = api.get_safetensors_metadata(name, revision=hub.revision).parameter_count
        stored = {str(dtype): count for dtype, count in counts.items()}
    except NotASafetensorsRepoError:
        stored = None
    return Contents(files=files, stored=stored, note=None if stored else explained(files))


def _counts(stored: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {d}" for d, n in stored.items())


def _show(found: dict[str, Any], name: str) -> None:
    count, stored = found["parameters"], found["stored"]
    lines = [
        ("family", found["family"]),
        ("architectures", ", ".join(found["architectures"]) or "none named"),
        ("parameters", f"{count:,} ({_short(count)})"),
        ("stored", _counts(stored) if stored else found["note"] or "no safetensors header to read"),
        *([("made for", found["kind"])] if found["kind"] else []),
        *([("quantisation", _quantization(found["quantization"]))] if found["quantization"] else []),
        *((f"weights in {dtype}", _size(size)) for dtype, size in found["memory"].items()),
        *((f"cache per token in {dtype}", _size(size)) for dtype, size in found["cache_per_token"].items()),
        *((name.replace("_", " "), str(value)) for name, value in found.get("runtime", {}).items()),
        *((f"file {file}", _file(file, size, found["weights"])) for file, size in found["files"].items()),
    ]
    console.rows(name, lines)
    print()
    print(found["spec"])


def _file(name: str, size: int | None, read: list[str]) -> str:
    """A file's size, and whether it is a weight file that a load does not read."""
    text = "size unknown" if size is None else _size(size)
    weights = name.endswith((".safetensors", ".bin", ".msgpack", ".h5", ".pth", ".gguf"))
    return f"{text}, not read" if read and weights and name not in read else text


def _quantization(how: dict[str, Any]) -> str:
    kept = ", ".join(how.get("modules_to_not_convert") or ())
    return how["summary"] + (f"; not {kept}" if kept else "")


def _plain(value: Any) -> Any:
    """A spec as JSON values; objects have a field `type`."""
    if is_dataclass(value):
        values = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        return {"type": type(value).__name__} | values
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _short(count: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return str(count)


def _size(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} bytes"
