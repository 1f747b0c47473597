"""Chat templates and JSON schemas of tools against transformers: the rendered strings and the ids of conversations."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers_compared import DATA, both, outcome, same, transformers, with_template

from monoblock.tokenization import AutoTokenizer, get_json_schema

USER = {"role": "user", "content": 'What is <the> weather in Köln? & "why" 你好  '}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "several": [
        USER,
        {"role": "assistant", "content": " Rain. "},
        {"role": "user", "content": "And tomorrow?"},
    ],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "reply": [USER, {"role": "assistant", "content": "It is"}],
    "none content": [USER, {"role": "assistant", "content": "x", "tool_calls": None, "name": None}],
    "calls": [
        USER,
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": "abcdefghi",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": {"city": "Köln", "days": 2}},
                }
            ],
        },
        {"role": "tool", "name": "get_weather", "content": "rain", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "Rain."},
        {"role": "user", "content": "Thanks"},
    ],
    "wrong order": [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}],
    "blocks": [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
    ],
    "reasoning": [USER, {"role": "assistant", "reasoning": "Hm.", "content": "x"}],
}

CHATML = """{%- if messages[0]['role'] == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set system = 'You help.' %}{% set rest = messages %}{% endif %}
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- if tools %}{% for tool in tools %}{{ tool | tojson }}
{{ tool | tojson(indent=2) }}
{% endfor %}{% endif %}
{%- for message in rest %}
    {%- if message.role == 'stop' %}{% break %}{% endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}
        {%- generation %}{{ message.content }}{{- '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{ message.content }}{{ '<|im_end|>' }}{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if documents %}{% for d in documents %}{{ loop.index }}/{{ loop.length }} {{ d.title }}: {{ d.text }}
{% endfor %}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
    {%- if mood is defined %}{{ mood }}{% endif %}
{%- endif %}"""

TRIMMING = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}"
MACROS = """{%- macro show(m) -%}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{%- endmacro -%}
{%- set ns = namespace(count=0) -%}
{%- for m in messages if m.role != 'system' -%}
    {%- set ns.count = ns.count + 1 -%}{{ show(m) }}
{%- else -%}none{%- endfor -%}
{{ ns.count }} {{ dict(a=1, b=[1, 2]) | tojson }} {{ range(3) | list }}
{{ messages | map(attribute='role') | join(',') }}
{{ messages[0].get('role', '').strip().upper() if messages[0].content is string }} {{ bos_token is defined }}"""


def templates() -> dict[str, str]:
    found = {"chatml": CHATML, "trimming": TRIMMING, "macros": MACROS}
    return found | {
        path.stem: path.read_text() for path in sorted((DATA / "mistral/chat_templates").glob("*.jinja"))
    }


def get_weather(city: str, days: int = 1, unit: str = "celsius") -> dict:
    """Forecast the weather.

    Args:
        city: The city & country,
            such as "Köln, Germany"
        days: How many days
        unit: The unit (choices: ["celsius", "kelvin"])

    Returns:
        The forecast
    """
    return {"city": city, "days": days, "unit": unit}


TOOLS = [
    None,
    [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "<é>",
                "parameters": {"type": "object", "properties": {}},
            },
        }
    ],
    [get_weather],
]


@pytest.fixture(scope="module")
def chat_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("chat")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **with_template(folder)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return both(folder)


@pytest.mark.parametrize("name", templates())
@pytest.mark.parametrize("chat", CHATS)
def test_chat_templates(chat_pair: tuple[Any, Any], name: str, chat: str) -> None:
    template = templates()[name]
    for tools, ending, tokenize in itertools.product(
        TOOLS, ({}, {"add_generation_prompt": True}, {"continue_final_message": True}), (False, True)
    ):
        options = {"tools": tools, "chat_template": template, "tokenize": tokenize, **ending}
        same(
            chat_pair, lambda t, options=options: t.apply_chat_template(CHATS[chat], **options), f"{options}"
        )


def test_chat_arguments(chat_pair: tuple[Any, Any]) -> None:
    batch = [CHATS["one"], CHATS["several"]]
    for options in (
        {"return_dict": False},
        {"return_dict": False, "return_tensors": "pt", "padding": True},
        {"return_tensors": "pt", "padding": True, "return_assistant_tokens_mask": True},
        {"return_assistant_tokens_mask": True},
        {"return_assistant_tokens_mask": True, "padding": True, "tokenizer_kwargs": {"padding_side": "left"}},
        {"truncation": True, "max_length": 30, "return_assistant_tokens_mask": True},
        {"tokenizer_kwargs": {"return_offsets_mapping": True}},
        {"documents": [{"title": "t", "text": "x <y>"}], "mood": "happy", "add_generation_prompt": True},
        {"tokenize": False},
        {"tokenize": False, "return_assistant_tokens_mask": True},
        {"add_generation_prompt": True, "continue_final_message": True},
        {"continue_final_message": "reasoning_content"},
        {"continue_final_message": True, "return_assistant_tokens_mask": True},
        {"documents": ["no"]},
        {"tools": [3]},
    ):
        for chat in (batch, CHATS["several"], tuple(CHATS["reasoning"]), [], [[]], ["text"], "text"):
            same(
                chat_pair,
                lambda t, chat=chat, options=options: t.apply_chat_template(
                    chat, chat_template=CHATML, **options
                ),
                f"{chat} {options}",
            )


def test_one_more_message(chat_pair: tuple[Any, Any]) -> None:
    message = {"role": "user", "content": "And tomorrow?"}
    for history in (None, CHATS["reply"]):
        same(
            chat_pair,
            lambda t, history=history: t.encode_message_with_chat_template(
                message, history, chat_template=CHATML
            ),
        )


def test_named_templates(chat_pair: tuple[Any, Any], tmp_path: Path) -> None:
    named = {"default": TRIMMING, "tool_use": CHATML, "other": MACROS}
    for tokenizer in chat_pair:
        tokenizer.save_pretrained(tmp_path / type(tokenizer).__module__)
    mine = AutoTokenizer.from_pretrained(tmp_path / type(chat_pair[1]).__module__, chat_template=named)
    theirs = transformers.AutoTokenizer.from_pretrained(
        tmp_path / type(chat_pair[0]).__module__, chat_template=named
    )
    for options in ({}, {"tools": []}, {"chat_template": "other"}, {"chat_template": "{{ 1 }}"}):
        same((mine, theirs), lambda t, options=options: t.get_chat_template(**options))
    mine.save_pretrained(tmp_path / "saved")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == named
    theirs.save_pretrained(tmp_path / "theirs")
    assert AutoTokenizer.from_pretrained(tmp_path / "theirs").chat_template == named
    mine.save_pretrained(tmp_path / "inside", save_jinja_files=False)
    assert not (tmp_path / "inside/chat_template.jinja").exists()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "inside").chat_template == named
    assert AutoTokenizer.from_pretrained(tmp_path / "inside").chat_template == named


def hinted(
    a: int | None,
    b: list[str],
    c: dict[str, float],
    d: tuple[int, str],
    e: int | str | list[int],
    f: Any = None,
    *,
    g: bool = True,
) -> None:
    """Do it.

    More: words.

    Args:
        a: first
        b: second: with a colon
          and more
            and deeper: yes

        c: third
        d: fourth
        e: fifth (choices: [1, "x "])
        f: sixth
        g: seventh

    Raises:
        ValueError: never
    """


class Box:
    def method(self, x: float) -> Box:
        """Weigh.

        Args:
            x: how much
        Returns:
            A box
        """
        return self


def undescribed(x: int) -> int:
    """Nothing about x."""
    return x


def unhinted(x) -> int:
    """No hint.

    Args:
        x: it
    """
    return x


def undocumented(x: int) -> int:
    return x


@pytest.mark.parametrize("function", [get_weather, hinted, Box().method, undescribed, unhinted, undocumented])
def test_schemas_of_functions(function: Callable[..., Any]) -> None:
    from transformers.utils import get_json_schema as reference

    assert outcome(lambda: get_json_schema(function)) == outcome(lambda: reference(function), (Exception,))
