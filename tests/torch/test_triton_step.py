"""Triton kernels of the decode step in Triton's interpreter; see test_packed_gpu.py."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from measure import assert_close
from mpt_cases import CASES, mpt_model
from test_graphs import state_of
from tiny_families import CLASSES as FAMILY_OF
from tiny_families import GENERATING, fields, monoblock_model

from monoblock.backends.pytorch.generation import static_step
from monoblock.backends.pytorch.kernels import attention_cuda

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter is slow: what the kernels have to tell apart, no more.
MODELS = (*GENERATING, "alibi_bias_max", "all at once", "multiquery", "rope, llama3", "score cap")


def scores(module: Any, device_types: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Of 8 tokens, one after the other: windows' slots come round, one row has padding before it. The keys before the
    first are zeros, for both."""
    monkeypatch.setattr(static_step, "TRITON", device_types)
    state = state_of(module, length=64, position=12)
    assert state.valid_bl is not None
    state.valid_bl[1, :14] = False
    found = []
    for token in range(8):
        state.ids_b1.copy_(torch.tensor([[5 + token], [60 - token]]))
        found.append(static_step.static_step(module, state))
    # The second row's first tokens are padding: they see nothing, and what they say means nothing.
    return torch.cat([torch.stack(found)[:, 0], torch.stack(found)[2:, 1]])


@pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="needs triton and TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_step_in_the_interpreter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cuda, "FEWEST_KEYS", 16)
    module = mpt_model(name) if name in CASES else monoblock_model(name, **fields(FAMILY_OF[name]))
    plain = scores(module, (), monkeypatch)
    assert_close("kernels", scores(module, ("cpu",), monkeypatch), plain, 2e-5)  # fp32; measured 4e-6


ARGUMENTS = {
    "_write": "q:t k:t v:t rotated:t keys:t values:t cos:t sin:t position:i64 q_row k_row v_row angle_row slots",
    "_partial": "rotated:t keys:t values:t slopes:fp32 valid:i1 position:i64 out:fp32 log:fp32 scale:s softcap:s slots "
    "split_size window length",
    "_combine": "out:fp32 log:fp32 y:t splits",
}
CONSTANTS: dict[str, dict[str, Any]] = {
    "_write": {"H": 32, "G": 8, "D": 128, "ROTARY": 128, "WIDTH": 128},
    "_partial": {"R": 4, "G": 8, "D": 128, "WIDTH": 128, "KEYS": 64, "QUERIES": 16}
    | {"ALIBI": True, "CAPPED": True, "WINDOWED": True, "PADDED": True},
    "_combine": {"D": 128, "WIDTH": 128, "SPLITS": 16},
}


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs triton, and TRITON_INTERPRET not to be set")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kernel", ARGUMENTS)
def test_kernels_compile_for_gpus(kernel: str, dtype: str, capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from monoblock.backends.pytorch.kernels import triton_step

    function = getattr(triton_step, kernel)
    signature = {}
    for argument in ARGUMENTS[kernel].split():
        name, _, kind = argument.partition(":")
        if kind == "s":
            signature[name] = "fp32"
        else:
            signature[f"{name}_ptr" if kind else name] = "*" + {"t": dtype}.get(kind, kind) if kind else "i32"
    signature |= dict.fromkeys(CONSTANTS[kernel], "constexpr")
    assert list(signature) == function.arg_names
    constants = {(function.arg_names.index(name),): value for name, value in CONSTANTS[kernel].items()}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"]
    assert ("mma.sync" in made.asm["ptx"]) == (kernel == "_partial" and dtype != "fp32")
