"""`generate --pipeline-parallel N`: the serving engine with one request, its layers in N processes of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from monoblock.cli.engine import DEFAULT_TOKENS, Reply
from monoblock.cli.options import DownloadOptions, FrameworkModelOptions

# Options of `generate` by the names of `SamplingParams`.
NAMES = {
    "max_new_tokens": "max_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
}


@contextmanager
def loaded(count: int, source: FrameworkModelOptions, hub: DownloadOptions) -> Iterator[PipelineEngine]:
    """The model in `count` processes, which end with the context."""
    from monoblock.serving.engine.loading import load_engine
    from monoblock.serving.engine.options import EngineOptions

    engine = load_engine(
        source.model,
        options=EngineOptions(max_sequences=1),
        dtype=source.dtype.value,
        quantize=None if source.quantize is None else source.quantize.value,
        device=source.device,
        hub=hub.kwargs() if source.model else None,
        pipeline_parallel=count,
    )
    try:
        yield PipelineEngine(engine)
    finally:
        engine.close()


@dataclass(frozen=True)
class PipelineEngine:
    """An engine with the methods of `ChatEngine` that `generate` calls."""

    engine: Any

    def limits(self, fallback: int) -> dict[str, int]:
        """As of `ChatEngine`."""
        return {DEFAULT_TOKENS: self.engine.generation_config.max_new_tokens or fallback}

    def complete(self, prompt: str, options: dict[str, Any], write: Callable[[str], None]) -> Reply:
        """Continue a text; `write` receives it as it is generated. Ctrl-C stops generation."""
        ids: list[int] = self.engine.tokenizer(prompt)["input_ids"]
        options = dict(options)
        stops: list[str] = options.pop("stop_strings", [])
        reply, stopped = Reply(prompt_tokens=len(ids)), False

        def sink(delta: Any) -> None:
            nonlocal stopped
            reply.last = time.perf_counter()
            reply.first = reply.first or reply.last
            reply.tokens += len(delta.tokens)
            before = len(prompt) + len(reply.text)
            reply.text += delta.text
            write(delta.text)
            # As in `generate`, a stop string may begin in the prompt, and the token that completes it is shown whole.
            text = prompt + reply.text
            stopped = stopped or any(text.find(s, max(0, before - len(s) + 1)) >= 0 for s in stops)

        request = self.engine.add(ids, self._params(len(ids), options), sink=sink)
        try:
            while not stopped and self.engine.step():
                pass
            self.engine.cancel(request)  # without effect at its end
        except KeyboardInterrupt:
            reply.interrupted = True
        if request.error is not None:
            raise request.error
        return reply

    def _params(self, prompt: int, options: dict[str, Any]) -> Any:
        """The sampling parameters: those of the command, else of the model's generation config, else `generate`'s."""
        from monoblock.serving.engine.params import SamplingParams

        options = dict(options)
        room = max(1, self.engine.max_model_len - prompt)
        limit = options.pop(DEFAULT_TOKENS)
        samples = options.pop("do_sample", self.engine.generation_config.do_sample)
        values = {"max_tokens": min(limit, room), **self.engine.defaults()}
        values |= {NAMES[name]: value for name, value in options.items()}
        if not samples:  # also of a model whose defaults would be those of sampling
            values = {k: v for k, v in values.items() if k not in ("top_k", "top_p", "min_p")}
            values["temperature"] = 0.0
        elif "top_k" not in values:
            values["top_k"] = 50  # the default of `generate`
        return SamplingParams(**values)
