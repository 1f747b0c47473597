"""pipeline("sentence-similarity"): its forms of input, and the vectors of which it gives the similarities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines

import monoblock
from monoblock import SentenceTransformer, pipeline

SOURCE = "the quick fox"
OTHERS = ["a lazy dog", "the quick fox", "who jumps over köln ?"]
ONE: dict[str, Any] = {"source_sentence": SOURCE, "sentences": OTHERS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipelines.folder(folder / "plain", "MPNetModel")
    made = SentenceTransformer(str(folder / "plain"), prompts={"query": "who "})
    made.save(str(folder / "made"))
    return folder / "made"


def cosines(model: Path, **options: Any) -> list[float]:
    source, *others = SentenceTransformer(str(model), device="cpu").encode([SOURCE, *OTHERS], **options)
    return [float(source @ other / np.linalg.norm(source) / np.linalg.norm(other)) for other in others]


def test_forms_of_inputs(model: Path) -> None:
    pipe = pipeline("sentence-similarity", str(model), device="cpu")
    expected = pytest.approx(cosines(model), abs=1e-6)  # float32 cosines
    found = pipe(ONE)
    assert found == expected and all(isinstance(score, float) for score in found)
    pair = pipe({"text": SOURCE, "text_pair": OTHERS[0]})
    assert pair == pytest.approx(found[0], abs=1e-6)
    several = pipe([ONE, {"text": SOURCE, "text_pair": OTHERS[2]}, ONE], batch_size=2)
    assert several == [expected, pytest.approx(found[2], abs=1e-6), expected]
    assert list(pipe(iter([ONE]))) == [expected]
    assert pipe({"source_sentence": SOURCE, "sentences": []}) == []


def test_prompts_and_similarities_of_the_model(model: Path) -> None:
    pipe = pipeline("sentence-similarity", str(model), device="cpu")
    plain = pipe(ONE)
    named = pipe(ONE, prompt_name="query")
    assert named == pytest.approx(cosines(model, prompt="who "), abs=1e-6)
    assert named != pytest.approx(plain, abs=1e-3)
    assert pipeline("sentence-similarity", str(model), prompt="who ")(ONE) == pytest.approx(named, abs=1e-6)
    loaded = SentenceTransformer(str(model), device="cpu", similarity_fn_name="euclidean")
    distances = pipeline(model=loaded)(ONE)
    assert distances[1] == pytest.approx(0, abs=1e-3) and max(distances[0], distances[2]) < -1e-2


def test_saved_pipelines_and_their_description(model: Path, tmp_path: Path) -> None:
    pipe = pipeline("sentence-similarity", str(model), device="cpu", dtype="float32")
    assert repr(pipe) == "SentenceSimilarityPipeline: MPNetModel, float32 on cpu"
    pipe.save_pretrained(tmp_path / "saved")
    again = pipeline("sentence-similarity", str(tmp_path / "saved"), device="cpu")
    assert again(ONE) == pytest.approx(pipe(ONE), abs=1e-6)


def test_features_of_such_a_folder_are_states_of_tokens(model: Path) -> None:
    pipe = pipeline("feature-extraction", str(model), device="cpu")
    states = np.array(pipe(SOURCE))
    vector = SentenceTransformer(str(model), device="cpu").encode(SOURCE)
    assert states.shape == (1, 5, 36)
    np.testing.assert_allclose(states[0].mean(0), vector, atol=1e-5)  # its pooling is the mean


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ("a text", ValueError, "source_sentence.*got str"),
        ({"source_sentence": "a"}, ValueError, r"got \['source_sentence'\]"),
        ({"source_sentence": "a", "sentences": "b"}, TypeError, "expected a list of strings, got str"),
        ({"source_sentence": "a", "sentences": [1]}, TypeError, "takes strings"),
        ({"text": None, "text_pair": "b"}, TypeError, "takes strings"),
    ],
)
def test_wrong_inputs(model: Path, inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pipeline("sentence-similarity", str(model), device="cpu")(inputs)


def test_refused_arguments(model: Path) -> None:
    plain = monoblock.AutoModel.from_pretrained(str(model))
    loaded = SentenceTransformer(str(model), device="cpu")
    refused: tuple[tuple[type[Exception], str, dict[str, Any]], ...] = (
        (ValueError, "leave out tokenizer", {"model": str(model), "tokenizer": object()}),
        (ValueError, "leave out config", {"model": str(model), "config": object()}),
        (TypeError, "got MPNetModel", {"model": plain}),
        (ValueError, "no effect", {"model": loaded, "dtype": "float16"}),
        (ValueError, "framework='flax'", {"model": loaded, "framework": "flax"}),
        (ValueError, "no default model", {}),
        (ValueError, "subfolder", {"model": str(model), "model_kwargs": {"subfolder": "a"}}),
        (ValueError, "batch_size", {"model": loaded, "batch_size": 0}),
        (TypeError, "no argument 'prompts'", {"model": loaded, "prompts": "a"}),
    )
    for error, message, arguments in refused:
        with pytest.raises(error, match=message):
            pipeline("sentence-similarity", **arguments)
