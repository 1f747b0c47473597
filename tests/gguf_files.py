"""Tiny GGUF files, written by the `gguf` package: Mistral and MPT with tensors of any ggml type, and tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

# Offsets of the fp16 numbers in a block of each type.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ3_XXS": (0,),
    "TQ2_0": (64,),
}
KINDS = tuple(HALVES)
WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 256, 512, 4, 2, 64, 2, 40


def blocks(kind: str, rows: int, inputs: int, seed: int) -> np.ndarray:
    """Random rows of a type as bytes (rows, bytes), or as numbers for F32, F16 and BF16; weights of about 0.1."""
    random = np.random.default_rng(seed)
    if kind not in HALVES:
        values = random.normal(size=(rows, inputs)).astype(np.float32) * 0.06
        if kind == "BF16":
            return gguf.quantize(values, Type.BF16)
        return values.astype(np.float16) if kind == "F16" else values
    block, width = gguf.GGML_QUANT_SIZES[Type[kind]]
    made = random.integers(0, 256, (rows * inputs // block, width), dtype=np.uint8)
    top = {
        "Q8_0": 1e-3,
        "IQ4_NL": 1e-3,
        "Q4_0": 0.015,
        "Q5_0": 0.008,
        "Q4_1": 0.015,
        "Q5_1": 0.008,
        "IQ4_XS": 1e-4,
    }
    for at in HALVES[kind]:
        halves = (random.uniform(0.5, 1, len(made)) * top.get(kind, 3e-4)).astype(np.float16)
        made[:, at : at + 2] = halves[:, None].view(np.uint8)
    return made.reshape(rows, -1)


def weights(kind: str, data: np.ndarray) -> np.ndarray:
    """The weights of `blocks` as float32, by the package's dequantiser."""
    if kind in ("F32", "F16"):
        return data.astype(np.float32)
    return gguf.dequantize(data, Type[kind])


def mistral_metadata(writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(VOCAB)


def mistral_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, WIDTH)}
    for i in range(LAYERS):
        block = f"blk.{i}."
        shapes |= {
            block + "attn_norm.weight": (WIDTH,),
            block + "attn_q.weight": (HEADS * HEAD_DIM, WIDTH),
            block + "attn_k.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            block + "attn_v.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            block + "attn_output.weight": (WIDTH, HEADS * HEAD_DIM),
            block + "ffn_norm.weight": (WIDTH,),
            block + "ffn_gate.weight": (INNER, WIDTH),
            block + "ffn_up.weight": (INNER, WIDTH),
            block + "ffn_down.weight": (WIDTH, INNER),
        }
    return shapes | {"output_norm.weight": (WIDTH,), "output.weight": (VOCAB, WIDTH)}


def mpt_metadata(writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_clamp_kqv(3.0)
    writer.add_max_alibi_bias(8.0)


def mpt_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, WIDTH)}
    for i in range(LAYERS):
        block = f"blk.{i}."
        shapes |= {
            block + "attn_norm.weight": (WIDTH,),
            block + "attn_qkv.weight": (3 * WIDTH, WIDTH),
            block + "attn_output.weight": (WIDTH, WIDTH),
            block + "ffn_norm.weight": (WIDTH,),
            block + "ffn_up.weight": (2 * WIDTH, WIDTH),
            block + "ffn_down.weight": (WIDTH, 2 * WIDTH),
        }
    return shapes | {"output_norm.weight": (WIDTH,)}


def write(
    path: Path,
    kinds: str | Callable[[str], str],
    *,
    architecture: str = "llama",
    metadata: Callable[[gguf.GGUFWriter], None] | None = None,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    parts: int = 0,
) -> dict[str, np.ndarray]:
    """Write a file; `kinds`: the type of all matrices, or of each by its name. Returns the weights by ggml's names.
    `parts`: tensors of each part, of a split model."""
    options: dict[str, Any] = {"split_max_tensors": parts} if parts else {}
    writer = gguf.GGUFWriter(path, architecture, **options)
    mpt = architecture == "mpt"
    (metadata or (mpt_metadata if mpt else mistral_metadata))(writer)
    if tokenizer is not None:
        tokenizer(writer)
    found: dict[str, np.ndarray] = {}
    shapes = shapes or (mpt_shapes() if mpt else mistral_shapes())
    for seed, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 1:
            found[name] = np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32)
            writer.add_tensor(name, found[name])
            continue
        kind = kinds if isinstance(kinds, str) else kinds(name)
        data = blocks(kind, *shape, seed)
        found[name] = weights(kind, data)
        writer.add_tensor(name, data, raw_dtype=None if kind in ("F32", "F16") else Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found
