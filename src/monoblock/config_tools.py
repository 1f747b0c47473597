"""Attributes of configs, other than fields, that training and adapter libraries read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NoReturn, Self


class ToolFacts:
    """Config attributes read by transformers' Trainer, peft, TRL, accelerate and sentence-transformers."""

    name_or_path: str

    # Outputs that Trainer does not gather in evaluation.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # Parallel plans by module name; None: transformers has none for this family.
    base_model_tp_plan: ClassVar[dict[str, str] | None] = None
    base_model_pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]] | None] = None
    is_heterogeneous: ClassVar[bool] = False  # one config for all layers

    @property
    def _name_or_path(self) -> str:
        """transformers' other name of `name_or_path`."""
        return self.name_or_path

    @_name_or_path.setter
    def _name_or_path(self, value: str) -> None:
        self.name_or_path = value

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Self:
        """The config of the language model: this one, since all families have flat configs and a single stack."""
        del decoder, encoder  # a single stack
        return self

    @property
    def per_layer_config(self) -> tuple[Self, ...]:
        """The config of each layer, read by transformers' caches: this one for every layer."""
        return (self,) * int(getattr(self, "num_hidden_layers", 0))

    def __iter__(self) -> Iterator[str]:
        """The names of the fields, without aliases, so that `name in config` works."""
        return (name for name in vars(self) if not name.startswith("_"))

    def push_to_hub(self, repo_id: str, **_: Any) -> NoReturn:
        """Not supported; upload with huggingface_hub."""
        raise NotImplementedError(
            f"push_to_hub is not supported: save_pretrained(folder), then `hf upload {repo_id} folder`"
        )


def foreign_fields(config: Any) -> dict[str, Any] | None:
    """The fields of another library's config object, from its `to_dict()`, with `model_type` and the attention
    implementation, which `to_dict()` omits; None for other objects."""
    model_type, to_dict = getattr(config, "model_type", None), getattr(config, "to_dict", None)
    if isinstance(config, type) or not isinstance(model_type, str) or not callable(to_dict):
        return None
    data = to_dict()
    if not isinstance(data, Mapping):
        return None
    fields: dict[str, Any] = {**data, "model_type": model_type}
    kernel = getattr(config, "_attn_implementation", None)
    return fields if kernel is None else {**fields, "_attn_implementation": kernel}
