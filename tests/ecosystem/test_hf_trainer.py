"""transformers' Trainer: training, evaluation, checkpoints, resuming, saving."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import CAUSAL, FAMILIES, LANGUAGE, SEQUENCE, TEXTS, WAYS, Library, copied, equal_states, logits
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    default_data_collator,
)


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    """Arguments for four steps with batch size 2 on a CPU."""
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "max_steps": 4,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **more,
        }
    )


def tokenized(tokenizer: Any, labels: bool = False) -> Dataset:
    """A datasets.Dataset of ids and masks, and of classes 0 and 1."""
    rows = dict(tokenizer(TEXTS))
    rows.pop("token_type_ids", None)
    if labels:
        rows["labels"] = [i % 2 for i in range(len(TEXTS))]
    return Dataset.from_dict(rows)


def trainer(library: Library, name: str, folder: Path, tokenizer: Any = None, **more: Any) -> Trainer:
    """A Trainer of a language model."""
    tokenizer = library.tokenizer() if tokenizer is None else tokenizer
    data = tokenized(tokenizer)
    return Trainer(
        model=library.model(name),
        args=arguments(folder, **more),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


def losses(made: Trainer) -> list[float]:
    return [line["loss"] for line in made.state.log_history if "loss" in line]


# transformers' Trainer divides GPT-1's loss by another number of tokens than its model.
COUNTED = [family for family in FAMILIES if family != "openai-gpt"]


@pytest.mark.parametrize("family", COUNTED)
def test_train_and_evaluate(agree: Any, family: str, tmp_path: Path) -> None:
    """The Trainer passes num_items_in_batch only to models that accept it."""

    def run(library: Library) -> Any:
        made = trainer(library, LANGUAGE[family], tmp_path)
        made.train()
        return losses(made), made.evaluate()["eval_loss"], logits(made.model)

    history, _, _ = agree(run, 1e-3)  # four steps of AdamW, whose division amplifies the gradients' last bits
    assert history[-1] < history[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_is_the_models_own_loss(agree: Any, family: str, tmp_path: Path) -> None:
    """One batch of all texts: the Trainer's loss is the mean over the tokens, as the model's is."""

    def run(library: Library) -> Any:
        made = trainer(library, LANGUAGE[family], tmp_path, per_device_eval_batch_size=8)
        inputs = next(iter(made.get_eval_dataloader()))
        with torch.no_grad():
            own = made.model.eval()(**inputs).loss.item()
        if library.name == "monoblock" or family in COUNTED:
            assert math.isclose(made.evaluate()["eval_loss"], own, rel_tol=1e-6)
        return own

    agree(run)


@pytest.mark.parametrize("family", ["mpt", "mistral", "gpt_neo", "mpnet"])
def test_gradient_accumulation_counts_tokens(agree: Any, family: str, tmp_path: Path) -> None:
    """Steps of three unequal texts at once, and one after the other, have the same gradient for causal heads."""

    def run(library: Library) -> Any:
        found = []
        for rows, times in ((3, 1), (1, 3)):
            made = trainer(
                library,
                LANGUAGE[family],
                tmp_path,
                max_steps=2,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=times,
            )
            made.train()
            found.append(losses(made))
        # transformers' MPNet divides by the tokens of each text alone, which gives three times the loss.
        if family != "mpnet" or library.name == "monoblock":
            torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
        return found[:1] if family == "mpnet" else found

    agree(run, 1e-4)


@pytest.mark.parametrize("kind", ["transformers", "monoblock"])
def test_the_tokenizer_of_either_library(agree: Any, folders: Any, kind: str, tmp_path: Path) -> None:
    """As `processing_class`, with no collator given: saved beside the checkpoint."""
    tokenizer = Library(kind, folders).tokenizer()

    def run(library: Library) -> Any:
        data = tokenized(tokenizer, labels=True)
        made = Trainer(
            model=library.model(SEQUENCE["mistral"]),
            args=arguments(tmp_path / library.name, save_strategy="steps", save_steps=4),
            train_dataset=data,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        made.train()
        assert (tmp_path / library.name / "checkpoint-4" / "tokenizer.json").is_file()
        return losses(made)

    agree(run, 1e-3)


def test_our_tokenizer_is_enough(monoblock_library: Library, folders: Any, tmp_path: Path) -> None:
    """The Trainer chooses the padding collator for the tokenizers it knows; monoblock's must be one of them."""
    tokenizer = monoblock_library.tokenizer()
    made = Trainer(
        model=monoblock_library.model(SEQUENCE["mistral"]),
        args=arguments(tmp_path),
        train_dataset=tokenized(tokenizer, labels=True),
        processing_class=tokenizer,
    )
    made.train()
    assert len(losses(made)) == 4


@pytest.mark.parametrize("name", list(SEQUENCE.values()))
def test_classification_with_metrics(agree: Any, name: str, tmp_path: Path) -> None:
    """Predictions are logits without cache and hidden states (`keys_to_ignore_at_inference`)."""

    def run(library: Library) -> Any:
        tokenizer = library.tokenizer()
        data = tokenized(tokenizer, labels=True)
        seen = []

        def metrics(prediction: Any) -> dict[str, float]:
            seen.append(prediction.predictions)
            return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

        made = Trainer(
            model=library.model(name),
            args=arguments(tmp_path),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=metrics,
        )
        made.train()
        result = made.evaluate()
        assert seen[0].shape == (len(TEXTS), 2)
        return losses(made), result["eval_loss"], result["eval_accuracy"], torch.tensor(seen[0])

    agree(run, 1e-3)


@pytest.mark.parametrize("name", ["MistralForQuestionAnswering", "MPNetForQuestionAnswering"])
def test_labels_are_found_by_forward(agree: Any, name: str, tmp_path: Path) -> None:
    """The Trainer finds `start_positions` and `end_positions` in the signature of forward."""

    def run(library: Library) -> Any:
        ids = torch.randint(5, 200, (4, 12), generator=torch.Generator().manual_seed(0))
        rows = {"input_ids": ids, "start_positions": [1, 2, 3, 4], "end_positions": [3, 4, 5, 11]}
        data = Dataset.from_dict({k: v if isinstance(v, list) else v.tolist() for k, v in rows.items()})
        made = Trainer(
            model=library.model(name),
            args=arguments(tmp_path),
            train_dataset=data,
            eval_dataset=data,
            data_collator=default_data_collator,
        )
        assert made.label_names == ["start_positions", "end_positions"]
        made.train()
        return losses(made), made.evaluate()["eval_loss"]

    agree(run, 1e-3)


@pytest.mark.parametrize("reentrant", [True, False, None])
# transformers has none for GPT-1 and MPNet.
@pytest.mark.parametrize("family", ["mpt", "mistral", "fuyu", "gpt_neo"])
def test_gradient_checkpointing(agree: Any, family: str, reentrant: bool | None, tmp_path: Path) -> None:
    """Reentrant, non-reentrant and the Trainer's default: losses equal training without checkpointing."""

    def run(library: Library) -> Any:
        plain = trainer(library, LANGUAGE[family], tmp_path, max_steps=2)
        plain.train()
        kwargs = None if reentrant is None else {"use_reentrant": reentrant}
        made = trainer(
            library,
            LANGUAGE[family],
            tmp_path,
            max_steps=2,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs=kwargs,
        )
        assert made.model.supports_gradient_checkpointing
        made.train()
        assert made.model.is_gradient_checkpointing
        torch.testing.assert_close(losses(made), losses(plain), atol=1e-5, rtol=1e-5)
        return losses(made)

    agree(run, 1e-3)


# The names in transformers' file of a Fuyu are not those of its state dict: its Trainer loads none of them.
RESUMED = [family for family in FAMILIES if family != "fuyu"]


@pytest.mark.parametrize("family", FAMILIES)
def test_resuming(library: Library, family: str, tmp_path: Path) -> None:
    """Resuming after two of four steps gives bitwise the weights of an uninterrupted run."""
    if library.name == "transformers" and family not in RESUMED:
        pytest.skip("transformers does not resume it")
    name = LANGUAGE[family]
    straight = trainer(library, name, tmp_path, save_strategy="steps", save_steps=2, seed=1)
    straight.train()
    final = {k: v.clone() for k, v in straight.model.state_dict().items()}
    again = trainer(library, name, tmp_path, seed=1)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    assert losses(again) == losses(straight)
    equal_states(again.model.state_dict(), final)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("writer", "reader"), WAYS)
def test_checkpoints_move_between_libraries(
    folders: Any, writer: str, reader: str, family: str, tmp_path: Path
) -> None:
    """Checkpoints of the Trainer load in both libraries, are saved bitwise equal, and training resumes from them."""
    name, one, other = LANGUAGE[family], Library(writer, folders), Library(reader, folders)
    made = trainer(one, name, tmp_path, save_strategy="steps", save_steps=2)
    made.train()
    folder = tmp_path / "checkpoint-4"
    assert json.loads((folder / "config.json").read_text())["architectures"] == [name]
    stored = load_file(folder / "model.safetensors")
    opened = other.open(name, folder)
    equal_states(opened.state_dict(), made.model.state_dict())
    opened.save_pretrained(tmp_path / "back")
    if family != "fuyu":  # transformers writes the names of the first releases, monoblock the current ones
        equal_states(load_file(tmp_path / "back" / "model.safetensors"), stored)
    back = one.open(name, tmp_path / "back")
    equal_states(back.state_dict(), made.model.state_dict())

    if (family not in RESUMED and reader == writer) or family not in COUNTED:
        return
    again = trainer(other, name, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    # Two more steps of AdamW, whose division amplifies the gradients' last bits.
    torch.testing.assert_close(losses(again), losses(made), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_decay_of_norms_and_biases(agree: Any, family: str, tmp_path: Path) -> None:
    """The Trainer selects parameters for weight decay by name and module class."""

    def run(library: Library) -> Any:
        made = trainer(library, LANGUAGE[family], tmp_path)
        return sorted(made.get_decay_parameter_names(made.model))

    names = agree(run)
    assert names
    assert not [
        name for name in names if name.endswith("bias") or "norm" in name.rpartition(".")[0].split(".")[-1]
    ]


@pytest.mark.parametrize("family", [family for family in COUNTED if family in CAUSAL])
def test_model_init(agree: Any, family: str, tmp_path: Path) -> None:
    """`model_init` and bf16 training: parameters and predictions stay in float32."""

    def run(library: Library) -> Any:
        tokenizer = library.tokenizer()
        folder = library.folders(LANGUAGE[family])
        data = tokenized(tokenizer)
        made = Trainer(
            model_init=lambda: library.AutoModelForCausalLM.from_pretrained(folder),
            args=arguments(tmp_path, bf16=True, max_steps=2),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        made.train()
        assert {p.dtype for p in made.model.parameters()} == {torch.float32}
        out = made.predict(data)
        assert out.predictions.dtype == "float32"
        return losses(made)

    agree(run, 0.1)  # bfloat16 has 8 bits; losses are about 6


def test_save_model_and_hub_arguments(agree: Any, tmp_path: Path) -> None:
    """`save_model` writes a loadable folder with training arguments and tokenizer."""

    def run(library: Library) -> Any:
        made = trainer(library, "GPTNeoForCausalLM", tmp_path)
        folder = tmp_path / library.name
        made.save_model(str(folder))
        copied(folder, tmp_path / "copy")
        opened = library.open("GPTNeoForCausalLM", tmp_path / "copy")
        assert torch.equal(logits(opened), logits(made.model))
        return sorted(load_file(folder / "model.safetensors")), sorted(p.name for p in folder.iterdir())

    names, files = agree(run)
    assert "training_args.bin" in files
    assert "lm_head.weight" not in names  # tied
