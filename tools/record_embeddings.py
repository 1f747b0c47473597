"""Record what sentence-transformers computes, for tests/torch/test_embeddings.py:

    PYTHONPATH=src:tests python tools/record_embeddings.py

in an environment with that package (6.2), transformers and PyTorch. Writes tests/fixtures/embeddings/recorded.npz.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import embedding_models as cases
import numpy as np
import sentence_transformers
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer, util
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
)


def module(kind: str, *arguments: Any) -> Any:
    """The package's module with the weights of the tests."""
    if kind == "Dense":
        weight, bias = (torch.from_numpy(array) for array in cases.dense_weights())
        function = getattr(torch.nn, arguments[0])()
        return Dense(cases.WIDTH, cases.OUT, True, function, weight, bias)
    if kind == "LayerNorm":
        made = LayerNorm(cases.WIDTH)
        weight, bias = (torch.from_numpy(array) for array in cases.norm_weights())
        made.norm.weight.data, made.norm.bias.data = weight, bias
        return made
    return Normalize()


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        folders = {family: cases.write(Path(root) / family, family) for family in cases.FAMILIES}
        for name, case in cases.CASES.items():
            modules = [
                Transformer(str(folders[case["family"]])),
                Pooling(cases.WIDTH, case["mode"], case["include_prompt"]),
                *(module(*one) for one in case["after"]),
            ]
            model = SentenceTransformer(modules=modules, prompts=cases.PROMPTS, device="cpu")
            found[f"encode/{name}"] = model.encode(cases.TEXTS, batch_size=3, **case["encode"])
        for name, (family, labels, options) in cases.SCORES.items():
            folder = cases.write(
                Path(root) / f"{family}-{labels}", family, "ForSequenceClassification", num_labels=labels
            )
            encoder = CrossEncoder(str(folder), device="cpu")
            found[f"predict/{name}"] = encoder.predict(cases.PAIRS, batch_size=2, **options)
    many, few = cases.vectors(150, 1), cases.vectors(20, 2)
    for precision in ("int8", "uint8", "binary", "ubinary"):
        found[f"quantize/{precision}"] = util.quantize_embeddings(many, precision)
    found["quantize/calibrated"] = util.quantize_embeddings(few, "int8", calibration_embeddings=many)
    names = (
        "cos_sim",
        "dot_score",
        "euclidean_sim",
        "manhattan_sim",
        "pairwise_cos_sim",
        "pairwise_dot_score",
    )
    for name in (*names, "pairwise_euclidean_sim", "pairwise_manhattan_sim"):
        found[f"similarity/{name}"] = getattr(util, name)(few, many[:20]).numpy()
    hits = util.semantic_search(few, many, query_chunk_size=6, corpus_chunk_size=40, top_k=5)
    found["search/ids"] = np.array([[hit["corpus_id"] for hit in row] for row in hits])
    found["search/scores"] = np.array([[hit["score"] for hit in row] for row in hits])
    for name, options in {
        "all": {},
        "limited": {"max_pairs": 100, "top_k": 4, "query_chunk_size": 30},
    }.items():
        pairs = util.paraphrase_mining_embeddings(torch.from_numpy(many), **options)
        found[f"pairs/{name}"] = np.array(pairs)
    clusters = util.community_detection(many, threshold=0.8, min_community_size=4, batch_size=64)
    found["communities"] = np.array([index for cluster in clusters for index in [*cluster, -1]])
    found["version"] = np.array(sentence_transformers.__version__)
    cases.RECORDED.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(cases.RECORDED, **found)
    print(f"{len(found)} arrays, {cases.RECORDED.stat().st_size} bytes: {cases.RECORDED}")


if __name__ == "__main__":
    main()
