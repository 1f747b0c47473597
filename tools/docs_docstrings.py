"""A griffe extension for the API reference: what is created at run time and griffe's static analysis cannot see.

Docstrings of the model classes, from the families' tables that the classes are created from; parameters of the configs,
from their annotations; output classes of JAX and TensorFlow that have the fields of those of PyTorch.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

import monoblock
from monoblock import families

# Kind of head -> what the class computes, with the shape of its logits.
HEADS = {
    None: "the bare model: hidden states (batch, tokens, width)",
    "pooler": "the bare model: hidden states (batch, tokens, width), and a pooled output (batch, width)",
    "causal": "causal language model: logits (batch, tokens, vocabulary)",
    "masked": "masked language model: logits (batch, tokens, vocabulary)",
    "double": "language model and multiple choice: logits (batch, choices, tokens, vocabulary), mc_logits (batch, "
    "choices)",
    "sequence": "sequence classification by the last token: logits (batch, labels)",
    "first": "sequence classification by the first token: logits (batch, labels)",
    "choice": "multiple choice: logits (batch, choices)",
    "token": "token classification: logits (batch, tokens, labels)",
    "span": "extractive question answering: start_logits and end_logits (batch, tokens)",
}
TITLES = {
    "mpt": "MPT",
    "mistral": "Mistral",
    "fuyu": "Fuyu",
    "openai-gpt": "GPT-1",
    "gpt_neo": "GPT Neo",
    "mpnet": "MPNet",
}
KINDS = {
    "": "a `torch.nn.Module`",
    "Flax": "a Flax Linen module with its parameters",
    "TF": "a `keras.Model`",
}


class ModelDocstrings(griffe.Extension):
    """Fills in the docstrings of the model classes of `monoblock/__init__.pyi`."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called when the package is loaded and its stubs are merged."""
        if pkg.path != "monoblock":
            return
        for name, member in pkg.members.items():
            if not member.is_alias and member.is_class and member.docstring is None:
                member.docstring = griffe.Docstring(_described(name), parent=member)
        for name, home in monoblock._HOME.items():
            if "outputs" in home and name not in pkg[home.removeprefix("monoblock.")].members:
                pkg.set_member(name, _output(name, pkg))

        for name in (
            "GenerationConfig",
            *(name for name, home in monoblock._HOME.items() if ".families." in home),
        ):
            _set_parameters(
                pkg[monoblock._HOME[name].removeprefix("monoblock.")][name], getattr(monoblock, name)
            )


def _set_parameters(config: Any, kind: Any) -> None:
    """Give a config class the constructor that its annotated fields define."""
    target = config.final_target if config.is_alias else config
    keyword = griffe.ParameterKind.keyword_only
    own = [
        griffe.Parameter(
            field, kind=keyword, default=repr(getattr(kind, field, None)), annotation=str(annotation)
        )
        for field, annotation in kind.__annotations__.items()
        if not field.startswith("_") and "ClassVar" not in str(annotation)
    ]
    rest = griffe.Parameter("kwargs", kind=griffe.ParameterKind.var_keyword, annotation="Any")
    init = griffe.Function(
        "__init__", parameters=griffe.Parameters(*own, rest), parent=target, lineno=1, endlineno=1
    )
    target.set_member("__init__", init)


def _output(name: str, pkg: griffe.Module) -> griffe.Class:
    """A class that `output_class` of the framework creates from the one of `monoblock.outputs`."""
    prefix, own = re.fullmatch(r"(Flax|TF)(.+)", name).groups()
    framework = {"Flax": "JAX", "TF": "TensorFlow"}[prefix]
    made = griffe.Class(name, parent=pkg, lineno=1, endlineno=1)
    text = f"The fields of `{own}`, as arrays of {framework}."
    made.docstring = griffe.Docstring(text, parent=made)
    return made


def _described(name: str) -> str:
    prefix, stem = re.fullmatch(r"(Flax|TF)?(.+)", name).groups("")
    if ending := next((e for e in ("PreTrainedModel", "MainLayer") if stem.endswith(e)), None):
        model_type = next(m for m, (own, _) in families.FAMILIES.items() if own == stem.removesuffix(ending))
        what = "base class of the models" if ending == "PreTrainedModel" else "bare model as a Keras layer"
        return f"{TITLES[model_type]}: {what}."
    family, row = families.row_of(stem)
    return (
        f"{TITLES[family.name]}, {HEADS[row.head]}. It is {KINDS[prefix]} and returns `{prefix}{row.output}`.\n\n"
        "Shapes: input_ids, attention_mask, position_ids and labels of tokens (batch, tokens); inputs_embeds "
        "(batch, tokens, width)."
    )
