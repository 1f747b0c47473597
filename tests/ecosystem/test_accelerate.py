"""accelerate: prepare, mixed precision, checkpoints, big models; in one process and in two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import remove_hook_from_submodules
from accelerate.state import AcceleratorState, GradientState, PartialState
from processes import in_processes
from safetensors.torch import load_file
from tiny import (
    BARE,
    BLOCKS,
    CAUSAL,
    FAMILIES,
    LANGUAGE,
    WAYS,
    Folders,
    Library,
    batch,
    equal_states,
    equal_trees,
    labelled,
    logits,
)


@pytest.fixture(autouse=True)
def _fresh_state() -> Any:
    """Resets accelerate's singletons."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step(agree: Any, family: str) -> None:
    name = LANGUAGE[family]

    def run(library: Library) -> Any:
        accelerator = Accelerator(cpu=True)
        model = library.model(name)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        model.train()
        losses = []
        for _ in range(3):
            loss = model(**labelled(name)).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert accelerator.unwrap_model(model) is not None
        return losses, logits(model)

    losses, _ = agree(run, 1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", [*LANGUAGE.values(), *BARE.values()])
def test_mixed_precision_returns_float32(agree: Any, name: str) -> None:
    """accelerate converts the tensors of mappings and keeps the output class."""

    def run(library: Library) -> Any:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        model = accelerator.prepare(library.model(name))
        out = model(**batch(), output_hidden_states=True)
        assert {x.dtype for x in out.hidden_states} == {torch.float32}
        first = out["logits"] if "logits" in out else out["last_hidden_state"]
        assert first.dtype == torch.float32
        assert accelerator.unwrap_model(model, keep_fp32_wrapper=False)(**batch())[0].dtype == torch.float32
        assert type(out) is type(library.model(name)(**batch()))
        return list(out.keys())

    agree(run)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("writer", "reader"), WAYS)
def test_checkpoints_move_between_libraries(
    folders: Any, writer: str, reader: str, family: str, tmp_path: Path
) -> None:
    """save_state, save_model and save_pretrained through accelerate; tied weights are stored once."""
    name, one, other = LANGUAGE[family], Library(writer, folders), Library(reader, folders)
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(one.model(name))
    state = model.state_dict()

    accelerator.unwrap_model(model).save_pretrained(
        tmp_path / "saved",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    opened = other.open(name, tmp_path / "saved")
    equal_states(opened.state_dict(), state)
    opened.save_pretrained(tmp_path / "back")
    if family != "fuyu":  # transformers writes the names of the first releases, monoblock the current ones
        equal_states(
            load_file(tmp_path / "back" / "model.safetensors"),
            load_file(tmp_path / "saved" / "model.safetensors"),
        )

    accelerator.save_model(model, tmp_path / "model")
    again = other.model(name)
    torch.nn.init.ones_(next(again.parameters()))
    accelerate.load_checkpoint_in_model(again, str(tmp_path / "model"))
    equal_states(again.state_dict(), state)
    accelerator.save_model(again, tmp_path / "model-back")
    equal_states(
        load_file(tmp_path / "model-back" / "model.safetensors"),
        load_file(tmp_path / "model" / "model.safetensors"),
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("writer", "reader"), WAYS)
def test_states_move_between_libraries(
    folders: Any, writer: str, reader: str, family: str, tmp_path: Path
) -> None:
    """save_state and load_state in both directions; optimizer states follow the order of the parameters."""
    name = LANGUAGE[family]

    def prepared(which: str) -> Any:
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True)
        model = Library(which, folders).model(name)
        return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

    accelerator, model, optimizer = prepared(writer)
    accelerator.backward(model.train()(**labelled(name)).loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.save_state(str(tmp_path / "there"))
    other, second, its_optimizer = prepared(reader)
    other.load_state(str(tmp_path / "there"))
    other.save_state(str(tmp_path / "back"))
    back, third, the_last = prepared(writer)
    back.load_state(str(tmp_path / "back"))
    for m, o in ((second, its_optimizer), (third, the_last)):
        equal_states(m.state_dict(), model.state_dict())
        equal_trees(o.state_dict(), optimizer.state_dict())
    assert [key for key, _ in second.named_parameters()] == [key for key, _ in model.named_parameters()]


def test_only_the_main_process_saves(library: Library, tmp_path: Path) -> None:
    library.model("MptForCausalLM").save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved" / "model.safetensors").exists()


def test_save_pretrained_with_a_state_dict(
    library: Library, transformers_library: Library, tmp_path: Path
) -> None:
    model = library.model("MptForCausalLM")
    state = {key: 2 * value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "plain", state_dict=state)
    equal_states(transformers_library.open("MptForCausalLM", tmp_path / "plain").state_dict(), state)
    assert not torch.equal(next(iter(model.state_dict().values())), next(iter(state.values())))


@pytest.mark.parametrize("family", ["mistral", "mpt", "gpt_neo"])
def test_big_models_are_dispatched(agree: Any, family: str, tmp_path: Path) -> None:
    """init_empty_weights, device maps by module name, and disk offload."""
    name = LANGUAGE[family]

    def run(library: Library) -> Any:
        folder = library.folders(name)
        cls = getattr(library, name)
        with accelerate.init_empty_weights():
            empty = cls(library.AutoConfig.from_pretrained(folder))
        assert {p.device.type for p in empty.parameters()} == {"meta"}
        assert empty._no_split_modules
        empty.tie_weights()
        found = accelerate.infer_auto_device_map(
            empty, max_memory={"cpu": 60_000, "disk": 10**9}, no_split_module_classes=empty._no_split_modules
        )
        model = accelerate.load_checkpoint_and_dispatch(
            empty, str(folder), device_map={"": "cpu"}, no_split_module_classes=empty._no_split_modules
        ).eval()
        offloaded = accelerate.cpu_offload(library.model(name), execution_device=torch.device("cpu"))
        assert torch.equal(logits(offloaded), logits(library.model(name)))
        return sorted(found), logits(model)

    agree(run, 2e-5)


def on_disk(model: Any) -> list[str]:
    """The parameters that are offloaded to disk."""
    return sorted(key for key, parameter in model.named_parameters() if parameter.is_meta)


@pytest.mark.parametrize("family", FAMILIES)
def test_disk_offload(agree: Any, monoblock_library: Library, family: str, tmp_path: Path) -> None:
    """Of the second block, by from_pretrained and by accelerate."""
    name = LANGUAGE[family]
    blocks = BLOCKS[family][1]

    def run(library: Library) -> Any:
        folder, cls = library.folders(name), getattr(library, name)
        plain = library.model(name)
        own = [key for key, _ in plain.named_parameters() if key.startswith(f"{blocks}.1.")]
        children = {key for key, module in plain.named_modules() if key and not list(module.children())}
        where = {key: "disk" if key.startswith(f"{blocks}.1.") else "cpu" for key in children}
        where |= {f"{blocks}.1": "disk"}
        if family == "mpnet":
            where["lm_head"] = "cpu"  # the head's bias
        offload = tmp_path / library.name
        loaded = cls.from_pretrained(folder, device_map=where, offload_folder=offload / "a").eval()
        assert on_disk(loaded) == sorted(own)
        assert torch.equal(logits(loaded), logits(plain))
        assert on_disk(loaded) == sorted(own)

        with accelerate.init_empty_weights():
            empty = cls(library.AutoConfig.from_pretrained(folder))
        empty.tie_weights()
        monoblock_library.model(name).save_pretrained(
            offload / "saved"
        )  # the parameters' names, for Fuyu too
        by_hand = accelerate.load_checkpoint_and_dispatch(
            empty, str(offload / "saved"), device_map=where, offload_folder=str(offload / "b")
        ).eval()
        assert on_disk(by_hand) == sorted(own)
        assert torch.equal(logits(by_hand), logits(plain))

        whole = accelerate.disk_offload(library.model(name), str(offload / "c"), torch.device("cpu"))
        assert all(parameter.is_meta for parameter in whole.parameters())
        assert torch.equal(logits(whole), logits(plain))
        texts = None
        if family in CAUSAL:
            options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
            texts, *others = [m.generate(**batch("left"), **options) for m in (plain, loaded, by_hand, whole)]
            assert all(torch.equal(ids, texts) for ids in others)
        found = logits(loaded)
        for model in (
            loaded,
            by_hand,
            whole,
        ):  # all models of transformers' GPT-1 share one activation module
            remove_hook_from_submodules(model)
        return found, texts

    agree(run, 2e-5)


def _train(rank: int, which: str, root: Path, name: str, precision: str | None) -> Any:
    """Three training steps on different rows in each process."""
    library = Library(which, Folders(root))
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    assert accelerator.num_processes == 2
    data = [
        {key: x[i] for key, x in labelled(name, seed=seed).items()} for seed in range(4) for i in range(3)
    ]
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    model = library.model(name).train()
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    losses = []
    for inputs in loader:
        out = model(**inputs)
        assert out.logits.dtype == torch.float32
        accelerator.backward(out.loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather_for_metrics(out.loss.detach()[None]).tolist())
    accelerator.wait_for_everyone()
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(
        root / f"{which}-{name}-{precision}",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    accelerator.wait_for_everyone()
    return losses


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("family", ["mistral", "mpt", "mpnet"])
def test_two_processes(
    agree: Any, transformers_library: Library, family: str, precision: str | None, folders: Any
) -> None:
    name = LANGUAGE[family]
    folders(name)

    def run(library: Library) -> Any:
        first, second = in_processes(_train, library.name, folders.root, name, precision)
        assert first == second
        folder = folders.root / f"{library.name}-{name}-{precision}"
        return first, logits(transformers_library.open(name, folder))

    agree(run, 1e-3 if precision is None else 0.2)
