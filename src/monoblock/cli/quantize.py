"""`monoblock quantize`: quantise a model's weights to 8 or 4 bits, or compress them to 12 bits without loss."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.options import DownloadOptions, Dtype, shard_size

if TYPE_CHECKING:
    from monoblock.checkpoint.options import HubOptions
    from monoblock.quantization import WeightOnlyConfig

app = sub_app()


class Bits(StrEnum):
    """Bits per weight in the transformer blocks."""

    EIGHT = "8"
    FOUR = "4"
    TWELVE = "12"


class Group(StrEnum):
    """Weights per scale."""

    LARGE = "128"
    SMALL = "64"


@dataclass(frozen=True, kw_only=True)
class How:
    """Options of the quantisation."""

    bits: Annotated[Bits, typer.Option(help="Bits per weight in the blocks; 12: bfloat16 without loss.")] = (
        Bits.EIGHT
    )
    group_size: Annotated[Group, typer.Option(help="Weights per scale.")] = Group.LARGE
    keep: Annotated[
        list[str] | None,
        typer.Option(help="A module to leave unquantised, such as lm_head; may be given several times."),
    ] = None
    dtype: Annotated[
        Dtype, typer.Option(help="Type of unquantised weights and of the computation; auto: as stored.")
    ] = Dtype.AUTO
    max_shard_size: Annotated[
        str | None, typer.Option(help='Split the weights into files of this size at most, such as "5GB".')
    ] = None

    def config(self) -> WeightOnlyConfig:
        """The options as a WeightOnlyConfig."""
        from monoblock.quantization import WeightOnlyConfig

        return WeightOnlyConfig(
            bits=int(self.bits), group_size=int(self.group_size), modules_to_not_convert=self.keep
        )


@app.command(epilog=EXIT_CODES)
@console.command
def quantize(
    *,
    model: Annotated[str, typer.Argument(help="Folder, or name on the hub, of unquantised weights.")],
    out: Annotated[Path, typer.Argument(help="The folder to create.")],
    how: How,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the target folder; the files in it are deleted.")
    ] = False,
    hub: DownloadOptions,
) -> None:
    """Quantise a model's weights to 8 or 4 bits, or compress them to 12 bits without loss, into a new folder.

    The folder loads like any other. Tokenizer and generation settings are copied. It is created atomically; in memory
    there are the quantised weights and one matrix.
    """
    from monoblock.checkpoint.folder import check_target, copy_files, new_folder
    from monoblock.checkpoint.formats import companions
    from monoblock.checkpoint.options import HubOptions
    from monoblock.cli.engine import need_pytorch
    from monoblock.conversion.convert import check_apart

    need_pytorch("monoblock quantize")
    size = shard_size(how.max_shard_size) or "50GB"
    target = Path(os.path.abspath(out.expanduser()))  # noqa: PTH100  # resolve() would follow a link
    check_target(target, replace=force)
    check_apart(model, target)
    options = HubOptions(**hub.kwargs())
    cls, before = _class_and_size(model, options)
    console.note("quantising ...")
    loaded = cls.from_pretrained(
        model, dtype=how.dtype.value, quantization_config=how.config(), **hub.kwargs()
    )
    vars(loaded.config).pop("auto_map", None)  # it refers to remote code, which is not copied
    console.note("writing ...")
    with new_folder(target, replace=force) as folder:
        loaded.save_pretrained(folder, max_shard_size=size)
        copy_files(folder, companions(model, options))
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    after = loaded.get_memory_footprint()
    lines = [
        ("class", cls.__name__),
        ("quantisation", how.config().summary),
        ("dtype", str(loaded.dtype).removeprefix("torch.")),
        ("parameters", f"{loaded.num_parameters():,}"),
        ("weights", f"{after:,} bytes, of {before:,} before: {after / before:.0%}"),
        ("files", ", ".join(files)),
    ]
    console.rows(str(out), lines)


def _class_and_size(model: str, options: HubOptions) -> tuple[type, int]:
    """The PyTorch class of the model, and the size of its stored tensors in bytes."""
    from math import prod

    import monoblock
    from monoblock.checkpoint import quantized
    from monoblock.checkpoint.formats import class_of
    from monoblock.checkpoint.header import ITEM_BYTES
    from monoblock.checkpoint.hub import find_weights
    from monoblock.checkpoint.store import open_store

    config = monoblock.AutoConfig.from_pretrained(model, **vars(options))
    store = open_store(find_weights(model, options), "np")
    if quantized.is_quantized(store):
        raise ValueError(
            f"{model} holds quantised weights already: quantise the folder of the original weights"
        )
    size = sum(prod(store.shape(name)) * ITEM_BYTES[store.dtype(name)] for name in store)
    return getattr(monoblock, class_of(config, store).name), size
