"""Statistics, tables and pictures of the benchmark, from given results; nothing is timed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from documents import DOCS, ROOT

sys.path.insert(0, str(ROOT / "bench"))

import plan
import plot
import report
import runners
import shapes
import targets
import worker
from figures import Results, Spread, number


def figure(measure: str, unit: str, **values: list[float]) -> dict[str, Any]:
    return {"model": "mistral-1b", "form": "bfloat16", "measure": measure, "unit": unit, "values": values}


@pytest.fixture
def results() -> Results:
    # Two rounds; all backends are about half as fast in the second.
    speeds = {"monoblock": [30.0, 15.0], "transformers": [15.0, 6.0], "OpenVINO": [20.0, 10.0]}
    loads = {"monoblock": [0.05], "transformers": [0.5]}
    reads = {"read GB/s": {who: [40.0, 20.0] for who in speeds}}
    figures = [figure("decode 1", "tok/s", **speeds) | reads, figure("prefill 512", "tok/s", **speeds)]
    figures += [
        figure(name, unit, **loads)
        for name, unit in (("import", "s"), ("load", "s"), ("first token", "s"), ("load peak", "MB"))
    ]
    figures.append(figure("prefill 512 memory", "MB", monoblock=[10.0], transformers=[120.0]))
    figures += [
        {
            "model": name,
            "form": "float32",
            "measure": "decode 1",
            "unit": "tok/s",
            "values": {"monoblock": [speed]},
            "read GB/s": {"monoblock": [40.0]},
        }
        for name, speed in (("thin-4", 1e3 / 0.35), ("thin-28", 1e3 / 1.55))
    ]
    return Results(
        {
            "plan": "essential",
            "date": "2026-01-02",
            "machine": {
                "cpu": "a CPU",
                "units": ["avx2"],
                "cores": 2,
                "memory GiB": 8,
                "python": "3.11",
                "torch": "2.13",
                "system": "Linux",
            },
            "limits": [
                {"read GB/s": read, "bfloat16 TFLOP/s": 1.0, "float32 TFLOP/s": 0.5, "int8 TOP/s": 2.0}
                for read in (50.0, 30.0)
            ],
            "figures": figures,
            "weights": {"mistral-1b bfloat16": {"monoblock": 1e9, "transformers": 1e9, "OpenVINO": 1.1e9}},
            "blocks": {"mistral-1b": {"blocks": 450_000_000, "table": 50_000_000, "head": 50_000_000}},
            "versions": {"torch": "2.13"},
            "skipped": ["llama.cpp: no --llama-bench PATH"],
            "accuracy": [],
            "processes": {"monoblock --help": [0.1, 0.2, 0.3]},
        }
    )


def test_ratios_are_of_adjacent_measurements(results: Results) -> None:
    decode = results.named("decode 1")[0]
    ratio = results.ratio(decode, "transformers")
    assert ratio is not None
    # Not 22.5 / 10.5, the ratio of the medians.
    assert (ratio.median, ratio.least, ratio.most) == (2.25, 2.0, 2.5)
    assert results.ratio(decode, "monoblock") is None
    assert results.ratio(decode, "llama.cpp") is None


def test_ratios_of_memory_are_inverted(results: Results) -> None:
    ratio = results.ratio(results.named("prefill 512 memory")[0], "transformers")
    assert ratio is not None and ratio.median == 12


def test_fractions_of_the_limits(results: Results) -> None:
    decode, prefill = results.named("decode 1")[0], results.named("prefill 512")[0]
    # Each round relative to the bandwidth of that round.
    assert results.bandwidth_share(decode, "monoblock") == Spread(0.75, 0.75, 0.75)
    # Of a peer only the size of all weights is known; its input embedding, a tenth of 1.1 GB, is not read.
    assert results.bandwidth_share(decode, "OpenVINO") == Spread(*[pytest.approx(0.5)] * 3)
    speeds = [2 * 450e6 * speed / 1e12 for speed in (22.5, 15.0, 30.0)]
    assert results.matrix_share(prefill, "monoblock") == Spread(*map(pytest.approx, speeds))
    assert results.bandwidth_share(prefill, "monoblock") is None


def test_percentages_have_a_range() -> None:
    assert [Spread(*values).percent for values in ((0.5, 0.5, 0.5), (0.913, 0.88, 1.02))] == [
        "50%",
        "91% (88-102)",
    ]


def test_overhead_per_layer_is_the_slope_of_two_depths(results: Results) -> None:
    found = targets.overhead(results, "monoblock")
    assert found is not None
    assert [1e3 * seconds for seconds in found] == pytest.approx([0.05, 0.15])
    assert targets.overhead(results, "transformers") is None


def test_targets(results: Results) -> None:
    rows = [line.split(" | ") for line in targets.table_of(results, report.table).splitlines()[2:]]
    reached = {row[0].removeprefix("| "): row[2].removesuffix(" |") for row in rows}
    assert reached["mistral-1b, bfloat16, decoding: 1.5 x transformers"] == "yes"
    assert reached["... and 80% of the bandwidth"].startswith("no: ")
    assert reached["loading 1.1B in bfloat16: under 0.1 s"] == "yes"
    assert reached["int8, decoding: ahead of OpenVINO"] == ""
    assert reached["overhead of 22 layers: 0.06 ms per layer + 0.15 ms"] == "yes"


def test_allocation_time_is_next_to_the_loading_time(results: Results) -> None:
    alone = {"monoblock": [2.0, 3.0], "the memory alone": [1.5, 2.5]}
    results.data["figures"].append(figure("load", "s", **alone) | {"form": "float32"})
    row = next(line for line in report.loading(results).splitlines() if "alone" in line)
    assert row == "| mistral-1b | float32 | the memory alone |  | 2.00 (1.50-2.50) |  |  |  |"
    target = next(
        line for line in targets.table_of(results, report.table).splitlines() if "loading float32" in line
    )
    assert target.endswith("| 2.50 (2.00-3.00) s; the memory alone: 2.00 (1.50-2.50) | yes |")


def test_the_page_has_marks_for_every_section(results: Results) -> None:
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    for name, text in (report.sections(results) | {"train": ""}).items():
        assert f"<!-- {name} -->" in page and f"<!-- end of {name} -->" in page
        assert name in ("machine", "skipped", "train") or text.startswith("| ")


def test_fill_replaces_text_between_marks() -> None:
    page = "a\n<!-- x -->\nold\n<!-- end of x -->\nb\n<!-- y -->\nkept\n<!-- end of y -->\n"
    once = report.fill(page, {"x": "new \\1"})
    assert once == "a\n<!-- x -->\n\nnew \\1\n<!-- end of x -->\nb\n<!-- y -->\nkept\n<!-- end of y -->\n"
    assert report.fill(once, {"x": "new \\1"}) == once


def test_bars_are_within_the_picture_and_to_scale(results: Results) -> None:
    found = plot.pictures(results)
    assert set(found) == {"decode", "prefill", "memory"}
    for text in found.values():
        picture = ElementTree.fromstring(text)
        width = float(picture.attrib["width"])
        for bar in picture.iter("{http://www.w3.org/2000/svg}rect"):
            assert 0 <= float(bar.attrib["x"]) + float(bar.attrib["width"]) <= width
    # Models with one backend are not drawn.
    assert "thin-" not in found["decode"]
    assert "limit 30.0" in found["decode"]
    bars = [float(w) for w in re.findall(r"<rect[^>]* width='([\d.]+)'", found["decode"])]
    assert [round(bar / bars[0], 2) for bar in bars] == [1, round(10.5 / 22.5, 2), round(15 / 22.5, 2)]


def test_the_page_links_its_pictures(results: Results) -> None:
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    for picture in (DOCS / "performance").glob("*.svg"):
        ElementTree.fromstring(picture.read_text(encoding="utf-8"))
        assert f"(performance/{picture.name})" in page
    parts = report.illustrated(report.sections(results), plot.pictures(results))
    assert parts["decode"].startswith(
        "![Decoding, batch size 1](performance/decode.svg)\n\n| "
    )  # batch size 8 was not measured
    assert parts["loading"].startswith("![Memory while loading](performance/memory.svg)\n\n| ")


def test_numbers_have_three_digits() -> None:
    assert [number(v) for v in (1234.5, 56.78, 1.2345, 0.0456, 0.00012)] == [
        "1,234",
        "56.8",
        "1.23",
        "0.046",
        "0.0001",
    ]


def test_plans_refer_to_existing_models_and_backends() -> None:
    for groups in plan.PLANS.values():
        for group in groups:
            assert group.model in shapes.SHAPES
            assert set(group.who) <= set(runners.BACKENDS)
            assert group.form in runners.FORMS["monoblock"]
            assert all(measure.kind in ("decode", "prefill", "train") for measure in group.measures)
    # The essential plan takes about 15 minutes.
    assert sum(group.seconds for group in plan.ESSENTIAL) <= 16 * 60


def test_prompts_depend_on_the_seed_only() -> None:
    one, again = (worker.prompts_of(2, 5, 100, seed=3) for _ in range(2))
    assert one == again != worker.prompts_of(2, 5, 100, seed=4)
    assert all(3 <= token < 100 for prompt in one for token in prompt)


def test_missing_peers_are_named(tmp_path: Path) -> None:
    tools = runners.Tools(tmp_path, 1)
    assert tools.missing("llama.cpp") == "no --llama-bench PATH"
    assert tools.missing("OpenVINO") == "no --peer-python OpenVINO=PATH"
    assert not tools.missing("monoblock")


def test_the_copy_with_the_upstream_class_links_the_weights(tmp_path: Path) -> None:
    source = tmp_path / "m"
    source.mkdir()
    (source / "config.json").write_text(
        '{"model_type": "mpt", "architectures": ["MptForCausalLM"], "d_model": 8}'
    )
    (source / "model.safetensors").write_bytes(b"weights")
    copy = runners._with_upstream_class(source)
    assert json.loads((copy / "config.json").read_text())["architectures"] == ["MPTForCausalLM"]
    assert (copy / "model.safetensors").is_symlink()
    assert json.loads((source / "config.json").read_text())["architectures"] == ["MptForCausalLM"]


def test_the_synthetic_vocabulary_is_readable_in_both_formats(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from monoblock.tokenization.protobuf import read_model

    shapes._save_vocabulary(tmp_path, 400)
    model = read_model(tmp_path / "tokenizer.model")
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == 400
    assert len(model.pieces) == 400 and model.pieces[:3] == ["<unk>", "<s>", "</s>"]
