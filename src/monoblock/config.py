"""Model configs: the fields of `config.json` under transformers' names, and their conversion to an `ArchSpec`.

A family's config is a subclass whose annotated class attributes are its fields with defaults; constructor, signature,
JSON round trip and aliases follow from them.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

from monoblock.checkpoint.files import read_json, write_atomically
from monoblock.checkpoint.hub import find_file, find_gguf, in_gguf
from monoblock.checkpoint.mlx_config import with_method
from monoblock.checkpoint.options import HubOptions
from monoblock.config_fields import COMMON, QUIET, REFUSED, TYPES
from monoblock.config_tools import ToolFacts, foreign_fields
from monoblock.errors import FieldError, UnsupportedConfig
from monoblock.field_types import brief, checked, declared, in_file
from monoblock.heads import HeadSpec
from monoblock.quantization import stored_quantization
from monoblock.spec import ArchSpec

CONFIG_NAME = "config.json"
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# Limit on labels with generated names, which take some 140 bytes each; id2label may be longer.
MAX_LABELS = 2**20

Config = TypeVar("Config", bound="PretrainedConfig")

log = logging.getLogger("monoblock")


class PretrainedConfig(ToolFacts):
    """The configuration of a model: the fields of `config.json` as attributes, under transformers' names.

    Subclasses declare `field: type = default`; positional arguments follow the order of declaration. Setting a value of
    another type raises FieldError (a ValueError); floats with integer values are accepted as integers. Unknown keyword
    arguments are kept as attributes and written back, with one warning.
    """

    model_type: ClassVar[str] = ""
    # Further values of model_type that this class supports.
    other_types: ClassVar[tuple[str, ...]] = ()
    attribute_map: ClassVar[Mapping[str, str]] = {}
    sub_configs: ClassVar[Mapping[str, type[PretrainedConfig]]] = {}
    # Fields from this one on are written only if they differ from their defaults: transformers' class lacks them.
    upstream_from: ClassVar[str] = ""
    # Fields of other configs -> the values that describe what this family computes anyway, and why others are refused.
    implied: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}
    fields: ClassVar[dict[str, Any]] = {}
    _types: ClassVar[dict[str, Any]] = {}

    _warned: ClassVar[set[tuple[str, str]]] = set()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = [name for name in cls.__annotations__ if "ClassVar" not in str(cls.__annotations__[name])]
        cls.fields = {**cls.fields, **{name: cls.__dict__[name] for name in own}}
        types = declared(cls)
        cls._types = {**TYPES, **{name: types[name] for name in cls.fields}}
        keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [
            inspect.Parameter(name, keyword, default=default) for name, default in cls.fields.items()
        ]
        extra = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
        cls.__signature__ = inspect.Signature([*parameters, extra])

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        if len(args) > len(self.fields):
            raise TypeError(
                f"{type(self).__name__} takes at most {len(self.fields)} positional arguments, got {len(args)}"
            )
        given = dict(zip(self.fields, args, strict=False))
        if twice := given.keys() & kwargs.keys():
            raise TypeError(f"{type(self).__name__} got {', '.join(sorted(twice))} twice")
        given |= kwargs
        self.name_or_path: str = str(given.pop("name_or_path", given.pop("_name_or_path", "")))
        kernel = given.pop("attn_implementation", given.pop("_attn_implementation", None))
        self._attn_implementation: str | None = self._checked("attn_implementation", kernel, str | None)
        given.pop("model_type", None)
        labels, count = self._labels(given), given.pop("num_labels", 2)
        if "id2label" in labels:
            self._checked("num_labels", count, int | None)
        else:
            self.num_labels = count
        for name, value in labels.items():
            setattr(self, name, value)
        for name, default in {**COMMON, **self.fields}.items():
            setattr(self, name, copy.deepcopy(default))
        for name, value in given.items():
            if not self._is_known(name) and hasattr(type(self), name):
                raise FieldError(
                    f"{type(self).__name__}.{name} is an attribute of the class, not a field", name
                )
            setattr(self, name, value)
            self._warn_unknown(name)
        for name, kind in self.sub_configs.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                setattr(self, name, kind(**self._as_mapping(name, value)))
        self.finish(frozenset(given))
        self._refuse()

    def finish(self, given: frozenset[str], /) -> None:
        """Hook for families: derive fields from the `given` ones at the end of the constructor."""

    # ------------------------------------------------------------------ attributes and aliases

    def __setattr__(self, name: str, value: Any) -> None:
        name = self.attribute_map.get(name, name)
        if name == "torch_dtype":
            name = "dtype"
        if name == "dtype" and value is not None:
            # Frameworks' dtypes are objects; of JSON values, only strings are dtypes.
            if isinstance(value, bool | int | float | list | dict):
                self._checked(name, value, str | None)
            value = str(cast("Any", value)).removeprefix("torch.")
        elif name in self._types:
            value = self._checked(name, value, self._types[name])
        object.__setattr__(self, name, value)

    def _checked(self, name: str, value: Any, kind: Any) -> Any:
        return checked(type(self).__name__, name, value, kind)

    def __getattr__(self, name: str) -> Any:
        target = "dtype" if name == "torch_dtype" else type(self).attribute_map.get(name)
        if target is None or target == name:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        return getattr(self, target)

    @property
    def num_labels(self) -> int:
        """Number of labels of the classification heads: the length of `id2label`."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        count = self._checked("num_labels", count, int)
        if not 1 <= count <= MAX_LABELS:
            raise FieldError(
                f"{type(self).__name__}.num_labels must be an integer from 1 to {MAX_LABELS:,}, "
                f"got {count}; id2label may name more labels",
                "num_labels",
            )
        if len(getattr(self, "id2label", None) or {}) != count:
            self.id2label = {i: f"LABEL_{i}" for i in range(count)}
            self.label2id = {label: i for i, label in self.id2label.items()}

    @property
    def use_return_dict(self) -> bool:
        """transformers' older name of `return_dict`."""
        return bool(self.return_dict)

    def _labels(self, given: dict[str, Any]) -> dict[str, Any]:
        labels: dict[str, Any] = {}
        if id2label := self._checked("id2label", given.pop("id2label", None), dict[Any, Any] | None):
            labels["id2label"] = {self._label_id("id2label", i): str(label) for i, label in id2label.items()}
        if label2id := self._checked("label2id", given.pop("label2id", None), dict[Any, Any] | None):
            labels["label2id"] = {str(label): self._label_id("label2id", i) for label, i in label2id.items()}
        if "id2label" in labels and "label2id" not in labels:
            labels["label2id"] = {label: i for i, label in labels["id2label"].items()}
        return labels

    def _label_id(self, field: str, value: Any) -> int:
        """The id of a label, which is a string if it is a JSON key."""
        try:
            return int(value) if isinstance(value, str) else self._checked(field, value, int)
        except ValueError:
            raise FieldError(
                f"{type(self).__name__}.{field} must have integer ids, got {brief(value)}", field
            ) from None

    def _as_mapping(self, name: str, value: Any) -> dict[str, Any]:
        if value is None or isinstance(value, Mapping):
            return dict(cast("Mapping[str, Any]", value or {}))
        raise FieldError(f"{type(self).__name__}.{name} must be a dict, got {brief(value)}", name)

    def _is_known(self, name: str) -> bool:
        tables = (self.fields, COMMON, QUIET, REFUSED, self.implied, self.attribute_map, ("torch_dtype",))
        return any(name in table for table in tables)

    def _warn_unknown(self, name: str) -> None:
        if self._is_known(name) or name.startswith("_") or (type(self).__name__, name) in self._warned:
            return
        self._warned.add((type(self).__name__, name))
        log.warning(
            "%s does not know the field %s: it is kept and written back, but has no effect",
            type(self).__name__,
            brief(name),
        )

    @classmethod
    def refused(cls) -> dict[str, tuple[tuple[Any, ...], str]]:
        """Fields that this family does not support: the values without effect (in addition to None), and why others are
        refused."""
        own = {*cls.fields, *cls.attribute_map}
        return {**{name: rule for name, rule in REFUSED.items() if name not in own}, **cls.implied}

    def _refuse(self, fields: Mapping[str, Any] | None = None) -> None:
        """UnsupportedConfig for the first unsupported field among those given, or of this config."""
        given = vars(self) if fields is None else fields
        for name, (allowed, hint) in self.refused().items():
            value = given.get(name)
            if value is not None and not any(value == other for other in allowed):
                accepted = " or ".join(map(repr, (*allowed, None)))
                raise UnsupportedConfig(
                    f"{type(self).__name__}.{name}={brief(value)} is not supported: {hint}; it must be {accepted}"
                )
        stored_quantization(self)
        self._check_problem_type()

    def _check_problem_type(self) -> None:
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"problem_type must be one of {', '.join(PROBLEM_TYPES)} or None, got {self.problem_type!r}"
            )

    def check(self, supported: Mapping[str, tuple[Any, ...]]) -> None:
        """UnsupportedConfig for the first field whose value is not among the supported ones.

        A dotted name refers to nested configs and dicts; missing entries count as None.
        """
        for name, values in supported.items():
            found = functools.reduce(_member, name.split("."), cast("Any", self))
            if not any(found == value for value in values):
                known = " or ".join(repr(value) for value in values if value is not None or len(values) == 1)
                raise UnsupportedConfig(
                    f"{type(self).__name__}.{name}={found!r} is not supported: it must be {known}"
                )

    def check_keys(self, known: Mapping[str, frozenset[str]]) -> None:
        """UnsupportedConfig for the first unknown key of a dict field; names may be dotted."""
        for name, keys in known.items():
            given: Any = functools.reduce(_member, name.split("."), cast("Any", self))
            if unknown := sorted(set(given or ()) - keys):
                field = f"{type(self).__name__}.{name}"
                raise UnsupportedConfig(
                    f"{field}.{unknown[0]} is not supported; it may hold {', '.join(sorted(keys))}"
                )

    # ------------------------------------------------------------------ specs for the backends

    def to_spec(self) -> ArchSpec:
        """The architecture with all values explicit; ValueError or UnsupportedConfig names an invalid field."""
        raise NotImplementedError(f"{type(self).__name__} is not the config of a model")

    def to_head(self, kind: str) -> HeadSpec:
        """The head of that kind. A token head has dropout `classifier_dropout`, else `hidden_dropout`, else 0.1."""
        given = (getattr(self, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        dropout = next((p for p in given if p is not None), 0.1) if kind == "token" else 0.0
        return HeadSpec(
            kind=kind,
            labels=self.num_labels,
            dropout=dropout,
            problem_type=self.problem_type,
            pad_id=self.pad_token_id,
            last_by=self._last_by(),
        )

    def _last_by(self) -> Any:
        return getattr(self, "last_token_by", None) or "pad_id"

    def updated_head(self, head: HeadSpec) -> HeadSpec:
        """A model's head with the current values of the fields that are read at each call: problem_type, pad_token_id
        and last_token_by. ValueError: unknown problem_type."""
        now = (self.problem_type, self.pad_token_id, self._last_by())
        if now == (head.problem_type, head.pad_id, head.last_by):
            return head
        self._check_problem_type()
        return replace(head, problem_type=now[0], pad_id=now[1], last_by=now[2])

    # ------------------------------------------------------------------ dicts and files

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, nested configs as dicts."""
        out: dict[str, Any] = {"model_type": self.stored_type()} if self.model_type else {}
        names = list(self.fields)
        upstream = names[names.index(self.upstream_from) :] if self.upstream_from else []
        for name, value in vars(self).items():
            if name in ("name_or_path", "_attn_implementation"):
                continue
            if name in upstream and value == self.fields[name]:
                continue
            out[name] = _plain(value)
        out["_name_or_path"] = self.name_or_path
        if "id2label" in out:
            out["id2label"] = {str(i): label for i, label in out["id2label"].items()}
        return out

    def stored_type(self) -> str:
        """The `model_type` to write, with which transformers computes the same."""
        return self.model_type

    def stored_class(self, name: str) -> str:
        """The class name to write to config.json for the public class `name`."""
        return name

    def to_diff_dict(self) -> dict[str, Any]:
        """The contents of config.json: the family's fields, and common fields that differ from their defaults."""
        plain = {
            **COMMON,
            "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
            "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        }
        return {
            name: value
            for name, value in self.to_dict().items()
            if name != "_name_or_path" and (name in self.fields or name not in plain or value != plain[name])
        }

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of config.json: sorted keys, an indent of two spaces, a final newline."""
        data = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        """Write `to_json_string()` to a file, atomically."""
        text = self.to_json_string(use_diff)
        write_atomically(Path(json_file_path), lambda path: path.write_text(text, encoding="utf-8"))

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False) -> None:
        """Write config.json into a folder, which is created if necessary."""
        if push_to_hub:
            self.push_to_hub(Path(save_directory).name)
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_pretrained needs a folder, but {folder} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / CONFIG_NAME)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """A config from a dict; keywords override its fields.

        With `return_unused_kwargs=True`, returns the config and the keywords that are not fields.
        """
        unused = kwargs.pop("return_unused_kwargs", False)
        known = cls.known_fields() | config_dict.keys()
        fields = kwargs if not unused else {k: v for k, v in kwargs.items() if k in known}
        merged = dict(with_method({**config_dict, **fields}))
        if "num_labels" in fields and "id2label" not in fields:
            merged = {k: v for k, v in merged.items() if k not in ("id2label", "label2id")}
        config = cls(**merged)
        return (config, {k: v for k, v in kwargs.items() if k not in fields}) if unused else config

    @classmethod
    def known_fields(cls) -> frozenset[str]:
        """The names that the constructor knows."""
        labels = {"num_labels", "id2label", "label2id", "torch_dtype"}
        return frozenset({*cls.fields, *COMMON, *cls.attribute_map, *labels, *QUIET, "attn_implementation"})

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Self:
        """A config from a JSON file."""
        return cls.from_dict(read_json(Path(json_file)))

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """config.json as a dict, and the keyword arguments that are no download options."""
        options = HubOptions.pop(kwargs)
        return cls.read_file(pretrained_model_name_or_path, options)[1], kwargs

    @staticmethod
    def read_file(name: str | Path, options: HubOptions) -> tuple[Path, dict[str, Any]]:
        """The path and the content of config.json; `name`: a folder, a name on the hub, or the path of the file.

        For a GGUF file, what its metadata say.
        """
        if in_gguf(name, options):
            from monoblock.checkpoint.gguf import config, files  # import NumPy

            paths = find_gguf(name, options)
            return paths[0], config.model_config(files.opened(paths)) | {"_name_or_path": str(name)}
        path = Path(name)
        if not path.is_file():
            found = find_file(name, CONFIG_NAME, options)
            assert found is not None
            path = found
        data = read_json(path)
        data["_name_or_path"] = str(name)
        return path, data

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """The config of a checkpoint: a folder, a config file, or a name on the hub.

        Keyword arguments override fields of the file; download options are `revision`, `token`, `cache_dir`,
        `local_files_only`, `force_download`, `subfolder`.
        """
        path, data = cls.read_file(pretrained_model_name_or_path, HubOptions.pop(kwargs))
        found = data.get("model_type", cls.model_type)
        if cls.model_type and found not in (cls.model_type, *cls.other_types):
            raise ValueError(
                f"{cls.__name__} reads checkpoints of type {cls.model_type!r}, but {pretrained_model_name_or_path} "
                f"is of type {brief(found)}; use AutoConfig to choose by type"
            )
        with in_file(path, kwargs):
            return cls.from_dict(data, **kwargs)

    def changed(self, **fields: Any) -> tuple[Self, dict[str, Any]]:
        """A copy with these fields changed, and the keyword arguments that are not fields."""
        own = {"_attn_implementation": self._attn_implementation}
        return self.from_dict({**self.to_dict(), **own}, return_unused_kwargs=True, **fields)

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Set the given fields."""
        for name, value in config_dict.items():
            setattr(self, name, value)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return False
        mine, others = self.to_dict(), cast("PretrainedConfig", other).to_dict()
        return mine == {**others, "_name_or_path": self.name_or_path}

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def _plain(value: Any) -> Any:
    if isinstance(value, PretrainedConfig):
        # In config.json, nested configs hold only their own fields.
        return {
            k: v
            for k, v in value.to_dict().items()
            if k in value.fields or k not in {*COMMON, "id2label", "label2id", "_name_or_path"}
        }
    return copy.deepcopy(value)


def _member(value: Any, name: str) -> Any:
    """A dict's entry or an object's attribute, None if there is none."""
    return cast("dict[str, Any]", value).get(name) if isinstance(value, dict) else getattr(value, name, None)


def as_own_config(config: Any, kind: type[Config], owner: str = "this") -> Config:
    """A config of class `kind`: the given one, or one converted from transformers' config object.

    ValueError, prefixed with `owner`, for configs of other families and for other objects.
    """
    if isinstance(config, kind):
        return config
    fields = None if isinstance(config, PretrainedConfig) else foreign_fields(config)
    if fields is None or fields["model_type"] not in (kind.model_type, *kind.other_types):
        other = "" if fields is None else f" of the model type {fields['model_type']!r}"
        raise ValueError(
            f"{owner} takes a {kind.__name__}, got {type(config).__name__}{other}; or transformers' config object of "
            f"the model type {kind.model_type!r}"
        )
    return kind.from_dict(fields)
