"""Writes a tokenizer's files atomically, readable by other libraries."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, cast

from tokenizers import AddedToken

from monoblock.checkpoint.files import staged
from monoblock.tokenization.chat import ChatTemplateMixin
from monoblock.tokenization.families import TokenizerFamily
from monoblock.tokenization.files import (
    BACKEND_FILE,
    CONFIG_FILE,
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    is_vocabulary,
)
from monoblock.tokenization.special import EXTRA, NAMES

# Constructor arguments that are specific to this process or stored in other files, not in tokenizer_config.json.
_UNSAVED = (
    "name_or_path",
    "added_tokens_decoder",
    "chat_template",
    "files_loaded",
    "device_map",
    "model_specific_special_tokens",
    "add_bos_token",
    "add_eos_token",
    *EXTRA,
)
_ALWAYS = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces")


class SavingMixin(ChatTemplateMixin):
    """The methods of a tokenizer that write its files."""

    family: ClassVar[TokenizerFamily]
    vocab_file: str | None
    name_or_path: str
    init_kwargs: dict[str, Any]
    _bos_eos: tuple[bool, bool]
    _lock: threading.RLock

    def save_pretrained(
        self,
        save_directory: str | Path,
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
        *,
        save_jinja_files: bool = True,
    ) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json and the chat templates; returns their paths.

        `save_jinja_files=False` stores the chat templates in the config. The files are replaced in one transaction: all
        of them or none.
        """
        if legacy_format:
            raise ValueError("legacy_format=True is not supported: a tokenizer is saved as tokenizer.json")
        if push_to_hub:
            raise ValueError(
                "push_to_hub=True is not supported: save to a folder, then `hf upload REPO FOLDER`"
            )
        folder, prefix = Path(save_directory), f"{filename_prefix}-" if filename_prefix else ""
        if folder.is_file():
            raise ValueError(f"{folder} is a file; save_pretrained needs a folder")
        config = self._saved_config()
        template = self.chat_template
        templates: dict[str, str] = {}
        if save_jinja_files and template is not None:
            templates = dict(template) if isinstance(template, dict) else {"default": template}
        elif isinstance(template, dict):
            config["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
        elif template is not None:
            config["chat_template"] = template
        if wrong := [name for name in templates if Path(name).name != name]:
            raise ValueError(f"the chat template {wrong[0]!r} cannot be saved: its name is not a file name")
        texts = {prefix + CONFIG_FILE: _json(config)}
        if "default" in templates:
            texts[prefix + TEMPLATE_FILE] = templates.pop("default")
        with staged(folder) as stage:
            texts |= {prefix + BACKEND_FILE: self.backend_json(), **self._refreshed(folder)}
            texts |= {f"{prefix}{TEMPLATE_FOLDER}/{name}.jinja": text for name, text in templates.items()}
            for name, text in texts.items():
                stage.write(name, text)
        return tuple(str(folder / name) for name in texts)

    def save_vocabulary(
        self, save_directory: str | Path, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write the vocabulary files alone (vocab.json and merges.txt, vocab.txt, tokenizer.model); returns paths."""
        folder, prefix = Path(save_directory), f"{filename_prefix}-" if filename_prefix else ""
        if folder.is_file():
            raise ValueError(f"{folder} is a file; save_vocabulary needs a folder")
        source = Path(self.vocab_file) if self.vocab_file is not None else None
        with staged(folder) as stage:
            if source is not None and is_vocabulary(source):
                if not source.is_file():
                    raise ValueError(
                        f"{source} no longer exists, so it cannot be copied; save_pretrained does not need it"
                    )
                names = [prefix + ("tekken.json" if source.suffix == ".json" else "tokenizer.model")]
                stage.write(names[0], source.read_bytes())
            elif self.family.saved_as is not None:
                raise ValueError(
                    f"{self.name_or_path or 'this tokenizer'} was not read from a tokenizer.model, so there is none "
                    "to write: save_pretrained writes the same vocabulary as tokenizer.json"
                )
            else:
                with TemporaryDirectory() as scratch:
                    written = [Path(name) for name in self._tokenizer.model.save(scratch)]
                    names = [prefix + path.name for path in written]
                    for name, path in zip(names, written, strict=True):
                        stage.write(name, path.read_bytes())
        return tuple(str(folder / name) for name in names)

    def backend_json(self) -> str:
        """The content of a tokenizer.json, without the padding and truncation of single calls."""
        with self._lock:
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            return self._tokenizer.to_str(pretty=True)

    def _refreshed(self, folder: Path) -> dict[str, str]:
        """New content for files of older formats in the folder, which would otherwise override the new files."""
        added = {
            token: index
            for token, index in self.get_added_vocab().items()
            if index >= self._tokenizer.get_vocab_size(with_added_tokens=False)
        }
        current: dict[str, dict[str, Any]] = {
            "special_tokens_map.json": dict(self.special_tokens_map),
            "added_tokens.json": dict(added),
        }
        return {name: _json(content) for name, content in current.items() if (folder / name).is_file()}

    def _saved_config(self) -> dict[str, Any]:
        # Attributes that were changed after construction take precedence over the constructor's arguments.
        config = {
            key: getattr(self, key, value) for key, value in self.init_kwargs.items() if key not in _UNSAVED
        }
        config |= {key: getattr(self, key) for key in _ALWAYS}
        config |= {key: None for key in NAMES if key in config} | self.special_tokens_map
        if self.extra_special_tokens:  # under the older name, which every version of transformers reads
            config["additional_special_tokens"] = self.extra_special_tokens
        # transformers rebuilds the post-processor of some families, without bos and eos; a generic tokenizer keeps the
        # one in tokenizer.json.
        generic = self.family.owns_template and any(self._bos_eos)
        own = self.family.saved_as or self.family.names[0]
        config["tokenizer_class"] = "PreTrainedTokenizerFast" if generic else own
        return {key: _as_json(value) for key, value in config.items()}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _as_json(value: Any) -> Any:
    if isinstance(value, AddedToken):
        return {**cast(Any, value).__getstate__(), "__type": "AddedToken"}
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in cast(dict[str, Any], value).items()}
    return [_as_json(item) for item in cast(list[Any], value)] if isinstance(value, list | tuple) else value
