"""Saves of PyTorch models and commands, interrupted at file operations: the old or the new one is complete."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import interrupted_saves
import kill_points
import pytest
import torch

import monoblock
from monoblock.cli import app
from monoblock.cli.conversation import Conversation
from monoblock.conversion.convert import Options, convert

POINTS = 8


@pytest.fixture(autouse=True)
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def model(tag: int) -> Any:
    made = monoblock.MptForCausalLM(interrupted_saves.config(tag))
    for parameter in made.parameters():
        parameter.data.fill_(tag)
    return made


def read(folder: Path) -> set[int]:
    loaded = monoblock.MptForCausalLM.from_pretrained(folder)
    return interrupted_saves.tags(loaded, {n: x.detach() for n, x in loaded.state_dict().items()})


@interrupted_saves.LAYOUT
def test_model(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "model"
    models = {tag: model(tag) for tag in (1, 2)}
    interrupted_saves.check(
        folder,
        lambda tag, keywords: models[tag].save_pretrained(folder, **keywords),
        lambda: read(folder),
        layout,
        POINTS,
    )


def test_tokenizer_generation_config_and_image_processor(tmp_path: Path) -> None:
    interrupted_saves.check_companions(tmp_path / "model", 3 * POINTS)


def test_concurrent_saves_do_not_mix(tmp_path: Path) -> None:
    """25 rounds of four threads, in which an earlier version mixed shards."""
    models = {tag: model(tag) for tag in range(1, 5)}
    for round_ in range(25):
        threads = [
            threading.Thread(
                target=models[tag].save_pretrained,
                args=(tmp_path / "model",),
                kwargs={"max_shard_size": 1500 if (tag + round_) % 2 else "1GB"},
            )
            for tag in models
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(read(tmp_path / "model")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".monoblock")}


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_force(tmp_path: Path, command: str) -> None:
    """The old folder remains until the new one replaces it."""
    models = {tag: model(tag) for tag in (1, 2)}
    source, target = tmp_path / "source", tmp_path / "target"
    models[2].save_pretrained(source)
    if command == "quantize":
        wide = monoblock.MptConfig(**{**interrupted_saves.CONFIG, "d_model": 64}, eos_token_id=2)
        monoblock.MptForCausalLM(wide).save_pretrained(source)

    def do() -> None:
        if command == "convert":
            convert(source, target, Options(force=True, max_shard_size=2000))
        else:
            app.command()(["quantize", str(source), str(target), "--force"], standalone_mode=False)

    def prepare() -> None:
        shutil.rmtree(target, ignore_errors=True)
        models[1].save_pretrained(target)
        (target / "old").write_text("x")

    prepare()
    old = names(target)
    count = len(kill_points.operations(do))
    new = names(target)
    assert "old" not in new
    for at in kill_points.spread(count, POINTS):
        prepare()
        assert kill_points.interrupted(do, at) == (at < count)
        if names(target) == old:
            assert read(target) == {1}
        else:
            assert names(target) == new
            assert monoblock.MptForCausalLM.from_pretrained(target).config.eos_token_id == 2
    shutil.rmtree(target)
    kill_points.interrupted(do, count // 2)
    assert not target.exists()


def test_chat_session(tmp_path: Path) -> None:
    path = tmp_path / "session.json"
    old, new = Conversation(system="old"), Conversation(system="new")
    old.save(path, {"top_k": 1})
    text = path.read_text()
    count = len(kill_points.operations(lambda: new.save(path, {"top_k": 2})))
    for at in range(count):
        path.write_text(text)
        assert kill_points.interrupted(lambda: new.save(path, {"top_k": 2}), at)
        conversation, settings = Conversation.load(path)
        assert (conversation.system, settings["top_k"]) in (("old", 1), ("new", 2))


def test_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    """Saving 60 MB of weights over an existing checkpoint takes less than a quarter of that."""
    import resource

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    wide = monoblock.MptForCausalLM(
        monoblock.MptConfig(d_model=512, n_heads=8, n_layers=1, vocab_size=25_000)
    )
    wide.save_pretrained(tmp_path / "model")
    size = sum(parameter.nbytes for parameter in wide.parameters())
    assert size > 60 << 20
    before = peak()
    wide.save_pretrained(tmp_path / "model", max_shard_size="20MB")
    assert peak() - before < size // 4
    assert torch.equal(
        monoblock.MptForCausalLM.from_pretrained(tmp_path / "model").transformer.wte.weight,
        wide.transformer.wte.weight,
    )
