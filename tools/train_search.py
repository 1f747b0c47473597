"""Trains the embedded search model by `monoblock finetune --task embedding`, and writes it, its index and its report.

    python tools/train_search.py            data, initial weights, training, export
    python tools/train_search.py --export   exports the last run in build/search

The run is determined by the recipe, tools/search.yaml, and the corpus, whose digest is in docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import search_corpus as corpus
import torch
from reports import Clock, replace_section
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from monoblock import MPNetConfig, MPNetModel, SentenceTransformer, demo_embeddings
from monoblock.embeddings import Pooling, Transformer
from monoblock.quantization import WeightOnlyConfig
from monoblock.training import scores
from monoblock.vectors.identity import model_fingerprint
from monoblock.vectors.outputs import beside, described, text_line

REPOSITORY = Path(__file__).resolve().parent.parent
BUILD = REPOSITORY / "build" / "search"
RECIPE = Path(__file__).with_name("search.yaml")
PAGE, PICTURE = REPOSITORY / "docs" / "training.md", REPOSITORY / "docs" / "search-loss.svg"
SPECIALS = START, PADDING, STOP, UNKNOWN, MASK = "<s>", "<pad>", "</s>", "[UNK]", "<mask>"
VOCAB, WIDTH, LAYERS, HEADS, MLP, TOKENS = 6000, 128, 2, 4, 384, 128
TRAINED = 64  # tokens of a text in training (max_length of the recipe); later positions are not trained
SEED = 0
SPREAD, QUIET = 0.57, 0.0005  # standard deviations of the tokens' vectors and of the positions'
LEVELS = 15  # of the index's values on each side of 0: 4 bits and a sign, which a wheel compresses
SIZE_LIMIT = 4_000_000  # bytes of the model


def tokenizer_of(texts: Sequence[str]) -> Tokenizer:
    """A WordPiece tokenizer that splits identifiers at underscores and changes of case."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN, max_input_chars_per_word=64))
    between = Regex(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(between, " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIALS), min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    stop, start = ((token, tokenizer.token_to_id(token)) for token in (STOP, START))
    tokenizer.post_processor = processors.RobertaProcessing(
        stop, start, trim_offsets=True, add_prefix_space=False
    )
    return tokenizer


def start(folder: Path, texts: Sequence[str]) -> None:
    """Write a model that compares texts nearly as TF-IDF does, as the point where training starts.

    The vector of a token is `s r + sqrt(1 - s^2) c`, with a random direction r of its own, a direction c that all
    tokens share, and s of its inverse document frequency. The blocks change little, and the last norm removes c, so
    that the mean over the tokens is a random projection of the TF-IDF vector.
    """
    tokenizer = tokenizer_of(texts)
    counts = Counter(index for text in texts for index in set(tokenizer.encode(text).ids))
    seen = torch.tensor([counts[index] for index in range(tokenizer.get_vocab_size())])
    rarity = torch.log((1 + len(texts)) / (1 + seen))
    own = (rarity / rarity.max()).pow(1.5).clamp(0.05, 0.98)[:, None]
    own[: len(SPECIALS)] = 0.05
    torch.manual_seed(SEED)
    config = MPNetConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
        max_position_embeddings=TOKENS + 2,
        initializer_range=0.002,
        hidden_dropout_prob=0.0,  # a third of the time of a step, for four epochs
        attention_probs_dropout_prob=0.0,
    )
    model = MPNetModel(config, add_pooling_layer=False)
    directions = torch.randn(len(own), WIDTH)
    directions[:, :2] = 0
    directions[:, 2:] -= directions[:, 2:].mean(1, keepdim=True)  # the norms subtract the mean
    vectors = own * torch.nn.functional.normalize(directions, dim=1)
    shared = (1 - own.square()).sqrt() / math.sqrt(2)
    vectors[:, 0:1], vectors[:, 1:2] = shared, -shared
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.copy_(SPREAD * vectors)
        model.embeddings.position_embeddings.weight.copy_(QUIET * torch.randn(TOKENS + 2, WIDTH))
        model.encoder.layer[-1].output.LayerNorm.weight[:2] = 0
    plain = folder / "transformer"
    model.save_pretrained(plain)
    tokenizer.save(str(plain / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START,
        "cls_token": START,
        "eos_token": STOP,
        "sep_token": STOP,
        "unk_token": UNKNOWN,
        "pad_token": PADDING,
        "mask_token": MASK,
        "model_max_length": TOKENS,
    }
    (plain / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    transformer = Transformer(str(plain), framework="pt")
    SentenceTransformer(modules=[transformer, Pooling(WIDTH, "mean")]).save_pretrained(folder)
    shutil.rmtree(plain)


def write_data(found: Sequence[corpus.Definition]) -> list[str]:
    """Write the records of training and evaluation; returns the whole texts of the former."""
    training = corpus.training_pairs(found)
    held = corpus.held_out_pairs(found)
    for name, pairs in (("train", training + corpus.thinned(found)), ("held-out", held)):
        lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
        (BUILD / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return [text for pair in training for text in pair.values()]


def train() -> None:
    """Run the recipe; a run that was interrupted continues."""
    command = [sys.executable, "-m", "monoblock.cli", "finetune", "--recipe", str(RECIPE), "--resume"]
    subprocess.run(command, check=True, cwd=REPOSITORY)


def export(found: Sequence[corpus.Definition]) -> None:
    """Write the quantised model and the index into the package, and the report."""
    folder = demo_embeddings.path()
    shutil.rmtree(folder, ignore_errors=True)
    trained = BUILD / "model"
    how = WeightOnlyConfig(bits=8, group_size=64)
    model = SentenceTransformer(str(trained), framework="pt", quantization_config=how)
    model.max_seq_length = TRAINED
    model.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > SIZE_LIMIT:
        raise SystemExit(f"{folder} has {size:,} bytes; it may have {SIZE_LIMIT:,}")
    model = SentenceTransformer(demo_embeddings.NAME, framework="pt")
    texts = [entry.text for entry in corpus.entries(found)]
    write_index(model, texts)
    report(found, size, texts)


def write_index(model: SentenceTransformer, texts: Sequence[str]) -> None:
    """The index as `monoblock embed` writes it, but with vectors of int8."""
    path = demo_embeddings.index()
    vectors = model.encode(list(texts))
    scaled = np.rint(vectors / np.abs(vectors).max(1, keepdims=True) * LEVELS).astype(np.int8)
    np.save(path, scaled)
    lines = b"".join(map(text_line, texts))
    beside(path, "texts.jsonl").write_bytes(lines)
    description = {
        "model": demo_embeddings.NAME,
        "fingerprint": fingerprint(),
        "similarity": "cosine",
        "count": len(texts),
        "width": int(scaled.shape[1]),
        "text_bytes": len(lines),
        "python": sys.version.split()[0],
    }
    beside(path, "index.json").write_bytes(described(description))


def fingerprint() -> str:
    """The fingerprint of the model in the package."""
    from monoblock.checkpoint.hub import HubOptions

    return model_fingerprint(str(demo_embeddings.path()), HubOptions())


# ---------------------------------------------------------------------------- the report


Vectors = Callable[[Sequence[str], Sequence[str]], tuple[np.ndarray, np.ndarray]]


def recalls(pairs: Sequence[dict[str, str]], vectors: Vectors) -> dict[str, float]:
    """The retrieval of each distinct anchor's positives among all distinct positives, by cosine."""
    queries, texts = ([*dict.fromkeys(pair[name] for pair in pairs)] for name in ("anchor", "positive"))
    rows_of = {text: index for index, text in enumerate(texts)}
    relevant: dict[str, set[int]] = {}
    for pair in pairs:
        relevant.setdefault(pair["anchor"], set()).add(rows_of[pair["positive"]])
    return scores.retrieval(*vectors(queries, texts), [sorted(relevant[query]) for query in queries])


def tf_idf(words: Callable[[str], list[str]]) -> Vectors:
    """TF-IDF vectors: logarithmic frequencies, inverse document frequencies of the searched texts."""

    def vectors(queries: Sequence[str], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        seen = Counter(word for text in texts for word in set(words(text)))
        index = {word: i for i, word in enumerate(seen)}
        weights = np.array([math.log((1 + len(texts)) / (1 + count)) + 1 for count in seen.values()])

        def matrix(items: Sequence[str]) -> np.ndarray:
            found = np.zeros((len(items), len(index)), np.float32)
            for row, text in enumerate(items):
                for word, count in Counter(words(text)).items():
                    if word in index:
                        found[row, index[word]] = (1 + math.log(count)) * weights[index[word]]
            return found

        return matrix(queries), matrix(texts)

    return vectors


def report(found: Sequence[corpus.Definition], size: int, texts: Sequence[str]) -> None:
    """Replace the section of the page, and copy the curves."""
    held = [one for one in found if one.held_out]
    tasks = {
        "code to documentation": corpus.code_pairs(held),
        "description to name": corpus.search_pairs(held),
    }
    ways: dict[str, Vectors] = {
        "TF-IDF of words": tf_idf(corpus.words),
        "TF-IDF of words, identifiers split": tf_idf(corpus.split_words),
        "the model before training": encoder(SentenceTransformer(str(BUILD / "start"), framework="pt")),
        "**the model, int8**": encoder(SentenceTransformer(demo_embeddings.NAME, framework="pt")),
    }
    rows = []
    for way, vectors in ways.items():
        values = [recalls(pairs, vectors) for pairs in tasks.values()]
        rows.append(
            f"| {way} | " + " | ".join(f"{v['recall@1']:.3f} | {v['recall@10']:.3f}" for v in values) + " |"
        )
    lines = [json.loads(line) for line in (BUILD / "model" / "metrics.jsonl").read_text().splitlines()]
    facts = json.loads((BUILD / "time.json").read_text(encoding="utf-8"))
    steps = max(line["step"] for line in lines)
    index = sum(path.stat().st_size for path in demo_embeddings.index().parent.glob("library.*"))
    modules = len({one.module for one in held})
    pairs = sum(1 for _ in (BUILD / "train.jsonl").open(encoding="utf-8"))
    table = "\n".join(rows)
    text = f"""
| held-out modules | code to documentation: R@1 | R@10 | description to name: R@1 | R@10 |
|---|---|---|---|---|
{table}

{len(held):,} definitions of {modules} modules are held out of {len(found):,}; the training data has {pairs:,} pairs.
{steps:,} steps took {facts["processor"] / 60:.0f} minutes of processor time on {facts["threads"]}. The model has
{size / 1e6:.1f} MB, the index {index / 1e6:.1f} MB for {len(texts):,} texts. Python {facts["python"]}; SHA-256 of the
definitions: `{corpus.digest(found)}`.
"""
    replace_section(PAGE, "search model", text)
    shutil.copy(BUILD / "model" / "curves.svg", PICTURE)
    print("\n".join(rows))


def encoder(model: SentenceTransformer) -> Vectors:
    return lambda queries, texts: (model.encode(list(queries)), model.encode(list(texts)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--export", action="store_true", help="export the last run without training")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    found = corpus.definitions()
    if not options.export:
        if not (BUILD / "start").exists():  # else a run that was interrupted continues
            start(BUILD / "start", write_data(found))
        with Clock(BUILD / "time.json"):
            train()
    export(found)


if __name__ == "__main__":
    main()
