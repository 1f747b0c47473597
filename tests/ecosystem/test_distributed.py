"""torch.distributed in two processes: FSDP2 with DCP, tensor parallelism, DDP, and their checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import in_processes
from tiny import (
    BLOCKS,
    FAMILIES,
    LANGUAGE,
    WAYS,
    Folders,
    Library,
    batch,
    equal_states,
    equal_trees,
    labelled,
)
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


def sharded(model: Any, family: str, **options: Any) -> Any:
    """Applies FSDP2 to each block and to the model."""
    kind, where = BLOCKS[family]
    mesh = init_device_mesh("cpu", (2,))
    blocks = model.get_submodule(where)
    assert len(blocks) == 2
    for block in blocks:
        assert type(block).__name__ == kind
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def train(
    model: Any, name: str, rank: int, steps: int = 2, optimizer: torch.optim.Optimizer | None = None
) -> list[float]:
    """Steps of SGD on different rows in each process.

    SGD, since AdamW normalises gradients that consist of rounding errors: the gradients of key biases (MPNet, GPT-1,
    half of Fuyu's) are 0, because softmax is invariant to a constant added to all scores of a row.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    model.train()
    losses = []
    for i in range(steps):
        loss = model(**labelled(name, seed=2 * i + rank)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _fsdp(rank: int, which: str, root: Path, family: str, folder: Path) -> Any:
    name = LANGUAGE[family]
    model = sharded(Library(which, Folders(root)).model(name), family)
    losses = train(model, name, rank)
    full = get_model_state_dict(model, options=WHOLE)
    if rank == 0:
        torch.save(full, folder / "full.pt")
    torch.distributed.barrier()
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_fsdp2_trains(agree: Any, folders: Any, family: str, tmp_path: Path) -> None:
    folders(LANGUAGE[family])

    def run(library: Library) -> Any:
        losses = in_processes(_fsdp, library.name, folders.root, family, tmp_path)
        return losses, dict(sorted(torch.load(tmp_path / "full.pt").items()))

    agree(run)


def _states(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    both = get_state_dict(model, optimizer)
    return dict(zip(("model", "optimizer"), both, strict=True))


def _whole(model: Any, optimizer: torch.optim.Optimizer, file: Path, rank: int) -> None:
    both = get_state_dict(model, optimizer, options=WHOLE)
    if rank == 0:
        torch.save(both, file)
    torch.distributed.barrier()


def _adamw(model: Any) -> torch.optim.Optimizer:
    """AdamW for the parameters that text inputs use; others would have no state."""
    trained = [parameter for key, parameter in model.named_parameters() if "vision" not in key]
    return torch.optim.AdamW(trained, lr=1e-2)


def _resumed(library: Library, family: str, folder: Path) -> tuple[Any, torch.optim.Optimizer]:
    """A sharded model and its optimizer with the states of a DCP folder."""
    model = sharded(library.model(LANGUAGE[family]), family)
    optimizer = _adamw(model)
    state = _states(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return model, optimizer


def _round_trip(rank: int, writer: str, reader: str, root: Path, family: str, folder: Path) -> Any:
    """Trains and saves with one library, loads and saves with the other, and loads with the first; then compares a step
    of the last two."""
    name = LANGUAGE[family]
    one, other = Library(writer, Folders(root)), Library(reader, Folders(root))
    model = sharded(one.model(name), family)
    optimizer = _adamw(model)
    train(model, name, rank, optimizer=optimizer)
    dcp.save(_states(model, optimizer), checkpoint_id=folder / "there")
    _whole(model, optimizer, folder / "first.pt", rank)
    full = get_model_state_dict(model, options=WHOLE)
    if rank == 0:
        model.save_pretrained(folder / "saved", state_dict=full)
    torch.distributed.barrier()

    second, its_optimizer = _resumed(other, family, folder / "there")
    dcp.save(_states(second, its_optimizer), checkpoint_id=folder / "back")
    _whole(second, its_optimizer, folder / "second.pt", rank)
    third, the_last = _resumed(one, family, folder / "back")
    _whole(third, the_last, folder / "third.pt", rank)
    steps = ((model, optimizer), (second, its_optimizer), (third, the_last))
    return [train(m, name, rank, steps=1, optimizer=o) for m, o in steps]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("writer", "reader"), WAYS)
def test_sharded_checkpoints_move_between_libraries(
    folders: Any, writer: str, reader: str, family: str, tmp_path: Path
) -> None:
    """Bitwise: DCP folders of model and optimizer, the full state dict, and save_pretrained(state_dict=)."""
    name, other = LANGUAGE[family], Library(reader, folders)
    folders(name)
    for losses in in_processes(_round_trip, writer, reader, folders.root, family, tmp_path):
        assert losses[2] == losses[0]
        torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    model, optimizer = torch.load(tmp_path / "first.pt")
    trained = {key for key, _ in other.model(name).named_parameters() if "vision" not in key}
    assert set(optimizer["state"]) == trained
    for file in ("second.pt", "third.pt"):
        equal_trees(torch.load(tmp_path / file), (model, optimizer))

    equal_states(other.open(name, tmp_path / "saved").state_dict(), model)
    fresh = other.model(name)
    fresh.load_state_dict(model)
    equal_states(fresh.state_dict(), model)
    dcp_to_torch_save(tmp_path / "there", tmp_path / "one.pt")
    equal_states(torch.load(tmp_path / "one.pt")["model"], model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("writer", "reader"), WAYS)
def test_state_dicts_move_between_libraries(
    folders: Any, writer: str, reader: str, family: str, tmp_path: Path
) -> None:
    """Bitwise, with load_state_dict(strict=True), in both directions."""
    name = LANGUAGE[family]
    one, other = Library(writer, folders).model(name), Library(reader, folders).model(name)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.125)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    result = other.load_state_dict(state, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    equal_states(other.state_dict(), one.state_dict())
    again = Library(writer, folders).model(name)
    again.load_state_dict(other.state_dict(), strict=True)
    equal_states(again.state_dict(), one.state_dict())
    assert list(other.state_dict()) == list(state)


def _bf16_meta(rank: int, which: str, root: Path, family: str) -> Any:
    """Losses of a model that is created on the meta device, sharded, and loaded from a full state dict; losses of one
    that is sharded with its weights; tensors that remain on the meta device. Mixed precision with bfloat16."""
    library, name = Library(which, Folders(root)), LANGUAGE[family]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    whole = library.model(name)
    full = {key: value.clone() for key, value in whole.state_dict().items()}
    with torch.device("meta"):
        model = getattr(library, name)(library.AutoConfig.from_pretrained(library.folders(name)))
    model = sharded(model, family, mp_policy=policy)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, full, options=options)
    left = [key for key, value in model.named_buffers() if value.is_meta]
    losses = []
    for one in (model, sharded(whole, family, mp_policy=policy)):
        one.gradient_checkpointing_enable()
        losses.append(train(one, name, rank))
    return losses, left


# Buffers of transformers' other families stay on the meta device, and its MPNet and GPT-1 have no checkpointing.
@pytest.mark.parametrize(
    ("which", "family"),
    [("transformers", "mpt"), *(("monoblock", family) for family in FAMILIES)],
)
def test_fsdp2_from_meta_with_mixed_precision(folders: Any, which: str, family: str) -> None:
    folders(LANGUAGE[family])
    for (one, other), left in in_processes(_bf16_meta, which, folders.root, family):
        assert one == other
        assert not left


# ColwiseParallel shards the outputs of a matrix, RowwiseParallel the inputs of the next one.
PLANS = {
    "mistral": {
        "self_attn.q_proj": ColwiseParallel,
        "self_attn.k_proj": ColwiseParallel,
        "self_attn.v_proj": ColwiseParallel,
        "self_attn.o_proj": RowwiseParallel,
        "mlp.gate_proj": ColwiseParallel,
        "mlp.up_proj": ColwiseParallel,
        "mlp.down_proj": RowwiseParallel,
    },
    "mpt": {"ffn.up_proj": ColwiseParallel, "ffn.down_proj": RowwiseParallel},
    "gpt_neo": {"mlp.c_fc": ColwiseParallel, "mlp.c_proj": RowwiseParallel},
    "mpnet": {"intermediate.dense": ColwiseParallel, "output.dense": RowwiseParallel},
}
PARTS = {
    "mlp": [("mistral", "mlp"), ("mpt", "ffn"), ("gpt_neo", "mlp"), ("mpnet", "")],
    "all": [("mistral", "")],
}


def _tensor_parallel(rank: int, which: str, root: Path, family: str, part: str) -> Any:
    name = LANGUAGE[family]
    model = Library(which, Folders(root)).model(name)
    mesh = init_device_mesh("cpu", (2,))
    plan = {key: kind() for key, kind in PLANS[family].items() if key.startswith(part)}
    for block in model.get_submodule(BLOCKS[family][1]):
        parallelize_module(block, mesh, plan)
    split = [key for key, p in model.named_parameters() if isinstance(p, DTensor) and key.endswith("weight")]
    assert len(split) == 2 * len(plan), split
    out = model(**labelled(name))
    out.loss.backward()
    gradient = next(p for key, p in model.named_parameters() if "norm" in key.lower() or "ln" in key).grad
    return out.logits.detach().numpy(), gradient.numpy()


@pytest.mark.parametrize(("family", "part"), [case for cases in PARTS.values() for case in cases])
def test_tensor_parallel(agree: Any, folders: Any, family: str, part: str) -> None:
    """The logits and gradients of two processes equal those of one."""
    name = LANGUAGE[family]
    folders(name)

    def run(library: Library) -> Any:
        whole = library.model(name)
        with torch.no_grad():
            expected = whole(**batch()).logits
        found = in_processes(_tensor_parallel, library.name, folders.root, family, part)
        for values, _ in found:
            torch.testing.assert_close(torch.tensor(values), expected, atol=2e-5, rtol=1e-5)
        return [torch.tensor(x) for x in found[0]]

    agree(run, 1e-4)


def _auto_wrapped(rank: int, which: str, root: Path, family: str) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    name = LANGUAGE[family]
    model = Library(which, Folders(root)).model(name)
    kinds = {type(module) for module in model.modules() if type(module).__name__ in model._no_split_modules}
    assert len(kinds) == 1
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=kinds)
    wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    units = [m for m in wrapped.modules() if isinstance(m, FullyShardedDataParallel)]
    assert len(units) == 3
    return train(wrapped, name, rank)


@pytest.mark.parametrize("family", ["mistral", "mpt"])
def test_auto_wrap_policies_find_the_blocks(agree: Any, folders: Any, family: str) -> None:
    folders(LANGUAGE[family])

    def run(library: Library) -> Any:
        return in_processes(_auto_wrapped, library.name, folders.root, family)

    agree(run)


def _ddp(rank: int, which: str, root: Path, family: str, how: str) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    name = LANGUAGE[family]
    model: Any = Library(which, Folders(root)).model(name)
    # Fuyu's image projection has no gradient without images.
    wrapped = DistributedDataParallel(model, find_unused_parameters=family == "fuyu")
    optimizer: Any = None
    if how == "zero":
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    called = torch.compile(wrapped, backend="aot_eager") if how == "compile" else wrapped
    return train(called, name, rank, 3, optimizer), float(sum(p.detach().sum() for p in model.parameters()))


@pytest.mark.parametrize("how", ["", "zero", "compile"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ddp(agree: Any, folders: Any, family: str, how: str) -> None:
    """DDP alone, with ZeroRedundancyOptimizer, and compiled."""
    folders(LANGUAGE[family])

    def run(library: Library) -> Any:
        (_, one), (_, two) = found = in_processes(_ddp, library.name, folders.root, family, how)
        assert one == two
        return [losses for losses, _ in found]

    agree(run)
