"""monoblock and transformers, which have the same interface."""

from __future__ import annotations

import importlib
from typing import Any

# Form of the weights -> dtype of the activations.
DTYPES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "int8": "bfloat16",
    "int4": "bfloat16",
    "lossless": "bfloat16",
}
GREEDY: dict[str, Any] = {"do_sample": False, "use_cache": True, "pad_token_id": 0}


def prepare(source: str, target: str, form: str) -> None:
    """Quantises and saves a model, like `monoblock quantize`."""
    from monoblock import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[form], quantization_config=form)
    model.save_pretrained(target)


class Backend:
    """`library` is the package of the classes."""

    def __init__(self, library: str) -> None:
        self.library = library
        self.model: Any = None
        self.optimizer: Any = None

    def start(self) -> None:
        """Imports the library and its auto class."""
        import torch

        self.torch = torch
        self.auto = importlib.import_module(self.library).AutoModelForCausalLM

    def import_class(self, name: str) -> None:
        """Imports the model's class."""
        getattr(importlib.import_module(self.library), name)

    def versions(self) -> dict[str, str]:
        """Versions by name."""
        from importlib.metadata import version

        found = {self.library: version(self.library), "torch": version("torch")}
        if self.library == "monoblock":
            found["native kernels"] = native_level()
        return found

    def load(self, folder: str, form: str) -> None:
        """Loads the model."""
        self.model = self.optimizer = None
        self.model = self.auto.from_pretrained(folder, dtype=DTYPES[form]).eval()
        self.model.generation_config.eos_token_id = None  # always generate `new` tokens

    def weight_bytes(self) -> int:
        """Bytes read for a token: all weights but an input embedding that is not tied to the head."""
        model = self.model
        candidates = (
            *model.parameters(),
            *(b for b in model.buffers() if b.dtype != self.torch.bool),
        )  # no masks
        tensors = {t.data_ptr(): t for t in candidates if t.numel()}
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        embedding = {t.data_ptr() for t in (*table.parameters(), *table.buffers())}
        if head is not None:
            embedding -= {t.data_ptr() for t in (*head.parameters(), *head.buffers())}
        return sum(t.numel() * t.itemsize for key, t in tensors.items() if key not in embedding)

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        return self._generate(prompts, new)[:, len(prompts[0]) :].tolist()

    def _generate(self, prompts: list[list[int]], new: int, **more: Any) -> Any:
        ids = self.torch.tensor(prompts)
        with self.torch.inference_mode():
            return self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), max_new_tokens=new, **GREEDY, **more
            )

    def step_logits(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], Any]:
        """The new tokens and their logits (batch, new, vocabulary)."""
        out = self._generate(prompts, new, return_dict_in_generate=True, output_logits=True)
        logits = self.torch.stack(out.logits, 1).float().numpy()
        return out.sequences[:, len(prompts[0]) :].tolist(), logits

    def logits(self, sequences: list[list[int]]) -> Any:
        """The logits (batch, tokens, vocabulary) of complete sequences."""
        with self.torch.inference_mode():
            return self.model(self.torch.tensor(sequences)).logits.float().numpy()

    def train(self, tokens: list[list[int]], form: str) -> None:
        """One step of AdamW on float32 weights; form "bfloat16": with autocast."""
        torch = self.torch
        if self.optimizer is None:
            self.model.train()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        ids = torch.tensor(tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "bfloat16"):
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def native_level() -> str:
    """The level of monoblock's native kernels in this process, or why they are not used."""
    from monoblock import native

    return native.status()
