"""A loaded model and its tokenizer, as `generate` and `chat` use them: prompt in, streamed text out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from monoblock.cli.options import Hub, Source

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}


@dataclass
class Reply:
    """What a model answered, as far as it came, and how long that took (seconds)."""

    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0
    interrupted: bool = False

    def summary(self) -> str:
        """Counts and speeds in one line. The first token's time is the prompt's; the others are the speed."""
        prompt = f"prompt: {_tokens(self.prompt_tokens)}"
        if not self.tokens:
            return f"[no tokens; {prompt}]"
        line = f"[{_tokens(self.tokens)} in {self.last - self.started:.2f} s"
        if self.tokens > 1 and self.last > self.first:
            line += f": {(self.tokens - 1) / (self.last - self.first):.1f} tokens/s"
        return f"{line}; {prompt}, {self.first - self.started:.2f} s]"


@dataclass(frozen=True)
class Engine:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Any
    name: str

    @property
    def has_template(self) -> bool:
        """Whether the model was made for conversations."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    def limits(self, fallback: int) -> dict[str, int]:
        """How long a text may get if the user does not say: as the model's file says, else `fallback` tokens."""
        config = getattr(self.model, "generation_config", None)
        return {"max_new_tokens": getattr(config, "max_new_tokens", None) or fallback}

    def complete(self, prompt: str, options: dict[str, Any], write: Callable[[str], None]) -> Reply:
        """Continues a text; `write` gets the pieces as they come. Ctrl-C ends it early."""
        return self._generate(self.tokenizer(prompt, return_tensors="pt"), options, write)

    def answer(self, messages: list[Message], options: dict[str, Any], write: Callable[[str], None]) -> Reply:
        """Answers the last message: by the model's chat template, or by continuing all as one text."""
        if not self.has_template:
            return self.complete("\n".join(message["content"] for message in messages), options, write)
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        return self._generate(inputs, options, write)

    def _generate(self, inputs: Any, options: dict[str, Any], write: Callable[[str], None]) -> Reply:
        reply = Reply()
        streamer = _streamer(self.tokenizer, reply, write)
        if "stop_strings" in options:
            options = options | {"tokenizer": self.tokenizer}
        try:
            self.model.generate(**inputs.to(self.model.device), streamer=streamer, **options)
        except KeyboardInterrupt:
            reply.interrupted = True
            streamer.end()  # the streamer holds back the last word until it knows where that ends
        return reply


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def load(source: Source, hub: Hub) -> Engine:
    """The model and tokenizer of these options."""
    from monoblock import AutoModelForCausalLM, AutoTokenizer

    path, name = locate(source.model)
    where = hub.kwargs() if source.model else {}
    tokenizer = AutoTokenizer.from_pretrained(path, **where)
    if device := device_map(source.device):
        where = where | {"device_map": device}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=source.dtype.value, **where)
    model.eval()
    return Engine(model, tokenizer, name)


def locate(model: str | None) -> tuple[str, str]:
    """Where a model is, and what to call it; no model means the embedded one."""
    if model is None:
        from monoblock import demo

        return str(demo.path()), "the embedded demo"
    return model, model


def device_map(wanted: str) -> str | None:
    """The device map to load with; None leaves the model on the CPU, with no need for accelerate."""
    if wanted != "auto":
        return None if wanted == "cpu" else wanted
    import torch

    return "auto" if torch.cuda.is_available() else None


def _streamer(tokenizer: Any, reply: Reply, write: Callable[[str], None]) -> Any:
    """A text streamer that fills in the reply while it passes the text on."""
    from monoblock import TextStreamer

    class Recorder(TextStreamer):
        def put(self, value: Any) -> None:
            count = len(value.reshape(-1))
            if not reply.prompt_tokens:  # the prompt comes first, and is not shown
                reply.prompt_tokens = count
            else:
                reply.last = time.perf_counter()
                reply.first = reply.first or reply.last
                reply.tokens += count
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            del stream_end  # the command decides how a reply ends
            reply.text += text
            write(text)

    return Recorder(tokenizer, skip_prompt=True, skip_special_tokens=True)
