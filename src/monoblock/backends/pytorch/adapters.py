"""Adapters of the peft package inside a model: the methods that transformers' models have for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from monoblock.checkpoint.journal import settle
from monoblock.checkpoint.options import HubOptions
from monoblock.checkpoint.transaction import staged


def peft() -> Any:
    """The peft package. ImportError: it is not installed."""
    try:
        import peft as package  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("adapters need the package peft: pip install peft") from error
    return package


class AdapterMixin:
    """Adds, loads and activates adapters in place, in the model's own modules."""

    peft_config: dict[str, Any]
    _hf_peft_config_loaded: bool

    def add_adapter(self: Any, adapter_config: Any, adapter_name: str = "default") -> None:
        """Put a new adapter (a peft config, such as LoraConfig) into the model, and choose it. ValueError: there is one
        of that name already."""
        self.refuse_sharded("an adapter")
        package = peft()
        if self._hf_peft_config_loaded and adapter_name in self.peft_config:
            raise ValueError(f"an adapter named {adapter_name!r} is there already: give another adapter_name")
        if not isinstance(adapter_config, package.PeftConfig):
            raise ValueError(f"add_adapter takes a peft config, got {type(adapter_config).__name__}")
        adapter_config.base_model_name_or_path = self.name_or_path or None
        package.inject_adapter_in_model(adapter_config, self, adapter_name)
        self._hf_peft_config_loaded = True
        self.set_adapter(adapter_name)

    def load_adapter(
        self: Any,
        peft_model_id: str | Path | None = None,
        adapter_name: str = "default",
        *,
        adapter_state_dict: Mapping[str, Tensor] | None = None,
        peft_config: Any = None,
        is_trainable: bool = False,
        **hub: Any,
    ) -> None:
        """Load an adapter from a folder or a name on the hub (or `adapter_state_dict` with its `peft_config`).

        Other keywords are those of the hub (`revision`, `token`, `subfolder`, ...). ValueError: weights are missing,
        or belong to no module of this model.
        """
        package = peft()
        options = HubOptions.pop(hub)
        if hub:
            raise TypeError(f"load_adapter has no argument {next(iter(hub))!r}")
        where = {"revision": options.revision, "token": options.token, "subfolder": options.subfolder or None}
        where = {name: value for name, value in where.items() if value is not None}
        if adapter_state_dict is None:
            if peft_model_id is None:
                raise ValueError(
                    "load_adapter needs a folder or name, or adapter_state_dict with peft_config"
                )
            settle(Path(peft_model_id) / options.subfolder)
            peft_config = peft_config or package.PeftConfig.from_pretrained(str(peft_model_id), **where)
            adapter_state_dict = package.load_peft_weights(str(peft_model_id), device="cpu", **where)
        elif peft_config is None:
            raise ValueError("adapter_state_dict needs its peft_config")
        assert adapter_state_dict is not None
        peft_config.inference_mode = not is_trainable
        self.add_adapter(peft_config, adapter_name)
        state = {re.sub(r"^base_model\.model\.", "", name): x for name, x in adapter_state_dict.items()}
        result = package.set_peft_model_state_dict(self, state, adapter_name)
        unknown = list(result.unexpected_keys)
        missing = [name for name in result.missing_keys if f".{adapter_name}." in name and "lora" in name]
        if unknown or missing:
            raise ValueError(
                f"the adapter does not fit {self.row.name}: "
                + (f"it has no weights for {missing[0]}" if missing else f"no module takes {unknown[0]}")
            )
        if not is_trainable:
            for name, parameter in self.named_parameters():
                if f".{adapter_name}" in name:
                    parameter.requires_grad_(False)

    def set_adapter(self: Any, adapter_name: str | list[str]) -> None:
        """Choose the adapter (or several) that the model computes with. ValueError: there is none of that name."""
        self._known(adapter_name)
        for layer in _layers(self):
            layer.enable_adapters(True)
            layer.set_adapter(adapter_name)

    def enable_adapters(self: Any) -> None:
        """Compute with the chosen adapters again."""
        self._adapters()
        for layer in _layers(self):
            layer.enable_adapters(True)

    def disable_adapters(self: Any) -> None:
        """Compute as without adapters."""
        self._adapters()
        for layer in _layers(self):
            layer.enable_adapters(False)

    def active_adapters(self: Any) -> list[str]:
        """The names of the chosen adapters."""
        self._adapters()
        active = next(iter(_layers(self))).active_adapter
        return [active] if isinstance(active, str) else list(active)

    def get_adapter_state_dict(self: Any, adapter_name: str | None = None) -> dict[str, Tensor]:
        """The weights of one adapter, by peft's names."""
        return peft().get_peft_model_state_dict(self, adapter_name=adapter_name or self.active_adapters()[0])

    def delete_adapter(self: Any, adapter_names: str | list[str]) -> None:
        """Remove adapters."""
        for name in self._known(adapter_names):
            for layer in _layers(self):
                layer.delete_adapter(name)
            del self.peft_config[name]

    def _adapters(self: Any) -> dict[str, Any]:
        if not self._hf_peft_config_loaded:
            raise ValueError("the model has no adapter: add_adapter() or load_adapter() first")
        return self.peft_config

    def _known(self: Any, names: str | list[str]) -> list[str]:
        """The names of adapters, as a list; ValueError: there is none of one of them."""
        found = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        for name in found:
            if name not in self._adapters():
                raise ValueError(f"there is no adapter {name!r}; there are: {', '.join(self._adapters())}")
        return found

    def save_adapter(self: Any, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write the chosen adapter as peft does: its config, and its weights in safetensors. `state_dict`: weights to
        write instead of the model's, by peft's names."""
        from safetensors.torch import save_file

        name = self.active_adapters()[0]
        config = self.peft_config[name]
        found = self.get_adapter_state_dict(name) if state_dict is None else state_dict
        state = {f"base_model.model.{key}": x.contiguous() for key, x in found.items()}
        with staged(folder) as stage:
            config.save_pretrained(str(stage.files))
            save_file(state, str(stage.files / "adapter_model.safetensors"), metadata={"format": "pt"})


def _layers(model: nn.Module) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer  # pyright: ignore[reportMissingImports]

    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))
