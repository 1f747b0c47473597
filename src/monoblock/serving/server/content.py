"""The objects inside requests: messages, tools, response formats, and the items of /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from monoblock.serving.server.fields import RequestPart

ToolName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Schema = dict[str, Any]

# ---------------------------------------------------------------------------- messages


class TextPart(RequestPart):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(RequestPart):
    """`detail` chooses a resolution of OpenAI's models; only its default is accepted."""

    url: str
    detail: Literal["auto"] = "auto"


class ImagePart(RequestPart):
    """An image: a data: URL, or where the server allows it a file: or http(s): URL."""

    type: Literal["image_url"]
    image_url: ImageUrl


class RefusalPart(RequestPart):
    """A refusal of the assistant, which is read as its text."""

    type: Literal["refusal"]
    refusal: str


ContentPart = Annotated[TextPart | ImagePart | RefusalPart, Discriminator("type")]


class CalledFunction(RequestPart):
    """`arguments`: a JSON text."""

    name: ToolName
    arguments: str


class PastToolCall(RequestPart):
    """A call that the assistant made earlier."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(RequestPart):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(min_length=1, max_length=256)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[PastToolCall], Field(max_length=256)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatMessage:
        if self.role != "assistant" and (self.tool_calls or self.refusal or self.reasoning_content):
            raise ValueError(
                f"tool_calls, refusal and reasoning_content are the assistant's; the role is {self.role}"
            )
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("a message with the role tool, and no other, has a tool_call_id")
        if self.content is None and not self.tool_calls and self.refusal is None:
            raise ValueError(f"a message of the {self.role} needs content")
        return self


# ---------------------------------------------------------------------------- tools


class Function(RequestPart):
    """`parameters`: a JSON schema of the arguments; without it, the function takes none."""

    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(RequestPart):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(RequestPart):
    """The name of a function."""

    name: ToolName


class NamedTool(RequestPart):
    """The tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool

# ---------------------------------------------------------------------------- response formats


class TextFormat(RequestPart):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(RequestPart):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(RequestPart):
    """A JSON schema; the output always matches it, whatever `strict` is."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[Schema, Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(RequestPart):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class RegexFormat(RequestPart):
    """Text that matches a regular expression; an extension of OpenAI's formats."""

    type: Literal["regex"]
    pattern: Annotated[str, Field(min_length=1, max_length=2**14)]


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat, Discriminator("type")
]


class StreamOptions(RequestPart):
    """`include_usage`: a last chunk with the token counts. `continuous_usage_stats`: counts in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


# ---------------------------------------------------------------------------- /v1/responses


class InputText(RequestPart):
    """Text of a message."""

    type: Literal["input_text"]
    text: str


class InputImage(RequestPart):
    """An image."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto"] = "auto"


class OutputText(RequestPart):
    """Text of an earlier answer."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None


class OutputRefusal(RequestPart):
    """A refusal in an earlier answer."""

    type: Literal["refusal"]
    refusal: str


ItemPart = Annotated[InputText | InputImage | OutputText | OutputRefusal, Discriminator("type")]


class MessageItem(RequestPart):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ItemPart], Field(min_length=1, max_length=256)]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class CallItem(RequestPart):
    """A call of a function in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: ToolName
    arguments: str
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class CallOutputItem(RequestPart):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


def item_type(value: Any) -> str:
    """Items without a type are messages."""
    if isinstance(value, dict):
        found: Any = cast("dict[str, Any]", value).get("type", "message")
    else:
        found = getattr(value, "type", "")
    return found if isinstance(found, str) else ""


ResponseItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")],
    Discriminator(item_type),
]


class FlatTool(RequestPart):
    """A function, in the form of /v1/responses."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class FlatNamedTool(RequestPart):
    """The tool that is to be called."""

    type: Literal["function"]
    name: ToolName


FlatToolChoice = Literal["none", "auto", "required"] | FlatNamedTool


class FlatSchemaFormat(RequestPart):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[Schema, Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


FlatFormat = Annotated[TextFormat | JsonObjectFormat | FlatSchemaFormat | RegexFormat, Discriminator("type")]


class TextSettings(RequestPart):
    """`format` of the output. `verbosity`: its default only."""

    format: FlatFormat | None = None
    verbosity: Literal["medium"] | None = None
