"""Memory and traffic per device of a model on several devices, from its spec alone: `monoblock plan`.

Weights, gradients, optimizer states and KV cache are counted exactly, tensor by tensor, as the code here allocates
them; activations by the tensors that the layers keep (docs/scaling.md has the formulas with their sources). All sizes
are bytes of one device, the one with the largest shards. Times are lower bounds by the roofline model: the largest of
the times that the arithmetic, the memory and the links need.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil, prod

from monoblock.heads import KINDS, HeadSpec
from monoblock.partition import check_shards, rules, shard_shapes
from monoblock.spec import Alibi, ArchSpec, Buckets, Learned, Rotary

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZED = {"int8": 8, "int4": 4}
GROUP, RUN = 128, 128  # inputs per scale; inputs are padded to a multiple of RUN
SLACK = 64  # spare slots of a cache, and tokens that it keeps beyond a window
# Of the loss (training/losses.py of PyTorch): bytes of logits at a time, and logits whose softmax is computed at once.
CHUNK, SOFTMAX = 1 << 25, 1 << 21
# Tensor parallelism beyond a machine's devices has slow links (arXiv:2104.04473, section 3.2).
MOST_TENSOR = 8
LARGEST = 1024  # devices that are proposed at most


@dataclass(frozen=True, kw_only=True)
class Device:
    """A kind of device, by its data sheet: bytes of memory, bytes per second of memory and of the links to the others
    (one direction), and operations per second of dense matrix products by the bytes of a value."""

    memory: float
    bandwidth: float
    links: float
    operations: Mapping[int, float]


# NVIDIA's data sheets of the SXM versions; links: NVLink, half of the total of both directions. cpu: one socket with
# 12 channels of DDR5-4800, AMX in bfloat16, and a 200 Gbit/s network.
DEVICES = {
    "a100": Device(memory=80e9, bandwidth=2.039e12, links=300e9, operations={4: 19.5e12, 2: 312e12}),
    "h100": Device(memory=80e9, bandwidth=3.35e12, links=450e9, operations={4: 67e12, 2: 989e12}),
    "h200": Device(memory=141e9, bandwidth=4.8e12, links=450e9, operations={4: 67e12, 2: 989e12}),
    "b200": Device(memory=180e9, bandwidth=8e12, links=900e9, operations={4: 80e12, 2: 2250e12}),
    "cpu": Device(memory=512e9, bandwidth=460e9, links=25e9, operations={4: 3e12, 2: 30e12}),
}


@dataclass(frozen=True, kw_only=True)
class DeviceLayout:
    """How devices are used: `tensor` of them hold a model's shards; in training `fsdp` such groups shard the parameters
    again; the others are replicas."""

    devices: int = 1
    tensor: int = 1
    fsdp: int = 1

    @property
    def replicas(self) -> int:
        """The number of groups of devices that compute different sequences."""
        return self.devices // self.tensor

    def __str__(self) -> str:
        copies = self.replicas // self.fsdp
        more = f" --fsdp {self.fsdp}" if self.fsdp > 1 else ""
        return f"--devices {self.devices} --tensor-parallel {self.tensor}{more}" + (
            f" ({copies} replicas)" if copies > 1 else ""
        )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is computed: `batch` sequences at a time on all devices together, of `context` tokens each. `prefill`:
    tokens of a prompt that are computed at a time; `accumulation`: batches per training step. `recomputed`: the outputs
    of layer norms and activation functions are computed again in the backward pass, as on CPUs."""

    batch: int = 1
    context: int = 2048
    dtype: str = "bfloat16"
    train: bool = False
    checkpointing: bool = False
    prefill: int = 1024
    accumulation: int = 1
    recomputed: bool = False


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes of one device. `gathered`: parameters that FSDP has gathered; `layer`: what the backward pass of a layer
    adds to the activations that are kept; `head`: what the loss holds while it computes logits; `temporary`: what the
    end of the backward pass or the optimizer's step holds besides gradients."""

    weights: int
    cache: int = 0
    gradients: int = 0
    optimizer: int = 0
    gathered: int = 0
    activations: int = 0
    layer: int = 0
    head: int = 0
    temporary: int = 0
    accumulates: bool = False

    @property
    def peak(self) -> int:
        """The largest sum at any time. In a backward pass activations are freed while gradients are made, unless these
        are accumulated over several batches."""
        fixed = self.weights + self.cache + self.optimizer + self.gathered
        held = self.gradients if self.accumulates else 0
        kept = held + self.activations + max(self.head, self.layer)
        return fixed + max(kept, self.gradients + self.temporary)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of one step: a token of each sequence (decoding), all tokens of a bidirectional model, or an optimizer
    step. `communicated`: bytes that a
    device sends in it; `step` is the largest of the other three."""

    arithmetic: float
    memory: float
    links: float
    communicated: int

    @property
    def step(self) -> float:
        """The lower bound."""
        return max(self.arithmetic, self.memory, self.links)


def check(spec: ArchSpec, layout: DeviceLayout, work: Workload) -> None:
    """ValueError: the layout or the workload is not possible; says what to change."""
    check_shards(spec, layout.tensor, "--tensor-parallel")
    groups = layout.tensor * layout.fsdp
    if layout.devices % groups:
        raise ValueError(
            f"--devices {layout.devices} is no multiple of --tensor-parallel {layout.tensor} x --fsdp {layout.fsdp}"
        )
    if work.dtype not in (*ITEM, *QUANTIZED):
        raise ValueError(f"--dtype {work.dtype}: give one of {', '.join((*ITEM, *QUANTIZED))}")
    if work.train and work.dtype in QUANTIZED:
        raise ValueError(f"--dtype {work.dtype}: quantised weights are not trained; give bfloat16 or float32")
    if layout.fsdp > 1 and not work.train:
        raise ValueError("--fsdp shards what is trained: for inference give --tensor-parallel")
    learned = spec.position(Learned)
    if learned is not None and work.context > learned.size - learned.offset:
        raise ValueError(
            f"--context {work.context}: the model has {learned.size - learned.offset} learned positions"
        )


# ---------------------------------------------------------------------------- memory


def memory(spec: ArchSpec, head: HeadSpec | None, layout: DeviceLayout, work: Workload) -> DeviceMemory:
    """The memory of one device. ValueError as of `check`."""
    check(spec, layout, work)
    rows = ceil(work.batch / layout.replicas)
    weights = weight_bytes(spec, head, layout, work.dtype)
    if not work.train:
        return DeviceMemory(
            weights=weights,
            cache=cache_bytes(spec, layout.tensor, rows, work.context, _compute(work.dtype))
            if spec.causal
            else 0,
            activations=_inference(spec, head, layout.tensor, rows, work),
        )
    item, count = ITEM[work.dtype], trained(spec, head, layout)
    saved, layer = _training(spec, layout.tensor, rows, work)
    # The head's gradient, before it is added to the table's if they are tied; float32 copies of other gradients.
    added = head_values(spec, head, layout.tensor) * (4 + (item if spec.tie_head else 0))
    copies = 0 if item == 4 else 4 * count
    return DeviceMemory(
        weights=weights,
        gradients=count * item,
        optimizer=count * optimizer_bytes(work.dtype),
        gathered=_gathered(spec, head, layout, item),
        activations=saved,
        layer=layer + 4 * head_values(spec, head, layout.tensor),  # of the loss, until its backward pass ends
        head=_loss(spec, head, layout.tensor, rows, work),
        temporary=max(added, copies),
        accumulates=work.accumulation > 1,
    )


def weight_bytes(spec: ArchSpec, head: HeadSpec | None, layout: DeviceLayout, dtype: str) -> int:
    """The weights of the first device: the shards of the tensor axis, in training sharded again by rows. In int8 and
    int4, matrices have scales in float16, embedding and head 8 bits, all else bfloat16."""
    if dtype in ITEM:
        return trained(spec, head, layout) * ITEM[dtype]
    found, table = 0, rules(spec, head)
    for name, shape in _shapes(spec, head, layout.tensor).items():
        style = table[name].style
        if name.endswith(".weight") and style in ("column", "row", "vocabulary"):
            bits = 8 if style == "vocabulary" else QUANTIZED[dtype]
            padded = ceil(shape[1] / RUN) * RUN
            found += shape[0] * (padded * bits // 8 + padded // GROUP * 2 * (1 if bits == 8 else 2))
        else:
            found += 2 * prod(shape)
    return found


def trained(spec: ArchSpec, head: HeadSpec | None, layout: DeviceLayout) -> int:
    """The number of parameters on the first device. FSDP2 shards dimension 0 of each in chunks, the first ones full."""
    shapes = _shapes(spec, head, layout.tensor).values()
    return sum(ceil(shape[0] / layout.fsdp) * prod(shape[1:]) for shape in shapes)


def optimizer_bytes(dtype: str) -> int:
    """Bytes per parameter of AdamW: two moments in float32, and a float32 copy of weights that are not (arXiv
    1910.02054, section 3.1)."""
    return 8 if dtype == "float32" else 12


def cache_bytes(spec: ArchSpec, tensor: int, rows: int, context: int, item: int) -> int:
    """Keys and values of `rows` sequences after a prompt of `context` tokens: with spare slots; in a layer with a
    window, at most the tokens at which older ones are dropped."""
    att = spec.attention
    slots = 0
    for window in spec.windows:
        kept = context if window is None else min(context, 2 * (window - 1 + SLACK))
        slots += kept + SLACK
    return 2 * slots * rows * att.kv_heads // tensor * att.head_dim * item


def _compute(dtype: str) -> int:
    return ITEM.get(dtype, 2)


@functools.lru_cache(maxsize=64)
def _shapes(spec: ArchSpec, head: HeadSpec | None, tensor: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the largest shards, which the last process has."""
    return shard_shapes(spec, head, tensor - 1, tensor)


def _inference(spec: ArchSpec, head: HeadSpec | None, tensor: int, rows: int, work: Workload) -> int:
    """Activations while a chunk of the prompt is in a layer's MLP or attention, the larger of both; and the logits of
    the last tokens, with the shard they are joined from."""
    att, mlp, item = spec.attention, spec.mlp, _compute(work.dtype)
    q, kv, m = (n // tensor for n in (att.heads * att.head_dim, att.kv_heads * att.head_dim, mlp.width))
    tokens = rows * min(work.context, work.prefill)
    attention = 2 * spec.width + (q + 2 * kv) + q + kv + q
    wide = 2 * spec.width + (3 if mlp.gated else 2) * m
    logits = 0
    if head is not None and KINDS[head.kind].size == "vocab":
        last = rows if spec.causal else rows * work.context
        logits = last * spec.vocab * (item + (item if tensor > 1 else 0))
    return tokens * max(attention, wide) * item + logits


def _training(spec: ArchSpec, tensor: int, rows: int, work: Workload) -> tuple[int, int]:
    """What the forward pass of a batch keeps for the backward pass, and what the backward pass of a layer adds."""
    item, tokens = ITEM[work.dtype], rows * work.context
    layer = saved_per_token(spec, tensor, work.context, item, recomputed=work.recomputed)
    transient = (2 * spec.width + (2 if spec.mlp.gated else 1) * spec.mlp.width // tensor) * item
    final = 2 * spec.width * item
    if work.checkpointing:  # arXiv:1604.06174: the input of each layer, and one layer's activations
        return tokens * (spec.layers * spec.width * item + final), tokens * (layer + transient)
    return tokens * (spec.layers * layer + final), tokens * transient


def saved_per_token(spec: ArchSpec, tensor: int, context: int, item: int, *, recomputed: bool = False) -> int:
    """Bytes per token that a layer keeps for its backward pass: the inputs of norms and matrix products, of the
    activation, and of the attention (after arXiv:2205.05198, section 4, for the operators used here). `recomputed`:
    see `Workload`."""
    att, mlp, w = spec.attention, spec.mlp, spec.width
    q, kv, m = (n // tensor for n in (att.heads * att.head_dim, att.kv_heads * att.head_dim, mlp.width))
    heads = att.heads // tensor
    values = 4 * w + q + (4 if mlp.gated else 2) * m  # norms' inputs and outputs; attention's output; MLP
    if spec.norm.kind == "rms":
        values += 2 * w
    elif recomputed:
        values -= 2 * w
    if recomputed and not mlp.gated and mlp.act not in ("relu", "relu2"):
        values -= m
    # The kernel of the CPU takes grouped heads, but not ALiBi.
    repeated = not recomputed or spec.position(Alibi) is not None or bool(spec.dropout.attention)
    grouped, rotary, scores = att.kv_heads < att.heads and repeated, spec.position(Rotary) is not None, 0
    if spec.position(Buckets) is not None:
        values, scores = values + q + 2 * kv, heads * context  # attention weights
    elif att.qk_norm is not None:
        values += (q + 2 * kv) + q + kv  # projections; normed, perhaps rotated
    elif rotary and grouped:
        values += 3 * q  # rotated queries, repeated keys and values
    elif rotary:
        values += (q + 2 * kv) + q + kv
    else:
        values += (q + 2 * kv) + (2 * q if grouped else 0)
    if att.clip is not None:
        values += kv if rotary and not grouped else q + 2 * kv
    if spec.dropout.attention:
        scores = 2 * heads * context
    masks = 2 * w if spec.dropout.residual else 0  # a byte each
    statistics = 4 * (heads + (2 if spec.norm.kind == "rms" else 4))  # float32
    if att.qk_norm is not None:
        statistics += 8 * (heads + att.kv_heads // tensor if att.qk_norm.span == "head" else 2)
    return (values + scores) * item + masks + statistics


def _loss(spec: ArchSpec, head: HeadSpec | None, tensor: int, rows: int, work: Workload) -> int:
    """The loss, which is computed with its gradients in chunks of tokens. For all of them: the hidden states with a
    label, their gradients, and the sums of the head's gradients in float32. For a chunk: the logits and their
    gradients; with these the softmax in float32 of some of them, or the chunk's gradients of the head and of its hidden
    states."""
    if head is None or KINDS[head.kind].size != "vocab":
        return 0
    item, every = ITEM[work.dtype], rows * work.context
    tokens = min(every, max(1, CHUNK // (spec.vocab * item)))
    logits = tokens * spec.vocab * item
    # log_softmax makes a float32 copy of logits in another dtype.
    softmax = min(max(SOFTMAX, spec.vocab), tokens * spec.vocab) * (4 if item == 4 else 8)
    values = head_values(spec, head, tensor)
    gradients = (values + tokens * spec.width) * item
    return 2 * every * spec.width * item + 4 * values + 2 * logits + max(softmax, gradients)


def head_values(spec: ArchSpec, head: HeadSpec | None, tensor: int) -> int:
    """The values of the matrix of logits on one device."""
    if head is None or KINDS[head.kind].size != "vocab":
        return 0
    return ceil(spec.vocab / tensor) * spec.width


def _gathered(spec: ArchSpec, head: HeadSpec | None, layout: DeviceLayout, item: int) -> int:
    """Parameters of the layer that is computed and of the next one, gathered, and the gradients of one."""
    if layout.fsdp == 1:
        return 0
    units: dict[str, int] = {}
    for name, shape in _shapes(spec, head, layout.tensor).items():
        unit = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""
        units[unit] = units.get(unit, 0) + prod(shape)
    return 3 * max(units.values()) * item


# ---------------------------------------------------------------------------- time


def times(
    spec: ArchSpec, head: HeadSpec | None, layout: DeviceLayout, work: Workload, device: Device
) -> StepTimes:
    """The lower bounds of one step on one device. A ring moves 2 (n - 1) / n of a summed tensor, half of it for a
    gathered or scattered one (Thakur et al., 2005)."""
    item, rows = _compute(work.dtype), ceil(work.batch / layout.replicas)
    shapes = _shapes(spec, head, layout.tensor)
    table = rules(spec, head)
    tables = sum(prod(s) for n, s in shapes.items() if table[n].style == "replicated")
    embed = prod(shapes["embed.weight"])
    tied = head is not None and KINDS[head.kind].size == "vocab" and spec.tie_head
    multiplied = sum(map(prod, shapes.values())) - tables - (0 if tied else embed)
    att = spec.attention
    q = att.heads * att.head_dim // layout.tensor
    ring = 2 * (layout.tensor - 1) / layout.tensor
    if not work.train:
        keys = sum(min(work.context, window or work.context) for window in spec.windows)
        tokens = rows if spec.causal else rows * work.context
        arithmetic = tokens * (2 * multiplied + 4 * q * keys)
        read = weight_bytes(spec, head, layout, work.dtype) - (0 if tied else embed * item)
        if spec.causal:
            read += 2 * keys * rows * att.kv_heads * att.head_dim // layout.tensor * item
        sent = tokens * item * (spec.width * (2 * spec.layers + 1) * ring + spec.vocab * ring / 2)
    else:
        tokens = rows * work.context
        keys = sum(
            min(work.context / (2 if spec.causal else 1), window or work.context) for window in spec.windows
        )
        passes = 4 if work.checkpointing else 3
        arithmetic = passes * tokens * (2 * multiplied + 4 * q * keys)
        held = sum(map(prod, shapes.values()))
        # Forward and backward read the weights and write gradients; AdamW reads and writes its states.
        read = 3 * held * item + trained(spec, head, layout) * 2 * optimizer_bytes(work.dtype)
        sent = tokens * item * spec.width * 4 * spec.layers * ring
        shards = layout.fsdp
        sent += 3 * held * item * (shards - 1) / shards
        copies = layout.replicas // shards
        sent += 2 * held * item / shards * (copies - 1) / copies
    accumulated = work.accumulation if work.train else 1
    operations = device.operations[item]
    return StepTimes(
        arithmetic=accumulated * arithmetic / operations,
        memory=accumulated * read / device.bandwidth,
        links=accumulated * sent / device.links,
        communicated=int(accumulated * sent),
    )


# ---------------------------------------------------------------------------- choice


def layouts(spec: ArchSpec, devices: int, train: bool) -> Iterator[DeviceLayout]:
    """The layouts of that many devices, least communication first: without tensor parallelism, then more of it; in
    training FSDP over all groups."""
    for tensor in range(1, min(devices, MOST_TENSOR) + 1):
        if devices % tensor:
            continue
        try:
            check_shards(spec, tensor)
        except ValueError:
            continue
        if train:
            yield DeviceLayout(devices=devices, tensor=tensor)
            yield DeviceLayout(devices=devices, tensor=tensor, fsdp=devices // tensor)
        else:
            yield DeviceLayout(devices=devices, tensor=tensor)


def chosen(spec: ArchSpec, head: HeadSpec | None, devices: int, work: Workload, limit: float) -> DeviceLayout:
    """The first of `layouts` that fits into `limit` bytes per device. ValueError: none does; names what would."""
    found: list[tuple[int, DeviceLayout]] = []
    for layout in layouts(spec, devices, work.train):
        need = memory(spec, head, layout, work).peak
        if need <= limit:
            return layout
        found.append((need, layout))
    need, best = min(found, key=lambda one: one[0])
    raise ValueError(does_not_fit(spec, head, best, work, limit, need))


def does_not_fit(
    spec: ArchSpec, head: HeadSpec | None, layout: DeviceLayout, work: Workload, limit: float, need: int
) -> str:
    """What is needed and what would fit, for an error message."""
    found = [text for text in _alternatives(spec, head, layout, work, limit) if text]
    would = f"; {'; or '.join(found)} would fit" if found else "; nothing that is tried here would fit"
    return f"{layout} needs {need / 1e9:,.1f} GB on each device, which has {limit / 1e9:,.1f}{would}"


def _alternatives(
    spec: ArchSpec, head: HeadSpec | None, layout: DeviceLayout, work: Workload, limit: float
) -> Iterator[str]:
    def fits(other: DeviceLayout, how: Workload) -> bool:
        return memory(spec, head, other, how).peak <= limit

    same = list(layouts(spec, layout.devices, work.train))
    yield next((str(other) for other in same if fits(other, work)), "")
    if work.train and not work.checkpointing:
        how = replace(work, checkpointing=True)
        yield next((f"--checkpointing {other}" for other in same if fits(other, how)), "")
    if not work.train:
        smaller = [d for d in ("bfloat16", "int8", "int4") if _bits(d) < _bits(work.dtype)]
        made = ((f"--dtype {d} {o}", o, replace(work, dtype=d)) for d in smaller for o in same)
        yield next((text for text, other, how in made if fits(other, how)), "")
    batch = work.batch // 2
    while batch >= 1:
        how = replace(work, batch=batch)
        if (other := next((o for o in same if fits(o, how)), None)) is not None:
            yield f"--batch {batch} {other}"
            break
        batch //= 2
    devices = layout.devices * 2
    while devices <= LARGEST:
        more = next((o for o in layouts(spec, devices, work.train) if fits(o, work)), None)
        if more is not None:
            yield str(more)
            break
        devices *= 2


def _bits(dtype: str) -> int:
    return QUANTIZED.get(dtype, 8 * ITEM.get(dtype, 0))


def as_dict(
    spec: ArchSpec, head: HeadSpec | None, layout: DeviceLayout, work: Workload, device: Device
) -> dict[str, object]:
    """All of it as JSON values."""
    used, spent = memory(spec, head, layout, work), times(spec, head, layout, work, device)
    per_step = work.batch * (work.context if work.train or not spec.causal else 1)
    per_step *= work.accumulation if work.train else 1
    return {
        "layout": asdict(layout) | {"replicas": layout.replicas // layout.fsdp},
        "workload": asdict(work),
        "memory": {n: v for n, v in asdict(used).items() if n != "accumulates"} | {"peak": used.peak},
        "seconds": {
            "arithmetic": spent.arithmetic,
            "memory": spent.memory,
            "links": spent.links,
            "step": spent.step,
        },
        "bytes_sent": spent.communicated,
        "tokens_per_second": per_step / spent.step,
    }
