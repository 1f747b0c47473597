"""What a folder or a model on the hub is, told from its files' names, where it is not one that loads as it is."""

import re
from collections.abc import Collection

ADAPTER = "adapter_config.json"
SENTENCE_TRANSFORMERS = "modules.json"

_SHARD = re.compile(r"(model|pytorch_model|flax_model|tf_model)-\d{5}-of-\d{5}\.(\w+)")
_VARIANT = re.compile(r"(?:model|pytorch_model)\.([\w-]+?)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)")
_RELEASE = re.compile(r"consolidated([.-][\w-]+)?\.(safetensors|pth)")


def explained(names: Collection[str]) -> str | None:
    """A sentence on what files of these names are, and what to do with them; None for nothing known."""
    for name in sorted(names):
        if name.endswith(".gguf"):
            return (
                f"it holds a GGUF file ({name}), a format that is not read here: take the model's safetensors"
            )
    if ADAPTER in names and "config.json" not in names:
        return (
            f"it holds an adapter of the peft package ({ADAPTER}), not a model: PyTorch's classes load it with its "
            "base model, and model.load_adapter() puts it into one"
        )
    for name in sorted(names):
        if _RELEASE.fullmatch(name):
            return (
                f"it holds weights as their makers release them ({name}): `monoblock convert` makes a folder of it "
                "that loads"
            )
    for name in sorted(names):
        if shard := _SHARD.fullmatch(name):
            index = f"{shard[1]}.{shard[2]}.index.json"
            if index not in names:
                return f"it holds shards ({name}, ...) without their index, {index}: fetch that file too"
    for name in sorted(names):
        if variant := _VARIANT.fullmatch(name):
            return f"its weights are the variant {variant[1]!r} ({name}): load it with variant={variant[1]!r}"
    return None
