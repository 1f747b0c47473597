"""Loaded models: text generation by an engine, vectors and scores by the classes of `monoblock.embeddings`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np

from monoblock.embeddings.arrays import HOST
from monoblock.embeddings.encoding import TextEncoder, Tokenized
from monoblock.pipelines.arrays import sigmoid, softmax
from monoblock.serving.server.batching import Batcher
from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.kinds import ModelKind
from monoblock.serving.server.spelling import TokenSpelling

Row = dict[str, list[int]]  # a text's inputs, by name
TOOL_CALLS = "[TOOL_CALLS]"  # Mistral's token before calls of tools


class TokenizedModel:
    """A model with a tokenizer."""

    kind: ClassVar[ModelKind]

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def longest(self) -> int:
        """The characters of the longest token; a text of C characters has at least C / longest tokens."""
        return max((len(token) for token in self.tokenizer.get_vocab()), default=1)

    @cached_property
    def vocabulary(self) -> int:
        """Ids below this one are the tokenizer's."""
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def max_length(self) -> int | None:
        """Tokens of a text at most."""
        raise NotImplementedError

    def check_ids(self, ids: Sequence[int], param: str, size: int) -> None:
        """ApiError for a token id of `size` or more."""
        for index, token in enumerate(ids):
            if token >= size:
                raise ApiError(
                    f"the token id {token} is not one of the model's {size} tokens",
                    param=f"{param}[{index}]",
                    code="invalid_value",
                )

    async def close(self, drain: bool) -> None:
        """Free what the model holds. `drain`: running requests are finished first."""
        raise NotImplementedError


class TextModel(TokenizedModel):
    """A generating model: an engine, and what requests need to know of its model."""

    kind = ModelKind.GENERATE

    def __init__(self, engine: Any, chat_template: str | None = None, defaults: bool = True) -> None:
        super().__init__(engine.tokenizer)
        self.engine = engine
        self.processor = engine.processor
        self._template = chat_template
        self.grammars_ready = False  # whether the grammar library knows the tokenizer
        self.defaults: dict[str, Any] = engine.core.defaults() if defaults else {}
        self.new_tokens: int | None = engine.core.generation_config.max_new_tokens if defaults else None

    @property
    def max_length(self) -> int:
        return self.engine.max_model_len

    @cached_property
    def spelling(self) -> TokenSpelling:
        """The tokens' bytes."""
        return TokenSpelling(self.tokenizer)

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts of the special tokens."""
        return tuple(str(token) for token in self.tokenizer.all_special_tokens)

    @cached_property
    def tool_marker(self) -> int | None:
        """The id of Mistral's token before calls of tools, if the vocabulary has it."""
        return self.tokenizer.get_vocab().get(TOOL_CALLS)

    @property
    def template(self) -> Any:
        """The model's chat template, or the one for models without; None if there is none."""
        own = getattr(self.tokenizer, "chat_template", None)
        return self._template if own is None else own

    def knows_tools(self, template: str | None) -> bool:
        """Whether a template, by default the model's, reads the tools."""
        source = self.template if template is None else template
        if isinstance(source, dict):
            return any("tools" in text for text in cast("dict[str, str]", source).values())
        return "tools" in (source or "")

    async def close(self, drain: bool) -> None:
        await self.engine.close(drain=drain)


class RowEncoder(TextEncoder):
    """A `TextEncoder` whose texts are tokenised already."""

    def __init__(self, transformer: Any, modules: Sequence[Any], rows: Sequence[Row], prompt: str) -> None:
        super().__init__(transformer, modules, 32, prompt)
        self._rows = rows

    def _tokenized(self, texts: Sequence[Any]) -> Iterator[list[Tokenized]]:
        del texts
        yield [Tokenized(index, row, 0) for index, row in enumerate(self._rows)]


class EncodingModel(TokenizedModel):
    """A model of `monoblock.embeddings`, whose requests are computed in batches."""

    def __init__(self, model: Any, run: Callable[[list[Any], Any], Any], waiting: int) -> None:
        super().__init__(model.tokenizer)
        self.model = model
        self.batcher = Batcher(run, waiting)
        model.eval()

    @property
    def max_length(self) -> int | None:
        return self.model.max_seq_length

    @property
    def size(self) -> int:
        """The size of the model's vocabulary."""
        return int(self.model.config.vocab_size)

    def rows(self, texts: Sequence[Any], truncate: int | None, param: str) -> list[Row]:
        """The inputs of texts, or of pairs of texts. `truncate`: tokens per text; -1: the model's maximum; None: a
        longer text is an ApiError."""
        limit = self.max_length
        if truncate is None and limit is not None:
            for index, text in enumerate(texts):
                characters = len(text) if isinstance(text, str) else sum(map(len, text))
                if characters > (limit + 8) * self.longest:
                    raise self._too_long(param, index, f"{characters:,} characters")
        transformer = self.model.transformer
        found, cut = transformer.rows(list(texts))
        if truncate is None:
            for index, count in enumerate(cut):
                if count:
                    raise self._too_long(param, index, f"{len(found[index]['input_ids']) + count:,} tokens")
        elif truncate >= 0 and any(len(row["input_ids"]) > truncate for row in found):
            least = self.tokenizer.num_special_tokens_to_add(not isinstance(texts[0], str))
            if truncate <= least:
                raise ApiError(
                    f"truncate_prompt_tokens={truncate} leaves no tokens beside the {least} special ones",
                    param="truncate_prompt_tokens",
                )
            shorter = transformer.tokenizer(
                *(
                    [list(texts)]
                    if isinstance(texts[0], str)
                    else [list(side) for side in zip(*texts, strict=True)]
                ),
                truncation=True,
                max_length=min(truncate, limit or truncate),
                padding=False,
                return_attention_mask=False,
                verbose=False,
            )
            found = [{name: shorter[name][index] for name in found[0]} for index in range(len(found))]
        return found

    def id_rows(self, rows: Sequence[Sequence[int]], truncate: int | None, param: str) -> list[Row]:
        """The inputs of token ids, which are taken as they are."""
        limit = self.max_length
        found: list[Row] = []
        for index, ids in enumerate(rows):
            self.check_ids(ids, f"{param}[{index}]" if len(rows) > 1 else param, self.size)
            if truncate is not None:
                count = limit if truncate < 0 else min(truncate, limit or truncate)
                ids = ids[:count]
            if limit is not None and len(ids) > limit:
                raise self._too_long(param, index, f"{len(ids):,} tokens")
            names = [
                n for n in self.tokenizer.model_input_names if n in self.model.transformer.adapter.accepts
            ]
            row: Row = {name: [0] * len(ids) for name in names if name != "attention_mask"}
            found.append({**row, "input_ids": list(ids)})
        return found

    def _too_long(self, param: str, index: int, size: str) -> ApiError:
        return ApiError(
            f"text {index} has {size}, more than the model's maximum of {self.max_length} tokens: shorten it, or pass "
            "truncate_prompt_tokens=-1",
            param=param,
            code="context_length_exceeded",
        )

    async def close(self, drain: bool) -> None:
        del drain  # a batch that runs is always finished
        await self.batcher.close()


class VectorModel(EncodingModel):
    """An embedding model."""

    kind = ModelKind.EMBED

    def __init__(self, model: Any, waiting: int) -> None:
        super().__init__(model, self._vectors, waiting)

    @property
    def width(self) -> int | None:
        """The number of values of a vector."""
        return self.model.get_embedding_dimension()

    def _vectors(self, rows: list[Row], key: Any) -> np.ndarray:
        """The vectors [rows, width] of rows with the prompt `key`, float32."""
        encoder = RowEncoder(self.model.transformer, self.model.modules[1:], rows, key or "")
        adapter = self.model.transformer.adapter
        found: list[Any] = [None] * len(rows)
        for batch in encoder.stream([""] * len(rows)):
            vectors = batch.features["sentence_embedding"]
            values: Any = vectors if adapter.on_host else adapter.numpy(vectors)
            for index, vector in zip(batch.indices, np.asarray(values, np.float32), strict=True):
                found[index] = vector[: self.model.truncate_dim]
        return np.stack(found)


class ScoreModel(EncodingModel):
    """A sequence classifier."""

    kind = ModelKind.CLASSIFY

    def __init__(self, model: Any, waiting: int) -> None:
        super().__init__(model, self._logits, waiting)

    @property
    def labels(self) -> list[str]:
        """The labels, in the order of the logits."""
        names: dict[int, str] = self.model.config.id2label
        return [str(names.get(index, f"LABEL_{index}")) for index in range(self.model.num_labels)]

    def _logits(self, rows: list[Row], key: Any) -> np.ndarray:
        """The logits [rows, labels], float32."""
        del key
        encoder = RowEncoder(self.model.transformer, [], rows, "")
        found: list[Any] = [None] * len(rows)
        for index, logits in encoder.logits([""] * len(rows)):
            found[index] = logits
        return np.stack(found).astype(np.float32)

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """The scores of pairs, by the model's own activation [rows]."""
        function = self.model.activation_fn
        return HOST.activation(function, logits)[:, 0]

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """As the pipeline text-classification: by the config's problem type [rows, labels]."""
        config = self.model.config
        if config.problem_type == "regression":
            return logits
        if config.problem_type == "multi_label_classification" or config.num_labels == 1:
            return sigmoid(logits)
        return softmax(logits)
