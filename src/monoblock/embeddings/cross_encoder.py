"""`CrossEncoder`: scores of pairs of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from monoblock.checkpoint.hub import HubOptions
from monoblock.embeddings import files
from monoblock.embeddings.arrays import ACTIVATIONS, HOST
from monoblock.embeddings.encoding import TextEncoder
from monoblock.embeddings.modules import activation, kind_of
from monoblock.embeddings.sequence import (
    ModuleSequence,
    both,
    check_backend,
    check_call,
    hub_options,
    merged,
    save,
    shows_bar,
)
from monoblock.embeddings.transformer import Transformer
from monoblock.pipelines.arrays import softmax
from monoblock.pipelines.progress import with_progress_bar

OWNER = "cross-encoder"  # of names on the hub without one


class Classifier(Transformer):
    """A model with a sequence classification head, and its tokenizer."""

    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    output: ClassVar[str] = "scores"
    heads: ClassVar[tuple[str | None, ...]] = ("sequence", "first")
    fixed: ClassVar[Mapping[str, Any]] = {
        "transformer_task": "sequence-classification",
        "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
        "module_output_name": "scores",
    }

    @staticmethod
    def settle(config: Any, given: Mapping[str, Any]) -> None:
        """One label for a model without such a head; ValueError for a causal language model without num_labels."""
        names = config.architectures or [""]
        if "num_labels" not in given and names[0].endswith("ForCausalLM"):
            raise ValueError(
                f"{names[0]} as a CrossEncoder, scored by its logits of two tokens, is not supported: use a model "
                "with a sequence classification head, or pass num_labels= to initialise one"
            )
        if "num_labels" not in given and not any(
            name.endswith("ForSequenceClassification") for name in names
        ):
            config.num_labels = 1

    def get_config_dict(self) -> dict[str, Any]:
        """The content of sentence_bert_config.json, with the keys by which the package finds the head."""
        return {**super().get_config_dict(), **self.fixed}


class CrossEncoder(ModuleSequence):
    """Scores pairs of texts, with the interface of the package sentence-transformers.

    Args:
        model_name_or_path: a folder or a name on the hub of a model with a sequence classification head.
        num_labels: the number of scores per pair; by default the config's, or 1 for a model without such a head, which
            is then initialised.
        max_length: the maximum of tokens per pair.
        activation_fn: the function of the scores: "Sigmoid" (the default for one label), "Identity" (for more), another
            name of `torch.nn`, or a callable on tensors.
        device, cache_folder, revision, token, local_files_only, model_kwargs, processor_kwargs (or tokenizer_kwargs),
            config_kwargs, framework, dtype, quantization_config, backend, trust_remote_code, prompts,
            default_prompt_name: as of `SentenceTransformer`; a prompt is put before the first text of each pair.
    """

    method = "predict"

    def __init__(
        self,
        model_name_or_path: Any,
        num_labels: int | None = None,
        max_length: int | None = None,
        activation_fn: Any = None,
        device: Any = None,
        cache_folder: str | Path | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        token: bool | str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        backend: str = "torch",
        *,
        processor_kwargs: Mapping[str, Any] | None = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        framework: str | None = None,
        dtype: Any = None,
        quantization_config: Any = None,
    ) -> None:
        check_backend(backend, trust_remote_code)
        name, hub = hub_options(model_name_or_path, cache_folder, revision, token, local_files_only, OWNER)
        settings = files.read_settings(name, hub)
        loading = {"dtype": dtype, "quantization_config": quantization_config}
        given = {
            "model_kwargs": merged(model_kwargs, loading),
            "processor_kwargs": both(
                "processor_kwargs", processor_kwargs, "tokenizer_kwargs", tokenizer_kwargs
            ),
            "config_kwargs": merged(config_kwargs, {"num_labels": num_labels}),
            "framework": framework,
            "device": device,
        }
        classifier = _read(name, hub, settings, given)
        classifier.adapter.to(device)
        self.modules = [classifier]
        if max_length is not None:
            self.max_seq_length = max_length
        self.set_prompts(
            {**settings.prompts, **(prompts or {})}, default_prompt_name or settings.default_prompt_name
        )
        self.activation_fn: Any = (
            _function(activation_fn) if activation_fn is not None else self._default(settings)
        )

    def _default(self, settings: files.ModelSettings) -> str:
        """The activation that the files name, else that of the number of labels."""
        config = self.config
        stored = settings.activation_fn
        stored = stored or (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
        stored = stored or getattr(config, "sbert_ce_default_activation_function", None)
        return activation(stored) if stored else "Sigmoid" if self.num_labels == 1 else "Identity"

    @property
    def model(self) -> Any:
        """The model."""
        return self.transformers_model

    @property
    def num_labels(self) -> int:
        """The number of scores per pair."""
        return int(self.config.num_labels)

    @property
    def max_length(self) -> int | None:
        """The maximum of tokens per pair."""
        return self.max_seq_length

    @max_length.setter
    def max_length(self, value: int | None) -> None:
        self.max_seq_length = value

    def predict(
        self,
        sentences: Any = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Any = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        pool: dict[str, Any] | None = None,
        chunk_size: int | None = None,
        *,
        inputs: Any = None,
        return_truncated: bool = False,
    ) -> Any:
        """The scores of pairs of texts: float32 [pairs] for one label, else [pairs, labels]; of one pair without the
        first axis.

        `sentences` (or `inputs`): a pair of texts, or a list of pairs. `activation_fn`: as in the constructor;
        `apply_softmax`: afterwards the softmax over the labels, if there are several. The other arguments are those of
        `SentenceTransformer.encode`.
        """
        pairs, single = _pairs(sentences, inputs)
        check_call(batch_size)
        text = self.prompt_text(prompt, prompt_name)
        function = self.activation_fn if activation_fn is None else _function(activation_fn)
        shown = shows_bar(show_progress_bar)
        truncated = np.zeros(len(pairs), np.int64)
        adapter = self.transformer.adapter
        if pool is not None or isinstance(device, list | tuple):
            chunks = self._in_pool(
                pairs,
                pool,
                device,
                chunk_size,
                shown,
                prompt=text,
                batch_size=batch_size,
                show_progress_bar=False,
                activation_fn=function,
                apply_softmax=apply_softmax,
                return_truncated=True,
            )
            scores = np.concatenate([chunk for chunk, _ in chunks]) if chunks else np.zeros(0, np.float32)
            truncated = np.concatenate([counts for _, counts in chunks]) if chunks else truncated
        else:
            if chunk_size is not None:
                raise ValueError("chunk_size is for several processes: pass pool= as well")
            if device is not None:
                self.to(device)
            self.eval()
            encoder = TextEncoder(self.transformer, [], batch_size, text)
            found: list[Any] = [None] * len(pairs)
            for index, logits in with_progress_bar(encoder.logits(pairs), len(pairs), shown):
                found[index] = logits
            encoder.report(len(pairs), "predict")
            for index, count in encoder.cut.items():
                truncated[index] = count
            scores = (
                self._scores(np.stack(found), function, apply_softmax) if found else np.zeros(0, np.float32)
            )
        result: Any = scores
        if convert_to_tensor:
            result = adapter.tensor(scores)
        elif not convert_to_numpy:
            result = [adapter.tensor(np.asarray(score)) for score in scores]
        if single:
            result, truncated = result[0], int(truncated[0])
        return (result, truncated) if return_truncated else result

    def _scores(self, logits: np.ndarray, function: Any, apply_softmax: bool | None) -> np.ndarray:
        """The activation of logits [pairs, labels], without the axis of a single label."""
        if isinstance(function, str):
            scores = HOST.activation(function, logits)
        else:
            adapter = self.transformer.adapter
            scores = adapter.numpy(function(adapter.tensor(logits)))
        if apply_softmax and scores.shape[1] > 1:
            scores = softmax(scores)
        return scores[:, 0] if self.num_labels == 1 else scores

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Any = None,
        apply_softmax: bool = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        pool: dict[str, Any] | None = None,
        chunk_size: int | None = None,
    ) -> list[dict[str, Any]]:
        """The documents by decreasing score with the query: a list of {"corpus_id": index, "score": number}.

        `top_k`: at most so many; `return_documents`: with the key "text". The other arguments are those of `predict`.
        ValueError for a model with several labels.
        """
        if self.num_labels != 1:
            raise ValueError(
                f"rank needs a model with one label, and this one has {self.num_labels}: use predict"
            )
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k={top_k!r}: expected an integer of at least 1, or None")
        if not isinstance(query, str):
            raise TypeError(f"query is a {type(query).__name__}: expected a string")
        scores = self.predict(
            [(query, document) for document in documents],
            prompt_name,
            prompt,
            batch_size,
            show_progress_bar,
            activation_fn,
            apply_softmax,
            convert_to_numpy,
            convert_to_tensor,
            device,
            pool,
            chunk_size,
        )
        order = np.argsort([-float(score) for score in scores], kind="stable")[:top_k]
        found: list[dict[str, Any]] = []
        for index in order.tolist():
            found.append({"corpus_id": index, "score": scores[index]})
            if return_documents:
                found[-1]["text"] = documents[index]
        return found

    def save_pretrained(self, path: str | Path, *, safe_serialization: bool = True) -> None:
        """Write the folder that sentence-transformers and this class load. Model cards are not written."""
        if not safe_serialization:
            raise ValueError("safe_serialization=False is not supported: weights are written as safetensors")
        if not isinstance(self.activation_fn, str):
            raise ValueError(
                f"activation_fn={self.activation_fn!r} cannot be saved: use one of {', '.join(ACTIVATIONS)}"
            )
        self.write(Path(path))

    def write(self, folder: Path) -> None:
        """Write all files."""
        part = "linear" if self.activation_fn == "Identity" else "activation"
        named = isinstance(self.activation_fn, str)
        extra = {"activation_fn": f"torch.nn.modules.{part}.{self.activation_fn}" if named else None}
        save(self, folder, "CrossEncoder", extra)

    save = save_pretrained


def _function(given: Any) -> Any:
    """The name of an activation of `ACTIVATIONS`, or a callable."""
    try:
        return activation(given)
    except ValueError:
        if callable(given) and not isinstance(given, type):
            return given
        raise


def _read(name: Any, hub: HubOptions, settings: files.ModelSettings, given: dict[str, Any]) -> Classifier:
    entries = files.read_entries(name, hub)
    if entries is not None and settings.model_type != "CrossEncoder":
        raise ValueError(f"{name} holds a {settings.model_type}, not a CrossEncoder")
    kinds = [kind_of(entry.type) for entry in entries or []]
    if entries and kinds != ["Transformer"]:
        raise ValueError(f"{name}: the modules are {', '.join(kinds)}; expected one Transformer")
    where = files.inside(hub, entries[0].folder) if entries else hub
    return Classifier.read(name, where, **given)


def _pairs(sentences: Any, inputs: Any) -> tuple[list[tuple[str, str]], bool]:
    """The pairs, and whether a single one was given."""
    if (sentences is None) == (inputs is None):
        raise ValueError("pass the pairs as sentences (or inputs)")
    given = inputs if sentences is None else sentences
    if isinstance(given, str | bytes | Mapping):
        raise TypeError(f"expected a pair of texts or a list of pairs, got {type(given).__name__}")
    items = list(given)
    single = bool(items) and all(isinstance(item, str) for item in items)
    pairs: list[tuple[str, str]] = []
    for index, item in enumerate([items] if single else items):
        pair = list(item) if not isinstance(item, str | bytes | Mapping) else [item]
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise TypeError(f"input {index} is {item!r:.60}: expected a pair of texts")
        pairs.append((str(pair[0]), str(pair[1])))
    return pairs, single
