"""Matrices of tests/torch/test_compressed_tensors.py and test_float8.py, decompressed by the compressed-tensors
package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed_files import compressed

from monoblock.checkpoint.dense_config import DenseDeclaration
from monoblock.checkpoint.dense_tensors import Float8Tensors
from monoblock.checkpoint.weights import StateTensors

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


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8(strategy: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(256, 384, generator=random).to(torch.float8_e4m3fn)
    shape = {"tensor": (1,), "channel": (256, 1), "block": (2, 3)}[strategy]
    tensors = {"weight": weight, "weight_scale": torch.rand(shape, generator=random).to(dtype)}
    block = (128, 128) if strategy == "block" else None
    arguments = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    weights = quantization.QuantizationArgs(**arguments, block_structure=list(block) if block else None)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = compressors.BaseCompressor.get_value_from_registry("float-quantized")
    expected = compressor.decompress(dict(tensors), scheme)["weight"]
    how = DenseDeclaration(source="compressed-tensors", per=strategy, block=block)
    renamed = StateTensors({f"x.{name}": tensor for name, tensor in tensors.items()})
    found = Float8Tensors(renamed, how, "pt").tensor("x.weight")
    assert torch.equal(found, expected.bfloat16())
