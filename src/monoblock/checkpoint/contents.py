"""Explanations, from file names, of why a folder or hub repository does not load as a model."""

import re
from collections.abc import Collection

ADAPTER = "adapter_config.json"
SENTENCE_TRANSFORMERS = "modules.json"

_SHARD = re.compile(r"(model|pytorch_model|flax_model|tf_model)-\d{5}-of-\d{5}\.(\w+)")
_VARIANT = re.compile(r"(?:model|pytorch_model)\.([\w-]+?)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)")
_RELEASE = re.compile(r"consolidated([.-][\w-]+)?\.(safetensors|pth)")


def explained(names: Collection[str]) -> str | None:
    """What a folder with these file names holds and how to load it; None if no known case applies."""
    for name in sorted(names):
        if name.endswith(".gguf"):
            return f"it holds a GGUF file ({name}): load it with gguf_file={name!r}, or give the file's path"
    if ADAPTER in names and "config.json" not in names:
        return (
            f"it holds a PEFT adapter ({ADAPTER}), not a model: the PyTorch classes load it together with its "
            "base model, and model.load_adapter() adds it to a loaded one"
        )
    for name in sorted(names):
        if _RELEASE.fullmatch(name):
            return f"it holds weights in their original release format ({name}): convert them with `monoblock convert`"
    for name in sorted(names):
        if shard := _SHARD.fullmatch(name):
            index = f"{shard[1]}.{shard[2]}.index.json"
            if index not in names:
                return f"it holds shards ({name}, ...) but not their index {index}: download that file too"
    for name in sorted(names):
        if variant := _VARIANT.fullmatch(name):
            return f"its weights are the variant {variant[1]!r} ({name}): load it with variant={variant[1]!r}"
    return None
