"""`monoblock embed` on a million short texts with a very small MPNet: killed in the middle, resumed, checked.

    python bench/embed_million.py [--texts 1000000] [--format npy] [--folder FOLDER]

Checks the number and the order of the texts, that none is missing or written twice, vectors of a sample, that a second
kill loses nothing, and that the peak resident memory stays below 1.5 GB. `make embed-million` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import monoblock
from monoblock.vectors.index import open_index

WORDS = 2000  # of the vocabulary
LIMIT = 1.5e9  # bytes of resident memory
SAMPLE = 1000  # texts whose vectors are computed again
ATOL = 1e-5  # vectors of length below 6, float32, in other batches


def word(number: int) -> str:
    """A word of the vocabulary, of letters."""
    letters = "bcdfghklmnprstvz"
    return "".join(letters[number >> shift & 15] + "aeiou"[(number >> shift) % 5] for shift in (8, 4, 0))


def make_model(folder: Path) -> None:
    """A random MPNet of width 32 with one layer, and a WordPiece tokenizer."""
    special = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]
    digits = [*"0123456789", *(f"##{digit}" for digit in "0123456789")]
    vocab = {token: i for i, token in enumerate([*special, *digits, *map(word, range(WORDS))])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer = monoblock.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=64, unk_token="[UNK]", pad_token="<pad>",
        cls_token="<s>", sep_token="</s>", mask_token="<mask>", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    config = monoblock.MPNetConfig(
        vocab_size=len(vocab), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=70,
    )  # fmt: skip
    monoblock.set_seed(0)
    monoblock.MPNetModel(config).save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    monoblock.SentenceTransformer(str(folder / "plain"), device="cpu").save(str(folder / "model"))


def write_texts(path: Path, count: int) -> None:
    """Texts of three to eight words; each begins with its number."""
    draw = random.Random(0)
    with path.open("w") as file:
        for i in range(count):
            words = " ".join(word(draw.randrange(WORDS)) for _ in range(draw.randint(3, 8)))
            file.write(f"{i} {words}\n")


def journal(path: Path) -> int:
    """The number of texts in the journal of a run."""
    try:
        return int(json.loads(path.with_name(path.name + ".partial.json").read_bytes())["count"])
    except (FileNotFoundError, ValueError):
        return 0


def run(command: list[str], output: Path, stop: int | None) -> tuple[float, int]:
    """Runs the command, killed when its journal has `stop` texts; (seconds, peak bytes of resident memory)."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while stop is not None and process.poll() is None and journal(output) < stop:
        time.sleep(0.02)
    if stop is not None:
        process.send_signal(signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    expected = -signal.SIGKILL if stop is not None else 0
    if (code := os.waitstatus_to_exitcode(status)) != expected:
        raise SystemExit(f"the command exited with {code}; expected {expected}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check(output: Path, texts: Path, model: Path, count: int) -> None:
    """The index has every text once, in order, with its vector."""
    index = open_index(output)
    found = index.texts(range(count))
    with texts.open() as lines:
        for i, line in enumerate(lines):
            if found[i] != line.rstrip("\n"):
                raise SystemExit(f"row {i} is {found[i]!r}; expected {line!r}")
    if len(found) != count or sum(map(len, index.blocks())) != count:
        raise SystemExit(f"the index has {len(found)} texts; expected {count}")
    rows = sorted(random.Random(1).sample(range(count), min(SAMPLE, count)))
    encoded = monoblock.SentenceTransformer(str(model), device="cpu").encode([found[row] for row in rows])
    start, worst = 0, 0.0
    for block in index.blocks():
        inside = [i for i, row in enumerate(rows) if start <= row < start + len(block)]
        if inside:
            worst = max(worst, float(abs(block[[rows[i] - start for i in inside]] - encoded[inside]).max()))
        start += len(block)
    if not worst < ATOL:
        raise SystemExit(f"vectors differ by {worst}")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--format", choices=("npy", "jsonl", "parquet"), default="npy")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_model(folder)
        write_texts(folder / "texts.txt", options.texts)
        output = folder / f"x.{options.format}"
        command = [
            *(sys.executable, "-m", "monoblock.cli", "embed", str(folder / "texts.txt"), "--device", "cpu"),
            *("--model", str(folder / "model"), "--output", str(output)),
            *("--batch-size", str(options.batch_size)),
        ]
        print(f"{options.texts:,} texts, {(folder / 'texts.txt').stat().st_size / 1e6:.0f} MB", flush=True)
        peaks: list[int] = []
        for share in (0.4, 0.7, None):
            before = journal(output)
            stop = None if share is None else int(options.texts * share)
            seconds, peak = run(command, output, stop)
            peaks.append(peak)
            now = options.texts if stop is None else journal(output)
            print(
                f"{'finished' if stop is None else 'killed'} at {now:,} texts: {seconds:.0f} s, "
                f"{(now - before) / seconds:,.0f} texts/s, peak memory {peak / 1e9:.2f} GB",
                flush=True,
            )
        check(output, folder / "texts.txt", folder / "model", options.texts)
        query = [*command[:3], "search", "kobabe", "--index", str(output), "--device", "cpu"]
        seconds, peak = run(query, output, None)
        print(f"search: {seconds:.1f} s, peak memory {peak / 1e9:.2f} GB")
        if max(*peaks, peak) > LIMIT:
            raise SystemExit(
                f"peak memory {max(*peaks, peak) / 1e9:.2f} GB; expected at most {LIMIT / 1e9} GB"
            )
    print("every text once, in order, with its vector")


if __name__ == "__main__":
    main()
