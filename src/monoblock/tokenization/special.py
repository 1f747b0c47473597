"""Special and added tokens of a tokenizer, by name and by id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from tokenizers import AddedToken

from monoblock.texts import check_characters

# The named special tokens of every tokenizer; each is an attribute, and `<name>_id` its id.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("extra_special_tokens", "additional_special_tokens")  # the newer and the older name of one list

Token = str | AddedToken


def as_special(token: Token) -> AddedToken:
    """A special token that is matched in the text exactly."""
    if not isinstance(token, AddedToken):
        check_characters(token, "a special token")
    return token if isinstance(token, AddedToken) else AddedToken(token, normalized=False, special=True)


def _stem(name: str) -> str:
    return name.removesuffix("_ids").removesuffix("_id")


class SpecialTokensMixin:
    """The special tokens of a tokenizer.

    `bos_token`, `eos_token`, ... are strings or None, `bos_token_id`, ... their ids; both can be set. Files may define
    more names (`image_token`), which are attributes as well. `extra_special_tokens` is the list of unnamed ones.
    Setting a name to a token outside the vocabulary does not add it: `add_special_tokens` does.
    """

    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    sep_token: str | None
    pad_token: str | None
    cls_token: str | None
    mask_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    sep_token_id: int | None
    pad_token_id: int | None
    cls_token_id: int | None
    mask_token_id: int | None
    extra_special_tokens: list[str]
    extra_special_tokens_ids: list[int | None]
    additional_special_tokens: list[str]
    additional_special_tokens_ids: list[int | None]

    _tokenizer: Any  # a tokenizers.Tokenizer, whose stubs are largely untyped
    _named: dict[str, Token | None]
    _extra: list[Token]

    def _init_special_tokens(self, kwargs: dict[str, Any]) -> None:
        """Pop the special tokens from the constructor's arguments."""
        self._named = dict.fromkeys(NAMES)
        more: dict[str, Any] = dict(kwargs.pop("model_specific_special_tokens", None) or {})
        extra: list[Token] = []
        for name in EXTRA:  # both names take effect if both are given
            value = kwargs.pop(name, None)
            if isinstance(value, Mapping):
                more.update(cast(Mapping[str, Any], value))
            else:
                present = {str(token) for token in extra}
                extra += [token for token in _checked_list(name, value or []) if str(token) not in present]
        for key in [key for key in kwargs if key.endswith("_token")]:
            if key in NAMES or isinstance(kwargs[key], str | AddedToken):
                more[key] = kwargs.pop(key)
        for name, token in more.items():
            self._named[name] = _checked(name, token)
        self._extra = extra

    def _register_special_tokens(self) -> None:
        """Register every special token in the backend, so that it is never split and can be skipped."""
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        for token in [*self._named.values(), *self._extra]:
            if token is not None and str(token) not in known:
                known.add(str(token))
                if isinstance(token, AddedToken):
                    token.special = True
                    self._add([token])
                else:
                    self._add([AddedToken(token, special=True)])

    def _add(self, tokens: Sequence[Token], special: bool = False) -> int:
        """Add tokens to the backend; returns the number of new ones."""
        for token in tokens:
            check_characters(str(token), "a token")
        return (self._tokenizer.add_special_tokens if special else self._tokenizer.add_tokens)(list(tokens))

    def __getattr__(self, name: str) -> Any:
        # Called only for names that are not ordinary attributes; `__dict__` because a copy starts empty.
        stem, named = _stem(name), self.__dict__.get("_named")
        if named is not None:
            if stem in named:
                token = named[stem]
                if token is None or stem == name:
                    return None if token is None else str(token)
                return self.convert_tokens_to_ids(str(token))
            if stem in EXTRA:
                tokens = [str(token) for token in self._extra]
                return tokens if stem == name else self.convert_tokens_to_ids(tokens)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        stem, named = _stem(name), self.__dict__.get("_named")
        if named is None or (stem not in named and stem not in EXTRA):
            super().__setattr__(name, value)
            return
        if stem != name and value is not None:
            value = self._tokens_of_ids(name, value)
        if stem in EXTRA:
            self._extra = _checked_list(stem, value or [])
        else:
            named[stem] = _checked(stem, value)

    def _tokens_of_ids(self, name: str, ids: Any) -> Any:
        if isinstance(ids, list | tuple):
            return [self._tokens_of_ids(name, index) for index in cast(Sequence[Any], ids)]
        token = self._tokenizer.id_to_token(int(ids))
        if token is None:
            raise ValueError(f"{name}={ids}: the vocabulary has no such id; it has {len(self)} tokens")
        return token

    def __len__(self) -> int:
        """The size of the vocabulary, including added tokens."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True  # `if tokenizer:` tests for None, not for an empty vocabulary

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or the ids of a list of tokens; `unk_token_id` (or None) for an unknown one."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        check_characters(tokens, "a token")
        index = self._tokenizer.token_to_id(tokens)
        if index is None and (unk := self._named.get("unk_token")) is not None:
            return self._tokenizer.token_to_id(str(unk))
        return index

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens that are set: name -> token."""
        return {name: str(token) for name, token in self._named.items() if token is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token once, the named ones first."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *map(str, self._extra)]))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Id -> added token, special or not."""
        return dict(self._tokenizer.get_added_tokens_decoder())

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Added token -> id, in the order of the ids."""
        return {token.content: index for index, token in sorted(self.added_tokens_decoder.items())}

    def get_added_vocab(self) -> dict[str, int]:
        """Same as `added_tokens_encoder`."""
        return self.added_tokens_encoder

    def add_tokens(self, new_tokens: Token | Sequence[Token], special_tokens: bool = False) -> int:
        """Add tokens that the vocabulary lacks, after its end; returns the number of new ones.

        The model needs `resize_token_embeddings(len(tokenizer))` afterwards.
        """
        tokens = _checked_list(
            "new_tokens", [new_tokens] if isinstance(new_tokens, str | AddedToken) else new_tokens
        )
        return self._add(tokens, special_tokens) if tokens else 0

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Set special tokens by name and add those that the vocabulary lacks; returns the number of new ones.

        `special_tokens_dict` maps names such as `pad_token` to a token, `extra_special_tokens` (or
        `additional_special_tokens`) to a list, which replaces the current list or, with
        `replace_extra_special_tokens=False`, extends it.
        """
        wrong = [key for key in special_tokens_dict if key not in self._named and key not in EXTRA]
        if wrong:
            raise ValueError(
                f"{wrong[0]!r} is not a special token; the names are: {', '.join([*self._named, EXTRA[0]])}"
            )
        new: list[AddedToken] = []
        for key, value in special_tokens_dict.items():
            if key in EXTRA:
                tokens = [as_special(token) for token in _checked_list(key, value)]
                if not replace_extra_special_tokens:
                    tokens = [token for token in tokens if str(token) not in self.extra_special_tokens]
                replace = replace_extra_special_tokens and bool(tokens)
                self._extra = [*([] if replace else self._extra), *tokens]
                new += tokens
            elif (token := _checked(key, value)) is None:
                raise ValueError(f"{key}=None cannot be added; to unset it: tokenizer.{key} = None")
            else:
                self._named[key] = as_special(token)
                new.append(as_special(token))
        return self.add_tokens(new, special_tokens=True)


def _checked(name: str, token: Any) -> Token | None:
    if token is None or isinstance(token, str | AddedToken):
        return token
    raise ValueError(f"{name} must be a string or an AddedToken; got {type(token).__name__}")


def _checked_list(name: str, tokens: Any) -> list[Token]:
    if not isinstance(tokens, list | tuple):
        raise ValueError(f"{name} must be a list of strings or AddedTokens; got {type(tokens).__name__}")
    for token in cast(Sequence[Any], tokens):
        if not isinstance(token, str | AddedToken):
            raise ValueError(f"{name} must hold strings or AddedTokens; got {type(token).__name__}")
    return list(cast(Sequence[Token], tokens))
