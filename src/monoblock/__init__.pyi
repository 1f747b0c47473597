"""Static view of monoblock's public names; written by tools/make_stubs.py."""

from typing import Any

from torch import Tensor

from monoblock.backends.tf.main_layer import MainLayer
from monoblock import (
    demo as demo,
    embeddings as embeddings,
    pipelines as pipelines,
    util as util,
    utils as utils,
)
from monoblock.outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    CausalLMOutput,
    CausalLMOutputWithCrossAttentions,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    OpenAIGPTDoubleHeadsModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from monoblock.auto import (
    AutoConfig as AutoConfig,
    AutoModel as AutoModel,
    AutoModelForCausalLM as AutoModelForCausalLM,
    AutoModelForImageTextToText as AutoModelForImageTextToText,
    AutoModelForMaskedLM as AutoModelForMaskedLM,
    AutoModelForMultipleChoice as AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering as AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification as AutoModelForSequenceClassification,
    AutoModelForTokenClassification as AutoModelForTokenClassification,
    FLAX_MODEL_FOR_CAUSAL_LM_MAPPING as FLAX_MODEL_FOR_CAUSAL_LM_MAPPING,
    FLAX_MODEL_FOR_MASKED_LM_MAPPING as FLAX_MODEL_FOR_MASKED_LM_MAPPING,
    FLAX_MODEL_FOR_MULTIPLE_CHOICE_MAPPING as FLAX_MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    FLAX_MODEL_FOR_QUESTION_ANSWERING_MAPPING as FLAX_MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    FLAX_MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as FLAX_MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    FLAX_MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING as FLAX_MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    FLAX_MODEL_MAPPING as FLAX_MODEL_MAPPING,
    FlaxAutoModel as FlaxAutoModel,
    FlaxAutoModelForCausalLM as FlaxAutoModelForCausalLM,
    FlaxAutoModelForImageTextToText as FlaxAutoModelForImageTextToText,
    FlaxAutoModelForMaskedLM as FlaxAutoModelForMaskedLM,
    FlaxAutoModelForMultipleChoice as FlaxAutoModelForMultipleChoice,
    FlaxAutoModelForQuestionAnswering as FlaxAutoModelForQuestionAnswering,
    FlaxAutoModelForSequenceClassification as FlaxAutoModelForSequenceClassification,
    FlaxAutoModelForTokenClassification as FlaxAutoModelForTokenClassification,
    TFAutoModel as TFAutoModel,
    TFAutoModelForCausalLM as TFAutoModelForCausalLM,
    TFAutoModelForImageTextToText as TFAutoModelForImageTextToText,
    TFAutoModelForMaskedLM as TFAutoModelForMaskedLM,
    TFAutoModelForMultipleChoice as TFAutoModelForMultipleChoice,
    TFAutoModelForQuestionAnswering as TFAutoModelForQuestionAnswering,
    TFAutoModelForSequenceClassification as TFAutoModelForSequenceClassification,
    TFAutoModelForTokenClassification as TFAutoModelForTokenClassification,
)
from monoblock.backends.flax.outputs import (
    FlaxBaseModelOutput as FlaxBaseModelOutput,
    FlaxBaseModelOutputWithPast as FlaxBaseModelOutputWithPast,
    FlaxBaseModelOutputWithPastAndCrossAttentions as FlaxBaseModelOutputWithPastAndCrossAttentions,
    FlaxBaseModelOutputWithPooling as FlaxBaseModelOutputWithPooling,
    FlaxCausalLMOutput as FlaxCausalLMOutput,
    FlaxCausalLMOutputWithCrossAttentions as FlaxCausalLMOutputWithCrossAttentions,
    FlaxMaskedLMOutput as FlaxMaskedLMOutput,
    FlaxMultipleChoiceModelOutput as FlaxMultipleChoiceModelOutput,
    FlaxOpenAIGPTDoubleHeadsModelOutput as FlaxOpenAIGPTDoubleHeadsModelOutput,
    FlaxQuestionAnsweringModelOutput as FlaxQuestionAnsweringModelOutput,
    FlaxSequenceClassifierOutput as FlaxSequenceClassifierOutput,
    FlaxTokenClassifierOutput as FlaxTokenClassifierOutput,
)
from monoblock.backends.flax.pretrained import (
    FlaxPreTrainedModel as FlaxPreTrainedModel,
)
from monoblock.backends.flax.processors import (
    FlaxLogitsProcessor as FlaxLogitsProcessor,
    FlaxLogitsProcessorList as FlaxLogitsProcessorList,
)
from monoblock.backends.pytorch.cache import (
    Cache as Cache,
    DynamicCache as DynamicCache,
    StaticCache as StaticCache,
)
from monoblock.backends.pytorch.generation.quantized_cache import (
    QuantizedCache as QuantizedCache,
)
from monoblock.backends.pytorch.pretrained import (
    PreTrainedModel as PreTrainedModel,
)
from monoblock.backends.tf.callbacks import (
    KerasMetricCallback as KerasMetricCallback,
)
from monoblock.backends.tf.outputs import (
    TFBaseModelOutput as TFBaseModelOutput,
    TFBaseModelOutputWithPast as TFBaseModelOutputWithPast,
    TFBaseModelOutputWithPastAndCrossAttentions as TFBaseModelOutputWithPastAndCrossAttentions,
    TFBaseModelOutputWithPooling as TFBaseModelOutputWithPooling,
    TFCausalLMOutput as TFCausalLMOutput,
    TFCausalLMOutputWithCrossAttentions as TFCausalLMOutputWithCrossAttentions,
    TFCausalLMOutputWithPast as TFCausalLMOutputWithPast,
    TFMaskedLMOutput as TFMaskedLMOutput,
    TFMultipleChoiceModelOutput as TFMultipleChoiceModelOutput,
    TFOpenAIGPTDoubleHeadsModelOutput as TFOpenAIGPTDoubleHeadsModelOutput,
    TFQuestionAnsweringModelOutput as TFQuestionAnsweringModelOutput,
    TFSequenceClassifierOutput as TFSequenceClassifierOutput,
    TFSequenceClassifierOutputWithPast as TFSequenceClassifierOutputWithPast,
    TFTokenClassifierOutput as TFTokenClassifierOutput,
)
from monoblock.backends.tf.pretrained import (
    TFPreTrainedModel as TFPreTrainedModel,
)
from monoblock.backends.tf.processors import (
    TFLogitsProcessor as TFLogitsProcessor,
    TFLogitsProcessorList as TFLogitsProcessorList,
)
from monoblock.config import (
    PretrainedConfig as PretrainedConfig,
)
from monoblock.embeddings import (
    CrossEncoder as CrossEncoder,
    SentenceTransformer as SentenceTransformer,
)
from monoblock.errors import (
    CheckpointError as CheckpointError,
    HubError as HubError,
    MissingKeys as MissingKeys,
    ShapeMismatch as ShapeMismatch,
    UnexpectedKeys as UnexpectedKeys,
    UnreadKeys as UnreadKeys,
    UnsupportedConfig as UnsupportedConfig,
)
from monoblock.families.fuyu import (
    FuyuConfig as FuyuConfig,
)
from monoblock.families.gpt_neo import (
    GPTNeoConfig as GPTNeoConfig,
)
from monoblock.families.mistral import (
    MistralConfig as MistralConfig,
)
from monoblock.families.mpnet import (
    MPNetConfig as MPNetConfig,
)
from monoblock.families.mpt import (
    MptConfig as MptConfig,
)
from monoblock.families.mpt_options import (
    MptAttentionConfig as MptAttentionConfig,
)
from monoblock.families.openai_gpt import (
    OpenAIGPTConfig as OpenAIGPTConfig,
)
from monoblock.generation import (
    AsyncTextIteratorStreamer as AsyncTextIteratorStreamer,
    GenerationConfig as GenerationConfig,
    LogitsProcessor as LogitsProcessor,
    LogitsProcessorList as LogitsProcessorList,
    StoppingCriteria as StoppingCriteria,
    StoppingCriteriaList as StoppingCriteriaList,
    TextIteratorStreamer as TextIteratorStreamer,
    TextStreamer as TextStreamer,
)
from monoblock.outputs import (
    ModelOutput as ModelOutput,
)
from monoblock.pipelines import (
    pipeline as pipeline,
)
from monoblock.processing import (
    AutoImageProcessor as AutoImageProcessor,
    AutoProcessor as AutoProcessor,
    FuyuBatchEncoding as FuyuBatchEncoding,
    FuyuImageProcessor as FuyuImageProcessor,
    FuyuProcessor as FuyuProcessor,
)
from monoblock.quantization import (
    BitsAndBytesConfig as BitsAndBytesConfig,
    WeightOnlyConfig as WeightOnlyConfig,
)
from monoblock.seeds import (
    set_seed as set_seed,
)
from monoblock.serving.engine.params import (
    SamplingParams as SamplingParams,
)
from monoblock.serving.llm import (
    LLM as LLM,
)
from monoblock.tokenization import (
    AutoTokenizer as AutoTokenizer,
    BatchEncoding as BatchEncoding,
    GPT2Tokenizer as GPT2Tokenizer,
    GPT2TokenizerFast as GPT2TokenizerFast,
    GPTNeoXTokenizerFast as GPTNeoXTokenizerFast,
    LlamaTokenizer as LlamaTokenizer,
    LlamaTokenizerFast as LlamaTokenizerFast,
    MPNetTokenizer as MPNetTokenizer,
    MPNetTokenizerFast as MPNetTokenizerFast,
    OpenAIGPTTokenizer as OpenAIGPTTokenizer,
    OpenAIGPTTokenizerFast as OpenAIGPTTokenizerFast,
    PreTrainedTokenizerFast as PreTrainedTokenizerFast,
)

__version__: str

def extra_of(module: str | None) -> str | None: ...

class FuyuPreTrainedModel(PreTrainedModel): ...
class GPTNeoPreTrainedModel(PreTrainedModel): ...
class MPNetPreTrainedModel(PreTrainedModel): ...
class MistralPreTrainedModel(PreTrainedModel): ...
class MptPreTrainedModel(PreTrainedModel): ...
class OpenAIGPTPreTrainedModel(PreTrainedModel): ...
class FlaxFuyuPreTrainedModel(FlaxPreTrainedModel): ...
class FlaxGPTNeoPreTrainedModel(FlaxPreTrainedModel): ...
class FlaxMPNetPreTrainedModel(FlaxPreTrainedModel): ...
class FlaxMistralPreTrainedModel(FlaxPreTrainedModel): ...
class FlaxMptPreTrainedModel(FlaxPreTrainedModel): ...
class FlaxOpenAIGPTPreTrainedModel(FlaxPreTrainedModel): ...
class TFFuyuMainLayer(MainLayer): ...
class TFFuyuPreTrainedModel(TFPreTrainedModel): ...
class TFGPTNeoMainLayer(MainLayer): ...
class TFGPTNeoPreTrainedModel(TFPreTrainedModel): ...
class TFMPNetMainLayer(MainLayer): ...
class TFMPNetPreTrainedModel(TFPreTrainedModel): ...
class TFMistralMainLayer(MainLayer): ...
class TFMistralPreTrainedModel(TFPreTrainedModel): ...
class TFMptMainLayer(MainLayer): ...
class TFMptPreTrainedModel(TFPreTrainedModel): ...
class TFOpenAIGPTMainLayer(MainLayer): ...
class TFOpenAIGPTPreTrainedModel(TFPreTrainedModel): ...

class FuyuForCausalLM(FuyuPreTrainedModel):
    config: FuyuConfig
    def __init__(self, config: FuyuConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        image_patches: Tensor | None = None,
        image_patches_indices: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        pixel_values: Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]: ...
    __call__ = forward

class GPTNeoForCausalLM(GPTNeoPreTrainedModel):
    config: GPTNeoConfig
    def __init__(self, config: GPTNeoConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithCrossAttentions | tuple[Any, ...]: ...
    __call__ = forward

class GPTNeoForQuestionAnswering(GPTNeoPreTrainedModel):
    config: GPTNeoConfig
    def __init__(self, config: GPTNeoConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]: ...
    __call__ = forward

class GPTNeoForSequenceClassification(GPTNeoPreTrainedModel):
    config: GPTNeoConfig
    def __init__(self, config: GPTNeoConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]: ...
    __call__ = forward

class GPTNeoForTokenClassification(GPTNeoPreTrainedModel):
    config: GPTNeoConfig
    def __init__(self, config: GPTNeoConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> TokenClassifierOutput | tuple[Any, ...]: ...
    __call__ = forward

class GPTNeoModel(GPTNeoPreTrainedModel):
    config: GPTNeoConfig
    def __init__(self, config: GPTNeoConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]: ...
    __call__ = forward

class MPNetForMaskedLM(MPNetPreTrainedModel):
    config: MPNetConfig
    def __init__(self, config: MPNetConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MaskedLMOutput | tuple[Any, ...]: ...
    __call__ = forward

class MPNetForMultipleChoice(MPNetPreTrainedModel):
    config: MPNetConfig
    def __init__(self, config: MPNetConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MultipleChoiceModelOutput | tuple[Any, ...]: ...
    __call__ = forward

class MPNetForQuestionAnswering(MPNetPreTrainedModel):
    config: MPNetConfig
    def __init__(self, config: MPNetConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]: ...
    __call__ = forward

class MPNetForSequenceClassification(MPNetPreTrainedModel):
    config: MPNetConfig
    def __init__(self, config: MPNetConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]: ...
    __call__ = forward

class MPNetForTokenClassification(MPNetPreTrainedModel):
    config: MPNetConfig
    def __init__(self, config: MPNetConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> TokenClassifierOutput | tuple[Any, ...]: ...
    __call__ = forward

class MPNetModel(MPNetPreTrainedModel):
    config: MPNetConfig
    def __init__(self, config: MPNetConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]: ...
    __call__ = forward

class MistralForCausalLM(MistralPreTrainedModel):
    config: MistralConfig
    def __init__(self, config: MistralConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        return_dict: bool | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]: ...
    __call__ = forward

class MistralForQuestionAnswering(MistralPreTrainedModel):
    config: MistralConfig
    def __init__(self, config: MistralConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        *,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]: ...
    __call__ = forward

class MistralForSequenceClassification(MistralPreTrainedModel):
    config: MistralConfig
    def __init__(self, config: MistralConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        *,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]: ...
    __call__ = forward

class MistralForTokenClassification(MistralPreTrainedModel):
    config: MistralConfig
    def __init__(self, config: MistralConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        *,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> TokenClassifierOutput | tuple[Any, ...]: ...
    __call__ = forward

class MistralModel(MistralPreTrainedModel):
    config: MistralConfig
    def __init__(self, config: MistralConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache_position: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]: ...
    __call__ = forward

class MptForCausalLM(MptPreTrainedModel):
    config: MptConfig
    def __init__(self, config: MptConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        position_ids: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithCrossAttentions | tuple[Any, ...]: ...
    __call__ = forward

class MptForQuestionAnswering(MptPreTrainedModel):
    config: MptConfig
    def __init__(self, config: MptConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        position_ids: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]: ...
    __call__ = forward

class MptForSequenceClassification(MptPreTrainedModel):
    config: MptConfig
    def __init__(self, config: MptConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        position_ids: Tensor | None = None,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]: ...
    __call__ = forward

class MptForTokenClassification(MptPreTrainedModel):
    config: MptConfig
    def __init__(self, config: MptConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        position_ids: Tensor | None = None,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> TokenClassifierOutput | tuple[Any, ...]: ...
    __call__ = forward

class MptModel(MptPreTrainedModel):
    config: MptConfig
    def __init__(self, config: MptConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]: ...
    __call__ = forward

class OpenAIGPTDoubleHeadsModel(OpenAIGPTPreTrainedModel):
    config: OpenAIGPTConfig
    def __init__(self, config: OpenAIGPTConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mc_token_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> OpenAIGPTDoubleHeadsModelOutput | tuple[Any, ...]: ...
    __call__ = forward

class OpenAIGPTForSequenceClassification(OpenAIGPTPreTrainedModel):
    config: OpenAIGPTConfig
    def __init__(self, config: OpenAIGPTConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]: ...
    __call__ = forward

class OpenAIGPTLMHeadModel(OpenAIGPTPreTrainedModel):
    config: OpenAIGPTConfig
    def __init__(self, config: OpenAIGPTConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutput | tuple[Any, ...]: ...
    __call__ = forward

class OpenAIGPTModel(OpenAIGPTPreTrainedModel):
    config: OpenAIGPTConfig
    def __init__(self, config: OpenAIGPTConfig) -> None: ...
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        past_key_values: Cache | tuple[tuple[Tensor, Tensor], ...] | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        sequence_id: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]: ...
    __call__ = forward

class FlaxFuyuForCausalLM(FlaxFuyuPreTrainedModel):
    config: FuyuConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        image_patches: Any = None,
        image_patches_indices: Any = None,
        pixel_values: Any = None,
        sequence_id: Any = None,
        logits_to_keep: int = 0,
    ) -> FlaxCausalLMOutputWithCrossAttentions | tuple[Any, ...]: ...

class FlaxGPTNeoForCausalLM(FlaxGPTNeoPreTrainedModel):
    config: GPTNeoConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        token_type_ids: Any = None,
        sequence_id: Any = None,
        logits_to_keep: int = 0,
    ) -> FlaxCausalLMOutputWithCrossAttentions | tuple[Any, ...]: ...

class FlaxGPTNeoForQuestionAnswering(FlaxGPTNeoPreTrainedModel):
    config: GPTNeoConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        token_type_ids: Any = None,
        sequence_id: Any = None,
    ) -> FlaxQuestionAnsweringModelOutput | tuple[Any, ...]: ...

class FlaxGPTNeoForSequenceClassification(FlaxGPTNeoPreTrainedModel):
    config: GPTNeoConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        token_type_ids: Any = None,
        sequence_id: Any = None,
    ) -> FlaxSequenceClassifierOutput | tuple[Any, ...]: ...

class FlaxGPTNeoForTokenClassification(FlaxGPTNeoPreTrainedModel):
    config: GPTNeoConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        token_type_ids: Any = None,
        sequence_id: Any = None,
    ) -> FlaxTokenClassifierOutput | tuple[Any, ...]: ...

class FlaxGPTNeoModel(FlaxGPTNeoPreTrainedModel):
    config: GPTNeoConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        token_type_ids: Any = None,
        sequence_id: Any = None,
    ) -> FlaxBaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]: ...

class FlaxMPNetForMaskedLM(FlaxMPNetPreTrainedModel):
    config: MPNetConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        sequence_id: Any = None,
    ) -> FlaxMaskedLMOutput | tuple[Any, ...]: ...

class FlaxMPNetForMultipleChoice(FlaxMPNetPreTrainedModel):
    config: MPNetConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        sequence_id: Any = None,
    ) -> FlaxMultipleChoiceModelOutput | tuple[Any, ...]: ...

class FlaxMPNetForQuestionAnswering(FlaxMPNetPreTrainedModel):
    config: MPNetConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        sequence_id: Any = None,
    ) -> FlaxQuestionAnsweringModelOutput | tuple[Any, ...]: ...

class FlaxMPNetForSequenceClassification(FlaxMPNetPreTrainedModel):
    config: MPNetConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        sequence_id: Any = None,
    ) -> FlaxSequenceClassifierOutput | tuple[Any, ...]: ...

class FlaxMPNetForTokenClassification(FlaxMPNetPreTrainedModel):
    config: MPNetConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        sequence_id: Any = None,
    ) -> FlaxTokenClassifierOutput | tuple[Any, ...]: ...

class FlaxMPNetModel(FlaxMPNetPreTrainedModel):
    config: MPNetConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        sequence_id: Any = None,
    ) -> FlaxBaseModelOutputWithPooling | tuple[Any, ...]: ...

class FlaxMistralForCausalLM(FlaxMistralPreTrainedModel):
    config: MistralConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        sequence_id: Any = None,
        logits_to_keep: int = 0,
    ) -> FlaxCausalLMOutputWithCrossAttentions | tuple[Any, ...]: ...

class FlaxMistralForQuestionAnswering(FlaxMistralPreTrainedModel):
    config: MistralConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        sequence_id: Any = None,
    ) -> FlaxQuestionAnsweringModelOutput | tuple[Any, ...]: ...

class FlaxMistralForSequenceClassification(FlaxMistralPreTrainedModel):
    config: MistralConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        sequence_id: Any = None,
    ) -> FlaxSequenceClassifierOutput | tuple[Any, ...]: ...

class FlaxMistralForTokenClassification(FlaxMistralPreTrainedModel):
    config: MistralConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        sequence_id: Any = None,
    ) -> FlaxTokenClassifierOutput | tuple[Any, ...]: ...

class FlaxMistralModel(FlaxMistralPreTrainedModel):
    config: MistralConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        sequence_id: Any = None,
    ) -> FlaxBaseModelOutputWithPast | tuple[Any, ...]: ...

class FlaxMptForCausalLM(FlaxMptPreTrainedModel):
    config: MptConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        sequence_id: Any = None,
        logits_to_keep: int = 0,
    ) -> FlaxCausalLMOutputWithCrossAttentions | tuple[Any, ...]: ...

class FlaxMptForQuestionAnswering(FlaxMptPreTrainedModel):
    config: MptConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        sequence_id: Any = None,
    ) -> FlaxQuestionAnsweringModelOutput | tuple[Any, ...]: ...

class FlaxMptForSequenceClassification(FlaxMptPreTrainedModel):
    config: MptConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        sequence_id: Any = None,
    ) -> FlaxSequenceClassifierOutput | tuple[Any, ...]: ...

class FlaxMptForTokenClassification(FlaxMptPreTrainedModel):
    config: MptConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        sequence_id: Any = None,
    ) -> FlaxTokenClassifierOutput | tuple[Any, ...]: ...

class FlaxMptModel(FlaxMptPreTrainedModel):
    config: MptConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        sequence_id: Any = None,
    ) -> FlaxBaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]: ...

class FlaxOpenAIGPTDoubleHeadsModel(FlaxOpenAIGPTPreTrainedModel):
    config: OpenAIGPTConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        token_type_ids: Any = None,
        mc_token_ids: Any = None,
        sequence_id: Any = None,
    ) -> FlaxOpenAIGPTDoubleHeadsModelOutput | tuple[Any, ...]: ...

class FlaxOpenAIGPTForSequenceClassification(FlaxOpenAIGPTPreTrainedModel):
    config: OpenAIGPTConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        token_type_ids: Any = None,
        sequence_id: Any = None,
    ) -> FlaxSequenceClassifierOutput | tuple[Any, ...]: ...

class FlaxOpenAIGPTLMHeadModel(FlaxOpenAIGPTPreTrainedModel):
    config: OpenAIGPTConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        token_type_ids: Any = None,
        sequence_id: Any = None,
        logits_to_keep: int = 0,
    ) -> FlaxMaskedLMOutput | tuple[Any, ...]: ...

class FlaxOpenAIGPTModel(FlaxOpenAIGPTPreTrainedModel):
    config: OpenAIGPTConfig
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Any = None,
        token_type_ids: Any = None,
        sequence_id: Any = None,
    ) -> FlaxBaseModelOutput | tuple[Any, ...]: ...

class TFFuyuForCausalLM(TFFuyuPreTrainedModel):
    config: FuyuConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        image_patches: Any = None,
        image_patches_indices: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        labels: Any = None,
        training: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
        logits_to_keep: Any = None,
        pixel_values: Any = None,
    ) -> TFCausalLMOutputWithPast | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFCausalLMOutputWithPast | tuple[Any, ...]: ...

class TFGPTNeoForCausalLM(TFGPTNeoPreTrainedModel):
    config: GPTNeoConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        labels: Any = None,
        training: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
        logits_to_keep: Any = None,
    ) -> TFCausalLMOutputWithCrossAttentions | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFCausalLMOutputWithCrossAttentions | tuple[Any, ...]: ...

class TFGPTNeoForQuestionAnswering(TFGPTNeoPreTrainedModel):
    config: GPTNeoConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        training: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFQuestionAnsweringModelOutput | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFQuestionAnsweringModelOutput | tuple[Any, ...]: ...

class TFGPTNeoForSequenceClassification(TFGPTNeoPreTrainedModel):
    config: GPTNeoConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        labels: Any = None,
        training: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFSequenceClassifierOutputWithPast | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFSequenceClassifierOutputWithPast | tuple[Any, ...]: ...

class TFGPTNeoForTokenClassification(TFGPTNeoPreTrainedModel):
    config: GPTNeoConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        labels: Any = None,
        training: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFTokenClassifierOutput | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFTokenClassifierOutput | tuple[Any, ...]: ...

class TFGPTNeoModel(TFGPTNeoPreTrainedModel):
    config: GPTNeoConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        training: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFBaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFBaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]: ...

class TFMPNetForMaskedLM(TFMPNetPreTrainedModel):
    config: MPNetConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        labels: Any = None,
        training: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFMaskedLMOutput | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFMaskedLMOutput | tuple[Any, ...]: ...

class TFMPNetForMultipleChoice(TFMPNetPreTrainedModel):
    config: MPNetConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        labels: Any = None,
        training: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFMultipleChoiceModelOutput | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFMultipleChoiceModelOutput | tuple[Any, ...]: ...

class TFMPNetForQuestionAnswering(TFMPNetPreTrainedModel):
    config: MPNetConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        training: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFQuestionAnsweringModelOutput | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFQuestionAnsweringModelOutput | tuple[Any, ...]: ...

class TFMPNetForSequenceClassification(TFMPNetPreTrainedModel):
    config: MPNetConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        labels: Any = None,
        training: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFSequenceClassifierOutput | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFSequenceClassifierOutput | tuple[Any, ...]: ...

class TFMPNetForTokenClassification(TFMPNetPreTrainedModel):
    config: MPNetConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        labels: Any = None,
        training: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFTokenClassifierOutput | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFTokenClassifierOutput | tuple[Any, ...]: ...

class TFMPNetModel(TFMPNetPreTrainedModel):
    config: MPNetConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        training: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFBaseModelOutputWithPooling | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFBaseModelOutputWithPooling | tuple[Any, ...]: ...

class TFMistralForCausalLM(TFMistralPreTrainedModel):
    config: MistralConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        training: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
        logits_to_keep: Any = None,
    ) -> TFCausalLMOutputWithPast | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFCausalLMOutputWithPast | tuple[Any, ...]: ...

class TFMistralForQuestionAnswering(TFMistralPreTrainedModel):
    config: MistralConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        training: Any = None,
        use_cache: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFQuestionAnsweringModelOutput | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFQuestionAnsweringModelOutput | tuple[Any, ...]: ...

class TFMistralForSequenceClassification(TFMistralPreTrainedModel):
    config: MistralConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        training: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFSequenceClassifierOutputWithPast | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFSequenceClassifierOutputWithPast | tuple[Any, ...]: ...

class TFMistralForTokenClassification(TFMistralPreTrainedModel):
    config: MistralConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        training: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFTokenClassifierOutput | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFTokenClassifierOutput | tuple[Any, ...]: ...

class TFMistralModel(TFMistralPreTrainedModel):
    config: MistralConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        training: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFBaseModelOutputWithPast | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFBaseModelOutputWithPast | tuple[Any, ...]: ...

class TFMptForCausalLM(TFMptPreTrainedModel):
    config: MptConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        labels: Any = None,
        training: Any = None,
        position_ids: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
        logits_to_keep: Any = None,
    ) -> TFCausalLMOutputWithCrossAttentions | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFCausalLMOutputWithCrossAttentions | tuple[Any, ...]: ...

class TFMptForQuestionAnswering(TFMptPreTrainedModel):
    config: MptConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        training: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFQuestionAnsweringModelOutput | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFQuestionAnsweringModelOutput | tuple[Any, ...]: ...

class TFMptForSequenceClassification(TFMptPreTrainedModel):
    config: MptConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        labels: Any = None,
        training: Any = None,
        position_ids: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFSequenceClassifierOutputWithPast | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFSequenceClassifierOutputWithPast | tuple[Any, ...]: ...

class TFMptForTokenClassification(TFMptPreTrainedModel):
    config: MptConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        labels: Any = None,
        training: Any = None,
        position_ids: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFTokenClassifierOutput | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFTokenClassifierOutput | tuple[Any, ...]: ...

class TFMptModel(TFMptPreTrainedModel):
    config: MptConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        training: Any = None,
        position_ids: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFBaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFBaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]: ...

class TFOpenAIGPTDoubleHeadsModel(TFOpenAIGPTPreTrainedModel):
    config: OpenAIGPTConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        mc_token_ids: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        labels: Any = None,
        mc_labels: Any = None,
        training: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFOpenAIGPTDoubleHeadsModelOutput | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFOpenAIGPTDoubleHeadsModelOutput | tuple[Any, ...]: ...

class TFOpenAIGPTForSequenceClassification(TFOpenAIGPTPreTrainedModel):
    config: OpenAIGPTConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        labels: Any = None,
        training: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFSequenceClassifierOutput | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFSequenceClassifierOutput | tuple[Any, ...]: ...

class TFOpenAIGPTLMHeadModel(TFOpenAIGPTPreTrainedModel):
    config: OpenAIGPTConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        labels: Any = None,
        training: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
        logits_to_keep: Any = None,
    ) -> TFCausalLMOutput | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFCausalLMOutput | tuple[Any, ...]: ...

class TFOpenAIGPTModel(TFOpenAIGPTPreTrainedModel):
    config: OpenAIGPTConfig
    def call(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        training: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        cache_position: Any = None,
        sequence_id: Any = None,
        num_items_in_batch: Any = None,
    ) -> TFBaseModelOutput | tuple[Any, ...]: ...
    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> TFBaseModelOutput | tuple[Any, ...]: ...
