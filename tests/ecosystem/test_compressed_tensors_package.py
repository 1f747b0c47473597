"""The matrices of tests/torch/test_compressed_tensors.py, decompressed by the compressed-tensors package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed_files import compressed

compressors = pytest.importorskip("compressed_tensors.compressors")
quantization = pytest.importorskip("compressed_tensors.quantization")

FORMS = [
    ("pack-quantized", 4, "group", 128, True),
    ("pack-quantized", 4, "group", 32, False),
    ("pack-quantized", 8, "channel", 128, True),
    ("pack-quantized", 4, "channel", 128, False),
    ("int-quantized", 8, "channel", 128, True),
    ("int-quantized", 8, "group", 128, False),
]


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_of_the_package(form: Any) -> None:
    layout, bits, strategy, size, symmetric = form
    tensors, weight = compressed(96, 256, *form, seed=1)
    group = size if strategy == "group" else None
    arguments = {
        "num_bits": bits,
        "type": "int",
        "strategy": strategy,
        "symmetric": symmetric,
        "group_size": group,
    }
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**arguments)
    )
    found = compressors.BaseCompressor.get_value_from_registry(layout).decompress(tensors, scheme)["weight"]
    assert torch.equal(found, torch.from_numpy(weight).to(found.dtype))
