"""Static view of monoblock's public names; written by tools/make_stubs.py."""

from typing import Any

from torch import Tensor

from monoblock.outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from monoblock.auto import (
    AutoConfig as AutoConfig,
    AutoModel as AutoModel,
    AutoModelForCausalLM as AutoModelForCausalLM,
    AutoModelForQuestionAnswering as AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification as AutoModelForSequenceClassification,
    AutoModelForTokenClassification as AutoModelForTokenClassification,
)
from monoblock.backends.pytorch.cache import (
    Cache as Cache,
    DynamicCache as DynamicCache,
    StaticCache as StaticCache,
)
from monoblock.backends.pytorch.pretrained import (
    PreTrainedModel as PreTrainedModel,
)
from monoblock.config import (
    PretrainedConfig as PretrainedConfig,
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
from monoblock.families.mpt import (
    MptAttentionConfig as MptAttentionConfig,
    MptConfig as MptConfig,
)
from monoblock.generation import (
    AsyncTextIteratorStreamer as AsyncTextIteratorStreamer,
    GenerationConfig as GenerationConfig,
    LogitsProcessorList as LogitsProcessorList,
    StoppingCriteria as StoppingCriteria,
    StoppingCriteriaList as StoppingCriteriaList,
    TextIteratorStreamer as TextIteratorStreamer,
    TextStreamer as TextStreamer,
)
from monoblock.outputs import (
    ModelOutput as ModelOutput,
)
from monoblock.tokenization import (
    AutoTokenizer as AutoTokenizer,
    BatchEncoding as BatchEncoding,
    GPTNeoXTokenizerFast as GPTNeoXTokenizerFast,
    PreTrainedTokenizerFast as PreTrainedTokenizerFast,
)

__version__: str

class MptForCausalLM(PreTrainedModel):
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

class MptForQuestionAnswering(PreTrainedModel):
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

class MptForSequenceClassification(PreTrainedModel):
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

class MptForTokenClassification(PreTrainedModel):
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

class MptModel(PreTrainedModel):
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
