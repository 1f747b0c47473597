"""The training corpus of the embedded demo model: the standard library of the running Python.

`collect()` returns the cleaned files in a fixed order; `dialogues()` extracts request/reply pairs for `monoblock chat`
(the first sentence of a docstring, and the function it describes); `train_tokenizer()` trains a byte-level BPE. The
results do not depend on time, locale or hash seeds.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ENDOFTEXT, PADDING, USER, ASSISTANT = SPECIALS = ("<|endoftext|>", "<|padding|>", "<|user|>", "<|assistant|>")

# Files of tables and reference text.
SKIPPED = re.compile(r"site-packages|encodings/|pydoc_data/|/data/|encoded_modules/|(^|/)config-")
TEST_PARTS = {"test", "tests", "idle_test"}
TEST_FILE_LIMIT = 60_000  # characters; the largest test modules repeat one pattern for 300 kB
# Limits per character, above which a file is a table rather than code.
LIMITS = {"digits": 0.08, "backslashes": 0.02, "not ASCII": 0.005}

# A line break is split together with the following blank lines and indentation, so that a line starts with one token.
# Words keep one leading space and leading underscores; digits are single; the last three alternatives are spaces
# within a line.
SPLIT = (
    r"(?:\r?\n)+[ \t]*|'(?:s|t|re|ve|m|ll|d)\b| ?_*\p{L}+| ?\p{N}|"
    r" ?[^\s\p{L}\p{N}]+|[^\S\n]+(?=\n|$)|[^\S\n]+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A source file: its path within the library, its cleaned text, and whether it is a test."""

    name: str
    text: str
    is_test: bool

    @property
    def held_out(self) -> bool:
        """Whether the file is among the 2% that are held out, selected by a hash of the name."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big") % 50 == 0


def collect(root: Path | None = None) -> list[Document]:
    """All distinct files below `root` (the standard library) that parse and are code rather than tables, by name."""
    root = root or Path(sysconfig.get_path("stdlib"))
    documents: list[Document] = []
    unique: set[str] = set()
    for path in sorted(root.rglob("*.py"), key=lambda found: found.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        text = None if SKIPPED.search(name) else _read(path)
        if text is None or text in unique:
            continue
        unique.add(text)
        is_test = not TEST_PARTS.isdisjoint(name.split("/"))
        documents.append(Document(name=name, text=_cut(text) if is_test else text, is_test=is_test))
    return documents


def digest(documents: Iterable[Document]) -> str:
    """SHA-256 of names and texts: two runs with the same digest trained on the same corpus."""
    state = hashlib.sha256()
    for document in documents:
        state.update(f"{document.name}\0{document.text}\0".encode())
    return state.hexdigest()


def _read(path: Path) -> str | None:
    """The cleaned text, or None if the file is not UTF-8, does not parse, is a stub or is a table."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return None
    text = clean(text)
    if len(text) < 200 or any(fraction > LIMITS[kind] for kind, fraction in _fractions(text).items()):
        return None
    return text


def clean(text: str) -> str:
    """Unix line breaks, no form feeds, tabs expanded to 8 columns, no trailing spaces, at most two blank lines."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "").split("\n")
    text = "\n".join(line.expandtabs(8).rstrip() for line in lines)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n") + "\n"


def _fractions(text: str) -> dict[str, float]:
    counts = {
        "digits": sum(map(str.isdigit, text)),
        "backslashes": text.count("\\"),
        "not ASCII": sum(not char.isascii() for char in text),
    }
    return {kind: count / len(text) for kind, count in counts.items()}


def _cut(text: str) -> str:
    """The leading top-level statements within TEST_FILE_LIMIT characters."""
    if len(text) <= TEST_FILE_LIMIT:
        return text
    lines = text.split("\n")
    room = len(text[:TEST_FILE_LIMIT].split("\n")) - 1
    ends = [node.end_lineno for node in ast.parse(text).body if node.end_lineno and node.end_lineno <= room]
    return "\n".join(lines[: ends[-1]]) + "\n" if ends else text


def dialogues(document: Document) -> Iterator[tuple[str, str]]:
    """Request/reply pairs of a file, for functions and classes of at most 60 lines.

    The request is the first sentence of the docstring, which the reply omits; for a top-level function or class
    without docstring, its first line. Replies are dedented to column 0.
    """
    lines = document.text.split("\n")
    for node in ast.walk(ast.parse(document.text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        docstring = ast.get_docstring(node)
        code = lines[node.lineno - 1 : node.end_lineno]
        if docstring is None:
            request = code[0] if node.col_offset == 0 and code[0].endswith(":") else ""
        else:
            request = _first_sentence(docstring) if len(node.body) > 1 else ""
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            code = lines[node.lineno - 1 : first - 1] + lines[last : node.end_lineno]
        indent = " " * node.col_offset
        if request and 1 < len(code) <= 60 and all(not line or line.startswith(indent) for line in code):
            yield request, "\n".join(line[len(indent) :] for line in code).strip("\n") + "\n"


def _first_sentence(docstring: str) -> str:
    """The docstring's first sentence if it has 10 to 160 characters and a capital first letter, else ""."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph)[0]
    return sentence if 10 <= len(sentence) <= 160 and sentence[0].isupper() and " " in sentence else ""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A lossless byte-level BPE whose first ids are the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
