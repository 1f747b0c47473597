"""What tools around a model (trainers, adapters, parallel plans) ask of a config besides its fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NoReturn, Self


class ToolFacts:
    """The part of a config that transformers' Trainer, peft, TRL, accelerate and sentence-transformers read."""

    name_or_path: str

    # Outputs that an evaluation does not gather.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # Plans over transformers' module names; None: transformers has none for this family.
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
        """The config of the language model: this one, for all families here are flat, with one stack for input and
        output, whichever of the two is asked for."""
        del decoder, encoder  # both ends of one stack
        return self

    @property
    def per_layer_config(self) -> tuple[Self, ...]:
        """The config of each layer, which transformers' caches ask for: this one, for every layer."""
        return (self,) * int(getattr(self, "num_hidden_layers", 0))

    def __iter__(self) -> Iterator[str]:
        """The names of the fields, without aliases; so `name in config` says whether it is a field."""
        return (name for name in vars(self) if not name.startswith("_"))

    def push_to_hub(self, repo_id: str, **_: Any) -> NoReturn:
        """Refused: uploading is huggingface_hub's work."""
        raise NotImplementedError(
            f"push_to_hub is not supported: save_pretrained(folder), then `hf upload {repo_id} folder`"
        )


def foreign_fields(config: Any) -> dict[str, Any] | None:
    """The fields of another library's config object, by its `to_dict()`; None if it is no such object.

    `model_type` is among them; what its `to_dict` leaves out, the attention kernel, is added.
    """
    model_type, to_dict = getattr(config, "model_type", None), getattr(config, "to_dict", None)
    if isinstance(config, type) or not isinstance(model_type, str) or not callable(to_dict):
        return None
    data = to_dict()
    if not isinstance(data, Mapping):
        return None
    fields: dict[str, Any] = {**data, "model_type": model_type}
    kernel = getattr(config, "_attn_implementation", None)
    return fields if kernel is None else {**fields, "_attn_implementation": kernel}
