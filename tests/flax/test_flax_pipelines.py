"""Pipelines on JAX: the contract; compiled shapes, pad tokens, wider compute dtypes, models without parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest
from contract.pipelines import PipelinesContract
from pipeline_checks import assert_equivalent
from tiny_families import fields
from tiny_pipelines import folder

import monoblock
from monoblock import AutoTokenizer, pipeline
from monoblock.backends.flax.pipeline_adapter import rounded
from monoblock.backends.flax.pretrained import forward

CPU = jax.devices("cpu")[0]


class TestPipelines(PipelinesContract):
    framework, prefix = "flax", "Flax"
    dtypes: ClassVar = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
    devices, cpu = (None, -1, 0, "cpu", "cpu:0", CPU), CPU
    invalid: ClassVar = {"needs a model with params": {"model_kwargs": {"_do_init": False}}}

    def weight_dtypes(self, model: Any) -> set[Any]:
        assert model.dtype == jnp.bfloat16
        return {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)}

    def test_ten_lengths_of_a_bucket_compile_once(self, classifier: str) -> None:
        pipe = pipeline("text-classification", classifier, framework="flax")
        before = forward._cache_size()
        for count in range(3, 13):
            pipe(" ".join(["dog"] * count))
        assert forward._cache_size() == before + 1
        for size in (1, 5, 6):  # batch sizes are rounded up: 5 to 6
            pipe(["the dog"] * 6, batch_size=size)
        assert forward._cache_size() == before + 2
        assert [rounded(rows) for rows in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]

    def test_without_a_mask_the_pad_id_marks_the_end(self, tmp_path: Path) -> None:
        """A mask of the bucket's padding alone would count a final pad token of the text."""
        path = str(folder(tmp_path, "MistralForSequenceClassification"))
        ours, theirs = (
            pipeline("text-classification", path, framework=framework, device=-1)
            for framework in ("flax", "pt")
        )
        for pipe in (ours, theirs):
            pipe.tokenizer.model_input_names = ["input_ids"]
        assert_equivalent(ours("the dog<pad>", top_k=None), theirs("the dog<pad>", top_k=None))
        assert_equivalent(ours("the dog<pad>", top_k=None), ours("the dog", top_k=None))

    def test_torch_dtype_of_model_kwargs(self, classifier: str, tmp_path: Path) -> None:
        pipeline(model=classifier, framework="flax", dtype="float16").save_pretrained(tmp_path)
        wide = pipeline(model=tmp_path, framework="flax", model_kwargs={"torch_dtype": "float32"})
        assert wide.dtype == jnp.float32

    def test_params_on_the_host_are_moved_to_the_device(self, classifier: str) -> None:
        model = monoblock.FlaxMPNetModel.from_pretrained(classifier)
        model.params = jax.device_get(model.params)
        assert pipeline(model=model, tokenizer=AutoTokenizer.from_pretrained(classifier)).device == CPU
        assert isinstance(jax.tree.leaves(model.params)[0], jax.Array)

    def test_model_without_params_raises(self, classifier: str) -> None:
        model = monoblock.FlaxMPNetModel(monoblock.MPNetConfig(**fields("mpnet")), _do_init=False)
        with pytest.raises(ValueError, match="needs a model with params"):
            pipeline(model=model, tokenizer=classifier)
