"""peft: adapters of both libraries' models have the same names and values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import kill_points
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import CAUSAL, FAMILIES, LANGUAGE, SEQUENCE, TEXTS, WAYS, Library, batch, labelled, logits, steps

# The projections of q, k and v (fused or not) by transformers' names.
ATTENTION = {
    "mpt": ["Wqkv"],
    "mistral": ["q_proj", "k_proj", "v_proj"],
    "fuyu": ["query_key_value"],
    "openai-gpt": ["c_attn"],
    "gpt_neo": ["q_proj", "k_proj", "v_proj"],
    "mpnet": ["attn.q", "attn.k", "attn.v"],
}


def task_of(family: str) -> str:
    return "FEATURE_EXTRACTION" if family == "mpnet" else "CAUSAL_LM"


def adapted(library: Library, name: str, config: peft.PeftConfig) -> Any:
    """A model with a trained adapter, whose weights are not 0."""
    torch.manual_seed(0)
    model = get_peft_model(library.model(name), config)
    steps(model, name)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_q_k_v_by_name(agree: Any, family: str) -> None:
    name = LANGUAGE[family]

    def run(library: Library) -> Any:
        config = LoraConfig(target_modules=ATTENTION[family], r=4)
        model = get_peft_model(library.model(name), config)
        losses = steps(model, name, 3)
        state = peft.get_peft_model_state_dict(model)
        assert len(state) == 2 * 2 * len(ATTENTION[family])  # A and B, two layers
        return losses, state, logits(model)

    losses, _, _ = agree(run)
    assert losses[0] != losses[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_targets(agree: Any, family: str) -> None:
    """peft has default targets for the model types mpt, mistral and gpt_neo; for the others it raises an error."""
    name = LANGUAGE[family]

    def run(library: Library) -> Any:
        config = LoraConfig(task_type=task_of(family))
        try:
            model = get_peft_model(library.model(name), config)
        except ValueError as error:
            assert "target_modules" in str(error)
            return None
        return sorted(model.base_model.targeted_module_names)

    assert agree(run) or family in ("fuyu", "openai-gpt", "mpnet")


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_merges(agree: Any, family: str) -> None:
    """Two steps without task type, then a merge, which must not change the embedding of tied heads."""
    name = LANGUAGE[family]

    def run(library: Library) -> Any:
        config = LoraConfig(target_modules="all-linear", r=4)
        model = get_peft_model(library.model(name), config)
        plain = logits(library.model(name))
        losses = steps(model, name)
        targets = sorted(model.base_model.targeted_module_names)
        before = logits(model)
        assert (before - plain).abs().max() > 1e-2
        merged = model.merge_and_unload()
        # W + B A is rounded once more: half an ulp of logits of about 10, over two layers.
        assert (logits(merged) - before).abs().max() < 1e-5
        return targets, losses, before

    agree(run)


@pytest.mark.parametrize("family", CAUSAL)
def test_generation_with_an_adapter(agree: Any, family: str) -> None:
    name = LANGUAGE[family]

    def run(library: Library) -> Any:
        config = LoraConfig(target_modules=ATTENTION[family], task_type="CAUSAL_LM")
        model = adapted(library, name, config)
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
        return model.generate(**batch("left"), **options)

    assert agree(run).shape == (3, 29)


HEADS = {
    **dict.fromkeys(SEQUENCE.values(), "SEQ_CLS"),
    "MPNetForTokenClassification": "TOKEN_CLS",
    "MistralForTokenClassification": "TOKEN_CLS",
    "MistralForQuestionAnswering": "QUESTION_ANS",
    "GPTNeoForQuestionAnswering": "QUESTION_ANS",
}


@pytest.mark.parametrize("name", HEADS)
def test_the_classifier_is_trained_and_saved(agree: Any, name: str, tmp_path: Path) -> None:
    targets = ATTENTION[
        {v: k for k, v in SEQUENCE.items()}.get(name, "mpnet" if "MPNet" in name else "mistral")
    ]

    def run(library: Library) -> Any:
        folder = tmp_path / library.name
        config = LoraConfig(task_type=HEADS[name], target_modules=targets)
        model = get_peft_model(library.model(name), config)
        # The gradient of a span head's bias is 0 up to rounding, which AdamW would normalise.
        losses = steps(model, name, eps=1e-3 if HEADS[name] == "QUESTION_ANS" else 1e-8)
        model.save_pretrained(folder)
        after = logits(model)
        again = PeftModel.from_pretrained(library.model(name), folder)
        assert torch.equal(logits(again), after)
        return losses, load_file(folder / "adapter_model.safetensors"), after

    _, saved, _ = agree(run)
    kept = [key for key in saved if "lora" not in key]
    assert kept or HEADS[name] == "QUESTION_ANS"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("writer", "reader"), WAYS)
def test_adapters_move_between_libraries(
    folders: Any, writer: str, reader: str, family: str, tmp_path: Path
) -> None:
    name = LANGUAGE[family]
    config = LoraConfig(task_type=task_of(family), target_modules=ATTENTION[family])
    model = adapted(Library(writer, folders), name, config)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Library(reader, folders).model(name), tmp_path)
    # The kernels of the two libraries sum in different orders.
    atol = 0 if writer == reader else 1e-4
    torch.testing.assert_close(logits(again), logits(model), atol=atol, rtol=1e-5)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-5)


def adapter_folder(folders: Any, tmp_path: Path, seed: int = 0) -> Path:
    """A Mistral adapter trained with transformers, whose config has the folder of its base model."""
    library = Library("transformers", folders)
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = get_peft_model(library.model("MistralForCausalLM"), config)
    steps(model, "MistralForCausalLM", lr=0.05)
    folder = tmp_path / f"adapter-{seed}"
    model.save_pretrained(folder)
    return folder


def test_from_pretrained_loads_adapter_folders(agree: Any, folders: Any, tmp_path: Path) -> None:
    folder = adapter_folder(folders, tmp_path)

    def run(library: Library) -> Any:
        model = library.AutoModelForCausalLM.from_pretrained(folder)
        plain = library.model("MistralForCausalLM")
        assert (logits(model) - logits(plain)).abs().max() > 1e-2
        direct = library.MistralForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(model), logits(direct))
        return logits(model), peft.AutoPeftModelForCausalLM.from_pretrained(folder).peft_config["default"].r

    agree(run, 1e-4)


def test_load_add_and_set_adapters(agree: Any, folders: Any, tmp_path: Path) -> None:
    one, two = adapter_folder(folders, tmp_path, 1), adapter_folder(folders, tmp_path, 2)

    def run(library: Library) -> Any:
        model = library.model("MistralForCausalLM")
        plain = logits(model)
        model.load_adapter(str(one), adapter_name="one")
        model.load_adapter(str(two), adapter_name="two")
        model.set_adapter("one")
        first = logits(model)
        assert model.active_adapters() == ["one"]
        model.set_adapter("two")
        second = logits(model)
        assert (first - second).abs().max() > 1e-2
        model.disable_adapters()
        assert torch.equal(logits(model), plain)
        model.enable_adapters()
        assert torch.equal(logits(model), second)
        model.add_adapter(LoraConfig(target_modules=["o_proj"]), adapter_name="three")
        assert torch.equal(logits(model), plain)  # B of a new adapter is 0
        model.set_adapter("two")
        model.save_pretrained(tmp_path / library.name)
        assert (tmp_path / library.name / "adapter_model.safetensors").is_file()
        again = PeftModel.from_pretrained(library.model("MistralForCausalLM"), tmp_path / library.name)
        assert torch.equal(logits(again), second)
        return first, second, sorted(model.get_adapter_state_dict("one"))

    agree(run, 1e-4)


PROMPTS = {
    "prompt": lambda **sizes: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **sizes),
    "p-tuning": lambda **sizes: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16, **sizes
    ),
    "prefix": lambda **sizes: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **sizes),
}
# peft does not find MPT's number of heads (`n_heads`).
SIZES = {"mpt": {"num_attention_heads": 4, "num_layers": 2, "token_dim": 32}}
# transformers' GPT-1 has no cache, and its MPNet and Fuyu none for peft's prefixes.
TUNED = [(kind, family) for kind in PROMPTS for family in ("mpt", "mistral", "gpt_neo")] + [
    ("prompt", "openai-gpt"),
    ("prompt", "fuyu"),
]


@pytest.mark.parametrize(("kind", "family"), TUNED)
def test_prompt_and_prefix_tuning(agree: Any, kind: str, family: str, tmp_path: Path) -> None:
    name = LANGUAGE[family]

    def run(library: Library) -> Any:
        model = get_peft_model(library.model(name), PROMPTS[kind](**SIZES.get(family, {})))
        losses = steps(model, name, lr=0.1)
        model.eval()
        with torch.no_grad():
            loss = model(**labelled(name)).loss
            options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
            out = model.generate(**batch("none"), **options)
        model.save_pretrained(tmp_path / library.name)
        again = PeftModel.from_pretrained(library.model(name), tmp_path / library.name).eval()
        with torch.no_grad():
            assert again(**labelled(name)).loss == loss
        return losses, loss, out

    losses, _, _ = agree(run)
    assert losses[0] != losses[1]


# Windows and ALiBi use distances that include padding.
FAR = {"mistral": {"sliding_window": None}, "gpt_neo": {"window_size": 64}, "openai-gpt": {}, "fuyu": {}}


@pytest.mark.parametrize(("kind", "family"), [(kind, family) for kind, family in TUNED if family in FAR])
def test_padding_after_a_learned_prompt(monoblock_library: Library, kind: str, family: str) -> None:
    """Rows of a padded batch equal single rows: padding between prompt and text takes no positions (in transformers it
    does)."""
    name = LANGUAGE[family]
    torch.manual_seed(0)
    model = get_peft_model(monoblock_library.model(name, **FAR[family]), PROMPTS[kind]())
    steps(model, name, lr=0.1)
    model.eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    left = batch("left")
    lengths = left["attention_mask"].sum(-1).tolist()
    alone = [left["input_ids"][i : i + 1, -length:] for i, length in enumerate(lengths)]
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in alone]
    padding = [21 - length for length in lengths]
    right = {
        key: torch.stack([row.roll(-count) for row, count in zip(x, padding, strict=True)])
        for key, x in left.items()
    }
    with torch.no_grad():
        for inputs, starts in ((left, padding), (right, [0, 0, 0])):
            scores = model(**inputs).logits[:, -21:]
            for row, own, start, length in zip(scores, rows, starts, lengths, strict=True):
                expected = model(**own).logits[0, -length:]
                torch.testing.assert_close(row[start : start + length], expected, atol=2e-5, rtol=1e-5)
        together = model.generate(**left, **options)[:, 21:]
        apart = [model.generate(**own, **options)[:, -4:] for own in rows]
    assert torch.equal(together, torch.cat(apart))


OTHERS = {
    "dora": LoraConfig(target_modules=["q_proj", "v_proj"], use_dora=True),
    "modules_to_save": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "all layers but one": LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]),
    "pattern": LoraConfig(target_modules=r".*\.mlp\.(gate|down)_proj"),
    "embedding": LoraConfig(target_modules=["embed_tokens", "q_proj"]),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "loha": peft.LoHaConfig(target_modules=["q_proj", "up_proj"]),
    "oft": peft.OFTConfig(target_modules=["q_proj", "o_proj"], oft_block_size=8),
    "layernorm": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_merge(agree: Any, kind: str) -> None:
    def run(library: Library) -> Any:
        model = get_peft_model(library.model("MistralForCausalLM"), OTHERS[kind])
        # Some gradients of the embedding and the head are rounding errors, which AdamW would normalise.
        losses = steps(model, "MistralForCausalLM", eps=1e-3 if kind == "modules_to_save" else 1e-8)
        before = logits(model)
        assert (logits(model.merge_and_unload()) - before).abs().max() < 1e-4
        return losses, before

    agree(run, 1e-4)


# bitsandbytes' CPU kernel for 4 bits needs rows of multiples of 64.
BLOCKS = {
    "mistral": {"hidden_size": 64, "intermediate_size": 128},
    "mpt": {"d_model": 64},
    "gpt_neo": {"hidden_size": 64, "intermediate_size": 128},
}


def training_logits(model: Any) -> torch.Tensor:
    """Logits in training mode, since in evaluation mode bitsandbytes repacks matrices on some CPUs."""
    model.train()
    with torch.no_grad():
        return model(**batch("none")).logits.float()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["mistral", "mpt", "gpt_neo"])
def test_lora_over_bitsandbytes_merges(agree: Any, folders: Any, family: str, bits: int) -> None:
    """QLoRA, with the same quantised weights in both libraries."""
    pytest.importorskip("bitsandbytes")
    name = LANGUAGE[family]

    def run(library: Library) -> Any:
        config = (
            library.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
            if bits == 4
            else library.BitsAndBytesConfig(load_in_8bit=True)
        )
        model = getattr(library, name).from_pretrained(
            folders(name, **BLOCKS[family]), quantization_config=config, dtype=torch.float32
        )
        assert model.is_loaded_in_4bit if bits == 4 else model.is_loaded_in_8bit
        assert model.is_quantized
        quantised = training_logits(model)
        plain = training_logits(library.model(name, **BLOCKS[family]))
        model = peft.prepare_model_for_kbit_training(model)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=ATTENTION[family]))
        losses = steps(model, name)
        before = training_logits(model)
        merged = model.merge_and_unload()
        # The merged matrices are quantised again, with a similar error.
        once = (quantised - plain).abs().mean()
        assert once > 0
        assert (training_logits(merged) - before).abs().mean() < 2 * once
        return losses, before, quantised

    agree(run, 1e-3 if bits == 4 else 2e-2)


def test_lora_on_monoblock_int8(monoblock_library: Library, folders: Any) -> None:
    """Adapters on monoblock's quantised matrices can be trained and disabled."""
    name = "MistralForCausalLM"
    model = getattr(monoblock_library, name).from_pretrained(folders(name), quantization_config="int8")
    quantised = logits(model)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    assert torch.equal(logits(model), quantised)
    losses = steps(model, name, 4)
    assert losses[-1] != losses[0]
    trained = logits(model)
    assert (trained - quantised).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), quantised)
    plain = get_peft_model(monoblock_library.model(name), LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert {k for k, p in plain.named_parameters() if p.requires_grad} == {
        k for k, p in model.named_parameters() if p.requires_grad
    }


def test_a_minimal_fine_tuning_script(agree: Any) -> None:
    """The loss decreases."""

    def run(library: Library) -> Any:
        tokenizer = library.tokenizer()
        inputs = dict(tokenizer(TEXTS[:3], return_tensors="pt", padding=True))
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        model = get_peft_model(library.model("MptForCausalLM"), LoraConfig(task_type="CAUSAL_LM"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        losses = []
        for _ in range(4):
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    losses = agree(run, 1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("more", [[], ["checkpoint-1"]])
def test_interrupted_save_of_an_adapter(tmp_path: Path, more: list[str]) -> None:
    """Config and weights are replaced atomically, with and without subfolders."""
    import monoblock

    adapted: dict[int, Any] = {}
    for rank in (1, 2):
        adapted[rank] = monoblock.MptForCausalLM(
            monoblock.MptConfig(d_model=8, n_heads=2, n_layers=2, vocab_size=16, max_seq_len=8)
        )
        adapted[rank].add_adapter(LoraConfig(r=rank, target_modules=["Wqkv"]))
    folder = tmp_path / "adapter"

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        adapted[1].save_pretrained(folder)
        for name in more:
            (folder / name).mkdir()

    prepare()
    for at in range(len(kill_points.operations(lambda: adapted[2].save_pretrained(folder)))):
        prepare()
        assert kill_points.interrupted(lambda: adapted[2].save_pretrained(folder), at)
        plain = monoblock.MptForCausalLM(adapted[1].config)
        plain.load_adapter(folder)
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        assert {min(x.shape) for x in load_file(folder / "adapter_model.safetensors").values()} == {rank}
