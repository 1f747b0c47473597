"""Generation on PyTorch: the decoder for the framework-independent loop, and the models' `generate`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from monoblock.backends.pytorch.arrays import TorchOps
from monoblock.backends.pytorch.base import ModelBase
from monoblock.backends.pytorch.cache import Cache, DynamicCache, StaticCache
from monoblock.backends.pytorch.checked import TENSORS, check_tensor
from monoblock.backends.pytorch.generation import cuda_graphs, native_decoder
from monoblock.backends.pytorch.generation.decoding_path import GRAPH, NATIVE, decoding_path, report
from monoblock.backends.pytorch.generation.quantized_cache import quantized
from monoblock.backends.pytorch.inputs import cache_of, in_form
from monoblock.errors import UnsupportedConfig
from monoblock.generation import loop
from monoblock.generation.arrays import ArrayOps
from monoblock.generation.config import GenerationConfig
from monoblock.generation.limits import check_memory
from monoblock.generation.mixin import GenerationMixin, check_assistant
from monoblock.generation.resolve import Unsupported
from monoblock.generation.transitions import transition_scores
from monoblock.positions import is_dynamic
from monoblock.spec import Rotary

INPUTS = frozenset({"past_key_values", "position_ids", "inputs_embeds"})
# Inputs of some models. Images are embedded with the prompt; new tokens get the type of the last token.
IMAGES = ("image_patches", "image_patches_indices", "pixel_values")
MORE = frozenset({"token_type_ids", *IMAGES})
# Tokens per chunk of a long prompt: enough for matrix products at full speed.
CHUNK = 1024
UNSUPPORTED: Unsupported = {}  # refused by this backend only


class TorchGenerationMixin(ModelBase, GenerationMixin):
    """Adds `generate` to the models that predict the next token."""

    def generate(
        self,
        inputs: Tensor | Mapping[str, Any] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts (batch, tokens), or a tokenizer's output.

        Gives ids (batch, prompt + new), or a GenerateDecoderOnlyOutput with `return_dict_in_generate=True`.

        Keywords are transformers': the fields of `GenerationConfig` (`max_new_tokens`, `do_sample`, `temperature`,
        ...), `attention_mask`, `logits_processor`, `stopping_criteria`, `streamer`, `tokenizer` (for `stop_strings` and
        `response_format`), `assistant_model` (a smaller model with the same tokenizer), `negative_prompt_ids` (for
        `guidance_scale`), `past_key_values` (the cache of the prompt's beginning), `inputs_embeds`, the model's other
        inputs; besides, `seed` or `generator`, `response_format` (a JSON schema or a regular expression that the new
        text keeps to), and `speculation` ("suffix", "lookup" or "off"). ValueError: an unknown or unsupported option.
        """
        inputs, kwargs = self.generate_arguments(inputs, kwargs)
        for name in self.arguments & TENSORS & kwargs.keys() - {"input_ids", "attention_mask"}:
            if kwargs[name] is not None:
                check_tensor(name, kwargs[name])
        if not isinstance(generator := kwargs.get("generator"), torch.Generator | None):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if self.tensor_group is not None:
            self._agree(kwargs, generation_config)
        with (
            torch.inference_mode(),
            _at_rest(self),
            _assisting(kwargs),
            contextlib.closing(Runner(self)) as runner,
        ):
            return loop.generate(runner, inputs, generation_config, **kwargs)

    def _agree(self, kwargs: dict[str, Any], config: GenerationConfig | None) -> None:
        """Make the processes of a sharded model draw the same tokens: without a seed of the caller's, the first
        process chooses one. ValueError: `max_time` and `speculation`, whose steps depend on each process's clock."""
        given = kwargs.get("max_time", getattr(config or self.generation_config, "max_time", None))
        if given is not None:
            self.refuse_sharded("max_time")
        if kwargs.get("speculation") not in (None, "off"):
            self.refuse_sharded("speculation")
        if kwargs.get("seed") is None and kwargs.get("generator") is None:
            assert self.tensor_group is not None
            kwargs["seed"] = self.tensor_group.agreed(int(torch.randint(1 << 31, ())))

    def decoding_path(self) -> str:
        """How `generate` makes the tokens after a prompt on this model as it is now: "native step" (one call of the
        native library per token), "CUDA graph", or, where it calls the modules one by one, why: "forward hook on ...".

        A call may have further reasons, such as `output_attentions=True`; `generate` logs its own, at the level INFO.
        """
        return decoding_path(self)

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: Sequence[Tensor],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """(rows, new tokens) scores of the chosen tokens, from an output of `generate(..., output_scores=True)`.

        Beam search's scores need its `beam_indices`. `normalize_logits`: log-probabilities instead of raw scores.
        """
        return transition_scores(
            TorchOps(sequences.device), sequences, scores, beam_indices, normalize_logits
        )


@contextlib.contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without dropout; restores the previous mode."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


@contextlib.contextmanager
def _assisting(kwargs: dict[str, Any]) -> Iterator[None]:
    """Wrap an `assistant_model` in a Runner."""
    helper = kwargs.get("assistant_model")
    if helper is None:
        yield
        return
    check_assistant(helper, TorchGenerationMixin)
    kwargs["assistant_model"] = Runner(helper)
    with _at_rest(helper):
        yield


class Runner:
    """A model as `loop.generate` uses it."""

    ops: ArrayOps
    compiled = None
    unsupported = UNSUPPORTED

    def __init__(self, model: TorchGenerationMixin) -> None:
        self.model = model
        self.input_names = INPUTS | MORE.intersection((*model.row.forward.split(), *model.extra))
        self.ops = TorchOps(model.device)
        self.generation_config = model.generation_config
        self.max_positions = model.max_positions
        self.vocab: int | None = model.spec.vocab
        self.graphed: list[cuda_graphs.GraphDecoder] = []
        self.decoders: list[CachedDecoder] = []

    def decoder(
        self, plan: loop.GenerationPlan, inputs: dict[str, Any]
    ) -> CachedDecoder | cuda_graphs.GraphDecoder:
        """A decoder for one call."""
        decoder = CachedDecoder(self.model, plan, inputs)
        self.decoders.append(decoder)
        why = cuda_graphs.call_obstacle(decoder, plan)
        if self.model.device.type in cuda_graphs.CAPTURE:
            report(self.model, why or GRAPH)
        if why is not None:
            return decoder
        self.graphed.append(cuda_graphs.GraphDecoder(decoder, plan, given="past_key_values" in inputs))
        return self.graphed[-1]

    def close(self) -> None:
        """End the call; a given cache object of transformers receives the tokens."""
        for decoder in self.decoders:
            if decoder.form is not None and not isinstance(decoder.form, str):
                in_form(decoder.cache, decoder.form)
        for decoder in self.graphed:
            decoder.close()


class CachedDecoder:
    """A model in the middle of one generation: its cache, positions and mask."""

    def __init__(
        self, model: TorchGenerationMixin, plan: loop.GenerationPlan, inputs: dict[str, Any]
    ) -> None:
        self.model, config = model, plan.config
        self.embeds: Tensor | None = inputs.get("inputs_embeds")
        self.positions: Tensor | None = inputs.get("position_ids")
        self.types: Tensor | None = inputs.get("token_type_ids")
        self.images = {name: inputs[name] for name in IMAGES if name in inputs}
        self.cache, self.form = self._cache(plan, inputs.get("past_key_values"))
        self.attentions = self.hidden_states = None
        self.chunk, self.verifies = config.prefill_chunk_size, plan.rewinds
        self.wanted = {
            "output_attentions": bool(config.return_dict_in_generate and config.output_attentions),
            "output_hidden_states": bool(config.return_dict_in_generate and config.output_hidden_states),
        }
        self.mask: Tensor | None = None
        self.ids: Tensor | None = None

    def _cache(self, plan: loop.GenerationPlan, past: Any) -> tuple[Cache | None, Any]:
        if past is not None:
            return cache_of(past, self.model.spec, plan.batch)
        if not plan.config.use_cache:
            return None, None
        if plan.config.cache_implementation == "static":
            length = plan.config.max_cache_len or plan.max_length
            if self.model.device.type == "cpu":  # other devices raise their own error at once
                check_memory(self.model.spec, plan.rows, length, self.model.dtype.itemsize)
            return StaticCache(max_cache_len=length), None
        if plan.config.cache_implementation == "quantized":
            return quantized(plan.config.cache_config or {}), None
        return DynamicCache(config=self.model.spec), None

    @property
    def past_key_values(self) -> Any:
        """The cache, in the form in which it was passed."""
        return in_form(self.cache, self.form)

    def prefill(self, ids_bn: Tensor, mask_bm: Tensor | None) -> Tensor:
        """Process the prompts, except the tokens that a given cache already holds; logits for the next token."""
        cached = self.cache.get_seq_length() if self.cache is not None else 0
        length = ids_bn.shape[1] if self.embeds is None else self.embeds.shape[1]
        if 0 < length <= cached:
            raise ValueError(
                f"past_key_values hold {cached} tokens and the prompt has {length}: give the whole prompt, of which "
                "the cache is the beginning, or crop() the cache"
            )
        self.mask = None if mask_bm is None or bool((mask_bm != 0).all()) else mask_bm != 0
        if self.images:
            self.embeds = self.model.embed(ids_bn, self.images)
        name, tokens = ("input_ids", ids_bn) if self.embeds is None else ("inputs_embeds", self.embeds)
        scores, left = None, tokens.shape[1] - cached
        for part in tokens[:, cached:].split(self._chunk() or left, dim=1):
            left -= part.shape[1]
            scores = self._scores(self.model(**self._arguments({name: part}, left=left)))
        assert scores is not None
        return scores[:, -1]

    def _chunk(self) -> int | None:
        """Tokens per chunk of a prompt, so that memory does not grow with its length; None: the whole prompt.

        `prefill_chunk_size` if given; else, on a CPU, where chunks cost no time, `CHUNK`, if the result is the same as
        for the whole prompt.
        """
        own = "prepare_inputs_for_generation" in vars(self.model)
        dynamic = is_dynamic(self.model.spec.position(Rotary))
        if self.chunk is not None and (own or dynamic):
            why = "own prepare_inputs_for_generation needs" if own else "RoPE scaling depends on"
            raise UnsupportedConfig(
                f"GenerationConfig.prefill_chunk_size={self.chunk}: this model's {why} the whole prompt"
            )
        if self.chunk is not None or own or dynamic:
            return self.chunk
        kept = type(self.cache) in (DynamicCache, StaticCache)
        return CHUNK if kept and self.model.device.type == "cpu" and not any(self.wanted.values()) else None

    def step(self, ids_b1: Tensor) -> Tensor:
        """Process one token per row; logits for the next token."""
        return self.extend(ids_b1)[:, -1]

    def extend(self, ids_bk: Tensor) -> Tensor:
        """Process k tokens per row; logits after each."""
        count = ids_bk.shape[1]
        if (
            self.verifies
            and count > (most := native_decoder.MOST // ids_bk.shape[0])
            and self.steps is not None
        ):
            # The scores of one token after the other, which those of the modules differ from by rounding.
            return torch.cat([self.extend(part) for part in ids_bk.split(most, dim=1)], dim=1)
        if self.mask is not None:
            self.mask = torch.cat((self.mask, self.mask.new_ones(ids_bk.shape)), dim=1)
        if self.positions is not None:
            steps = torch.arange(1, count + 1, device=self.positions.device)
            self.positions = torch.cat((self.positions, self.positions[:, -1:] + steps), dim=1)
        if self.types is not None:
            self.types = torch.cat((self.types, self.types[:, -1:].expand(-1, count)), dim=1)
        if self.steps is not None:
            scores_bkv = self.steps.run(
                ids_bk,
                types_bn=None if self.types is None else self.types[:, -count:],
                positions_bn=None if self.positions is None else self.positions[:, -count:],
                valid_bm=self.mask,
            )
            if scores_bkv is not None:
                return scores_bkv
            report(self.model, f"a cache or a batch that the {NATIVE} does not take")
        return self._scores(self.model(**self._arguments({"input_ids": ids_bk}, keep=count)))

    @functools.cached_property
    def steps(self) -> native_decoder.Steps | None:
        """The native steps, or None; created at the first new token."""
        own = "prepare_inputs_for_generation" in vars(self.model)
        asked = next((f"{name}=True" for name, on in self.wanted.items() if on), None)
        asked = "a prepare_inputs_for_generation of the model's own" if own else asked
        steps = None if asked else native_decoder.of(self.model, self.cache, verifies=self.verifies)
        if self.model.device.type not in cuda_graphs.CAPTURE:  # for those, `Runner.decoder` has logged it
            why = asked or (native_decoder.call_obstacle(self.model, self.cache) if steps is None else None)
            report(self.model, why or NATIVE)
        return steps

    def reorder(self, index_b: Tensor) -> None:
        """Reorder the rows: row i becomes the former row `index_b[i]`."""
        if self.cache is not None:
            self.cache.reorder_cache(index_b)
        for name in ("mask", "positions", "types", "ids", "embeds"):
            value = getattr(self, name)
            if value is not None and value.shape[0] > 1:
                setattr(self, name, value[index_b])
            elif value is not None:
                setattr(self, name, value.expand(len(index_b), *value.shape[1:]))

    def crop(self, length: int) -> None:
        """Drop all tokens after the first `length`."""
        if self.cache is not None:
            self.cache.crop(length)
        for name in ("mask", "positions", "types", "ids", "embeds"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value[:, :length])

    def _arguments(self, tokens: dict[str, Tensor], keep: int = 1, left: int = 0) -> dict[str, Any]:
        """The model's arguments for logits after the last `keep` of these tokens; `left` tokens of the prompt follow in
        later chunks."""
        if "prepare_inputs_for_generation" in vars(self.model):
            return self._prepared(tokens)
        if self.cache is None:
            tokens = self._all(tokens)
        count = next(iter(tokens.values())).shape[1]
        here = slice(-count - left, -left or None)
        if self.types is not None:
            tokens["token_type_ids"] = self.types[:, here]
        return {
            **tokens,
            "attention_mask": None if self.mask is None else self.mask[:, : self.mask.shape[1] - left],
            "position_ids": None if self.positions is None else self.positions[:, here],
            "past_key_values": self.cache,
            "use_cache": self.cache is not None,
            "logits_to_keep": keep,
            "return_dict": True,
            **self.wanted,
        }

    def _scores(self, out: Any) -> Tensor:
        """The logits of the model's output, float32; stores attentions and hidden states."""
        self.attentions, self.hidden_states = out.attentions, out.hidden_states
        return out.logits.float()

    def _prepared(self, tokens: dict[str, Tensor]) -> dict[str, Any]:
        """The arguments from `prepare_inputs_for_generation`, if it was replaced on the model, as peft does for prompt
        tuning; it receives all tokens so far."""
        if "inputs_embeds" in tokens:
            raise ValueError("a model with a learned prompt generates from input_ids, not from inputs_embeds")
        first, new = self.ids is None, tokens["input_ids"]
        self.ids = new if self.ids is None else torch.cat((self.ids, new), dim=1)
        cached = 0 if self.cache is None else self.cache.get_seq_length()
        mask = self.mask if self.mask is not None else self.ids.new_ones(self.ids.shape)
        made = vars(self.model)["prepare_inputs_for_generation"](
            self.ids,
            past_key_values=self.cache if cached else None,
            attention_mask=mask.to(self.ids.dtype),
            cache_position=torch.arange(cached, cached + new.shape[1], device=new.device),
            use_cache=self.cache is not None,
            is_first_iteration=first,
        )
        past = made.get("past_key_values")
        if self.cache is not None and past is not None and past is not self.cache:  # peft's learned prefix
            self.cache, _ = cache_of(past, self.model.spec, new.shape[0])
        # Positions are computed from the cache, which includes the learned prompt.
        made = {k: v for k, v in made.items() if k in self.model.arguments and k != "cache_position"}
        more = {"past_key_values": self.cache, "use_cache": self.cache is not None, "logits_to_keep": 1}
        return {**made, **more, "return_dict": True, **self.wanted}

    def _all(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without a cache: all tokens so far."""
        if (ids := tokens.get("input_ids")) is None:
            self.embeds = tokens["inputs_embeds"]
            return tokens
        if self.embeds is not None:
            self.embeds = torch.cat((self.embeds, self.model.get_input_embeddings()(ids)), dim=1)
            return {"inputs_embeds": self.embeds}
        self.ids = ids if self.ids is None else torch.cat((self.ids, ids), dim=1)
        return {"input_ids": self.ids}
