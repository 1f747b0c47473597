"""The project's words are the field's: private names of things stay out of code, comments, documents and messages."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUFFIXES = {".py", ".pyi", ".hpp", ".cpp", ".h", ".md", ".toml", ".cfg", ".yml", ".yaml", ".html", ""}
FOLDERS = ("src", "tests", "bench", "tools", "examples", "docs")
# This file holds the phrases; the licence's text is not ours.
APART = {Path(__file__).resolve(), ROOT / "LICENSE"}

# A phrase (case does not matter; a word also where it is part of a name_with_underscores), and what to say for it.
PHRASES = {
    # RoPE, layouts
    r"turned|unturned|turning|turns? (q|k|keys|queries|heads|channels)": "apply RoPE, rotated, before RoPE",
    r"turns (it|them|the cache|the matrix) over|turned over|crosswise|change places": "transpose, pack",
    # threads and memory
    r"dealt( out)?|deals? (anew|out|turns)|turns of (a|the) (phase|thread|product)": "a parallel loop over chunks",
    r"whoever|whomever": "a noun: the caller, the thread that",
    r"what comes soon|read soon|asks? for what|asked for ahead|soon\.hpp": "software prefetch",
    r"second cache|near cache|nearest cache": "L2, L1",
    r"foresees?|foreseen": "sequential, so that the hardware prefetcher follows it",
    r"meets? (the )?(weights|inputs|rows)|weights meet": "multiply",
    r"stretch|stretches": "panel, K block, KV block, range",
    r"whole[- ]numbers?": "integer(s); integer (VNNI) dot products",
    r"anew|afresh": "again, a new, reset",
    # attention
    r"who(m)? (sees|looks)|sees whom|may not look|not seen by|blind|evened": "attention mask, masked, fully masked",
    r"look(s|ing)? both ways|both ways": "bidirectional",
    r"row of nothing|nothing else gives": "a fully masked row would be NaN",
    r"nobody (watches|sees|looks)|less ado": "no dispatch mode or transform is active",
    # captured graphs
    r"play(s|ed|ing)? (it|them|the graph|a graph|back)|recordings?": "capture, captured graph, replay",
    # sequences
    r"(texts?|rows?) (that |which )?parts?\b(?! of)|until (texts|they) part|parting": "diverge",
    r"(one|two|three|four|eight|many|[0-9]+) texts at once|eight texts": "a batch of 8 sequences",
    r"places": "positions, indices, slots; bytes, offsets",
    r"(a|the|each|every|which|one|its|their|that|this|first|last|next) place\b(?! of)": "position, index, slot, offset",
    r"pieces? of (memory|work|(the|a) file|(the|an) array|rows|columns|keys|tensors?)": "chunks, blocks, shards",
    # people and origins
    r"(the )?hub's (class|classes|names?|defaults?|rules?|fields?|words?|options?|arguments?|transformers|"
    r"PyTorch|config|configs|module|modules|tree|way|own|order|code)": "transformers' ...",
    r"makers?'?s?": "upstream, the original implementation",
    r"strangers?": "untrusted (files), other people",
    r"wish(es)?|unheard": "an ignored option",
    r"the house|a seam|contestants?": "pipeline_adapter, ...; backend or runner",
    r"said once|is said|are said|says so": "logged once, reported, documented",
    r"spoil(s|t|ed)?": "mutate, corrupt",
    r"by turns|in turn, each|takes? turns|took turns": "alternate(s)",
    r"beforehand|hitherto|thereof|whence|wherein": "plain words",
}


def patterns() -> re.Pattern[str]:
    """One pattern for all; underscores and digits end a word, so that names are searched as well."""
    return re.compile("|".join(f"(?<![A-Za-z])(?:{phrase})(?![A-Za-z])" for phrase in PHRASES), re.IGNORECASE)


def files() -> list[Path]:
    if not (ROOT / ".git").exists():  # an unpacked sdist
        listed = [
            str(path.relative_to(ROOT))
            for top in FOLDERS
            for path in (ROOT / top).rglob("*")
            if path.is_file()
        ]
    else:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        listed = run.stdout.splitlines()
    return [ROOT / name for name in listed if Path(name).suffix in SUFFIXES]


def found(text: str) -> list[tuple[int, str]]:
    """Each phrase with the number of its line."""
    search = patterns()
    return [
        (number, match.group())
        for number, line in enumerate(text.splitlines(), 1)
        for match in search.finditer(line)
    ]


def left_over(wanted: list[Path]) -> list[str]:
    """Each phrase of those folders or files, with its file and line."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {phrase}"
        for path in files()
        if path not in APART and path.is_file() and any(path == w or w in path.parents for w in wanted)
        for number, phrase in found(path.read_text())
    ]


def test_no_listed_phrase_is_left() -> None:
    assert not left_over([ROOT])


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("keys that were turned", "turned"),
        ("def has_places(x):", "places"),
        ("the makers' own code", "makers'"),
        ("A whole-number product", "whole-number"),
        ("the hub's names", "the hub's names"),
    ],
)
def test_phrases_are_found_in_prose_and_in_names(text: str, phrase: str) -> None:
    assert found(f"first line\n{text}") == [(2, phrase)]


@pytest.mark.parametrize(
    "text", ["replaces a placeholder", "in place of", "returned", "a record of the trade"]
)
def test_other_words_are_not(text: str) -> None:
    assert not found(text)


# Data that describes a module has its name: `spec.Attention` is what the backends' `Attention` is built from. A
# structure of the native interface has the name that it has in C++. `embeddings.LayerNorm` has the package's name.
SAME_NAME = {"Attention", "Mlp", "Dropout", "LowRank", "LayerNorm"}


def test_a_class_name_stands_for_one_thing() -> None:
    """Only the parallel backends have classes of the same name, one each."""
    homes: dict[str, list[str]] = {}
    for path in (ROOT / "src" / "monoblock").rglob("*.py"):
        parts = path.relative_to(ROOT / "src" / "monoblock").parts
        home = parts[1] if parts[0] == "backends" and len(parts) > 2 else "no backend"
        for name in re.findall(r"^class (\w+)", path.read_text(), re.MULTILINE):
            homes.setdefault(name, []).append(home)
    shared = {name: found for name, found in homes.items() if len(found) > 1}
    assert not {
        name: found
        for name, found in shared.items()
        if name not in SAME_NAME and (len(set(found)) < len(found) or "no backend" in found)
    }


if __name__ == "__main__":  # python tests/core/test_words.py [FOLDER or FILE ...]: the phrases that are left
    import sys

    print("\n".join(left_over([Path(name).resolve() for name in sys.argv[1:]] or [ROOT])))
