"""Conversations to prompts: `apply_chat_template`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from tokenizers import Encoding

from monoblock.errors import FieldError
from monoblock.tokenization.call import EncodingMixin

if TYPE_CHECKING:
    from monoblock.tokenization.template import Rendered

# Keys of a model's reasoning in messages; most templates read the first, gpt-oss's the second.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Appended to a message that is to be continued, to find its end; the space shows whether the template strips it.
TAG = "MESSAGE-GOES-ON-HERE "

ChatTemplate = str | dict[str, str] | None


def named_templates(template: Any) -> ChatTemplate:
    """A template, or several by name; files store those as a list of `{"name": ..., "template": ...}`."""
    if not isinstance(template, list | tuple):
        return template
    rows = cast(Sequence[dict[str, str]], template)
    if any(not isinstance(row.get("name"), str) or not isinstance(row.get("template"), str) for row in rows):
        raise FieldError(
            "tokenizer.chat_template must list objects with a name and a template", "chat_template"
        )
    return {row["name"]: row["template"] for row in rows}


class ChatTemplateMixin(EncodingMixin):
    """The methods of a tokenizer that convert conversations to prompts."""

    chat_template: ChatTemplate

    def get_chat_template(self, chat_template: str | None = None, tools: Sequence[Any] | None = None) -> str:
        """The template for a conversation: the one that is passed (or named), else the tokenizer's own."""
        from monoblock.tokenization.template import ChatTemplateError

        own = self.chat_template
        if isinstance(own, dict):
            if chat_template is not None:
                return own.get(chat_template, chat_template)
            for name in ("tool_use", "default") if tools is not None else ("default",):
                if name in own:
                    return own[name]
            raise ChatTemplateError(
                f"this tokenizer has several chat templates and no default: pass chat_template= one of {sorted(own)}"
            )
        if chat_template is None and own is None:
            raise ChatTemplateError(
                "this tokenizer has no chat template (base models have none): pass chat_template=, set "
                "tokenizer.chat_template, or tokenize a plain text"
            )
        return cast(str, own if chat_template is None else chat_template)

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = False,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The prompt of a conversation, in the format that the model was trained on.

        Args:
            conversation: a list of messages, `{"role": ..., "content": ...}`, or a list of such lists.
            tools: JSON schemas, or Python functions (converted by `get_json_schema`).
            documents: texts for retrieval-augmented generation, `{"title": ..., "text": ...}`.
            chat_template: a template, or the name of one of the tokenizer's.
            add_generation_prompt: append the beginning of an assistant message.
            continue_final_message: end inside the last message, so that the model continues it (its `content`, or
                the field that a string names).
            tokenize: False returns the text.
            padding, truncation, max_length, return_tensors: as in the tokenizer's call; `tokenizer_kwargs` has more.
            return_dict: False returns the ids alone.
            return_assistant_tokens_mask: add `assistant_masks`, 1 for tokens inside `{% generation %}` blocks.
            kwargs: further template variables.

        Returns:
            `BatchEncoding`, ids, or text; lists of those for a list of conversations.

        Raises:
            ChatTemplateError: the template is missing, invalid or refused, or rejects this conversation.
        """
        if sanitize_control_tokens:
            raise ValueError(
                "sanitize_control_tokens=True is not supported: check the messages for special tokens instead"
            )
        if return_assistant_tokens_mask and not (return_dict and tokenize):
            raise ValueError("return_assistant_tokens_mask=True needs tokenize=True and return_dict=True")
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            other = "add_generation_prompt" if add_generation_prompt else "return_assistant_tokens_mask"
            raise ValueError(
                f"continue_final_message and {other} exclude each other: one continues a message, use only one"
            )
        source = self.get_chat_template(chat_template, tools)
        chats, batched = _conversations(conversation)
        if "messages" in kwargs:
            raise TypeError("messages= is the conversation itself: pass it as the first argument")
        variables = {
            **self.special_tokens_map,
            **plain(kwargs),
            "tools": _tools(tools),
            "documents": _documents(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        rendered = [
            _render(source, chat, variables, continue_final_message, return_assistant_tokens_mask)
            for chat in chats
        ]
        texts = [one.text for one in rendered]
        if not tokenize:
            return texts if batched else texts[0]
        encoded = self(
            texts if batched else texts[0],
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            add_special_tokens=False,
            tokenizer_kwargs=tokenizer_kwargs,
        )
        if return_assistant_tokens_mask:
            masks = [
                _mask(row, one.generated) for row, one in zip(encoded.encodings or (), rendered, strict=True)
            ]
            encoded["assistant_masks"] = masks if batched or return_tensors is not None else masks[0]
            encoded.convert_to_tensors(return_tensors)
        return encoded if return_dict else encoded["input_ids"]

    def encode_message_with_chat_template(
        self,
        message: Mapping[str, Any],
        conversation_history: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """The ids that one more message adds to a conversation, from the first difference on."""
        if "add_generation_prompt" in kwargs:
            raise ValueError(
                "add_generation_prompt does not apply to a message: add it to the whole conversation"
            )
        history = list(conversation_history or [])
        ids = self.apply_chat_template([*history, message], return_dict=False, **kwargs)
        before: list[int] = self.apply_chat_template(history, return_dict=False, **kwargs) if history else []
        same = 0
        while same < min(len(ids), len(before)) and ids[same] == before[same]:
            same += 1
        return ids[same:]


def _conversations(conversation: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    """The conversations as plain messages, and whether a list of them was passed."""
    given: Any = getattr(conversation, "messages", conversation)
    items = cast(Sequence[Any], given if isinstance(given, list | tuple) else ())
    batched = bool(items) and (isinstance(items[0], list | tuple) or hasattr(items[0], "messages"))
    return [
        _messages(getattr(chat, "messages", chat))
        for chat in (items if batched else cast(Sequence[Any], [given]))
    ], batched


def _messages(chat: Any) -> list[dict[str, Any]]:
    if not isinstance(chat, list | tuple) or not chat:
        got = "an empty one" if isinstance(chat, list | tuple) else type(chat).__name__
        raise ValueError(
            f'a conversation is a list of messages such as {{"role": "user", "content": "Hi"}}; got {got}'
        )
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(cast(Sequence[Any], chat)):
        message = plain(item)
        if not isinstance(message, dict):
            raise TypeError(
                f'message {index} is {type(item).__name__}; expected {{"role": ..., "content": ...}}'
            )
        # Templates check for missing keys; many would print a None.
        kept = {key: value for key, value in cast(dict[str, Any], message).items() if value is not None}
        reasoning = next((kept[name] for name in REASONING if name in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        messages.append(kept)
    return messages


# Subclasses, such as string enums, are converted to their base type.
_SCALARS: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)


def plain(value: Any) -> Any:
    """A copy of JSON's types alone, so that templates get no objects with other methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind, base in _SCALARS:
        if isinstance(value, kind):
            return base(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        items = [plain(item) for item in cast(Sequence[Any], value)]
        return tuple(items) if isinstance(value, tuple) else items
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic
        return plain(dump())
    if type(value).__module__ == "numpy" and getattr(cast(Any, value), "shape", None) == ():
        return plain(cast(Any, value).item())
    return f"<{type(value).__name__}>"


def _tools(tools: Sequence[Any] | None) -> Any:
    if tools is None:
        return None
    from monoblock.tokenization.schema import tool_schema

    return [plain(tool_schema(tool)) for tool in tools]


def _documents(documents: Any) -> Any:
    for document in documents or ():
        if not isinstance(document, dict):
            raise TypeError(f'a document is {{"title": ..., "text": ...}}; got {type(document).__name__}')
    return plain(documents)


def _render(
    source: str,
    chat: list[dict[str, Any]],
    variables: dict[str, Any],
    continue_final: bool | str,
    track: bool,
) -> Rendered:
    from monoblock.tokenization.template import render

    ending = _open_ending(source, chat, continue_final) if continue_final else None
    rendered = render(source, {**variables, "messages": chat}, track=track)
    return rendered if ending is None else rendered._replace(text=_cut(rendered.text, ending))


def _open_ending(source: str, chat: list[dict[str, Any]], continue_final: bool | str) -> str:
    """Append TAG to the last message, in place; returns its original text."""
    name = continue_final if isinstance(continue_final, str) else "content"
    last = chat[-1]
    ending = last.get(name)
    if ending is None:
        raise ValueError(f"continue_final_message: the last message has no {name!r} to continue")
    names = [field for field in REASONING if last.get(field) == ending] if name in REASONING else [name]
    if not any(field in source for field in names):
        raise ValueError(
            f"continue_final_message={name!r}: the chat template does not read that field of a message"
        )
    if isinstance(ending, list | tuple):
        blocks = [
            cast(dict[str, Any], block) for block in cast(Sequence[Any], ending) if isinstance(block, dict)
        ]
        block = next((block for block in reversed(blocks) if "text" in block), None)
        if block is None:
            raise ValueError("continue_final_message: the last message has no text to continue")
        text: str = block["text"]
        block["text"] = text + TAG
        return text
    for field in names:
        last[field] = ending + TAG
    return ending


def _cut(text: str, ending: str) -> str:
    """The text before the tag."""
    at = text.rfind(TAG.strip())
    if at < 0 or ending.strip() not in text:
        raise ValueError(
            "continue_final_message: the chat template does not write the last message unchanged"
        )
    kept = (
        text[:at] if text[at : at + len(TAG)] == TAG else text[:at].rstrip()
    )  # the template strips messages
    return kept.replace(TAG, "").replace(TAG.strip(), "")  # a template may write the message repeatedly


def _mask(row: Encoding, spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each token of a row that overlaps one of the character spans."""
    mask = [0] * len(row)
    for index, ((first, end), sequence) in enumerate(zip(row.offsets, row.sequence_ids, strict=True)):
        end = max(end, first + 1)  # a token whose characters were all stripped has an empty span
        if sequence is not None and any(first < stop and start < end for start, stop in spans):
            mask[index] = 1
    return mask
