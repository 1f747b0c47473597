"""The public forward pass: argument binding and validation, and the output class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import tensorflow as tf

from monoblock.backends.tf.binding import CALL_OPTIONS, bind, integers, without_keras_details
from monoblock.backends.tf.cache import Cache, from_tuples, init_cache
from monoblock.backends.tf.checked import check_inputs
from monoblock.backends.tf.guards import check_length, check_range
from monoblock.backends.tf.ops import Size, Tensor, size
from monoblock.backends.tf.outputs import named, output_class
from monoblock.backends.xla.checked import CheckedInputs
from monoblock.backends.xla.inputs import DEFAULT_OPTIONS, ForwardOptions
from monoblock.families import Family, ModelClass
from monoblock.heads import HeadSpec
from monoblock.spec import ArchSpec, Learned


class Forward:
    """The call that models and main layers share: arguments and output of their class; `network` is the computation."""

    family: ClassVar[Family]
    row: ClassVar[ModelClass]
    arguments: ClassVar[tuple[str, ...]]
    extra: ClassVar[tuple[str, ...]]
    main_input_name: ClassVar[str] = "input_ids"
    config: Any
    spec: ArchSpec
    head_spec: HeadSpec | None

    def network(
        self,
        given: Mapping[str, Tensor],
        cache: Cache | None = None,
        options: ForwardOptions = DEFAULT_OPTIONS,
    ) -> dict[str, Any]:
        """The outputs by name, from tensors; traceable.

        `given`, all optional: input_ids int32 (b, n) or inputs_embeds (b, n, w); attention_mask and
        sequence_id (b, n), with a static cache (b, max_length); position_ids (b or 1, n); token_type_ids (b, n);
        mc_token_ids (b,); head_mask; image_patches (P, size) and patch_rows (b, n), the index of each token's
        patch, -1 for text; labels.
        """
        raise NotImplementedError

    @tf.autograph.experimental.do_not_convert
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; arguments, defaults and outputs are in the class's docstring."""
        return super().__call__(**self.bound(args, kwargs))  # pyright: ignore[reportAttributeAccessIssue]

    def run(self, arguments: dict[str, Any]) -> Any:
        """The output for arguments bound by `bound`."""
        given = {name: integers(name, value) for name, value in arguments.items() if value is not None}
        call_options = {name: given.pop(name) for name in CALL_OPTIONS if name in given}
        with without_keras_details():
            made, cache, options = self._checked(given, call_options)
        values = self.network(made.given, cache, options)
        if made.legacy and "past_key_values" in values:
            values["past_key_values"] = values["past_key_values"].to_legacy_cache()
        result = named(output_class(self.row.output), values)
        return result if self._option(call_options, "return_dict") else result.to_tuple()

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Bind arguments to names, as tensors; TypeError for unknown arguments."""
        return bind(type(self).__name__, (self.arguments, self.extra), args, kwargs)

    def _checked(
        self, given: dict[str, Any], call_options: Mapping[str, Any]
    ) -> tuple[CheckedInputs, Cache | None, ForwardOptions]:
        """The network's inputs: tensors, the cache and the options; ValueError if an argument does not fit."""
        train = bool(given.pop("training", False))
        cache, legacy = self._cache(given, given.pop("past_key_values", None), call_options, train)
        made = check_inputs(self.spec, self.head_spec, given, cache, train)
        made.legacy = legacy
        self._guard(made.given)
        return made, cache, self._forward_options(made, call_options, train)

    def _guard(self, given: dict[str, Any]) -> None:
        """Add checks of the values to a graph. ValueError if a traced sequence is too long, padding included."""
        vocab, learned = self.spec.vocab, self.spec.position(Learned)
        for name in ("input_ids", "token_type_ids"):
            if name in given:
                given[name] = check_range(name, given[name], vocab, "is this the tokenizer of this model?")
        if learned is None or tf.executing_eagerly():
            return
        if "position_ids" in given:
            advice = f"the model has {learned.size} learned positions"
            given["position_ids"] = check_range("position_ids", given["position_ids"], learned.size, advice)
            return
        tokens = "input_ids" if "input_ids" in given else "inputs_embeds"
        given[tokens] = check_length(given[tokens], learned.size - learned.offset)

    def _cache(
        self, given: Mapping[str, Any], past: Any, call_options: Mapping[str, Any], train: bool
    ) -> tuple[Cache | None, bool]:
        """The cache, and whether it is returned as tuples (as it was given; transformers' form if none was given)."""
        requested = call_options.get("use_cache")
        use = bool(getattr(self.config, "use_cache", False) and not train if requested is None else requested)
        if not self.spec.causal:
            if requested or past is not None:
                raise ValueError(
                    "a bidirectional model has no cache: leave out use_cache and past_key_values"
                )
            return None, False
        if isinstance(past, Cache):
            return past, False
        if past is not None:
            return from_tuples(past), True
        if not use:
            return None, False
        tokens = given.get("input_ids", given.get("inputs_embeds"))
        nested = tokens is not None and len(tokens.shape) == (3 if "input_ids" in given else 4)
        rows = 0 if tokens is None else size(tokens, 0) * (size(tokens, 1) if nested else 1)
        return self._new_cache(rows, None), True

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens, for `past_key_values`."""
        return self._new_cache(batch_size, max_length)

    def _new_cache(self: Any, rows: Size, max_length: int | None) -> Cache:
        return init_cache(self.spec, rows, max_length, self.compute_dtype)

    def _forward_options(
        self, made: CheckedInputs, call_options: Mapping[str, Any], train: bool
    ) -> ForwardOptions:
        keep = call_options.get("logits_to_keep") or 0
        if not isinstance(keep, int):
            raise TypeError(
                f"logits_to_keep must be the number of last tokens, an int, got {type(keep).__name__}"
            )
        return ForwardOptions(
            train=train,
            attentions=self._option(call_options, "output_attentions"),
            hidden_states=self._option(call_options, "output_hidden_states"),
            fresh=made.fresh,
            keep=keep,
            choices=made.choices,
            nested=made.nested,
        )

    def _option(self, call_options: Mapping[str, Any], name: str) -> bool:
        value = call_options.get(name)
        return bool(getattr(self.config, name) if value is None else value)
