"""`ModelBase`: a model's family tables, and access to its modules by role, for the other files of this backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from monoblock import tree
from monoblock.backends.pytorch.parts import Part, fuse_weights, replace
from monoblock.backends.pytorch.patches import with_patches
from monoblock.backends.pytorch.quantization import modules
from monoblock.backends.pytorch.quantization.modules import QuantizedMatrix
from monoblock.checkpoint.keymap import KeyMap, TensorSource
from monoblock.families import Family, ModelClass
from monoblock.heads import KINDS, HeadSpec
from monoblock.partition import shard_op, shard_shapes
from monoblock.quantization import QuantizationConfig
from monoblock.spec import ArchSpec

if TYPE_CHECKING:
    from monoblock.backends.pytorch.parallel.groups import TensorGroup
    from monoblock.backends.pytorch.parallel.stages import Stage


class ModelBase(Part):
    """A model as a module tree with roles; subclasses add its functions."""

    family: ClassVar[Family]
    row: ClassVar[ModelClass]
    extra: ClassVar[tuple[str, ...]]
    config: Any
    name_or_path: str
    spec: ArchSpec
    head_spec: HeadSpec | None
    quantization_config: QuantizationConfig | None = None
    module_paths: dict[str, str]
    tensor_group: TensorGroup | None = None
    pipeline_stage: Stage | None = None  # the part of the layers that this process holds

    @property
    def arguments(self) -> frozenset[str]:
        """The names of all arguments of a forward."""
        return frozenset((*self.row.forward.split(), *self.extra))

    def can_generate(self) -> bool:
        """Whether the class predicts the next token."""
        return self.row.head == "causal"

    def current_head(self) -> HeadSpec:
        """The head, with the config's current values (they may have changed since construction)."""
        assert self.head_spec is not None
        return self.config.updated_head(self.head_spec)

    # ------------------------------------------------------------------ names

    @property
    def bare(self) -> Any:
        """The bare model: the one inside, or this one."""
        return self.role("bare") if self.has("bare") else self

    def keymap(self) -> KeyMap:
        """The map between canonical names (common to all frameworks) and file names, for this class and config."""
        return self.family.keymap(self.config, self.row.head)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> canonical shape of each parameter, tied ones once; with `tp_plan`, of its shard."""
        if (group := self.tensor_group) is None:
            return tree.parameters(self.spec, self.head_spec)
        return shard_shapes(self.config.to_spec(), self.head_spec, group.rank, group.size)

    def sources(self) -> dict[str, TensorSource]:
        """Canonical name -> the parameters of this model that store it, and the operation. Includes quantised ones."""
        keymap = self.keymap()
        found = {name: keymap.source(name) for name in self.shapes()}
        if (group := self.tensor_group) is None:
            return found
        return {name: TensorSource(s.names, shard_op(s.op, group.size)) for name, s in found.items()}

    def module_path(self, role: str, layer: int | None = None) -> str:
        """The dotted path of the module of a role."""
        return self.module_paths[role].replace("{i}", str(layer))

    def at(self, role: str, layer: int | None = None) -> Any:
        """The module of a role (in `layer`, for roles inside blocks); None if there is none."""
        if role not in self.module_paths:
            return None
        owner, _, name = self.module_path(role, layer).rpartition(".")
        return getattr(self.get_submodule(owner), name, None)

    def tied(self) -> dict[str, str]:
        """Tied parameters: name -> the name of the parameter that it shares."""
        found: dict[str, str] = {}
        if (
            self.head_spec is not None
            and KINDS[self.head_spec.kind].size == "vocab"
            and "head_out" in self.module_paths
        ):
            out = self.module_path("head_out")
            if self.spec.tie_head:
                found[f"{out}.weight"] = f"{self.module_path('embed')}.weight"
            if self.has("lm_head"):
                found[f"{out}.bias"] = f"{out.rpartition('.')[0]}.bias"
        return found

    def refuse_sharded(self, what: str) -> None:
        """ValueError if this model is sharded by `tp_plan`: `what` needs whole weights."""
        if self.tensor_group is not None:
            raise ValueError(
                f"{what} is not available on a model with tp_plan, whose processes hold shards: load it without"
            )

    # ------------------------------------------------------------------ modules and weights

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.get_submodule(self.module_path("embed"))

    def get_output_embeddings(self) -> nn.Module | None:
        """The projection to the vocabulary, or None."""
        if self.head_spec is None or KINDS[self.head_spec.kind].size != "vocab":
            return None
        return self.get_submodule(self.module_path("head_out"))

    def embed(self, input_ids: Tensor, given: Mapping[str, Any]) -> Tensor:
        """Token embeddings (b, s, w), with image patches at their positions if given. ValueError: invalid patches."""
        x = self.get_input_embeddings()(input_ids)
        both = (given.get("image_patches"), given.get("pixel_values"))
        named = [patches for patches in both if patches is not None]
        indices = given.get("image_patches_indices")
        if len(named) > 1:
            raise ValueError("image_patches and pixel_values are two names of the same input: give one")
        if not named:
            if indices is not None:
                raise ValueError("image_patches_indices need image_patches")
            return x
        base = self.bare
        if not base.has("patch_embed"):
            raise ValueError("image patches were given, but the model takes text only")
        return with_patches(self.spec, base.role("patch_embed"), x, input_ids, named[0], indices)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Share the embedding's matrix with the head, if the spec ties them. The arguments of transformers' method
        (keys missed by its loader) are ignored."""
        del args, kwargs
        for second, first in self.tied().items():
            owner, _, leaf = second.rpartition(".")
            if leaf == "bias":
                self.get_submodule(owner).register_parameter("bias", self.get_parameter(first))
            else:
                table = self.get_submodule(first.rpartition(".")[0])
                replace(self, owner, modules.tied(table, self.get_submodule(owner)))

    def fuse_weights(self) -> None:
        """Make the tensors of all fused groups adjacent in memory, in the whole model."""
        fuse_weights(self.modules())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device of the weights (of the first ones, if on several devices); for offloaded weights, the device to
        which accelerate moves them during a call."""
        embed: Any = self.get_input_embeddings()
        found = (embed.codes if isinstance(embed, QuantizedMatrix) else next(embed.parameters())).device
        if found.type != "meta":
            return found
        hooks = (getattr(module, "_hf_hook", None) for module in (embed, *self.modules()))
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((device for device in devices if device is not None), found))
