"""`monoblock bench`: measure loading, prefill and decoding speed, and the share of memory bandwidth that decoding
uses."""

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

PROMPT = 16  # tokens of the prompt for decoding
READ = 1 << 30  # bytes; larger than any cache
WORK = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the measured workloads."""

    prompt: Annotated[int, typer.Option("--prompt", "-p", min=1, help="Prompt tokens for prefill.")] = 512
    new: Annotated[int, typer.Option("--new", "-n", min=1, help="New tokens per sequence and run.")] = 32
    batch: Annotated[
        list[int] | None,
        typer.Option(
            "--batch",
            "-b",
            min=1,
            help="Batch size for decoding; may be given several times; default: 1 and 8.",
        ),
    ] = None
    runs: Annotated[int, typer.Option(min=1, help="Timed runs per measurement, after a warm-up run.")] = 3


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
        typer.Option(help="Quantise the weights while loading: int8, int4, or lossless (12 bits)."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ...")] = (
        "auto"
    ),
    hub: DownloadOptions,
    as_json: Json = False,
) -> None:
    """Measure how fast a model loads, processes a prompt and decodes on this machine, through `generate`.

    Decoding reads all weights once per token, so memory bandwidth, which is measured too, bounds its speed; the share
    of it that decoding reaches is shown. Inputs are random tokens.
    """
    from monoblock.cli.engine import locate, need_pytorch

    need_pytorch("monoblock bench")
    path, name = locate(model)
    options: dict[str, Any] = hub.kwargs() if model else {}
    options["dtype"] = dtype.value
    if quantize is not None:
        options["quantization_config"] = quantize.value
    with _progress() as report:
        found = {"model": name} | measure(path, options, device, sizes, report)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        console.rows(f"monoblock bench {name}", _lines(found))


def measure(
    path: str, options: dict[str, Any], device: str, sizes: Sizes, report: Callable[[str], None]
) -> dict[str, Any]:
    """All results of `monoblock bench`, as JSON values: sizes in bytes, times in seconds, speeds as lists of runs in
    tokens per second."""
    from monoblock.cli.engine import device_map

    report("importing PyTorch")
    from monoblock import AutoModelForCausalLM

    if where := device_map(device):
        options = options | {"device_map": where}
    report("loading")
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path, **options).eval()
    loading = time.perf_counter() - begin
    model.generation_config.eos_token_id = None  # every run generates the same number of tokens
    report(f"a prompt of {sizes.prompt} tokens")
    prefill = _timed(lambda: _generate(model, 1, sizes.prompt, 1), sizes.runs)
    speeds: dict[int, list[float]] = {}
    for batch in dict.fromkeys(sizes.batch or (1, 8)):
        report(f"decoding, batch size {batch}")
        speeds[batch] = _decoding(model, batch, sizes)
    peak = _peak()  # before the bandwidth measurement, which allocates memory
    report("memory bandwidth")
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
    """Bytes of weights read per decoded token: all but the input embedding, of which one row is read, unless it is tied
    to the head."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding = {t.data_ptr() for t in (*table.parameters(), *table.buffers())}
    if head is not None:
        embedding -= {t.data_ptr() for t in (*head.parameters(), *head.buffers())}
    return sum(t.numel() * t.itemsize for key, t in tensors.items() if key not in embedding)


class Memory:
    """Measures read bandwidth on a block of device memory: by a sum, and on CPUs also by a native kernel."""

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
        """Bytes per second: the best of `tries` runs of each method."""
        return max(READ / min(_timed(read, tries)) for read in self.reads)


def _seconds(work: WORK) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _timed(work: WORK, runs: int) -> list[float]:
    """Seconds per run, after a warm-up run."""
    return [_seconds(work) for _ in range(runs + 1)][1:]


def _decoding(model: Any, batch: int, sizes: Sizes) -> list[float]:
    """Tokens per second of the whole batch, from the time of a call with 1 + `new` tokens minus one with 1 token."""
    _generate(model, batch, PROMPT, 1 + sizes.new)
    speeds: list[float] = []
    for _ in range(sizes.runs):
        first = _seconds(lambda: _generate(model, batch, PROMPT, 1))
        whole = _seconds(lambda: _generate(model, batch, PROMPT, 1 + sizes.new))
        # On a busy machine the shorter call may take longer; then use the time of the whole call.
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
    """Status of the native (CPU) kernels, or the kernels of another device."""
    from monoblock import native

    return native.status() if device.type == "cpu" else f"PyTorch's, on {device.type}"


def _peak() -> int | None:
    """Peak resident memory of this process in bytes; None where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Report progress on stderr: a status line at a terminal, else one line per step."""
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
        lines.append((f"decoding, batch size {batch}", text))
    peak = found["peak_memory"]
    return [*lines, ("peak memory", "not known" if peak is None else f"{peak / 2**30:.2f} GiB")]


def _speed(figure: dict[str, Any]) -> str:
    speeds = figure["tokens_per_second"]
    return f"{statistics.median(speeds):,.1f} tokens/s ({min(speeds):,.1f}-{max(speeds):,.1f})"
