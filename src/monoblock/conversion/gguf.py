"""Writes Mistral and MPT models as GGUF files, for llama.cpp, tensor by tensor through the `gguf` package."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np

from monoblock import families
from monoblock.checkpoint import casts
from monoblock.checkpoint.files import read_json, write_atomically
from monoblock.checkpoint.folder import unpacked
from monoblock.checkpoint.formats import Checkpoint, Options
from monoblock.checkpoint.gguf.config import model_config
from monoblock.checkpoint.gguf.files import GgufFiles
from monoblock.checkpoint.gguf.header import TYPES, GgufHeader, GgufTensor
from monoblock.checkpoint.gguf.tensors import INTERLEAVED, NAMES, file_order
from monoblock.checkpoint.hub import HubOptions
from monoblock.checkpoint.save import LazyTensor
from monoblock.checkpoint.weights import lazy_tensors
from monoblock.conversion.convert import Progress, Result, open_source, pooled
from monoblock.conversion.k_quants import BLOCK, encode_q4_k
from monoblock.errors import CheckpointError, UnsupportedConfig
from monoblock.generation.config import GENERATION_CONFIG_NAME
from monoblock.spec import Alibi, ArchSpec, Learned, Rotary

log = logging.getLogger("monoblock")

# Type of the matrices -> ggml's type, and llama.cpp's number of such a file.
KINDS = {
    "f16": ("F16", 1),
    "bf16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
    "q4_0": ("Q4_0", 2),
    "q4_k": ("Q4_K", 14),
}
ARCHITECTURES = {"mistral": "llama", "mpt": "mpt"}
_BLOCK = 32  # weights of a block of Q8_0 and Q4_0
_CHUNK = 1 << 22  # weights that are converted at a time
# Fields of a spec without effect on inference.
_TRAINING = ("dropout", "init_std", "embed_gradient")


@dataclass(frozen=True, kw_only=True)
class GgufOptions:
    """Options of `convert_to_gguf`. `kind`: the type of the matrices, "f16", "bf16", "q8_0", "q4_0" or "q4_k". The
    others as in `Options`."""

    kind: str
    source_format: str = "auto"
    kv_heads: int | None = None
    force: bool = False
    hub: HubOptions = field(default_factory=HubOptions)


def convert_to_gguf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: GgufOptions,
    progress: Progress | None = None,
) -> Result:
    """Write a checkpoint as one GGUF file, atomically, with its tokenizer and chat template.

    Vectors and position tables are float32; in "q4_0" and "q4_k" the embedding and the head are Q8_0, and in "q4_k"
    rows that are no multiple of 256 weights; rows that are no multiple of 32 weights are F16. UnsupportedConfig: the
    family, an option of the architecture, or the tokenizer has no form in GGUF. ImportError: the `gguf` package is not
    installed. Others as `convert`.
    """
    if options.kind not in KINDS:
        raise ValueError(f"kind={options.kind!r}: expected one of {', '.join(KINDS)}")
    package = _package()
    path = Path(target).expanduser()
    if path.exists() and not options.force:
        raise CheckpointError(f"{path} exists: choose another name, or replace it with --force (force=True)")
    with ExitStack() as stack:
        asked = Options(source_format=options.source_format, hub=options.hub)
        opened, found = open_source(source, asked, lambda given: stack.enter_context(unpacked(given, path)))
        checkpoint = found.read(opened, options.hub)
        if options.kv_heads is not None:
            checkpoint = pooled(checkpoint, options.kv_heads)
        plan = _plan(checkpoint, options.kind)
        metadata = _metadata(checkpoint, plan, options.kind, path.stem)
        metadata |= _tokenizer(opened, checkpoint, options.hub)
        _check(checkpoint, metadata, plan, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: _write(package, file, metadata, plan, progress or _silent))
    return Result(
        source_format=found.name,
        target_format="gguf",
        architecture=checkpoint.row.name,
        dtype=options.kind,
        parameters=sum(prod(shape) for shape in checkpoint.weights.shapes().values()),
        files=(path.name,),
        left_out=checkpoint.left_out,
        comparison=None,
    )


def _silent(done: int, of: int, what: str) -> None:
    del done, of, what


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError('writing GGUF needs the gguf package: pip install "monoblock[gguf]"') from error


# ---------------------------------------------------------------------- tensors


@dataclass(frozen=True, kw_only=True)
class _Written:
    """A tensor to write: its ggml type, the tensor, and the order of its rows (None: as it is)."""

    type: str
    tensor: LazyTensor
    order: Any


def _plan(checkpoint: Checkpoint, kind: str) -> dict[str, _Written]:
    """The tensors by ggml's names, in the order of writing."""
    architecture = ARCHITECTURES.get(checkpoint.config.model_type)
    if architecture is None or checkpoint.row.head != "causal":
        raise UnsupportedConfig(
            f"a {checkpoint.row.name} cannot be written as GGUF: only causal {' and '.join(ARCHITECTURES)} models can"
        )
    config: Any = checkpoint.config
    if architecture == "mpt" and not config.attn_config.fused_qkv:
        config = config.changed()[0]
        config.attn_config.fused_qkv = True
    keymap = checkpoint.family.keymap(config, checkpoint.row.head)
    attention = checkpoint.config.to_spec().attention
    heads = {"attn_q": attention.heads, "attn_k": attention.kv_heads}
    plan: dict[str, _Written] = {}
    for name, tensor in lazy_tensors(checkpoint.weights, keymap).items():
        own = _ggml_name(architecture, name)
        module = own.split(".")[-2]
        order = None
        if module in INTERLEAVED.get(architecture, ()):
            order = np.argsort(file_order(tensor.shape[0], heads[module]))
        plan[own] = _Written(type=_type(own, tensor.shape, kind), tensor=tensor, order=order)
    return plan


def _ggml_name(architecture: str, name: str) -> str:
    for module, stem in NAMES[architecture].items():
        pattern = re.escape(stem).replace(r"\{i\}", r"(?P<i>\d+)")
        if match := re.fullmatch(rf"{pattern}\.(?P<leaf>weight|bias)", name):
            block = f"blk.{match['i']}." if "{i}" in stem else ""
            return f"{block}{module}.{match['leaf']}"
    raise UnsupportedConfig(f"{name} has no name in GGUF's architecture {architecture!r}")


def _type(name: str, shape: tuple[int, ...], kind: str) -> str:
    own = KINDS[kind][0]
    if len(shape) == 1 or name.startswith("position_embd"):
        return "F32"
    if own.startswith("Q") and shape[1] % _BLOCK:
        return "F16"
    outside = own.startswith("Q4") and name in ("token_embd.weight", "output.weight")
    return "Q8_0" if outside or (own == "Q4_K" and shape[1] % BLOCK) else own


def _write(
    package: Any, path: Path, metadata: dict[str, Any], plan: dict[str, _Written], progress: Progress
) -> None:
    values = package.GGUFValueType
    kinds = {bool: values.BOOL, int: values.UINT32, float: values.FLOAT32, str: values.STRING}
    writer = package.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":  # the writer adds it
            continue
        if isinstance(value, list):
            first = cast("list[Any]", value)[0]
            inner = values.INT32 if isinstance(first, int) else kinds[type(first)]
            writer.add_key_value(key, value, values.ARRAY, sub_type=inner)
        else:
            writer.add_key_value(key, value, kinds[type(value)])
    for name, written in plan.items():
        kind = package.GGMLQuantizationType[written.type]
        writer.add_tensor_info(
            name, written.tensor.shape, np.dtype(np.float32), _bytes(written), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, (name, written) in enumerate(plan.items()):
        progress(done, len(plan), "writing")
        writer.write_tensor_data(_converted(package, name, written))
    writer.close()
    progress(len(plan), len(plan), "writing")


def _bytes(written: _Written) -> int:
    block, width = next((block, width) for name, block, width in TYPES.values() if name == written.type)
    return prod(written.tensor.shape) // block * width


def _converted(package: Any, name: str, written: _Written) -> Any:
    """The tensor's bytes in its type, converted some rows at a time."""
    array = written.tensor.make()
    if written.order is not None:
        array = array[written.order]
    if written.type in ("F32", "F16", "BF16"):
        return np.ascontiguousarray(casts.cast(array, written.type, name)).view(np.uint8)
    made = np.empty(_bytes(written), np.uint8).reshape(array.shape[0], -1)
    step = max(1, _CHUNK // array.shape[1])
    for first in range(0, len(array), step):
        rows = casts.widened(array[first : first + step]).astype(np.float32, copy=False)
        if not np.isfinite(rows).all():
            raise CheckpointError(f"{name} has weights that are not finite: it cannot be quantised")
        made[first : first + step] = (
            encode_q4_k(rows)
            if written.type == "Q4_K"
            else package.quantize(rows, package.GGMLQuantizationType[written.type])
        )
    return made


# ---------------------------------------------------------------------- metadata


def _metadata(checkpoint: Checkpoint, plan: dict[str, _Written], kind: str, name: str) -> dict[str, Any]:
    """The entries of the architecture."""
    spec, architecture = checkpoint.config.to_spec(), ARCHITECTURES[checkpoint.config.model_type]
    config: Any = checkpoint.config
    attention = spec.attention
    own: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": spec.width,
        "block_count": spec.layers,
        "feed_forward_length": spec.mlp.width,
        "vocab_size": spec.vocab,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads,
    }
    if architecture == "llama":
        own |= {
            "attention.key_length": attention.head_dim,
            "attention.value_length": attention.head_dim,
            "attention.layer_norm_rms_epsilon": float(spec.norm.eps),
            "rope.dimension_count": attention.head_dim,
            **_rope(spec),
        }
        windows = {window for window in spec.windows if window is not None}
        if windows:
            own["attention.sliding_window"] = max(windows)
            log.warning(
                "llama.cpp ignores the sliding window of %d tokens in the architecture llama: longer texts differ",
                max(windows),
            )
    else:
        alibi = spec.position(Alibi)
        own["attention.layer_norm_epsilon"] = float(spec.norm.eps)
        own["attention.max_alibi_bias"] = float(alibi.bias_max) if alibi else 0.0
        if attention.clip:
            own["attention.clamp_kqv"] = float(attention.clip)
        if (table := spec.position(Learned)) is not None and table.size != own["context_length"]:
            raise UnsupportedConfig("a position table of another size than the context has no form in GGUF")
    general = {
        "general.architecture": architecture,
        "general.name": name,
        "general.file_type": KINDS[kind][1],
    }
    if any(written.type.startswith("Q") for written in plan.values()):
        general["general.quantization_version"] = 2
    return general | {f"{architecture}.{key}": value for key, value in own.items()}


def _rope(spec: ArchSpec) -> dict[str, Any]:
    rotary = spec.position(Rotary)
    assert rotary is not None
    found: dict[str, Any] = {"rope.freq_base": float(rotary.theta)}
    scaling = rotary.scaling
    if scaling is None:
        return found
    if scaling.kind not in ("linear", "yarn"):
        raise UnsupportedConfig(
            f"RoPE scaling {scaling.kind!r} has no form in GGUF: only linear and yarn have"
        )
    found |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
    if scaling.kind == "yarn":
        found["rope.scaling.original_context_length"] = scaling.original_length
        found["rope.scaling.yarn_beta_fast"] = float(scaling.beta_fast)
        found["rope.scaling.yarn_beta_slow"] = float(scaling.beta_slow)
    return found


def _tokenizer(source: Path | str, checkpoint: Checkpoint, hub: HubOptions) -> dict[str, Any]:
    from monoblock.tokenization import AutoTokenizer
    from monoblock.tokenization.gguf_metadata import tokenizer_metadata

    options = {name: value for name, value in dataclasses.asdict(hub).items() if value}
    tokenizer = AutoTokenizer.from_pretrained(source, config=checkpoint.config, **options)
    found = tokenizer_metadata(tokenizer, checkpoint.config.to_spec().vocab)
    ends: Any = checkpoint.config.eos_token_id
    if (path := checkpoint.companions.get(GENERATION_CONFIG_NAME)) is not None:
        ends = read_json(path).get("eos_token_id", ends)
    first = found.get("tokenizer.ggml.eos_token_id")
    listed = cast("list[Any]", ends) if isinstance(ends, list) else [ends]
    others = [end for end in listed if isinstance(end, int) and end != first]
    if others:
        found["tokenizer.ggml.eot_token_id"] = others[0]
    if len(others) > 1:
        log.warning("GGUF has no place for the ends of text %s: they are left out", others[1:])
    return found


def _check(checkpoint: Checkpoint, metadata: dict[str, Any], plan: dict[str, _Written], path: Path) -> None:
    """UnsupportedConfig if the file would be read as another architecture than the checkpoint's."""
    tensors = {
        name: GgufTensor(path=path, type=written.type, shape=written.tensor.shape, begin=0, end=0)
        for name, written in plan.items()
    }
    header = GgufHeader(path=path, metadata=metadata, tensors=tensors)
    found = model_config(GgufFiles(headers=(header,), tensors=tensors))
    read = families.family(found["model_type"]).config.from_dict(found).to_spec()
    _compare(checkpoint.config.to_spec(), read, "")


def _compare(wanted: Any, found: Any, where: str) -> None:
    for item in dataclasses.fields(wanted):
        one, other = getattr(wanted, item.name), getattr(found, item.name)
        if item.name in _TRAINING or one == other:
            continue
        if isinstance(one, float) and isinstance(other, float) and abs(one - other) <= 1e-6 * abs(one):
            continue  # float32 in the file
        if dataclasses.is_dataclass(one) and type(one) is type(other):
            _compare(one, other, f"{where}{item.name}.")
            continue
        raise UnsupportedConfig(
            f"this model has no form in GGUF: its {where}{item.name} is {one}, and the file would mean {other}"
        )
