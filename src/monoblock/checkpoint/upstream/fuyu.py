"""Read and write Adept's release format of Fuyu: a training checkpoint, `model_optim_rng.pt`, and `adept_vocab.model`.

Source: https://github.com/persimmon-ai-labs/adept-inference and the names in transformers' conversion script.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from monoblock.checkpoint.array_adapters import import_torch
from monoblock.checkpoint.files import write_atomically
from monoblock.checkpoint.folder import copy_files
from monoblock.checkpoint.formats import (
    Checkpoint,
    Format,
    Options,
    assembled,
    causal_class,
    companions,
    local,
)
from monoblock.checkpoint.hub import WeightFiles
from monoblock.checkpoint.keymap import KeyMap, PerHead, Spelling, row
from monoblock.checkpoint.pickles import flat_tensors, unpickled
from monoblock.checkpoint.save import save_tensors
from monoblock.checkpoint.store import Store, open_store
from monoblock.checkpoint.upstream.pickled import PickledTensors
from monoblock.checkpoint.weights import Tensors, lazy_tensors
from monoblock.errors import CheckpointError, HubError
from monoblock.families.fuyu import FuyuConfig

WEIGHTS, VOCABULARY = "model_optim_rng.pt", "adept_vocab.model"
WEIGHTS_PATH = Path("mp_rank_00") / WEIGHTS
LAYER, EMBED = "language_model.encoder.layers.{i}.", "language_model.embedding.word_embeddings."
ENCODER = "vit_encoder.linear_encoder.weight"
HEAD_DIM = 64  # of the published model; in files with query norms, their shape gives it

# The vocabulary file does not name its bos and eos tokens; Adept's code uses the same token for both.
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "|ENDOFTEXT|",
    "eos_token": "|ENDOFTEXT|",
}


def keymap(config: FuyuConfig) -> KeyMap:
    """The key map of Adept's names."""
    head = "word_embeddings_for_head.{p}"
    per_head = PerHead(config.num_attention_heads)
    return KeyMap(
        rows=(
            row("embed.{p}", EMBED + "{p}"),
            row(
                "patch_embed.{p}",
                "vit_encoder.linear_encoder.{p}",
                "language_model.vit_encoder.linear_encoder.{p}",
            ),
            row("blocks.{i}.norm1.{p}", LAYER + "input_layernorm.{p}"),
            row(
                "blocks.{i}.attn.qkv.{p}",
                Spelling((LAYER + "self_attention.query_key_value.{p}",), per_head),
            ),
            row("blocks.{i}.attn.q_norm.{p}", LAYER + "self_attention.q_layernorm.{p}"),
            row("blocks.{i}.attn.k_norm.{p}", LAYER + "self_attention.k_layernorm.{p}"),
            row("blocks.{i}.attn.out.{p}", LAYER + "self_attention.dense.{p}"),
            row("blocks.{i}.norm2.{p}", LAYER + "post_attention_layernorm.{p}"),
            row("blocks.{i}.mlp.up.{p}", LAYER + "mlp.dense_h_to_4h.{p}"),
            row("blocks.{i}.mlp.down.{p}", LAYER + "mlp.dense_4h_to_h.{p}"),
            row("final_norm.{p}", "language_model.encoder.final_layernorm.{p}"),
        ),
        heads={"causal": (row("head.out.{p}", head, "language_model." + head),)},
        head="causal",
        prefix="",
        ignored=(r"rotary_emb\.inv_freq$", r"image_patch_projection"),
    )


def recognise(path: Path) -> bool:
    """Whether a path is a folder with a model_optim_rng.pt at any depth, or such a file under another name."""
    return bool(path.is_dir() and _weights_in(path)) or (
        path.is_file() and path.suffix in (".pt", ".pkl") and _is_adepts(unpickled(path, stand_ins=True))
    )


def _is_adepts(content: object) -> bool:
    model: Any = cast("dict[str, Any]", content).get("model") if isinstance(content, Mapping) else None
    return isinstance(model, Mapping) and "language_model" in str(list(cast("dict[str, Any]", model)))


def _weights_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob(WEIGHTS))


def read(path: Path) -> Checkpoint:
    """Read Adept's folder, as extracted from the tar file, or the weight file alone."""
    folder = path if path.is_dir() else path.parent
    files = (
        [path] if path.is_file() else _weights_in(path) or sorted([*path.glob("*.pt"), *path.glob("*.pkl")])
    )
    if len(files) != 1:
        found = f"{len(files)} of them (of several ranks?)" if files else "none"
        raise HubError(f"{path} is no release of Adept's: expected one {WEIGHTS}, found {found}")
    content = unpickled(files[0], stand_ins=True)
    if isinstance(content, Mapping):
        content = cast("dict[str, object]", content).get("model", cast(object, content))
    tensors = PickledTensors(flat_tensors(content, files[0]), files[0])
    config = config_of(tensors)
    found = companions(folder)
    if vocabulary := next(iter(sorted(folder.rglob(VOCABULARY))), None):
        found["tokenizer.model"] = vocabulary
    texts = {"preprocessor_config.json": _json(_image_config(config))}
    if "tokenizer.model" in found:
        texts["tokenizer_config.json"] = _json(TOKENIZER_CONFIG)
    return assembled(config, causal_class(config), tensors, keymap(config), found, texts=texts)


def _image_config(config: FuyuConfig) -> dict[str, Any]:
    """transformers' image processor config; omitted settings have their defaults."""
    return {
        "image_processor_type": "FuyuImageProcessor",
        "processor_class": "FuyuProcessor",
        "patch_size": {"height": config.patch_size, "width": config.patch_size},
    }


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def config_of(tensors: Tensors) -> FuyuConfig:
    """The config implied by the tensors' shapes; other fields are those of the published model."""
    names = set(tensors)

    def shape(name: str, size: int) -> tuple[int, ...]:
        if name not in names or len(tensors.shape(name)) != size:
            raise CheckpointError(
                f"the checkpoint lacks {name} of {size} axes: is it Adept's release of Fuyu?"
            )
        return tensors.shape(name)

    vocab, width = shape(EMBED + "weight", 2)
    first = LAYER.format(i=0)
    norm = first + "self_attention.q_layernorm.weight"
    head_dim = shape(norm, 1)[0] if norm in names else HEAD_DIM
    if width % head_dim:
        raise CheckpointError(
            f"the width {width} is not a multiple of the head size {head_dim}: is this Fuyu?"
        )
    layers = [name.split(".")[3] for name in names if name.startswith("language_model.encoder.layers.")]
    encoder = next(
        (n for n in names if n.endswith("vit_encoder.linear_encoder.weight")),
        "vit_encoder.linear_encoder.weight",
    )
    pixels = shape(encoder, 2)[1]
    patch = int((pixels // 3) ** 0.5)
    if pixels != 3 * patch**2:
        raise CheckpointError(f"{encoder} takes {pixels} inputs: expected a square patch of three channels")
    return FuyuConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=shape(first + "mlp.dense_h_to_4h.weight", 2)[0],
        num_hidden_layers=len(set(layers)),
        num_attention_heads=width // head_dim,
        patch_size=patch,
        qk_layernorm=norm in names,
    )


def write(folder: Path, checkpoint: Checkpoint, options: Options) -> None:
    """Write model_optim_rng.pt, nested as in Adept's release, and adept_vocab.model. Needs PyTorch.

    The tensors are written to a temporary safetensors file, which PyTorch maps, so that the model is never in memory.
    """
    if options.max_shard_size is not None:
        raise ValueError(f"max_shard_size={options.max_shard_size!r}: Adept's release is one file")
    torch = import_torch(f"writing {WEIGHTS}")
    config = checkpoint.config
    assert isinstance(config, FuyuConfig)
    _check(config)
    scratch = folder / "scratch"
    paths = save_tensors(
        scratch, lazy_tensors(checkpoint.weights, keymap(config)), framework="np", max_shard_size=2**62
    )
    store = open_store(WeightFiles(kind="safetensors", paths=tuple(paths)), "pt")
    (folder / WEIGHTS_PATH).parent.mkdir()
    write_atomically(folder / WEIGHTS_PATH, lambda path: torch.save({"model": _nested(store)}, path))
    for path in paths:
        path.unlink()
    scratch.rmdir()
    if "tokenizer.model" in checkpoint.companions:
        copy_files(folder, {VOCABULARY: checkpoint.companions["tokenizer.model"]})


def _nested(store: Store) -> dict[str, Any]:
    """The tensors as nested dicts; below the encoder, keys are full names with dots."""
    encoder = "language_model.encoder."
    model: dict[str, Any] = {}
    for name in store:
        *parents, last = (
            [*encoder[:-1].split("."), name.removeprefix(encoder)]
            if name.startswith(encoder)
            else name.split(".")
        )
        node = model
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = store.tensor(name)
    return model


def _check(config: FuyuConfig) -> None:
    """Refuse values that the format cannot express, since Adept's code fixes them."""
    plain = FuyuConfig()
    same = ("hidden_act", "rope_theta", "rope_scaling", "partial_rotary_factor", "layer_norm_eps")
    config.check({name: (getattr(plain, name),) for name in same})
    config.check({"tie_word_embeddings": (False,), "num_channels": (3,)})
    if not config.qk_layernorm:
        config.check({"num_attention_heads": (config.hidden_size // HEAD_DIM,)})


FORMAT = Format(
    name="fuyu",
    title="Adept's release of Fuyu",
    recognise=recognise,
    read=local(read),
    write=write,
    model_type="fuyu",
)
