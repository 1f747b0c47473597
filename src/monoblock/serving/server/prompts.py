"""Conversations and texts to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.images import read_image
from monoblock.serving.server.models import TextModel
from monoblock.serving.server.settings import ServerSettings
from monoblock.tokenization.template import ChatTemplateError


@dataclass(frozen=True)
class PreparedPrompt:
    """What an engine takes: token ids, or with an `image` a text."""

    ids: Sequence[int] | str
    image: Any = None


@dataclass(frozen=True, kw_only=True)
class TemplateOptions:
    """A request's options of the chat template."""

    tools: Sequence[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Sequence[dict[str, str]] | None = None
    add_special_tokens: bool = False


def text_of(content: Any) -> str:
    """The text of a message's content, without its images."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(getattr(part, part.type) for part in content if part.type in ("text", "refusal"))


def image_urls(messages: Sequence[Any]) -> list[tuple[str, str]]:
    """The images of messages: URL and name of the field."""
    found: list[tuple[str, str]] = []
    for i, message in enumerate(messages):
        content: Any = message.content
        parts: Sequence[Any] = () if content is None or isinstance(content, str) else content
        found += [
            (part.image_url.url, f"messages[{i}].content[{j}].image_url.url")
            for j, part in enumerate(parts)
            if part.type == "image_url"
        ]
    return found


def template_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages as chat templates read them. `developer` is the newer name of `system`."""
    names: dict[str, str] = {}  # of the functions, by the ids of their calls
    found: list[dict[str, Any]] = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        item: dict[str, Any] = {"role": role}
        text = text_of(message.content) or message.refusal
        if message.content is not None or message.refusal is not None:
            item["content"] = text
        if message.tool_calls:
            item["tool_calls"] = [call.model_dump(exclude={"index"}) for call in message.tool_calls]
            names |= {call.id: call.function.name for call in message.tool_calls}
            if not text:
                item["content"] = ""
        if message.tool_call_id is not None:
            item |= {"tool_call_id": message.tool_call_id, "name": names.get(message.tool_call_id, "")}
        if message.name is not None:
            item["name"] = message.name
        if message.reasoning_content is not None:
            item["reasoning_content"] = message.reasoning_content
        found.append(item)
    return found


def chat_prompt(
    model: TextModel,
    messages: Sequence[Any],
    options: TemplateOptions,
    settings: ServerSettings,
    param: str = "messages",
) -> PreparedPrompt:
    """The prompt of a conversation: by the chat template, or of an image-text model the texts after the image.

    Slow: runs in a thread. ApiError for a conversation that the template rejects, or images that the model does not
    take.
    """
    images = image_urls(messages)
    if images and model.processor is None:
        raise ApiError(
            "this model takes no images",
            param=images[0][1].removesuffix(".image_url.url"),
            code="model_not_supported",
        )
    if len(images) > 1:
        raise ApiError("a conversation has at most one image", param=images[1][1], code="invalid_value")
    if images:
        url, field = images[0]
        text = "\n".join(text_of(message.content) for message in messages)
        return PreparedPrompt(text, read_image(url, settings, field))
    if options.chat_template is not None and len(options.chat_template) > settings.limits.template:
        raise ApiError(
            f"chat_template has more than {settings.limits.template:,} characters", param="chat_template"
        )
    template = model.template if options.chat_template is None else options.chat_template
    if template is None:
        if model.processor is not None:  # image-text models continue plain text
            return PreparedPrompt(
                encoded(model, "\n".join(text_of(m.content) for m in messages), True, param)
            )
        raise ApiError(
            "this model has no chat template: use /v1/completions, or pass chat_template",
            param=param,
            code="no_chat_template",
        )
    if options.add_generation_prompt and options.continue_final_message:
        raise ApiError(
            "continue_final_message needs add_generation_prompt: false", param="continue_final_message"
        )
    variables = options.chat_template_kwargs or {}
    if reserved := variables.keys() & RESERVED:
        raise ApiError(f"chat_template_kwargs cannot set {min(reserved)}", param="chat_template_kwargs")
    try:
        text: str = model.tokenizer.apply_chat_template(
            template_messages(messages),
            tools=options.tools,
            documents=options.documents,
            chat_template=template if isinstance(template, str) else None,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            tokenize=False,
            **variables,
        )
    except (ChatTemplateError, ValueError, TypeError) as error:
        blamed = param if options.chat_template is None else "chat_template"
        raise ApiError(str(error)[:2000], param=blamed, code="chat_template_error") from None
    return PreparedPrompt(encoded(model, text, options.add_special_tokens, param))


# Arguments of apply_chat_template, and the names of its own variables.
RESERVED = frozenset(
    {
        "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
        "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
        "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "self",
    }
)  # fmt: skip


def encoded(model: TextModel, text: str, special: bool, param: str, *, truncated: bool = False) -> list[int]:
    """The ids of a text. ApiError if it has more characters than the context has room for; `truncated`: it is cut
    later."""
    if not truncated and len(text) > model.max_length * model.longest:
        raise ApiError(
            f"the prompt has {len(text):,} characters, more than the {model.max_length:,} tokens of the model's "
            "context have",
            param=param,
            code="context_length_exceeded",
        )
    return list(model.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def text_prompts(model: TextModel, prompt: Any, special: bool, *, truncated: bool) -> list[list[int]]:
    """The ids of /v1/completions' `prompt`: a text, ids, or a list of either."""
    if isinstance(prompt, str):
        return [encoded(model, prompt, special, "prompt", truncated=truncated)]
    if isinstance(prompt[0], int):
        model.check_ids(prompt, "prompt", model.vocabulary)
        return [list(prompt)]
    found: list[list[int]] = []
    for index, item in enumerate(prompt):
        name = f"prompt[{index}]"
        if isinstance(item, str):
            found.append(encoded(model, item, special, name, truncated=truncated))
        else:
            model.check_ids(item, name, model.vocabulary)
            found.append(list(item))
    return found
