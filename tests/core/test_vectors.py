"""Runs that embed texts: inputs, the three output formats, resumption after a kill at any file operation, search."""

from __future__ import annotations

import io
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kill_points
import numpy as np
import pytest

from monoblock.checkpoint.options import HubOptions
from monoblock.installed import installed
from monoblock.vectors import outputs
from monoblock.vectors.identity import model_fingerprint
from monoblock.vectors.index import open_index
from monoblock.vectors.inputs import TextInput, chunks
from monoblock.vectors.nearest import SIMILARITIES, nearest
from monoblock.vectors.run import started

WIDTH, CHUNK = 5, 4
TEXTS = [f"text {i} é\t{'x' * (i % 7)}" for i in range(18)] + ["", 'a "quote"\\', "\u2028 is no line end"]
OPTIONS = {"--model": "m", "--batch-size": CHUNK}
DESCRIPTION = {"model": "a model", "similarity": "cosine"}
needs_pyarrow = pytest.mark.skipif(not installed("pyarrow"), reason="needs pyarrow")
SUFFIXES = [".npy", ".jsonl", pytest.param(".parquet", marks=needs_pyarrow)]


def vector(text: str) -> np.ndarray:
    """Values that differ between texts."""
    raw = np.frombuffer(text.encode().ljust(WIDTH, b"."), np.uint8)
    return np.array([raw[i::WIDTH].sum() / 7 for i in range(WIDTH)], np.float32)


def encode(texts: list[str]) -> tuple[np.ndarray, int]:
    return np.stack([vector(text) for text in texts]), sum(len(text) > 12 for text in texts)


def run(source: Path | str, output: Path, *, options: dict[str, Any] = OPTIONS, **keywords: Any) -> int:
    """Embeds, and returns how many texts an earlier run had left."""
    with started(TextInput(str(source)), output, options, **keywords) as job:
        if job.whole:
            job.publish()
        else:
            job.execute(encode, CHUNK, DESCRIPTION, lambda _: None)
        assert job.truncated == sum(len(text) > 12 for text in TEXTS)
        return job.resumed


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_index_has_the_texts_and_their_vectors(source: Path, tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"x{suffix}"
    assert run(source, output) == 0
    index = open_index(output)
    assert np.concatenate(list(index.blocks())).tobytes() == encode(TEXTS)[0].tobytes()
    assert index.texts({0, 18, 19, 20}) == {i: TEXTS[i] for i in (0, 18, 19, 20)}
    assert index.width == WIDTH
    assert DESCRIPTION.items() <= index.description.items() and index.description["count"] == len(TEXTS)
    beside = {".npy": {"x.npy.texts.jsonl", "x.npy.index.json"}, ".jsonl": {"x.jsonl.index.json"}}
    assert {path.name for path in tmp_path.iterdir()} == {"in.txt", output.name} | beside.get(suffix, set())


def test_a_npy_file_is_the_one_that_numpy_writes(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "x.npy")
    np.save(tmp_path / "numpy.npy", encode(TEXTS)[0])
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    lines = (tmp_path / "x.npy.texts.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line) for line in lines] == [{"text": text} for text in TEXTS]


@needs_pyarrow
def test_a_parquet_file_has_two_typed_columns(source: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    run(source, tmp_path / "x.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    assert table.schema.field("text").type == pyarrow.string()
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), WIDTH)
    assert table["text"].to_pylist() == TEXTS


def test_parquet_without_pyarrow(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monoblock.vectors.parquet.installed", lambda _: False)
    with pytest.raises(ImportError, match=r'pip install "monoblock\[parquet\]"'):
        run(source, tmp_path / "x.parquet")
    with pytest.raises(ImportError, match="pyarrow"):
        list(TextInput(str(tmp_path / "in.parquet")).texts())


# ---------------------------------------------------------------------------- resumption


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_kill_at_any_file_operation_loses_nothing(source: Path, tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    count = len(kill_points.operations(lambda: run(source, whole / f"x{suffix}")))
    expected = contents(whole)
    resumed: set[int] = set()
    for at in kill_points.spread(count - 1, 16):
        folder = tmp_path / str(at)
        folder.mkdir()
        output = folder / f"x{suffix}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert kill_points.killed(lambda at=at, output=output: run(source, output), at)
        if output.exists():  # under its name it is whole
            assert output.read_bytes() == expected[output.name]
        for path in folder.glob("*.partial*"):  # a write that was cut off
            if path.suffix in (".partial", ".texts") and not _whole(folder):
                with path.open("ab") as file:
                    file.write(b"half a te")
        if not output.exists() or (folder / f"{output.name}.partial.json").exists():
            resumed.add(run(source, output))
        else:
            (folder / f"{output.name}.partial.lock").unlink(missing_ok=True)
        assert contents(folder) == expected, at
    assert len(resumed) >= 4  # begun at different chunks


def _whole(folder: Path) -> bool:
    return any(json.loads(path.read_bytes())["whole"] for path in folder.glob("*.partial.json"))


def killed_in_the_middle(source: Path, output: Path) -> None:
    left = [3]

    def stop(texts: list[str]) -> tuple[np.ndarray, int]:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return encode(texts)

    with pytest.raises(KeyboardInterrupt), started(TextInput(str(source)), output, OPTIONS) as job:
        job.execute(stop, CHUNK, DESCRIPTION, lambda _: None)
    assert not output.exists()


def test_other_options_and_inputs_are_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.npy"
    killed_in_the_middle(source, output)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"8 texts .*--batch-size 4, and now it is 8: .*--restart"):
        run(source, output, options=OPTIONS | {"--batch-size": 8})
    with pytest.raises(ValueError, match=r"--prompt not given, and now it is 'q: '"):
        run(source, output, options=OPTIONS | {"--prompt": "q: "})
    with pytest.raises(ValueError, match=r"another --model"):
        run(source, output, options=OPTIONS | {"--model": "n"})
    source.write_text("\n".join([*TEXTS, "one more"]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"another input: .*in.txt has other texts.*--restart"):
        run(source, output)
    assert contents(tmp_path) == before | {"in.txt": source.read_bytes()}
    source.write_bytes(before["in.txt"])
    assert run(source, output) == 2 * CHUNK


def test_restart_discards(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.npy"
    killed_in_the_middle(source, output)
    assert run(source, output, options=OPTIONS | {"--model": "n"}, restart=True) == 0


def test_damaged_partial_files_are_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.npy"
    killed_in_the_middle(source, output)
    vectors = tmp_path / "x.npy.partial"
    vectors.write_bytes(vectors.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"shorter than its journal says: --restart"):
        run(source, output)
    (tmp_path / "x.npy.partial.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no journal of this version: --restart"):
        run(source, output)


def test_standard_input_is_resumed_if_it_begins_with_the_same_texts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def piped(text: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))

    raw, output = source.read_bytes(), tmp_path / "x.npy"
    piped(raw)
    killed_in_the_middle(Path("-"), output)
    for other in (raw.replace(b"text 0", b"text 9"), raw[:20]):
        piped(other)
        with pytest.raises(ValueError, match="standard input has other texts"):
            run("-", output)
    piped(raw)
    assert run("-", output) == 2 * CHUNK
    run(source, tmp_path / "y.npy")
    assert output.read_bytes() == (tmp_path / "y.npy").read_bytes()


def test_an_existing_output_is_kept_unless_forced(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.npy"
    output.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="--force"):
        run(source, output)
    assert output.read_bytes() == b"old"
    run(source, output, force=True)
    assert open_index(output).texts({1}) == {1: TEXTS[1]}


def test_one_process_per_output(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.npy"
    with (
        started(TextInput(str(source)), output, OPTIONS),
        pytest.raises(BlockingIOError, match="another process"),
        started(TextInput(str(source)), output, OPTIONS),
    ):
        pass


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (lambda texts: np.full((len(texts), WIDTH), np.nan, np.float32), "text 1 is not finite"),
        (lambda texts: np.zeros((1, WIDTH), np.float32), "returned"),
    ],
)
def test_wrong_vectors(
    source: Path, tmp_path: Path, encoded: Callable[[list[str]], np.ndarray], message: str
) -> None:
    with (
        pytest.raises(ValueError, match=message),
        started(TextInput(str(source)), tmp_path / "x.npy", OPTIONS) as job,
    ):
        job.execute(lambda texts: (encoded(texts), 0), CHUNK, DESCRIPTION, lambda _: None)


def test_refused_outputs(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.npy, \.parquet, \.jsonl"):
        run(source, tmp_path / "x.bin")
    with pytest.raises(FileNotFoundError, match="no folder"):
        run(source, tmp_path / "missing" / "x.npy")
    source.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no text"):
        run(source, tmp_path / "x.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


# ---------------------------------------------------------------------------- inputs


def read(path: Path, content: str | bytes, **options: Any) -> list[str]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(TextInput(str(path), **options).texts())


def test_formats_of_the_input(tmp_path: Path) -> None:
    assert read(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\ntwo \x0c\xe2\x80\xa8") == [
        "one",
        "",
        "two \x0c\u2028",
    ]
    rows = '{"text": "a\\nb", "n": 1}\n\n{"n": 2, "text": "c"}'
    assert read(tmp_path / "a.jsonl", rows) == ["a\nb", "c"]
    assert read(tmp_path / "a.data", rows, format="jsonl", column="text") == ["a\nb", "c"]
    assert read(tmp_path / "a.csv", 'id,body\n1,"two\nlines, ""q"""\n2,b\n', column="body") == [
        'two\nlines, "q"',
        "b",
    ]
    assert read(tmp_path / "a.tsv", "text\tn\na b\t1\n") == ["a b"]


@needs_pyarrow
def test_a_column_of_a_parquet_file(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"body": ["a", "b\n"], "n": [1, 2]})
    pyarrow.parquet.write_table(table, path, row_group_size=1)
    source = TextInput(str(path), column="body")
    found = source.fingerprint()
    assert list(source.texts()) == ["a", "b\n"] and found is not None and found.total == 2
    with pytest.raises(ValueError, match="one column 'text'; the file has 'body', 'n'"):
        list(TextInput(str(path)).texts())
    with pytest.raises(ValueError, match="row 1: expected a string in 'n', found a value of type int"):
        list(TextInput(str(path), column="n").texts())
    with pytest.raises(ValueError, match="no valid Parquet file"):
        read(tmp_path / "b.parquet", "nothing")


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", b"a\n\xff\n", {}, r"a.txt, line 2: byte 0 is not UTF-8"),
        ("a.txt", b"a", {"column": "text"}, "has no column 'text'"),
        ("a.txt", b"a", {"format": "xml"}, "input format 'xml'"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', {}, r"line 2: there is no field 'text'; .* has 'body'"),
        ("a.jsonl", b"[1]", {}, "line 1: expected a JSON object, found list"),
        ("a.jsonl", b"{", {}, "line 1: no JSON"),
        ("a.jsonl", b'{"text": null}', {}, "line 1: expected a string in 'text', found nothing"),
        ("a.jsonl", b'{"text": "\\ud800"}', {}, "line 1 holds the lone surrogate U\\+D800"),
        ("a.csv", b"a,b\n1,2\n", {}, "one column 'text'; the header has 'a', 'b'"),
        ("a.csv", b"text,b\n1\n", {}, "line 2: expected 2 fields, found 1"),
        ("a.csv", b'text\n"a"b\n', {}, "line 2: no CSV"),
        ("a.csv", b"text\n\xff\n", {}, "not UTF-8"),
    ],
)  # fmt: skip
def test_refused_inputs(
    tmp_path: Path, name: str, content: bytes, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, content, **options)


def test_parquet_is_not_read_from_a_stream() -> None:
    with pytest.raises(ValueError, match="standard input is a stream"):
        TextInput("-", "parquet")


def test_chunks_depend_on_the_texts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monoblock.vectors.inputs._CHUNK_CHARACTERS", 10)
    assert list(chunks(["a"] * 5 + ["b" * 20, "c"], 4)) == [["a"] * 4, ["a", "b" * 20], ["c"]]


# ---------------------------------------------------------------------------- search


def brute_force(queries: np.ndarray, rows: np.ndarray, similarity: str) -> np.ndarray:
    """Scores in float64, [queries, rows]."""
    q, r = queries.astype(np.float64)[:, None], rows.astype(np.float64)[None]
    match similarity:
        case "dot":
            return (q * r).sum(-1)
        case "euclidean":
            return -np.sqrt(((q - r) ** 2).sum(-1))
        case "manhattan":
            return -np.abs(q - r).sum(-1)
        case _:
            return (q * r).sum(-1) / np.linalg.norm(q, axis=-1) / np.linalg.norm(r, axis=-1)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("size", [1, 7, 300])
def test_search_equals_brute_force(similarity: str, size: int) -> None:
    random = np.random.default_rng(0)
    rows, queries = (random.standard_normal((n, 8)).astype(np.float32) for n in (300, 3))
    scores, found = nearest((rows[i : i + size] for i in range(0, 300, size)), queries, 10, similarity)
    expected = brute_force(queries, rows, similarity)
    order = np.argsort(-expected, axis=1)[:, :10]
    assert (found == order).all()
    # float32, sums of 8 values of size 1
    np.testing.assert_allclose(scores, np.take_along_axis(expected, order, 1), atol=1e-5)


def test_equal_scores_and_few_rows() -> None:
    rows = np.array([[0, 0], [1, 0], [2, 0], [0, 1], [3, 0]], np.float32)
    query = np.array([[1, 0]], np.float32)
    for size in (1, 2, 5):
        blocks = [rows[i : i + size] for i in range(0, 5, size)]
        assert nearest(blocks, query, 3)[1].tolist() == [[1, 2, 4]]
        scores, found = nearest(blocks, query, 99)
        assert found.tolist() == [[1, 2, 4, 0, 3]] and scores.tolist() == [[1, 1, 1, 0, 0]]


def test_blocks_of_a_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monoblock.vectors.index.BLOCK_BYTES", 4 * WIDTH * 2)
    for suffix in (".npy", ".jsonl"):
        run(source, tmp_path / f"x{suffix}")
        blocks = list(open_index(tmp_path / f"x{suffix}").blocks())
        assert {len(block) for block in blocks} == {1, 2}
        assert np.concatenate(blocks).tobytes() == encode(TEXTS)[0].tobytes()


def test_refused_indexes(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.npy"
    killed_in_the_middle(source, output)
    with pytest.raises(FileNotFoundError, match="not finished"):
        open_index(output)
    run(source, output)
    texts = outputs.beside(output, "texts.jsonl")
    with texts.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ValueError, match="different runs"):
        open_index(output)
    texts.unlink()
    with pytest.raises(FileNotFoundError, match="with the texts is missing"):
        open_index(output)
    np.save(output, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"expected floats or int8 \[texts, width\], row by row"):
        open_index(output)
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_index(tmp_path / "y.npy")


def test_damaged_texts_and_vectors(source: Path, tmp_path: Path) -> None:
    lines = tmp_path / "x.jsonl"
    for text, message in [
        ('{"text": "a"}', "line 1: expected a list of numbers in 'embedding'"),
        ('{"text": "a", "embedding": ["b"]}', "line 1: expected a list of numbers"),
        ("[1]", "line 1: expected a JSON object, found list"),
        ("{", "line 1: no JSON"),
        ("", "is empty"),
    ]:
        lines.write_text(text)
        with pytest.raises(ValueError, match=message):
            open_index(lines)
    lines.write_text('{"text": 1, "embedding": [1, 2]}\n{"text": "b", "embedding": [1]}')
    index = open_index(lines)
    assert index.description == {}
    with pytest.raises(ValueError, match="line 2: expected a list of 2 numbers"):
        list(index.blocks())
    with pytest.raises(ValueError, match="line 1: expected a string in 'text'"):
        index.texts({0})
    np.save(tmp_path / "y.npy", np.zeros((3, 2), np.float64))  # of another program
    (tmp_path / "y.npy.texts.jsonl").write_text('{"text": "a"}')
    index = open_index(tmp_path / "y.npy")
    assert [block.dtype for block in index.blocks()] == [np.float32]
    with pytest.raises(ValueError, match="no text for row 2"):
        index.texts({0, 2})


@needs_pyarrow
def test_vectors_of_int8_are_directions(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.array([[31, 0, 4], [-3, 31, 0]], np.int8))
    (tmp_path / "x.npy.texts.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    index = open_index(path)
    (block,) = index.blocks()
    assert block.dtype == np.float32 and index.width == 3
    assert index.description["similarity"] == "cosine"  # whatever that of the query's model is
    scores, rows = nearest(index.blocks(), np.array([[31, 0, 4]], np.float32), 1)
    assert rows.tolist() == [[0]] and abs(scores[0, 0] - 1) < 1e-6
    (tmp_path / "x.npy.index.json").write_text('{"similarity": "dot"}')
    with pytest.raises(ValueError, match="vectors of int8, which have a cosine, but no dot"):
        open_index(path)
    np.save(path, np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match="expected floats or int8"):
        open_index(path)


@needs_pyarrow
def test_a_parquet_index_of_another_program(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "x.parquet"
    for vectors, valid in (
        ([[1.0, 2.0], [3.0, 4.0]], True),
        ([[1.0, 2.0], [3.0]], False),
        ([[1.0], None], False),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "embedding": vectors}), path)
        if valid:
            index = open_index(path)
            assert (index.width, index.description) == (2, {})
            assert np.concatenate(list(index.blocks())).tolist() == vectors
        else:
            with pytest.raises(ValueError, match="differ in length, or are missing"):
                list(open_index(path).blocks())


# ---------------------------------------------------------------------------- models


def test_the_fingerprint_of_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    weights = folder / "model.safetensors"
    files = {"config.json": b"{}", "1_Pooling/config.json": b"{}", "tokenizer.json": b"{}", "vocab.txt": b"a"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    weights.write_bytes(bytes(2 << 20))

    def found(path: Path = folder) -> str:
        return model_fingerprint(str(path), HubOptions())

    before = found()
    (folder / "x.npy.partial.json").write_text("{}")  # not a file of the model
    (folder / "texts.txt").write_text("a")
    assert found() == before
    assert found(Path(shutil.copytree(folder, tmp_path / "copy"))) == before
    for name in files:
        (folder / name).write_bytes(b"[]")
        assert found() != before
        (folder / name).write_bytes(files[name])
    weights.write_bytes(bytes((2 << 20) - 1) + b"a")
    assert found() != before
    snapshot = tmp_path / "snapshots" / ("0a" * 20)
    shutil.copytree(folder, snapshot)
    assert found(snapshot) == "0a" * 20  # the commit
