"""`monoblock bench`: how fast a model is on this machine, and how much of the machine's memory bandwidth it uses."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.options import DownloadOptions, Dtype, Json, Quantize

app = sub_app()

START = 16  # tokens of the prompt that decoding begins with
READ = 1 << 30  # bytes; far beyond any cache
WORK = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured, and how often."""

    prompt: Annotated[
        int, typer.Option("--prompt", "-p", min=1, help="Tokens of the prompt whose reading is timed.")
    ] = 512
    new: Annotated[int, typer.Option("--new", "-n", min=1, help="New tokens of each text in a run.")] = 32
    batch: Annotated[
        list[int] | None,
        typer.Option(
            "--batch", "-b", min=1, help="Texts at once; may be given several times; default: 1 and 8."
        ),
    ] = None
    runs: Annotated[int, typer.Option(min=1, help="Runs of each figure, after one that warms up.")] = 3


@app.command(epilog=EXIT_CODES)
@console.command
def bench(
    *,
    model: Annotated[
        str | None, typer.Argument(help="Folder, or name on the hub; default: the embedded demo model.")
    ] = None,
    sizes: Sizes,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto: as stored.")] = Dtype.AUTO,
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="Pack the weights while they are loaded: int8, int4, or lossless (12 bits)."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ...")] = (
        "auto"
    ),
    hub: DownloadOptions,
    as_json: Json = False,
) -> None:
    """Measure how fast a model loads, reads a prompt and makes tokens here, through `generate` as programs call it.

    Decoding reads all weights once for each token: its share of the memory bandwidth, which is measured too, says
    how much faster this machine could be at best. The texts are random tokens.
    """
    from monoblock.cli.engine import locate, need_pytorch

    need_pytorch("monoblock bench")
    path, name = locate(model)
    options: dict[str, Any] = hub.kwargs() if model else {}
    options["dtype"] = dtype.value
    if quantize is not None:
        options["quantization_config"] = quantize.value
    with _progress() as say:
        found = {"model": name} | measure(path, options, device, sizes, say)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        console.rows(f"monoblock bench {name}", _lines(found))


def measure(
    path: str, options: dict[str, Any], device: str, sizes: Sizes, say: Callable[[str], None]
) -> dict[str, Any]:
    """Everything `monoblock bench` shows, ready for JSON. Sizes in bytes, times in seconds, speeds as lists of runs
    in tokens per second."""
    from monoblock.cli.engine import device_map

    say("importing PyTorch")
    from monoblock import AutoModelForCausalLM

    if where := device_map(device):
        options = options | {"device_map": where}
    say("loading")
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path, **options).eval()
    loading = time.perf_counter() - begin
    model.generation_config.eos_token_id = None  # each run makes as many tokens as the next
    say(f"a prompt of {sizes.prompt} tokens")
    prefill = _timed(lambda: _generate(model, 1, sizes.prompt, 1), sizes.runs)
    speeds: dict[int, list[float]] = {}
    for batch in dict.fromkeys(sizes.batch or (1, 8)):
        say(f"decoding, {batch} at once")
        speeds[batch] = _decoding(model, batch, sizes)
    peak = _peak()  # before the next, which needs memory of its own
    say("the machine's memory")
    size, bandwidth = weight_bytes(model), Memory(model.device).rate()
    return {
        "class": type(model).__name__,
        "weights": str(options.get("quantization_config", model.dtype)).removeprefix("torch."),
        "device": str(model.device),
        "threads": _threads(),
        "kernels": _kernels(model.device),
        "weight_bytes_per_token": size,
        "bandwidth": bandwidth,
        "load_seconds": loading,
        "prompt_tokens": sizes.prompt,
        "prompt": {"tokens_per_second": [sizes.prompt / seconds for seconds in prefill]},
        "new_tokens": sizes.new,
        "decode": {
            str(batch): {
                "tokens_per_second": runs,
                "bandwidth_share": statistics.median(runs) / batch * size / bandwidth,
            }
            for batch, runs in speeds.items()
        },
        "peak_memory": peak,
    }


def weight_bytes(model: Any) -> int:
    """Bytes of weights that one token reads: all but the table of the input, of which it reads a line, unless that
    is the head too."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    lines = {t.data_ptr() for t in (*table.parameters(), *table.buffers())}
    if head is not None:
        lines -= {t.data_ptr() for t in (*head.parameters(), *head.buffers())}
    return sum(t.numel() * t.itemsize for key, t in tensors.items() if key not in lines)


class Memory:
    """A block of the device's memory, to see how fast it is read: by a sum, and on a CPU by the native kernels too."""

    def __init__(self, device: Any) -> None:
        import torch

        from monoblock import native

        self.block = block = torch.ones(READ // 4, device=device)
        self.reads: list[WORK] = [lambda: block.sum().item()]
        library = native.library()
        if library is not None and block.device.type == "cpu":
            from ctypes import byref, c_uint32

            threads, checksum = torch.get_num_threads(), c_uint32()
            self.reads.append(lambda: library.mb_read(block.data_ptr(), READ, threads, byref(checksum)))

    def rate(self, tries: int = 4) -> float:
        """Bytes per second, the best of several tries each."""
        return max(READ / min(_timed(read, tries)) for read in self.reads)


def _seconds(work: WORK) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _timed(work: WORK, runs: int) -> list[float]:
    """Seconds of each run, after one that warms up."""
    return [_seconds(work) for _ in range(runs + 1)][1:]


def _decoding(model: Any, batch: int, sizes: Sizes) -> list[float]:
    """Tokens per second of all texts together: what a call with more new tokens takes beyond one with a single one."""
    _generate(model, batch, START, 1 + sizes.new)
    speeds: list[float] = []
    for _ in range(sizes.runs):
        first = _seconds(lambda: _generate(model, batch, START, 1))
        whole = _seconds(lambda: _generate(model, batch, START, 1 + sizes.new))
        # On a busy machine one token may take longer than many; then the whole call is all that is known.
        speeds.append(batch * sizes.new / (whole - first if whole > first else whole))
    return speeds


def _generate(model: Any, batch: int, length: int, new: int) -> None:
    import torch

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=draw)
    ids = ids.to(model.device)
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0).tolist()


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _kernels(device: Any) -> str:
    """The native kernels in use, or why there are none; they are a CPU's."""
    from monoblock import native

    return native.status() if device.type == "cpu" else f"PyTorch's, on {device.type}"


def _peak() -> int | None:
    """The most memory that this process ever held; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Says what is being measured, on stderr: one changing line at a terminal, a line each elsewhere."""
    if not sys.stderr.isatty():
        yield lambda what: console.note(f"{what} ...")
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda what: status.update(what)


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [
        ("class", f"{found['class']}, weights in {found['weights']}, on {found['device']}"),
        ("threads", str(found["threads"])),
        ("native kernels", found["kernels"]),
        ("memory bandwidth", f"{found['bandwidth'] / 1e9:.1f} GB/s"),
        ("weights per token", f"{found['weight_bytes_per_token'] / 1e6:,.1f} MB"),
        ("loading", f"{found['load_seconds']:.2f} s"),
        (f"prompt of {found['prompt_tokens']}", _speed(found["prompt"])),
    ]
    for batch, figure in found["decode"].items():
        text = f"{_speed(figure)}, {figure['bandwidth_share']:.0%} of the bandwidth"
        lines.append((f"decoding, {batch} at once", text))
    peak = found["peak_memory"]
    return [*lines, ("peak memory", "not known" if peak is None else f"{peak / 2**30:.2f} GiB")]


def _speed(figure: dict[str, Any]) -> str:
    speeds = figure["tokens_per_second"]
    return f"{statistics.median(speeds):,.1f} tokens/s ({min(speeds):,.1f}-{max(speeds):,.1f})"
