"""`monoblock export`: the written files in onnxruntime and OpenVINO, for all classes, at other sizes than the traced
ones."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import embedding_models as cases
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_families import KIND, MODEL_TYPES, PADS, PATCH, VOCAB, fields, monoblock_model

import monoblock
from monoblock.conversion import onnx as conversion
from monoblock.conversion.onnx import TASKS, Exported, ExportOptions, export_onnx
from monoblock.errors import CheckpointError

# Rows, cached tokens, new tokens; more than twice the windows of 7 and 9, and up to the 64 positions.
SHAPES = [
    (1, 0, 1),
    (1, 0, 2),
    (3, 0, 24),
    (1, 1, 1),
    (2, 11, 1),
    (4, 6, 3),
    (2, 31, 1),
    (1, 40, 9),
    (5, 2, 25),
    (2, 62, 2),
]
ATOL = 5e-5  # float32, logits of up to 8, three layers; measured 1.2e-5
Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def options(name: str) -> dict[str, Any]:
    """The fields of a tiny config with learned positions for up to 64 tokens."""
    return fields(MODEL_TYPES[name])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path, Exported]]:
    """(class, options) -> model, folder and result of its export; each is made once."""
    root, made = tmp_path_factory.mktemp("exported"), {}

    def write(name: str, **given: Any) -> tuple[Any, Path, Exported]:
        key = (name, *given.items())
        if key not in made:
            source, target = root / f"{len(made)}-source", root / f"{len(made)}-target"
            model = monoblock_model(name, **options(name)).eval()
            model.save_pretrained(source)
            made[key] = (model, target, export_onnx(source, target, ExportOptions(**given)))
        return made[key]

    return write


def session(folder: Path) -> Run:
    opened = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in opened.get_outputs()]
    return lambda given: dict(zip(names, opened.run(names, given), strict=True))


def openvino_session(folder: Path) -> Run:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    model = core.compile_model(folder / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda given: {out.get_any_name(): np.array(x) for out, x in model(given).items()}


def inputs(name: str, rows: int, tokens: int, padding: str) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(rows * 100 + tokens)
    ids = torch.randint(10, VOCAB, (rows, tokens), generator=random)
    mask = torch.ones_like(ids)
    if rows > 1 and tokens > 2:
        cut = max(1, tokens // 3)
        mask[1, slice(None, cut) if padding == "left" else slice(-cut, None)] = 0
    return ids.masked_fill(mask == 0, PADS[MODEL_TYPES[name]]), mask


def compare(name: str, model: Any, result: Exported, run: Run) -> None:
    """Against the model, for all shapes, with left and right padding; the second call continues the first one."""
    kind, spec = KIND[name], model.spec
    past = [x for x in result.inputs if x.startswith("past_key_values.")]
    for rows, cached, new in SHAPES:
        for padding in ("left", "right"):
            if padding == "right" and past and rows > 1:
                continue  # the next token of a row would follow its padding
            ids, mask = inputs(name, rows, cached + new, padding)
            if kind in ("choice", "double"):  # rows are choices
                ids, mask = (torch.stack((x, x.roll(1, 0)), dim=1) for x in (ids, mask))
            given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
            if kind == "double":
                given["mc_token_ids"] = torch.full(ids.shape[:2], ids.shape[-1] - 1)
            with torch.no_grad():
                expected = model(**given, return_dict=True)
            states = np.zeros((rows, spec.attention.kv_heads, 0, spec.attention.head_dim), np.float32)
            state = dict.fromkeys(past, states)
            found: dict[str, list[np.ndarray]] = {}
            parts = ((0, cached), (cached, cached + new)) if past and cached else ((0, cached + new),)
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
            for start, stop in parts:
                call = {
                    **given,
                    "input_ids": ids[..., start:stop],
                    "attention_mask": mask[..., :stop],
                    "position_ids": positions[..., start:stop],
                    "image_patches": torch.zeros(0, spec.patches.size if spec.patches else 1),
                }
                out = run({k: x.numpy() for k, x in call.items() if k in result.inputs} | state)
                state = {x: out[x.replace("past_key_values", "present")] for x in past}
                for output in result.outputs[: len(result.outputs) - len(past)]:
                    found.setdefault(output, []).append(out[output])
            assert all(x.shape[2] == cached + new for x in state.values())
            for output, arrays in found.items():
                values, wanted = np.concatenate(arrays, axis=1), expected[output].numpy()
                if wanted.shape[: ids.dim()] == tuple(ids.shape):
                    values, wanted = values[mask.numpy() != 0], wanted[mask.numpy() != 0]
                np.testing.assert_allclose(
                    values, wanted, rtol=1e-5, atol=ATOL, err_msg=f"{output}, {(rows, cached, new, padding)}"
                )


@pytest.mark.parametrize("name", list(MODEL_TYPES))
def test_onnxruntime(written: Any, name: str) -> None:
    """Every class, by default with the cache where it generates."""
    model, folder, result = written(name)
    compare(name, model, result, session(folder))
    assert result.comparison.difference < ATOL and len(result.comparison.shapes) >= 6
    generates = KIND[name] == "causal"
    assert result.task.endswith("-with-past") == generates
    assert ("past_key_values.2.value" in result.inputs) == generates
    assert (folder / "generation_config.json").exists() or not generates
    assert monoblock.AutoConfig.from_pretrained(folder).architectures == [name]
    text = (folder / "model.onnx").read_bytes()
    assert str(Path(monoblock.__file__).parent).encode() not in text  # no paths of source files
    onnx.checker.check_model(folder / "model.onnx", full_check=True)


@pytest.mark.parametrize("name", ["GPTNeoForCausalLM", "MistralForCausalLM"])
def test_without_a_cache(written: Any, name: str) -> None:
    model, folder, result = written(name, task="text-generation")
    assert result.inputs == ("input_ids", "attention_mask", "position_ids")
    assert result.outputs == ("logits",)
    compare(name, model, result, session(folder))


@pytest.mark.parametrize(
    "name", ["MPNetModel", "MistralForCausalLM", "MptForCausalLM", "GPTNeoForSequenceClassification"]
)
def test_openvino(written: Any, name: str) -> None:
    run = pytest.importorskip("openvino") and openvino_session
    model, folder, result = written(name, format="openvino")
    assert {"openvino_model.xml", "openvino_model.bin", "config.json"} <= set(result.files)
    compare(name, model, result, run(folder))


@pytest.mark.parametrize(
    "attn",
    [
        {"kv_n_heads": 2, "attn_type": "grouped_query_attention", "alibi": True, "qk_ln": True},
        {"alibi": True, "alibi_bias_max": 4, "sliding_window_size": 9},
        {"rope": True, "alibi": False, "rope_theta": 500},
    ],
    ids=["grouped", "window", "rope"],
)
def test_options_of_mpt(attn: dict[str, Any], tmp_path: Path) -> None:
    """Grouped heads with ALiBi (of which 6 is no power of two), windows, RoPE."""
    config = monoblock.MptConfig(**{**options("MptForCausalLM"), "attn_config": attn})
    from helpers import randomised

    model = randomised(monoblock.MptForCausalLM(config)).eval()
    model.save_pretrained(tmp_path / "source")
    result = export_onnx(tmp_path / "source", tmp_path / "out")
    compare("MptForCausalLM", model, result, session(tmp_path / "out"))


def test_layers_with_and_without_a_window_and_dynamic_rope(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}
    given = {**options("MistralForCausalLM"), "layer_types": kinds, "max_position_embeddings": 16}
    model = monoblock_model("MistralForCausalLM", **{**given, "rope_parameters": rope}).eval()
    model.save_pretrained(tmp_path / "source")
    result = export_onnx(tmp_path / "source", tmp_path / "out", ExportOptions(task="text-generation"))
    compare("MistralForCausalLM", model, result, session(tmp_path / "out"))


def test_images(written: Any) -> None:
    """Patches in the prompt, of rows with different numbers of them; none in later calls."""
    model, folder, result = written("FuyuForCausalLM")
    run, spec = session(folder), model.spec
    ids, mask = inputs("FuyuForCausalLM", 3, 20, "left")
    ids[0, 2:7], ids[2, 0:3] = PATCH, PATCH
    patches = torch.randn(8, spec.patches.size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, image_patches=patches).logits
    states = np.zeros((3, spec.attention.kv_heads, 0, spec.attention.head_dim), np.float32)
    state = {name: states for name in result.inputs if name.startswith("past")}
    positions, found = (mask.cumsum(-1) - 1).clamp(min=0), []
    for start, stop, own in ((0, 12, patches), (12, 20, patches[:0])):
        out = run(
            {
                "input_ids": ids[:, start:stop].numpy(),
                "attention_mask": mask[:, :stop].numpy(),
                "position_ids": positions[:, start:stop].numpy(),
                "image_patches": own.numpy(),
            }
            | state
        )
        state = {name: out[name.replace("past_key_values", "present")] for name in state}
        found.append(out["logits"])
    kept = mask.numpy() != 0
    np.testing.assert_allclose(np.concatenate(found, 1)[kept], expected.numpy()[kept], rtol=1e-5, atol=ATOL)


@pytest.mark.parametrize("name", ["MistralForCausalLM", "MPNetModel"])
def test_int8(name: str, tmp_path: Path) -> None:
    """All matrices are 8-bit integers, also those above the size up to which PyTorch's exporter transposes them."""
    sizes = {"hidden_size": 1056, "intermediate_size": 64, "num_attention_heads": 12}
    more = {"head_dim": 88, "num_key_value_heads": 4} if name == "MistralForCausalLM" else {}
    layers = {"num_hidden_layers": 1}
    model = getattr(monoblock, name)(
        type(monoblock_model(name, **options(name)).config)(**{**options(name), **sizes, **more, **layers})
    )
    model.save_pretrained(tmp_path / "source")
    result = export_onnx(tmp_path / "source", tmp_path / "out", ExportOptions(quantize="int8"))
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    large = [x for x in graph.initializer if np.prod(x.dims) > 2000]
    assert large and {x.data_type for x in large} <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    # 8 bits of activations and weights with an initialisation of 0.02: a percent or two.
    assert 0 < result.comparison.difference < 0.05 * result.comparison.magnitude


def test_weights_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for models of more than 2 GB, under the name by which optimum finds it."""
    monkeypatch.setattr(conversion, "EMBEDDED", 1000)
    model = monoblock_model("MPNetForMaskedLM", **options("MPNetForMaskedLM")).eval()
    model.save_pretrained(tmp_path / "source")
    result = export_onnx(tmp_path / "source", tmp_path / "out")
    assert {"model.onnx", "model.onnx_data"} <= set(result.files)
    assert (tmp_path / "out" / "model.onnx").stat().st_size < (
        tmp_path / "out" / "model.onnx_data"
    ).stat().st_size
    compare("MPNetForMaskedLM", model, result, session(tmp_path / "out"))
    quantized = export_onnx(tmp_path / "source", tmp_path / "int8", ExportOptions(quantize="int8"))
    assert "model.onnx_data" in quantized.files


def test_quantised_weights_are_dequantised(tmp_path: Path) -> None:
    source = monoblock_model("MistralForCausalLM", **options("MistralForCausalLM"))
    source.save_pretrained(tmp_path / "source")
    packed = monoblock.MistralForCausalLM.from_pretrained(tmp_path / "source", quantization_config="int8")
    packed.save_pretrained(tmp_path / "packed")
    result = export_onnx(tmp_path / "packed", tmp_path / "out")
    model = packed.dequantize().float()
    compare("MistralForCausalLM", model, result, session(tmp_path / "out"))
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()


def test_a_failed_check_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "ALLOWED", 1e-12)
    monoblock_model("MPNetModel", **options("MPNetModel")).save_pretrained(tmp_path / "source")
    with pytest.raises(CheckpointError, match="the check failed"):
        export_onnx(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_head_that_the_files_lack(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monoblock_model("MistralForCausalLM", **options("MistralForCausalLM")).save_pretrained(
        tmp_path / "source"
    )
    with caplog.at_level(logging.ERROR), pytest.raises(CheckpointError, match=r"score\.weight"):
        export_onnx(tmp_path / "source", tmp_path / "out", ExportOptions(task="text-classification"))
    with pytest.raises(ValueError, match="AutoModelForMaskedLM has no class for 'mistral'"):
        export_onnx(tmp_path / "source", tmp_path / "out", ExportOptions(task="fill-mask"))
    bare = export_onnx(tmp_path / "source", tmp_path / "out", ExportOptions(task="feature-extraction"))
    assert (bare.architecture, bare.outputs) == ("MistralModel", ("last_hidden_state",))
    assert set(TASKS) >= {bare.task}


def test_the_command(tmp_path: Path) -> None:
    monoblock_model("MPNetModel", **options("MPNetModel")).save_pretrained(tmp_path / "source")
    command = [
        sys.executable,
        "-m",
        "monoblock.cli",
        "export",
        str(tmp_path / "source"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(": ", 1) for line in done.stdout.splitlines()[1:])
    assert (rows["task"], rows["class"]) == ("feature-extraction", "MPNetModel")
    assert rows["inputs"] == "input_ids, attention_mask" and "model.onnx" in rows["files"]
    assert rows["outputs compared"].startswith("differ by at most")
    # Progress alone: none of the exporter's own output.
    phases = [f"{phase}{end}" for phase in ("loading", "exporting", "checking") for end in (" ...", ": done")]
    assert done.stderr.splitlines() == phases
    again = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert again.returncode == 1 and "--force" in again.stderr


def sentence_model(folder: Path, family: str) -> Any:
    """A model of sentence embeddings with Dense and Normalize, saved."""
    from monoblock import embeddings

    weight, bias = cases.dense_weights()
    model = monoblock.SentenceTransformer(
        modules=[
            embeddings.Transformer(cases.write(folder / "transformer", family)),
            embeddings.Pooling(cases.WIDTH, "mean"),
            embeddings.Dense(cases.WIDTH, cases.OUT, True, "Tanh", weight, bias),
            embeddings.Normalize(),
        ],
        prompts=cases.PROMPTS,
        device="cpu",
    )
    model.save(str(folder / "source"))
    return model


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_sentence_transformers_folders(family: str, backend: str, tmp_path: Path) -> None:
    """All files of the package are there, and the package's own backend gives the same vectors where optimum is
    installed (`make test-optimum`)."""
    if backend == "openvino":
        pytest.importorskip("openvino")
    model = sentence_model(tmp_path, family)
    result = export_onnx(tmp_path / "source", tmp_path / "out", ExportOptions(format=backend))
    graph = {"onnx": "onnx/model.onnx", "openvino": "openvino/openvino_model.xml"}[backend]
    wanted = {graph, "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "tokenizer.json"}
    assert wanted <= set(result.files)
    assert not any(name in result.files for name in ("model.safetensors", "onnx/config.json"))
    # A second export replaces the folder.
    export_onnx(tmp_path / "source", tmp_path / "out", ExportOptions(format=backend, force=True))
    pytest.importorskip({"onnx": "optimum.onnxruntime", "openvino": "optimum.intel"}[backend])
    import sentence_transformers

    # Without it, OpenVINO rounds to bfloat16 on some CPUs.
    exact = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}} if backend == "openvino" else {}
    opened = sentence_transformers.SentenceTransformer(
        str(tmp_path / "out"), backend=backend, device="cpu", model_kwargs={"export": False, **exact}
    )
    stripped = [text.strip() for text in cases.TEXTS]  # as older versions of the package do
    for texts in (stripped, stripped[:1]):
        found = opened.encode(texts, prompt_name="query")
        expected = model.encode(texts, prompt_name="query")
        np.testing.assert_allclose(found, expected, atol=1e-5)


# ---------------------------------------------------------------------- optimum's classes

ORT = {
    "MistralForCausalLM": "ORTModelForCausalLM",
    "MptForCausalLM": "ORTModelForCausalLM",
    "GPTNeoForCausalLM": "ORTModelForCausalLM",
    "OpenAIGPTLMHeadModel": "ORTModelForCausalLM",
    "MPNetModel": "ORTModelForFeatureExtraction",
    "MPNetForMaskedLM": "ORTModelForMaskedLM",
    "MPNetForSequenceClassification": "ORTModelForSequenceClassification",
    "MPNetForTokenClassification": "ORTModelForTokenClassification",
    "MPNetForQuestionAnswering": "ORTModelForQuestionAnswering",
    "MPNetForMultipleChoice": "ORTModelForMultipleChoice",
    "MptForTokenClassification": "ORTModelForTokenClassification",
    "MistralForSequenceClassification": "ORTModelForSequenceClassification",
    "GPTNeoForQuestionAnswering": "ORTModelForQuestionAnswering",
}


@pytest.mark.parametrize("name", list(ORT))
def test_optimum_with_onnxruntime(name: str, tmp_path: Path) -> None:
    """The folder opens without further arguments; outputs, and greedy tokens of a padded batch, are the same."""
    package = pytest.importorskip("optimum.onnxruntime")
    given = options(name)
    if name == "MistralForCausalLM":
        given |= {"head_dim": 6}  # optimum takes it for hidden_size / num_attention_heads
    model = monoblock_model(name, **given).eval()
    model.save_pretrained(tmp_path / "source")
    export_onnx(tmp_path / "source", tmp_path / "out")
    opened = getattr(package, ORT[name]).from_pretrained(tmp_path / "out")
    check_opened(name, model, opened)


@pytest.mark.parametrize("name", ["MistralForCausalLM", "MptForCausalLM", "MPNetModel", "MPNetForMaskedLM"])
def test_optimum_with_openvino(name: str, tmp_path: Path) -> None:
    package = pytest.importorskip("optimum.intel")
    model = monoblock_model(name, **options(name)).eval()
    model.save_pretrained(tmp_path / "source")
    export_onnx(tmp_path / "source", tmp_path / "out", ExportOptions(format="openvino"))
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    kind = ORT[name].replace("ORT", "OV")
    opened = getattr(package, kind).from_pretrained(tmp_path / "out", ov_config=config, device="CPU")
    check_opened(name, model, opened)


def check_opened(name: str, model: Any, opened: Any) -> None:
    ids, mask = inputs(name, 3, 21, "left")
    if KIND[name] == "choice":
        ids, mask = (torch.stack((x, x.roll(1, 0)), dim=1) for x in (ids, mask))
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask)
    if KIND[name] == "causal":
        more = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        wanted = model.generate(ids, attention_mask=mask, **more)
        more |= {"eos_token_id": [VOCAB + 1]} if name else {}
        assert opened.generate(input_ids=ids, attention_mask=mask, **more).tolist() == wanted.tolist()
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        found = opened(input_ids=ids, attention_mask=mask, position_ids=positions)
    else:
        found = opened(input_ids=ids, attention_mask=mask)
    for key in ("logits", "last_hidden_state", "start_logits", "end_logits"):
        if key in found:
            a, b = (torch.as_tensor(x[key]) for x in (found, expected))
            if a.shape[: ids.dim()] == ids.shape:
                a, b = a[mask != 0], b[mask != 0]
            torch.testing.assert_close(a, b, atol=ATOL, rtol=1e-5)
