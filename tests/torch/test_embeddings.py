"""Vectors of texts on PyTorch, compared with those that sentence-transformers gave."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import embedding_checks as checks
import embedding_models as cases
import numpy as np
import pytest
import torch
from embedding_checks import ATOL, RECORDED, SCORES, near
from hypothesis import given, settings
from hypothesis import strategies as st

import monoblock
from monoblock import CrossEncoder, SentenceTransformer, native, util
from monoblock.backends.pytorch import embedding_adapter, packed_forward
from monoblock.embeddings import (
    Dense,
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
    encoding,
    quantize_embeddings,
)
from monoblock.errors import CheckpointError


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("embedding-models")
    return {family: cases.write(root / family, family) for family in cases.FAMILIES}


def built(folders: dict[str, Path], case: cases.Case, **options: Any) -> SentenceTransformer:
    return checks.built(folders[case["family"]], case, "pt", device="cpu", **options)


@pytest.mark.parametrize("name", cases.CASES)
def test_recorded(folders: dict[str, Path], name: str) -> None:
    case = cases.CASES[name]
    found = built(folders, case).encode(cases.TEXTS, batch_size=3, **case["encode"])
    near(found, RECORDED[f"encode/{name}"])


@pytest.mark.parametrize("name", cases.SCORES)
def test_recorded_scores(tmp_path: Path, name: str) -> None:
    family, labels, options = cases.SCORES[name]
    folder = cases.write(tmp_path / "model", family, "ForSequenceClassification", num_labels=labels)
    found = CrossEncoder(folder, device="cpu").predict(cases.PAIRS, batch_size=2, **options)
    expected = RECORDED[f"predict/{name}"]
    near(found.reshape(len(cases.PAIRS), -1), expected.reshape(len(cases.PAIRS), -1), SCORES)


# ---------------------------------------------------------------------------- encode


@pytest.fixture(scope="session")
def model(folders: dict[str, Path]) -> SentenceTransformer:
    """MPNet with mean pooling and a dense layer."""
    return built(folders, cases.CASES["dense-Tanh"])


def test_empty_inputs(model: SentenceTransformer) -> None:
    assert model.encode([]).shape == (0,)
    assert model.encode([], convert_to_tensor=True).shape == (0,)
    assert model.encode([], convert_to_numpy=False) == model.encode([], output_value=None) == []
    vectors, truncated = model.encode([], return_truncated=True)
    assert vectors.shape == truncated.shape == (0,)


def test_order_and_types(model: SentenceTransformer) -> None:
    """Results are in the order of the inputs, also across chunks; arrays of strings are inputs too."""
    texts = [f"{'cat ' * (i % 11)}{i}" for i in range(60)]
    found = model.encode(texts, batch_size=7)
    for i in (0, 10, 31, 59):
        np.testing.assert_allclose(found[i], model.encode(texts[i]), atol=ATOL)
    for inputs in (np.array(texts), tuple(texts), iter(texts)):
        np.testing.assert_array_equal(model.encode(inputs, batch_size=7), found)
    np.testing.assert_array_equal(model.encode(inputs=texts, batch_size=7), found)
    tensor = model.encode(texts, batch_size=7, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor) and (tensor.numpy() == found).all()
    rows = model.encode(texts, batch_size=7, convert_to_numpy=False)
    assert isinstance(rows, list) and (torch.stack(rows).numpy() == found).all()


def test_small_chunks(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of one batch may come from several chunks."""
    expected = model.encode(cases.TEXTS)
    monkeypatch.setattr(encoding, "TEXTS", 2)
    np.testing.assert_allclose(model.encode(cases.TEXTS, batch_size=3), expected, atol=ATOL)


def packed_one_by_one(calls: list[int]) -> Any:
    """A `packed_states` that runs each text alone; `calls` gets the number of tokens of each call."""

    def states(model: Any, ids: Any) -> Any:
        calls.append(sum(map(len, ids)))
        return torch.cat([model(torch.tensor([row]))[0][0] for row in ids])

    return states


@settings(max_examples=20, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(["the", " cat", "ß", " a"]), max_size=30).map("".join),
        min_size=1,
        max_size=8,
    ),
    batch_size=st.integers(1, 9),
)
def test_packed_texts_are_independent_of_the_batch(
    folders: dict[str, Path], texts: list[str], batch_size: int
) -> None:
    """If the hidden states are, a text's vector has the same bits alone and in any batch."""
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_adapter, "packed_states", packed_one_by_one(calls))
        model = built(folders, cases.CASES["dense-normalize"])
        together = model.encode(texts, batch_size=batch_size)
        assert max(calls) <= batch_size * cases.LENGTH
        for text, vector in zip(texts, together, strict=True):
            assert model.encode(text).tobytes() == vector.tobytes()


NATIVE = pytest.mark.skipif(native.library() is None, reason=f"no native kernels: {native.status()}")


@NATIVE
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_vectors_do_not_depend_on_the_batch(folders: dict[str, Path], family: str, dtype: str) -> None:
    """The bits of a text's vector: alone, in any batch and order, on any number of threads."""
    weights = {"quantization_config": "int8"} if dtype == "int8" else {"dtype": dtype}
    model = SentenceTransformer(folders[family], device="cpu", **weights)
    if packed_forward.obstacle(model[0].auto_model) is not None:
        pytest.skip("the native kernels do not run this model on this machine")
    texts = [text * count for text in cases.TEXTS for count in (1, 2)]
    alone = [model.encode(text).tobytes() for text in texts]
    threads = torch.get_num_threads()
    try:
        for count, batch_size in ((1, 3), (2, 1), (2, 64)):
            torch.set_num_threads(count)
            for order in (1, -1):
                found = model.encode(texts[::order], batch_size=batch_size)
                assert [vector.tobytes() for vector in found[::order]] == alone
    finally:
        torch.set_num_threads(threads)


@NATIVE
def test_the_reason_for_padded_batches_is_logged(
    folders: dict[str, Path], logs: pytest.LogCaptureFixture
) -> None:
    """Once, at INFO."""
    model = SentenceTransformer(folders["MPNet"], device="cpu")
    model.encode(["a text"])
    assert not [message for message in logs.messages if "padded to one length" in message]
    model[0].auto_model.set_attn_implementation("eager")
    for _ in range(2):
        model.encode(["a text"])
    told = [message for message in logs.messages if "padded to one length" in message]
    assert len(told) == 1
    assert "attn_implementation='eager'" in told[0]


def test_batches_of_packed_texts(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch has up to batch_size * max_seq_length tokens; all outputs are those of padded batches."""
    model = built(folders, cases.CASES["without-prompt-mean"])
    texts = ["a", *cases.TEXTS] * 40
    expected = [
        model.encode(texts, output_value=kind, prompt="on ")
        for kind in ("sentence_embedding", "token_embeddings")
    ]
    calls: list[int] = []
    monkeypatch.setattr(embedding_adapter, "packed_states", packed_one_by_one(calls))
    found = [
        model.encode(texts, output_value=kind, prompt="on ")
        for kind in ("sentence_embedding", "token_embeddings")
    ]
    near(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    half = calls[: len(calls) // 2]
    assert len(half) == -(-sum(half) // (32 * cases.LENGTH)) > 2
    # A model without this path stays with batches of batch_size rows.
    monkeypatch.setattr(embedding_adapter, "packed_states", lambda model, ids: calls.append(-len(ids)))
    near(model.encode(texts, prompt="on "), expected[0])
    assert [call for call in calls if call < 0][1:] == []


def test_token_embeddings(folders: dict[str, Path]) -> None:
    """Without padding, on both sides."""
    model = SentenceTransformer(modules=[Transformer(folders["Mistral"]), Pooling(cases.WIDTH)], device="cpu")
    expected = model.encode(cases.TEXTS, output_value="token_embeddings", batch_size=1)
    lengths = [len(ids) for ids in model.tokenizer(cases.TEXTS, truncation=True)["input_ids"]]
    assert [len(states) for states in expected] == lengths
    model.tokenizer.padding_side = "left"
    for found, one in zip(model.encode(cases.TEXTS, output_value="token_embeddings"), expected, strict=True):
        torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-5)
    features = model.encode(cases.TEXTS, output_value=None)
    for found, one in zip(features, expected, strict=True):
        assert found["input_ids"].shape == found["attention_mask"].shape == one.shape[:1]
        torch.testing.assert_close(found["sentence_embedding"], one.mean(0), atol=1e-5, rtol=1e-5)


def test_truncation_is_reported(model: SentenceTransformer, caplog: pytest.LogCaptureFixture) -> None:
    long = " the" * 100
    with caplog.at_level(logging.WARNING, "monoblock"):
        vectors, truncated = model.encode(["a cat", long, long[:-4]], return_truncated=True)
    assert truncated.tolist() == [0, 102 - cases.LENGTH, 101 - cases.LENGTH]
    [record] = caplog.records
    assert "2 of 3 texts have more than max_seq_length=48 tokens: 107 tokens were cut" in record.getMessage()
    np.testing.assert_allclose(vectors[1], vectors[2], atol=ATOL)
    assert model.encode(long, return_truncated=True)[1] == 102 - cases.LENGTH
    caplog.clear()
    model.encode("a cat")
    assert not caplog.records


def test_max_seq_length(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    model = SentenceTransformer(folders["MPNet"], device="cpu")
    assert model.max_seq_length == model.get_max_seq_length() == cases.LENGTH
    model.max_seq_length = 5
    assert len(model.encode("the cat sat on", output_value="token_embeddings")) == 5
    assert model.tokenize(["the cat sat on the mat"])["input_ids"].shape == (1, 5)
    with pytest.raises(ValueError, match="max_seq_length=49: the model has 48 positions"):
        model.max_seq_length = 49
    with pytest.raises(ValueError, match="max_seq_length=2: expected an integer of at least 3, or None"):
        model.max_seq_length = 2
    caplog.clear()
    assert Transformer(folders["MPNet"], max_seq_length=100).max_seq_length == cases.LENGTH
    assert "max_seq_length=100, but the model has 48 positions" in caplog.text
    assert Transformer(folders["MPNet"], processor_kwargs={"model_max_length": 7}).max_seq_length == 7


def test_texts_without_tokens(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    """GPT Neo's tokenizer adds no special tokens."""
    model = SentenceTransformer(modules=[Transformer(folders["GPTNeo"]), Pooling(cases.WIDTH)], device="cpu")
    for texts in (["", "a cat", ""], [""]):
        caplog.clear()
        found = model.encode(texts)
        assert not found[0].any() and f"of {len(texts)} texts have no tokens" in caplog.text
    np.testing.assert_allclose(model.encode(["", "a cat"])[1], model.encode("a cat"), atol=ATOL)


def test_prompts(folders: dict[str, Path]) -> None:
    model = SentenceTransformer(folders["MPNet"], prompts=cases.PROMPTS, device="cpu")
    plain = model.encode("a cat")
    searched = model.encode("search: a cat")
    assert abs(plain - searched).max() > 0.01
    for found in (
        model.encode("a cat", prompt="search: "),
        model.encode("a cat", prompt_name="query"),
        model.encode_query("a cat"),
    ):
        np.testing.assert_array_equal(found, searched)
    # The package's prompts always contain "document", which is before "passage".
    np.testing.assert_array_equal(model.encode_document("a cat"), plain)
    del model.prompts["document"]
    np.testing.assert_array_equal(model.encode_document("a cat"), model.encode("text; a cat"))
    model.default_prompt_name = "query"
    np.testing.assert_array_equal(model.encode("a cat"), searched)
    np.testing.assert_array_equal(model.encode("a cat", prompt=""), plain)


def test_precisions(model: SentenceTransformer) -> None:
    vectors = model.encode(cases.TEXTS)
    for precision in ("int8", "uint8", "binary", "ubinary"):
        found = model.encode(cases.TEXTS, precision=precision)
        np.testing.assert_array_equal(found, quantize_embeddings(vectors, precision))


def test_lower_case(folders: dict[str, Path]) -> None:
    model = SentenceTransformer(
        modules=[Transformer(folders["MPNet"], do_lower_case=True), Pooling(cases.WIDTH)]
    )
    np.testing.assert_array_equal(model.encode("THE Cat"), model.encode("the cat"))


def test_progress_bar(model: SentenceTransformer, capfd: pytest.CaptureFixture[str]) -> None:
    """By default only if the logger logs INFO."""
    logger = logging.getLogger("monoblock")
    for level, wanted, shown in (
        (logging.WARNING, None, False),
        (logging.INFO, None, True),
        (logging.WARNING, True, True),
    ):
        before, _ = logger.level, logger.setLevel(level)
        try:
            model.encode(cases.TEXTS, show_progress_bar=wanted)
        finally:
            logger.setLevel(before)
        assert bool(capfd.readouterr().err) == shown


def test_similarity(model: SentenceTransformer) -> None:
    a, b = cases.vectors(3, 1), cases.vectors(4, 2)
    assert model.similarity_fn_name == "cosine"
    torch.testing.assert_close(model.similarity(a, b), util.cos_sim(a, b))
    for name in ("dot", "euclidean", "manhattan"):
        model.similarity_fn_name = name
        function = {"dot": "dot_score"}.get(name, f"{name}_sim")
        torch.testing.assert_close(model.similarity(a, b), getattr(util, function)(a, b))
        pairwise = model.similarity_pairwise(a, b[:3])
        torch.testing.assert_close(pairwise, model.similarity(a, b[:3]).diagonal(), rtol=1e-5, atol=1e-5)
    model.similarity_fn_name = "cosine"
    with pytest.raises(ValueError, match="similarity_fn_name='angle': expected one of 'cosine'"):
        model.similarity_fn_name = "angle"


def test_forward_has_gradients(folders: dict[str, Path]) -> None:
    """The vectors of `encode`, with gradients for all parameters; a step of training changes them."""
    model = built(folders, cases.CASES["dense-normalize"])
    features = model.tokenize(cases.TEXTS)
    found = model(features)
    assert found["token_embeddings"].shape[:2] == features["input_ids"].shape
    vectors = found["sentence_embedding"]
    np.testing.assert_allclose(vectors.detach().numpy(), model.encode(cases.TEXTS), atol=ATOL)
    names = dict(model.named_parameters())
    assert "2.linear.weight" in names and "2.linear.bias" in names
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    (vectors @ vectors.T).sum().backward()
    without = {name for name, value in names.items() if value.grad is None}
    assert all("pooler" in name for name in without)
    before = model.encode(cases.TEXTS)
    optimizer.step()
    assert abs(model.encode(cases.TEXTS) - before).max() > 1e-4


@pytest.mark.parametrize("mode", cases.MODES)
def test_forward_pools_as_encode_does(folders: dict[str, Path], mode: str) -> None:
    """The formulas on tensors, with padding and without the prompt."""
    model = built(folders, cases.CASES[f"without-prompt-{mode}"])
    features = model.tokenize(["search: " + text for text in cases.TEXTS])
    features["prompt_length"] = model[0].prompt_length("search: ")
    found = model(features)["sentence_embedding"].detach().numpy()
    near(found, RECORDED[f"encode/without-prompt-{mode}"])


def test_dtypes(folders: dict[str, Path]) -> None:
    model = built(folders, cases.CASES["dense-Tanh"])
    expected = model.encode(cases.TEXTS)
    assert model.bfloat16().dtype == torch.bfloat16 and model[2].weight.dtype == torch.bfloat16
    found = model.encode(cases.TEXTS)
    assert found.dtype == np.float32
    assert 1e-4 < abs(found - expected).max() < 0.05  # bfloat16 has 8 bits of precision
    assert model.float().to("cpu").device.type == "cpu" and model.dtype == torch.float32
    loaded = SentenceTransformer(folders["MPNet"], dtype="bfloat16", device="cpu")
    assert loaded.dtype == torch.bfloat16
    assert (
        SentenceTransformer(folders["MPNet"], model_kwargs={"torch_dtype": torch.bfloat16}).dtype
        == torch.bfloat16
    )


def test_quantised_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    exact = SentenceTransformer(folders["MPNet"], device="cpu").encode(cases.TEXTS, normalize_embeddings=True)
    model = SentenceTransformer(folders["MPNet"], quantization_config="int8", device="cpu")
    found = model.encode(cases.TEXTS, normalize_embeddings=True)
    assert 1e-5 < 1 - (found * exact).sum(1).min() < 0.02
    model.save_pretrained(tmp_path)
    again = SentenceTransformer(tmp_path, device="cpu").encode(cases.TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(again, found, atol=ATOL)


def test_another_model(folders: dict[str, Path]) -> None:
    """`auto_model` can be replaced."""
    model = SentenceTransformer(folders["MPNet"], device="cpu")
    before = model.encode(cases.TEXTS)
    config = model[0].auto_model.config
    model[0].auto_model = cases.weights(monoblock.MPNetModel(config), seed=3)
    assert abs(model.encode(cases.TEXTS) - before).max() > 0.01
    assert model[0].model is model[0].auto_model is model.transformers_model


def test_attributes(model: SentenceTransformer) -> None:
    assert len(model) == len(list(model)) == 3 and model[1].pooling_mode == "mean"
    assert model.get_sentence_embedding_dimension() == model.get_embedding_dimension() == cases.OUT
    with model.truncate_sentence_embeddings(5):
        assert model.encode("a cat").shape == (5,) and model.get_embedding_dimension() == 5
    assert model.truncate_dim is None
    text = repr(model)
    assert (
        text.startswith("SentenceTransformer(\n  (0): Transformer({'max_seq_length': 48,")
        and "(2): Dense" in text
    )
    with pytest.raises(NotImplementedError, match="SentenceTransformer has no fit: train the PyTorch model"):
        model.fit()
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        model.fitt()


@pytest.mark.parametrize("name", [*cases.CASES][::3])
def test_pooling_on_a_device(folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the hidden states stay there: pooling and the other modules run on tensors."""
    monkeypatch.setattr(embedding_adapter.EmbeddingAdapter, "on_host", False)
    case = cases.CASES[name]
    model = built(folders, case)
    near(model.encode(cases.TEXTS, batch_size=3, **case["encode"]), RECORDED[f"encode/{name}"])


def test_outputs_on_a_device(
    folders: dict[str, Path], model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["", *cases.TEXTS]
    empty = SentenceTransformer(modules=[Transformer(folders["GPTNeo"]), Pooling(cases.WIDTH)], device="cpu")
    calls: list[dict[str, Any]] = [
        {},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"precision": "int8"},
        {"precision": "binary", "convert_to_tensor": True},
        {"output_value": "token_embeddings"},
    ]
    for made in (model, empty):
        expected = [made.encode(texts, **options) for options in calls]
        features = made.encode(texts, output_value=None)
        with monkeypatch.context() as patch:
            patch.setattr(embedding_adapter.EmbeddingAdapter, "on_host", False)
            found = [made.encode(texts, **options) for options in calls]
            on_device = made.encode(texts, output_value=None)
            assert made.encode([]).shape == made.encode([], convert_to_tensor=True).shape == (0,)
        for one, other, options in zip(found, expected, calls, strict=True):
            assert type(one) is type(other)
            if "precision" in options:  # values at the edge of a step
                assert abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
                continue
            for row, same in zip(one, other, strict=True):
                assert type(row) is type(same) and row.dtype == same.dtype
                np.testing.assert_allclose(row, same, atol=1e-5)
        for row, same in zip(on_device, features, strict=True):
            assert {name: value.shape for name, value in row.items()} == {n: v.shape for n, v in same.items()}


# ---------------------------------------------------------------------------- several processes


def test_pool(folders: dict[str, Path]) -> None:
    """Two processes give the vectors of this one, in order, and report a process's error."""
    model = built(folders, cases.CASES["dense-Tanh"])
    model.max_seq_length = 20
    texts = cases.TEXTS * 3
    expected, truncated = model.encode(texts, return_truncated=True, prompt_name="query")
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        found, cut = model.encode(texts, pool=pool, chunk_size=4, return_truncated=True, prompt_name="query")
        np.testing.assert_allclose(found, expected, atol=ATOL)
        assert cut.tolist() == truncated.tolist() and cut.any()
        codes = model.encode_multi_process(texts, pool, prompt_name="query", precision="ubinary")
        np.testing.assert_array_equal(codes, quantize_embeddings(expected, "ubinary"))
        assert model.encode([], pool=pool).shape == (0,)
        pool["input"].put((0, ["a"], {"wrong": 1}))
        with pytest.raises(RuntimeError, match="unexpected keyword argument 'wrong'"):
            model.encode(["a"], pool=pool)
    finally:
        model.stop_multi_process_pool(pool)
    assert not pool["folder"].exists()
    assert not any(process.is_alive() for process in multiprocessing.active_children())


# ---------------------------------------------------------------------------- files


def test_files(folders: dict[str, Path], tmp_path: Path) -> None:
    """All modules, settings and vectors survive; the files' names and contents are the package's."""
    case = cases.Case(family="MPNet", mode=("cls", "mean"), include_prompt=False, after=())
    model = built(folders, case, similarity_fn_name="dot", truncate_dim=9, default_prompt_name="query")
    model.modules += [Dense(2 * cases.WIDTH, 10, False, "GELU"), LayerNorm(10), Normalize()]
    model.max_seq_length = 20
    model.to("cpu").save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "modules.json").read_text())
    assert [entry["path"] for entry in entries] == ["", "1_Pooling", "2_Dense", "3_LayerNorm", "4_Normalize"]
    assert {entry["type"].rpartition(".")[0] for entry in entries} == {"sentence_transformers.models"}
    assert json.loads((tmp_path / "sentence_bert_config.json").read_text()) == {
        "max_seq_length": 20,
        "do_lower_case": False,
    }
    again = SentenceTransformer(tmp_path, device="cpu")
    assert repr(again) == repr(model)
    assert (again.prompts, again.default_prompt_name) == (model.prompts, "query")
    assert (again.similarity_fn_name, again.truncate_dim) == ("dot", 9)
    np.testing.assert_array_equal(again.encode(cases.TEXTS), model.encode(cases.TEXTS))


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def saved(folders: dict[str, Path], folder: Path) -> Path:
    built(folders, cases.CASES["dense-Tanh"]).save_pretrained(folder)
    return folder


def test_paths_and_configs_of_newer_versions(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = saved(folders, tmp_path / "model")
    expected = SentenceTransformer(folder, device="cpu").encode(cases.TEXTS)
    inner = "sentence_transformers.sentence_transformer.modules."
    newer = {
        "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
        "Pooling": f"{inner}pooling.Pooling",
        "Dense": "sentence_transformers.base.modules.dense.Dense",
    }

    def rename(entries: Any) -> None:
        for entry in entries:
            entry["type"] = newer[entry["type"].rpartition(".")[2]]

    edit(folder / "modules.json", rename)
    config = {"embedding_dimension": cases.WIDTH, "pooling_mode": "mean", "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    edit(folder / "2_Dense" / "config.json", lambda c: c.update(module_input_name="sentence_embedding"))
    named = {"method": "forward", "method_output_name": "last_hidden_state"}
    more = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": named},
        "module_output_name": "token_embeddings",
    }
    (folder / "sentence_bert_config.json").write_text(json.dumps(more))
    np.testing.assert_array_equal(SentenceTransformer(folder, device="cpu").encode(cases.TEXTS), expected)


def test_pickled_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = saved(folders, tmp_path / "model")
    model = SentenceTransformer(folder, device="cpu")
    tensors = {"linear.weight": model[2].weight.data, "linear.bias": model[2].bias.data}
    (folder / "2_Dense" / "model.safetensors").unlink()
    torch.save(tensors, folder / "2_Dense" / "pytorch_model.bin")
    again = SentenceTransformer(folder, device="cpu")
    np.testing.assert_array_equal(again.encode(cases.TEXTS), model.encode(cases.TEXTS))


def test_a_folder_without_modules(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    model = SentenceTransformer(folders["MPNet"], device="cpu")
    [record] = [r for r in caplog.records if "modules.json" in r.getMessage()]
    assert "pooled with pooling_mode='mean'" in record.getMessage()
    near(model.encode(cases.TEXTS), RECORDED["encode/MPNet-mean"])


def test_a_causal_language_model(tmp_path: Path) -> None:
    """As in the package, its last token is taken."""
    folder = cases.write(tmp_path / "model", "Mistral", "ForCausalLM")
    model = SentenceTransformer(folder, device="cpu")
    assert model[1].pooling_mode == "lasttoken"


REFUSED_FILES: dict[str, tuple[str, Any, str]] = {
    "module": (
        "modules.json",
        lambda m: m[1].update(type="sentence_transformers.models.WordEmbeddings"),
        "module type 'sentence_transformers.models.WordEmbeddings' is not supported",
    ),
    "router": (
        "modules.json",
        lambda m: m[0].update(type="sentence_transformers.base.modules.router.Router"),
        "router.Router' is not supported; the modules here are Transformer, Pooling",
    ),
    "code": (
        "modules.json",
        lambda m: m[0].update(type="custom_st.Transformer"),
        "'custom_st.Transformer' is not",
    ),
    "order": ("modules.json", lambda m: m[:0] + m[1:], "expected a Transformer first"),
    "kwargs": ("modules.json", lambda m: m[0].update(kwargs=["task"]), "kwargs of the module"),
    "type": (
        "config_sentence_transformers.json",
        lambda c: c.update(model_type="SparseEncoder"),
        "holds a SparseEncoder",
    ),
    "mode": (
        "1_Pooling/config.json",
        lambda c: c.update(pooling_mode="attention"),
        "pooling_mode='attention'",
    ),
    "key": ("1_Pooling/config.json", lambda c: c.update(scale=2), "the key 'scale' is not supported"),
    "width": (
        "1_Pooling/config.json",
        lambda c: c.update(word_embedding_dimension=7),
        "of width 7, but those before",
    ),
    "activation": (
        "2_Dense/config.json",
        lambda c: c.update(activation_function="os.system"),
        "activation_function='os.system': expected one of",
    ),
    "shape": (
        "2_Dense/config.json",
        lambda c: c.update(out_features=13),
        r"linear.weight has the shape \[12, 32\]",
    ),
    "task": (
        "sentence_bert_config.json",
        lambda c: c.update(transformer_task="fill-mask"),
        "transformer_task='fill-mask' is not supported",
    ),
    "prompts": ("config_sentence_transformers.json", lambda c: c.update(prompts=["q"]), "prompts must be"),
    "default": (
        "config_sentence_transformers.json",
        lambda c: c.update(default_prompt_name="x"),
        "there is no prompt 'x'",
    ),
}


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_refused_files(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    file, change, message = REFUSED_FILES[name]
    folder = saved(folders, tmp_path / "model")
    edit(folder / file, change)
    with pytest.raises((ValueError, CheckpointError), match=message):
        SentenceTransformer(folder, device="cpu")


def test_refused_arguments(folders: dict[str, Path], model: SentenceTransformer) -> None:
    folder = folders["MPNet"]
    for options, message in (
        ({"backend": "onnx"}, "backend='onnx' is not supported"),
        ({"trust_remote_code": True}, "trust_remote_code=True is not supported"),
        ({"truncate_dim": 0}, "truncate_dim=0: expected an integer of at least 1"),
        ({"default_prompt_name": "x"}, "there is no prompt 'x'"),
        ({"framework": "onnx"}, "framework='onnx': expected one of"),
        ({"dtype": "float32", "model_kwargs": {"dtype": "float32"}}, "dtype is given twice"),
        ({"tokenizer_kwargs": {}, "processor_kwargs": {}}, "are the same argument"),
    ):
        with pytest.raises(ValueError, match=message):
            SentenceTransformer(folder, **options)
    with pytest.raises(ValueError, match="pass a name or folder, or modules="):
        SentenceTransformer()
    with pytest.raises(ValueError, match="dtype has no effect on modules"):
        SentenceTransformer(modules=[Transformer(folder)], dtype="float32")
    with pytest.raises(TypeError, match="the first module must be a Transformer"):
        SentenceTransformer(modules=[Pooling(4)])
    with pytest.raises(TypeError, match="Linear is not supported as a module"):
        SentenceTransformer(modules=[Transformer(folder), torch.nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="of width 5, but those before it have 32"):
        SentenceTransformer(modules=[Transformer(folder), Pooling(5)])
    for options, message in (
        ({"batch_size": 0}, "batch_size=0: expected an integer of at least 1"),
        ({"output_value": "tokens"}, "output_value='tokens': expected one of"),
        ({"precision": "int4"}, "precision='int4': expected one of"),
        ({"precision": "int8", "output_value": None}, "is for output_value='sentence_embedding'"),
        ({"prompt_name": "x"}, "there is no prompt 'x'; the prompts are: 'query'"),
        ({"prompt": "a", "prompt_name": "query"}, "exclude each other"),
        ({"chunk_size": 3}, "chunk_size is for several processes"),
        ({"truncate_dim": True}, "truncate_dim=True"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode("a", **options)
    for inputs, message in (
        ([("a", "b")], "text 0 is a tuple"),
        (["a", None], "text 1 is a None"),
        ({"a": 1}, "dict"),
    ):
        with pytest.raises(TypeError, match=message):
            model.encode(inputs)
    with pytest.raises(ValueError, match="no module pools the tokens"):
        SentenceTransformer(modules=[Transformer(folder)]).encode("a")


# ---------------------------------------------------------------------------- CrossEncoder


@pytest.fixture(scope="session")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoder:
    folder = tmp_path_factory.mktemp("cross-encoder")
    return CrossEncoder(cases.write(folder, "MPNet", "ForSequenceClassification", num_labels=1), device="cpu")


def test_scores(ranker: CrossEncoder, caplog: pytest.LogCaptureFixture) -> None:
    assert ranker.num_labels == 1 and ranker.activation_fn == "Sigmoid" and ranker.max_length == cases.LENGTH
    scores, truncated = ranker.predict(cases.PAIRS, return_truncated=True)
    assert scores.shape == (4,) and truncated[:3].tolist() == [0, 0, 0] and truncated[3] > 0
    assert "1 of 4 texts have more than" in caplog.text and "predict(..." in caplog.text
    assert ranker.predict(cases.PAIRS[0]).shape == () and ranker.predict([]).shape == (0,)
    logits = ranker.predict(cases.PAIRS, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), scores, rtol=1e-5)
    doubled = ranker.predict(cases.PAIRS, activation_fn=lambda tensor: 2 * tensor)
    np.testing.assert_allclose(doubled, 2 * logits, rtol=1e-6)
    assert isinstance(ranker.predict(cases.PAIRS, convert_to_tensor=True), torch.Tensor)
    assert isinstance(ranker.predict(cases.PAIRS, convert_to_numpy=False)[0], torch.Tensor)


def test_rank(ranker: CrossEncoder) -> None:
    documents = ["a cat", "the mat", "x", "a dog ran"]
    scores = ranker.predict([("the cat", document) for document in documents])
    found = ranker.rank("the cat", documents, return_documents=True)
    assert [hit["corpus_id"] for hit in found] == np.argsort(-scores).tolist()
    assert [hit["text"] for hit in found] == [documents[hit["corpus_id"]] for hit in found]
    np.testing.assert_allclose([hit["score"] for hit in found], np.sort(scores)[::-1], atol=ATOL)
    assert (
        len(ranker.rank("the cat", documents, top_k=2)) == 2 and "text" not in ranker.rank("a", documents)[0]
    )
    assert ranker.rank("the cat", []) == []


def test_a_cross_encoder_without_head(folders: dict[str, Path]) -> None:
    """The head is initialised, with one label unless num_labels is given."""
    assert CrossEncoder(folders["MPNet"], device="cpu").num_labels == 1
    encoder = CrossEncoder(folders["MPNet"], num_labels=4, max_length=9, device="cpu")
    assert encoder.predict(cases.PAIRS).shape == (4, 4)
    assert encoder.activation_fn == "Identity" and encoder.max_seq_length == 9
    assert encoder.predict(cases.PAIRS, apply_softmax=True).sum(1) == pytest.approx(np.ones(4), abs=1e-6)
    with pytest.raises(ValueError, match="rank needs a model with one label, and this one has 4"):
        encoder.rank("a", ["b"])


def test_a_causal_language_model_needs_a_head(tmp_path: Path) -> None:
    folder = cases.write(tmp_path / "model", "Mistral", "ForCausalLM")
    with pytest.raises(ValueError, match="MistralForCausalLM as a CrossEncoder"):
        CrossEncoder(folder, device="cpu")
    assert CrossEncoder(folder, num_labels=1, device="cpu").predict(cases.PAIRS).shape == (4,)


def test_activation_of_the_files(tmp_path: Path) -> None:
    folder = cases.write(tmp_path / "model", "MPNet", "ForSequenceClassification", num_labels=1)
    edit(
        folder / "config.json",
        lambda c: c.update(sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"}),
    )
    assert CrossEncoder(folder, device="cpu").activation_fn == "Identity"
    encoder = CrossEncoder(folder, device="cpu", activation_fn="Tanh")
    encoder.save_pretrained(tmp_path / "saved")
    assert CrossEncoder(tmp_path / "saved", device="cpu").activation_fn == "Tanh"
    with pytest.raises(ValueError, match="holds a CrossEncoder, not a SentenceTransformer"):
        SentenceTransformer(tmp_path / "saved", device="cpu")
    encoder.activation_fn = abs
    with pytest.raises(ValueError, match="cannot be saved: use one of Identity"):
        encoder.save_pretrained(tmp_path / "again")


def test_wrong_pairs(ranker: CrossEncoder) -> None:
    for inputs, message in (
        ("a", "got str"),
        ([("a",)], "input 0 is"),
        ([("a", "b"), ("a", 1)], "input 1 is"),
    ):
        with pytest.raises(TypeError, match=message):
            ranker.predict(inputs)
    with pytest.raises(ValueError, match="top_k=0"):
        ranker.rank("a", ["b"], top_k=0)


# ---------------------------------------------------------------------------- the real model


@pytest.mark.real
@pytest.mark.skipif(
    "MONOBLOCK_REAL" not in os.environ, reason="MONOBLOCK_REAL names no folder of all-mpnet-base-v2"
)
def test_all_mpnet_base_v2() -> None:
    """The vectors that sentence-transformers 5.7 gave on PyTorch 2.13, CPU, float32, in batches of 16."""
    recorded = np.load(cases.RECORDED.with_name("all_mpnet_base_v2.npz"))
    texts = [str(text) for text in recorded["texts"]]
    model = SentenceTransformer(os.environ["MONOBLOCK_REAL"], device="cpu")
    assert len(model) == 3 and model.max_seq_length == 384
    np.testing.assert_allclose(model.encode(texts), recorded["vectors"], rtol=0, atol=ATOL)
