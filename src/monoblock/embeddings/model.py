"""`SentenceTransformer`: vectors of texts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monoblock.checkpoint.hub import HubOptions
from monoblock.embeddings import files
from monoblock.embeddings.encoding import Encoded, TextEncoder
from monoblock.embeddings.modules import KINDS, EmbeddingModule, Pooling, kind_of, ops_of
from monoblock.embeddings.quantization import PRECISIONS, quantize_embeddings
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
from monoblock.embeddings.similarity import all_pairs, of_pairs, similarity_name
from monoblock.embeddings.transformer import Transformer
from monoblock.pipelines.progress import with_progress_bar

log = logging.getLogger("monoblock")

OWNER = "sentence-transformers"  # of names on the hub without one
OUTPUTS = ("sentence_embedding", "token_embeddings", None)


class SentenceTransformer(ModuleSequence):
    """Computes vectors of texts, with the interface of the package sentence-transformers.

    Args:
        model_name_or_path: a folder or a name on the hub; names without an organisation are those of
            "sentence-transformers", except "demo-embeddings", the embedded search model. Without a modules.json, the
            vectors are the means of the tokens' hidden states, or the last token's if the config names a causal
            language model; a warning reports this.
        modules: instead of a name, the modules: a `Transformer`, then `Pooling`, `Dense`, `LayerNorm`, `Normalize`.
        device: a device of the framework; by default the accelerator, if there is one.
        prompts: name -> text that `encode` puts before each text; they override those of the files.
        default_prompt_name: the prompt of calls without one.
        similarity_fn_name: "cosine" (the default), "dot", "euclidean" or "manhattan".
        cache_folder, revision, token, local_files_only: for downloads.
        truncate_dim: the number of values that are kept of each vector.
        model_kwargs, processor_kwargs (or tokenizer_kwargs), config_kwargs: arguments of the `from_pretrained` of the
            model, the tokenizer and the config.
        framework: "pt", "flax" or "tf"; by default the first that is installed.
        dtype, quantization_config: of the model, as in its `from_pretrained`.
        backend: "torch" only.
        trust_remote_code: False only.
    """

    method = "encode"

    def __init__(
        self,
        model_name_or_path: Any = None,
        modules: Sequence[Any] | None = None,
        device: Any = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        similarity_fn_name: Any = None,
        cache_folder: str | Path | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        token: bool | str | None = None,
        truncate_dim: int | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        backend: str = "torch",
        *,
        processor_kwargs: Mapping[str, Any] | None = None,
        framework: str | None = None,
        dtype: Any = None,
        quantization_config: Any = None,
    ) -> None:
        check_backend(backend, trust_remote_code)
        if (model_name_or_path is None) == (modules is None):
            raise ValueError("pass a name or folder, or modules=")
        settings = files.ModelSettings()
        if modules is None:
            name, hub = hub_options(
                model_name_or_path, cache_folder, revision, token, local_files_only, OWNER
            )
            loading = {"dtype": dtype, "quantization_config": quantization_config}
            given = {
                "model_kwargs": merged(model_kwargs, loading),
                "processor_kwargs": both(
                    "processor_kwargs", processor_kwargs, "tokenizer_kwargs", tokenizer_kwargs
                ),
                "config_kwargs": config_kwargs,
                "framework": framework,
                "device": device,
            }
            settings = files.read_settings(name, hub)
            self.modules = _read(name, hub, settings, given)
        else:
            for argument, value in (("dtype", dtype), ("quantization_config", quantization_config)):
                if value is not None:
                    raise ValueError(f"{argument} has no effect on modules: load the model with it")
            self.modules = list(modules)
        _check(self.modules)
        self.transformer.adapter.to(device)
        self._place()
        stored = {"query": "", "document": "", **settings.prompts}
        default = settings.default_prompt_name if default_prompt_name is None else default_prompt_name
        self.set_prompts({**stored, **(prompts or {})}, default)
        name = settings.similarity_fn_name if similarity_fn_name is None else similarity_fn_name
        self._similarity = similarity_name(name or "cosine")
        self.truncate_dim = checked_dim(settings.truncate_dim if truncate_dim is None else truncate_dim)

    # ------------------------------------------------------------------ encode

    def encode(
        self,
        sentences: Any = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        pool: dict[str, Any] | None = None,
        chunk_size: int | None = None,
        *,
        inputs: Any = None,
        return_truncated: bool = False,
    ) -> Any:
        """The vectors [texts, width] of texts, float32; of one text, [width].

        Args:
            sentences (or inputs): a text, or a list of texts.
            prompt_name: the name of a prompt in `prompts` that is put before each text.
            prompt: a prompt that is put before each text.
            batch_size: the number of texts per forward pass; where padding is not needed, a pass takes
                `batch_size` times `max_seq_length` tokens instead.
            show_progress_bar: default: if the logger "monoblock" logs INFO or DEBUG.
            output_value: "sentence_embedding"; "token_embeddings" for a list of arrays [tokens, width]; None for a list
                of dictionaries with both, `input_ids` and `attention_mask`.
            precision: "float32", "int8", "uint8", "binary" or "ubinary": see `quantize_embeddings`.
            convert_to_numpy: False gives a list of tensors.
            convert_to_tensor: one tensor, on the model's device.
            device: the device to move the model to; a list starts a process for each.
            normalize_embeddings: divide each vector by its length.
            truncate_dim: the number of values that are kept of each vector; default: the model's.
            pool: the processes of `start_multi_process_pool`.
            chunk_size: texts per chunk for the processes.
            return_truncated: return (vectors, truncated), with the number of tokens that were cut from each text
                because of `max_seq_length`, int64 [texts].

        On the CPU, the vectors are pooled in NumPy. A warning reports texts that were cut.
        """
        texts, single = _texts(sentences, inputs)
        check_call(batch_size)
        if output_value not in OUTPUTS:
            raise ValueError(
                f"output_value={output_value!r}: expected one of {', '.join(map(repr, OUTPUTS))}"
            )
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r}: expected one of {', '.join(map(repr, PRECISIONS))}")
        text = self.prompt_text(prompt, prompt_name)
        dim = checked_dim(self.truncate_dim if truncate_dim is None else truncate_dim)
        shown = shows_bar(show_progress_bar)
        vectors = output_value == "sentence_embedding"
        if vectors and self.modules[1:] == []:
            raise ValueError(
                "no module pools the tokens: add Pooling, or use output_value='token_embeddings'"
            )
        if not vectors and precision != "float32":
            raise ValueError(f"precision={precision!r} is for output_value='sentence_embedding'")
        if pool is not None or isinstance(device, list | tuple):
            if not vectors:
                raise ValueError(f"output_value={output_value!r} is not supported with several processes")
            options = {
                "prompt": text,
                "batch_size": batch_size,
                "show_progress_bar": False,
                "normalize_embeddings": normalize_embeddings,
                "truncate_dim": dim,
                "return_truncated": True,
            }
            chunks = self._in_pool(texts, pool, device, chunk_size, shown, **options)
            results: Any = [row for chunk, _ in chunks for row in chunk]
            truncated = np.concatenate([np.zeros(0, np.int64), *(counts for _, counts in chunks)])
        else:
            if chunk_size is not None:
                raise ValueError("chunk_size is for several processes: pass pool= as well")
            if device is not None:
                self.to(device)
            to_host = (convert_to_numpy and not convert_to_tensor) or precision != "float32"
            split = _Split(normalize_embeddings, dim, self.transformer.adapter, to_host)
            kinds = {"sentence_embedding": split.vectors, "token_embeddings": split.tokens}
            kind = kinds.get(output_value or "", split.everything)
            results, truncated = self._here(texts, batch_size, text, kind, shown)
        if vectors:
            results = self._converted(results, precision, convert_to_numpy, convert_to_tensor)
        if single:
            results, truncated = results[0], int(truncated[0])
        return (results, truncated) if return_truncated else results

    def _here(
        self, texts: list[str], batch_size: int, prompt: str, split: Any, shown: bool
    ) -> tuple[list[Any], np.ndarray]:
        """The results of `split` for each text, computed in this process, and the numbers of tokens cut."""
        self.eval()
        encoder = TextEncoder(self.transformer, self.modules[1:], batch_size, prompt)
        found: list[Any] = [None] * len(texts)
        stream = (item for batch in encoder.stream(texts) for item in split(batch))
        for index, value in with_progress_bar(stream, len(texts), shown):
            found[index] = value
        encoder.report(len(texts))
        truncated = np.zeros(len(texts), np.int64)
        for index, count in encoder.cut.items():
            truncated[index] = count
        return found, truncated

    def encode_query(
        self, sentences: Any = None, prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> Any:
        """`encode` with the prompt "query", if no other is given."""
        if prompt_name is None and prompt is None and "query" in self.prompts:
            prompt_name = "query"
        return self.encode(sentences, prompt_name, prompt, **options)

    def encode_document(
        self, sentences: Any = None, prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> Any:
        """`encode` with the first of the prompts "document", "passage" and "corpus", if no other is given."""
        if prompt_name is None and prompt is None:
            prompt_name = next(
                (name for name in ("document", "passage", "corpus") if name in self.prompts), None
            )
        return self.encode(sentences, prompt_name, prompt, **options)

    def encode_multi_process(
        self, sentences: Any, pool: dict[str, Any], *args: Any, **options: Any
    ) -> np.ndarray:
        """`encode(sentences, ..., pool=pool)`."""
        names = ("prompt_name", "prompt", "batch_size", "chunk_size", "show_progress_bar", "precision",
                 "normalize_embeddings", "truncate_dim")  # fmt: skip
        if len(args) > len(names):
            raise TypeError(f"encode_multi_process takes at most {len(names) + 2} arguments")
        return self.encode(sentences, pool=pool, **dict(zip(names, args, strict=False)), **options)

    def _converted(self, rows: list[Any], precision: str, to_numpy: bool, to_tensor: bool) -> Any:
        """The vectors, NumPy arrays or tensors on the device, in the requested type."""
        adapter = self.transformer.adapter
        if rows and not isinstance(rows[0], np.ndarray):
            return adapter.joined(rows) if to_tensor else rows
        vectors = np.stack(rows) if rows else np.zeros(0, np.float32)
        if precision != "float32" and rows:
            vectors = quantize_embeddings(vectors, precision)
        if to_tensor:
            return adapter.tensor(vectors)
        return vectors if to_numpy else [adapter.tensor(row) for row in vectors]

    # ------------------------------------------------------------------ properties

    @property
    def similarity_fn_name(self) -> str:
        """The name of the function of `similarity`."""
        return self._similarity

    @similarity_fn_name.setter
    def similarity_fn_name(self, name: Any) -> None:
        self._similarity = similarity_name(name)

    @property
    def similarity(self) -> Any:
        """similarity(a, b): the similarities [a, b] of all pairs, by `similarity_fn_name`."""
        return self._similarities(all_pairs)

    @property
    def similarity_pairwise(self) -> Any:
        """similarity_pairwise(a, b): the similarities of the pairs (a[i], b[i])."""
        return self._similarities(of_pairs)

    def _similarities(self, compute: Any) -> Any:
        name, ops = self._similarity, self.transformer.adapter.ops
        return lambda embeddings1, embeddings2: compute(name, embeddings1, embeddings2, ops)

    def get_embedding_dimension(self) -> int | None:
        """The width of the vectors of `encode`."""
        found = (module.get_embedding_dimension() for module in reversed(self.modules))
        width = next((width for width in found if width is not None), None)
        return width if self.truncate_dim is None or width is None else min(width, self.truncate_dim)

    get_sentence_embedding_dimension = get_embedding_dimension

    def set_pooling_include_prompt(self, include_prompt: bool) -> None:
        """Whether pooling includes the tokens of a prompt."""
        for module in self:
            if isinstance(module, Pooling):
                module.include_prompt = include_prompt

    @contextlib.contextmanager
    def truncate_sentence_embeddings(self, truncate_dim: int | None) -> Iterator[None]:
        """In this context, `encode` keeps that number of values of each vector."""
        before, self.truncate_dim = self.truncate_dim, checked_dim(truncate_dim)
        try:
            yield
        finally:
            self.truncate_dim = before

    truncate_embeddings = truncate_sentence_embeddings

    # ------------------------------------------------------------------ files

    def save_pretrained(
        self,
        path: str | Path,
        model_name: str | None = None,
        create_model_card: bool = False,
        safe_serialization: bool = True,
    ) -> None:
        """Write the folder that sentence-transformers and this class load.

        Model cards are not written, and weights as safetensors only.
        """
        if model_name is not None or create_model_card:
            raise ValueError("model cards are not written: leave out model_name and create_model_card")
        if not safe_serialization:
            raise ValueError("safe_serialization=False is not supported: weights are written as safetensors")
        self.write(Path(path))

    def write(self, folder: Path) -> None:
        """Write all files."""
        extra: dict[str, Any] = {"similarity_fn_name": self._similarity}
        if self.truncate_dim is not None:
            extra["truncate_dim"] = self.truncate_dim
        save(self, folder, "SentenceTransformer", extra)

    save = save_pretrained


def _read(name: Any, hub: HubOptions, settings: files.ModelSettings, given: dict[str, Any]) -> list[Any]:
    """The modules of a folder or repository."""
    entries = files.read_entries(name, hub)
    if entries is not None and settings.model_type != "SentenceTransformer":
        raise ValueError(f"{name} holds a {settings.model_type}, not a SentenceTransformer")
    if entries is None:
        transformer = Transformer.read(name, hub, **given)
        architectures = getattr(transformer.config, "architectures", None) or [""]
        mode = "lasttoken" if architectures[0].endswith("ForCausalLM") else "mean"
        log.warning("%s has no modules.json: its vectors are pooled with pooling_mode=%r", name, mode)
        return [transformer, Pooling(transformer.get_embedding_dimension(), mode)]
    kinds = [kind_of(entry.type) for entry in entries]
    if kinds[0] != "Transformer" or "Transformer" in kinds[1:]:
        raise ValueError(
            f"{name}: the modules are {', '.join(kinds)}; expected a Transformer first, and no other"
        )
    modules: list[Any] = [Transformer.read(name, files.inside(hub, entries[0].folder), **given)]
    for kind, entry in zip(kinds[1:], entries[1:], strict=True):
        modules.append(KINDS[kind].read(name, files.inside(hub, entry.folder)))
    return modules


def _check(modules: Sequence[Any]) -> None:
    """ValueError or TypeError for modules that do not fit together."""
    if not modules or not isinstance(modules[0], Transformer):
        raise TypeError("the first module must be a Transformer of monoblock.embeddings")
    width = modules[0].get_embedding_dimension()
    for module in modules[1:]:
        if not isinstance(module, EmbeddingModule):
            known = ", ".join(KINDS)
            raise TypeError(
                f"{type(module).__name__} is not supported as a module; after the Transformer: {known}"
            )
        needs = getattr(module, "in_features", getattr(module, "dimension", None))
        needs = module.embedding_dimension if isinstance(module, Pooling) else needs
        if needs is not None and needs != width:
            raise ValueError(f"{module!r} takes vectors of width {needs}, but those before it have {width}")
        width = module.get_embedding_dimension() or width


def _texts(sentences: Any, inputs: Any) -> tuple[list[str], bool]:
    """The texts, and whether a single one was given."""
    if (sentences is None) == (inputs is None):
        raise ValueError("pass the texts as sentences (or inputs)")
    given = inputs if sentences is None else sentences
    single = isinstance(given, str)
    if not single and isinstance(given, Mapping | bytes):
        raise TypeError(f"expected a text or a list of texts, got {type(given).__name__}")
    texts = [given] if single else list(given)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"text {index} is a {type(text).__name__}: expected strings; pairs and images are not supported"
            )
    return [str(text) for text in texts], single


def checked_dim(value: Any) -> int | None:
    """None, or an integer of at least 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"truncate_dim={value!r}: expected an integer of at least 1, or None")
    return value


@dataclass(frozen=True)
class _Split:
    """The results of each text of a batch. `to_host`: vectors become NumPy arrays, if they are tensors."""

    normalize: bool
    dim: int | None
    adapter: Any
    to_host: bool

    def vectors(self, batch: Encoded) -> Iterator[tuple[int, Any]]:
        """Each text's vector."""
        found = batch.features["sentence_embedding"]
        if self.dim is not None:
            found = found[..., : self.dim]
        if self.normalize:
            found = ops_of(found).normalized(found)
        if self.to_host and not isinstance(found, np.ndarray):
            found = self.adapter.numpy(found)
        return zip(batch.indices, found, strict=True)

    def tokens(self, batch: Encoded) -> Iterator[tuple[int, Any]]:
        """Each text's token states without padding, as tensors."""
        states, mask = batch.features["token_embeddings"], batch.features.get("attention_mask")
        for row, index in enumerate(batch.indices):
            found = states[row] if mask is None else states[row][mask[row] != 0]
            yield index, self.adapter.tensor(found) if isinstance(found, np.ndarray) else found

    def everything(self, batch: Encoded) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each text's features without padding, as tensors."""
        tensor = self.adapter.tensor
        pooled = dict(self.vectors(batch)) if "sentence_embedding" in batch.features else {}
        for (index, states), row in zip(self.tokens(batch), batch.features["rows"], strict=True):
            features: dict[str, Any] = {name: tensor(np.asarray(ids, np.int64)) for name, ids in row.items()}
            features["attention_mask"] = tensor(np.ones(len(row["input_ids"]), np.int64))
            features["token_embeddings"] = states
            if (vector := pooled.get(index)) is not None:
                features["sentence_embedding"] = tensor(vector) if isinstance(vector, np.ndarray) else vector
            if "prompt_length" in batch.features:
                features["prompt_length"] = batch.features["prompt_length"]
            yield index, features
