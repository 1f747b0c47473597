"""LoRA adapters for training: which matrices have one, adding, and merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from monoblock.backends.pytorch.adapters import peft
from monoblock.training.options import TrainingOptions

MATRICES = ("q", "k", "v", "qkv", "qkv_by_head", "out", "gate", "up", "down")
_TYPES = {
    "causal": "CAUSAL_LM",
    "sequence": "SEQ_CLS",
    "first": "SEQ_CLS",
    "token": "TOKEN_CLS",
    "span": "QUESTION_ANS",
}
_NEW_HEADS = ("sequence", "first", "token", "span")  # are trained whole


def targets(model: Any) -> list[str]:
    """The names of the blocks' matrices, such as `q_proj`."""
    paths = [
        model.module_path(role, layer)
        for layer in range(model.spec.layers)
        for role in MATRICES
        if model.at(role, layer) is not None
    ]
    return sorted({path.rpartition(".")[2] for path in paths})


def add(model: Any, options: TrainingOptions) -> None:
    """Add the adapter of the options; a new head is trained with it. ValueError: a target is no matrix of the
    model."""
    chosen = list(options.lora_targets) or targets(model)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for target in chosen:
        if target not in names:
            known = ", ".join(targets(model))
            raise ValueError(f"lora_targets: the model has no module {target!r}; the blocks have {known}")
    head = model.row.head
    config = peft().LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * (options.lora_rank or 0),
        lora_dropout=options.lora_dropout,
        target_modules=chosen,
        use_rslora=options.rslora,
        use_dora=options.dora,
        task_type=_TYPES.get(head),
        modules_to_save=_head_modules(model) if head in _NEW_HEADS else None,
    )
    model.add_adapter(config)


def set_weights(model: Any, folder: Path) -> None:
    """Set the adapter's weights to those of a folder."""
    state = peft().load_peft_weights(str(folder), device="cpu")
    state = {name.removeprefix("base_model.model."): x for name, x in state.items()}
    peft().set_peft_model_state_dict(model, state, model.active_adapters()[0])


def _head_modules(model: Any) -> list[str]:
    """The names of the head's modules, which are next to the bare model."""
    return [name for name, _ in model.named_children() if name != model.roles["bare"]]


def merge(model: Any) -> None:
    """Add the adapter to the weights, and remove it."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # pyright: ignore[reportMissingImports]
    from peft.utils import ModulesToSaveWrapper  # pyright: ignore[reportMissingImports]

    name = model.active_adapters()[0]
    found: list[tuple[str, nn.Module]] = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)
    ]
    for path, module in found:
        whole: Any = module
        if isinstance(module, ModulesToSaveWrapper):
            plain = whole.modules_to_save[name]
        else:
            whole.merge()
            plain = whole.get_base_layer()
        parent, _, own = path.rpartition(".")
        setattr(model.get_submodule(parent), own, plain)
    del model.peft_config
    model._hf_peft_config_loaded = False
    model.requires_grad_(True)
    model.tie_weights()
    model.fuse_weights()
