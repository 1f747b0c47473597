"""The contract of calls and files beside their numbers: invalid inputs and caches, fields that are read at each call,
seeds, and checkpoints that hold more or less than the config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import invalid_inputs
import numpy as np
import oversized_configs
import pytest
import torch
from contract.models import Contract, Pair, ids_of, inputs, numpy
from extra_tensors import check_strict
from measure import assert_close

import monoblock

NAME = "GPTNeoForCausalLM"
IDS = ids_of(2, 6)
EMBEDS = np.zeros((2, 6, 36), np.float32)
Case = tuple[type[Exception], dict[str, Any]]
# A pattern of the message -> the exception and the arguments.
SHAPES: dict[str, Case] = {
    r"hold the token 99, but the model's vocabulary has the ids 0 to 88": (
        ValueError,
        {"input_ids": np.full((1, 2), 99)},
    ),
    r"input_ids must be .* \(batch, tokens\), got float32": (ValueError, {"input_ids": np.float32(IDS) / 2}),
    r"got int64 \(6,\)": (ValueError, {"input_ids": IDS[0]}),
    r"input_ids must be .*, or nested lists of equal lengths": (ValueError, {"input_ids": [[1], [1, 2]]}),
    r"input_ids must be .*, got str": (ValueError, {"input_ids": "text"}),
    r"the input has no tokens": (ValueError, {"input_ids": IDS[:, :0]}),
    r"You have to specify either input_ids or inputs_embeds": (ValueError, {}),
    r"cannot specify both": (ValueError, {"input_ids": IDS, "inputs_embeds": EMBEDS}),
    r"inputs_embeds must be \(batch, tokens, 36\), got float32 \(2, 6, 35\)": (
        ValueError,
        {"inputs_embeds": EMBEDS[..., 1:]},
    ),
    r"attention_mask must be \(batch, tokens\) = \(2, 6\), got \(2, 5\)": (
        ValueError,
        {"input_ids": IDS, "attention_mask": np.ones((2, 5))},
    ),
    r"position_ids must be .* \(2, 6\), got int64 \(1, 7\)": (
        ValueError,
        {"input_ids": IDS, "position_ids": np.arange(7)[None]},
    ),
    r"64 learned positions, but .* has 65 tokens": (ValueError, {"input_ids": ids_of(1, 65)}),
    r"sequence_id would have no effect": (ValueError, {"input_ids": IDS, "sequence_id": IDS}),
    r"no argument 'attn_mask'": (TypeError, {"input_ids": IDS, "attn_mask": IDS}),
}


class CallsContract(Contract):
    # As SHAPES, of this backend.
    invalid: ClassVar[dict[str, Case]] = {}

    def call(self, model: Any, **given: Any) -> Any:
        """The output of a call whose arguments may be labels."""
        return model(**given)

    def loss(self, model: Any, given: dict[str, Any], labels: Any) -> Any:
        raise NotImplementedError

    # ------------------------------------------------------------------------ invalid inputs

    def test_invalid_shapes_and_types_raise(self, pair: Pair) -> None:
        """With a message of one line; Keras adds the arguments to those of the layers."""
        model = pair(NAME)[1]
        for message, (error, given) in (SHAPES | self.invalid).items():
            with pytest.raises(error, match=message) as caught:
                model(**given)
            assert "\n" not in str(caught.value) or message in self.invalid

    @pytest.mark.parametrize("case", invalid_inputs.INVALID)
    def test_invalid_values_raise(self, case: str, pair: Pair) -> None:
        name, given = invalid_inputs.arguments(case)
        with pytest.raises(ValueError, match=invalid_inputs.INVALID[case][2]) as caught:
            self.call(pair(name)[1], **given)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("case", invalid_inputs.VALID)
    def test_integers_of_any_width_are_ids(self, case: str, pair: Pair) -> None:
        given, model = invalid_inputs.VALID[case], pair(NAME)[1]
        expected = model(**{name: x.astype(np.int32) for name, x in given.items()}).logits
        assert np.array_equal(model(**given).logits, expected)

    @pytest.mark.parametrize("case", invalid_inputs.REFUSED)
    def test_generate_raises_before_it_computes(self, case: str, pair: Pair) -> None:
        with pytest.raises(ValueError, match=invalid_inputs.REFUSED[case][1]) as caught:
            pair(NAME)[1].generate(**invalid_inputs.refused(case))
        assert "\n" not in str(caught.value)

    def test_seeds_of_64_bits(self, pair: Pair) -> None:
        sampling = {"max_new_tokens": 3, "do_sample": True, "disable_compile": True}
        for seed in invalid_inputs.EXTREME_SEEDS:
            one, two = (pair(NAME)[1].generate(IDS, **sampling, seed=seed) for _ in range(2))
            assert np.array_equal(getattr(one, "sequences", one), getattr(two, "sequences", two))

    def test_caches_that_do_not_fit_raise(self, pair: Pair) -> None:
        model = pair(NAME)[1]
        past = model(IDS, past_key_values=model.init_cache(2, 8)).past_key_values
        with pytest.raises(
            ValueError, match="the cache has room for 8 tokens: 6 are cached and the input has 6"
        ):
            model(IDS, past_key_values=past)
        with pytest.raises(ValueError, match="past_key_values hold 2 rows, and the input has 1"):
            model(IDS[:1], past_key_values=past)
        with pytest.raises(ValueError, match=r"cached tokens included, got \(2, 1\)"):
            model(IDS[:, :1], past_key_values=past, attention_mask=np.ones((2, 1)))
        with pytest.raises(ValueError, match="past_key_values must hold 2 layers, got 1"):
            model(IDS[:, :1], past_key_values=replace(past, keys=past.keys[:1], values=past.values[:1]))
        bidirectional = pair("MPNetModel")[1]
        with pytest.raises(ValueError, match="a bidirectional model has no cache"):
            bidirectional(IDS, past_key_values=past)
        with pytest.raises(ValueError, match="a bidirectional model has no cache"):
            bidirectional.init_cache(2, 8)

    # ------------------------------------------------------------------------ configs and files

    def test_problem_type_and_pad_token_id_are_read_at_each_call(self, pair: Pair) -> None:
        name = "MistralForSequenceClassification"
        theirs, model = pair(name, num_labels=4)
        given = inputs(name, "left")
        labels = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
        losses = []
        for kind in ("regression", "multi_label_classification"):
            model.config.problem_type = theirs.config.problem_type = kind
            losses.append(float(self.loss(model, numpy(given), labels.numpy())))
            assert_close(f"{kind}, set later", losses[-1], theirs(**given, labels=labels).loss, 1e-5)
        assert abs(losses[0] - losses[1]) > 0.01
        model.config.pad_token_id = None
        with pytest.raises(ValueError, match="no padding token is defined"):
            model(numpy(given)["input_ids"])

    def test_extra_tensors_and_fewer_layers(
        self, pair: Pair, tmp_path: Path, logs: pytest.LogCaptureFixture
    ) -> None:
        theirs, model = pair(NAME)
        theirs.save_pretrained(tmp_path / "saved")
        whole, short = check_strict(type(model), tmp_path / "saved", tmp_path, logs)
        expected = {key: x.detach().numpy() for key, x in theirs.hub_state_dict().items()}
        for loaded in (whole, short):
            state = loaded.hub_state_dict()
            found = {key: np.asarray(x() if callable(x) else x) for key, x in state.items()}
            assert found and all(np.array_equal(x, expected[key]) for key, x in found.items())
        assert whole.hub_state_dict().keys() == expected.keys()

    def test_a_config_larger_than_its_files_raises(self, tmp_path: Path) -> None:
        oversized_configs.check(getattr(monoblock, f"{self.prefix}MistralForCausalLM"), tmp_path)
