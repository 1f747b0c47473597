"""monoblock: one transformer block, six model families, three frameworks.

Public names are imported lazily: `import monoblock` loads no framework, `from monoblock import MptForCausalLM` loads
PyTorch. `from monoblock import *` imports the names of installed frameworks.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

# Public name -> module, except for the model classes, which are created from the families' tables.
_HOME: dict[str, str] = {
    "AutoConfig": "monoblock.auto",
    "AutoImageProcessor": "monoblock.processing",
    "AutoProcessor": "monoblock.processing",
    "FuyuBatchEncoding": "monoblock.processing",
    "FuyuImageProcessor": "monoblock.processing",
    "FuyuProcessor": "monoblock.processing",
    "AutoTokenizer": "monoblock.tokenization",
    "BatchEncoding": "monoblock.tokenization",
    "BitsAndBytesConfig": "monoblock.quantization",
    "WeightOnlyConfig": "monoblock.quantization",
    "GPT2Tokenizer": "monoblock.tokenization",
    "GPT2TokenizerFast": "monoblock.tokenization",
    "GPTNeoXTokenizerFast": "monoblock.tokenization",
    "LlamaTokenizer": "monoblock.tokenization",
    "LlamaTokenizerFast": "monoblock.tokenization",
    "MPNetTokenizer": "monoblock.tokenization",
    "MPNetTokenizerFast": "monoblock.tokenization",
    "OpenAIGPTTokenizer": "monoblock.tokenization",
    "OpenAIGPTTokenizerFast": "monoblock.tokenization",
    "PreTrainedTokenizerFast": "monoblock.tokenization",
    "AsyncTextIteratorStreamer": "monoblock.generation",
    "GenerationConfig": "monoblock.generation",
    "LogitsProcessor": "monoblock.generation",
    "LogitsProcessorList": "monoblock.generation",
    "StoppingCriteria": "monoblock.generation",
    "StoppingCriteriaList": "monoblock.generation",
    "TextIteratorStreamer": "monoblock.generation",
    "TextStreamer": "monoblock.generation",
    "ModelOutput": "monoblock.outputs",
    "MptAttentionConfig": "monoblock.families.mpt_options",
    "MptConfig": "monoblock.families.mpt",
    "FuyuConfig": "monoblock.families.fuyu",
    "GPTNeoConfig": "monoblock.families.gpt_neo",
    "MPNetConfig": "monoblock.families.mpnet",
    "MistralConfig": "monoblock.families.mistral",
    "OpenAIGPTConfig": "monoblock.families.openai_gpt",
    "PretrainedConfig": "monoblock.config",
    "pipeline": "monoblock.pipelines",
    "CrossEncoder": "monoblock.embeddings",
    "SentenceTransformer": "monoblock.embeddings",
    "set_seed": "monoblock.seeds",
    "LLM": "monoblock.serving.llm",
    "SamplingParams": "monoblock.serving.engine.params",
    "CheckpointError": "monoblock.errors",
    "HubError": "monoblock.errors",
    "MissingKeys": "monoblock.errors",
    "ShapeMismatch": "monoblock.errors",
    "UnexpectedKeys": "monoblock.errors",
    "UnreadKeys": "monoblock.errors",
    "UnsupportedConfig": "monoblock.errors",
    "Cache": "monoblock.backends.pytorch.cache",
    "DynamicCache": "monoblock.backends.pytorch.cache",
    "StaticCache": "monoblock.backends.pytorch.cache",
    "QuantizedCache": "monoblock.backends.pytorch.generation.quantized_cache",
    "PreTrainedModel": "monoblock.backends.pytorch.pretrained",
    "AutoModel": "monoblock.auto",
    "AutoModelForCausalLM": "monoblock.auto",
    "AutoModelForImageTextToText": "monoblock.auto",
    "AutoModelForMaskedLM": "monoblock.auto",
    "AutoModelForMultipleChoice": "monoblock.auto",
    "AutoModelForQuestionAnswering": "monoblock.auto",
    "AutoModelForSequenceClassification": "monoblock.auto",
    "AutoModelForTokenClassification": "monoblock.auto",
    "FlaxPreTrainedModel": "monoblock.backends.flax.pretrained",
    "FlaxBaseModelOutput": "monoblock.backends.flax.outputs",
    "FlaxBaseModelOutputWithPast": "monoblock.backends.flax.outputs",
    "FlaxBaseModelOutputWithPastAndCrossAttentions": "monoblock.backends.flax.outputs",
    "FlaxBaseModelOutputWithPooling": "monoblock.backends.flax.outputs",
    "FlaxCausalLMOutput": "monoblock.backends.flax.outputs",
    "FlaxCausalLMOutputWithCrossAttentions": "monoblock.backends.flax.outputs",
    "FlaxOpenAIGPTDoubleHeadsModelOutput": "monoblock.backends.flax.outputs",
    "FlaxMaskedLMOutput": "monoblock.backends.flax.outputs",
    "FlaxMultipleChoiceModelOutput": "monoblock.backends.flax.outputs",
    "FlaxQuestionAnsweringModelOutput": "monoblock.backends.flax.outputs",
    "FlaxSequenceClassifierOutput": "monoblock.backends.flax.outputs",
    "FlaxTokenClassifierOutput": "monoblock.backends.flax.outputs",
    "FlaxAutoModel": "monoblock.auto",
    "FlaxAutoModelForCausalLM": "monoblock.auto",
    "FlaxAutoModelForImageTextToText": "monoblock.auto",
    "FlaxAutoModelForMaskedLM": "monoblock.auto",
    "FlaxAutoModelForMultipleChoice": "monoblock.auto",
    "FlaxAutoModelForQuestionAnswering": "monoblock.auto",
    "FlaxAutoModelForSequenceClassification": "monoblock.auto",
    "FlaxAutoModelForTokenClassification": "monoblock.auto",
    "FlaxLogitsProcessor": "monoblock.backends.flax.processors",
    "FlaxLogitsProcessorList": "monoblock.backends.flax.processors",
    "FLAX_MODEL_MAPPING": "monoblock.auto",
    "FLAX_MODEL_FOR_CAUSAL_LM_MAPPING": "monoblock.auto",
    "FLAX_MODEL_FOR_MASKED_LM_MAPPING": "monoblock.auto",
    "FLAX_MODEL_FOR_MULTIPLE_CHOICE_MAPPING": "monoblock.auto",
    "FLAX_MODEL_FOR_QUESTION_ANSWERING_MAPPING": "monoblock.auto",
    "FLAX_MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "monoblock.auto",
    "FLAX_MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": "monoblock.auto",
    "TFPreTrainedModel": "monoblock.backends.tf.pretrained",
    "KerasMetricCallback": "monoblock.backends.tf.callbacks",
    "TFLogitsProcessor": "monoblock.backends.tf.processors",
    "TFLogitsProcessorList": "monoblock.backends.tf.processors",
    "TFBaseModelOutput": "monoblock.backends.tf.outputs",
    "TFBaseModelOutputWithPast": "monoblock.backends.tf.outputs",
    "TFBaseModelOutputWithPastAndCrossAttentions": "monoblock.backends.tf.outputs",
    "TFBaseModelOutputWithPooling": "monoblock.backends.tf.outputs",
    "TFCausalLMOutput": "monoblock.backends.tf.outputs",
    "TFCausalLMOutputWithCrossAttentions": "monoblock.backends.tf.outputs",
    "TFCausalLMOutputWithPast": "monoblock.backends.tf.outputs",
    "TFMaskedLMOutput": "monoblock.backends.tf.outputs",
    "TFMultipleChoiceModelOutput": "monoblock.backends.tf.outputs",
    "TFOpenAIGPTDoubleHeadsModelOutput": "monoblock.backends.tf.outputs",
    "TFQuestionAnsweringModelOutput": "monoblock.backends.tf.outputs",
    "TFSequenceClassifierOutput": "monoblock.backends.tf.outputs",
    "TFSequenceClassifierOutputWithPast": "monoblock.backends.tf.outputs",
    "TFTokenClassifierOutput": "monoblock.backends.tf.outputs",
    "TFAutoModel": "monoblock.auto",
    "TFAutoModelForCausalLM": "monoblock.auto",
    "TFAutoModelForImageTextToText": "monoblock.auto",
    "TFAutoModelForMaskedLM": "monoblock.auto",
    "TFAutoModelForMultipleChoice": "monoblock.auto",
    "TFAutoModelForQuestionAnswering": "monoblock.auto",
    "TFAutoModelForSequenceClassification": "monoblock.auto",
    "TFAutoModelForTokenClassification": "monoblock.auto",
}

# The model classes, without a framework prefix.
_CLASSES = (
    "FuyuForCausalLM",
    "GPTNeoForCausalLM",
    "GPTNeoForQuestionAnswering",
    "GPTNeoForSequenceClassification",
    "GPTNeoForTokenClassification",
    "GPTNeoModel",
    "MPNetForMaskedLM",
    "MPNetForMultipleChoice",
    "MPNetForQuestionAnswering",
    "MPNetForSequenceClassification",
    "MPNetForTokenClassification",
    "MPNetModel",
    "MistralForCausalLM",
    "MistralForQuestionAnswering",
    "MistralForSequenceClassification",
    "MistralForTokenClassification",
    "MistralModel",
    "MptForCausalLM",
    "MptForQuestionAnswering",
    "MptForSequenceClassification",
    "MptForTokenClassification",
    "MptModel",
    "OpenAIGPTDoubleHeadsModel",
    "OpenAIGPTForSequenceClassification",
    "OpenAIGPTLMHeadModel",
    "OpenAIGPTModel",
)

# The stems of the families' class names.
_STEMS = ("Fuyu", "GPTNeo", "MPNet", "Mistral", "Mpt", "OpenAIGPT")

# The model classes of each framework: module -> names.
_MODELS: dict[str, tuple[str, ...]] = {
    "monoblock.backends.pytorch.classes": _CLASSES,
    "monoblock.backends.flax.classes": tuple(f"Flax{name}" for name in _CLASSES),
    "monoblock.backends.tf.classes": tuple(f"TF{name}" for name in _CLASSES),
}

# Further classes of each family: module -> names.
_BASES_OF: dict[str, tuple[str, ...]] = {
    "monoblock.backends.pytorch.classes": tuple(f"{stem}PreTrainedModel" for stem in _STEMS),
    "monoblock.backends.flax.classes": tuple(f"Flax{stem}PreTrainedModel" for stem in _STEMS),
    "monoblock.backends.tf.classes": tuple(
        f"TF{stem}{ending}" for stem in _STEMS for ending in ("MainLayer", "PreTrainedModel")
    ),
}

# Subpackages that are imported on attribute access.
_PACKAGES = ("demo", "embeddings", "pipelines", "util", "utils")

# Module of a framework -> the pip extra that installs it.
_EXTRAS = {
    "torch": "torch",
    "jax": "jax",
    "flax": "jax",
    "tensorflow": "tf",
    "keras": "tf",
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"), "serve"),
    "ray": "ray",
}

_MADE = {name: module for table in (_MODELS, _BASES_OF) for module, names in table.items() for name in names}
_NAMES = frozenset([*_HOME, *_MADE])
# Module prefix -> the packages that must be installed for its names.
_FRAMEWORKS = {
    "monoblock.backends.pytorch.": ("torch",),
    "monoblock.backends.flax.": ("jax", "flax"),
    "monoblock.backends.tf.": ("tensorflow", "keras"),
}


def __getattr__(name: str) -> Any:
    if name == "__all__":  # used by `import *`, which must not fail if a framework is not installed
        return _available()
    if name in _PACKAGES:
        return importlib.import_module(f"monoblock.{name}")
    if (home := _HOME.get(name)) is not None:
        value = getattr(_load(home, name), name)
    elif home := next((module for module, names in _BASES_OF.items() if name in names), None):
        value = _load(home, name).make_base_class(name)
    elif (home := _MADE.get(name)) is not None:
        value = _load(home, name).make_class(name)
    else:
        raise AttributeError(f"module 'monoblock' has no attribute {name!r}")
    globals()[name] = value
    return value


def _available() -> list[str]:
    """The public names whose framework is installed, found without importing it."""
    from monoblock.installed import installed

    missing = tuple(stem for stem, needed in _FRAMEWORKS.items() if not all(map(installed, needed)))
    homes = {**_HOME, **_MADE}
    return sorted(name for name in _NAMES if not homes[name].startswith(missing))


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES, *_NAMES})


def _load(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (extra := extra_of(error.name)) is None:
            raise
        missing = (error.name or "").partition(".")[0]
        raise ImportError(
            f'monoblock.{name} needs {missing}, which is not installed: pip install "monoblock[{extra}]"'
        ) from error


def extra_of(module: str | None) -> str | None:
    """The pip extra that installs a framework's module; None for other modules."""
    return _EXTRAS.get((module or "").partition(".")[0])
