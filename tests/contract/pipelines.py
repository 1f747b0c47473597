"""The contract of pipelines: PyTorch's answers for every task, dtypes, devices, objects, and invalid settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pipeline_checks import CASES, NAMES, assert_equivalent, compare, image_outputs
from tiny_pipelines import TEXT, folder

import monoblock
from monoblock import AutoTokenizer, pipeline


class PipelinesContract:
    framework: str
    prefix: str
    # bfloat16, float16 and float32 of the framework.
    dtypes: ClassVar[dict[str, Any]]
    # Values of `device` that mean the CPU, and the `device` of the pipeline.
    devices: ClassVar[tuple[Any, ...]]
    cpu: Any
    # Class -> settings of its pipeline in `test_answers_equal_pytorchs`.
    settings: ClassVar[dict[str, dict[str, Any]]] = {}
    # Settings of the pipeline in `test_sampling_varies_unless_a_seed_is_given`.
    sampling: ClassVar[dict[str, Any]] = {}
    # As `REFUSED`, of this framework.
    invalid: ClassVar[dict[str, dict[str, Any]]] = {}

    def weight_dtypes(self, model: Any) -> set[Any]:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def classifier(cls, tmp_path_factory: pytest.TempPathFactory) -> str:
        """The folder of a text classifier."""
        return str(folder(tmp_path_factory.mktemp("labels"), "MPNetForSequenceClassification"))

    @pytest.mark.parametrize("case", CASES, ids=NAMES)
    def test_answers_equal_pytorchs(self, case: Any, tmp_path: Path) -> None:
        compare(case, self.framework, tmp_path, **self.settings.get(case[1], {}))

    def test_image_text_to_text(self, tmp_path: Path) -> None:
        assert_equivalent(*image_outputs(self.framework, tmp_path, disable_compile=True))

    def test_sampling_varies_unless_a_seed_is_given(self) -> None:
        options = {"max_new_tokens": 8, "return_full_text": False, **self.sampling}
        pipe = pipeline("text-generation", framework=self.framework, **options)
        assert type(pipe.model).__name__ == f"{self.prefix}MptForCausalLM"
        [[one], [other]] = pipe("def "), pipe("def ")
        assert one != other
        assert pipe("def ", seed=3) == pipe("def ", seed=3)

    @pytest.mark.parametrize("kind", ["name", "own", "torch"])
    def test_dtype_is_of_weights_and_computation(self, classifier: str, kind: str) -> None:
        half = self.dtypes["bfloat16"]
        given = {"name": "bfloat16", "own": half, "torch": torch.bfloat16}[kind]
        pipe = pipeline(model=classifier, framework=self.framework, dtype=given)
        assert pipe.dtype == half
        assert self.weight_dtypes(pipe.model) == {"bfloat16"}
        [label] = pipe("the dog")
        [expected] = pipeline(model=classifier, device=-1)("the dog")
        assert label["score"] == pytest.approx(expected["score"], abs=0.05)

    def test_default_dtype_is_that_of_the_checkpoint(self, classifier: str, tmp_path: Path) -> None:
        half = pipeline(model=classifier, framework=self.framework, torch_dtype="float16")
        half.save_pretrained(tmp_path)
        for dtype in ("auto", None):
            again = pipeline(model=tmp_path, framework=self.framework, dtype=dtype)
            assert again.dtype == self.dtypes["float16"]
            assert again("the dog") == half("the dog")

    def test_devices(self, classifier: str) -> None:
        for device in self.devices:
            pipe = pipeline(model=classifier, framework=self.framework, device=device)
            assert pipe.device == self.cpu, device

    def test_model_and_tokenizer_objects(self, classifier: str) -> None:
        model = getattr(monoblock, f"{self.prefix}MPNetModel").from_pretrained(classifier)
        pipe = pipeline(model=model, tokenizer=AutoTokenizer.from_pretrained(classifier))
        assert (pipe.task, pipe.model) == ("feature-extraction", model)
        assert pipe.dtype == self.dtypes["float32"]
        features = pipe(TEXT, truncation=True, return_tensors=True)
        assert type(features) is type(model(np.ones((1, 2), int)).last_hidden_state)
        assert features.dtype == self.dtypes["float32"]
        assert_equivalent(np.asarray(features).tolist(), pipe(TEXT, truncation=True))

    def test_invalid_settings_raise(self, classifier: str) -> None:
        model = getattr(monoblock, f"{self.prefix}MPNetModel").from_pretrained(classifier)
        other = {"model": model, "tokenizer": classifier, "framework": "pt"}
        quantized = {"quantization_config": {"load_in_8bit": True}}
        cases: dict[str, dict[str, Any]] = {
            "does not take device_map": {"device_map": "auto"},
            "does not take quantization_config": {"model_kwargs": quantized},
            "does not take attn_implementation": {"model_kwargs": {"attn_implementation": "sdpa"}},
            "device='gpu:3' is no device here": {"device": "gpu:3"},
            "there are 0 accelerators": {"device": 1},
            "dtype must be": {"dtype": "int8"},
            f"of framework='{self.framework}'": other,
            **self.invalid,
        }
        for message, settings in cases.items():
            with pytest.raises(ValueError, match=re.escape(message)):
                pipeline(**{"model": classifier, "framework": self.framework, **settings})
