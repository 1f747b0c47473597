"""Small models with random weights for the server's tests: one that knows tools, vectors, scores, and images."""

from __future__ import annotations

from pathlib import Path

import embedding_models
import fuyu_tokenizer
import tiny_families
from helpers import randomised
from text_tokenizers import byte_level
from tokenizers import processors

import monoblock
from monoblock import FuyuImageProcessor, FuyuProcessor, PreTrainedTokenizerFast
from monoblock.embeddings.modules import Pooling
from monoblock.embeddings.transformer import Transformer
from monoblock.tokenization import mistral

SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
           "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]")  # fmt: skip


def tools_model(folder: Path) -> Path:
    """A Mistral whose tokenizer has the special tokens and the template of Mistral's version 3."""
    backend = byte_level(" the", " a", "name", "arguments", '{"', '": "')
    backend.add_special_tokens(list(SPECIAL))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[3:]),
        chat_template=mistral.template(3),
        model_max_length=2048,
    )
    tokenizer.save_pretrained(folder)
    config = monoblock.MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    randomised(monoblock.MistralForCausalLM(config), 3).save_pretrained(folder)
    return folder


def vector_model(folder: Path) -> Path:
    """A sentence-transformers folder of an MPNet with mean pooling, and prompts."""
    embedding_models.write(folder / "plain", "MPNet")
    transformer = Transformer(str(folder / "plain"))
    model = monoblock.SentenceTransformer(
        modules=[transformer, Pooling(embedding_models.WIDTH, "mean")], prompts=embedding_models.PROMPTS
    )
    model.save_pretrained(str(folder / "vectors"))
    return folder / "vectors"


def score_model(folder: Path, labels: int) -> Path:
    """An MPNet with a classification head."""
    names = {index: f"label {index}" for index in range(labels)}
    return embedding_models.write(
        folder, "MPNet", "ForSequenceClassification", num_labels=labels, id2label=names,
        label2id={name: index for index, name in names.items()},
    )  # fmt: skip


def image_model(folder: Path) -> Path:
    """A Fuyu with its processor; patches of 4 x 4, images up to 20 x 24."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fuyu_tokenizer.backend(), **fuyu_tokenizer.SPECIAL)
    images = FuyuImageProcessor(patch_size={"height": 4, "width": 4}, size={"height": 20, "width": 24})
    processor = FuyuProcessor(images, tokenizer)
    fields = tiny_families.fields("fuyu", vocab_size=len(tokenizer), eos_token_id=2)
    fields["image_token_id"] = tokenizer.convert_tokens_to_ids("|SPEAKER|")
    fields["max_position_embeddings"] = 256
    tiny_families.monoblock_model("FuyuForCausalLM", **fields).save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
