"""The contract of a model's forward pass: outputs, losses and gradients of every class equal those of PyTorch on the
same checkpoint, with and without padding, past the windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import last_token_checks
import numpy as np
import pytest
import torch
from contract.models import CLASSES, Contract, converted, image_inputs, inputs, labels, numpy, reference
from measure import assert_close, rounding

from monoblock.families import FAMILIES, class_names

GRADIENT = 5e-5  # of the largest of a parameter's gradients, or of 1
EVERYTHING: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
# One class of each family, for what does not depend on the head.
BODIES = {
    next(name for name in class_names(model_type) if "For" in name or "Head" in name)
    for model_type in FAMILIES
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 3.0, "original_max_position_embeddings": 12}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0, "original_max_position_embeddings": 8}
THETA = {"rope_type": "default", "rope_theta": 77.0}
# Fields of a Mistral that transformers' Flax and TF classes ignored.
VARIANTS: dict[str, dict[str, Any]] = {
    "no window": {"sliding_window": None},
    "a window in some layers": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
    },
    "theta and head_dim": {"rope_parameters": THETA, "head_dim": 14, "sliding_window": 5},
    "yarn": {"rope_parameters": YARN, "sliding_window": None},
    "dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 8},
    "three heads, one group": {"num_attention_heads": 3, "num_key_value_heads": 1},
}


def compare(what: str, ours: Any, theirs: Any, mask: torch.Tensor | None, bound: float) -> None:
    """All outputs, at the tokens that are not padding."""
    names = {key for key in theirs if key not in ("loss", "mc_loss", "past_key_values")}
    assert set(ours.keys()) == names, what
    for key in names - {"hidden_states", "attentions"}:
        assert_close(f"{what}: {key}", ours[key], theirs[key], bound, of_tokens(mask, theirs[key]))
    rows = None if mask is None else mask.flatten(0, -2)
    for key in names & {"hidden_states", "attentions"}:
        assert len(ours[key]) == len(theirs[key])
        for a, b in zip(ours[key], theirs[key], strict=True):
            by_query = (np.swapaxes(a, 1, 2), b.transpose(1, 2)) if key == "attentions" else (a, b)
            assert_close(f"{what}: {key}", *by_query, bound, rows)


def of_tokens(mask: torch.Tensor | None, output: torch.Tensor) -> torch.Tensor | None:
    """The mask, where an output has values for each token."""
    return mask if mask is not None and output.shape[: mask.dim()] == mask.shape else None


class ParityContract(Contract):
    # Keyword arguments of a call that returns no cache.
    without_cache: ClassVar[dict[str, Any]] = {}
    # Whether calls take `head_mask`.
    head_masks = False
    # Whether all classes are called in all forms, or only those of BODIES: compilation may take seconds for each.
    all_forms = False

    def loss_and_gradients(self, ours: Any, given: Any, wanted: Any) -> tuple[Any, dict[str, np.ndarray]]:
        """The sum of the losses, and its gradients by parameter in PyTorch's layout."""
        raise NotImplementedError

    def torch_gradients(self, theirs: Any) -> dict[str, torch.Tensor]:
        """The gradients of a PyTorch model by the same names."""
        raise NotImplementedError

    def made(self, name: str, folder: Path, **more: Any) -> tuple[Any, Any]:
        theirs = reference(name, **more)
        return theirs, converted(theirs, self.prefix, folder)

    @pytest.mark.parametrize("name", CLASSES)
    def test_outputs(self, name: str, tmp_path: Path) -> None:
        """All outputs, and those of a plain call, which runs fused attention."""
        theirs, ours = self.made(name, tmp_path)
        uncached = {"use_cache": False} if theirs.spec.causal else {}
        for padding in ("none", "right") if name.startswith("MPNet") else ("none", "left", "right"):
            given, what = inputs(name, padding), f"{name}, {padding}"
            mask = given.get("attention_mask")
            with torch.no_grad():
                expected = theirs(**given, **EVERYTHING, **uncached)
            bound = rounding(theirs.spec, expected)
            every_form = self.all_forms or name in BODIES
            if every_form or mask is not None:
                found = ours(**numpy(given), **EVERYTHING, **self.without_cache)
                compare(what, found, expected, mask, bound)
            if every_form or mask is None:
                plain = ours(**numpy(given), **self.without_cache)
                for key in plain:
                    where = of_tokens(mask, expected[key])
                    assert_close(f"{what}, fused: {key}", plain[key], expected[key], bound, where)

    @pytest.mark.parametrize("name", [n for n in CLASSES if not n.endswith("Model") or "Double" in n])
    def test_losses_and_gradients(self, name: str, tmp_path: Path) -> None:
        theirs, ours = self.made(name, tmp_path)
        given = inputs(name, "right" if name.startswith("MPNet") else "left")
        wanted = labels(name, given)
        out = theirs(**given, **wanted)
        total = out.loss + (out.get("mc_loss") or 0)
        total.backward()
        value, gradients = self.loss_and_gradients(ours, numpy(given), numpy(wanted))
        # A loss is a mean of differences of logits, so the hidden states give its scale.
        with torch.no_grad():
            states = theirs(**given, output_hidden_states=True)
        assert_close("losses", value, total, rounding(theirs.spec, states))
        expected = self.torch_gradients(theirs)
        assert gradients.keys() >= expected.keys()
        for key, gradient in gradients.items():
            own = expected.get(key)
            own = torch.zeros(gradient.shape) if own is None else own  # of image patches, which are not given
            bound = GRADIENT * max(1.0, float(own.abs().max()))
            assert_close(f"gradients of {name}: {key}", gradient, own, bound)
        assert any(np.abs(x).max() > 1e-3 for x in gradients.values())

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_variants_of_rope_and_windows(self, variant: str, tmp_path: Path) -> None:
        name = "MistralForCausalLM"
        theirs, ours = self.made(name, tmp_path, **VARIANTS[variant])
        for padding in ("none", "left"):
            given = inputs(name, padding)
            with torch.no_grad():
                expected = theirs(**given, output_hidden_states=True, use_cache=False)
            found = ours(**numpy(given), output_hidden_states=True, **self.without_cache)
            bound = rounding(theirs.spec, expected)
            compare(f"{variant}, {padding}", found, expected, given.get("attention_mask"), bound)

    def test_images(self, tmp_path: Path) -> None:
        theirs, ours = self.made("FuyuForCausalLM", tmp_path)
        given = image_inputs((4, 7, 2))
        with torch.no_grad():
            expected = theirs(**given, output_hidden_states=True)
        bound, mask = rounding(theirs.spec, expected), given["attention_mask"]
        found = ours(**numpy(given)).logits
        assert_close("images", found, expected.logits, bound, mask)
        text = numpy({key: given[key] for key in ("input_ids", "attention_mask")})
        patches = np.concatenate(numpy(given)["image_patches"])
        in_order = ours(**text, image_patches=patches).logits
        assert_close("images without indices", in_order, expected.logits, bound, mask)
        assert np.abs(np.asarray(ours(**text).logits) - np.asarray(found)).max() > 1e-2

    @pytest.mark.parametrize(
        "name", ["OpenAIGPTModel", "MPNetModel", "GPTNeoModel", "MistralModel", "MptModel"]
    )
    def test_embeddings_as_inputs(self, name: str, tmp_path: Path) -> None:
        """`inputs_embeds` in place of ids, with given positions, head masks, and GPT-1's token types."""
        theirs, ours = self.made(name, tmp_path)
        embeds = theirs.get_input_embeddings()(inputs(name)["input_ids"]).detach()
        given: dict[str, torch.Tensor] = {"inputs_embeds": embeds}
        if name != "MptModel":
            given["position_ids"] = torch.arange(3, 26)[None]
        if name == "OpenAIGPTModel":
            given["token_type_ids"] = torch.arange(69).reshape(3, 23) % 5
        if self.head_masks and name in ("OpenAIGPTModel", "MPNetModel", "GPTNeoModel"):
            given["head_mask"] = torch.rand(2, 6, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = theirs(**given, **EVERYTHING)
        bound = rounding(theirs.spec, expected)
        found = ours(**numpy(given), output_attentions=True)
        assert_close(f"{name}, embeddings", found.last_hidden_state, expected.last_hidden_state, bound)
        assert_close(f"{name}, embeddings", found.attentions[1], expected.attentions[1], bound)

    @pytest.mark.parametrize("name", ["MptForSequenceClassification", "OpenAIGPTForSequenceClassification"])
    def test_last_token_of_a_row(self, name: str, tmp_path: Path) -> None:
        """With pad == eos and a final eos: found by the pad id or by the mask, as the config has it at each call."""
        pair = self.made(name, tmp_path, last_token_by="attention_mask")
        last_token_checks.check(*pair, inputs(name, "right"), numpy)
