"""`monoblock plan`: memory and time per device of a model on several devices, from its config."""

from __future__ import annotations

import json
from dataclasses import replace
from enum import StrEnum
from typing import Annotated, Any

import typer

from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.options import DownloadOptions, Json

app = sub_app()


class DeviceKind(StrEnum):
    """The devices of `monoblock.scaling.DEVICES`."""

    A100 = "a100"
    H100 = "h100"
    H200 = "h200"
    B200 = "b200"
    CPU = "cpu"


class Weights(StrEnum):
    """Dtypes of weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"
    INT4 = "int4"


@app.command(epilog=EXIT_CODES)
@console.command
def plan(
    *,
    model: Annotated[
        str, typer.Argument(help="Folder with config.json, or name on the hub; no weights are read.")
    ],
    hub: DownloadOptions,
    devices: Annotated[int, typer.Option(min=1, help="The number of devices.")] = 1,
    device: Annotated[
        DeviceKind, typer.Option(help="The kind of device: memory and speeds.")
    ] = DeviceKind.H100,
    memory: Annotated[
        str | None, typer.Option(help="Memory of a device, such as 80GB or 24GiB; default: that of the kind.")
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", "-b", min=1, help="Sequences at a time, on all devices together.")
    ] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each sequence.")] = 2048,
    dtype: Annotated[Weights, typer.Option(help="Type of the weights.")] = Weights.BFLOAT16,
    train: Annotated[bool, typer.Option("--train", help="Training by AdamW instead of generation.")] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations in the backward pass.")
    ] = False,
    accumulation: Annotated[int, typer.Option(min=1, help="Batches per optimizer step.")] = 1,
    prefill: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt computed at a time (prefill_chunk_size).")
    ] = 1024,
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="Devices that hold the shards of a model; default: what fits.")
    ] = None,
    fsdp: Annotated[
        int | None, typer.Option(min=1, help="With --train: groups that shard parameters and states again.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the memory that a model needs on each device, and the least time per token or step, by its config alone.

    Without --tensor-parallel and --fsdp, the layout with the least communication that fits is chosen. If none fits, the
    command fails and names what would.
    """
    from monoblock import AutoConfig, scaling
    from monoblock.checkpoint.save import parse_size

    if not train and (checkpointing or accumulation > 1):
        raise typer.BadParameter("--checkpointing and --accumulation are for --train")
    config = AutoConfig.from_pretrained(model, **hub.kwargs())
    spec, head = config.to_spec(), _head(config)
    kind = scaling.DEVICES[device.value]
    if memory is not None:
        try:
            kind = replace(kind, memory=float(parse_size(memory)))
        except ValueError as error:
            text = str(error).replace("max_shard_size=", "")
            raise typer.BadParameter(text, param_hint="--memory") from None
    work = scaling.Workload(
        batch=batch,
        context=context,
        dtype=dtype.value,
        train=train,
        checkpointing=checkpointing,
        prefill=prefill,
        accumulation=accumulation,
        recomputed=device.value == "cpu",
    )
    if tensor_parallel is None and fsdp is None:
        layout = scaling.chosen(spec, head, devices, work, kind.memory)
    else:
        layout = scaling.DeviceLayout(devices=devices, tensor=tensor_parallel or 1, fsdp=fsdp or 1)
        need = scaling.memory(spec, head, layout, work).peak
        if need > kind.memory:
            raise ValueError(scaling.does_not_fit(spec, head, layout, work, kind.memory, need))
    found = scaling.as_dict(spec, head, layout, work, kind)
    if as_json:
        print(json.dumps({"model": model, **found}, indent=1))
        return
    console.rows(f"{model}: {layout}", _rows(found, kind.memory, train))


def _head(config: Any) -> Any:
    """The head of the architecture that the config names, or of the family's language model."""
    from monoblock.families import family, named_classes

    named = [row.head for row in named_classes(config) if row.head]
    kinds = named or [
        row.head for row in family(config.model_type).classes if row.head in ("causal", "masked")
    ]
    return config.to_head(kinds[0]) if kinds else None


def _rows(found: dict[str, Any], limit: float, train: bool) -> list[tuple[str, str]]:
    held, seconds = found["memory"], found["seconds"]
    rows = [(name, _size(size)) for name, size in held.items() if size and name != "peak"]
    rows.append(("peak per device", f"{_size(held['peak'])} of {_size(limit)} ({held['peak'] / limit:.0%})"))
    longest = max(("arithmetic", "memory", "links"), key=seconds.__getitem__)
    step = "an optimizer step" if train else "a token of each sequence"
    rows.append((f"least time of {step}", f"{seconds['step'] * 1e3:,.3g} ms, bound by {longest}"))
    rows.append(("sent per device and step", _size(found["bytes_sent"])))
    rows.append(("tokens per second, at most", f"{found['tokens_per_second']:,.0f}"))
    return rows


def _size(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.3f} MB"
