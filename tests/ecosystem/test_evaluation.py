"""lm-eval, outlines, sentence-transformers, Lightning, captum, torchao and transformers' pipelines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import lightning
import lm_eval
import outlines
import pytest
import torch
import transformers
from captum.attr import LayerIntegratedGradients
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny import LANGUAGE, TEXTS, Library, batch, labelled, logits


def tasks(folder: Path) -> list[dict[str, Any]]:
    """Multiple choice, log-likelihood and generation tasks on a local file."""
    rows = [
        {"question": "the cat", "choices": [" sat on the mat", " ran", " and"], "answer": 0, "text": " sat"},
        {
            "question": "a dog and",
            "choices": [" the", " a cat on the mat", " ran"],
            "answer": 1,
            "text": " a cat",
        },
        {"question": "on the", "choices": [" dog", " cat", " mat"], "answer": 2, "text": " mat"},
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
    }
    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    match = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    return [
        {
            **common,
            "task": "tiny_choice",
            "output_type": "multiple_choice",
            "doc_to_target": "answer",
            "doc_to_choice": "choices",
            "metric_list": [accuracy],
        },
        {
            **common,
            "task": "tiny_likelihood",
            "output_type": "loglikelihood",
            "doc_to_target": "{{text}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                accuracy,
            ],
        },
        {
            **common,
            "task": "tiny_generation",
            "output_type": "generate_until",
            "doc_to_target": "{{text}}",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 6},
            "metric_list": [match],
        },
    ]


def evaluated(model: Any, folder: Path, **more: Any) -> Any:
    manager = TaskManager(include_defaults=False)  # faster than indexing the default tasks
    result = lm_eval.simple_evaluate(
        model, tasks=tasks(folder), bootstrap_iters=0, task_manager=manager, **more
    )
    samples = {
        task: [
            [x if isinstance(x, str) else [float(y) for y in x] for x in sample["filtered_resps"]]
            for sample in rows
        ]
        for task, rows in result["samples"].items()
    }
    perplexity = result["results"]["tiny_likelihood"]["perplexity,none"]
    return samples, float(torch.tensor(perplexity).log())


@pytest.mark.parametrize("family", ["mistral", "mpt", "gpt_neo"])
def test_lm_eval_of_an_object(agree: Any, family: str, tmp_path: Path) -> None:
    def run(library: Library) -> Any:
        tokenizer = Library("transformers", library.folders).tokenizer()
        model = HFLM(
            pretrained=library.model(LANGUAGE[family]), tokenizer=tokenizer, device="cpu", batch_size=2
        )
        return evaluated(model, tmp_path)

    samples, _ = agree(run, 1e-4)
    assert len(samples["tiny_choice"]) == 3


@pytest.mark.parametrize("family", ["mistral", "gpt_neo"])
def test_lm_eval_by_name(agree: Any, family: str, tmp_path: Path) -> None:
    """Loading by lm-eval through the library's auto class."""

    def run(library: Library) -> Any:
        class Loaded(HFLM):
            AUTO_MODEL_CLASS = library.AutoModelForCausalLM

        model = Loaded(pretrained=str(library.folders(LANGUAGE[family])), device="cpu", batch_size=2)
        assert type(model.model) is getattr(library, LANGUAGE[family])
        return evaluated(model, tmp_path)

    agree(run, 1e-4)


def test_lm_eval_hf_model_with_an_object(agree: Any, tmp_path: Path) -> None:
    """`model="hf"` with model and tokenizer as arguments."""

    def run(library: Library) -> Any:
        given = {"pretrained": library.model("GPTNeoForCausalLM"), "tokenizer": library.tokenizer()}
        return evaluated("hf", tmp_path, model_args=given, device="cpu", batch_size=2)

    agree(run, 1e-4)


def test_lm_eval_of_a_saved_folder(agree: Any, tmp_path: Path) -> None:
    def run(library: Library) -> Any:
        folder = tmp_path / library.name
        library.model("MptForCausalLM").save_pretrained(folder)
        library.tokenizer().save_pretrained(folder)
        return evaluated(HFLM(pretrained=str(folder), device="cpu", batch_size=2), tmp_path)

    agree(run, 1e-4)


@pytest.mark.parametrize("family", ["mistral", "gpt_neo"])
def test_outlines(agree: Any, family: str) -> None:
    """A regular expression, and a choice."""

    def run(library: Library) -> Any:
        tokenizer = Library("transformers", library.folders).tokenizer()
        model = outlines.from_transformers(library.model(LANGUAGE[family]), tokenizer)
        number = model("the cat", outlines.regex(r"[0-9]{3}-[a-f]{2}"), max_new_tokens=12, do_sample=False)
        assert re.fullmatch(r"[0-9]{3}-[a-f]{2}", number)
        choice = model(
            "a dog", outlines.types.Choice(["cat", "mat", "dog"]), max_new_tokens=8, do_sample=False
        )
        assert choice in ("cat", "mat", "dog")
        return number, choice

    agree(run)


def test_outlines_by_name(agree: Any) -> None:
    """Model and tokenizer from the auto classes; a JSON schema."""

    def run(library: Library) -> Any:
        folder = library.folders("MptForCausalLM")
        model = outlines.from_transformers(
            library.AutoModelForCausalLM.from_pretrained(folder),
            library.AutoTokenizer.from_pretrained(folder),
        )
        schema = '{"type": "object", "properties": {"n": {"enum": [1, 23]}}, "required": ["n"]}'
        text = model("the cat", outlines.json_schema(schema), max_new_tokens=60, do_sample=False)
        assert json.loads(text)["n"] in (1, 23)
        return text

    agree(run)


def embedder(library: Library, pooling: str = "mean") -> SentenceTransformer:
    """A SentenceTransformer whose model is replaced by the library's."""
    transformer = Transformer(str(library.folders("MPNetModel")))
    width = transformer.get_embedding_dimension()
    made = SentenceTransformer(modules=[transformer, Pooling(width, pooling)], device="cpu")
    made[0].model = library.model("MPNetModel")
    return made


def test_sentence_embeddings(agree: Any, tmp_path: Path) -> None:
    def run(library: Library) -> Any:
        made = embedder(library)
        found = made.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True)
        made.save(str(tmp_path / library.name))
        again = SentenceTransformer(str(tmp_path / library.name), device="cpu")
        torch.testing.assert_close(
            again.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True), found
        )
        return found

    agree(run, 1e-6)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_sentence_transformer_trainer(agree: Any, accumulated: int, tmp_path: Path) -> None:
    def run(library: Library) -> Any:
        made = embedder(library)
        data = Dataset.from_dict({"anchor": TEXTS, "positive": [text[::-1] for text in TEXTS]})
        folder = tmp_path / library.name
        trainer = SentenceTransformerTrainer(
            model=made,
            args=SentenceTransformerTrainingArguments(
                output_dir=str(folder),
                per_device_train_batch_size=3,
                gradient_accumulation_steps=accumulated,
                max_steps=3,
                logging_steps=1,
                learning_rate=1e-2,
                save_strategy="steps",
                save_steps=3,
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=data,
            eval_dataset=data,
            loss=MultipleNegativesRankingLoss(made),
        )
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        again = SentenceTransformer(str(folder / "checkpoint-3"), device="cpu")
        vectors = made.encode(TEXTS, convert_to_tensor=True)
        torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True), vectors, atol=1e-5, rtol=1e-4)
        return losses, trainer.evaluate()["eval_loss"], vectors

    losses, _, _ = agree(run, 5e-3)
    assert losses[-1] < losses[0]


class Module(lightning.LightningModule):
    """A LightningModule of a language model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, inputs: Any, index: int) -> Any:
        loss = self.model(**inputs).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("family", ["mistral", "mpnet"])
def test_lightning(agree: Any, family: str, precision: str, tmp_path: Path) -> None:
    name = LANGUAGE[family]

    def run(library: Library) -> Any:
        module = Module(library.model(name).train())
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=True,
            default_root_dir=tmp_path,
        )
        rows = [labelled(name, seed=seed) for seed in range(3)]
        trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=None))
        file = tmp_path / f"{library.name}.ckpt"
        trainer.save_checkpoint(file)
        state = torch.load(file, weights_only=False)["state_dict"]
        fresh = library.model(name)
        fresh.load_state_dict({key.removeprefix("model."): x for key, x in state.items()}, strict=True)
        return module.losses, sorted(state)

    losses, _ = agree(run, 1e-3 if precision == "32-true" else 0.3)  # bfloat16 has 8 bits; losses are about 7
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", ["mistral", "mpt"])
def test_captum(agree: Any, family: str) -> None:
    """Layer integrated gradients of the token embedding, which add up to the difference of the outputs."""

    def run(library: Library) -> Any:
        model = library.model(LANGUAGE[family])
        ids = batch("none")["input_ids"]
        attribution = LayerIntegratedGradients(lambda x: model(x).logits[:, -1], model.get_input_embeddings())
        found = attribution.attribute(ids, baselines=torch.full_like(ids, 1), target=7, n_steps=16)
        return found.sum(-1)

    assert agree(run, 1e-3).abs().max() > 0.1


@pytest.mark.parametrize("family", ["mistral", "mpt", "gpt_neo"])
def test_torchao_int8(agree: Any, family: str) -> None:
    """After quantize_ the model generates and compiles."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def run(library: Library) -> Any:
        model = library.model(LANGUAGE[family])
        before = logits(model)
        quantize_(model, Int8WeightOnlyConfig())
        found = logits(model)
        assert 0 < (found - before).abs().max() < 2
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
        return found, model.generate(**batch("left"), **options)

    agree(run, 1e-3)


def test_cross_encoder(agree: Any) -> None:
    def run(library: Library) -> Any:
        made = CrossEncoder(
            str(library.folders("MPNetForSequenceClassification", num_labels=1)), device="cpu"
        )
        made[0].model = library.model("MPNetForSequenceClassification", num_labels=1)
        return made.predict(list(zip(TEXTS, TEXTS[::-1], strict=True)), convert_to_tensor=True)

    agree(run, 1e-5)


PIPELINES = {
    "text-generation": ("GPTNeoForCausalLM", TEXTS[0], {"max_new_tokens": 5, "do_sample": False}),
    "text-classification": ("MistralForSequenceClassification", TEXTS, {}),
    "token-classification": ("MPNetForTokenClassification", TEXTS[0], {}),
    "feature-extraction": ("MPNetModel", TEXTS[0], {}),
    "fill-mask": ("MPNetForMaskedLM", "the <mask> sat", {}),
}


@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines_of_transformers(agree: Any, task: str) -> None:
    name, given, options = PIPELINES[task]

    def run(library: Library) -> Any:
        tokenizer = Library("transformers", library.folders).tokenizer()
        made = transformers.pipeline(task, model=library.model(name), tokenizer=tokenizer, device="cpu")
        return made(given, **options)

    agree(run, 1e-4)
