"""LoRA adapters as models of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import server_models
from live_server import live

import monoblock
from monoblock.serving.server.registry import entries_of

BODY: dict[str, Any] = {"prompt": "the", "max_tokens": 8, "temperature": 0, "return_token_ids": True}


def test_adapters_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install peft"):
        entries_of([None], [], ["x=y"], {})


def test_an_adapter_is_a_model(tmp_path: Path) -> None:
    """Its answers are those of the base model with the adapter, and the base model's are its own."""
    peft = pytest.importorskip("peft")
    import torch

    base = server_models.tools_model(tmp_path / "base")
    model = monoblock.MistralForCausalLM.from_pretrained(base)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(20)
    model.save_pretrained(tmp_path / "adapter")
    with live(base, adapters=[f"tuned={tmp_path / 'adapter'}"]) as running:
        found = {entry["id"]: entry["adapter"] for entry in running.http.get("/v1/models").json()["data"]}
        assert found == {"base": False, "tuned": True}
        ids = running.ok("/tokenize", model="tuned", prompt="the")["tokens"]
        expected = model.eval().generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[
            0, len(ids) :
        ]
        tuned = running.ok("/v1/completions", model="tuned", **BODY)["choices"][0]["token_ids"]
        assert tuned == expected.tolist()
        assert running.ok("/v1/completions", model="base", **BODY)["choices"][0]["token_ids"] != tuned


def test_adapters_need_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    with pytest.raises(ValueError, match="is for someone/model"):
        entries_of([None, None], ["a", "b"], [f"x={tmp_path}"], {})
    with pytest.raises(ValueError, match="NAME=PATH"):
        entries_of([None], [], ["adapter"], {})
    assert [entry.name for entry in entries_of([None], ["a"], [f"x={tmp_path}"], {})] == ["a", "x"]
