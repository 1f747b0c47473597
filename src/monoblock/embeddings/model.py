"""`SentenceTransformer`: vectors of texts."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monoblock.checkpoint.hub import HubOptions
from monoblock.checkpoint.transaction import staged
from monoblock.embeddings import files
from monoblock.embeddings import pool as processes
from monoblock.embeddings.encoding import Encoded, TextEncoder
from monoblock.embeddings.modules import KINDS, SAVED_PATH, EmbeddingModule, Pooling, kind_of, ops_of
from monoblock.embeddings.quantization import PRECISIONS, quantize_embeddings
from monoblock.embeddings.similarity import all_pairs, of_pairs, similarity_name
from monoblock.embeddings.transformer import Transformer
from monoblock.pipelines.progress import with_progress_bar

log = logging.getLogger("monoblock")

OUTPUTS = ("sentence_embedding", "token_embeddings", None)
# Names on the hub without an organisation that are not those of sentence-transformers.
PLAIN_NAMES = ("openai-gpt",)
# Methods of the package that are not here.
REFUSED = {
    "fit": "train the PyTorch model with forward(), whose results have gradients",
    "old_fit": "train the PyTorch model with forward(), whose results have gradients",
    "evaluate": "encode the texts and compute the measure from the vectors",
    "push_to_hub": "save to a folder, then `hf upload REPO FOLDER`",
    "save_to_hub": "save to a folder, then `hf upload REPO FOLDER`",
    "compile": "compile the model: st[0].auto_model.compile()",
    "add_adapter": "use the model's: st[0].auto_model.add_adapter(...)",
    "load_adapter": "use the model's: st[0].auto_model.load_adapter(...)",
}


class ModuleSequence:
    """Modules in order, of which the first is a `Transformer`: what `SentenceTransformer` and `CrossEncoder` share."""

    modules: list[Any]

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.modules)

    def __getitem__(self, index: Any) -> Any:
        return self.modules[index]

    def __getattr__(self, name: str) -> Any:
        if name in REFUSED:
            raise NotImplementedError(f"{type(self).__name__} has no {name}: {REFUSED[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        lines = [f"  ({index}): {module!r}" for index, module in enumerate(self)]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])

    # ------------------------------------------------------------------ the transformer

    @property
    def transformer(self) -> Any:
        """The first module."""
        return self.modules[0]

    @property
    def transformers_model(self) -> Any:
        """The model of the first module."""
        return self.transformer.auto_model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the first module."""
        return self.transformer.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.transformer.tokenizer = tokenizer

    processor = tokenizer

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.transformer.config

    @property
    def max_seq_length(self) -> int | None:
        """The maximum of tokens per text, special tokens included; None: unlimited."""
        return self.transformer.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        self.transformer.max_seq_length = value

    def get_max_seq_length(self) -> int | None:
        """The maximum of tokens per text."""
        return self.max_seq_length

    def tokenize(self, texts: Sequence[Any], **options: Any) -> dict[str, Any]:
        """The inputs of `forward` for texts: arrays of the framework, padded and truncated."""
        return self.transformer.tokenize(texts, **options)

    preprocess = tokenize

    def forward(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """The features [texts, tokens, ...] with the results of all modules; with gradients on PyTorch."""
        found = dict(features)
        for module in self:
            found = module(found)
        return found

    def __call__(self, features: Mapping[str, Any]) -> dict[str, Any]:
        return self.forward(features)

    # ------------------------------------------------------------------ device and dtype

    @property
    def device(self) -> Any:
        """The model's device."""
        return self.transformer.adapter.device

    @property
    def dtype(self) -> Any:
        """The dtype of the model's weights."""
        return self.transformer.adapter.dtype

    def to(self, device: Any = None, dtype: Any = None) -> Any:
        """Move the model and the other modules to a device, or convert them to a dtype of PyTorch."""
        if dtype is None and str(device).startswith("torch.") and not hasattr(device, "type"):
            device, dtype = None, device
        if device is not None:
            self.transformer.adapter.to(device)
        if dtype is not None:
            self.transformer.adapter.cast(dtype)
        self._place()
        return self

    def half(self) -> Any:
        """Convert to float16."""
        return self.to(dtype="float16")

    def bfloat16(self) -> Any:
        """Convert to bfloat16."""
        return self.to(dtype="bfloat16")

    def float(self) -> Any:
        """Convert to float32."""
        return self.to(dtype="float32")

    def cpu(self) -> Any:
        """Move to the CPU."""
        return self.to("cpu")

    def cuda(self, device: int | None = None) -> Any:
        """Move to a GPU."""
        return self.to("cuda" if device is None else f"cuda:{device}")

    def _place(self) -> None:
        for module in self.modules[1:]:
            module.place(self.transformer.adapter)

    def train(self, mode: bool = True) -> Any:
        """Enable dropout, or disable it."""
        self.transformer.adapter.train(mode)
        return self

    def eval(self) -> Any:
        """Disable dropout."""
        return self.train(False)

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """The parameters of all modules by name: "0.auto_model....", "2.linear.weight"."""
        for index, module in enumerate(self):
            for name, value in module.parameters():
                yield f"{index}.{name}", value

    def parameters(self) -> Iterator[Any]:
        """The parameters of all modules."""
        return (value for _, value in self.named_parameters())

    def limit_threads(self, count: int) -> None:
        """The number of threads of this process, for pools."""
        self.transformer.adapter.limit_threads(count)

    # ------------------------------------------------------------------ pools

    method = ""  # that a pool's processes call

    def loading(self) -> dict[str, Any]:
        """The constructor's arguments with which a process of a pool reads the saved model."""
        return {"framework": self.transformers_model.framework}

    def start_multi_process_pool(self, target_devices: Sequence[str] | None = None) -> dict[str, Any]:
        """Start processes that encode: one per device, by default per GPU, or four on the CPU.

        They read the model from a temporary folder. Pass the result as `pool`, and stop it at the end.
        """
        devices = self.transformer.adapter.devices() if target_devices is None else list(target_devices)
        return processes.start(self, [str(device) for device in devices], self.method)

    @staticmethod
    def stop_multi_process_pool(pool: dict[str, Any]) -> None:
        """End the processes of `start_multi_process_pool`."""
        processes.stop(pool)

    def _in_pool(
        self,
        inputs: Sequence[Any],
        pool: Any,
        device: Any,
        chunk_size: int | None,
        shown: bool,
        **options: Any,
    ) -> list[Any]:
        """The results of the inputs' chunks."""
        own = self.start_multi_process_pool(device) if pool is None else None
        try:
            return processes.run(own or pool, inputs, options, chunk_size, _bar(len(inputs), shown))
        finally:
            if own is not None:
                self.stop_multi_process_pool(own)


def _bar(total: int, shown: bool) -> Any:
    """A function that advances a progress bar, which ends at `total`."""
    steps = with_progress_bar(iter(range(total)), total, shown)

    def advance(count: int) -> None:
        for _ in range(count):
            next(steps, None)

    return advance


def shows_bar(wanted: bool | None) -> bool:
    """Whether a progress bar is shown: by default if the logger "monoblock" logs INFO or DEBUG."""
    return log.getEffectiveLevel() in (logging.INFO, logging.DEBUG) if wanted is None else bool(wanted)


def hub_options(
    name: Any, cache_folder: Any, revision: Any, token: Any, local: bool
) -> tuple[Any, HubOptions]:
    """The model's name, with the organisation if it has none, and the download options."""
    if (
        isinstance(name, str)
        and "/" not in name
        and not Path(name).expanduser().is_dir()
        and name not in PLAIN_NAMES
    ):
        name = f"sentence-transformers/{name}"
    folder = cache_folder or os.environ.get("SENTENCE_TRANSFORMERS_HOME")
    return name, HubOptions(revision=revision, token=token, cache_dir=folder, local_files_only=local)


def check_call(batch_size: Any) -> None:
    """ValueError for an invalid batch size."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: expected an integer of at least 1")


def check_backend(backend: Any, trust_remote_code: Any) -> None:
    """ValueError for another backend than PyTorch's."""
    if backend != "torch":
        raise ValueError(f"backend={backend!r} is not supported; use framework='pt', 'flax' or 'tf'")
    if trust_remote_code:
        raise ValueError("trust_remote_code=True is not supported: code in a model's folder is never run")


class SentenceTransformer(ModuleSequence):
    """Computes vectors of texts, with the interface of the package sentence-transformers.

    Args:
        model_name_or_path: a folder or a name on the hub; names without an organisation are those of
            "sentence-transformers". Without a modules.json, the vectors are the means of the tokens' hidden states, or
            the last token's if the config names a causal language model; a warning reports this.
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
        settings = files.Settings()
        if modules is None:
            name, hub = hub_options(model_name_or_path, cache_folder, revision, token, local_files_only)
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
        if modules is not None:
            self.transformer.adapter.to(device)
        self._place()
        self.prompts: dict[str, str] = {"query": "", "document": "", **settings.prompts, **(prompts or {})}
        self.default_prompt_name = (
            settings.default_prompt_name if default_prompt_name is None else default_prompt_name
        )
        if self.default_prompt_name is not None:
            self._prompt(None, self.default_prompt_name)
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
        text = self._prompt(prompt, prompt_name)
        dim = checked_dim(self.truncate_dim if truncate_dim is None else truncate_dim)
        shown = shows_bar(show_progress_bar)
        vectors = output_value == "sentence_embedding"
        if vectors and self.modules[1:] == []:
            raise ValueError(
                "no module pools the tokens: add Pooling, or use output_value='token_embeddings'"
            )
        if not vectors and precision != "float32":
            raise ValueError(f"precision={precision!r} is for output_value='sentence_embedding'")
        truncated = np.zeros(len(texts), np.int64)
        if pool is not None or isinstance(device, list | tuple):
            if not vectors:
                raise ValueError(f"output_value={output_value!r} is not supported with several processes")
            chunks = self._in_pool(
                texts,
                pool,
                device,
                chunk_size,
                shown,
                prompt=text,
                batch_size=batch_size,
                show_progress_bar=False,
                normalize_embeddings=normalize_embeddings,
                truncate_dim=dim,
                return_truncated=True,
            )
            rows = [row for chunk, _ in chunks for row in chunk]
            if chunks:
                truncated = np.concatenate([counts for _, counts in chunks])
            results: Any = np.stack(rows) if rows else np.zeros(0, np.float32)
            on_host = True
        else:
            if chunk_size is not None:
                raise ValueError("chunk_size is for several processes: pass pool= as well")
            if device is not None:
                self.to(device)
            self.eval()
            encoder = TextEncoder(self.transformer, self.modules[1:], batch_size, text)
            found: list[Any] = [None] * len(texts)
            split = _vectors if vectors else _tokens if output_value else self._everything
            stream = (
                item for batch in encoder.stream(texts) for item in split(batch, normalize_embeddings, dim)
            )
            for index, value in with_progress_bar(stream, len(texts), shown):
                found[index] = value
            encoder.report(len(texts))
            for index, count in encoder.cut.items():
                truncated[index] = count
            on_host = self.transformer.adapter.on_host
            results = np.stack(found) if vectors and on_host and found else found
        if vectors:
            results = self._converted(results, on_host, precision, convert_to_numpy, convert_to_tensor)
        elif on_host and output_value:
            results = [self.transformer.adapter.tensor(states) for states in results]
        if single:
            results, truncated = results[0], int(truncated[0])
        return (results, truncated) if return_truncated else results

    def encode_query(
        self, sentences: Any = None, prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> Any:
        """`encode` with the prompt "query", if no other is given."""
        if prompt_name is None and prompt is None:
            prompt_name = "query"
        return self.encode(sentences, prompt_name, prompt, **options)

    def encode_document(
        self, sentences: Any = None, prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> Any:
        """`encode` with the first prompt of "document", "passage" and "corpus" that has a text, if no other is given."""
        if prompt_name is None and prompt is None:
            prompt_name = next(
                (name for name in ("document", "passage", "corpus") if self.prompts.get(name)), "document"
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

    def _converted(self, vectors: Any, on_host: bool, precision: str, to_numpy: bool, to_tensor: bool) -> Any:
        """The vectors, an array or a list of tensors on the device, in the requested type."""
        adapter = self.transformer.adapter
        if precision != "float32" and len(vectors):
            vectors, on_host = quantize_embeddings(vectors, precision), True
        if to_tensor:
            return adapter.tensor(vectors) if on_host and len(vectors) else adapter.joined(vectors)
        if to_numpy:
            if on_host:
                return vectors if len(vectors) else np.zeros(0, np.float32)
            return np.stack([adapter.numpy(row) for row in vectors]) if vectors else np.zeros(0, np.float32)
        return [adapter.tensor(row) for row in vectors] if on_host else vectors

    def _everything(
        self, batch: Encoded, normalize: bool, dim: int | None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each text's features, without padding."""
        adapter = self.transformer.adapter
        pooled = dict(_vectors(batch, normalize, dim)) if "sentence_embedding" in batch.features else {}
        rows = batch.features["rows"]
        for (index, states), row in zip(_tokens(batch, normalize, dim), rows, strict=True):
            features: dict[str, Any] = {
                name: adapter.tensor(np.asarray(ids, np.int64)) for name, ids in row.items()
            }
            features["attention_mask"] = adapter.tensor(np.ones(len(row["input_ids"]), np.int64))
            for name, value in (("token_embeddings", states), ("sentence_embedding", pooled.get(index))):
                if value is not None:
                    features[name] = adapter.tensor(value) if isinstance(value, np.ndarray) else value
            if "prompt_length" in batch.features:
                features["prompt_length"] = batch.features["prompt_length"]
            yield index, features

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        """The text of a prompt; "" for none."""
        if prompt is not None:
            if name is not None:
                raise ValueError("prompt and prompt_name exclude each other: pass one")
            return prompt
        name = self.default_prompt_name if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            raise ValueError(
                f"there is no prompt {name!r}; the prompts are {', '.join(map(repr, self.prompts))}"
            )
        return self.prompts[name]

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
        extra: dict[str, Any] = {
            "prompts": self.prompts,
            "default_prompt_name": self.default_prompt_name,
            "similarity_fn_name": self._similarity,
        }
        if self.truncate_dim is not None:
            extra["truncate_dim"] = self.truncate_dim
        save(self, path, "SentenceTransformer", extra)

    save = save_pretrained

    def __copy__(self) -> SentenceTransformer:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made.modules = [copy.copy(module) for module in self.modules]
        return made


def save(model: ModuleSequence, path: str | Path, kind: str, extra: Mapping[str, Any]) -> None:
    """Write the modules, modules.json and config_sentence_transformers.json."""
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"save_pretrained needs a folder, but {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for index, module in enumerate(model):
        inner = "" if index == 0 else f"{index}_{module.folder}"
        module.save(folder / inner)
        name = "Transformer" if index == 0 else module.folder
        entries.append({"idx": index, "name": str(index), "path": inner, "type": SAVED_PATH + name})
    settings = {"model_type": kind, "__version__": files.versions(), **extra}
    with staged(folder) as stage:
        stage.write("modules.json", files.as_json(entries))
        stage.write(files.CONFIG, files.as_json(settings))


def _read(name: Any, hub: HubOptions, settings: files.Settings, given: dict[str, Any]) -> list[Any]:
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
                f"text {index} is a {type(text).__name__}: expected strings; pairs, images and messages are not supported"
            )
    return [str(text) for text in texts], single


def checked_dim(value: Any) -> int | None:
    """None, or an integer of at least 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"truncate_dim={value!r}: expected an integer of at least 1, or None")
    return value


def merged(kwargs: Mapping[str, Any] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments with those that are given on their own."""
    found = dict(kwargs or {})
    for name, value in given.items():
        if value is not None:
            if name in found:
                raise ValueError(f"{name} is given twice: as an argument and in model_kwargs")
            found[name] = value
    return found


def both(name: str, value: Any, old: str, old_value: Any) -> Any:
    """The value of an argument with two names."""
    if value is not None and old_value is not None:
        raise ValueError(f"{name} and {old} are the same argument: pass one")
    return old_value if value is None else value


def _vectors(batch: Encoded, normalize: bool, dim: int | None) -> Iterator[tuple[int, Any]]:
    """Each text's vector."""
    vectors = batch.features["sentence_embedding"]
    if dim is not None:
        vectors = vectors[..., :dim]
    if normalize:
        vectors = ops_of(vectors).normalized(vectors)
    return zip(batch.indices, vectors, strict=True)


def _tokens(batch: Encoded, normalize: bool, dim: int | None) -> Iterator[tuple[int, Any]]:
    """Each text's token states, without padding."""
    del normalize, dim  # of the texts' vectors
    states, mask = batch.features["token_embeddings"], batch.features.get("attention_mask")
    for row, index in enumerate(batch.indices):
        yield index, states[row] if mask is None else states[row][mask[row] != 0]
