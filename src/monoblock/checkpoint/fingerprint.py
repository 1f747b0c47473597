"""A fingerprint of a weight file, for formats whose files cannot carry the id of the save that wrote them (msgpack)."""

import hashlib
from pathlib import Path

FINGERPRINTS = "fingerprints"  # the key in an index's metadata: file name -> fingerprint

_SAMPLES = 64
_SAMPLE = 4096  # bytes


def fingerprint(path: Path) -> str:
    """Hash of the file's size and of 64 samples of 4 KiB at equal distances (of all bytes of a smaller file).

    Two saves of a model in training differ in nearly every weight, so the samples tell them apart, and reading them
    costs the same for a file of any size.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLE:
            digest.update(file.read(size))
        else:
            for i in range(_SAMPLES):
                file.seek((size - _SAMPLE) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
