"""The tables of all endpoints' fields: the source of validation, of OpenAPI's schema and of docs/api-fields.md."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from monoblock.serving.server.content import (
    ChatMessage,
    FlatTool,
    FlatToolChoice,
    ResponseFormat,
    ResponseItem,
    StreamOptions,
    TextSettings,
    Tool,
    ToolChoice,
)
from monoblock.serving.server.fields import Endpoint, accepted, honoured, refused

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Alternatives = Annotated[int, Field(ge=0, le=20)]
Choices = Annotated[int, Field(ge=1, le=128)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Label = Annotated[str, Field(max_length=1024)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Stops = Annotated[str, Field(max_length=1024)] | Annotated[list[Stop], Field(max_length=64)]
# Lists of texts and of ids; how many one request may have is one of the server's limits.
Texts = str | Annotated[list[str], Field(min_length=1)]
Prompts = (
    str
    | Annotated[list[str], Field(min_length=1)]
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
)

MODEL = honoured(
    "model", Label, "a name of `/v1/models`; may be left out where the server has a single model"
)
STORED = "nothing is stored"
LABEL = "a label for OpenAI's records; nothing is recorded"

# ---------------------------------------------------------------------------- fields of several endpoints

SAMPLING = (
    honoured(
        "temperature",
        Annotated[float, Field(ge=0, le=2)],
        "0: always the likeliest token; default: the model's generation_config.json, else 1",
    ),
    honoured(
        "top_p", Share, "sample from the likeliest tokens that sum up to this; default: the model's, else 1"
    ),
    honoured("seed", Annotated[int, Field(ge=0, le=2**63 - 1)], "the same seed gives the same tokens"),
)
PENALTIES = (
    honoured("presence_penalty", Penalty, "subtracted from the scores of tokens that were generated", 0.0),
    honoured("frequency_penalty", Penalty, "subtracted once for each time a token was generated", 0.0),
    honoured("stop", Stops, "strings before which the text ends; at most 64", ()),
    honoured(
        "logit_bias",
        Annotated[dict[Annotated[str, Field(pattern=r"^\d{1,10}$")], Bias], Field(max_length=1024)],
        "token id -> number that is added to its score",
        {},
    ),
)
# vLLM's names.
MORE_SAMPLING = (
    honoured(
        "top_k",
        Annotated[int, Field(ge=-1, le=2**31 - 1)],
        "sample from the K likeliest tokens; 0 and -1: from all; default: the model's, else 0",
    ),
    honoured(
        "min_p", Share, "drop tokens less likely than this times the likeliest; default: the model's, else 0"
    ),
    honoured(
        "repetition_penalty",
        Annotated[float, Field(ge=1e-3, le=1e3)],
        "above 1: tokens of the text, the prompt's too, become less likely; default: the model's, else 1",
    ),
    honoured("min_tokens", Count, "no end before this many tokens", 0),
    honoured("ignore_eos", bool, "go on after an eos token", False),
    honoured(
        "stop_token_ids", Annotated[list[TokenId], Field(max_length=64)], "tokens that end the text", ()
    ),
    honoured("include_stop_str_in_output", bool, "end the text after the stop string, not before it", False),
    honoured("skip_special_tokens", bool, "leave special tokens out of the text", True),
    honoured(
        "speculative_tokens",
        Annotated[int, Field(ge=0, le=64)],
        "tokens proposed per step at most; alone: always so many, by `lookup`; the result is the same",
    ),
    honoured(
        "speculation",
        Literal["suffix", "lookup", "off"],
        "propose what followed the last tokens earlier, also in other requests (`suffix`), or in this text "
        "(`lookup`); default: the server's; the result is the same",
    ),
    honoured(
        "prompt_logprobs",
        Alternatives,
        "log-probabilities of the prompt's tokens, with this many alternatives, in vLLM's form; not with `stream`",
    ),
    honoured("truncate_prompt_tokens", Positive, "keep only the last tokens of a longer prompt"),
    honoured("return_token_ids", bool, "add `prompt_token_ids`, and `token_ids` to each choice", False),
    honoured("return_tokens_as_token_ids", bool, 'tokens in `logprobs` are spelled "token_id:ID"', False),
    refused("use_beam_search", "beam search does not run in the server", True, False),
    refused("length_penalty", "it belongs to beam search, which does not run in the server", 1.5, 1.0, 1),
    refused("early_stopping", "it belongs to beam search, which does not run in the server", True, False),
    refused("bad_words", "use `logit_bias` for tokens, or a `response_format`", ["x"], []),
    refused("allowed_token_ids", "use a `response_format`, or `logit_bias`", [1]),
    refused(
        "spaces_between_special_tokens",
        "special tokens are written as the tokenizer decodes them",
        False,
        True,
    ),
    refused("guided_json", "use `response_format`", {"type": "object"}),
    refused("guided_regex", "use `response_format`", "a+"),
    refused("guided_choice", "use `response_format` with a regular expression", ["a", "b"]),
    refused("guided_grammar", "grammars other than JSON schemas and regular expressions do not run", "?"),
    refused("structured_outputs", "use `response_format`", {"regex": "a+"}),
    refused("priority", "requests run in the order of their arrival", 1, 0),
)
LABELS = (accepted("user", Label, LABEL, "someone"),)
MORE_LABELS = (
    accepted("metadata", Metadata, f"a label of stored completions; {STORED}", {"a": "b"}),
    accepted("safety_identifier", Label, LABEL, "someone"),
    accepted(
        "prompt_cache_key", Label, "prompts with the same beginning share the cache without a key", "key"
    ),
    refused("store", STORED, True, False),
    refused(
        "prompt_cache_retention", "the cache keeps what it has room for", "24h", "in_memory", "in-memory"
    ),
    refused("prompt_cache_options", "the cache keeps what it has room for", {"a": 1}, {}),
    refused("moderation", "no model checks what is generated", {"a": 1}),
    refused("service_tier", "there is one tier", "flex", "auto", "default"),
)
STREAMING = (
    honoured("stream", bool, "send the text as server-sent events, as it is generated", False),
    honoured(
        "stream_options", StreamOptions, "`include_usage`, `continuous_usage_stats`; only with `stream`"
    ),
)
TEMPLATE = (
    honoured("add_generation_prompt", bool, "append the beginning of an assistant message", True),
    honoured(
        "continue_final_message",
        bool,
        "the model continues the last message; needs `add_generation_prompt: false`",
        False,
    ),
    honoured("chat_template", str, "a Jinja template instead of the model's; its time and size are limited"),
    honoured("chat_template_kwargs", dict[str, Any], "further variables of the template", {}),
    honoured(
        "documents",
        Annotated[list[dict[str, str]], Field(max_length=256)],
        "texts for templates that read them",
    ),
)

# ---------------------------------------------------------------------------- /v1/chat/completions

CHAT = Endpoint(
    "/v1/chat/completions",
    "ChatRequest",
    "The next message of a conversation.",
    (
        MODEL,
        honoured(
            "messages", Annotated[list[ChatMessage], Field(min_length=1)], "the conversation", required=True
        ),
        honoured(
            "max_completion_tokens",
            Positive,
            "new tokens at most; default: the model's `max_new_tokens`, else as many as fit in the context",
        ),
        honoured("max_tokens", Positive, "the older name of `max_completion_tokens`"),
        honoured("n", Choices, "number of choices", 1),
        *SAMPLING,
        *PENALTIES,
        honoured("logprobs", bool, "return the log-probability of each token", False),
        honoured("top_logprobs", Alternatives, "alternatives per token; needs `logprobs: true`"),
        honoured(
            "response_format",
            ResponseFormat,
            "`text`, `json_object`, `json_schema`, or `regex` with a `pattern`",
        ),
        honoured(
            "tools",
            Annotated[list[Tool], Field(min_length=1)],
            "functions that the model may call; needs a chat template that knows tools",
        ),
        honoured(
            "tool_choice",
            ToolChoice,
            "`none`, `auto`, `required`, or a tool's name; the last two constrain the output by the tools' schemas",
        ),
        honoured("parallel_tool_calls", bool, "false: at most one call", True),
        *STREAMING,
        *LABELS,
        *MORE_LABELS,
        *TEMPLATE,
        *MORE_SAMPLING,
        honoured(
            "add_special_tokens",
            bool,
            "add the tokenizer's special tokens to the prompt of the template",
            False,
        ),
        refused("echo", "a conversation is not repeated; use /v1/completions", True, False),
        refused("functions", "use `tools`", [{"name": "f"}]),
        refused("function_call", "use `tool_choice`", "auto"),
        refused("audio", "the models write text", {"voice": "alloy", "format": "wav"}),
        refused("modalities", "the models write text", ["text", "audio"], ["text"]),
        refused("prediction", "use `speculation`", {"type": "content", "content": "x"}),
        refused("reasoning_effort", "the models do not reason apart from their text", "high", "none"),
        refused("verbosity", "ask for it in a message", "high", "medium"),
        refused("web_search_options", "the server fetches nothing for a model", {}),
    ),
)

# ---------------------------------------------------------------------------- /v1/completions

COMPLETIONS = Endpoint(
    "/v1/completions",
    "CompletionRequest",
    "The continuation of texts.",
    (
        MODEL,
        honoured("prompt", Prompts, "a text, token ids, or a list of either", required=True),
        honoured("max_tokens", Count, "new tokens at most; 0 only with `echo`", 16),
        honoured("n", Choices, "number of choices per prompt", 1),
        honoured("best_of", Choices, "generate so many and return the `n` likeliest; not with `stream`"),
        *SAMPLING,
        *PENALTIES,
        honoured("logprobs", Alternatives, "log-probabilities, with this many alternatives per token"),
        honoured("echo", bool, "return the prompt before its continuation", False),
        honoured("response_format", ResponseFormat, "as in /v1/chat/completions"),
        *STREAMING,
        *LABELS,
        *MORE_SAMPLING,
        honoured(
            "add_special_tokens", bool, "add the tokenizer's special tokens to a text, such as bos", True
        ),
        refused("suffix", "the models do not insert text between two others", "end", ""),
    ),
)

# ---------------------------------------------------------------------------- /v1/responses

RESPONSES = Endpoint(
    "/v1/responses",
    "ResponseRequest",
    "The answer to a text or a conversation; nothing is stored.",
    (
        MODEL,
        honoured(
            "input",
            str | Annotated[list[ResponseItem], Field(min_length=1)],
            "a text, or messages, calls of functions and their results",
            required=True,
        ),
        honoured("instructions", str, "a system message before the input"),
        honoured(
            "max_output_tokens",
            Positive,
            "new tokens at most; default: the model's `max_new_tokens`, else as many as fit in the context",
        ),
        honoured("temperature", Annotated[float, Field(ge=0, le=2)], "as in /v1/chat/completions"),
        honoured("top_p", Share, "as in /v1/chat/completions"),
        honoured(
            "top_logprobs",
            Alternatives,
            'alternatives per token; needs `include: ["message.output_text.logprobs"]`',
        ),
        honoured(
            "include",
            Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=1)],
            "`message.output_text.logprobs`: log-probabilities of the tokens",
            (),
        ),
        honoured(
            "text",
            TextSettings,
            "`format`: `text`, `json_object`, `json_schema`, or `regex` with a `pattern`",
        ),
        honoured(
            "tools", Annotated[list[FlatTool], Field(min_length=1)], "functions that the model may call"
        ),
        honoured("tool_choice", FlatToolChoice, "`none`, `auto`, `required`, or a tool's name"),
        honoured("parallel_tool_calls", bool, "false: at most one call", True),
        honoured("stream", bool, "send events as the text is generated", False),
        honoured("metadata", Metadata, "returned with the answer", {}),
        accepted("user", Label, LABEL, "someone"),
        accepted("safety_identifier", Label, LABEL, "someone"),
        accepted(
            "prompt_cache_key", Label, "prompts with the same beginning share the cache without a key", "key"
        ),
        refused("store", STORED, True, False),
        refused(
            "stream_options",
            "events have no padding, and the last one has the token counts",
            {"a": 1},
            {},
            {"include_obfuscation": False},
        ),
        refused("previous_response_id", f"{STORED}: send the whole conversation as `input`", "resp_1"),
        refused("conversation", f"{STORED}: send the whole conversation as `input`", "conv_1"),
        refused("background", "the answer comes on the connection of the request", True, False),
        refused("background_options", "the answer comes on the connection of the request", {"a": 1}, {}),
        refused("truncation", "an input that does not fit is an error", "auto", "disabled"),
        refused("context_management", "an input that does not fit is an error", [{"type": "compaction"}], []),
        refused("prompt", f"{STORED}, neither are prompts: send `instructions` and `input`", {"id": "p"}),
        refused("reasoning", "the models do not reason apart from their text", {"effort": "high"}, {}),
        refused("max_tool_calls", "it limits OpenAI's built-in tools, which do not run here", 3),
        refused("image", "the models write text", {"a": 1}),
        refused("access_programs", "there are no access programs", ["a"], []),
        refused("moderation", "no model checks what is generated", {"a": 1}),
        refused(
            "prompt_cache_retention", "the cache keeps what it has room for", "24h", "in_memory", "in-memory"
        ),
        refused("prompt_cache_options", "the cache keeps what it has room for", {"a": 1}, {}),
        refused("service_tier", "there is one tier", "flex", "auto", "default"),
    ),
)

# ---------------------------------------------------------------------------- vectors, scores, tokens

EMBEDDINGS = Endpoint(
    "/v1/embeddings",
    "EmbeddingRequest",
    "The vectors of texts.",
    (
        MODEL,
        honoured("input", Prompts, "a text, token ids, or a list of either", required=True),
        honoured(
            "dimensions", Positive, "keep so many values of each vector and divide the rest by its length"
        ),
        honoured(
            "encoding_format", Literal["float", "base64"], "numbers, or float32 values in base64", "float"
        ),
        honoured("prompt_name", Label, "the name of a prompt of the model that is put before each text"),
        honoured(
            "truncate_prompt_tokens",
            Annotated[int, Field(ge=-1, le=2**31 - 1)],
            "cut longer texts to so many tokens; -1: to the model's maximum; without it they are an error",
        ),
        accepted("user", Label, LABEL, "someone"),
        refused("add_special_tokens", "texts have the tokens that the model was trained with", False, True),
        refused("priority", "requests run in the order of their arrival", 1, 0),
    ),
)
RERANK = Endpoint(
    "/v1/rerank",
    "RerankRequest",
    "Documents by decreasing score with a query: of a cross-encoder, or the similarity of an embedding model.",
    (
        MODEL,
        honoured("query", str, "the query", required=True),
        honoured("documents", Annotated[list[str], Field(min_length=1)], "the documents", required=True),
        honoured("top_n", Positive, "return so many; default: all"),
        honoured("return_documents", bool, "return the documents' texts", True),
        honoured(
            "truncate_prompt_tokens",
            Annotated[int, Field(ge=-1, le=2**31 - 1)],
            "cut longer pairs to so many tokens; -1: to the model's maximum; without it they are an error",
        ),
        accepted("user", Label, LABEL, "someone"),
        refused("max_tokens_per_doc", "use `truncate_prompt_tokens`", 100),
        refused("rank_fields", "documents are texts", ["text"]),
        refused("priority", "requests run in the order of their arrival", 1, 0),
    ),
)
CLASSIFY = Endpoint(
    "/classify",
    "ClassifyRequest",
    "The label of texts, with the probabilities of all labels.",
    (
        MODEL,
        honoured("input", Texts, "a text or a list of texts", required=True),
        honoured("use_activation", bool, "false: return the logits", True),
        honoured(
            "truncate_prompt_tokens",
            Annotated[int, Field(ge=-1, le=2**31 - 1)],
            "cut longer texts to so many tokens; -1: to the model's maximum; without it they are an error",
        ),
        accepted("user", Label, LABEL, "someone"),
        refused("priority", "requests run in the order of their arrival", 1, 0),
    ),
)
TOKENIZE = Endpoint(
    "/tokenize",
    "TokenizeRequest",
    "The tokens of a text or a conversation.",
    (
        MODEL,
        honoured("prompt", str, "a text; either this or `messages`"),
        honoured("messages", Annotated[list[ChatMessage], Field(min_length=1)], "a conversation"),
        honoured(
            "add_special_tokens",
            bool,
            "add special tokens; default: true for a text, false for a conversation",
        ),
        honoured("return_token_strs", bool, "add `token_strs`", False),
        honoured("tools", Annotated[list[Tool], Field(min_length=1)], "tools of the conversation"),
        *TEMPLATE,
    ),
)
DETOKENIZE = Endpoint(
    "/detokenize",
    "DetokenizeRequest",
    "The text of tokens.",
    (
        MODEL,
        honoured("tokens", list[TokenId], "token ids", required=True),
        honoured("skip_special_tokens", bool, "leave special tokens out of the text", False),
    ),
)

ENDPOINTS: tuple[Endpoint, ...] = (
    CHAT,
    COMPLETIONS,
    RESPONSES,
    EMBEDDINGS,
    RERANK,
    CLASSIFY,
    TOKENIZE,
    DETOKENIZE,
)
# The main ones, each of whose fields has a test of its own.
MAIN = (CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS)
