"""`pad`: pads rows of ids that were encoded earlier to one length, for collators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from monoblock.tokenization.call import EncodingMixin
from monoblock.tokenization.encoding import BatchEncoding
from monoblock.tokenization.inputs import EncodingPlan
from monoblock.tokenization.tensors import CONVERTERS, as_list


class PaddingMixin(EncodingMixin):
    """The methods of a tokenizer that pad."""

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pad encoded texts to one length.

        Args:
            encoded_inputs: a dictionary of lists (one text, or one list per text), or a list of dictionaries. Ids,
                attention masks, token types and special-token masks are padded; other keys (labels) are unchanged.
            padding, max_length, pad_to_multiple_of, padding_side, return_tensors: as in the call.
            return_attention_mask: whether the result has a mask (False removes an existing one); default by
                `model_input_names`.

        Returns:
            `BatchEncoding`, with arrays of the input's framework unless `return_tensors` is given. The input is not
            modified.
        """
        data = _as_columns(encoded_inputs)
        main = self.model_input_names[0]
        if main not in data:
            raise ValueError(f"pad() needs {main!r}; got the keys: {', '.join(data) or 'none'}")
        if return_tensors is None:
            return_tensors = _framework_of(data[main])
        data = {key: as_list(value) for key, value in data.items()}
        ids = data[main]
        plan = self._plan(padding, False, max_length, None, padding_side, verbose)
        with_mask = (
            "attention_mask" in self.model_input_names
            if return_attention_mask is None
            else return_attention_mask
        )
        if return_attention_mask is False:
            data.pop("attention_mask", None)
        if not ids:
            return BatchEncoding(
                {**data, "attention_mask": []} if with_mask else data, tensor_type=return_tensors
            )
        single = not isinstance(ids[0], list)
        if single:
            data = {key: [value] for key, value in data.items()}
            ids = [ids]
        if uneven := [
            key
            for key, value in data.items()
            if not isinstance(value, list) or len(cast(list[Any], value)) != len(ids)
        ]:
            raise ValueError(f"pad() got {len(ids)} rows of {main!r} but not as many of {uneven[0]!r}")
        if with_mask and "attention_mask" not in data:
            data["attention_mask"] = [[1] * len(row) for row in ids]
        if plan.pads:
            data = self._padded(data, _target(plan, ids, pad_to_multiple_of), plan.side)
        return BatchEncoding(
            {key: value[0] for key, value in data.items()} if single else data, tensor_type=return_tensors
        )

    def _padded(self, data: dict[str, list[Any]], length: int, side: str) -> dict[str, list[Any]]:
        main = self.model_input_names[0]
        fill: dict[str, int] = {
            main: cast(int, self.pad_token_id),
            "attention_mask": 0,
            "token_type_ids": self.pad_token_type_id,
            "special_tokens_mask": 1,
        }
        missing = [length - len(row) for row in data[main]]
        padded: dict[str, list[Any]] = {}
        for key, rows in data.items():
            if key not in fill or any(_is_nested(row) for row in rows):
                padded[key] = rows
                continue
            pads = [[fill[key]] * count for count in missing]
            join: Callable[[list[int], list[int]], list[int]] = (
                (lambda r, p: r + p) if side == "right" else lambda r, p: p + r
            )
            padded[key] = [join(row, pad) for row, pad in zip(rows, pads, strict=True)]
        return padded


def _as_columns(encoded: Any) -> dict[str, Any]:
    if isinstance(encoded, Mapping):
        return dict(cast(Mapping[str, Any], encoded))
    if not isinstance(encoded, list | tuple):
        raise ValueError(f"pad() takes a dictionary or a list of dictionaries; got {type(encoded).__name__}")
    rows = cast(Sequence[Any], encoded)
    if not all(isinstance(row, Mapping) for row in rows):
        raise ValueError("pad() takes a dictionary or a list of dictionaries; the list holds something else")
    keys: list[str] = list(rows[0]) if rows else []
    for index, row in enumerate(rows):
        if absent := [key for key in keys if key not in row]:
            raise ValueError(f"pad() got rows with different keys: row {index} has no {absent[0]!r}")
    return {key: [row[key] for row in rows] for key in keys}


def _framework_of(ids: Any) -> str | None:
    """The framework of the arrays, or None for lists."""
    while isinstance(ids, list | tuple):
        items = cast(Sequence[Any], ids)
        ids = items[0] if items else 0
    root = type(ids).__module__.partition(".")[0]
    if isinstance(ids, int) or (root == "numpy" and not getattr(ids, "shape", ())):
        return None
    roots = {"jaxlib": "jax", "numpy": "np"}
    roots |= {row.module.partition(".")[0]: name for name, row in CONVERTERS.items() if name != "np"}
    if root not in roots:
        raise ValueError(f"pad() takes ids as lists or arrays; got {type(ids).__name__}")
    return roots[root]


def _target(plan: EncodingPlan, ids: list[list[int]], multiple: int | None) -> int:
    length = max(map(len, ids)) if plan.padding == "longest" or plan.max_length is None else plan.max_length
    return -(-length // multiple) * multiple if multiple else length


def _is_nested(row: list[Any]) -> bool:
    return bool(row) and isinstance(row[0], list)
