"""Chat templates: sandboxing, resource limits, errors, rendering, assistant masks, continuation, and tools."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import pytest
from fuzz.harness import attempt
from trained_tokenizers import tokenizer

from monoblock.tokenization import ChatTemplateError, budget, get_json_schema
from monoblock.tokenization.chat import plain

CHAT = [{"role": "user", "content": "the fox?"}, {"role": "assistant", "content": " jumps "}]
MARKED = (
    "{% for m in messages %}[{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}]{% endfor %}"
)


def render(source: str, chat: Any = CHAT, **options: Any) -> Any:
    return tokenizer().apply_chat_template(chat, chat_template=source, tokenize=False, **options)


# --- sandbox and limits


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ dict.__call__.__globals__ }}",
        "{{ dict.__class__.__init__ }}",
        "{{ self.__init__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ messages.__class__ }}",
        "{{ messages.append('x') }}",
        "{{ messages[0].update(role='system') }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '%9999999d' % 1 }}",
        "{{ '%9999999d' | format(1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ 10 ** 100000 }}",
    ],
)
def test_unsafe_access_is_refused(source: str) -> None:
    with pytest.raises(ChatTemplateError) as caught:
        render(source)
    message = str(caught.value)
    assert message.startswith("the chat template is refused: it ") or "is not safely callable" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "source", ["{{ lipsum() }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}"]
)
def test_includes_and_imports_fail(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="failed on this conversation"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% if false %}x{% endif %}{% endfor %}{% endfor %}",
        "{% for a in range(10 ** 9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 10 ** 9 * 'x' }}",
        "{{ 'x' | center(10 ** 9) }}",
        "{{ 'x'.ljust(10 ** 9) }}",
        "{{ 'x' | indent(width=10 ** 9, first=true) }}",
        "{{ [1] * 10 ** 9 }}",
        "{% set n = namespace(s='x' * 999) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='x' * 999) %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% for a in range(9999) %}{{ 'x' * 99999 }}{% endfor %}",
    ],
)
def test_long_running_templates_are_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_SECONDS", 0.3)  # shortens the test
    began = time.process_time()
    with pytest.raises(ChatTemplateError, match=r"stopped|range|Range"):
        render(source)
    assert time.process_time() - began < 10  # seconds; without the bound these run for hours


GROWING = [
    "{{ 3.7 | round(-10 ** 9) }}",
    "{{ 3 | round(10 ** 9, 'ceil') }}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{{ messages | tojson(separators=('x' * 10 ** 7, 'x' * 10 ** 7)) }}",
    "{{ messages | slice(10 ** 9) | list }}",
    "{{ (1000 | center(10 ** 7)) | groupby('a') }}",
    "{{ ([1] * 10 ** 6) | groupby('a') }}",
    "{{ ('x' * 10 ** 7) | sort }}",
    "{{ ('x' * 10 ** 7) | map('upper') | list }}",
    "{{ ('x' * 10 ** 7) | unique | list }}",
    "{{ messages | batch(10 ** 9, 'x') | list }}",
    "{{ ('a b ' * 10 ** 6) | wordwrap(1) }}",
    "{{ ('a b ' * 10 ** 4) | wordwrap(1, wrapstring='x' * 10 ** 6) }}",
    "{{ ('<!---->' * 10 ** 6) | striptags }}",
    "{{ ('www.a.b ' * 10 ** 6) | urlize }}",
    "{{ ('<' * 10 ** 7) | e | e | e | e | e }}",
    "{{ ('a' * 10 ** 6) | replace('a', 'b' * 10 ** 6) }}",
    "{{ ('a' * 10 ** 6).replace('', 'b' * 10 ** 6) }}",
    "{{ ('x' * 10 ** 6).join(['a'] * 10 ** 5) }}",
    "{{ (['x' * 10 ** 6] * 10 ** 5) | join }}",
    "{{ [['x' * 10 ** 6] * 1000] * 1000 }}",
    "{{ ['x' * 10 ** 6] | map('center', 10 ** 9) | list }}",
    "{{ '{0}{0}{0}{0}{0}{0}{0}{0}{0}{0}{0}'.format('x' * 10 ** 7) }}",
    "{{ '{:{}}'.format('x', 10 ** 9) }}",
    "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ '%s%s%s%s' % (('x' * 10 ** 7,) * 4) }}",
    "{{ ('\\t' * 10 ** 6).expandtabs(10 ** 6) }}",
    "{{ 'x'.encode().center(10 ** 9) }}",
    "{{ (5).to_bytes(10 ** 9, 'big') }}",
    "{{ 'abc'.translate({97: 'x' * 10 ** 9}) }}",
    "{{ (('9' * 10 ** 7) | int(base=16)) // (('9' * 10 ** 6) | int(base=16)) }}",
    "{{ range(99999) | map('string') | map('center', 99999) | list }}",
    "{{ ([[1]] * 10 ** 5) | sum(start=[]) }}",
    "{{ ('[]' * 10 ** 7) | from_json }}",
    "{{ strftime_now('%999999999Y') }}",
    "{% set n = namespace(v=[1]) %}{% for i in range(99) %}{% set n.v = [n.v, n.v] %}{% endfor %}{{ n.v }}",
    "{% set n = namespace(v=(1,)) %}{% for i in range(99) %}{% set n.v = (n.v, n.v) %}{% endfor %}{{ n.v == n.v }}",
    "{% set n = namespace(v=[1]) %}{% for i in range(99) %}{% set n.v = {'a': n.v, 'b': n.v} %}{% endfor %}",
    "{% set n = namespace(a=1) %}{% for i in range(99) %}{% set n.a = namespace(a=n.a, b=n.a) %}{% endfor %}"
    "{{ n.a }}{{ 'x' * 10 ** 8 }}",
    "{% set x %}{% for i in range(9999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}"
    "{% endset %}{% for i in range(9999) %}{% set y %}{{ x }}{{ x }}{% endset %}{{ y[1:] }}{% endfor %}",
    "{% macro m(x) %}{{ x }}{{ m(x ~ x) }}{% endmacro %}{{ m('x') }}",
    "{% macro m(x) %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m(1) %}" * 40
    + "x"
    + "{% endcall %}" * 40,
    "{% for a in range(99999) %}{% for b in messages | tojson | list %}{{ b }}{% endfor %}{% endfor %}",
    "{{ messages" + "[0:]" * 9000 + " }}",
    "{{ " + "1 + " * 20_000 + "1 }}",
    "{{ '" + "x" * 2**16 + "' }}",
]


@pytest.mark.parametrize("source", GROWING, ids=[source[:70] for source in GROWING])
def test_time_and_memory_of_templates_are_bounded(source: str) -> None:
    """By 2 s of processor time, 16 Mi characters, and 1 GiB in addition to them."""
    outcome = attempt(lambda: render(source), seconds=4, memory=1 << 30)
    assert outcome.kind == "refused" and "ChatTemplateError" in outcome.what, outcome
    assert "MemoryError" not in outcome.what and outcome.seconds < 3


def test_values_within_the_limits() -> None:
    big = (
        "{% set x = 'ab ' * 5000000 %}{{ x | length }} {{ x[1:4] }} {{ (x | trim)[-2:] }} {{ x.count('a') }}"
    )
    assert render(big) == "15000000 b a ab 5000000"
    assert render("{{ ['a', 1, none] | join('-') }} {{ 3.14159 | round(2) }} {{ '%5.1f|' % 2.25 }}") == (
        "a-1-None 3.14   2.2|"
    )
    assert render("{{ messages | tojson(indent=2) | length > 10 }}{{ '{:>6}'.format('x') }}") == "True     x"
    assert render("{{ range(9) | batch(4, 0) | map('sum') | list }}{{ [3, 1] | sort }}") == "[6, 22, 8][1, 3]"
    assert render("{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [m.role] %}{% endfor %}"
                  "{{ ns.l | join(',') }}{{ ns }}") == "user,assistant<Namespace>"  # fmt: skip
    assert render("{{ 'a b' | wordwrap(1) }}|{{ 'x' | center(3) }}|{{ '<b>' | e }}") == "a\nb| x |&lt;b&gt;"


def test_a_long_conversation_is_within_the_limits() -> None:
    chat = [{"role": "user", "content": "word " * 100}] * 5_000
    assert len(render("{% for m in messages %}{{ m.content | trim }}{% endfor %}", chat)) == 5_000 * 499


def test_the_conversation_is_not_modified() -> None:
    chat = copy.deepcopy(CHAT)
    render("{{ messages[-1].content }}", chat, continue_final_message=True)
    assert chat == CHAT


# --- errors


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for x in %}", "syntax error on line 1"),
        ("ok\n{{ 1 +", "syntax error on line 2"),
        ("{{ raise_exception('only users, please') }}", r"^only users, please$"),
        ("{{ messages[0].content + 3 }}", "failed on this conversation: TypeError"),
        ("{{ messages.nothing.at_all }}", "failed on this conversation: UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_broken_templates(source: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message) as caught:
        render(source)
    assert isinstance(caught.value, ValueError)


def test_missing_template() -> None:
    with pytest.raises(ChatTemplateError, match=r"pass chat_template=, set tokenizer\.chat_template"):
        tokenizer().apply_chat_template(CHAT)
    named = tokenizer(chat_template=[{"name": "rag", "template": "x"}, {"name": "short", "template": "y"}])
    with pytest.raises(ChatTemplateError, match=r"pass chat_template= one of \['rag', 'short'\]"):
        named.get_chat_template()
    assert named.apply_chat_template(CHAT, chat_template="short", tokenize=False) == "y"


@pytest.mark.parametrize(
    ("chat", "options", "message"),
    [
        ("text", {}, "a conversation is a list of messages"),
        ([], {}, "got an empty one"),
        ([[]], {}, "got an empty one"),
        ([CHAT, 3], {}, "got int"),
        (["text"], {}, "message 0 is str"),
        ([CHAT[0], 3], {}, "message 1 is int"),
        (CHAT, {"add_generation_prompt": True, "continue_final_message": True}, "exclude each other"),
        (CHAT, {"return_assistant_tokens_mask": True}, "needs tokenize=True"),
        (CHAT, {"sanitize_control_tokens": True}, "sanitize_control_tokens=True is not supported"),
        (CHAT, {"messages": CHAT}, "messages="),
        (CHAT, {"documents": ["x"]}, "a document is"),
        (CHAT, {"tools": ["x"]}, "a tool is"),
        (CHAT, {"continue_final_message": "thinking"}, "has no 'thinking' to continue"),
        ([{"role": "user"}], {"continue_final_message": True}, "has no 'content' to continue"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            {"continue_final_message": True},
            "no text to continue",
        ),
    ],
)
def test_refused_arguments(chat: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        render("{{ messages[0].content }}", chat, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# --- rendering


def test_variables_filters_and_functions() -> None:
    t = tokenizer(
        chat_template="{{ bos_token }}{{ pad_token }}{{ mood }}|{{ tools }}|{{ add_generation_prompt }}"
    )
    assert t.apply_chat_template(CHAT, tokenize=False, mood="glad") == "<s><pad>glad|None|False"
    assert t.apply_chat_template(CHAT, tokenize=False, bos_token="B", tools=[]) == "B<pad>|[]|False"
    assert render("{{ {'b': '<é>', 'a': 1} | tojson }}") == '{"b": "<é>", "a": 1}'
    assert render("{{ [1, 2] | tojson(separators=(',', ':')) }}") == "[1,2]"
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"  # trim_blocks and lstrip_blocks
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"


def test_none_values_are_missing_keys() -> None:
    chat = [{"role": "user", "content": "x", "name": None}]
    assert render("{{ 'name' in messages[0] }}{{ messages[0].name }}", chat) == "False"


def test_objects_become_plain_data() -> None:
    class Role(StrEnum):
        USER = "user"

    @dataclass
    class Message:
        role: Role
        content: Any

    class Image:
        def save(self, path: str) -> None:
            raise AssertionError(path)

    class Conversation:
        messages = [Message(Role.USER, [{"type": "image", "image": Image()}])]  # noqa: RUF012

    assert (
        render("{{ messages[0].role }} {{ messages[0].content[0].image }}", Conversation()) == "user <Image>"
    )
    assert render("{{ messages[0].role }}", [Conversation(), Conversation()]) == ["user", "user"]
    assert plain((np.float32(0.5), np.bool_(False), {1: np.int64(3)}, True)) == (0.5, False, {1: 3}, True)
    with pytest.raises(ChatTemplateError, match="no attribute 'save'"):
        render("{{ messages[0].content[0].image.save('x') }}", Conversation())


def test_batches() -> None:
    t = tokenizer(chat_template="{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    out = t.apply_chat_template([CHAT, CHAT[:1]], padding=True, return_tensors="np")
    assert out["input_ids"].shape == out["attention_mask"].shape and out["input_ids"].shape[0] == 2
    assert t.batch_decode(out, skip_special_tokens=True) == ["the fox? jumps ", "the fox?"]
    assert t.apply_chat_template(CHAT, return_dict=False) == t.encode("the fox?</s> jumps </s>")


# --- masks of assistant tokens


@pytest.mark.parametrize("side", ["left", "right"])
def test_assistant_masks(side: str) -> None:
    t = tokenizer(chat_template=MARKED, padding_side=side)
    out = t.apply_chat_template(
        [CHAT, CHAT * 2], padding=True, return_assistant_tokens_mask=True, return_tensors="np"
    )
    for ids, mask, expected in zip(
        out["input_ids"], out["assistant_masks"], (" jumps ", " jumps  jumps "), strict=True
    ):
        assert t.decode(ids[mask == 1]) == expected
    flat = t.apply_chat_template(CHAT, return_assistant_tokens_mask=True)
    assert t.decode(np.array(flat["input_ids"])[np.array(flat["assistant_masks"]) == 1]) == " jumps "


@pytest.mark.parametrize(("side", "text"), [("right", "the quick"), ("left", " brown fox")])
def test_assistant_masks_with_truncation(side: str, text: str) -> None:
    t = tokenizer(chat_template=MARKED, truncation_side=side)
    chat = [{"role": "assistant", "content": "the quick brown fox"}]
    length = 1 + len(t.encode(text))
    out = t.apply_chat_template(chat, truncation=True, max_length=length, return_assistant_tokens_mask=True)
    ids = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert len(out["input_ids"]) == length and t.decode(ids) == text


def test_assistant_masks_work_in_macros_and_are_refused_in_filters() -> None:
    macro = "{% macro show(m) %}<{% generation %}{{ m.content }}{% endgeneration %}>{% endmacro %}"
    macro += "{{ show(messages[1]) }}"
    t = tokenizer(chat_template=macro)
    out = t.apply_chat_template(CHAT, return_assistant_tokens_mask=True)
    assert (
        t.decode([i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]) == " jumps "
    )
    t.chat_template = macro.replace("show(messages[1])", "(show(messages[1])) | replace('> ', '') | length")
    with pytest.raises(ChatTemplateError, match="a filter around"):
        t.apply_chat_template(CHAT, return_assistant_tokens_mask=True)


# --- continuing a message


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "[the fox?][ jumps "),
        ("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", "[the fox?][jumps"),
        (
            "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{{ messages[-1].content }}!",
            "the fox?</s> jumps </s> jumps ",
        ),
    ],
)
def test_continuing_the_last_message(source: str, expected: str) -> None:
    assert render(source, continue_final_message=True) == expected


def test_continuing_another_field_or_a_content_block() -> None:
    chat = [{"role": "assistant", "reasoning": "Hm", "content": "x"}]
    source = "{{ messages[0].reasoning_content }}|{{ messages[0].content }}"
    assert render(source, chat, continue_final_message="reasoning_content") == "Hm"
    blocks = [
        {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    ]
    source = "{% for b in messages[0].content %}<{{ b.text }}>{% endfor %}"
    assert render(source, blocks, continue_final_message=True) == "<a><b"
    with pytest.raises(ValueError, match="does not write the last message"):
        render("{{ messages[0].content }}", continue_final_message=True)


def test_encode_message_with_chat_template() -> None:
    t = tokenizer(chat_template="{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    assert t.decode(t.encode_message_with_chat_template(CHAT[1], CHAT[:1])) == " jumps </s>"
    assert t.decode(t.encode_message_with_chat_template(CHAT[0])) == "the fox?</s>"
    with pytest.raises(ValueError, match="add_generation_prompt"):
        t.encode_message_with_chat_template(CHAT[0], add_generation_prompt=True)


# --- tools


def weather(city: str, unit: Literal["C", "K"] = "C", days: list[int] | None = None) -> str:
    """Forecast the weather.

    Args:
        city: Where,
            as "Köln"
        unit: The unit
        days: Which days
    """
    return f"{city} {unit} {days}"


def test_functions_become_tools() -> None:
    schema = get_json_schema(weather)
    assert schema == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Forecast the weather.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": 'Where, as "Köln"'},
                    "unit": {"type": "string", "enum": ["C", "K"], "description": "The unit"},
                    "days": {
                        "type": "array",
                        "items": {"type": "integer"},
                        "nullable": True,
                        "description": "Which days",
                    },
                },
                "required": ["city"],
            },
            "return": {"type": "string"},
        },
    }
    assert render("{{ tools[0].function.name }}{{ tools | length }}", tools=[weather, schema]) == "weather2"


def test_functions_that_cannot_be_tools() -> None:
    def bare(x: int) -> None: ...

    def unhinted(x) -> None:
        """Do.

        Args:
            x: it
        """

    def undescribed(x: int) -> None:
        """Do."""

    def strange(x: object) -> None:
        """Do.

        Args:
            x: it
        """

    def chosen(x: str) -> None:
        """Do.

        Args:
            x: it (choices: a, b)
        """

    for function, message in (
        (bare, "the tool bare has no docstring"),
        (unhinted, "'x' of the tool unhinted has no type hint"),
        (undescribed, "does not describe its argument 'x'"),
        (strange, "'x' of the tool strange has no JSON schema"),
        (chosen, "not a JSON list"),
    ):
        with pytest.raises(ValueError, match=message):
            get_json_schema(function)
