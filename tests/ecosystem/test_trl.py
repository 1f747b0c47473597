"""trl: SFT with and without packing, DPO, and reward modelling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import LANGUAGE, SEQUENCE, TEXTS, Library
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

COMMON = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}
CHATS = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in TEXTS]
PAIRS = {
    "prompt": ["the cat", "a dog", "the mat", "on the"],
    "chosen": [" sat on the mat", " ran", " ran on", " mat"],
    "rejected": [" ran and ran", " sat", " cat", " dog sat"],
}
# AdamW's normalisation amplifies rounding errors of the gradients.
ATOL = 2e-3


def history(trainer: Any, key: str = "loss") -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def sft(
    library: Library, family: str, folder: Path, rows: dict[str, Any], peft: Any = None, **more: Any
) -> Any:
    data = Dataset.from_dict(rows)
    return SFTTrainer(
        model=library.model(LANGUAGE[family]),
        args=SFTConfig(output_dir=str(folder), **{**COMMON, "max_length": 64, **more}),
        train_dataset=data,
        eval_dataset=data,
        processing_class=Library("transformers", library.folders).tokenizer(),
        peft_config=peft,
    )


@pytest.mark.parametrize("family", ["mistral", "mpt", "gpt_neo"])
def test_sft(agree: Any, family: str, tmp_path: Path) -> None:
    def run(library: Library) -> Any:
        trainer = sft(library, family, tmp_path, {"text": TEXTS})
        trainer.train()
        assert trainer.model.model_tags == ["trl", "sft"]
        return history(trainer), history(trainer, "mean_token_accuracy"), trainer.evaluate()["eval_loss"]

    losses, _, _ = agree(run, ATOL)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", ["mistral", "gpt_neo"])
def test_sft_of_conversations(agree: Any, family: str, tmp_path: Path) -> None:
    def run(library: Library) -> Any:
        trainer = sft(library, family, tmp_path, {"messages": CHATS}, max_length=128)
        trainer.train()
        return history(trainer)

    agree(run, ATOL)


def test_sft_with_an_adapter_and_gradient_checkpointing(agree: Any, tmp_path: Path) -> None:
    def run(library: Library) -> Any:
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
        trainer = sft(
            library,
            "mistral",
            tmp_path,
            {"text": TEXTS},
            config,
            gradient_checkpointing=True,
            learning_rate=0.05,
        )
        trainer.train()
        folder = tmp_path / library.name
        trainer.save_model(str(folder))
        assert (folder / "adapter_model.safetensors").is_file()
        return history(trainer)

    losses = agree(run, ATOL)
    assert losses[-1] != losses[0]


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "packing_strategy": "wrapped", "max_length": 40},
        {"packing": True, "max_length": 40},
        {"padding_free": True, "max_length": None},
    ],
    ids=["wrapped", "bfd", "padding_free"],
)
def test_packed_sft(agree: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """Rows hold several documents, which are separated by restarting position_ids only."""

    def run(library: Library) -> Any:
        trainer = sft(library, "mistral", tmp_path, {"text": TEXTS}, **options)
        batch = next(iter(trainer.get_train_dataloader()))
        if options.get("packing_strategy") != "wrapped":
            assert (batch["position_ids"] == 0).sum() > len(batch["input_ids"])
            assert "attention_mask" not in batch
        trainer.train()
        return history(trainer), {key: value for key, value in batch.items() if key != "labels"}

    agree(run, ATOL)


def dpo(
    library: Library, family: str, folder: Path, reference: bool = False, peft: Any = None, **more: Any
) -> Any:
    name = LANGUAGE[family]
    return DPOTrainer(
        model=library.model(name),
        ref_model=library.model(name) if reference else None,
        args=DPOConfig(output_dir=str(folder), **{**COMMON, "max_length": 64, **more}),
        train_dataset=Dataset.from_dict(PAIRS),
        eval_dataset=Dataset.from_dict(PAIRS),
        processing_class=Library("transformers", library.folders).tokenizer(),
        peft_config=peft,
    )


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no_reference"])
@pytest.mark.parametrize("family", ["mistral", "mpt", "gpt_neo"])
def test_dpo(agree: Any, family: str, reference: bool, tmp_path: Path) -> None:
    """Without a reference model trl loads the policy's folder from the config's `_name_or_path`."""

    def run(library: Library) -> Any:
        trainer = dpo(library, family, tmp_path, reference)
        trainer.train()
        rewards = history(trainer, "rewards/margins"), history(trainer, "logps/chosen")
        assert history(trainer)[0] == pytest.approx(0.6931, abs=1e-3)  # policy and reference are equal: log 2
        return history(trainer), rewards, trainer.evaluate()["eval_loss"]

    agree(run, ATOL)


def test_dpo_with_an_adapter(agree: Any, tmp_path: Path) -> None:
    """The reference is the policy with its adapter disabled."""

    def run(library: Library) -> Any:
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
        trainer = dpo(library, "mistral", tmp_path, peft=config, learning_rate=0.05)
        trainer.train()
        assert history(trainer)[0] == pytest.approx(0.6931, abs=1e-3)
        return history(trainer), history(trainer, "rewards/margins")

    agree(run, ATOL)


@pytest.mark.parametrize("family", ["mistral", "gpt_neo"])
def test_reward_model(agree: Any, family: str, tmp_path: Path) -> None:
    def run(library: Library) -> Any:
        trainer = RewardTrainer(
            model=library.model(SEQUENCE[family], num_labels=1),
            args=RewardConfig(output_dir=str(tmp_path), **COMMON, max_length=64),
            train_dataset=Dataset.from_dict(PAIRS),
            processing_class=Library("transformers", library.folders).tokenizer(),
        )
        trainer.train()
        return history(trainer), history(trainer, "margin")

    agree(run, ATOL)


def test_sft_of_a_saved_folder(library: Library, tmp_path: Path) -> None:
    """trl loads a folder saved by the library."""
    library.model("MistralForCausalLM").save_pretrained(tmp_path / "saved")
    trainer = SFTTrainer(
        model=str(tmp_path / "saved"),
        args=SFTConfig(output_dir=str(tmp_path / "run"), **COMMON, max_length=64),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=Library("transformers", library.folders).tokenizer(),
    )
    trainer.train()
    assert len(history(trainer)) == 3


# Rows of packed documents with restarting positions, as in padding-free training.
DOCUMENTS = (9, 5, 7)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [None, 6])
def test_packed_documents_are_separated_by_positions(
    agree: Any, folders: Any, implementation: str, window: int | None
) -> None:
    """The logits of three documents in one row equal those of three rows."""

    def run(library: Library) -> Any:
        name = "MistralForCausalLM"
        model = getattr(library, name).from_pretrained(
            folders(name, sliding_window=window), attn_implementation=implementation
        )
        ids = torch.randint(5, 200, (1, sum(DOCUMENTS)), generator=torch.Generator().manual_seed(0))
        positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
        with torch.no_grad():
            apart = torch.cat([model(part).logits for part in ids.split(DOCUMENTS, dim=1)], dim=1)
            # With a cache, transformers treats the positions as those of one document.
            together = model(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(together, apart, atol=2e-5, rtol=1e-5)
        return together

    agree(run, 2e-5)
