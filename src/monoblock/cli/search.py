"""`monoblock search`: the texts of an index that are nearest to a query."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.encoder import EncoderOptions, PromptOptions
from monoblock.cli.options import DownloadOptions

if TYPE_CHECKING:
    from monoblock.cli.encoder import Encoder
    from monoblock.vectors.index import Index

app = sub_app()

QUERIES = 64  # that are searched in one pass over the index
QUERY_PROMPT = "query"  # the name of a model's prompt for queries


@app.command(epilog=EXIT_CODES)
@console.command
def search(
    *,
    query: Annotated[str, typer.Argument(help="The text to search for; -: one per line of standard input.")],
    index: Annotated[
        Path | None,
        typer.Option(
            "--index",
            "-i",
            help="A file that `monoblock embed` wrote; default: the documentation of Python's standard library.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Folder, or name on the hub; default: that of the index."),
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Texts per query.")] = 5,
    prompts: PromptOptions,
    options: EncoderOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per query.")] = False,
    hub: DownloadOptions,
) -> None:
    """Print the texts of an index that are nearest to a query, best first: score, row, text. Without --index, those of
    the documentation of Python's standard library, by the embedded search model.

    The search is exact: it compares the query with every vector. The score is the model's similarity, by default the
    cosine; of a distance, its negative. Queries have the model's prompt "query" before them, if it has one.
    """
    prompts.check()
    if index is None and model is not None:
        raise typer.BadParameter("--model needs --index: the embedded index has its own model")
    from monoblock import demo_embeddings
    from monoblock.cli import encoder
    from monoblock.vectors.index import open_index

    index = demo_embeddings.index() if index is None else index
    found = open_index(index)
    source = model or found.description.get("model")
    if not isinstance(source, str):
        raise typer.BadParameter(f"{index} does not tell its model: give --model")
    framework = encoder.framework_of(options, "monoblock search")
    recorded = found.description.get("fingerprint")
    if recorded is not None and recorded != encoder.identity(source, hub):
        console.note(f"warning: {source} is not the model, or not the version, that {index} was made with")
    loaded = encoder.load(
        source,
        options,
        hub,
        framework,
        prompt=prompts.prompt,
        prompt_name=prompts.prompt_name,
        normalize_embeddings=bool(found.description.get("normalize")),
        truncate_dim=found.description.get("truncate_dim"),
    )
    if prompts.prompt is None and prompts.prompt_name is None:
        loaded.use_prompt(QUERY_PROMPT)
    several = query == "-"
    queries = _piped() if several else iter([query])
    while some := list(islice(queries, QUERIES)):
        for text, results in zip(some, _search(found, loaded, some, top_k), strict=True):
            if as_json:
                print(json.dumps({"query": text, "results": results}, ensure_ascii=False))
            else:
                _show(text if several else None, results)


def _piped() -> Iterator[str]:
    """The queries of standard input, without blank lines."""
    for line in sys.stdin:
        if line := line.strip():
            yield line


def _search(index: Index, loaded: Encoder, queries: list[str], count: int) -> list[list[dict[str, Any]]]:
    """For each query its nearest texts: {"score", "row", "text"}."""
    from monoblock.vectors.nearest import nearest

    vectors, _ = loaded.encode(queries)
    if vectors.shape[1] != index.width:
        raise ValueError(
            f"the model returns vectors of {vectors.shape[1]} values, and {index.path} holds vectors of "
            f"{index.width}: pass the --model that made it"
        )
    similarity = index.description.get("similarity") or loaded.similarity
    scores, rows = nearest(index.blocks(), vectors, count, similarity)
    texts = index.texts({int(row) for row in rows.flat})
    return [
        [
            {"score": float(score), "row": int(row), "text": texts[int(row)]}
            for score, row in zip(*pair, strict=True)
        ]
        for pair in zip(scores, rows, strict=True)
    ]


def _show(query: str | None, results: list[dict[str, Any]]) -> None:
    """Print a line per text: score, row and text, separated by tabs; before them the query if there are several."""
    if query is not None:
        console.write(f"# {query}\n")
    for found in results:
        text = " ".join(found["text"].split())
        console.write(f"{found['score']:.4f}\t{found['row']}\t{text}\n")
