"""sentence-transformers and monoblock read each other's folders, and our models and tokenizers serve as its modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import embedding_models as cases
import numpy as np
import pytest
import sentence_transformers as package
import torch
from sentence_transformers.sentence_transformer import modules as theirs

import monoblock
from monoblock import embeddings as ours

ATOL = 1e-6  # float32


def near(found: Any, expected: Any, atol: float = ATOL) -> None:
    """Equal within `atol`, relative to the length of each vector, as far as it is more than 1."""
    found, expected = np.asarray(found), np.asarray(expected)
    length = np.maximum(np.sqrt(np.square(expected).sum(-1, keepdims=True)), 1)
    np.testing.assert_allclose(found / length, expected / length, rtol=0, atol=atol)


def chain(library: Any, transformer: Any, mode: Any, dense: bool) -> list[Any]:
    """Transformer, Pooling and, with `dense`, Dense, LayerNorm and Normalize of either library."""
    found = [transformer, library.Pooling(cases.WIDTH, mode)]
    if dense:
        weight, bias = (torch.from_numpy(array) for array in cases.dense_weights())
        function = torch.nn.GELU()
        found += [
            library.LayerNorm(cases.WIDTH),
            library.Dense(cases.WIDTH, cases.OUT, True, function, weight, bias),
            library.Normalize(),
        ]
    return found


VARIANTS = [
    ("mean", True),
    ("cls", False),
    (("cls", "max"), False),
    (("lasttoken", "weightedmean", "max"), False),
]


@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize(("mode", "dense"), VARIANTS)
def test_folders(tmp_path: Path, family: str, mode: Any, dense: bool) -> None:
    """A folder that one library writes gives the same vectors, prompts and settings in the other."""
    source = cases.write(tmp_path / "source", family)
    settings = {"prompts": cases.PROMPTS, "default_prompt_name": "passage", "similarity_fn_name": "dot"}
    made = {
        "ours": monoblock.SentenceTransformer(
            modules=chain(ours, ours.Transformer(source), mode, dense),
            truncate_dim=9,
            device="cpu",
            **settings,
        ),
        "theirs": package.SentenceTransformer(
            modules=chain(theirs, theirs.Transformer(str(source)), mode, dense),
            truncate_dim=9,
            device="cpu",
            **settings,
        ),
    }
    expected = made["theirs"].encode(cases.TEXTS)
    near(made["ours"].encode(cases.TEXTS), expected)
    for writer, model in made.items():
        model.max_seq_length = 30
        model.save_pretrained(str(tmp_path / writer))
        expected = model.encode(cases.TEXTS)
        for library in (package, monoblock):
            read = library.SentenceTransformer(str(tmp_path / writer), device="cpu")
            near(read.encode(cases.TEXTS), expected)
            assert read.prompts == {"query": "search: ", "passage": "text; ", "document": ""}
            assert read.default_prompt_name == "passage" and read.similarity_fn_name == "dot"
            assert read.max_seq_length == 30 and read.truncate_dim == 9
            assert len(read) == len(model)


@pytest.mark.parametrize("labels", [1, 3])
def test_cross_encoder_folders(tmp_path: Path, labels: int) -> None:
    source = cases.write(tmp_path / "source", "MPNet", "ForSequenceClassification", num_labels=labels)
    for writer in (package, monoblock):
        model = writer.CrossEncoder(str(source), device="cpu", activation_fn=torch.nn.Tanh())
        folder = tmp_path / writer.__name__
        model.save_pretrained(str(folder))
        for reader in (package, monoblock):
            near(
                reader.CrossEncoder(str(folder), device="cpu").predict(cases.PAIRS),
                model.predict(cases.PAIRS),
                3e-6,
            )


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_our_models_as_modules_of_the_package(tmp_path: Path, family: str) -> None:
    """With our model and our tokenizer in the package's Transformer, vectors and gradients stay the same."""
    source = cases.write(tmp_path / "source", family)
    model = package.SentenceTransformer(
        modules=chain(theirs, theirs.Transformer(str(source)), "mean", True), device="cpu"
    )
    expected = model.encode(cases.TEXTS)
    model[0].model = monoblock.AutoModel.from_pretrained(source)
    model[0].processor = monoblock.AutoTokenizer.from_pretrained(source)
    model.max_seq_length = cases.LENGTH
    near(model.encode(cases.TEXTS), expected)
    features = model.tokenize(cases.TEXTS[:2])
    model(features)["sentence_embedding"].sum().backward()
    assert all(p.grad is not None for p in model[3].parameters())
    assert model[0].model.get_input_embeddings().weight.grad is not None
    model.save_pretrained(str(tmp_path / "saved"))
    near(monoblock.SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(cases.TEXTS), expected)


@pytest.mark.parametrize("name", [None, *(name for name in ("cosine", "dot", "euclidean", "manhattan"))])
def test_similarities(tmp_path: Path, name: str | None) -> None:
    source = str(cases.write(tmp_path / "source", "MPNet"))
    models = [
        library.SentenceTransformer(source, similarity_fn_name=name, device="cpu")
        for library in (package, monoblock)
    ]
    few, many = cases.vectors(5, 1), cases.vectors(9, 2)
    expected, found = (model.similarity(few, many) for model in models)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    expected, found = (model.similarity_pairwise(few, many[:5]) for model in models)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_outputs(tmp_path: Path) -> None:
    """The types and shapes of every output, of one text and of several."""
    source = str(cases.write(tmp_path / "source", "MPNet"))
    models = [
        library.SentenceTransformer(source, prompts=cases.PROMPTS, device="cpu")
        for library in (package, monoblock)
    ]
    calls: list[dict[str, Any]] = [
        {},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"output_value": "token_embeddings"},
        {"precision": "int8"},
        {"precision": "ubinary"},
        {"precision": "binary", "convert_to_tensor": True},
    ]
    for inputs in ("a cat", ["a cat", "the dog sat"]):
        for options in calls:
            if isinstance(inputs, str) and options.get("precision") == "int8":
                continue  # one text has no range of values
            expected, found = (model.encode(inputs, **options) for model in models)
            assert type(found) is type(expected), options
            if isinstance(expected, list):
                assert [(type(x), x.shape, x.dtype) for x in found] == [
                    (type(x), x.shape, x.dtype) for x in expected
                ]
            else:
                assert (found.shape, found.dtype) == (expected.shape, expected.dtype), options
        for method in ("encode_query", "encode_document"):
            expected, found = (getattr(model, method)(inputs) for model in models)
            near(found, expected)
    expected, found = (model.encode(["a cat"], output_value=None)[0] for model in models)
    assert set(found) == set(expected) - {"modality"}
    assert found["input_ids"].tolist() == expected["input_ids"].tolist()
