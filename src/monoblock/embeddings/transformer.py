"""The transformer module: a model, its tokenizer and the maximum of tokens per text."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers

import monoblock
from monoblock.checkpoint.files import write_atomically
from monoblock.checkpoint.hub import HubOptions
from monoblock.checkpoint.options import pop_remote_code
from monoblock.embeddings.files import TRANSFORMER, as_json, check_keys, read_transformer
from monoblock.field_types import checked
from monoblock.pipelines import frameworks

log = logging.getLogger("monoblock")

NO_LIMIT = 10**20  # a model_max_length from here on stands for an unknown one

Rows = list[dict[str, list[int]]]


class Transformer:
    """A model with its tokenizer, the first module of a `SentenceTransformer`.

    Args:
        model_name_or_path: a folder, a name on the hub, or a model object of monoblock; then `tokenizer` is needed.
        max_seq_length: the maximum of tokens per text, special tokens included; by default the tokenizer's, at most
            the model's number of positions.
        do_lower_case: convert texts to lower case before the tokenizer.
        model_kwargs, processor_kwargs (or tokenizer_kwargs), config_kwargs: arguments of the `from_pretrained` of the
            model, the tokenizer and the config.
        framework: "pt", "flax" or "tf"; by default the first that is installed.
        auto: the class that selects the model's, without the framework's prefix.
    """

    auto: ClassVar[str] = "AutoModel"
    output: ClassVar[str] = "token_embeddings"  # the name of the model's first output in the features
    heads: ClassVar[tuple[str | None, ...]] = (None, "pooler")  # supported kinds of head
    # Keys of newer configs, with the values that the module has.
    fixed: ClassVar[Mapping[str, Any]] = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        "module_output_name": "token_embeddings",
    }

    def __init__(
        self,
        model_name_or_path: Any,
        *,
        tokenizer: Any = None,
        max_seq_length: int | None = None,
        do_lower_case: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        framework: str | None = None,
        device: Any = None,
        hub: HubOptions | None = None,
    ) -> None:
        named = isinstance(model_name_or_path, str | Path)
        processor = _one("processor_kwargs", processor_kwargs, "tokenizer_kwargs", tokenizer_kwargs)
        where = {name: value for name, value in vars(hub or HubOptions()).items() if value}
        if named:
            found = frameworks.chosen(framework, "a sentence embedding model")
            loading = {**where, **(model_kwargs or {})}
            pop_remote_code(loading)
            if "torch_dtype" in loading:
                loading["dtype"] = loading.pop("torch_dtype")
            config = monoblock.AutoConfig.from_pretrained(
                model_name_or_path, **{**where, **_without_code(config_kwargs)}
            )
            self.settle(config, config_kwargs or {})
            model = found.adapter.load(
                getattr(monoblock, found.prefix + self.auto),
                model_name_or_path,
                device,
                config=config,
                **loading,
            )
        else:
            found = frameworks.of_model(model_name_or_path, framework)
            if model_kwargs or config_kwargs:
                raise ValueError("model_kwargs and config_kwargs have no effect on a model object")
            model = model_name_or_path
        if tokenizer is None or isinstance(tokenizer, str | Path):
            source = model_name_or_path if tokenizer is None else tokenizer
            if not isinstance(source, str | Path):
                raise ValueError("a model object needs its tokenizer: pass tokenizer=")
            tokenizer = monoblock.AutoTokenizer.from_pretrained(
                source, **{**where, **_without_code(processor)}
            )
        if model.row.head not in self.heads:
            raise ValueError(
                f"{type(model).__name__} is not supported as {type(self).__name__}: its head is {model.row.head}"
            )
        self.framework = found
        self.adapter: Any = found.embedding_adapter.EmbeddingAdapter(model)
        self.tokenizer: Any = tokenizer
        self.do_lower_case = do_lower_case
        if do_lower_case:
            _lower(tokenizer)
        most = _positions(model)
        limit = processor.get("model_max_length", max_seq_length)
        if limit is None:
            limit = min(tokenizer.model_max_length, most)
        elif limit > most:
            log.warning("max_seq_length=%d, but the model has %d positions: these are the limit", limit, most)
            limit = most
        self.max_seq_length = None if limit >= NO_LIMIT else limit

    @staticmethod
    def settle(config: Any, given: Mapping[str, Any]) -> None:
        """Set fields of the files' config that depend on the module; `given`: fields that the caller set."""
        del config, given

    @property
    def auto_model(self) -> Any:
        """The model."""
        return self.adapter.model

    @auto_model.setter
    def auto_model(self, model: Any) -> None:
        self.framework = frameworks.of_model(model, None)
        self.adapter = self.framework.embedding_adapter.EmbeddingAdapter(model)

    model = auto_model

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.auto_model.config

    @property
    def max_seq_length(self) -> int | None:
        """The maximum of tokens per text, special tokens included; None: unlimited."""
        limit = self.tokenizer.model_max_length
        return None if limit is None or limit >= NO_LIMIT else int(limit)

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        if value is not None:
            least = self.tokenizer.num_special_tokens_to_add() + 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"max_seq_length={value!r}: expected an integer of at least {least}, or None"
                )
            if value > (most := _positions(self.auto_model)):
                raise ValueError(f"max_seq_length={value}: the model has {most} positions")
        self.tokenizer.model_max_length = NO_LIMIT if value is None else value

    def get_embedding_dimension(self) -> int:
        """The width of the hidden states."""
        return int(self.auto_model.spec.width)

    get_word_embedding_dimension = get_embedding_dimension

    def __call__(self, features: Mapping[str, Any]) -> dict[str, Any]:
        return self.forward(features)

    def forward(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """The features with the model's output for their `input_ids` and `attention_mask` [texts, tokens]."""
        return {**features, self.output: self.adapter.outputs(features)[0]}

    def tokenize(self, texts: Sequence[Any], **options: Any) -> dict[str, Any]:
        """The inputs of `forward` for texts: arrays of the framework, padded and truncated."""
        if not texts:
            return {}
        limit = {"truncation": True, "max_length": self.max_seq_length} if self.max_seq_length else {}
        options = {"padding": True, **limit, "return_tensors": self.adapter.tensors, **options}
        return dict(self._encoded(texts, **options))

    preprocess = tokenize

    def rows(self, texts: Sequence[Any]) -> tuple[Rows, list[int]]:
        """The model's inputs for each text, without padding, and the number of tokens cut from each."""
        names = [name for name in self.tokenizer.model_input_names if name in self.adapter.accepts]
        names = [name for name in names if name != "attention_mask"]
        options = {"padding": False, "return_attention_mask": False, "verbose": False}
        encoded = self._encoded(texts, truncation=False, **options)
        columns = {name: list(encoded[name]) for name in names}
        cut = [0] * len(texts)
        if (limit := self.max_seq_length) is not None:
            long = [i for i, ids in enumerate(columns["input_ids"]) if len(ids) > limit]
            if long:
                shorter = self._encoded(
                    [texts[i] for i in long], truncation=True, max_length=limit, **options
                )
                for row, i in enumerate(long):
                    cut[i] = len(columns["input_ids"][i]) - len(shorter["input_ids"][row])
                    for name in names:
                        columns[name][i] = shorter[name][row]
        return [{name: columns[name][i] for name in names} for i in range(len(texts))], cut

    def _encoded(self, texts: Sequence[Any], **options: Any) -> Any:
        """The tokenizer's result for texts, or for pairs of texts."""
        if texts and not isinstance(texts[0], str):
            first, second = ([pair[i] for pair in texts] for i in range(2))
            return self.tokenizer(first, second, **options)
        return self.tokenizer(list(texts), **options)

    def padded(self, rows: Rows) -> dict[str, list[list[int]]]:
        """Rows padded to one length, with an attention mask if any is padded."""
        longest = max(len(row["input_ids"]) for row in rows)
        left = self.tokenizer.padding_side == "left"
        fills = {"input_ids": self.tokenizer.pad_token_id or 0, "token_type_ids": 0}

        def fill(values: list[int], value: int) -> list[int]:
            more = [value] * (longest - len(values))
            return [*more, *values] if left else [*values, *more]

        columns = {name: [fill(row[name], fills[name]) for row in rows] for name in rows[0]}
        if any(len(row["input_ids"]) != longest for row in rows):
            columns["attention_mask"] = [fill([1] * len(row["input_ids"]), 0) for row in rows]
        return columns

    def prompt_length(self, prompt: str) -> int:
        """The number of tokens of a prompt before a text, without a special token at its end."""
        ids = self.rows([prompt])[0][0]["input_ids"]
        return len(ids) - (bool(ids) and ids[-1] in self.tokenizer.all_special_ids)

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """The model's parameters by name."""
        for name, value in self.adapter.named_parameters():
            yield f"auto_model.{name}", value

    def get_config_dict(self) -> dict[str, Any]:
        """The content of sentence_bert_config.json."""
        return {"max_seq_length": self.max_seq_length, "do_lower_case": self.do_lower_case}

    def save(self, folder: str | Path) -> None:
        """Write the model, the tokenizer and the module's config."""
        folder = Path(folder)
        self.auto_model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        text = as_json(self.get_config_dict())
        write_atomically(folder / TRANSFORMER, lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def read(cls, name: str | Path, hub: HubOptions, **given: Any) -> Self:
        """The module of a folder or repository, with the settings of its sentence_bert_config.json."""
        config, path = read_transformer(name, hub)
        renamed = {
            "model_args": "model_kwargs",
            "tokenizer_args": "processor_kwargs",
            "config_args": "config_kwargs",
        }
        config = {renamed.get(key, key): value for key, value in config.items()}
        known = ("max_seq_length", "do_lower_case", *renamed.values(), *cls.fixed)
        if path is not None:
            check_keys(config, known, path)
            for key, value in config.items():
                expected = cls.fixed.get(key)
                if expected is not None and value != expected:
                    raise ValueError(f"{path}: {key}={value!r} is not supported; expected {expected!r}")
        own = {
            "max_seq_length": checked("config", "max_seq_length", config.get("max_seq_length"), int | None),
            "do_lower_case": checked("config", "do_lower_case", bool(config.get("do_lower_case")), bool),
        }
        for key in renamed.values():
            stored = checked("config", key, config.get(key) or {}, dict[str, Any])
            stored.pop("trust_remote_code", None)
            given[key] = {**stored, **(given.get(key) or {})}
        return cls(name, hub=hub, **own, **given)

    def __repr__(self) -> str:
        config = {**self.get_config_dict(), "architecture": type(self.auto_model).__name__}
        return f"Transformer({config})"


def _positions(model: Any) -> int:
    """The number of positions of a model, by its tables and its config."""
    found = (model.max_positions, getattr(model.config, "max_position_embeddings", None))
    return min((limit for limit in found if limit is not None), default=NO_LIMIT)


def _one(name: str, value: Any, old: str, old_value: Any) -> dict[str, Any]:
    if value is not None and old_value is not None:
        raise ValueError(f"{name} and {old} are the same argument: pass one")
    return dict(value or old_value or {})


def _without_code(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    rest = dict(kwargs or {})
    pop_remote_code(rest)
    return rest


def _lower(tokenizer: Any) -> None:
    """Add the conversion to lower case to a tokenizer that does not have it."""
    backend = tokenizer.backend_tokenizer
    current = backend.normalizer
    if current is None:
        backend.normalizer = Lowercase()
    elif not (isinstance(current, Lowercase) or "owercase" in _lowercasing(current)):
        backend.normalizer = Normalizers([Lowercase(), current])


def _lowercasing(normalizer: Any) -> str:
    """The text "Lowercase" if a normalizer converts to lower case."""
    state = normalizer.__getstate__()
    text = state.decode() if isinstance(state, bytes) else str(state)
    return "Lowercase" if '"Lowercase"' in text or '"lowercase":true' in text.replace(" ", "") else ""
