"""Writes the tables of docs/families.md from the specs of the default configs and the configs' tables of fields:
`python tools/make_family_table.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from monoblock import tree
from monoblock.checkpoint.keymap import Op, PerHead, Same, Split, Transposed
from monoblock.config_fields import COMMON, HARMLESS, REFUSED
from monoblock.families import FAMILIES, family
from monoblock.spec import Alibi, ArchSpec, Buckets, Learned, Norm, Position, Rotary

DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- made by tools/make_family_table.py -->\n", "<!-- end -->\n"
TITLES = {
    "mpt": "MPT",
    "mistral": "Mistral",
    "fuyu": "Fuyu",
    "openai-gpt": "GPT-1",
    "gpt_neo": "GPT Neo",
    "mpnet": "MPNet",
}
ACTIVATIONS = {
    "gelu": "exact gelu",
    "gelu_tanh": "tanh gelu",
    "relu2": "relu squared",
    "silu": "silu",
}
STORED: dict[type[Op], str] = {
    Same: "fused",
    Split: "separate",
    PerHead: "fused, per head",
    Transposed: "fused, transposed",
}


def _norm(norm: Norm) -> str:
    name = "RMS" if norm.kind == "rms" else "layer norm"
    return name if norm.bias or norm.kind == "rms" else f"{name} without bias"


def _outside(spec: ArchSpec) -> str:
    named = {"embedding": spec.embed_norm, "final": spec.final_norm}
    return ", ".join(where for where, norm in named.items() if norm) or "none"


def _position(position: Position, spec: ArchSpec) -> str:
    match position:
        case Learned(size=size, offset=offset):
            return f"table of {size}" + (f", first position {offset}" if offset else "")
        case Rotary(dim=dim, theta=theta):
            share = dim / spec.attention.head_dim
            return f"RoPE, theta {theta:g}" + ("" if share == 1 else f", on {share:g} of each head")
        case Alibi(bias_max=bias_max):
            return f"ALiBi, bias_max {bias_max:g}"
        case Buckets(count=count, max_distance=distance):
            return f"{count} relative buckets, max distance {distance}"


def _attention(spec: ArchSpec) -> str:
    direction = "causal" if spec.causal else "bidirectional"
    windows = set(spec.windows)
    if windows == {None}:
        return direction
    sizes = sorted(window for window in windows if window is not None)
    window = f"{direction}, window {sizes[0]}"
    return window if len(windows) == 1 else f"per layer: {direction}; {window}"


def _biases(spec: ArchSpec) -> str:
    named = {"q, k, v": spec.attention.qkv_bias, "output": spec.attention.out_bias, "MLP": spec.mlp.bias}
    if len(set(named.values())) == 1:
        return "all" if spec.mlp.bias else "none"
    return ", ".join(name for name, there in named.items() if there)


def _scale(spec: ArchSpec) -> str:
    return "1" if spec.attention.scale == 1 else "1 / sqrt(head width)"


def _mlp(spec: ArchSpec) -> str:
    kind = ACTIVATIONS[spec.mlp.act] + (", gated" if spec.mlp.gated else "")
    return f"{kind}, {spec.mlp.width / spec.width:g} x width"


def _kv(spec: ArchSpec) -> str:
    att = spec.attention
    return "as heads" if att.kv_heads == att.heads else f"{att.kv_heads} for {att.heads} heads"


def _qk(spec: ArchSpec) -> str:
    qk = spec.attention.qk_norm
    return "-" if qk is None else f"{_norm(qk.norm)} over each {'head' if qk.span == 'head' else 'row'}"


AXES: dict[str, Callable[[ArchSpec], str]] = {
    "norm": lambda spec: f"{_norm(spec.norm)}, {spec.placement}",
    "other norms": _outside,
    "positions": lambda spec: "; ".join(_position(p, spec) for p in spec.positions),
    "attention": _attention,
    "key/value heads": _kv,
    "q and k norm": _qk,
    "score scale": _scale,
    "MLP": _mlp,
    "biases": _biases,
    "images": lambda spec: f"patches of {spec.patches.size} values" if spec.patches else "-",
    "LM head": lambda spec: "tied" if spec.tie_head else "untied",
}


def _stored(model_type: str) -> str:
    """How files store q, k and v."""
    config = family(model_type).config()
    source = family(model_type).keymap(config, None).source("blocks.0.attn.qkv.weight")
    return STORED[type(source.op)]


def _size(model_type: str) -> str:
    total = 0
    for shape in tree.parameters(family(model_type).config().to_spec()).values():
        count = 1
        for side in shape:
            count *= side
        total += count
    return f"{total / 1e9:.1f} billion" if total >= 1e9 else f"{total / 1e6:.0f} million"


def table() -> str:
    """A row for each option of the architecture, a column for each family."""
    specs = {name: family(name).config().to_spec() for name in FAMILIES}
    rows = [["", *(TITLES[name] for name in specs)]]
    rows += [[axis, *(describe(spec) for spec in specs.values())] for axis, describe in AXES.items()]
    rows += [
        ["q, k, v in files", *map(_stored, specs)],
        ["parameters of the default config, without head", *map(_size, specs)],
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" * (1 + len(specs)) + "|")
    return "\n".join(lines) + "\n"


# Declared for transformers' signature or upstream's files; results do not depend on them.
INERT = frozenset({"init_config", "init_device", "verbose", "use_pad_tok_in_ffn", "fuse_norm_attn_norm"})


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _values(allowed: Iterable[Any]) -> str:
    return " or ".join(f"`{json.dumps(value)}`" for value in (*allowed, None))


def fields_honoured() -> str:
    """A row for each family: the fields of its config.json that affect the results."""
    lines = ["| family | fields |", "|---|---|"]
    for name in FAMILIES:
        config = family(name).config
        names = [field for field in config.fields if field not in INERT]
        for inner, kind in config.sub_configs.items():
            at = names.index(inner)
            names[at : at + 1] = [f"{inner}.{field}" for field in kind.fields]
        aliases = [f"{alias} ({field})" for alias, field in config.attribute_map.items()]
        others = f"; aliases: {_code(aliases)}" if aliases else ""
        types = f" (also `{'`, `'.join(config.other_types)}`)" if config.other_types else ""
        lines.append(f"| {TITLES[name]}{types} | {_code(names)}{others} |")
    common = [name for name in COMMON if name not in REFUSED]
    lines.append(f"| all | {_code([*common, 'id2label', 'label2id', 'num_labels', 'attn_implementation'])} |")
    return "\n".join(lines) + "\n"


def fields_refused() -> str:
    """A row for each field of which only the listed values are supported."""
    kinds = {TITLES[name]: family(name).config.refused() for name in FAMILIES}
    lines = ["| field | accepted values | refused by | reason |", "|---|---|---|---|"]
    rows: dict[tuple[str, str, str], list[str]] = {}
    for title, rules in kinds.items():
        for field, (allowed, hint) in rules.items():
            rows.setdefault((field, _values(allowed), hint), []).append(title)
    for (field, allowed, hint), titles in sorted(rows.items()):
        refusing = "all" if len(titles) == len(kinds) else ", ".join(titles)
        lines.append(f"| `{field}` | {allowed} | {refusing} | {hint} |")
    return "\n".join(lines) + "\n"


def fields_harmless() -> str:
    """A row for each group of fields that are kept without a warning."""
    lines = ["| group | fields |", "|---|---|"]
    lines += [f"| {group} | {_code(names.split())} |" for group, names in HARMLESS.items()]
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    BEGIN: table,
    "<!-- fields honoured, made by tools/make_family_table.py -->\n": fields_honoured,
    "<!-- fields refused, made by tools/make_family_table.py -->\n": fields_refused,
    "<!-- fields kept, made by tools/make_family_table.py -->\n": fields_harmless,
}


def updated(text: str) -> str:
    """The text of the document with current tables."""
    for begin, made in TABLES.items():
        before, found, rest = text.partition(begin)
        _, end, after = rest.partition(END)
        assert found and end, f"the document lacks {begin.strip()}"
        text = f"{before}{begin}\n{made()}\n{END}{after}"
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(updated(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
