"""The fingerprint of a model's folder, by which a run and an index know their model again."""

from __future__ import annotations

import hashlib
import re

from monoblock.checkpoint.contents import SENTENCE_TRANSFORMERS
from monoblock.checkpoint.fingerprint import fingerprint
from monoblock.checkpoint.hub import HubOptions, find_file

# Configs, tokenizers and weights, but not other files that may lie in the folder.
_FILES = re.compile(
    r"(\w*config|config_\w+|modules|tokenizer|vocab|merges|added_tokens|special_tokens_map|spiece|tekken)"
    r"\.(json|txt|model)|[\w-]*model[\w.-]*\.(safetensors|bin|msgpack|h5)"
)
_WHOLE = 1 << 20  # bytes up to which a file is hashed as a whole
_COMMIT = re.compile(r"[0-9a-f]{40}")


def model_fingerprint(source: str, options: HubOptions) -> str:
    """The commit of a model on the hub; of a folder, a hash of its configs, tokenizer and samples of its weights."""
    found = find_file(source, SENTENCE_TRANSFORMERS, options, required=False)
    found = found or find_file(source, "config.json", options)
    assert found is not None
    folder = found.parent
    if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
        return folder.name
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if _FILES.fullmatch(path.name) and path.is_file():
            small = path.stat().st_size <= _WHOLE
            content = hashlib.blake2b(path.read_bytes()).hexdigest() if small else fingerprint(path)
            digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\0".encode())
    return digest.hexdigest()
