"""A model's parameters: file names, initialisation, tying, quantisation and resizing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from monoblock import tree
from monoblock.backends.pytorch import loading
from monoblock.backends.pytorch.base import ModelBase
from monoblock.backends.pytorch.parts import replace
from monoblock.backends.pytorch.quantization import checkpoint, quantize
from monoblock.checkpoint.keymap import TensorSource
from monoblock.checkpoint.quantized import split_state
from monoblock.quantization import WeightOnlyConfig, parse_quantization
from monoblock.spec import ArchSpec

log = logging.getLogger("monoblock")


class Parameters(ModelBase):
    """A model's functions on its weights, from the module tree and the family's tables."""

    def parameter_names(self) -> Iterator[str]:
        """The names of the parameters in files: each once, tied and quantised ones left out."""
        quantized = {f"{name}.weight" for name in checkpoint.quantized_modules(self)}
        for source in self.sources().values():
            yield from (name for name in source.names if name not in quantized)

    def _canonical_tied(self) -> dict[str, str]:
        return tree.tied(self.spec, self.head_spec)

    def hub_state_dict(self) -> dict[str, Tensor]:
        """The weights as files hold them: by the names of `state_dict()`, contiguous, tied ones once.

        Of quantised matrices `X.weight`, the tensors `X.weight.codes`, `.scale` (8 and 4 bits) and `.low` (4 bits).
        """
        if not isinstance(self.quantization_config, WeightOnlyConfig | None):
            raise ValueError(
                "weights quantised by bitsandbytes cannot be saved here: save the model before "
                'quantising (or dequantize() what its files had), or take quantization_config="int8" or "int4"'
            )
        state = {name: self.get_parameter(name).detach().contiguous() for name in self.parameter_names()}
        return state | checkpoint.file_state(self)

    def file_names(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """A state dict (of `state_dict()`'s names, whole or gathered from several devices) as files hold it: tied
        tensors once, quantised ones under their matrix. ValueError: a name that is no parameter's."""
        tied, own = self.tied(), self.state_dict()
        tensors: dict[str, Tensor] = {}
        for name, tensor in state_dict.items():
            stem, _, part = name.rpartition(".")
            if name not in own and f"{stem}.weight" not in own and not stem.endswith(".weight"):
                raise ValueError(
                    f"state_dict holds {name}, which is no parameter of {self.row.name}: take it from the model "
                    "itself, not from what wraps it"
                )
            first = tied.get(name) or tied.get(f"{stem}.weight", "")
            if first and (first in state_dict or f"{first.removesuffix('.weight')}.{part}" in state_dict):
                continue
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            quantized = part in ("codes", "scale", "low") and not stem.endswith(".weight")
            tensors[f"{stem}.weight.{part}" if quantized else name] = whole.detach().contiguous()
        return tensors

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `torch.nn.Module`'s; other naming schemes of the family are accepted too, and tied parameters may be
        missing."""
        own = self.state_dict()
        if any(name not in own for name in state_dict):
            rest, parts = split_state(state_dict)
            plain = {name: source for name, source in self.sources().items() if self._is_plain(source)}
            shapes = {name: shape for name, shape in self.shapes().items() if name in plain}
            found = loading.split_state(self.keymap(), plain, shapes, rest, self._canonical_tied(), strict)
            if found is not None:
                state_dict = {**found, **checkpoint.own_state(parts)}
        state_dict, given = dict(state_dict), set(state_dict)
        for second, first in self.tied().items():
            for ending in ("", ".codes", ".scale", ".low"):
                one, two = (
                    name.removesuffix(".weight") + ending if ending else name for name in (first, second)
                )
                if one in state_dict and two in own:
                    state_dict.setdefault(two, state_dict[one])
                elif two in state_dict and one in own:  # old files have a pair under its second name
                    state_dict[one] = state_dict[two]
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if (
            not strict
        ):  # what was not there is reported, as by any module: safetensors' load_model counts on it
            result.missing_keys.extend(name for name in state_dict if name not in given)
        if assign:
            self.tie_weights()
            self.fuse_weights()
        return result

    def _is_plain(self, source: TensorSource) -> bool:
        quantized = {f"{name}.weight" for name in checkpoint.quantized_modules(self)}
        return not any(name in quantized for name in source.names)

    # ------------------------------------------------------------------ quantised weights

    def quantize(self, quantization_config: Any) -> Self:
        """Quantise the model's weights in place; returns the model. `quantization_config`: "int8", "int4", "lossless",
        a WeightOnlyConfig or a BitsAndBytesConfig.

        ValueError: they are already quantised, or the config names an unknown module.
        """
        self.refuse_sharded("quantize()")
        how = parse_quantization(quantization_config)
        if how is None:
            raise ValueError('quantize() needs a quantization_config, such as "int8"')
        quantize.quantize(self, how)
        return self

    def dequantize(self) -> Self:
        """Replace the quantised weights by dequantised ones; returns the model. ValueError: the model is not
        quantised by this library."""
        self.refuse_sharded("dequantize()")
        quantize.dequantize(self)
        return self

    def record_quantization(self) -> None:
        """Set the config's quantization_config, or remove it if the weights are not quantised."""
        vars(self.config).pop("quantization_config", None)
        if self.quantization_config is not None:
            self.config.quantization_config = self.quantization_config.to_dict()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.quantization_config is not None or self.has("lm_head"):
            self.tie_weights()  # buffers move one by one, shared or not
        return self

    # ------------------------------------------------------------------ weights

    def init_weights(self) -> None:
        """Matrices and tables from a normal distribution of the spec's deviation, biases 0, norms 1; the row of the
        padding token 0."""
        for name in self.parameter_names():
            self._init_parameter(name)
        self.fuse_weights()
        if getattr(self.config, "init_config", None):
            log.warning(
                "init_config is not used: weights come from a normal distribution of initializer_range"
            )

    @torch.no_grad()
    def _init_parameter(self, name: str) -> None:
        parameter = self.get_parameter(name)
        if name.endswith(".bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, self.spec.init_std)
            padding = getattr(self.get_submodule(name.rpartition(".")[0]), "padding_idx", None)
            if padding is not None:
                parameter[padding].zero_()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding (and with it a tied head's matrix)."""
        self.refuse_sharded("set_input_embeddings()")
        replace(self, self.module_path("embed"), value)
        self.tie_weights()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the projection to the vocabulary."""
        self.refuse_sharded("set_output_embeddings()")
        if self.get_output_embeddings() is None:
            raise ValueError(f"{self.row.name} has no projection to the vocabulary")
        replace(self, self.module_path("head_out"), new_embeddings)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        """Change the vocabulary's size in the embedding, the head and the config.

        New rows are the mean of the old ones, so that new tokens begin as an average token
        (`mean_resizing=False`: from the initial distribution).
        """
        self.refuse_sharded("resize_token_embeddings()")
        old = self.spec.vocab
        new = old if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            new = -(-new // pad_to_multiple_of) * pad_to_multiple_of
        if new < 1:
            raise ValueError(f"new_num_tokens must be at least 1, got {new}")
        embed: Any = self.get_input_embeddings()
        if new == old:
            return embed
        if checkpoint.quantized_modules(self):
            raise ValueError("quantised weights have a fixed number of rows: resize first, then quantise")
        self.config.vocab_size = new
        spec = self.config.to_spec()
        for module in self.modules():
            if isinstance(getattr(module, "spec", None), ArchSpec):
                module.spec = spec  # pyright: ignore
        self._resize(embed, new, mean_resizing)
        embed.num_embeddings = new
        out: Any = self.get_output_embeddings()
        if out is not None:
            if not self.spec.tie_head:
                self._resize(out, new, mean_resizing)
            if out.bias is not None:
                bias = out.bias.new_zeros(new)
                bias[: min(old, new)] = out.bias.detach()[: min(old, new)]
                out.bias = nn.Parameter(bias, requires_grad=out.bias.requires_grad)
                if self.has("lm_head"):
                    self.role("lm_head").bias = out.bias
            out.out_features = new
        self.tie_weights()
        return embed

    @torch.no_grad()
    def _resize(self, module: nn.Embedding | nn.Linear, rows: int, mean: bool) -> None:
        old = module.weight
        new = old.new_empty(rows, old.shape[1])
        kept = min(rows, old.shape[0])
        new[:kept] = old[:kept]
        if mean:
            new[kept:] = old.float().mean(0).to(old.dtype)
        else:
            new[kept:].normal_(0.0, self.spec.init_std)
        module.weight = nn.Parameter(new, requires_grad=old.requires_grad)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters, tied ones once; quantised ones are never trainable."""
        sizes = {name: m.rows * m.columns for name, m in checkpoint.quantized_modules(self).items()}
        tables = (
            {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
            if exclude_embeddings
            else set()
        )
        if exclude_embeddings:
            sizes.pop(self.module_path("embed"), None)
        plain = sum(
            p.numel()
            for p in self.parameters()
            if (p.requires_grad or not only_trainable) and id(p) not in tables
        )
        return plain + (0 if only_trainable else sum(sizes.values()))

    def get_memory_footprint(self) -> int:
        """Bytes of the weights, tied ones once."""
        held = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in held.values())
