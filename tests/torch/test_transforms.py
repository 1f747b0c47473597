"""Models under PyTorch's transforms, with an attention mask: compiled, exported, traced, under functorch transforms,
forward-mode differentiation and autocast; each against the plain call."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PAD, has_compiler, model, traced_by_213
from measure import assert_close, rounding
from tiny_families import CLASSES, fields, monoblock_model, with_images
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vjp, vmap

from monoblock.backends.pytorch import ops
from monoblock.positions import inverse_frequencies
from monoblock.spec import RopeScaling, Rotary

# fp32, states up to 12, sums in another order: as in tests/parity. Measured 1.2e-5 (the older ONNX exporter).
ATOL = 2e-5

NAMES = {
    "mpt": "MptForCausalLM",
    "mistral": "MistralForCausalLM",
    "fuyu": "FuyuForCausalLM",
    "openai-gpt": "OpenAIGPTLMHeadModel",
    "gpt_neo": "GPTNeoForCausalLM",
    "mpnet": "MPNetForMaskedLM",
}
# Beyond the families: angles by the length, a cap on scores, learned positions.
MORE: dict[str, Any] = {
    "rope, dynamic": {"rope": True, "rope_theta": 500.0, "rope_impl": "hf"},
    "score cap": {"attn_logit_softcapping": 3.0},
}
SHAPES = [(3, 23), (5, 21), (4, 17), (2, 15), (3, 12), (4, 19), (3, 30), (3, 40), (2, 33), (3, 11)]


@functools.cache
def made(family: str) -> Any:
    if family == "mpt":
        return model(NAMES[family])
    return monoblock_model(NAMES[family], **fields(CLASSES[NAMES[family]]))


def inputs(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, the last row padded on the left, the one before on the right."""
    ids = torch.randint(10, 89, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    mask[-1, :3] = mask[-2, -4:] = 0
    return ids.masked_fill(mask == 0, PAD), mask


class Logits(nn.Module):
    """A model as a function of ids and mask."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.model = made(family)
        self.eval()
        self.options: dict[str, Any] = {"return_dict": False}
        if self.model.spec.causal:
            self.options["use_cache"] = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask=attention_mask, **self.options)[0]


# ---------------------------------------------------------------------------- programs


@pytest.mark.parametrize("family", NAMES)
@torch.no_grad()
def test_ten_shapes_are_two_graphs(family: str) -> None:
    """Whole graphs, with the cache that the model makes by default."""
    module, counter = made(family), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for rows, tokens in SHAPES:
        ids, mask = inputs(rows, tokens)
        found = compiled(ids, attention_mask=mask)
        assert_close("compiled", found.logits, module(ids, attention_mask=mask).logits, ATOL, mask)
    assert counter.frame_count <= 2


@pytest.mark.skipif(not has_compiler(), reason="the default backend needs a C++ compiler")
@torch.no_grad()
def test_the_default_backend() -> None:
    module = monoblock_model("MistralForCausalLM", **fields("mistral", num_hidden_layers=1))
    torch._dynamo.reset()
    compiled = torch.compile(module)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for rows, tokens in SHAPES:
        ids, mask = inputs(rows, tokens)
        expected = module(ids, attention_mask=mask).logits
        assert_close("compiled", compiled(ids, attention_mask=mask).logits, expected, ATOL, mask)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 2


@pytest.mark.parametrize("family", NAMES)
def test_compiled_training(family: str) -> None:
    module = made(family)
    ids, mask = inputs(3, 23)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = gradients(module, lambda: compiled(ids, attention_mask=mask, labels=labels(ids, mask)).loss)
    expected = gradients(module, lambda: module(ids, attention_mask=mask, labels=labels(ids, mask)).loss)
    for name, value in expected.items():
        assert_close("compiled gradients", found[name], value, 1e-5)  # gradients of a mean loss are below 1


@pytest.mark.parametrize("family", ["mistral", "gpt_neo"])
def test_compiled_checkpoints(family: str) -> None:
    """Blocks that are computed again in the backward pass share masks that are made before them."""
    ids, mask = inputs(3, 23)
    module = made(family)
    expected = gradients(module, lambda: module(ids, attention_mask=mask, labels=labels(ids, mask)).loss)
    module.gradient_checkpointing_enable()
    torch._dynamo.reset()
    compiled = torch.compile(module.train(), fullgraph=True, backend="aot_eager")
    found = gradients(module, lambda: compiled(ids, attention_mask=mask, labels=labels(ids, mask)).loss)
    module.gradient_checkpointing_disable()
    module.eval()
    for name, value in expected.items():
        assert_close("compiled gradients", found[name], value, 1e-5)


@traced_by_213
@pytest.mark.parametrize("family", NAMES)
@torch.no_grad()
def test_export(family: str) -> None:
    """One program for all batches and lengths, of PyTorch's own operators."""
    module = Logits(family)
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=5, max=60)
    shapes = ({0: batch, 1: length},) * 2
    program = torch.export.export(module, inputs(3, 23), dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes]
    assert not [target for target in targets if "monoblock" in target or "_for_cpu" in target]
    for given in (inputs(3, 23), inputs(5, 41)):
        assert_close("exported", program.module()(*given), module(*given), ATOL, given[1])


@pytest.mark.parametrize("family", NAMES)
@torch.no_grad()
def test_trace(family: str) -> None:
    """`check_trace` runs the program twice; it also serves other shapes."""
    module = Logits(family)
    traced: Any = torch.jit.trace(module, inputs(3, 23), check_trace=True, check_tolerance=1e-4)
    for given in (inputs(3, 23), inputs(5, 41)):
        assert_close("traced", traced(*given), module(*given), ATOL, given[1])


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("family", NAMES)
@torch.no_grad()
def test_onnx(family: str, dynamo: bool, tmp_path: Path) -> None:
    """Both exporters, run in onnxruntime."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, file, names = Logits(family), tmp_path / "model.onnx", ["input_ids", "attention_mask"]
    if dynamo:
        batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=5, max=60)
        dynamic: dict[str, Any] = {"dynamic_shapes": ({0: batch, 1: length},) * 2}
    else:
        dynamic = {"dynamic_axes": {name: {0: "batch", 1: "length"} for name in names}}
    torch.onnx.export(module, inputs(3, 23), str(file), dynamo=dynamo, input_names=names, **dynamic)
    session = runtime.InferenceSession(str(file))
    for given in (inputs(3, 23), inputs(5, 41)):
        found = session.run(None, {n: x.numpy() for n, x in zip(names, given, strict=True)})[0]
        assert_close("onnxruntime", found, module(*given), ATOL, given[1])


class ImageLogits(nn.Module):
    """Fuyu as a function of ids, mask, image patches and the index of each token's."""

    def __init__(self) -> None:
        super().__init__()
        self.model = made("fuyu")

    def forward(self, ids: Tensor, mask: Tensor, patches: Any, indices: Tensor | None) -> Tensor:
        images = {"image_patches": patches, "image_patches_indices": indices}
        return self.model(ids, attention_mask=mask, use_cache=False, **images).logits


def image_bound(ids: Tensor, mask: Tensor, patches: Any, indices: Tensor | None) -> float:
    images = {"image_patches": patches, "image_patches_indices": indices}
    out = made("fuyu")(ids, attention_mask=mask, output_hidden_states=True, **images)
    return rounding(made("fuyu").spec, out)


@pytest.mark.parametrize("indexed", [True, False], ids=["by index", "in order"])
@pytest.mark.parametrize("mode", ["compile", pytest.param("export", marks=traced_by_213)])
@torch.no_grad()
def test_image_patches(mode: str, indexed: bool) -> None:
    """As a whole graph: nothing is read to see where patches go. One row has none."""
    module = ImageLogits()
    ids, mask, patches, indices = with_images((6, 0, 9))
    given = (ids, mask, patches, indices if indexed else None)
    torch._dynamo.reset()
    if mode == "compile":
        program: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    else:
        program = torch.export.export(module, given).module()
    expected = module(*given)
    assert_close(f"{mode}, images", program(*given), expected, image_bound(*given))
    assert (program(ids, mask, [-own for own in patches], given[3]) - expected).abs().max() > 0.1
    # What has too few or, in order, too many patches fails all the same.
    wrong = [torch.cat((patches[0], patches[0])), *patches[1:]]
    if mode == "compile":
        for sets in ([patches[0][:4], *patches[1:]], *([] if indexed else [wrong])):
            with pytest.raises(IndexError, match="out of bounds"):
                program(ids, mask, sets, given[3])


@pytest.mark.parametrize("indexed", [True, False], ids=["by index", "in order"])
@torch.no_grad()
def test_image_patches_of_each_row(indexed: bool) -> None:
    module = ImageLogits()
    ids, mask, patches, indices = with_images((6, 6))

    def row(ids: Tensor, mask: Tensor, patches: Tensor, indices: Tensor) -> Tensor:
        return module(ids[None], mask[None], patches[None], indices[None] if indexed else None)[0]

    found = vmap(row)(ids, mask, torch.stack(patches), indices)
    given = (ids, mask, patches, indices if indexed else None)
    assert_close("vmap, images", found, module(*given), image_bound(*given))


@pytest.mark.parametrize("option", MORE)
@torch.no_grad()
def test_options_of_attention(option: str) -> None:
    attn: dict[str, Any] = dict(MORE[option])
    if "dynamic" in option:
        attn["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    module = model("MptForCausalLM", attn=attn, max_seq_len=16)
    ids, mask = inputs(3, 23)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
    assert_close(
        option, compiled(ids, attention_mask=mask).logits, module(ids, attention_mask=mask).logits, ATOL, mask
    )


def test_dynamic_frequencies_equal_numpy() -> None:
    rotary = Rotary(dim=10, theta=500.0, scaling=RopeScaling(kind="dynamic", factor=3.0, original_length=8))
    lengths = [5, 8, 9, 30]
    found = ops._dynamic(torch.tensor([[0, length - 1] for length in lengths]), rotary)
    for row, length in zip(found[:, 0, 0], lengths, strict=True):
        torch.testing.assert_close(
            row, torch.tensor(inverse_frequencies(rotary, length)[0]), rtol=1e-6, atol=0
        )


# ---------------------------------------------------------------------------- derivatives


def labels(ids: Tensor, mask: Tensor) -> Tensor:
    return ids.masked_fill(mask == 0, -100)


def gradients(module: Any, loss: Any) -> dict[str, Tensor]:
    module.zero_grad()
    loss().backward()
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("family", NAMES)
def test_gradients_of_each_row(family: str) -> None:
    module = made(family)
    ids, mask = inputs(3, 23)

    def loss(values: Any, *row: Tensor) -> Tensor:
        names = ("input_ids", "attention_mask", "labels")
        given = {name: x[None] for name, x in zip(names, row, strict=True)}
        return functional_call(module, values, (), given).loss

    rows = (ids, mask, labels(ids, mask))
    found = vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters(module), *rows)
    for i in range(len(ids)):
        one = [x[i : i + 1] for x in rows]
        expected = gradients(
            module, lambda one=one: module(one[0], attention_mask=one[1], labels=one[2]).loss
        )
        for name, value in expected.items():
            assert_close("gradients by row", found[name][i], value, 1e-5)


@pytest.mark.parametrize("family", NAMES)
def test_forward_mode(family: str) -> None:
    """Directional derivatives, by functorch and by dual tensors, against the gradient; and a Hessian's product."""
    module = made(family)
    ids, mask = inputs(3, 23)
    embeds = module.get_input_embeddings()(ids).detach()
    direction = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0))

    def loss(x: Tensor) -> Tensor:
        return module(inputs_embeds=x, attention_mask=mask, labels=labels(ids, mask)).loss

    slope = (torch.autograd.grad(loss(leaf := embeds.clone().requires_grad_()), leaf)[0] * direction).sum()
    bound = 1e-4  # the slope is a sum of 2,500 products
    assert_close("jvp", jvp(loss, (embeds,), (direction,))[1], slope, bound)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(embeds, direction))).tangent
    assert_close("dual tensors", dual, slope, bound)
    product = jvp(grad(loss), (embeds,), (direction,))[1]
    transposed = vjp(grad(loss), embeds)[1](direction)[0]
    assert_close("Hessian products", product, transposed, 1e-5 * float(product.abs().max()) + 1e-5)


# ---------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", NAMES)
def test_autocast(family: str, attention: str, dtype: torch.dtype) -> None:
    """Padded rows, in evaluation, training and generation; heads keep autocast's dtype after RoPE."""
    module = made(family)
    ids, mask = inputs(3, 23)
    expected = module(ids, attention_mask=mask, labels=labels(ids, mask)).loss
    module.set_attn_implementation(attention)
    with torch.autocast("cpu", dtype):
        logits = module(ids, attention_mask=mask).logits
        found = gradients(
            module.train(), lambda: module(ids, attention_mask=mask, labels=labels(ids, mask)).loss
        )
        module.eval()
        loss = module(ids, attention_mask=mask, labels=labels(ids, mask)).loss
        if module.can_generate():
            out = module.generate(
                ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=PAD
            )
            assert out.shape[1] <= 27
    module.set_attn_implementation(None)
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert all(value.isfinite().all() for value in found.values())
    # Losses around 10, of logits that are rounded to 8 or 11 bits.
    assert_close("autocast, loss", loss, expected, 0.15 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("family", ["mistral", "mpnet"])
def test_compiled_under_autocast(family: str) -> None:
    """With fully masked rows, whose gradients an infinite minimum would make NaN."""
    module = made(family)
    ids, mask = inputs(3, 23)
    mask[0] = 0
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(module, lambda: compiled(ids, attention_mask=mask, labels=labels(ids, mask)).loss)
        expected = gradients(module, lambda: module(ids, attention_mask=mask, labels=labels(ids, mask)).loss)
    for name, value in expected.items():
        assert_close("autocast, compiled", found[name], value, 0.1)  # of 8 bits, added up in another order
