"""Model outputs are dataclasses and ordered mappings."""

from __future__ import annotations

import collections
import copy
import dataclasses
import pickle
from typing import Any

import pytest

from monoblock.outputs import CausalLMOutputWithPast, ModelOutput


def output(**more: Any) -> CausalLMOutputWithPast:
    return CausalLMOutputWithPast(**{"logits": "L", "hidden_states": ("h", "i"), **more})


def test_an_output_is_a_mapping_of_the_fields_that_are_not_none() -> None:
    out = output()
    assert isinstance(out, collections.OrderedDict)
    assert isinstance(out, collections.abc.Mapping)
    assert dict(out) == {**out} == {"logits": "L", "hidden_states": ("h", "i")}
    assert list(out) == list(out.keys()) == ["logits", "hidden_states"]
    assert len(out) == 2 and "logits" in out and "loss" not in out
    assert out["logits"] == out[0] == out.logits == out.get("logits") == "L"
    assert out[1:] == (("h", "i"),) and out.to_tuple() == ("L", ("h", "i"))
    assert out.loss is None and out.get("loss", 7) == 7
    with pytest.raises(KeyError, match="loss"):
        _ = out["loss"]
    with pytest.raises(IndexError):
        _ = out[2]


def test_attributes_and_items_are_equal_and_in_field_order() -> None:
    out = output()
    out.loss = 1.5
    assert next(iter(out.items())) == ("loss", 1.5) and out[0] == 1.5
    out["attentions"] = "A"
    assert out.attentions == "A" and list(out) == ["loss", "logits", "hidden_states", "attentions"]
    out["loss"] = None
    assert out.loss is None and "loss" not in out and out[0] == "L"
    del out.logits
    assert out.logits is None and list(out) == ["hidden_states", "attentions"]


@pytest.mark.parametrize(
    "given",
    [
        {"logits": 1, "attentions": 2},
        iter([("logits", 1), ("attentions", 2)]),
        [("logits", 1), ("attentions", 2)],
    ],
    ids=["mapping", "iterator", "pairs"],
)
def test_construction_from_a_mapping_or_pairs(given: Any) -> None:
    out = CausalLMOutputWithPast(given)
    assert dict(out) == {"logits": 1, "attentions": 2}
    assert (out.loss, out.logits, out.attentions) == (None, 1, 2)


@pytest.mark.parametrize("value", [[1.0, 2.0], [], {"other": 1}, "ab", ("a", "b")])
def test_other_positional_arguments_are_the_first_field(value: Any) -> None:
    assert CausalLMOutputWithPast(value).loss == value


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda out: pickle.loads(pickle.dumps(out)),
        dataclasses.replace,
        lambda o: o.copy(),
    ],
    ids=["copy", "deepcopy", "pickle", "replace", "dict.copy"],
)
def test_copies(copied: Any) -> None:
    out = output(loss=1.0)
    again = copied(out)
    assert type(again) is type(out) and again == out and dict(again) == dict(out)
    again.loss = 2.0
    assert out.loss == out["loss"] == 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda out: out.pop("logits"),
        lambda out: out.popitem(),
        lambda out: out.update(loss=1),
        lambda out: out.setdefault("loss", 1),
        lambda out: out.clear(),
        lambda out: out.__delitem__("logits"),
    ],
    ids=["pop", "popitem", "update", "setdefault", "clear", "del"],
)
def test_dict_methods_that_remove_items_are_refused(call: Any) -> None:
    out = output()
    with pytest.raises(TypeError, match=r"CausalLMOutputWithPast.*output.name = value"):
        call(out)
    assert dict(out) == dict(output())


def test_the_base_class_accepts_any_fields() -> None:
    assert dict(ModelOutput(a=1, b=2)) == {"a": 1, "b": 2}


def test_hooks_are_called_for_new_subclasses() -> None:
    created: list[type] = []
    ModelOutput.on_subclass.append(created.append)
    try:

        @dataclasses.dataclass
        class Mine(ModelOutput):
            first: Any = None

    finally:
        ModelOutput.on_subclass.remove(created.append)
    assert created == [Mine] and ModelOutput.subclasses[-1] is Mine
