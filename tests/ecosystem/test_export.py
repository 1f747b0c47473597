"""torch.compile, torch.export, ONNX, jit.trace, torch.func, autocast and pickling of models."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import BARE, CAUSAL, FAMILIES, LANGUAGE, VOCAB, Library, batch, labelled, logits
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from torch.func import functional_call, grad, jvp, vmap

# Inputs of another size than the traced ones.
OTHER = {
    "input_ids": torch.randint(5, VOCAB - 1, (2, 30), generator=torch.Generator().manual_seed(3)),
    "attention_mask": torch.ones(2, 30, dtype=torch.long),
}
OTHER["attention_mask"][0, 22:] = 0


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plain(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """The logits, 0 at padding."""
    with torch.no_grad():
        out = model(**inputs, **options)
    found = out["logits"] if "logits" in out else out["last_hidden_state"]
    return found * inputs["attention_mask"][..., None]


def comparable(
    library: Library, model: torch.nn.Module, inputs: dict[str, torch.Tensor], found: torch.Tensor
) -> torch.Tensor:
    """The logits, or for transformers' families that count left padding as positions, its logits with position_ids."""
    if library.name == "monoblock" or model.config.model_type not in ("openai-gpt", "gpt_neo"):
        return found
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return plain(model, {**inputs, "position_ids": positions})


class Logits(torch.nn.Module):
    """(ids, mask) -> logits, for tracers that need tensors as inputs and outputs."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        options = {} if self.model.config.model_type in ("mpnet", "openai-gpt") else {"use_cache": False}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **options)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_with_a_mask(agree: Any, family: str) -> None:
    def run(library: Library) -> Any:
        model = library.model(LANGUAGE[family])
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        both = (batch("right"), batch("left"))
        found = [plain(compiled, inputs) for inputs in both]
        torch.testing.assert_close(found, [plain(model, inputs) for inputs in both], atol=2e-5, rtol=1e-5)
        return [comparable(library, model, inputs, out) for inputs, out in zip(both, found, strict=True)]

    agree(run, 2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_shapes_compile_to_two_graphs(library: Library, family: str) -> None:
    """A static graph for the first shape, and a dynamic one for all others."""
    # With a window, sequences longer than it need another graph.
    model = library.model(LANGUAGE[family], **({"sliding_window": None} if family == "mistral" else {}))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for rows, length in [
        (2, 7),
        (3, 9),
        (3, 12),
        (4, 20),
        (2, 33),
        (5, 17),
        (3, 40),
        (2, 50),
        (6, 8),
        (4, 11),
    ]:
        ids = torch.randint(5, VOCAB - 1, (rows, length))
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        plain(compiled, {"input_ids": ids, "attention_mask": mask})
    assert counter.frame_count <= 2


def test_inductor(library: Library) -> None:
    """Two shapes and one layer, since compilation of C++ takes seconds."""
    model = library.model("MistralForCausalLM", num_hidden_layers=1)
    compiled = torch.compile(model)
    for inputs in (batch("right"), OTHER):
        torch.testing.assert_close(plain(compiled, inputs), plain(model, inputs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "mpnet"])
def test_compiled_training(agree: Any, family: str) -> None:
    """Forward and backward with AOTAutograd, and another shape in the second step."""
    name = LANGUAGE[family]

    def run(library: Library) -> Any:
        model = library.model(name).train()
        compiled = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = []
        for length in (21, 15, 18):
            loss = compiled(**{key: x[:, :length].contiguous() for key, x in labelled(name).items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    agree(run, 1e-4)


def exported(library: Library, name: str, **options: Any) -> Any:
    inputs = batch("right")
    shape = {0: Dim("batch", min=2, max=64), 1: Dim("tokens", min=3, max=120)}
    return torch.export.export(
        library.model(name, **options),
        (),
        kwargs=inputs,
        dynamic_shapes={"input_ids": shape, "attention_mask": shape},
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_export_with_dynamic_shapes_and_a_mask(agree: Any, family: str) -> None:
    """The exported program returns the model's output class."""
    options = {} if family in ("mpnet", "openai-gpt") else {"use_cache": False}

    def run(library: Library) -> Any:
        program = exported(library, LANGUAGE[family], **options)
        module, model = program.module(), library.model(LANGUAGE[family], **options)
        found = []
        for inputs in (batch("right"), batch("left"), OTHER):
            out = module(**inputs)
            out = out["logits"] * inputs["attention_mask"][..., None]
            torch.testing.assert_close(out, plain(model, inputs), atol=2e-5, rtol=1e-5)
            found.append(comparable(library, model, inputs, out))
        return found

    agree(run, 2e-5)


@pytest.mark.parametrize("family", ["mistral"])
def test_save_and_load_an_exported_program(library: Library, family: str, tmp_path: Path) -> None:
    options = {} if family in ("mpnet", "openai-gpt") else {"use_cache": False}
    torch.export.save(exported(library, LANGUAGE[family], **options), tmp_path / "model.pt2")
    opened = torch.export.load(tmp_path / "model.pt2").module()
    out = opened(**OTHER)["logits"] * OTHER["attention_mask"][..., None]
    expected = plain(library.model(LANGUAGE[family], **options), OTHER)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)


def run_onnx(file: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    [out] = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return torch.tensor(out) * inputs["attention_mask"][..., None]


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("family", FAMILIES)
def test_onnx(library: Library, family: str, dynamo: bool, tmp_path: Path) -> None:
    """Both exporters; the file runs in onnxruntime, also at another length."""
    model = Logits(library.model(LANGUAGE[family]))
    inputs = batch("right")
    file = tmp_path / "model.onnx"
    names = ["input_ids", "attention_mask"]
    if dynamo:
        shape = {0: Dim("batch", min=2, max=64), 1: Dim("tokens", min=3, max=120)}
        torch.onnx.export(
            model, tuple(inputs.values()), file, dynamo=True, input_names=names, dynamic_shapes=(shape, shape)
        )
    else:
        axes = {name: {0: "batch", 1: "tokens"} for name in [*names, "logits"]}
        torch.onnx.export(
            model,
            tuple(inputs.values()),
            file,
            dynamo=False,
            input_names=names,
            output_names=["logits"],
            dynamic_axes=axes,
        )
    for given in (inputs, OTHER):
        expected = plain(model.model, given)
        torch.testing.assert_close(run_onnx(file, given), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_jit_trace(library: Library, family: str) -> None:
    """torch.jit.trace with its check, another mask, and after saving and loading."""
    model = Logits(library.model(LANGUAGE[family]))
    traced = torch.jit.trace(model, tuple(batch("right").values()))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    opened = torch.jit.load(file)
    for inputs in (batch("right"), batch("left", seed=1)):
        found = opened(**inputs) * inputs["attention_mask"][..., None]
        torch.testing.assert_close(found, plain(model.model, inputs), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_per_sample_gradients(agree: Any, family: str) -> None:
    """vmap(grad(functional_call)) against a backward pass per sample."""
    name = LANGUAGE[family]
    # transformers reads the masks of these two families on the host.
    padding = "none" if family in ("fuyu", "mpnet") else "right"

    def run(library: Library) -> Any:
        model = library.model(name)
        inputs = labelled(name, padding)
        if padding == "none":
            del inputs["attention_mask"]
        state = {key: p.detach() for key, p in model.named_parameters()}

        def loss(parameters: Any, row: dict[str, torch.Tensor]) -> torch.Tensor:
            return functional_call(model, parameters, (), {key: x[None] for key, x in row.items()}).loss

        each = vmap(grad(loss), in_dims=(None, 0))(state, inputs)
        for i in range(3):
            model.zero_grad()
            model(**{key: x[i : i + 1] for key, x in inputs.items()}).loss.backward()
            for key, p in model.named_parameters():
                expected = torch.zeros_like(p) if p.grad is None else p.grad
                torch.testing.assert_close(each[key][i], expected, atol=1e-5, rtol=1e-3)
        return {key: each[key] for key in sorted(each)}

    agree(run, 1e-4)


@pytest.mark.parametrize("family", ["fuyu", "mpnet"])
def test_a_mask_under_vmap(monoblock_library: Library, family: str) -> None:
    model = monoblock_library.model(LANGUAGE[family])
    inputs = batch()

    def call(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids[None], attention_mask=mask[None]).logits[0]

    found = vmap(call)(inputs["input_ids"], inputs["attention_mask"]) * inputs["attention_mask"][..., None]
    torch.testing.assert_close(found, plain(model, inputs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["mpt", "gpt_neo"])
def test_forward_mode(agree: Any, family: str) -> None:
    """jvp along a direction in parameter space against the gradient, with the default attention."""
    name = LANGUAGE[family]

    def run(library: Library) -> Any:
        model = library.model(name)
        state = {key: p.detach() for key, p in model.named_parameters()}
        generator = torch.Generator().manual_seed(1)
        direction = {key: torch.randn(p.shape, generator=generator) for key, p in sorted(state.items())}
        inputs = labelled(name)

        def loss(parameters: Any) -> torch.Tensor:
            return functional_call(model, parameters, (), inputs).loss

        _, along = jvp(loss, (state,), ({key: direction[key] for key in state},))
        gradient = grad(loss)(state)
        expected = sum((gradient[key] * direction[key]).sum() for key in state)
        torch.testing.assert_close(along, expected, atol=1e-4, rtol=1e-4)
        return along

    agree(run, 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_ensembles_under_vmap(agree: Any, family: str) -> None:
    name = LANGUAGE[family]

    def run(library: Library) -> Any:
        model = library.model(name)
        states = [{key: (1 + 0.1 * i) * p.detach() for key, p in model.named_parameters()} for i in range(3)]
        stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
        ids = batch("none")["input_ids"]

        def call(parameters: Any) -> torch.Tensor:
            return functional_call(model, parameters, (ids,), {}).logits

        together = vmap(call)(stacked)
        with torch.no_grad():
            apart = torch.stack([call(state) for state in states])
        torch.testing.assert_close(together, apart, atol=2e-5, rtol=1e-4)
        return together

    agree(run, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_with_padding(library: Library, family: str, padding: str, dtype: torch.dtype) -> None:
    """Training, evaluation and generation are close to the float32 model."""
    name = LANGUAGE[family]
    # Padded rows without a window use another kernel.
    model = library.model(name, **({"sliding_window": None} if family == "mistral" else {}))
    inputs = labelled(name, padding)
    reference = model(**inputs)
    with torch.autocast("cpu", dtype=dtype):
        out = model.train()(**inputs)
    assert out.logits.dtype == dtype
    out.loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    # 8 bits of bfloat16 (11 of float16), two layers, losses of about 7.
    torch.testing.assert_close(out.loss.float(), reference.loss, atol=0.1, rtol=0)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        evaluated = model(**inputs)
        if family in CAUSAL:
            options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
            tokens = model.generate(**batch("left"), **options)
            assert tokens.shape == (3, 25)
    torch.testing.assert_close(evaluated.loss.float(), reference.loss, atol=0.1, rtol=0)


PICKLED = [*LANGUAGE.values(), *BARE.values()]


@pytest.mark.parametrize("name", PICKLED)
def test_models_are_picklable(library: Library, name: str, tmp_path: Path) -> None:
    model = library.model(name)
    expected = logits(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), expected)
    torch.save(model, tmp_path / "model.pt")
    opened = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(opened), expected)
    assert [key for key, _ in opened.named_parameters()] == [key for key, _ in model.named_parameters()]


def test_outputs_are_mappings_and_pytrees(library: Library) -> None:
    from collections import OrderedDict

    out = library.model("MistralForCausalLM")(**batch(), use_cache=False, output_hidden_states=True)
    assert isinstance(out, OrderedDict)
    assert list(out) == ["logits", "hidden_states"]
    leaves, structure = torch.utils._pytree.tree_flatten(out)
    assert len(leaves) == 1 + 3
    again = torch.utils._pytree.tree_unflatten([np.float32(2) * x.detach() for x in leaves], structure)
    assert type(again) is type(out)
    torch.testing.assert_close(again.logits, 2 * out.logits)
    assert torch.equal(pickle.loads(pickle.dumps(out)).logits, out.logits)
