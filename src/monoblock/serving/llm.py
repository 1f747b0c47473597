"""`LLM`: many prompts at once, in a Python program."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from monoblock.checkpoint.save import parse_size
from monoblock.field_types import brief
from monoblock.serving import inputs
from monoblock.serving.engine.engine import Engine
from monoblock.serving.engine.options import EngineOptions
from monoblock.serving.engine.params import SamplingParams
from monoblock.serving.engine.results import Completion, Delta, best
from monoblock.serving.engine.sequence import EngineRequest
from monoblock.serving.inputs import LLMPrompt
from monoblock.serving.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    LogprobReader,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)

TASKS = ("generate", "embed", "classify")
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


SPECULATIVE = {"suffix": "suffix", "ngram": "lookup"}  # vLLM's methods that need no model -> ours


def _speculation(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The engine's options of a `speculative_config`. ValueError: an unknown key or method."""
    if config is None:
        return {}
    known = ("method", "num_speculative_tokens")
    if unknown := [key for key in config if key not in known]:
        raise ValueError(f"speculative_config has the key {unknown[0]!r}: expected {' and '.join(known)}")
    if (method := config.get("method")) not in SPECULATIVE:
        raise ValueError(
            f"speculative_config['method']={brief(method)}: expected one of {', '.join(SPECULATIVE)}; other methods "
            "need a draft model"
        )
    return {"speculation": SPECULATIVE[method], "speculative_tokens": config.get("num_speculative_tokens")}


class LLM:
    """A model for many prompts at once, with vLLM's interface.

        llm = LLM("mistralai/Mistral-7B-Instruct-v0.3", quantization="int4")
        for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64)):
            print(output.outputs[0].text)

    Prompts join and leave the running batch at every step; a prompt's tokens are those that it has alone.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        tokenizer: Any = None,
        task: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        device: str = "auto",
        adapter: str | Path | None = None,
        max_model_len: int | None = None,
        cache_memory: int | str | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 256,
        enable_prefix_caching: bool | None = None,
        speculative_config: Mapping[str, Any] | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        **hub: Any,
    ) -> None:
        """
        Args:
            model: a folder, a name on the hub, or one of monoblock's PyTorch models; None: the embedded demo.
            tokenizer: a folder, a name or a tokenizer, if it is not the model's own.
            task: "generate", "embed" or "classify"; by default what the model's config names.
            dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
            quantization: "int8", "int4" or "lossless".
            device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
            adapter: folder or name of a LoRA adapter.
            max_model_len: tokens of a prompt and its continuation at most; by default the model's context.
            cache_memory: memory of the KV cache, in bytes or as "4GB"; by default a quarter of what is free.
            max_num_seqs: sequences that are computed at once.
            max_num_batched_tokens: tokens of one step; a longer prompt is computed in chunks.
            enable_prefix_caching: prompts that begin with the same tokens share their cache; by default where it is
                possible.
            speculative_config: drafts without a model, such as `{"method": "suffix", "num_speculative_tokens": 24}`;
                the methods are "suffix" and "ngram" (prompt lookup).
            tensor_parallel_size: processes of this machine over which a model that generates text is sharded, this one
                and others that are started; on GPUs, one each, or CPUs.
            pipeline_parallel_size: processes among which its layers are divided instead.
            hub: the download options `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`,
                `subfolder`.
        """
        if unknown := [name for name in hub if name not in HUB]:
            raise TypeError(f"LLM takes no argument {unknown[0]!r}")
        if task is not None and task not in TASKS:
            raise ValueError(f"task={task!r}: expected one of {', '.join(TASKS)}")
        self.model = model
        self._hub = hub
        self._loading = {"dtype": dtype, "quantization": quantization, "device": device}
        self._adapter = None if adapter is None else str(adapter)
        self._tokenizer = tokenizer
        self.task = task or self._detected()
        memory = cache_memory
        self._options = EngineOptions(
            cache_memory=_bytes(memory) if isinstance(memory, str) else memory,
            max_sequences=max_num_seqs,
            max_step_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            prefix_cache=enable_prefix_caching is not False,
            **_speculation(speculative_config),
        )
        sizes = {"tensor_parallel": tensor_parallel_size, "pipeline_parallel": pipeline_parallel_size}
        self._processes = {
            name: self._checked_size(f"{name}_size", size, enable_prefix_caching)
            for name, size in sizes.items()
        }
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        if self.task == "generate":
            self._engine = self._load_engine()
        elif adapter is not None:
            raise ValueError(
                f"adapter is for models that generate text; this one is for the task {self.task!r}"
            )

    def _checked_size(self, option: str, count: Any, prefix_caching: bool | None) -> int:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{option}={count!r}: expected a number of processes from 1")
        if count == 1:
            return count
        if self.task != "generate":
            raise ValueError(f"{option} is for models that generate text; this one is for {self.task!r}")
        if self.model is not None and not isinstance(self.model, str | Path):
            raise ValueError(f"{option} needs a folder or a name, not a loaded model")
        for name, given in (("adapter", self._adapter), ("enable_prefix_caching=True", prefix_caching)):
            if given:
                raise ValueError(f"{name} is not supported with {option}={count}")
        return count

    def _detected(self) -> str:
        if self.model is None or not isinstance(self.model, str | Path):
            return "generate"
        from monoblock.serving.server.kinds import detect

        return detect(str(self.model), self._hub).value

    def _load_engine(self) -> Engine:
        from monoblock.serving.engine.loading import load_engine, make_engine

        tokenizer = self._tokenizer
        if isinstance(tokenizer, str | Path):
            from monoblock import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if self.model is not None and not isinstance(self.model, str | Path):
            if tokenizer is None:
                raise ValueError("with a model object, pass its tokenizer too: LLM(model, tokenizer=...)")
            given = {"quantization": None, "dtype": "auto", "device": "auto"}
            if changed := [name for name, value in given.items() if self._loading[name] != value]:
                raise ValueError(f"{changed[0]} has no effect on a loaded model: load it with it")
            return make_engine(self.model, tokenizer, options=self._options)
        engine = load_engine(
            None if self.model is None else str(self.model),
            options=self._options,
            dtype=self._loading["dtype"] or "auto",
            quantize=self._loading["quantization"],
            device=self._loading["device"] or "auto",
            adapter=self._adapter,
            hub=self._hub or None,
            tensor_parallel=self._processes["tensor_parallel"],
            pipeline_parallel=self._processes["pipeline_parallel"],
        )
        if tokenizer is not None:
            engine.tokenizer = tokenizer
        return engine

    # ------------------------------------------------------------------ generation

    def get_tokenizer(self) -> Any:
        """The tokenizer."""
        return self._engine.tokenizer if self.task == "generate" else self._encoder.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of calls without any: those of the model's generation_config.json."""
        self._need("generate", "generate")
        values, config = self._engine.defaults(), self._engine.generation_config
        if "max_new_tokens" in config.set_fields():
            values["max_tokens"] = config.max_new_tokens
        return SamplingParams(**values)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The continuations of prompts, in their order.

        Args:
            prompts: a text, token ids, `{"prompt": text}`, `{"prompt_token_ids": ids}`, or
                `{"prompt": text, "multi_modal_data": {"image": image}}` for an image-text model; or a list of those.
            sampling_params: for all prompts, or one for each; default: `get_default_sampling_params()`.
            use_tqdm: show a progress bar, if standard error is a terminal.

        ValueError, before anything is computed, for a prompt or parameters that cannot be used.
        """
        self._need("generate", "generate")
        return self._run(inputs.prompts_of(prompts, self._engine.tokenizer), sampling_params, use_tqdm)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """The answers to conversations, in their order; the prompts are those of `apply_chat_template`.

        `messages`: a conversation, `[{"role": ..., "content": ...}, ...]`, or a list of conversations. For an
        image-text model the content may be a list of `{"type": "text", "text": ...}` and
        `{"type": "image", "image": ...}`.
        """
        self._need("generate", "chat")
        tokenizer = self._engine.tokenizer
        found: list[LLMPrompt] = []
        for chat in inputs.conversations_of(messages):
            prompt = inputs.image_prompt(chat) if self._engine.processor is not None else None
            if prompt is None:
                text: str = tokenizer.apply_chat_template(
                    list(chat),
                    tools=tools,
                    documents=documents,
                    chat_template=chat_template,
                    add_generation_prompt=add_generation_prompt and not continue_final_message,
                    continue_final_message=continue_final_message,
                    tokenize=False,
                    **(chat_template_kwargs or {}),
                )
                prompt = LLMPrompt(text)
            found.append(prompt)
        inputs.tokenize(found, tokenizer, special=False)  # the template writes them
        return self._run(found, sampling_params, use_tqdm)

    def _run(
        self,
        prompts: list[LLMPrompt],
        given: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        every = self._parameters(given, len(prompts))
        for index, (prompt, params) in enumerate(zip(prompts, every, strict=True)):
            if prompt.image is None:
                try:
                    self._engine.check(prompt.ids or [], params)
                except ValueError as error:
                    raise ValueError(f"prompts[{index}]: {error}") from None
            elif self._engine.processor is None:
                raise ValueError(f"prompts[{index}] has an image, which this model does not take")
        with self._lock, _bar(len(prompts), use_tqdm, "prompts") as advance:
            run = _Run(self._engine, prompts, every, advance)
            return run.execute(self._numbers)

    def _parameters(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if given is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        every = list(given)
        if len(every) != count:
            raise ValueError(
                f"there are {len(every)} sampling_params for {count} prompts: pass one, or one for each"
            )
        if wrong := [item for item in every if not isinstance(cast("Any", item), SamplingParams)]:
            raise TypeError(f"sampling_params must be SamplingParams, got {brief(wrong[0])}")
        return every

    # ------------------------------------------------------------------ vectors, labels, scores

    def embed(self, prompts: Any, use_tqdm: bool = True, **options: Any) -> list[EmbeddingRequestOutput]:
        """The vectors of texts, in their order; `options`: further arguments of `SentenceTransformer.encode`, such as
        `prompt_name`, `normalize_embeddings`, `truncate_dim` or `batch_size`."""
        self._need("embed", "embed")
        texts = _texts(prompts)
        vectors = self._encoder.encode(texts, show_progress_bar=use_tqdm and _terminal(), **options)
        return [
            EmbeddingRequestOutput(self._number(), ids, EmbeddingOutput(vector.tolist()))
            for ids, vector in zip(self._ids(texts), vectors, strict=True)
        ]

    def classify(self, prompts: Any, use_tqdm: bool = True) -> list[ClassificationRequestOutput]:
        """The probabilities of the labels of texts, in their order, as by the pipeline "text-classification"."""
        self._need("classify", "classify")
        texts = _texts(prompts)
        labels: dict[int, str] = self._encoder.config.id2label
        numbers = {label: index for index, label in labels.items()}
        found: list[ClassificationRequestOutput] = []
        with _bar(len(texts), use_tqdm, "texts") as advance:
            answers = self._classifier(
                texts, top_k=None, truncation=True, max_length=self._encoder.max_seq_length, batch_size=32
            )
            for ids, ranked in zip(self._ids(texts), answers, strict=True):
                probs = [0.0] * len(ranked)
                for entry in ranked:
                    probs[numbers[entry["label"]]] = entry["score"]
                output = ClassificationOutput(probs, ranked[0]["label"])
                found.append(ClassificationRequestOutput(self._number(), ids, output))
                advance(1, len(ids))
        return found

    def score(
        self, text_1: str | Sequence[str], text_2: str | Sequence[str], use_tqdm: bool = True
    ) -> list[ScoringRequestOutput]:
        """The scores of pairs: of a cross-encoder its own, of an embedding model the similarity of the vectors.

        A single `text_1` is paired with each of `text_2`; else both have the same length.
        """
        if self.task == "generate":
            self._need("classify", "score")
        left, right = _texts(text_1), _texts(text_2)
        if len(left) == 1:
            left = left * len(right)
        if len(left) != len(right):
            raise ValueError(
                f"there are {len(left)} and {len(right)} texts: pass one and many, or as many of both"
            )
        shown = use_tqdm and _terminal()
        if self.task == "embed":
            first, second = (self._encoder.encode(texts, show_progress_bar=shown) for texts in (left, right))
            scores = self._encoder.similarity_pairwise(first, second)
        else:
            if (count := self._encoder.num_labels) != 1:
                raise ValueError(
                    f"the model has {count} labels; pairs are scored by a model with one: use classify"
                )
            scores = self._encoder.predict(list(zip(left, right, strict=True)), show_progress_bar=shown)
        ids = zip(self._ids(left), self._ids(right), strict=True)
        return [
            ScoringRequestOutput(self._number(), a + b, ScoringOutput(float(value)))
            for (a, b), value in zip(ids, scores, strict=True)
        ]

    @cached_property
    def _encoder(self) -> Any:
        """The `SentenceTransformer` or `CrossEncoder`."""
        import monoblock

        source = monoblock.demo.path() if self.model is None else self.model
        if not isinstance(source, str | Path):
            raise ValueError(f"the task {self.task!r} needs a folder or a name, not a loaded model")
        hub = dict(self._hub)
        if unknown := hub.keys() - {"revision", "token", "local_files_only", "cache_dir"}:
            raise ValueError(f"{min(unknown)} is not supported for the task {self.task!r}")
        if "cache_dir" in hub:
            hub["cache_folder"] = hub.pop("cache_dir")
        make = monoblock.SentenceTransformer if self.task == "embed" else monoblock.CrossEncoder
        device = self._loading["device"]
        loaded: Any = make(
            str(source),
            device=None if device == "auto" else device,
            dtype=self._loading["dtype"],
            quantization_config=self._loading["quantization"],
            **hub,
        )
        if self._options.max_model_len is not None:
            loaded.max_seq_length = self._options.max_model_len
        return loaded

    @cached_property
    def _classifier(self) -> Any:
        from monoblock import pipeline

        encoder = self._encoder
        model = encoder.transformers_model
        return pipeline("text-classification", model=model, tokenizer=encoder.tokenizer, device=model.device)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        limit = self._encoder.max_seq_length
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        rows: Any = self._encoder.tokenizer(texts, verbose=False, **cut)["input_ids"]
        return [list(row) for row in rows]

    def _number(self) -> str:
        return str(next(self._numbers))

    def _need(self, task: str, method: str) -> None:
        if self.task != task:
            name = getattr(self.model, "name_or_path", None) or self.model or "the demo"
            raise ValueError(
                f"{method} needs a model for the task {task!r}, and {name} is for {self.task!r}; load another, or pass "
                f"task={task!r}"
            )


class _Run:
    """One call of `generate`: feeds the engine as sequences finish."""

    def __init__(
        self,
        engine: Engine,
        prompts: list[LLMPrompt],
        params: list[SamplingParams],
        advance: Callable[[int, int], None],
    ) -> None:
        self.engine, self.prompts, self.params, self.advance = engine, prompts, params, advance
        self.reader = LogprobReader(engine.tokenizer)
        self.active: dict[int, tuple[EngineRequest, list[Completion]]] = {}
        self.results: list[RequestOutput | None] = [None] * len(prompts)

    def execute(self, numbers: Any) -> list[RequestOutput]:
        """All results. After an error, or Ctrl-C, nothing is left in the engine."""
        waiting = iter(range(len(self.prompts)))
        ids = [str(next(numbers)) for _ in self.prompts]
        try:
            following = next(waiting, None)
            while following is not None or self.active:
                while following is not None and self._room(self.params[following].sequences):
                    self._add(following)
                    following = next(waiting, None)
                self.engine.step()
                for index in [index for index, (request, _) in self.active.items() if request.done]:
                    self._finish(index, ids[index])
        finally:
            for request, _ in self.active.values():
                self.engine.cancel(request)
        return cast("list[RequestOutput]", self.results)

    def _room(self, count: int) -> bool:
        """Whether `count` more sequences may wait: enough that the batch stays full."""
        scheduler, options = self.engine.scheduler, self.engine.options
        waiting = len(scheduler.waiting)
        return waiting < options.max_sequences and (not waiting or waiting + count <= options.max_waiting)

    def _add(self, index: int) -> None:
        prompt, params = self.prompts[index], self.params[index]
        found = [Completion(number) for number in range(params.sequences)]

        def sink(delta: Delta) -> None:
            found[delta.index].add(delta)

        try:
            given: Any = prompt.text if prompt.image is not None else prompt.ids
            request = self.engine.add(given, params, sink=sink, image=prompt.image)
        except (ValueError, TypeError) as error:
            raise type(error)(f"prompts[{index}]: {error}") from error
        self.active[index] = request, found

    def _finish(self, index: int, number: str) -> None:
        request, found = self.active.pop(index)
        if request.error is not None:
            raise RuntimeError(f"prompts[{index}] failed: {request.error}") from request.error
        params, reader = self.params[index], self.reader
        prompt_logprobs = (
            reader.prompt(request.prompt_logprobs) if params.prompt_logprobs is not None else None
        )
        self.results[index] = RequestOutput(
            request_id=number,
            prompt=self.prompts[index].text,
            prompt_token_ids=list(request.prompt),
            outputs=[reader.completion(one, params.logprobs is not None) for one in best(found, params.n)],
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=request.usage.cached,
        )
        self.advance(1, request.usage.completion)


def _texts(given: Any) -> list[str]:
    texts: list[Any] = [given] if isinstance(given, str) else list(given)
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"expected a text or a list of texts, got {brief(wrong[0])}")
    return texts


def _bytes(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ValueError(str(error).replace("max_shard_size", "cache_memory")) from None


def _terminal() -> bool:
    from rich.console import Console

    return Console(stderr=True).is_terminal


def _nothing(count: int, new: int) -> None:
    """Shows no progress."""
    del count, new


@contextmanager
def _bar(total: int, wanted: bool, what: str) -> Generator[Callable[[int, int], None]]:
    """A progress bar on stderr. The function takes a number of finished inputs and of their tokens."""
    if not wanted or total < 2 or not _terminal():
        yield _nothing
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{what}, {{task.fields[speed]}}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar, begin, tokens = bars.add_task("", total=total, speed=""), time.monotonic(), 0

        def advance(count: int, new: int) -> None:
            nonlocal tokens
            tokens += new
            speed = f"{tokens / max(time.monotonic() - begin, 1e-9):,.0f} tokens/s"
            bars.update(bar, advance=count, speed=speed)

        yield advance
