"""`GenerationConfig`: the fields of generation_config.json, under transformers' names.

A field is None until it is set. `resolve.py` fills in defaults per call, after the call's own arguments and the model's
file.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from monoblock.checkpoint.files import read_json, write_atomically
from monoblock.checkpoint.hub import find_file
from monoblock.checkpoint.options import HubOptions
from monoblock.errors import FieldError
from monoblock.field_types import brief, checked_fields, declared, in_file
from monoblock.generation.checks import CHECKS, SAMPLING_FIELDS, as_ids, plain

GENERATION_CONFIG_NAME = "generation_config.json"
METADATA = frozenset({"transformers_version", "_from_model_config"})
# Fields found in published configs that have no effect.
INERT = frozenset({"_commit_hash", "_original_object_hash"})

log = logging.getLogger("monoblock")


class GenerationConfig:
    """Options of generation: lengths, strategy, cache, processors, outputs and special tokens, as in transformers.

    Unknown keywords are kept, written back and warned about once. Values from a file must have the declared types
    (FieldError, a ValueError), and their ranges are checked when they are used; values passed in Python are checked at
    once (ValueError).
    """

    # Length
    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    early_stopping: bool | str | None = None
    max_time: float | None = None
    stop_strings: str | list[str] | None = None
    # Strategy
    do_sample: bool | None = None
    num_beams: int | None = None
    use_mtp: bool | None = None
    # Cache
    use_cache: bool | None = None
    cache_implementation: str | None = None
    cache_config: dict[str, Any] | None = None
    max_cache_len: int | None = None
    prefill_chunk_size: int | None = None
    # Scores
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_h: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    repetition_penalty: float | None = None
    encoder_repetition_penalty: float | None = None
    length_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: list[list[int]] | None = None
    renormalize_logits: bool | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    remove_invalid_values: bool | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    sequence_bias: Mapping[tuple[int, ...], float] | list[Any] | None = None
    token_healing: bool | None = None
    guidance_scale: float | None = None
    watermarking_config: Any = None
    # Outputs
    num_return_sequences: int | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    return_dict_in_generate: bool | None = None
    # Special tokens
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    # Encoder-decoder models
    encoder_no_repeat_ngram_size: int | None = None
    decoder_start_token_id: int | list[int] | None = None
    # Assisted decoding
    is_assistant: bool | None = None
    num_assistant_tokens: int | None = None
    num_assistant_tokens_schedule: str | None = None
    assistant_confidence_threshold: float | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    assistant_early_exit: int | None = None
    assistant_lookbehind: int | None = None
    target_lookbehind: int | None = None
    assistant_ensemble_weight: float | None = None
    speculation_type: str | None = None
    # Compilation and serving
    compile_config: Any = None
    disable_compile: bool | None = None
    continuous_batching_config: Any = None
    # Strategies that transformers has moved out of the library
    low_memory: bool | None = None
    penalty_alpha: float | None = None
    dola_layers: str | list[int] | None = None
    diversity_penalty: float | None = None
    num_beam_groups: int | None = None
    constraints: Any = None
    force_words_ids: Any = None

    _from_model_config: bool | None = None
    FIELDS: ClassVar[frozenset[str]]
    _warned: ClassVar[set[str]] = set()

    def __init__(self, /, **kwargs: Any):
        self._loaded: dict[str, Any] = {}
        self._take(kwargs)
        self.validate()

    def _take(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name in INERT:
                continue
            if name not in self.FIELDS | METADATA and (name == "_loaded" or hasattr(type(self), name)):
                raise FieldError(f"GenerationConfig.{name} is an attribute of the class, not a field", name)
            setattr(self, name, plain(name, value) if name in self.FIELDS else value)
            if name not in self.FIELDS | METADATA and name not in self._warned:
                self._warned.add(name)
                log.warning(
                    "GenerationConfig does not know the field %s: it is kept and written back, but has no effect",
                    brief(name),
                )

    # ------------------------------------------------------------------ reading fields

    def set_fields(self) -> dict[str, Any]:
        """The known fields that are not None."""
        return {name: value for name in self.FIELDS if (value := getattr(self, name)) is not None}

    def own_fields(self) -> dict[str, Any]:
        """The set fields whose values were passed in Python rather than read from a file."""
        missing = object()
        return {
            name: value
            for name, value in self.set_fields().items()
            if self._loaded.get(name, missing) != value
        }

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a sequence. Negative ids, which old files use for "none", are left out."""
        return tuple(id for id in as_ids(self.eos_token_id) if id >= 0)

    def validate(self) -> None:
        """ValueError if a value passed in Python is out of range or two such values contradict each other.

        The ranges of sampling fields apply only with `do_sample=True`: many files set `temperature: 0` for greedy
        decoding.
        """
        self.check(self.own_fields())

    def check(self, fields: Mapping[str, Any]) -> None:
        """The same for these fields only."""
        for name, value in fields.items():
            if name not in CHECKS or (name in SAMPLING_FIELDS and not self.do_sample):
                continue
            fits, expected = CHECKS[name]
            if not fits(value):
                raise ValueError(f"GenerationConfig.{name}={brief(value)}: expected {expected}")
        for forced in ("forced_bos_token_id", "forced_eos_token_id"):
            ids = set(as_ids(getattr(self, forced)))
            if ids and ids <= set(self.suppress_tokens or ()):
                raise ValueError(
                    f"GenerationConfig.{forced}={getattr(self, forced)!r}: every token of it is also in "
                    "suppress_tokens, so nothing could be chosen; take it out of one of them"
                )

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set the fields that this config has; returns the remaining keywords."""
        known = {name: value for name, value in kwargs.items() if name in self.FIELDS or hasattr(self, name)}
        for name, value in known.items():
            setattr(self, name, plain(name, value))
            self._loaded.pop(name, None)
        self.validate()
        return {name: value for name, value in kwargs.items() if name not in known}

    # ------------------------------------------------------------------ dicts and files

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-serialisable values, unset ones as None, together with the unknown ones."""
        values = {name: getattr(self, name) for name in self.FIELDS}
        values |= {name: v for name, v in vars(self).items() if name not in ("_loaded", *INERT)}
        return {name: _plain(value) for name, value in values.items()}

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of generation_config.json: the fields that are set."""
        return {name: value for name, value in self.to_dict().items() if value is not None}

    def to_json_string(self, use_diff: bool = True, ignore_metadata: bool = False) -> str:
        """generation_config.json as a string: sorted keys, indented by two spaces, with a final newline."""
        data = self.to_diff_dict() if use_diff else self.to_dict()
        if ignore_metadata:
            data = {name: value for name, value in data.items() if name not in METADATA}
        return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        """Write `to_json_string()` to that file, atomically."""
        text = self.to_json_string(use_diff)
        write_atomically(json_file_path, lambda path: path.write_text(text, encoding="utf-8"))

    def save_pretrained(
        self, save_directory: str | Path, config_file_name: str = GENERATION_CONFIG_NAME
    ) -> None:
        """Write generation_config.json into that folder, which is created if needed; ValueError if invalid."""
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_pretrained needs a folder, but {folder} is a file")
        self.validate()
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / config_file_name)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """A config from the content of a file; keywords override its fields.

        With `return_unused_kwargs=True`: a tuple of the config and the keywords that are not fields.
        """
        unused: dict[str, Any] = {}
        if kwargs.pop("return_unused_kwargs", False):
            known = cls.FIELDS | config_dict.keys()
            unused = {name: value for name, value in kwargs.items() if name not in known}
            kwargs = {name: value for name, value in kwargs.items() if name in known}
            return cls._from_file(config_dict, kwargs), unused
        return cls._from_file(config_dict, kwargs)

    @classmethod
    def _from_file(cls, config_dict: Mapping[str, Any], overrides: Mapping[str, Any]) -> Self:
        config = cls()
        kinds = {name: kind for name, kind in declared(cls).items() if name in cls.FIELDS}
        loaded = {name: value for name, value in config_dict.items() if name not in overrides}
        loaded = checked_fields("GenerationConfig", loaded, kinds)
        config._take(copy.deepcopy({**loaded, **overrides}))
        config._loaded = copy.deepcopy(loaded)
        config.validate()
        return config

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Self:
        """A config from a JSON file."""
        with in_file(json_file):
            return cls._from_file(read_json(json_file), {})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | Path,
        config_file_name: str = GENERATION_CONFIG_NAME,
        **kwargs: Any,
    ) -> Any:
        """The config in a folder or in a repository of the hub; HubError (an OSError) if it has none.

        Keywords are the download options (`revision`, `token`, `cache_dir`, `local_files_only`, `force_download`,
        `subfolder`), `return_unused_kwargs`, and fields that override the file's.
        """
        options = HubOptions.pop(kwargs)
        path = find_file(pretrained_model_name, config_file_name, options)
        assert path is not None  # find_file raises when a required file is missing
        with in_file(path, kwargs):
            return cls.from_dict(read_json(path), **kwargs)

    @classmethod
    def from_model_config(cls, model_config: Any) -> Self:
        """The generation fields and special token ids of a config.json, for models without a generation_config.json.

        `model_config` is a config with `to_dict()`, or a mapping such as `{"eos_token_id": 0}`.
        """
        fields = cast(
            Mapping[str, Any], model_config if isinstance(model_config, Mapping) else model_config.to_dict()
        )
        wanted = cls.FIELDS - NOT_THE_MODELS
        config = cls._from_file({n: v for n, v in fields.items() if n in wanted and v is not None}, {})
        config._from_model_config = True
        return config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self.to_json_string(
            False, True
        ) == other.to_json_string(False, True)

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # it is mutable

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string(ignore_metadata=True)}"


GenerationConfig.FIELDS = frozenset(
    name for name in GenerationConfig.__annotations__ if not name.startswith("_") and name != "FIELDS"
)


def as_own_config(config: Any, name: str = "generation_config") -> GenerationConfig | None:
    """The config as a `GenerationConfig`: itself, None, or the set fields of a transformers object, which then count as
    passed in Python. ValueError for anything else; `name`: of the argument."""
    if config is None or isinstance(config, GenerationConfig):
        return config
    if type(config).__name__ != "GenerationConfig" or not callable(getattr(config, "to_dict", None)):
        raise ValueError(
            f"{name} must be a GenerationConfig of monoblock or transformers, got {type(config).__name__}; fields can "
            "be passed to generate() by name"
        )
    fields: dict[str, Any] = config.to_dict()
    return GenerationConfig(
        **{n: value for n, value in fields.items() if value is not None and n not in METADATA}
    )


# Fields that a model's config.json has under the same names, but with which it sets the defaults of its forward pass.
NOT_THE_MODELS = frozenset({"use_cache", "output_attentions", "output_hidden_states"})


def _plain(value: Any) -> Any:
    """The JSON form of a field: tuple keys (sequence_bias) become [[ids, bias], ...], as transformers writes them."""
    if isinstance(value, Mapping):
        pairs = cast(Mapping[Any, Any], value)
        if any(isinstance(key, tuple) for key in pairs):
            return [[list(key), _plain(bias)] for key, bias in pairs.items()]
        return {str(key): _plain(inner) for key, inner in pairs.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in cast(Sequence[Any], value)]
    return value.to_dict() if hasattr(value, "to_dict") else value
