"""Attributes and methods of models, configs and tokenizers that other packages use, and transformers' objects as
arguments."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import outlines
import pytest
import torch
import transformers
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny import BARE, CAUSAL, FAMILIES, LANGUAGE, SEQUENCE, TEXTS, Library, batch, family_of, fields, logits
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding
from trl import SFTConfig, SFTTrainer

CLASSES = [*LANGUAGE.values(), *BARE.values(), *SEQUENCE.values()]


@pytest.mark.parametrize("name", CLASSES)
def test_attributes_of_models(agree: Any, name: str) -> None:
    """As read by peft, accelerate, trl and the Trainer; equal to transformers', or absent as there."""

    def run(library: Library) -> Any:
        model = library.model(name)
        absent = [
            "hf_device_map",
            "is_loaded_in_4bit",
            "is_loaded_in_8bit",
            "quantization_method",
            "hf_quantizer",
        ]
        named = {id(module): key for key, module in model.named_modules()}
        output = model.get_output_embeddings()
        splits = sorted(model._no_split_modules or [])
        # transformers' GPT-1 and MPNet have no _no_split_modules.
        named_by_both = family_of(name) not in ("openai-gpt", "mpnet")
        assert splits or library.name == "transformers"
        return {
            "absent": [key for key in absent if getattr(model, key, None) is not None],
            "none": [key for key in ("hf_device_map",) if hasattr(model, key)],
            "prefix": model.base_model_prefix,
            "base": named[id(model.base_model)],
            "input": named[id(model.get_input_embeddings())],
            "output": None if output is None else named[id(output)],
            "no split": splits if named_by_both else None,
            "main input": model.main_input_name,
            "generates": model.can_generate(),
            "checkpointing": model.supports_gradient_checkpointing or "MPNet" in name or "OpenAIGPT" in name,
            "tied": dict(sorted(model.all_tied_weights_keys.items())),
            "framework": model.framework if hasattr(model, "framework") else "pt",
            "folder": str(model.config._name_or_path) == str(model.name_or_path),
            "parameters": model.num_parameters(),
            "trainable": model.num_parameters(only_trainable=True, exclude_embeddings=True),
            "dtype": str(model.dtype),
            "device": str(model.device),
        }

    agree(run)


@pytest.mark.parametrize("family", CAUSAL)
def test_calls_of_the_decoder(agree: Any, family: str) -> None:
    """trl computes losses from the hidden states of `get_decoder()`."""

    def run(library: Library) -> Any:
        model = library.model(LANGUAGE[family])
        with torch.no_grad():
            hidden = model.get_decoder()(**batch()).last_hidden_state
            scores = model(**batch()).logits
        torch.testing.assert_close(model.get_output_embeddings()(hidden), scores, atol=1e-5, rtol=1e-5)
        return hidden * batch()["attention_mask"][..., None]

    agree(run)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_type_and_function(agree: Any, family: str) -> None:
    """The Trainer compares `loss_type` with the name of transformers' causal loss."""

    def run(library: Library) -> Any:
        model = library.model(LANGUAGE[family])
        assert callable(model.loss_function)
        if family in CAUSAL and (family != "openai-gpt" or library.name == "monoblock"):
            assert model.loss_type == "ForCausalLM"
        scores = torch.randn(2, 9, 280, generator=torch.Generator().manual_seed(0))
        labels = torch.randint(0, 280, (2, 9), generator=torch.Generator().manual_seed(1))
        found = [model.loss_function(scores, labels, vocab_size=280)]
        if family in CAUSAL:
            found.append(model.loss_function(scores, labels, vocab_size=280, num_items_in_batch=30))
        return found

    agree(run)


@pytest.mark.parametrize("family", CAUSAL)
def test_prepare_inputs_for_generation(agree: Any, family: str) -> None:
    def run(library: Library) -> Any:
        model = library.model(LANGUAGE[family])
        prepared = model.prepare_inputs_for_generation(**batch("left"), past_key_values=None, use_cache=True)
        return torch.equal(prepared["input_ids"], batch("left")["input_ids"]), "attention_mask" in prepared

    agree(run)


def test_small_methods(agree: Any) -> None:
    def run(library: Library) -> Any:
        model = library.model("MistralForCausalLM")
        model.add_model_tags(["one", "two"])
        model.add_model_tags("three")
        model.enable_input_require_grads()
        first = model.get_input_embeddings()(torch.tensor([[5]])).requires_grad
        for p in model.parameters():
            p.requires_grad_(False)
        model.disable_input_require_grads()
        second = model.get_input_embeddings()(torch.tensor([[5]])).requires_grad
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        on = model.is_gradient_checkpointing
        model.gradient_checkpointing_disable()
        model.warn_if_padding_and_no_attention_mask(batch()["input_ids"], None)
        assert callable(model.push_to_hub)
        assert callable(type(model).register_for_auto_class)
        ids = model.dummy_inputs["input_ids"]
        assert model(ids).logits.shape[:2] == ids.shape
        assert dict(model.tp_plan or {}) == dict(library.model("MistralForCausalLM").tp_plan or {})
        return model.model_tags, first, second, on, model.is_gradient_checkpointing

    agree(run)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_and_pipeline_plans(agree: Any, family: str) -> None:
    def run(library: Library) -> Any:
        model = library.model(LANGUAGE[family])
        config = model.config
        plans = [model.tp_plan, model.pp_plan, config.base_model_tp_plan, config.base_model_pp_plan]
        return [dict(sorted((plan or {}).items())) for plan in plans]

    agree(run)


@pytest.mark.parametrize("family", FAMILIES)
def test_attributes_of_configs(agree: Any, family: str) -> None:
    def run(library: Library) -> Any:
        config = library.AutoConfig.from_pretrained(library.folders(LANGUAGE[family]))
        text = config.get_text_config()
        assert text is config or family == "fuyu"
        assert not getattr(config, "is_encoder_decoder", False)
        assert copy.deepcopy(config).to_dict() == config.to_dict()
        return {
            "text": text.vocab_size,
            "decoder": config.get_text_config(decoder=True).vocab_size,
            # transformers' Fuyu config is nested; monoblock's is flat, like the files.
            "in": [family == "fuyu" or key in config for key in ("vocab_size", "num_hidden_layers")],
            "not in": "no such field" in config,
            # As in the Trainer.
            "ignored": list(getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])),
            "type": config.model_type,
            "hidden": text.hidden_size,
            "layers": text.num_hidden_layers,
            "heads": text.num_attention_heads,
            "missing": getattr(config, "quantization_config", None),
            "architectures": config.architectures,
        }

    agree(run)


@pytest.mark.parametrize("family", CAUSAL)
def test_from_config_with_options(agree: Any, family: str) -> None:
    def run(library: Library) -> Any:
        config = library.AutoConfig.from_pretrained(library.folders(LANGUAGE[family]))
        made = library.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager", trust_remote_code=False
        )
        again = getattr(library, LANGUAGE[family])._from_config(config, dtype=torch.float32)
        found = {str(p.dtype) for p in made.parameters()}, {str(p.dtype) for p in again.parameters()}
        return (*map(sorted, found), made.config._attn_implementation, type(made).__name__)

    assert agree(run)[0] == ["torch.bfloat16"]


@pytest.mark.parametrize("family", FAMILIES)
def test_models_from_transformers_configs(monoblock_library: Library, family: str) -> None:
    """Equal to models from monoblock's configs."""
    name = LANGUAGE[family]
    cls = getattr(transformers, name)
    config = cls.config_class(**fields(name))
    model = getattr(monoblock_library, name)(config).eval()
    model.load_state_dict(monoblock_library.model(name).state_dict(), strict=True)
    assert torch.equal(logits(model), logits(monoblock_library.model(name)))


@pytest.mark.parametrize("family", ["mistral", "mpt", "gpt_neo"])
def test_generation_objects_of_transformers(agree: Any, family: str) -> None:
    """GenerationConfig, DynamicCache, logits processors, stopping criteria and streamers of transformers."""

    class Favourite(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.clone()
            scores[:, 42] += 30.0
            return scores

    class Long(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 27)

    def run(library: Library) -> Any:
        model = library.model(LANGUAGE[family])
        config = transformers.GenerationConfig(
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=1,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        out = model.generate(
            **batch("left"),
            generation_config=config,
            logits_processor=transformers.LogitsProcessorList([Favourite()]),
            stopping_criteria=transformers.StoppingCriteriaList([Long()]),
        )
        assert out.sequences.shape == (3, 27)
        assert (out.sequences[:, 21:] == 42).any()

        cache = transformers.DynamicCache()
        ids = batch("none")["input_ids"]
        with torch.no_grad():
            first = model(ids[:, :12], past_key_values=cache, use_cache=True).logits
            second = model(ids[:, 12:], past_key_values=cache, use_cache=True).logits
            whole = model(ids).logits
        torch.testing.assert_close(torch.cat((first, second), 1), whole, atol=2e-5, rtol=1e-5)
        assert cache.get_seq_length() == ids.shape[1]
        return out.sequences

    agree(run)


IMPORTED = (
    "GenerationConfig",
    "LogitsProcessor",
    "LogitsProcessorList",
    "StoppingCriteriaList",
    "DynamicCache",
    "set_seed",
    "MistralPreTrainedModel",
    "MptPreTrainedModel",
    "GPTNeoPreTrainedModel",
    "MPNetPreTrainedModel",
    "OpenAIGPTPreTrainedModel",
    "FuyuPreTrainedModel",
)


def test_names_that_scripts_import(library: Library) -> None:
    for name in IMPORTED:
        assert getattr(library, name) is not None, name
    library.set_seed(3)
    first = torch.rand(2)
    library.set_seed(3)
    assert torch.equal(first, torch.rand(2))
    assert issubclass(library.MistralForCausalLM, library.MistralPreTrainedModel)
    assert issubclass(library.MistralPreTrainedModel, library.PreTrainedModel)


def test_more_arguments_of_from_pretrained(library: Library, folders: Any, tmp_path: Path) -> None:
    """Arguments passed by lm-eval, trl and scripts have an effect."""
    folder = folders("MistralForCausalLM")
    state = {key: 2 * x for key, x in library.model("MistralForCausalLM").state_dict().items()}
    doubled = library.MistralForCausalLM.from_pretrained(
        None, config=library.AutoConfig.from_pretrained(folder), state_dict=state
    )
    assert all(torch.equal(x, state[key]) for key, x in doubled.state_dict().items())
    made = library.AutoModelForCausalLM.from_pretrained(
        folder,
        revision="main",
        code_revision=None,
        trust_remote_code=False,
        max_memory=None,
        offload_folder=str(tmp_path),
        low_cpu_mem_usage=True,
        use_safetensors=True,
    ).eval()
    assert torch.equal(logits(made), logits(library.model("MistralForCausalLM")))
    variant = tmp_path / "variant"
    made.save_pretrained(variant, variant="fp32")
    assert (variant / "model.fp32.safetensors").is_file()
    again = library.AutoModelForCausalLM.from_pretrained(variant, variant="fp32").eval()
    assert torch.equal(logits(again), logits(made))


@pytest.mark.parametrize("how", ["int4", "int8", "lossless"])
def test_quantised_folders_are_refused_by_transformers(
    monoblock_library: Library, how: str, tmp_path: Path
) -> None:
    """Otherwise it would ignore the weights and initialise others at random."""
    folder = monoblock_library.folders("MistralForCausalLM", hidden_size=512, intermediate_size=512)
    packed = monoblock_library.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.bfloat16
    )
    packed.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith(".codes") for name in names)
    (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere")
    for cls in (transformers.AutoModelForCausalLM, transformers.MistralForCausalLM, transformers.AutoModel):
        with pytest.raises(ValueError, match=r"quantization config .* has no `quant_method`"):
            cls.from_pretrained(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "model.safetensors")
    again = monoblock_library.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(packed))


def rows(tokenizer: Any) -> list[dict[str, Any]]:
    return [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS[:3]]


def test_data_collators(agree: Any) -> None:
    def run(library: Library) -> Any:
        tokenizer = library.tokenizer()
        padded = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)(rows(tokenizer))
        causal = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows(tokenizer))
        masked = DataCollatorForLanguageModeling(tokenizer, mlm=True, seed=0)(rows(tokenizer))
        found = [dict(sorted(x.items())) for x in (padded, causal, masked)]
        return [{key: x for key, x in part.items() if key != "token_type_ids"} for part in found]

    agree(run)


def test_datasets_map(agree: Any) -> None:
    """The tokenizer is called in batches, hashed for the cache and pickled for workers."""

    def run(library: Library) -> Any:
        tokenizer = library.tokenizer()
        data = Dataset.from_dict({"text": TEXTS})
        mapped = data.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]}, batched=True)
        return mapped["input_ids"][:]

    agree(run)


def _sft(library: Library, tokenizer: Any, folder: Path) -> Any:
    return SFTTrainer(
        model=library.model("MistralForCausalLM"),
        args=SFTConfig(
            output_dir=str(folder), max_steps=1, report_to="none", use_cpu=True, bf16=False, max_length=64
        ),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    ).train()


def _embed(library: Library, tokenizer: Any, folder: Path) -> Any:
    transformer = Transformer(str(library.folders("MPNetModel")))
    transformer.processor = tokenizer
    made = SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu")
    return made.encode(TEXTS)


TOOLS = {
    "trl": _sft,
    "outlines": lambda library, tokenizer, folder: outlines.from_transformers(
        library.model("MistralForCausalLM"), tokenizer
    )("the", outlines.regex("[0-9]{2}"), max_new_tokens=4),
    "lm_eval": lambda library, tokenizer, folder: HFLM(
        pretrained=library.model("MistralForCausalLM"), tokenizer=tokenizer, device="cpu"
    ).tok_encode("the cat"),
    "sentence_transformers": _embed,
}


@pytest.mark.parametrize("tool", TOOLS)
def test_packages_that_check_the_tokenizer_class(library: Library, tool: str, tmp_path: Path) -> None:
    """They require an instance of transformers' tokenizer class."""
    TOOLS[tool](library, library.tokenizer(), tmp_path)
