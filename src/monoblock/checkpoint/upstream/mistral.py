"""Read and write Mistral's release format: `consolidated*.safetensors` or `consolidated.NN.pth`, and `params.json`.

Source: https://github.com/mistralai/mistral-inference (model.py, args.py).
"""

import json
import re
from pathlib import Path
from typing import Any, cast

from monoblock import tree
from monoblock.checkpoint.files import read_json, write_atomically
from monoblock.checkpoint.folder import copy_files
from monoblock.checkpoint.formats import (
    Checkpoint,
    Format,
    Options,
    assembled,
    causal_class,
    companions,
    local,
    local_store,
)
from monoblock.checkpoint.keymap import Interleaved, KeyMap, Same, Spelling, Split, SplitEach, row
from monoblock.checkpoint.save import SINGLE, save_tensors
from monoblock.checkpoint.weights import ConcatenatedTensors, Tensors, lazy_tensors, stored_shapes
from monoblock.errors import CheckpointError, HubError, UnsupportedConfig
from monoblock.families.common import FULL, SLIDING, head_rows
from monoblock.families.mistral import MistralConfig
from monoblock.field_types import brief

PARAMS = "params.json"

# Fields of params.json -> fields of config.json.
FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "sliding_window": "sliding_window",
    "max_seq_len": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
}
ALONG = ("tokenizer.model", "tekken.json", "LICENSE", "NOTICE")
REQUIRED = ("dim", "n_layers", "hidden_dim", "n_heads", "norm_eps")
# Defaults of omitted fields. params.json has no context length; the first configs in transformers' format have 32768.
DEFAULTS = {"rope_theta": 10000.0, "sliding_window": None, "max_seq_len": 32768, "tied_embeddings": False}
# Further fields, and the values that have no effect (empty: any); other values, and other fields, are refused.
INERT: dict[str, tuple[Any, ...]] = {
    "max_batch_size": (),
    "model_type": ("transformer",),
    "causal": (True,),
    "use_biases": (False,),
}


def keymap(config: MistralConfig) -> KeyMap:
    """The key map of Mistral's names; RoPE channel pairs are interleaved."""
    spec = config.to_spec()
    att, width, layer = spec.attention, spec.mlp.width, "layers.{i}."
    kv = att.kv_heads * att.head_dim
    qkv = SplitEach(
        (att.heads * att.head_dim, kv, kv), (Interleaved(att.heads), Interleaved(att.kv_heads), Same())
    )
    names = tuple(f"{layer}attention.w{x}.{{p}}" for x in "qkv")
    gate_up = (layer + "feed_forward.w1.{p}", layer + "feed_forward.w3.{p}")
    return KeyMap(
        rows=(
            row("embed.{p}", "tok_embeddings.{p}"),
            row("blocks.{i}.norm1.{p}", layer + "attention_norm.{p}"),
            row("blocks.{i}.attn.qkv.{p}", Spelling(names, qkv)),
            row("blocks.{i}.attn.out.{p}", layer + "attention.wo.{p}"),
            row("blocks.{i}.norm2.{p}", layer + "ffn_norm.{p}"),
            row("blocks.{i}.mlp.gate_up.{p}", Spelling(gate_up, Split((width, width)))),
            row("blocks.{i}.mlp.down.{p}", layer + "feed_forward.w2.{p}"),
            row("final_norm.{p}", "norm.{p}"),
        ),
        heads=head_rows(causal="output"),
        head="causal",
        prefix="",
        ignored=(r"^rope\.freqs$",),
    )


def config_of(params: dict[str, Any], where: Path) -> MistralConfig:
    """The config of a params.json; UnsupportedConfig names an unsupported field."""
    if missing := [name for name in REQUIRED if name not in params]:
        raise CheckpointError(
            f"{where} lacks {', '.join(missing)}: is it the params.json of a Mistral model?"
        )
    for name, value in params.items():
        if name not in FIELDS and value is not None and not _inert(name, value):
            raise UnsupportedConfig(
                f"{where}: {name}={value!r} is not supported: only Mistral's dense text models are"
            )
    fields = {**DEFAULTS, "n_kv_heads": params["n_heads"], **params}
    window, kinds = fields["sliding_window"], None
    if isinstance(window, str) and window.isdigit():  # some files store it as a string
        fields["sliding_window"] = int(window)
    elif isinstance(window, list):
        listed = cast("list[Any]", window)
        fields["sliding_window"], kinds = _by_layer(listed, fields["n_layers"], where)
    elif window is not None and not isinstance(window, int):
        raise UnsupportedConfig(
            f"{where}: sliding_window={brief(window)} is not supported: expected a number, null, or a list of these"
        )
    return MistralConfig(
        **{ours: fields[theirs] for theirs, ours in FIELDS.items() if theirs in fields}, layer_types=kinds
    )


def _by_layer(windows: list[Any], layers: Any, where: Path) -> tuple[int | None, list[str]]:
    """The window and the kind of each layer, from a list that is repeated over the layers (null: full attention)."""
    sizes = sorted({size for size in windows if isinstance(size, int)})
    if (
        len(sizes) > 1
        or any(size is not None and type(size) is not int for size in windows)
        or not (isinstance(layers, int) and windows and layers % len(windows) == 0)
    ):
        raise UnsupportedConfig(
            f"{where}: sliding_window={brief(windows)} is not supported: a list may hold one number and null, and its "
            f"length must divide n_layers ({brief(layers)})"
        )
    kinds = [FULL if size is None else SLIDING for size in windows] * (layers // len(windows))
    return (sizes or [None])[0], kinds


def _inert(name: str, value: Any) -> bool:
    return name in INERT and (not INERT[name] or value in INERT[name])


def recognise(path: Path) -> bool:
    """Whether a path is a folder with params.json and consolidated weights."""
    return path.is_dir() and (path / PARAMS).is_file() and bool(_weight_files(path))


def read(path: Path) -> Checkpoint:
    """Read a folder in Mistral's format, with its tokenizer files."""
    if not (path / PARAMS).is_file() or not (files := _weight_files(path)):
        raise HubError(
            f"{path} is no release of Mistral's: expected {PARAMS} and consolidated.safetensors or consolidated.NN.pth"
        )
    params = read_json(path / PARAMS)
    stores: list[Tensors] = [local_store([file]) for file in files]
    if not isinstance(params.get("vocab_size"), int) or params["vocab_size"] < 1:
        params["vocab_size"] = _vocab(stores, path)
    config = config_of(params, path / PARAMS)
    names = keymap(config)
    row = causal_class(config)
    found = companions(path)
    # Later releases append a version to the name.
    versions = [name for name in found if re.fullmatch(r"tokenizer\.model\.v\d+", name)]
    if versions and "tokenizer.model" not in found:
        found["tokenizer.model"] = found[versions[-1]]
    return assembled(config, row, _merged(stores, files, config, names), names, found)


def _weight_files(folder: Path) -> list[Path]:
    """The consolidated files; safetensors are preferred to pickles."""
    for pattern in ("consolidated*.safetensors", "consolidated*.pth"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def _vocab(stores: list[Tensors], path: Path) -> int:
    found = [
        store.shape("tok_embeddings.weight") for store in stores if "tok_embeddings.weight" in list(store)
    ]
    if len(found) != 1:
        raise CheckpointError(f"{path / PARAMS} lacks vocab_size, and the weights do not imply it: add it")
    return found[0][0]


def _merged(stores: list[Tensors], files: list[Path], config: MistralConfig, names: KeyMap) -> Tensors:
    """The tensors of several files: tensor-parallel shards if all have the same names, else disjoint tensors."""
    if len(stores) == 1 or set(stores[0]).isdisjoint(stores[1]):
        return local_store(files)
    for store, file in zip(stores, files, strict=True):
        if set(store) != set(stores[0]):
            raise CheckpointError(
                f"{file} does not hold the same tensors as {files[0].name}: is a file missing?"
            )
    expected: dict[str, tuple[int, ...]] = {}
    for canonical, shape in tree.parameters(config.to_spec(), config.to_head("causal")).items():
        source = names.source(canonical)
        expected |= dict(zip(source.names, stored_shapes(source.op, shape), strict=True))
    return ConcatenatedTensors(stores, expected)


def write(folder: Path, checkpoint: Checkpoint, options: Options) -> None:
    """Write consolidated.safetensors (shards only if `max_shard_size` is given), params.json and tokenizer files."""
    config = checkpoint.config
    assert isinstance(config, MistralConfig)
    config.check({"hidden_act": ("silu",), "rope_scaling": (None,)})
    spec = config.to_spec()
    values = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    values |= {"head_dim": spec.attention.head_dim, "n_kv_heads": spec.attention.kv_heads}
    values["sliding_window"] = list(spec.windows) if len(set(spec.windows)) > 1 else spec.windows[0]
    params = {
        name: value for name, value in values.items() if name in REQUIRED or value != DEFAULTS.get(name, ...)
    }
    tensors = lazy_tensors(checkpoint.weights, keymap(config))
    size = options.max_shard_size or 2**62  # Mistral's code reads one file
    for path in save_tensors(folder, tensors, framework="np", max_shard_size=size):
        if path.name == SINGLE:
            path.rename(folder / "consolidated.safetensors")
        elif path.suffix == ".json":
            path.unlink()  # Mistral's releases have no index
        else:
            path.rename(folder / path.name.replace("model-", "consolidated-"))
    copy_files(folder, {n: path for n, path in checkpoint.companions.items() if n.startswith(ALONG)})
    text = json.dumps(params, indent=4) + "\n"
    write_atomically(folder / PARAMS, lambda path: path.write_text(text, encoding="utf-8"))


FORMAT = Format(
    name="mistral",
    title="Mistral's consolidated weights",
    recognise=recognise,
    read=local(read),
    write=write,
    model_type="mistral",
)
