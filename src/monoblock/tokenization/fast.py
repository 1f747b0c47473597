"""`PreTrainedTokenizerFast`: the tokenizer class, over the `tokenizers` library, with transformers' interface."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from tokenizers import AddedToken, Tokenizer

from monoblock.tokenization.chat import named_templates
from monoblock.tokenization.families import GENERIC, TokenizerFamily
from monoblock.tokenization.files import LENGTHS, load, read_backend
from monoblock.tokenization.inputs import SIDES, one_of
from monoblock.tokenization.padding import PaddingMixin
from monoblock.tokenization.saving import SavingMixin
from monoblock.tokenization.template_tokens import IdsWithSpecialTokens, bos_eos_template, with_special_tokens
from monoblock.tokenization.tensors import as_list
from monoblock.tokenization.transformers_class import TransformersClassMixin

log = logging.getLogger("monoblock")

NO_LENGTH = int(1e30)  # transformers' model_max_length if the files have none

CLEAN_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"

# Replacements of `clean_up_tokenization_spaces`, those of transformers in the same order.
CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class PreTrainedTokenizerFast(SavingMixin, PaddingMixin, TransformersClassMixin):
    """A tokenizer: `from_pretrained(name)`, then call it with texts.

    Args:
        tokenizer_object: a `tokenizers.Tokenizer`; it is copied.
        tokenizer_file: the path of a `tokenizer.json`.
        vocab_file, merges_file, vocab, merges: for families that are built from vocabulary files or their content.
        kwargs: special tokens (`eos_token="</s>"`), `model_max_length`, `padding_side`, `truncation_side`,
            `model_input_names`, `chat_template`, `add_bos_token`, `clean_up_tokenization_spaces`, ...; unknown ones are
            kept in `init_kwargs` and written back.
    """

    family: ClassVar[TokenizerFamily] = GENERIC
    is_fast = True
    pad_token_type_id = 0
    _backend_options = ("tokenizer_object", "tokenizer_file", "vocab_file", "merges_file", "vocab", "merges")

    def __init__(self, /, **kwargs: Any):
        given = {name: kwargs.pop(name, None) for name in self._backend_options}
        source = {name: value for name, value in given.items() if value is not None}
        self._tokenizer, implied = read_backend(source, self.family, {**self.family.defaults, **kwargs})
        kwargs = {**self.family.defaults, **implied, **kwargs}
        self.vocab_file: str | None = str(source["vocab_file"]) if "vocab_file" in source else None
        self._take_backend_settings(kwargs)
        self.init_kwargs = copy.deepcopy(kwargs)
        self.name_or_path: str = kwargs.pop("name_or_path", "")
        self._lock = threading.RLock()
        self._warned_of_length = self._warned_of_cleaning = False
        self._init_special_tokens(kwargs)
        lengths = [kwargs.pop(name, None) for name in LENGTHS]
        self.model_max_length: int = next((length for length in lengths if length is not None), NO_LENGTH)
        self.padding_side = one_of("padding_side", kwargs.pop("padding_side", "right"), SIDES)
        self.truncation_side = one_of("truncation_side", kwargs.pop("truncation_side", "right"), SIDES)
        self.model_input_names = list(kwargs.pop("model_input_names", None) or self.family.model_input_names)
        self.clean_up_tokenization_spaces = bool(kwargs.pop("clean_up_tokenization_spaces", False))
        self.split_special_tokens = bool(kwargs.pop("split_special_tokens", False))
        self.chat_template = named_templates(kwargs.pop("chat_template", None))
        self._add_added_tokens(kwargs.pop("added_tokens_decoder", None) or {})
        self._register_special_tokens()
        self._bos_eos = self._configure_bos_eos(kwargs.get("add_bos_token"), kwargs.get("add_eos_token"))

    def _configure_bos_eos(self, bos: bool | None, eos: bool | None) -> tuple[bool, bool]:
        """Make the backend's post-processor add bos and eos as requested (None: unchanged).

        Returns the tokens that this class adds; (False, False) for a post-processor that is left unchanged.
        """
        own = self.family.owns_template or self._tokenizer.post_processor is None
        if not own and (bos, eos) == (None, None):
            return False, False
        found = (False, False) if own else self._current_bos_eos()
        self._bos_eos = (found[0] if bos is None else bool(bos), found[1] if eos is None else bool(eos))
        if own or self._bos_eos != found:
            self._update_template()
        return self._bos_eos

    def _current_bos_eos(self) -> tuple[bool, bool]:
        """Whether the backend's post-processor adds bos before a text, and eos after it."""
        ids = self._with_special_tokens([], None).ids
        text = self._with_special_tokens([0], None)
        at = text.mask.index(0) if 0 in text.mask else len(ids)
        return self.bos_token_id in ids[:at], self.eos_token_id in ids[at:]

    def _take_backend_settings(self, kwargs: dict[str, Any]) -> None:
        """Use padding and truncation of a tokenizer.json as defaults; each call sets its own."""
        if padding := self._tokenizer.padding:
            kwargs.setdefault("pad_token", padding["pad_token"])
            kwargs.setdefault("padding_side", padding["direction"])
            self.pad_token_type_id = padding["pad_type_id"]
        if truncation := self._tokenizer.truncation:
            kwargs.setdefault("truncation_side", truncation["direction"])
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def _add_added_tokens(self, decoder: dict[int, AddedToken]) -> None:
        # By their repr: a token that exists with other flags takes those of the config.
        known = {repr(token) for token in self._tokenizer.get_added_tokens_decoder().values()}
        self._add([token for _, token in sorted(decoder.items()) if repr(token) not in known])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """The tokenizer of a local folder, of a model on the hub, or of one `tokenizer.json`.

        Args:
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, `subfolder` select the
                files; all others override the content of the files. `use_fast` and `trust_remote_code` are accepted
                without effect: there is one class, and remote code is never run.
        """
        return cls(**load(pretrained_model_name_or_path, cls.family, kwargs))

    def push_to_hub(self, repo_id: str, **_: Any) -> None:
        """Not supported: upload with huggingface_hub."""
        raise NotImplementedError(
            f"push_to_hub is not supported: save_pretrained(folder), then `hf upload {repo_id} folder`"
        )

    # --- the vocabulary

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The underlying `tokenizers.Tokenizer`."""
        return self._tokenizer

    @property
    def decoder(self) -> Any:
        """The backend's decoder."""
        return self._tokenizer.decoder

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary without the added ones; `len(tokenizer)` includes them."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, including the added tokens."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def vocab(self) -> dict[str, int]:
        """Same as `get_vocab()`."""
        return self.get_vocab()

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or the tokens of a list of ids; None for an id outside the vocabulary."""
        ids = _ids(ids)
        if isinstance(ids, int):
            return self._tokenizer.id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set[int]()
        return [self._tokenizer.id_to_token(index) for index in ids if index not in skipped]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens, as joined by the decoder."""
        decoder = self._tokenizer.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(list(tokens))

    # --- ids to text

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """The text of an id, a list or array of ids, or the dictionary of a call; a list of texts for a batch.

        Args:
            token_ids: ids; those outside the vocabulary are left out, negative ones refused.
            skip_special_tokens: leave out the special tokens.
            clean_up_tokenization_spaces: remove the spaces before punctuation that WordPiece decoding inserts; ignored
                for BPE, whose tokens include spaces.
        """
        ids = _ids(token_ids)
        if isinstance(ids, list) and any(isinstance(row, list) for row in ids):
            return [self._decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        return self._decode(
            [ids] if isinstance(ids, int) else ids, skip_special_tokens, clean_up_tokenization_spaces
        )

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """The texts of a batch of ids."""
        ids = _ids(sequences)
        if ids == []:
            return []
        text = self.decode(ids, skip_special_tokens, clean_up_tokenization_spaces)
        return [text] if isinstance(text, str) else text

    def _decode(self, ids: list[int], skip: bool, clean: bool | None) -> str:
        if (least := min(ids, default=0)) < 0:
            raise ValueError(
                f"{least} is not a token id: replace it before decoding (labels mark ignored positions with -100)"
            )
        text = self._tokenizer.decode(ids, skip_special_tokens=skip)
        if self.clean_up_tokenization_spaces if clean is None else clean:
            if self.init_kwargs.get(CLEAN_BPE) or type(self._tokenizer.model).__name__ != "BPE":
                return self.clean_up_tokenization(text)
            if clean and not self._warned_of_cleaning:
                self._warned_of_cleaning = True
                log.warning(
                    "clean_up_tokenization_spaces is for WordPiece, and ignored: this is a BPE vocabulary"
                )
        return text

    @staticmethod
    def clean_up_tokenization(text: str) -> str:
        """Remove the spaces that joining WordPiece tokens leaves before punctuation and contractions."""
        for spaced, joined in CLEAN_UP:
            text = text.replace(spaced, joined)
        return text

    # --- special tokens around texts

    @property
    def add_bos_token(self) -> bool:
        """Whether this class adds `bos_token` before each text (a tokenizer.json may do so as well)."""
        return self._bos_eos[0]

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._bos_eos = (bool(value), self._bos_eos[1])
        self._update_template()

    @property
    def add_eos_token(self) -> bool:
        """Whether this class adds `eos_token` after each text."""
        return self._bos_eos[1]

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._bos_eos = (self._bos_eos[0], bool(value))
        self._update_template()

    def update_post_processor(self) -> None:
        """Rebuild the post-processor after `bos_token` or `eos_token` has changed."""
        self._update_template()

    def _update_template(self) -> None:
        bos, eos = (
            (token, index) if wanted else None
            for wanted, token, index in (
                (self.add_bos_token, self.bos_token, self.bos_token_id),
                (self.add_eos_token, self.eos_token, self.eos_token_id),
            )
        )
        self._tokenizer.post_processor = bos_eos_template(bos, eos)

    def _with_special_tokens(
        self, first: Sequence[int], second: Sequence[int] | None
    ) -> IdsWithSpecialTokens:
        with self._lock:
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            return with_special_tokens(self._tokenizer, first, second)

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """Ids with the special tokens that a call adds."""
        return self._with_special_tokens(token_ids_0, token_ids_1).ids

    def create_token_type_ids_from_sequences(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """The token type ids of `build_inputs_with_special_tokens`."""
        return self._with_special_tokens(token_ids_0, token_ids_1).types

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each special token, 0 for text; for ids with special tokens, or for the result of adding them."""
        if not already_has_special_tokens:
            return self._with_special_tokens(token_ids_0, token_ids_1).mask
        if token_ids_1 is not None:
            raise ValueError(
                "token_ids_1 must be None with already_has_special_tokens=True: one row holds both texts"
            )
        special = set(self.all_special_ids)
        return [int(int(index) in special) for index in token_ids_0]

    # --- representation and pickling

    def __repr__(self) -> str:
        added = "".join(
            f"\n\t{index}: {token!r}," for index, token in sorted(self.added_tokens_decoder.items())
        )
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, padding_side={self.padding_side!r}, "
            f"truncation_side={self.truncation_side!r}, special_tokens={self.special_tokens_map}, "
            f"added_tokens_decoder={{{added}\n}})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())


def _ids(ids: Any) -> int | list[Any]:
    """Ids of any type as an integer, a list of them, or a list of lists."""
    if isinstance(ids, str):
        raise TypeError(f"expected token ids; got the string {ids[:40]!r}")
    if hasattr(ids, "keys"):
        ids = ids["input_ids"]
    ids = as_list(ids)
    if isinstance(ids, bool | float) or ids is None:
        raise TypeError(f"expected token ids (integers); got {ids!r}")
    if isinstance(ids, list):
        items = cast(list[Any], ids)
        return items if all(isinstance(item, int) for item in items) else [_ids(item) for item in items]
    if not hasattr(ids, "__index__"):
        try:
            return [_ids(item) for item in ids]  # any other sequence, such as a range
        except TypeError:
            raise TypeError(f"expected token ids (integers); got {type(ids).__name__}") from None
    return ids.__index__()
