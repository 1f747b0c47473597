"""Loading quantised matrices from a checkpoint's files, and the tensors of a quantised model by file names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from monoblock import tree
from monoblock.backends.pytorch import loading
from monoblock.backends.pytorch.base import ModelBase
from monoblock.backends.pytorch.parts import replace
from monoblock.backends.pytorch.quantization import formats
from monoblock.backends.pytorch.quantization.formats import QuantizedTensor
from monoblock.backends.pytorch.quantization.modules import QuantizedMatrix, quantized_module
from monoblock.backends.pytorch.quantization.quantize import Quantizer, matrices
from monoblock.checkpoint import quantized
from monoblock.checkpoint.bnb_tensors import FourBitTensors
from monoblock.checkpoint.dense_tensors import Float8Tensors
from monoblock.checkpoint.keymap import Same, TensorSource, Transposed
from monoblock.checkpoint.matching import LoadReport, match_tensors
from monoblock.checkpoint.packed import TWO_LEVEL, ZERO_POINTS
from monoblock.checkpoint.quantized_view import QuantizedView
from monoblock.checkpoint.weights import Tensors
from monoblock.errors import CheckpointError, ShapeMismatch
from monoblock.quantization import LOSSLESS, QuantizationConfig, WeightOnlyConfig, stored_quantization

log = logging.getLogger("monoblock")


Device = Callable[[str], torch.device]


def load(
    model: ModelBase,
    store: Tensors,
    dtype: torch.dtype,
    device: Device,
    asked: QuantizationConfig | None,
    *,
    strict: bool = True,
) -> LoadReport:
    """Load the quantised matrices of the files into the model; the report lists unused ones.

    CheckpointError: they do not fit, or config.json has no quantization_config. ValueError: `asked` is another
    quantisation.
    """
    if not quantized.is_quantized(store):
        return LoadReport()
    if (how := stored_quantization(model.config)) is None:
        raise CheckpointError(
            f"{model.name_or_path or 'the checkpoint'} has quantised weights, but its config.json has no "
            "quantization_config: restore it"
        )
    if asked is not None and asked != how:
        raise ValueError(
            f"the checkpoint's weights are already quantised, by {how}: leave quantization_config out, or load the "
            "unquantised weights"
        )
    parts = {name: quantized.component(store, name) for name in quantized.COMPONENTS}
    keymap, tied = quantized.by_rows(model.keymap()), tree.tied(model.spec, model.head_spec)
    shapes, own = model.shapes(), {name: quantized_source(s) for name, s in model.sources().items()}
    allowed = set(matrices(model))
    names = [c for c, s in own.items() if c.endswith(".weight") and s.names[0].rpartition(".")[0] in allowed]
    held = keymap.match(names, parts["codes"], tied).sources
    kinds = {kind: keymap.match(held, parts[kind], tied).sources for kind in ("scale", "low")}
    expected: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in quantized.COMPONENTS}
    for canonical, source in held.items():
        rows, columns = shapes[canonical]
        if isinstance(store, QuantizedView):
            _check_inputs(store, source, columns)
        has = {kind: canonical in sources for kind, sources in kinds.items()}
        bits, group, two_level = _form(source.names[0], parts, has, how, columns)
        for part, shape in formats.shapes(bits, group, rows, columns, has["low"], two_level).items():
            expected[part][canonical] = shape
    found = {
        part: match_tensors(parts[part], keymap, shapes, tied, ignore_mismatched_sizes=False, strict=strict)
        for part, shapes in expected.items()
    }
    for canonical in held:
        here = own[canonical]
        where = device(here.names[0])
        parameter_tensors = {
            part: loading.parameter_tensors(
                here,
                sources[canonical],
                parts[part],
                expected[part][canonical],
                _dtype(parts[part], sources[canonical], part),
                where,
            )
            for part in formats.DTYPES
            if canonical in (sources := found[part][0])
        }
        for i, name in enumerate(here.names):
            path = name.rpartition(".")[0]
            tensors = {part: split.parts[i] for part, split in parameter_tensors.items()}
            module = model.get_submodule(path)
            matrix = QuantizedTensor.of(tensors, shapes[canonical][1])
            replace(model, path, quantized_module(module, matrix, dtype))
        for part, split in parameter_tensors.items():
            if split.whole is not None:
                loading.register_fused(
                    model, [f"{name.rpartition('.')[0]}.{part}" for name in here.names], split.whole
                )
    model.quantization_config = how
    report = found["codes"][1]
    unused, extra = ([f"{name}.codes" for name in names] for names in (report.unused, report.extra))
    return LoadReport(unused=unused, extra=extra)


def _check_inputs(store: QuantizedView, source: TensorSource, columns: int) -> None:
    """ShapeMismatch: a matrix has another number of inputs, which its padded codes may not show."""
    for name in source.names:
        if (inputs := store.inputs(name)) != columns:
            raise ShapeMismatch(
                f"{name} in {store.path(f'{name}.codes').name} has {inputs} inputs, but the model needs {columns}: do "
                "config.json and the weights belong together?"
            )


def _form(
    name: str,
    parts: Mapping[str, Tensors],
    has: Mapping[str, bool],
    how: WeightOnlyConfig,
    inputs: int,
) -> tuple[int, int, bool]:
    """Bits and group of a stored matrix, and whether its scales have two levels. Of matrices that another tool
    quantised, its tensors tell them; of others the config tells the group, and which tensors there are the bits."""
    if how.source is None:
        return 4 if has["low"] else 8 if has["scale"] else LOSSLESS, how.group_size, False
    two_level = has["scale"] and parts["scale"].dtype(name) == TWO_LEVEL
    widths = [parts[part].shape(name) for part in ("codes", "scale") if part == "codes" or has["scale"]]
    try:
        if any(len(shape) != 2 for shape in widths):
            raise ValueError("its tensors are no matrices")
        form = formats.form_of(widths[0][1], widths[1][1] if has["scale"] else None, inputs, two_level)
        return *form, two_level
    except ValueError as error:
        raise ShapeMismatch(
            f"{name} in {parts['codes'].path(name).name} is in no known format of quantised weights: {error}"
        ) from error


def _dtype(tensors: Tensors, source: TensorSource, part: str) -> torch.dtype:
    """The dtype to read a component in: for scales and lows, the one that they are stored in."""
    if part == "codes":
        return formats.DTYPES[part]
    kinds = {tensors.dtype(name) for name in source.names}
    if len(kinds) == 1 and (kind := kinds.pop()) in formats.SCALES:
        return formats.SCALES[kind]
    if ZERO_POINTS in kinds:
        raise CheckpointError(
            f"{', '.join(source.names)} in {tensors.path(source.names[0]).name} are one matrix of the model, but only "
            f"some have a {part} of {ZERO_POINTS}"
        )
    return torch.float32 if "F32" in kinds else formats.DTYPES[part]


def dtype_on_cpu(store: Tensors, dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and of the computation with quantised weights on a CPU: bfloat16 instead of float16, for which
    there are no kernels; with a log line."""
    if not isinstance(store, Float8Tensors | FourBitTensors) and not quantized.is_quantized(store):
        return dtype
    log.info(
        "norms and embeddings of float16 are loaded in bfloat16, which CPUs compute in; dtype= changes it"
    )
    return torch.bfloat16


def quantizer(model: ModelBase, how: QuantizationConfig | None) -> Quantizer | None:
    """The Quantizer for a model that is quantised while it is loaded, or None."""
    if isinstance(how, WeightOnlyConfig) and model.quantization_config is None:
        return Quantizer(model, how)
    return None


def quantized_source(source: TensorSource) -> TensorSource:
    """The source of the quantised rows: for a transposed matrix, too, they are its outputs."""
    return TensorSource(source.names, Same() if isinstance(source.op, Transposed) else source.op)


def quantized_modules(model: ModelBase) -> dict[str, QuantizedMatrix]:
    """The quantised modules by name, tied ones once."""
    tied = {name.rpartition(".")[0] for name in model.tied()}
    found = model.named_modules()
    return {name: m for name, m in found if isinstance(m, QuantizedMatrix) and name not in tied}


def file_state(model: ModelBase) -> dict[str, Tensor]:
    """The tensors of quantised matrices by file names."""
    return {
        f"{name}.weight.{part}": tensor
        for name, module in quantized_modules(model).items()
        for part, tensor in module.quantized.tensors().items()
    }


def own_state(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Tensors of quantised matrices by the names of `state_dict()`; `parts`: kind -> file name -> tensor."""
    return {
        f"{name.removesuffix('.weight')}.{part}": tensor
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }
