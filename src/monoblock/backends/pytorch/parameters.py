"""A model's parameters: their canonical and hub names, how they begin, which are shared, and how they resize."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from monoblock import tree
from monoblock.backends.pytorch import loading
from monoblock.checkpoint.keymap import KeyMap

if TYPE_CHECKING:
    from monoblock.backends.pytorch.heads import Head
    from monoblock.backends.pytorch.model import Backbone
    from monoblock.families import Family, ModelClass
    from monoblock.quantization import BitsAndBytesConfig
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
    quantization_config: BitsAndBytesConfig | None = None

    def keymap(self) -> KeyMap:
        """The map between canonical names and the hub's, for this class and config."""
        return self.family.keymap(self.config, self.row.head)

    def parameter_names(self) -> dict[str, str]:
        """Canonical name -> name of the parameter in this module, tied ones left out."""
        head = self.head.spec if self.head else None
        return {name: _path(name) for name in tree.parameters(self.spec, head)}

    def tied(self) -> dict[str, str]:
        """Second names: canonical name -> the canonical parameter that it shares."""
        return tree.tied(self.spec, self.head.spec if self.head else None)

    def hub_state_dict(self) -> dict[str, Tensor]:
        """The weights by the hub's names, tied ones once; views of the parameters wherever that is possible."""
        if self.quantization_config is not None:
            raise ValueError(
                "quantised weights have no form in the hub's files here: save the model before quantising"
            )
        keymap, state = self.keymap(), {}
        for canonical, path in self.parameter_names().items():
            source, tensor = keymap.source(canonical), self.get_parameter(path).detach()
            for name, view in zip(source.names, source.op.views(tensor), strict=True):
                state[name] = view if view.dim() <= 2 else view.reshape(tensor.shape)
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `torch.nn.Module`'s; a dict of the hub's names is understood too."""
        own = self.state_dict()
        if not any(name in own for name in state_dict):
            names = self.parameter_names()
            parameters = {name: own[path] for name, path in names.items()}
            canonical = loading.split_state(self.keymap(), parameters, dict(state_dict), self.tied())
            state_dict = {names[name]: tensor for name, tensor in canonical.items()}
            for second, first in self.tied().items():
                if first in canonical:
                    state_dict[_path(second)] = canonical[first]
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

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
            self.head.out.weight = self.backbone.embed.weight

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
        self.head.out = new_embeddings

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
        return self.backbone.embed.weight.device

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the model has, tied ones once."""
        tables = (
            {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
            if exclude_embeddings
            else set()
        )
        return sum(
            p.numel()
            for p in self.parameters()
            if (p.requires_grad or not only_trainable) and id(p) not in tables
        )

    def get_memory_footprint(self) -> int:
        """Bytes of the weights."""
        return sum(p.numel() * p.element_size() for p in self.parameters())


def _path(canonical: str) -> str:
    return canonical if canonical.startswith("head.") else "backbone." + canonical
