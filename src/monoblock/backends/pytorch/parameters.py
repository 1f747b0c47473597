"""A model's parameters: their canonical and hub names, how they begin, which are shared, and how they resize."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from monoblock import tree
from monoblock.backends.pytorch import loading
from monoblock.backends.pytorch.quantization import checkpoint, modules, quantize
from monoblock.backends.pytorch.quantization.modules import PackedMatrix
from monoblock.checkpoint.keymap import KeyMap
from monoblock.checkpoint.packed import split
from monoblock.quantization import QuantizationConfig, WeightOnlyConfig, wanted

if TYPE_CHECKING:
    from monoblock.backends.pytorch.heads import Head
    from monoblock.backends.pytorch.model import Backbone
    from monoblock.families import Family, ModelClass
    from monoblock.spec import ArchSpec

log = logging.getLogger("monoblock")


class Parameters(nn.Module):
    """What a model can do with its weights, given a backbone, a head or None, and the family's tables."""

    family: ClassVar[Family]
    row: ClassVar[ModelClass]
    config: Any
    spec: ArchSpec
    backbone: Backbone
    head: Head | None
    quantization_config: QuantizationConfig | None = None

    def keymap(self) -> KeyMap:
        """The map between canonical names and the hub's, for this class and config."""
        return self.family.keymap(self.config, self.row.head)

    def parameter_names(self) -> dict[str, str]:
        """Canonical name -> name of the parameter in this module, tied and packed ones left out."""
        head = self.head.spec if self.head else None
        packed = checkpoint.modules(self)
        return {name: _path(name) for name in tree.parameters(self.spec, head) if name not in packed}

    def tied(self) -> dict[str, str]:
        """Second names: canonical name -> the canonical parameter that it shares."""
        return tree.tied(self.spec, self.head.spec if self.head else None)

    def hub_state_dict(self) -> dict[str, Tensor]:
        """The weights by the hub's names, tied ones once; views of the parameters wherever that is possible.

        Of packed matrices `X.weight`, the tensors `X.weight.codes`, `.scale` (8 and 4 bits) and `.low` (4 bits).
        """
        if not isinstance(self.quantization_config, WeightOnlyConfig | None):
            raise ValueError(
                "weights that bitsandbytes holds have no form in the hub's files here: save the model before "
                'quantising, or take quantization_config="int8" or "int4"'
            )
        keymap, state = self.keymap(), {}
        for canonical, path in self.parameter_names().items():
            source, tensor = keymap.source(canonical), self.get_parameter(path).detach()
            for name, view in zip(source.names, source.op.views(tensor), strict=True):
                state[name] = view if view.dim() <= 2 else view.reshape(tensor.shape)
        return state | checkpoint.hub_state(self)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `torch.nn.Module`'s; a dict of the hub's names is understood too."""
        own = self.state_dict()
        if not any(name in own for name in state_dict):
            names = self.parameter_names()
            parameters = {name: own[path] for name, path in names.items()}
            rest, parts = split(state_dict)
            canonical = loading.split_state(self.keymap(), parameters, rest, self.tied())
            state_dict = {names[name]: tensor for name, tensor in canonical.items()}
            state_dict |= checkpoint.own_state(self, parts)
            for second, first in self.tied().items():
                if first in canonical:
                    state_dict[_path(second)] = canonical[first]
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    # ------------------------------------------------------------------ packed weights

    def quantize(self, quantization_config: Any) -> Self:
        """Pack the model's weights in place; the model. `quantization_config`: "int8", "int4", "lossless", a
        WeightOnlyConfig or a BitsAndBytesConfig.

        ValueError: they are packed already, or the config names a module that is not there.
        """
        how = wanted(quantization_config)
        if how is None:
            raise ValueError('quantize() needs a quantization_config, such as "int8"')
        quantize.quantize(self, how)
        return self

    def dequantize(self) -> Self:
        """Plain weights again, with the numbers that the packed ones stand for; the model. ValueError: there are no
        packed ones."""
        quantize.dequantize(self)
        return self

    def record_quantization(self) -> None:
        """Make the config say how the weights are packed, or nothing if they are not."""
        vars(self.config).pop("quantization_config", None)
        if self.quantization_config is not None:
            self.config.quantization_config = self.quantization_config.to_dict()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if isinstance(getattr(getattr(self, "backbone", None), "embed", None), PackedMatrix):
            self.tie_weights()  # buffers move one by one, shared or not
        return self

    # ------------------------------------------------------------------ weights

    def init_weights(self) -> None:
        """Matrices and tables from a normal distribution of the spec's deviation, biases 0, norms 1."""
        for path in self.parameter_names().values():
            self._init_parameter(path)
        if getattr(self.config, "init_config", None):
            log.warning(
                "init_config is not used: weights come from a normal distribution of initializer_range"
            )

    @torch.no_grad()
    def _init_parameter(self, path: str) -> None:
        parameter = self.get_parameter(path)
        if path.endswith(".bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, self.spec.init_std)

    def tie_weights(self) -> None:
        """Make the head's matrix the embedding's, where the spec ties them."""
        if self.tied():
            assert self.head is not None and self.head.out is not None
            self.head.out = modules.tied(self.backbone.embed, self.head.out)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.backbone.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding (and with it a tied head's matrix)."""
        self.backbone.embed = value
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        """The projection to the vocabulary, or None."""
        return self.head.out if self.head is not None and self.head.vocabulary else None

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the projection to the vocabulary."""
        if self.get_output_embeddings() is None or self.head is None:
            raise ValueError(f"{self.row.name} has no projection to the vocabulary")
        head: Any = self.head
        head.out = new_embeddings

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Change the vocabulary's size in the embedding, the head and the config.

        New rows are the mean of the old ones, so that new tokens begin as an average token
        (`mean_resizing=False`: from the initial distribution).
        """
        old = self.spec.vocab
        new = old if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            new = -(-new // pad_to_multiple_of) * pad_to_multiple_of
        if new < 1:
            raise ValueError(f"new_num_tokens must be at least 1, got {new}")
        if new == old:
            return self.backbone.embed
        if checkpoint.is_packed(self):
            raise ValueError("packed weights have a fixed number of rows: resize first, then quantise")
        self.config.vocab_size = new
        self.spec = self.backbone.spec = self.config.to_spec()
        self._resize(self.backbone.embed, new, mean_resizing)
        self.backbone.embed.num_embeddings = new
        if (out := self.get_output_embeddings()) is not None:
            if not self.tied():
                self._resize(out, new, mean_resizing)
            out.out_features = new
        self.tie_weights()
        return self.backbone.embed

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

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the weights are (the first ones, if they are spread)."""
        embed: Any = self.backbone.embed
        return (embed.codes if isinstance(embed, PackedMatrix) else embed.weight).device

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the model has, tied ones once; packed ones are never trained."""
        packed = checkpoint.modules(self)
        sizes = {name: module.rows * module.columns for name, module in packed.items()}
        tables = (
            {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
            if exclude_embeddings
            else set()
        )
        if exclude_embeddings:
            sizes.pop("embed.weight", None)
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


def _path(canonical: str) -> str:
    return canonical if canonical.startswith("head.") else "backbone." + canonical
