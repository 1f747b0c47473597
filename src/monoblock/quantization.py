"""How to quantise weights while loading, by the hub's names."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(kw_only=True)
class BitsAndBytesConfig:
    """Weights of the blocks in 4 or 8 bits through bitsandbytes; embeddings, norms and heads stay as they are.

    `load_in_4bit` with `bnb_4bit_quant_type` "fp4" or "nf4" (arXiv:2305.14314), `bnb_4bit_compute_dtype` (None: the
    model's own), `bnb_4bit_use_double_quant`; or `load_in_8bit` with `llm_int8_threshold` (arXiv:2208.07339).
    `llm_int8_skip_modules`: names of modules, whole or their last part, that stay as they are.
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: Any = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: Any = None

    def __post_init__(self) -> None:
        if self.load_in_8bit == self.load_in_4bit:
            raise ValueError("BitsAndBytesConfig needs one of load_in_4bit=True and load_in_8bit=True")
        if self.bnb_4bit_quant_type not in ("fp4", "nf4"):
            raise ValueError(f"bnb_4bit_quant_type must be 'fp4' or 'nf4', got {self.bnb_4bit_quant_type!r}")
        for name in (
            "llm_int8_enable_fp32_cpu_offload",
            "llm_int8_has_fp16_weight",
            "bnb_4bit_quant_storage",
        ):
            if getattr(self, name) not in (False, None, "uint8"):
                raise ValueError(f"BitsAndBytesConfig.{name}={getattr(self, name)!r} is not supported")

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict."""
        return asdict(self)
