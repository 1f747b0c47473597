"""`monoblock info`: what a model is and needs, from its config and its files' headers; `--runtime` loads it too."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, is_dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.options import Hub, Json

if TYPE_CHECKING:
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
    model: Annotated[
        str | None, typer.Argument(help="Folder, or name on the hub; default: the embedded demo model.")
    ] = None,
    hub: Hub,
    as_json: Json = False,
    with_runtime: Annotated[
        bool,
        typer.Option("--runtime", help="Load the model in PyTorch too, and show how it would make tokens."),
    ] = False,
) -> None:
    """Show a model's family, architecture, size, and the memory that its weights and its cache need.

    Reads config.json and the headers of safetensors files; of a model on the hub, no more is downloaded without
    --runtime.
    """
    from monoblock.cli.engine import locate

    path, name = locate(model)
    hub = hub if model else Hub()
    found = describe(path, hub)
    if with_runtime:
        found["runtime"] = runtime(path, hub)
    if as_json:
        print(json.dumps({"model": name} | found | {"spec": _plain(found["spec"])}, indent=1))
    else:
        _show(found, name)


@dataclass(frozen=True)
class Contents:
    """A model's files with their sizes in bytes (None: not known), and its stored tensors by dtype:
    how many numbers; None where no file has a header that can be read without loading it."""

    files: dict[str, int | None]
    stored: dict[str, int] | None


def describe(path: str, hub: Hub) -> dict[str, Any]:
    """Everything `monoblock info` shows, by name; all but the spec is ready for JSON. Sizes are in bytes."""
    from monoblock import AutoConfig
    from monoblock.quantization import recorded

    config = AutoConfig.from_pretrained(path, **hub.kwargs())
    spec = config.to_spec()
    contents = _local(Path(path)) if Path(path).is_dir() else _remote(path, hub)
    count = _parameters(config, spec)
    # A model that looks both ways keeps no cache.
    widths = CACHE_BYTES if spec.causal else {}
    per_token = {name: _cache_per_token(spec, width) for name, width in widths.items()}
    return {
        "family": config.model_type,
        "architectures": config.architectures or [],
        "spec": spec,
        "parameters": count,
        "stored": contents.stored,
        "quantization": how.to_dict() | {"summary": how.summary} if (how := recorded(config)) else None,
        "memory": {name: count * bits // 8 for name, bits in DTYPE_BITS.items()},
        "cache_per_token": per_token,
        "files": contents.files,
    }


def runtime(path: str, hub: Hub) -> dict[str, Any]:
    """The loaded model on the device that the other commands would take: how it decodes, or why it takes no fast path;
    its dtype and device, PyTorch's threads, and the native kernels' level."""
    import torch

    import monoblock
    from monoblock import AutoConfig, native
    from monoblock.cli.engine import device_map
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
    """How many numbers the model of the config's architecture has; without one, the bare model's."""
    from monoblock.families import family
    from monoblock.tree import parameters

    wanted = {name.lower() for name in config.architectures or []}  # the makers' files say MPTForCausalLM
    heads = [c.head for c in family(config.model_type).classes if c.name.lower() in wanted and c.head]
    head = config.to_head(heads[0]) if heads else None
    return sum(prod(shape) for shape in parameters(spec, head).values())


def _cache_per_token(spec: ArchSpec, item_bytes: int) -> int:
    """Keys and values of one token in all layers; a layer with a window stops growing when that is full."""
    return 2 * spec.attention.kv_heads * spec.attention.head_dim * spec.layers * item_bytes


def _local(folder: Path) -> Contents:
    from monoblock.checkpoint.header import read_header
    from monoblock.checkpoint.msgpack import read_msgpack

    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    headers = [read_header(folder / name) for name in files if name.endswith(".safetensors")]
    headers = headers or [read_msgpack(path) for path in sorted(folder.glob("flax_model*.msgpack"))]
    if not headers:
        return Contents(dict(files), None)
    stored: dict[str, int] = {}
    for entry in (entry for header in headers for entry in header.entries.values()):
        stored[entry.dtype] = stored.get(entry.dtype, 0) + prod(entry.shape)
    return Contents(dict(files), stored)


def _remote(name: str, hub: Hub) -> Contents:
    """The files of a model on the hub; of their content, only headers are fetched.

    Without the network there is nothing to list; the rest is known from config.json, so a note is enough.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    api = HfApi(token=hub.token)
    try:
        if hub.offline:
            raise ValueError("--offline")
        found = api.model_info(name, revision=hub.revision, files_metadata=True)
    except Exception as error:  # the classes depend on the HTTP library that huggingface_hub uses
        console.note(f"The files of {name} cannot be listed: {console.sentence(error)}")
        return Contents({}, None)
    files = {file.rfilename: file.size for file in found.siblings or []}
    try:
        counts = api.get_safetensors_metadata(name, revision=hub.revision).parameter_count
        stored = {str(dtype): count for dtype, count in counts.items()}
    except NotASafetensorsRepoError:
        stored = None
    return Contents(files, stored)


def _show(found: dict[str, Any], name: str) -> None:
    count, stored = found["parameters"], found["stored"]
    lines = [
        ("family", found["family"]),
        ("architectures", ", ".join(found["architectures"]) or "none named"),
        ("parameters", f"{count:,} ({_short(count)})"),
        (
            "stored",
            ", ".join(f"{n:,} {d}" for d, n in stored.items()) if stored else "no safetensors header to read",
        ),
        *([("packed", _packed(found["quantization"]))] if found["quantization"] else []),
        *((f"weights in {dtype}", _size(size)) for dtype, size in found["memory"].items()),
        *((f"cache per token in {dtype}", _size(size)) for dtype, size in found["cache_per_token"].items()),
        *((name.replace("_", " "), str(value)) for name, value in found.get("runtime", {}).items()),
        *(
            (f"file {file}", "size not known" if size is None else _size(size))
            for file, size in found["files"].items()
        ),
    ]
    console.rows(name, lines)
    print()
    print(found["spec"])


def _packed(how: dict[str, Any]) -> str:
    kept = ", ".join(how["modules_to_not_convert"] or ())
    return how["summary"] + (f"; not {kept}" if kept else "")


def _plain(value: Any) -> Any:
    """A spec as JSON-ready values; what may be one of several types says which."""
    if is_dataclass(value):
        parts = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        return {"type": type(value).__name__} | parts
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
