"""SentencePiece vocabularies as `tokenizers` backends: BPE, Unigram and word models, with byte fallback.

SentencePiece inserts one space before the whole text and writes spaces as "▁"; a text that begins with a space then
begins with two. The library's Metaspace leaves such a text with one, so a normaliser doubles it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordLevel

from monoblock.errors import CheckpointError, UnsupportedConfig
from monoblock.tokenization.protobuf import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, SentencePieceModel

SPACE = "▁"
MOST_MERGES = 4_000_000  # splits of pieces into two others; vocabularies of 131,000 pieces have some 270,000
# A space at the very start of a text gets the prefix as well. Special tokens are matched after this normalisation
# (`normalized=True`), so that the space after one of them does not count as the start of the text.
FIRST_SPACE = rf"\A[ {SPACE}]"


def from_model(
    model: SentencePieceModel, options: Mapping[str, Any], path: str, *, unused: bool = False
) -> Tokenizer:
    """The backend of a `tokenizer.model`; with `unused`, also of one with unused pieces, which no text encodes to.

    Options: `add_prefix_space` (default: as in the model); `legacy=True` also inserts the prefix after each special
    token, as early versions of transformers' LlamaTokenizer did.
    """
    _check(model, path, unused)
    if model.kind == "bpe":
        backend = Tokenizer(_bpe(model))
    elif model.kind == "unigram":
        backend = Tokenizer(_unigram(model))
    else:
        vocab = {piece: index for index, piece in enumerate(model.pieces)}
        backend = Tokenizer(WordLevel(vocab, unk_token=model.pieces[model.unk_id]))
    prefix = options.get("add_prefix_space")
    prefix = model.dummy_prefix if prefix is None else bool(prefix)
    doubled = set_up_spaces(
        backend, prefix, legacy=bool(options.get("legacy")), before=_clean(model), splits=_splits(model)
    )
    names = [model.pieces[index] for index in model.of_type(UNKNOWN, CONTROL)]
    added = [AddedToken(name, special=True, normalized=doubled) for name in names]
    cast(Any, backend).add_special_tokens(added)
    return backend


def from_vocab(
    vocab: Any, merges: Iterable[tuple[str, str]] | None, unk: str, options: Mapping[str, Any]
) -> Tokenizer:
    """The backend of a vocabulary in memory: token -> id with merges, or (piece, score) pairs for Unigram."""
    if isinstance(vocab, Mapping):
        ids = dict(cast(Mapping[str, int], vocab))
        pairs = list(merges or ())
        backend = Tokenizer(BPE(ids, pairs, unk_token=unk, fuse_unk=True, byte_fallback="<0x00>" in ids))
    else:
        scored = [(str(piece), float(score)) for piece, score in vocab]
        pieces = [piece for piece, _ in scored]
        unk_id = pieces.index(unk) if unk in pieces else None
        backend = Tokenizer(Unigram(scored, unk_id, "<0x00>" in pieces))
    prefix = options.get("add_prefix_space")
    set_up_spaces(backend, True if prefix is None else bool(prefix), legacy=bool(options.get("legacy")))
    return backend


def set_up_spaces(
    backend: Tokenizer,
    prefix: bool,
    *,
    legacy: bool = False,
    before: Iterable[Any] = (),
    splits: Iterable[Any] = (),
) -> bool:
    """Set the components of a backend that convert spaces to "▁" and back; returns whether it has `FIRST_SPACE`.

    `before` are normalisers that run first, `splits` pre-tokenizers that run last.
    """
    normal: list[Any] = list(before)
    # "first" checks for the text's first character, which the normalisers of `before` may have removed.
    doubled = prefix and not legacy and not normal
    if doubled:
        normal.append(normalizers.Replace(Regex(FIRST_SPACE), SPACE * 2))
    elif prefix:
        normal.append(normalizers.Prepend(SPACE))
    if not doubled:
        normal.append(normalizers.Replace(" ", SPACE))
    backend.normalizer = _sequence(normal, normalizers.Sequence)
    spaces = [pre_tokenizers.Metaspace(SPACE, "first", split=False)] if doubled else []
    backend.pre_tokenizer = _sequence([*spaces, *splits], pre_tokenizers.Sequence)
    components: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*components, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return doubled


def doubles_first_space(backend: Tokenizer) -> bool:
    """Whether a backend, of this module or from a file, uses the `FIRST_SPACE` normaliser."""
    return FIRST_SPACE in repr(backend.normalizer) if backend.normalizer is not None else False


def _sequence(components: list[Any], many: Callable[[list[Any]], Any]) -> Any:
    return many(components) if len(components) > 1 else components[0] if components else None


def _check(model: SentencePieceModel, path: str, unused: bool) -> None:
    """Refuse models that would be encoded differently from SentencePiece."""
    what = None
    if model.kind not in ("bpe", "unigram", "word"):
        what = f"its model type is {model.kind!r}"
    elif model.suffix:
        what = "it writes spaces after words (treat_whitespace_as_suffix)"
    elif not model.escape:
        what = "it does not write spaces as '▁' (escape_whitespaces=False)"
    elif model.denormalizes:
        what = "it changes decoded text (denormalizer_spec)"
    elif not 0 <= model.unk_id < len(model.pieces):
        what = f"it has no unknown piece (unk_id={model.unk_id})"
    elif UNUSED in model.types and not unused:
        what = f"it has unused pieces, such as {model.pieces[model.types.index(UNUSED)]!r}"
    if what is not None:
        raise UnsupportedConfig(
            f"{path}: {what}, which is not supported: use a tokenizer.json made from it instead"
        )


def _clean(model: SentencePieceModel) -> list[Any]:
    """The normalisers of the model: its charsmap, and the removal of extra spaces."""
    components: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.strip:
        components += [
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(Regex(r"\A | \z"), ""),
        ]
    return components


def _splits(model: SentencePieceModel) -> list[Any]:
    """Pre-tokenizers that split around user-defined pieces and known words, and inside spellings of special pieces."""
    components: list[Any] = []
    if user := model.of_type(USER_DEFINED):
        longest = sorted((model.pieces[index] for index in user), key=len, reverse=True)
        components.append(pre_tokenizers.Split(Regex("|".join(map(_escape, longest))), "isolated"))
    if model.kind == "unigram" or components:
        # Either would encode "</s>" and "<0x0A>" in a text as the pieces of those names, so such text is split where
        # its first token ends. BPE does so only where one stands alone, after a user-defined piece.
        start, end = ("", "") if model.kind == "unigram" else (r"\A", r"\z")
        cuts = [f"{start}{_escape(a)}(?={_escape(b)}{end})" for a, b in _special_spellings(model)]
        components.append(pre_tokenizers.Split(Regex("|".join(cuts)), "merged_with_previous"))
    elif model.kind == "word":
        # SentencePiece makes one unknown token of consecutive unknown words: split only around the known ones.
        words = _trie_pattern([piece for piece in model.pieces if piece.startswith(SPACE)])
        components.append(pre_tokenizers.Split(Regex(f"{words}(?={SPACE}|\\z)"), "isolated"))
    return components


def _special_spellings(model: SentencePieceModel) -> list[tuple[str, str]]:
    """The names of the pieces that no text encodes to, each split after the first token of its text."""
    hidden = [model.pieces[index] for index in model.of_type(UNKNOWN, CONTROL, BYTE)]
    backend = Tokenizer(_bpe(model, whole=False) if model.kind == "bpe" else _unigram(model, hide=True))
    first = [encoding.offsets[0][1] for encoding in backend.encode_batch(hidden)]
    cuts = [(name, cut if cut < len(name) else 1) for name, cut in zip(hidden, first, strict=True)]
    return [(name[:cut], name[cut:]) for name, cut in cuts if cut < len(name)]


def _escape(text: str) -> str:
    return re.sub(r"([^\w\s])", r"\\\1", text)


def _trie_pattern(words: Iterable[str]) -> str:
    """A regular expression for any of the words that reads each character once."""
    ordered = sorted(set(words))
    # Words with a common prefix are adjacent, so their groups are spans of the list. One step opens a span: the
    # characters that all its words share, then the alternatives after them. Iterative, as words may be long.
    out: list[str] = []
    steps: list[tuple[int, int, int] | str] = [(0, len(ordered), 0)]
    while steps:
        step = steps.pop()
        if isinstance(step, str):
            out.append(step)
            continue
        first, end, at = step
        if first == end:
            continue
        low, high = ordered[first], ordered[end - 1]
        shared = at
        while shared < min(len(low), len(high)) and low[shared] == high[shared]:
            shared += 1
        out.append(_escape(low[at:shared]))
        whole = len(low) == shared  # the first word ends here, and others may be longer
        start = first + whole
        if start == end:
            continue
        spans: list[tuple[int, int, int] | str] = []
        while start < end:
            stop = start + 1
            while stop < end and ordered[stop][shared] == ordered[start][shared]:
                stop += 1
            spans += ["|", (start, stop, shared)]
            start = stop
        out.append("(?:")
        steps.append(")?" if whole else ")")
        steps += reversed(spans[1:])
    return "".join(out)


def _bpe(model: SentencePieceModel, whole: bool = True) -> BPE:
    vocab = {piece: index for index, piece in enumerate(model.pieces)}
    # SentencePiece merges any two adjacent pieces that form a piece, the one with the best score first.
    hidden = {model.pieces[index] for index in model.of_type(UNKNOWN, CONTROL, BYTE, UNUSED)}
    scores = {
        piece: score for piece, score in zip(model.pieces, model.scores, strict=True) if piece not in hidden
    }
    return BPE(
        vocab,
        ranked_merges(scores, lambda piece: -scores[piece]),
        unk_token=model.pieces[model.unk_id],
        fuse_unk=True,
        byte_fallback=BYTE in model.types,
        ignore_merges=whole
        and USER_DEFINED in model.types,  # those are split off the text, and have no merges
    )


def ranked_merges(pieces: Iterable[Any], rank: Callable[[Any], float]) -> list[tuple[Any, Any]]:
    """Every split of a piece into two others, in the order in which they are merged.

    Among pieces of equal rank, such as Llama's runs of spaces, the leftmost pair is merged first: that is the longest
    piece, since the left one is the one that has grown.
    """
    known = set(pieces)
    found: list[tuple[float, int, int, Any, Any]] = []
    for piece in known:
        if len(found) > MOST_MERGES:
            raise CheckpointError(f"the pieces have over {MOST_MERGES:,} merges: this is not a vocabulary")
        key = (rank(piece), -len(piece))
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                found.append((*key, -cut, left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _unigram(model: SentencePieceModel, hide: bool = False) -> Unigram:
    """The model; with `hide`, one in which no text encodes to the special pieces."""
    hidden = set(model.of_type(UNKNOWN, CONTROL, BYTE)) if hide else set[int]()
    names = [f"\0{index}" if index in hidden else piece for index, piece in enumerate(model.pieces)]
    return Unigram(
        list(zip(names, model.scores, strict=True)), model.unk_id, BYTE in model.types and not hide
    )
