"""The prompts of `LLM`: texts, token ids, dictionaries with images, and conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from monoblock.field_types import brief

KEYS = ("prompt", "prompt_token_ids", "multi_modal_data")
BATCH = 256  # texts that are tokenized together


@dataclass
class LLMPrompt:
    """A prompt: `ids` of a text, or with an `image` the text alone."""

    text: str | None = None
    ids: list[int] | None = None
    image: Any = None


def prompts_of(given: Any, tokenizer: Any) -> list[LLMPrompt]:
    """The prompts of `LLM.generate`, tokenized. TypeError or ValueError names the one that is wrong."""
    if isinstance(given, str | Mapping) or _is_ids(given):
        given = [given]
    if not isinstance(given, Sequence):
        raise TypeError(
            f"prompts must be a text, token ids, a dictionary or a list of those, got {brief(given)}"
        )
    items = cast("Sequence[Any]", given)
    found = [_prompt(item, index) for index, item in enumerate(items)]
    tokenize(found, tokenizer)
    return found


def tokenize(prompts: Sequence[LLMPrompt], tokenizer: Any, *, special: bool = True) -> None:
    """Give every text without an image its ids. ValueError without a tokenizer."""
    texts = [prompt for prompt in prompts if prompt.ids is None and prompt.image is None]
    if texts and tokenizer is None:
        raise ValueError("there is no tokenizer: pass token ids")
    for start in range(0, len(texts), BATCH):
        some = texts[start : start + BATCH]
        rows = tokenizer([prompt.text for prompt in some], add_special_tokens=special, verbose=False)
        for prompt, ids in zip(some, rows["input_ids"], strict=True):
            prompt.ids = list(ids)


def _is_ids(value: Any) -> bool:
    if not isinstance(value, list | tuple):
        return False
    items = cast("Sequence[Any]", value)
    return bool(items) and all(isinstance(item, int) and not isinstance(item, bool) for item in items)


def _prompt(item: Any, index: int) -> LLMPrompt:
    if isinstance(item, str):
        return LLMPrompt(item)
    if _is_ids(item):
        return LLMPrompt(ids=list(item))
    if not isinstance(item, Mapping):
        raise TypeError(f"prompts[{index}] must be a text, token ids or a dictionary, got {brief(item)}")
    fields = cast("Mapping[str, Any]", item)
    if unknown := [key for key in fields if key not in KEYS]:
        raise ValueError(f"prompts[{index}] has the key {unknown[0]!r}: expected {', '.join(KEYS)}")
    text, ids = fields.get("prompt"), fields.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise TypeError(f"prompts[{index}]['prompt'] must be a text, got {brief(text)}")
    if ids is not None and not _is_ids(ids):
        raise TypeError(f"prompts[{index}]['prompt_token_ids'] must be token ids, got {brief(ids)}")
    image = _image(fields.get("multi_modal_data"), index)
    if image is not None and text is None:
        raise ValueError(f"prompts[{index}] has an image, so it needs its 'prompt' as a text")
    if image is not None and ids is not None:
        raise ValueError(
            f"prompts[{index}] has an image: its tokens come from the processor, leave out the ids"
        )
    if text is None and ids is None:
        raise ValueError(f"prompts[{index}] has neither 'prompt' nor 'prompt_token_ids'")
    return LLMPrompt(text, None if ids is None else list(ids), image)


def _image(data: Any, index: int) -> Any:
    if data is None:
        return None
    if not isinstance(data, Mapping) or set(cast("Mapping[str, Any]", data)) != {"image"}:
        raise ValueError(f"prompts[{index}]['multi_modal_data'] must be {{'image': ...}}, got {brief(data)}")
    image = cast("Mapping[str, Any]", data)["image"]
    if isinstance(image, list | tuple):
        images = cast("Sequence[Any]", image)
        if len(images) != 1:
            raise ValueError(f"prompts[{index}] has {len(images)} images: pass one")
        return images[0]
    return image


# ---------------------------------------------------------------------------- conversations


def conversations_of(messages: Any) -> list[list[Mapping[str, Any]]]:
    """One conversation or many, as a list of conversations. TypeError for anything else."""
    if not isinstance(messages, list | tuple) or not messages:
        raise TypeError(f"messages must be a conversation or a list of conversations, got {brief(messages)}")
    items = cast("Sequence[Any]", messages)
    several = isinstance(items[0], list | tuple)
    found: list[list[Mapping[str, Any]]] = []
    for index, chat in enumerate(items if several else [items]):
        name = f"messages[{index}]" if several else "messages"
        if not isinstance(chat, list | tuple) or not chat:
            raise TypeError(f"{name} must be a list of messages, got {brief(chat)}")
        found.append([_message(item, name, at) for at, item in enumerate(cast("Sequence[Any]", chat))])
    return found


def _message(item: Any, name: str, at: int) -> Mapping[str, Any]:
    if not isinstance(item, Mapping) or "role" not in item:
        raise TypeError(f"{name}[{at}] must be {{'role': ..., 'content': ...}}, got {brief(item)}")
    return cast("Mapping[str, Any]", item)


def image_prompt(chat: Sequence[Mapping[str, Any]]) -> LLMPrompt | None:
    """The texts of a conversation after its image, for a model without a chat template; None without an image."""
    texts: list[str] = []
    images: list[Any] = []
    for message in chat:
        content = message.get("content")
        if not isinstance(content, list):
            texts.append(str(content or ""))
            continue
        for part in cast("list[Mapping[str, Any]]", content):
            if part.get("type") == "text":
                texts.append(str(part["text"]))
            elif part.get("type") == "image" and "image" in part:
                images.append(part["image"])
            else:
                raise ValueError(
                    "the parts of a message are {'type': 'text', 'text': ...} and {'type': 'image', 'image': ...}, "
                    f"got {brief(part)}"
                )
    if len(images) > 1:
        raise ValueError(f"a conversation has at most one image, got {len(images)}")
    return LLMPrompt("\n".join(texts), image=images[0]) if images else None
