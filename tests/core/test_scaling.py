"""`monoblock plan`: shards, choice of a layout, refusals, times and the command."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import typer.testing

import monoblock
from monoblock import scaling
from monoblock.cli import plan
from monoblock.scaling import DEVICES, DeviceLayout, Workload
from monoblock.tree import parameters

CONFIG = monoblock.MistralConfig()  # 7B
SPEC, HEAD = CONFIG.to_spec(), CONFIG.to_head("causal")
COUNT = 7_241_732_096


def planned(layout: DeviceLayout, **work: Any) -> scaling.DeviceMemory:
    return scaling.memory(SPEC, HEAD, layout, Workload(**work))


def test_the_7b_model_has_its_published_number_of_parameters() -> None:
    found = planned(DeviceLayout(), context=1024)
    assert found.weights == 2 * COUNT
    # Keys and values of 8 heads of 128 channels in 32 layers, bfloat16: 128 KiB a token; 64 spare slots.
    assert found.cache == (1024 + 64) * 131072


def test_shards_of_weights_cache_and_states() -> None:
    whole, half = planned(DeviceLayout()), planned(DeviceLayout(devices=2, tensor=2))
    assert half.cache * 2 == whole.cache
    replicated = 65 * 4096 * 2  # norms
    assert half.weights * 2 == whole.weights + replicated
    training = planned(DeviceLayout(devices=4, tensor=2, fsdp=2), train=True)
    # Each of 2 x 2 holds a quarter of the matrices, and half of the norms, in rows.
    assert training.weights == half.weights // 2 == training.gradients
    assert training.optimizer == 6 * training.weights  # two moments and a copy in float32 for a bfloat16
    assert training.gathered > 0 == planned(DeviceLayout(devices=2, tensor=2), train=True).gathered


@pytest.mark.parametrize("fsdp", [3, 5])
def test_rows_that_fsdp_does_not_divide(fsdp: int) -> None:
    """FSDP2 shards rows as torch.chunk does: the first process has the most."""
    shapes = parameters(SPEC, HEAD).values()
    expected = sum(-(-rows // fsdp) * (more[0] if more else 1) for rows, *more in shapes)
    assert scaling.trained(SPEC, HEAD, DeviceLayout(devices=fsdp, fsdp=fsdp)) == expected


def test_the_layout_with_the_least_communication_that_fits_is_chosen() -> None:
    def chosen(limit: float, devices: int = 8, **work: Any) -> DeviceLayout:
        return scaling.chosen(SPEC, HEAD, devices, Workload(**work), limit)

    assert chosen(80e9).tensor == 1
    assert chosen(10e9).tensor == 2
    assert chosen(5e9).tensor == 4
    assert chosen(80e9, train=True, batch=8, context=512) == DeviceLayout(devices=8, tensor=1, fsdp=8)
    assert chosen(180e9, train=True, batch=8, context=512) == DeviceLayout(devices=8, tensor=1)


def test_what_does_not_fit_names_what_would() -> None:
    with pytest.raises(ValueError) as caught:
        scaling.chosen(SPEC, HEAD, 1, Workload(batch=8, context=4096), 16e9)
    text = str(caught.value)
    assert "needs 19.7 GB on each device, which has 16.0" in text
    assert "--dtype int8 --devices 1" in text and "--batch 2 --devices 1" in text
    assert "--devices 2 --tensor-parallel" in text and text.endswith("would fit")
    with pytest.raises(ValueError, match="--checkpointing --devices 8"):
        scaling.chosen(SPEC, HEAD, 8, Workload(batch=64, context=4096, train=True), 80e9)


@pytest.mark.parametrize(
    ("layout", "work", "message"),
    [
        (DeviceLayout(devices=16, tensor=16), {}, "the 8 key and value heads do not divide into 16 shards"),
        (
            DeviceLayout(devices=6, tensor=4),
            {},
            "--devices 6 is no multiple of --tensor-parallel 4 x --fsdp 1",
        ),
        (DeviceLayout(devices=2, fsdp=2), {}, "--fsdp shards what is trained"),
        (DeviceLayout(), {"train": True, "dtype": "int8"}, "quantised weights are not trained"),
        (DeviceLayout(), {"dtype": "int2"}, "--dtype int2: give one of float32"),
    ],
)
def test_impossible_plans_are_refused(layout: DeviceLayout, work: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(layout, **work)


def test_learned_positions_limit_the_context() -> None:
    neo = monoblock.GPTNeoConfig()
    with pytest.raises(ValueError, match="--context 4096: the model has 2048 learned positions"):
        scaling.memory(neo.to_spec(), neo.to_head("causal"), DeviceLayout(), Workload(context=4096))


def test_decoding_is_bound_by_reading_the_weights() -> None:
    device = DEVICES["h100"]
    found = scaling.times(SPEC, HEAD, DeviceLayout(), Workload(context=1), device)
    matrices = 2 * (COUNT - 32000 * 4096)  # rows of the table are looked up
    assert found.step == found.memory == pytest.approx(matrices / device.bandwidth, rel=1e-3)
    assert found.links == found.communicated == 0
    many = scaling.times(SPEC, HEAD, DeviceLayout(), Workload(batch=1024, context=1), device)
    assert many.step == many.arithmetic == pytest.approx(1024 * matrices / 989e12, rel=1e-3)
    two = scaling.times(SPEC, HEAD, DeviceLayout(devices=2, tensor=2), Workload(context=1), device)
    # Two sums a layer and one of the embedding, of 4096 values; logits, half of which are sent.
    assert two.communicated == 2 * (4096 * 65 + 32000 // 2)


def test_training_takes_six_operations_per_parameter_and_token() -> None:
    work = Workload(batch=1, context=2, train=True)
    found = scaling.times(SPEC, HEAD, DeviceLayout(), work, DEVICES["h100"])
    attention = 12 * 2 * 32 * 4096  # scores and sums of one key on average
    assert found.arithmetic == pytest.approx((6 * 2 * (COUNT - 32000 * 4096) + attention) / 989e12, rel=1e-3)


def test_the_tables_of_the_docs_are_current() -> None:
    file = Path(__file__).parents[2] / "tools" / "make_scaling_tables.py"
    found = importlib.util.spec_from_file_location("make_scaling_tables", file)
    assert found and found.loader
    tool = importlib.util.module_from_spec(found)
    found.loader.exec_module(tool)
    text = tool.PAGE.read_text(encoding="utf-8")
    assert tool.updated(text) == text, "run: python tools/make_scaling_tables.py"


def run(tmp_path: Path, *arguments: str) -> Any:
    CONFIG.save_pretrained(tmp_path)
    return typer.testing.CliRunner().invoke(plan.app, [str(tmp_path), *arguments])


def test_command(tmp_path: Path) -> None:
    found = run(
        tmp_path, "--devices", "8", "--memory", "16GiB", "--batch", "8", "--context", "4096", "--json"
    )
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["layout"]["tensor"] == 1 and result["layout"]["replicas"] == 8
    assert result["memory"]["weights"] == 2 * COUNT
    assert result["tokens_per_second"] == pytest.approx(8 / result["seconds"]["step"])
    text = run(tmp_path, "--train", "--devices", "8", "--batch", "8", "--context", "512").output
    assert "--tensor-parallel 1 --fsdp 8" in text and "least time of an optimizer step: " in text
    assert run(tmp_path, "--memory", "lots").exit_code == 2
    assert run(tmp_path, "--checkpointing").exit_code == 2
    assert run(tmp_path, "--memory", "1GB").exit_code == 1
