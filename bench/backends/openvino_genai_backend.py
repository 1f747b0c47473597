"""OpenVINO GenAI, with models exported by optimum-intel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FORMS = ("float32", "bfloat16", "int8", "int4")


def prepare(source: str, target: str, form: str) -> None:
    """Exports a transformers folder; nncf quantises to int8 per channel or int4 in groups of 128, with embeddings and
    head in int8 (optimum's defaults)."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    four = {"bits": 4, "sym": False, "group_size": 128, "ratio": 1.0}
    wanted: dict[str, Any] = {
        "int8": {"quantization_config": OVWeightQuantizationConfig(bits=8, sym=False)},
        "int4": {"quantization_config": OVWeightQuantizationConfig(**four)},
    }.get(form, {"load_in_8bit": False})
    model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, **wanted)
    model.save_pretrained(target)  # no tokenizer: the benchmark uses token ids


class Backend:
    """A pipeline with defaults; "float32" also sets the arithmetic to float32."""

    def start(self) -> None:
        """Imports the libraries."""
        import numpy
        import openvino
        import openvino_genai

        self.numpy, self.openvino, self.genai = numpy, openvino, openvino_genai

    def versions(self) -> dict[str, str]:
        """Versions by name."""
        from importlib.metadata import version

        return {"openvino-genai": version("openvino-genai")}

    def load(self, folder: str, form: str) -> None:
        """Compiles the model."""
        hints = {"INFERENCE_PRECISION_HINT": "f32"} if form == "float32" else {}
        self.pipe = self.genai.LLMPipeline(folder, "CPU", **hints)
        self.size = Path(folder, "openvino_model.bin").stat().st_size

    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.size

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        ids = self.numpy.array(prompts, self.numpy.int64)
        inputs = self.genai.TokenizedInputs(
            self.openvino.Tensor(ids), self.openvino.Tensor(self.numpy.ones_like(ids))
        )
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        return [list(tokens) for tokens in self.pipe.generate(inputs, config).tokens]
