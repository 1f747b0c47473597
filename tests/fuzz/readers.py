"""Readers of untrusted files and templates: for each, valid inputs, mutations of them, and the call under test."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mutators
import seeds
import templates

import monoblock

# (generator, valid bytes, other valid bytes of the same kind) -> mutated bytes
Mutate = Callable[[random.Random, bytes, list[bytes]], bytes]


@dataclass(frozen=True)
class Case:
    """A folder of valid files: the function that writes it, and mutations by file name pattern."""

    make: Callable[[Path], object]
    mutate: Mapping[str, Mutate]


@dataclass
class Reader:
    """A reader under test. `read` is called with a folder that has one mutated file."""

    name: str
    cases: tuple[Case, ...]
    read: Callable[[Path], object]
    needs: tuple[str, ...] = ()
    heavy: bool = False  # about 20 ms for an input
    _folders: list[tuple[Path, dict[str, bytes]]] = field(default_factory=list)

    def prepare(self, root: Path) -> None:
        """Writes the valid files below `root`, and reads them."""
        for number, case in enumerate(self.cases):
            folder = root / f"{self.name}-{number}"
            folder.mkdir()
            case.make(folder)
            names = [path for pattern in case.mutate for path in sorted(folder.glob(pattern))]
            assert names, (self.name, number)
            self._folders.append((folder, {path.name: path.read_bytes() for path in names}))
            self.read(folder)

    def mutated(self, number: int) -> tuple[Path, Callable[[], None], int]:
        """Writes the mutated input of that number; returns its folder, a function that restores it, and its size."""
        rng = random.Random(f"{self.name}/{number}")
        at = rng.randrange(len(self.cases))
        folder, valid = self._folders[at]
        name = rng.choice(list(valid))
        mutate = next(s for pattern, s in self.cases[at].mutate.items() if Path(name).match(pattern))
        others = [
            files[n] for _, files in self._folders for n in files if Path(n).suffix == Path(name).suffix
        ]
        raw = mutate(rng, valid[name], others)
        (folder / name).write_bytes(raw)
        return folder, lambda: (folder / name).write_bytes(valid[name]) and None, len(raw)


def _json(rng: random.Random, raw: bytes, others: list[bytes]) -> bytes:
    more = json.loads(rng.choice(others)) if others and rng.random() < 0.3 else None
    return mutators.json_text(rng, json.loads(raw), more)


def _bytes(rng: random.Random, raw: bytes, others: list[bytes]) -> bytes:
    if rng.random() < 0.05 and others:
        other = rng.choice(others)
        return raw[: rng.randrange(len(raw))] + other[rng.randrange(len(other)) :]
    return mutators.bytes_mutant(rng, raw)


def _near(count: int) -> Mutate:
    """Mutates bytes, mostly the first `count`."""
    return lambda rng, raw, _: mutators.bytes_mutant(rng, raw, near=count)


def _text(rng: random.Random, raw: bytes, _: list[bytes]) -> bytes:
    return mutators.text_mutant(rng, raw.decode())


def _safetensors(rng: random.Random, raw: bytes, _: list[bytes]) -> bytes:
    """Mutates the header's JSON, mostly with a correct length, or bytes."""
    if rng.random() < 0.3:
        return mutators.bytes_mutant(rng, raw, near=300)
    length = int.from_bytes(raw[:8], "little")
    header = mutators.json_text(rng, json.loads(raw[8 : 8 + length]))
    stated = len(header) if rng.random() < 0.9 else rng.choice(mutators.NUMBERS) % 2**64
    body = raw[8 + length :]
    if rng.random() < 0.2:
        body = body[: rng.randrange(len(body) + 1)] + rng.randbytes(rng.choice((0, 0, 8)))
    return stated.to_bytes(8, "little") + header + body


def _zip(rng: random.Random, raw: bytes, _: list[bytes]) -> bytes:
    """A PyTorch archive: a record is mutated, truncated, removed, renamed or deflated; or any bytes are mutated."""
    if rng.random() < 0.35:
        return mutators.bytes_mutant(rng, raw, near=rng.choice((0, 600)))
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    chosen = rng.choice(list(records))
    if rng.random() < 0.6:
        chosen = next(name for name in records if name.endswith("data.pkl"))
    deflated: set[str] = set()
    match rng.randrange(6):
        case 0 | 1 | 2:
            records[chosen] = mutators.bytes_mutant(rng, records[chosen])
        case 3:
            records[chosen] = records[chosen][: rng.randrange(len(records[chosen]) + 1)]
        case 4:
            body = records.pop(chosen)
            if rng.random() < 0.5:
                records[chosen + "x"] = body
        case _:
            deflated = {chosen} if rng.random() < 0.5 else set(records)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, body in records.items():
            archive.writestr(name, body, zipfile.ZIP_DEFLATED if name in deflated else zipfile.ZIP_STORED)
    return out.getvalue()


# ------------------------------------------------------------------ the calls


def read_config(folder: Path) -> None:
    from monoblock import tree
    from monoblock.families import family

    config = monoblock.AutoConfig.from_pretrained(folder)
    spec = config.to_spec()
    assert str(spec) and repr(config)
    monoblock.GenerationConfig.from_model_config(config)
    kind = family(config.model_type)
    for row in kind.classes:
        head = config.to_head(row.head) if row.head else None
        kind.keymap(config, row.head)
        tree.parameters(spec, head)


def read_generation(folder: Path) -> None:
    from monoblock.generation.resolve import resolve

    config = monoblock.GenerationConfig.from_pretrained(folder)
    assert repr(config)
    resolve({}, None, config)


def read_tokenizer(folder: Path) -> None:
    tokenizer = monoblock.AutoTokenizer.from_pretrained(folder)
    assert repr(tokenizer)
    ids = tokenizer("the quick 🎉 <s>brown\n", "dog</s>")["input_ids"]
    tokenizer.decode(ids)
    tokenizer.decode([0, 1, 2, 5], skip_special_tokens=True)
    tokenizer.convert_ids_to_tokens([0, 3, 200])
    if tokenizer.chat_template is not None:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)


def read_processor(folder: Path) -> None:
    import numpy as np

    processor = monoblock.AutoImageProcessor.from_pretrained(folder)
    assert repr(processor)
    processor(np.zeros((40, 50, 3), np.uint8), return_tensors="np")


def read_weights(folder: Path) -> None:
    from monoblock.checkpoint.hub import find_weights
    from monoblock.checkpoint.store import open_store

    store = open_store(find_weights(folder), "np")
    for name in store:
        store.shape(name), store.dtype(name), store.path(name)
        assert store.tensor(name).shape == store.shape(name)


def read_gguf(folder: Path) -> None:
    """Config, generation config, every tensor and the tokenizer of each file."""
    from monoblock.checkpoint.hub import HubOptions, find_weights
    from monoblock.checkpoint.store import open_store

    for path in sorted(folder.glob("*.gguf")):
        monoblock.AutoConfig.from_pretrained(path).to_spec()
        monoblock.MistralForCausalLM.file_generation_config(path, HubOptions())
        store = open_store(find_weights(path), "np")
        for name in store:
            assert store.tensor(name).shape == store.shape(name)
        tokenizer = monoblock.AutoTokenizer.from_pretrained(path)
        tokenizer.decode(tokenizer("abc de").input_ids)


def read_pickle(folder: Path) -> None:
    """Copies every tensor; the copies are no larger than the file."""
    import torch

    from monoblock.checkpoint.hub import find_weights
    from monoblock.checkpoint.store import open_store

    store = open_store(find_weights(folder), "pt")
    with torch.no_grad():
        for name in store:
            store.tensor(name).contiguous().clone()


def read_model(folder: Path) -> None:
    import torch

    class_name = json.loads((folder / "architecture.json").read_text())
    model = getattr(monoblock, class_name).from_pretrained(folder)
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5, 1]]))
        if model.can_generate():
            model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False)


def read_release(folder: Path) -> None:
    """Reads every weight of an upstream release, like `monoblock convert`."""
    from monoblock.checkpoint.hub import HubOptions
    from monoblock.conversion.convert import FORMATS

    name = "mistral" if (folder / "params.json").exists() else "openai-gpt"
    found = FORMATS[name].read(folder, HubOptions())
    for weight in found.weights.shapes():
        found.weights.read(weight)


CONVERSATION = [
    {"role": "user", "content": "Hello, what is the time?"},
    {"role": "assistant", "content": "It is late."},
    {"role": "user", "content": "a" * 300},
]


def read_template(folder: Path) -> None:
    from monoblock.tokenization.families import read_text
    from monoblock.tokenization.template import render

    source = read_text(folder / "chat_template.jinja")
    variables = {
        "messages": CONVERSATION,
        "long": "a<b> " * 20_000,
        "x": "ab",
        "d": {"a": [1, 2]},
        "bos_token": "<s>",
    }
    rendered = render(source, variables, track=False)
    assert len(rendered.text) <= 16 * 2**20


def read_by_command(folder: Path) -> None:
    """`monoblock info` and `monoblock generate`: exit code 0 or 1, and an error message without traceback on stderr."""
    from monoblock.cli.app import command

    for arguments in (
        ["info", str(folder)],
        ["generate", "--model", str(folder), "--max-new-tokens", "2", "the dog"],
    ):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = 0
            try:
                command()(args=arguments, prog_name="monoblock")
            except SystemExit as end:
                code = end.code
        errors = err.getvalue()
        unexpected = [word for word in ("Traceback", "panicked", "report it") if word in errors]
        assert code in (0, 1) and not unexpected, f"{arguments[0]}: exit code {code}; {errors[-300:]}"


# ------------------------------------------------------------------ the table


def _model(model_type: str, quantization: str | None = None, name: str = "") -> Callable[[Path], None]:
    """A function that writes a model's folder, to be loaded as the class `name` (default: its own class)."""

    def make(folder: Path) -> None:
        seeds.model(folder, model_type, quantization)
        seeds.write_json(folder / "architecture.json", name or seeds.CONFIGS[model_type]["architectures"][0])

    return make


def _packed_by(tool: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        seeds.packed_by(tool, folder)
        seeds.write_json(folder / "architecture.json", "MistralForCausalLM")

    return make


def _config(model_type: str) -> Callable[[Path], None]:
    return lambda folder: seeds.write_json(folder / "config.json", seeds.CONFIGS[model_type])


def _template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(seeds.TEMPLATE)


def _mutated_template(rng: random.Random, raw: bytes, _: list[bytes]) -> bytes:
    return mutators.text_mutant(rng, raw.decode()) if rng.random() < 0.2 else templates.template(rng).encode()


def _with_tokenizer(folder: Path) -> None:
    seeds.model(folder, "mistral")
    seeds.gpt2(folder)


TOKENIZER = {"tokenizer_config.json": _json}
OLDER = {**TOKENIZER, "special_tokens_map.json": _json, "added_tokens.json": _json}

READERS: tuple[Reader, ...] = (
    Reader(
        "config.json",
        tuple(Case(_config(name), {"config.json": _json}) for name in seeds.CONFIGS),
        read_config,
    ),
    Reader(
        "generation_config.json",
        (
            Case(
                lambda f: seeds.write_json(f / "generation_config.json", seeds.GENERATION), {"*.json": _json}
            ),
        ),
        read_generation,
    ),
    Reader(
        "tokenizer_config.json",
        (
            Case(seeds.byte_level, TOKENIZER),
            Case(seeds.older_files, OLDER),
            Case(seeds.llama, TOKENIZER),
            Case(seeds.mpnet, TOKENIZER),
        ),
        read_tokenizer,
    ),
    Reader(
        "tokenizer.json",
        (Case(seeds.byte_level, {"tokenizer.json": _json}), Case(seeds.llama, {"tokenizer.json": _json})),
        read_tokenizer,
    ),
    Reader(
        "vocab.json, merges.txt, vocab.txt",
        (
            Case(seeds.gpt2, {"vocab.json": _json, "merges.txt": _text}),
            Case(seeds.mpnet, {"vocab.txt": _text}),
        ),
        read_tokenizer,
    ),
    Reader(
        "tokenizer.model",
        tuple(
            Case(partial(seeds.sentencepiece, kind=kind), {"tokenizer.model": _bytes})
            for kind in (0, 1, 2, 3)
        ),
        read_tokenizer,
    ),
    Reader("tekken.json", (Case(seeds.tekken, {"tekken.json": _json}),), read_tokenizer),
    Reader("chat templates", (Case(_template, {"*.jinja": _mutated_template}),), read_template),
    Reader(
        "preprocessor_config.json",
        (
            Case(
                lambda f: seeds.write_json(f / "preprocessor_config.json", seeds.PREPROCESSOR),
                {"*.json": _json},
            ),
        ),
        read_processor,
        needs=("PIL",),
    ),
    Reader(
        "safetensors",
        (Case(seeds.safetensors, {"*.safetensors": _safetensors}), Case(seeds.shards, {"*.json": _json})),
        read_weights,
    ),
    Reader(
        "msgpack",
        (
            Case(seeds.msgpack, {"*.msgpack": _near(200)}),
            Case(seeds.chunked_msgpack, {"*.msgpack": _bytes}),
        ),
        read_weights,
    ),
    Reader(
        "gguf", (Case(seeds.gguf, {"*.gguf": _near(9000)}),), read_gguf, needs=("torch", "gguf"), heavy=True
    ),
    Reader("hdf5", (Case(seeds.hdf5, {"*.h5": _bytes}),), read_weights, needs=("h5py",)),
    Reader(
        "pytorch_model.bin",
        (
            Case(partial(seeds.pickled, zipped=True), {"*.bin": _zip}),
            Case(partial(seeds.pickled, zipped=False), {"*.bin": _near(900)}),
        ),
        read_pickle,
        needs=("torch",),
    ),
    Reader(
        "upstream releases",
        (
            Case(seeds.mistral_release, {"params.json": _json, "*.safetensors": _safetensors}),
            Case(seeds.openai_release, {"params_shapes.json": _json, "params_3.npy": _near(130)}),
        ),
        read_release,
        needs=("torch",),
    ),
    Reader(
        "models (PyTorch)",
        (
            *(
                Case(
                    _model(name),
                    {"config.json": _json, "generation_config.json": _json, "*.safetensors": _safetensors},
                )
                for name in seeds.CONFIGS
            ),
            Case(_model("mistral", name="MistralForSequenceClassification"), {"config.json": _json}),
            Case(_model("mpnet", name="MPNetForTokenClassification"), {"config.json": _json}),
            Case(_model("openai-gpt", name="OpenAIGPTDoubleHeadsModel"), {"config.json": _json}),
            *(
                Case(_model("mistral", word), {"config.json": _json, "*.safetensors": _safetensors})
                for word in ("int8", "int4", "lossless")
            ),
        ),
        read_model,
        needs=("torch",),
        heavy=True,
    ),
    Reader(
        "GPTQ, AWQ",
        tuple(
            Case(_packed_by(tool), {"config.json": _json, "*.safetensors": _safetensors})
            for tool in ("gptq", "awq")
        ),
        read_model,
        needs=("torch", "safetensors"),
        heavy=True,
    ),
    Reader(
        "monoblock info, monoblock generate",
        (Case(_with_tokenizer, {"*.json": _json, "merges.txt": _text, "*.safetensors": _safetensors}),),
        read_by_command,
        needs=("torch",),
        heavy=True,
    ),
)


def reader(name: str) -> Reader:
    return next(r for r in READERS if r.name == name)


def quiet() -> None:
    """Disables the thousands of warnings about unknown fields."""
    logging.getLogger("monoblock").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def prepared(one: Reader) -> Any:
    """The reader with its valid files written to a temporary folder."""
    root = Path(tempfile.mkdtemp(prefix="monoblock-fuzz-"))
    try:
        one._folders.clear()
        one.prepare(root)
        yield one
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    print(*(one.name for one in READERS), sep="\n", file=sys.stdout)
