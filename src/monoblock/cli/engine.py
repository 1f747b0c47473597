"""The engine of `generate` and `chat`: a model with its tokenizer, which turns prompts into streamed text."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from monoblock.cli.options import DownloadOptions, FrameworkModelOptions

# {"role": "system" | "user" | "assistant", "content": ...}, and optionally "image": PATH.
Message = dict[str, str]

# Settings under which a cache cannot be continued from the previous call, so that each call starts without one.
NO_REUSE = (
    "use_cache",
    "cache_implementation",
    "prompt_lookup_num_tokens",
    "guidance_scale",
    "num_beams",
    "num_return_sequences",
)


# The default number of new tokens; not an argument of `generate`.
DEFAULT_TOKENS = "default_new_tokens"


@dataclass
class Reply:
    """The text generated so far, with token counts and `time.perf_counter` readings in seconds."""

    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0
    interrupted: bool = False

    def summary(self) -> str:
        """Counts and speeds in one line: time to first token for the prompt, tokens per second from then on."""
        prompt = f"prompt: {_tokens(self.prompt_tokens)}"
        if not self.tokens:
            return f"[no tokens; {prompt}]"
        line = f"[{_tokens(self.tokens)} in {self.last - self.started:.2f} s"
        if self.tokens > 1 and self.last > self.first:
            line += f": {(self.tokens - 1) / (self.last - self.first):.1f} tokens/s"
        return f"{line}; {prompt}, {self.first - self.started:.2f} s]"


@dataclass
class Past:
    """The KV cache of the last reply, and the ids of the cached tokens."""

    cache: Any = None
    ids: list[int] = field(default_factory=list[int])

    def take(self, prompt: list[int]) -> Any:
        """Remove and return the cache if its tokens are a proper prefix of `prompt`, else None."""
        cache, length = self.cache, len(self.ids)
        fits = cache is not None and 0 < length < len(prompt) and prompt[:length] == self.ids
        self.cache, self.ids = None, []
        return cache if fits else None

    def keep(self, output: Any) -> None:
        """Store the cache that a `generate` call returned."""
        self.cache = output.past_key_values
        if self.cache is not None:
            self.ids = output.sequences[0, : self.cache.get_seq_length()].tolist()


@dataclass(frozen=True)
class ChatEngine:
    """A model with its tokenizer, its processor if it takes images, and the KV cache of the conversation."""

    model: Any
    tokenizer: Any
    name: str
    processor: Any = None
    past: Past = field(default_factory=Past)
    pytorch: bool = True

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    def limits(self, fallback: int) -> dict[str, int]:
        """The default limit on new tokens: that of generation_config.json, else `fallback`; `_generate` reduces it to
        what fits in the model's context."""
        return {DEFAULT_TOKENS: getattr(self.config, "max_new_tokens", None) or fallback}

    @property
    def config(self) -> Any:
        """The model's generation config, or None."""
        return getattr(self.model, "generation_config", None)

    def complete(self, prompt: str, options: dict[str, Any], write: Callable[[str], None]) -> Reply:
        """Continue a text; `write` receives it in chunks as it is generated. Ctrl-C stops generation."""
        return self._generate(self.tokenizer(prompt, return_tensors=self._tensors), options, write)

    def answer(self, messages: list[Message], options: dict[str, Any], write: Callable[[str], None]) -> Reply:
        """Answer the last message, by the model's chat template or by continuing the plain text of all messages.

        The KV cache of the previous reply is reused.
        """
        image = next((message["image"] for message in messages if "image" in message), None)
        if image is not None:
            return self._generate(self._image_inputs(image, messages), options, write)
        if self.has_template:
            inputs = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors=self._tensors
            )
        else:
            inputs = self.tokenizer(_plain(messages), return_tensors=self._tensors)
        if not self.pytorch or any(options.get(n) or getattr(self.config, n, None) for n in NO_REUSE):
            return self._generate(inputs, options, write)
        return self._generate(inputs, options, write, self.past)

    def _image_inputs(self, image: str, messages: list[Message]) -> Any:
        """The processor's outputs for an image and the conversation about it."""
        self.need_images()
        return self.processor(text=[_plain(messages)], images=[image], return_tensors=self._tensors)

    @property
    def _tensors(self) -> str:
        return "pt" if self.pytorch else "np"

    def need_images(self) -> None:
        """ValueError for a model that takes no images."""
        if self.processor is None:
            raise ValueError(f"{self.name} takes no images: chat with an image-text model, such as Fuyu")

    def _generate(
        self, inputs: Any, options: dict[str, Any], write: Callable[[str], None], past: Past | None = None
    ) -> Reply:
        reply = Reply()
        count = (options := dict(options)).pop(DEFAULT_TOKENS, None)
        if count is not None and "max_new_tokens" not in options:
            room = self.model.room(len(inputs["input_ids"][0]))
            options["max_new_tokens"] = count if room is None else max(1, min(count, room))
        streamer = _streamer(self.tokenizer, reply, write)
        if "stop_strings" in options:
            options = options | {"tokenizer": self.tokenizer}
        if past is not None:
            options = options | {"return_dict_in_generate": True}
            if (cache := past.take(inputs["input_ids"][0].tolist())) is not None:
                options["past_key_values"] = cache
        try:
            if self.pytorch:
                inputs = inputs.to(self.model.device)
            output = self.model.generate(**inputs, streamer=streamer, **options)
        except KeyboardInterrupt:  # perhaps within a layer, so the cache is not reusable
            reply.interrupted = True
            streamer.end()  # flush: the streamer holds back the last, possibly incomplete word
        else:
            if past is not None:
                past.keep(output)
        return reply


def _plain(messages: list[Message]) -> str:
    return "\n".join(message["content"] for message in messages)


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def load(
    source: FrameworkModelOptions,
    hub: DownloadOptions,
    attention: str | None = None,
    what: str = "monoblock generate",
    *,
    chat: bool = False,
    sharded: bool = False,
) -> ChatEngine:
    """Load model and tokenizer. `attention`: `attn_implementation` of from_pretrained. `what`: the command, for
    errors. `chat`: the embedded demo has its chat adapter. `sharded`: this process's shard of the model, in the
    processes of `shards.processes`."""
    from monoblock.pipelines.frameworks import chosen
    from monoblock.serving.engine.loading import processor_of

    framework = chosen(source.framework, what)  # fails before any download
    import monoblock

    path, name = locate(source.model)
    if source.model is None and chat:
        from monoblock import demo_chat

        # The files are mapped into memory, so that they stay until the end of the process.
        folder = tempfile.mkdtemp(prefix="monoblock-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        path = str(demo_chat.merged(Path(folder)))
    where = hub.kwargs() if source.model else {}
    options = source.kwargs() | where | ({} if attention is None else {"attn_implementation": attention})
    pytorch = framework.backend == "pytorch"
    if not pytorch and source.quantize is not None:
        raise typer.BadParameter(f"--quantize needs PyTorch, but the framework is {framework.name}")
    tokenizer = monoblock.AutoTokenizer.from_pretrained(path, **where)
    auto = getattr(monoblock, f"{framework.prefix}AutoModelForCausalLM")
    if pytorch:
        device = None if sharded else device_map(source.device)
        if sharded:
            options["tp_plan"] = "auto"
        model = auto.from_pretrained(path, **options, **({"device_map": device} if device else {}))
        model.eval()
    else:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only, no hardware reports
        config = monoblock.AutoConfig.from_pretrained(path, **where)
        device = None if source.device == "auto" else source.device
        model = framework.adapter.load(auto, path, device, config=config, **options)
    return ChatEngine(model, tokenizer, name, processor_of(model, path, where), pytorch=pytorch)


def need_pytorch(what: str) -> None:
    """ImportError with the pip command if PyTorch is not installed; called before any download."""
    from monoblock.pipelines.frameworks import FRAMEWORKS

    framework = FRAMEWORKS["pt"]
    if framework.missing() is not None:
        raise ImportError(f"{what} runs on {framework.name}, which is not installed: {framework.install}")


def locate(model: str | None) -> tuple[str, str]:
    """The path (or name on the hub) and the display name of a model; None means the embedded demo."""
    if model is None:
        from monoblock import demo

        return str(demo.path()), "the embedded demo"
    return model, model


def device_map(wanted: str) -> str | None:
    """The `device_map` for a --device value; None leaves the model on the CPU and does not need accelerate."""
    if wanted.isdecimal():  # a GPU index, as in transformers' commands
        return f"cuda:{wanted}"
    if wanted != "auto":
        return None if wanted == "cpu" else wanted
    import torch

    return "auto" if torch.cuda.is_available() else None


def _streamer(tokenizer: Any, reply: Reply, write: Callable[[str], None]) -> Any:
    """A text streamer that records counts and times in `reply` and passes the text to `write`."""
    from monoblock import TextStreamer

    class Recorder(TextStreamer):
        def put(self, value: Any) -> None:
            count = len(value.reshape(-1))
            if not reply.prompt_tokens:  # the first call has the prompt, which is not shown
                reply.prompt_tokens = count
            else:
                reply.last = time.perf_counter()
                reply.first = reply.first or reply.last
                reply.tokens += count
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            del stream_end  # the command writes the final line end
            reply.text += text
            write(text)

    return Recorder(tokenizer, skip_prompt=True, skip_special_tokens=True)
