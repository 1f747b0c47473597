"""Random chat templates that exhaust time or memory, drawn from a seeded generator."""

from __future__ import annotations

import random

FILTER_NAMES = """
abs attr('x') batch(N) capitalize center(N) count default(N) dictsort e escape filesizeformat first float forceescape
format(N) groupby('a') indent(N) int items join(S) last length list lower map('upper') map(attribute='a') max min pprint
random reject rejectattr('a') replace('a',S) replace('',S) reverse round(N) round(N,'ceil') safe select selectattr('a')
slice(N) sort sort(attribute='content') string striptags sum sum(start=[]) title tojson tojson(indent=N) trim
truncate(N) unique upper urlencode urlize wordcount wordwrap(N) wordwrap(1) xmlattr center(width=N) batch(N,S)
slice(N,S) from_json
"""
METHOD_NAMES = """
center(N) ljust(N) rjust(N,'x') zfill(N) expandtabs(N) replace('a',S) replace('',S) join(X) join([S,S,S]) split('a')
split() splitlines() upper() title() strip() format(X) format(N,N) count('a') find('a') partition('a') encode()
translate({97:S}) casefold() startswith('a') removeprefix('a') rsplit('a',N) items() keys() values() get('a') copy()
index(1) to_bytes(N,'big') bit_length() hex() fromhex('00') format_map({'a':N}) isdigit() lstrip('a') maketrans('a','b')
"""
FILTERS, METHODS = FILTER_NAMES.split(), METHOD_NAMES.split()
NUMBERS = (
    "1",
    "2",
    "7",
    "10",
    "1000",
    "99999",
    "10**7",
    "10**9",
    "-1",
    "-10**9",
    "2**62",
    "1.5",
    "1e308",
    "0",
    "true",
)
TEXTS = (
    "'a'",
    "'aa'",
    "'<!---->'",
    "'%999999999d'",
    "'{:>999999999}'",
    "'{0}{0}{0}'",
    "'a b '",
    "'\\n'",
    "'www.a.b '",
    "'\\t'",
    "'<a'",
)
NAMES = (
    "x",
    "y",
    "messages",
    "messages[0].content",
    "long",
    "bos_token",
    "loop.index",
    "ns.v",
    "messages[0]",
    "d",
)
OPERATORS = (
    "+",
    "-",
    "*",
    "/",
    "//",
    "%",
    "**",
    "~",
    "==",
    "<",
    "in",
    "and",
    "or",
    "is",
    "not in",
    ">=",
    "!=",
)
TESTS = (
    "defined",
    "mapping",
    "string",
    "sequence",
    "number",
    "in x",
    "eq(y)",
    "sameas x",
    "divisibleby 3",
    "odd",
    "iterable",
    "none",
)


def expression(rng: random.Random, depth: int) -> str:
    """A Jinja expression."""

    def inner() -> str:
        return expression(rng, depth - 1)

    if depth <= 0:
        return rng.choice((*NUMBERS, *TEXTS, *NAMES))
    match rng.randrange(13):
        case 0 | 1 | 2:
            return f"({inner()})|{_filled(rng, rng.choice(FILTERS), depth)}"
        case 3 | 4:
            return f"({inner()}).{_filled(rng, rng.choice(METHODS), depth)}"
        case 5 | 6:
            operator = rng.choice(OPERATORS)
            if operator == "is":
                return f"({inner()} is {rng.choice(TESTS)})"
            return f"({inner()} {operator} {inner()})"
        case 7:
            return f"[{', '.join(inner() for _ in range(rng.randrange(4)))}]"
        case 8:
            return f"{{{', '.join(f'{rng.choice(TEXTS)}: {inner()}' for _ in range(rng.randrange(3)))}}}"
        case 9:
            return f"({inner()})[{rng.choice(('0', '-1', ':1', '1:', '::-1', ':', '0:10**9', inner()))}]"
        case 10:
            call = rng.choice(
                (
                    "range(N)",
                    "dict(a=X)",
                    "namespace(v=X)",
                    "cycler(X,X)",
                    "joiner(S)",
                    "m(X)",
                    "strftime_now(S)",
                    "dict(X)",
                )
            )
            return _filled(rng, call, depth)
        case 11:
            return f"({inner()} if {inner()} else {inner()})"
        case _:
            return rng.choice(NAMES)


def _filled(rng: random.Random, pattern: str, depth: int) -> str:
    out = ""
    for at, character in enumerate(pattern):
        alone = not (pattern[at - 1 : at].isalpha() or pattern[at + 1 : at + 2].isalpha())
        if alone and character == "N":
            out += rng.choice(NUMBERS)
        elif alone and character == "S":
            out += rng.choice((*TEXTS, "x", "long"))
        elif alone and character == "X":
            out += expression(rng, depth - 1)
        else:
            out += character
    return out


def block(rng: random.Random, depth: int) -> str:
    """Statements and output."""

    def value() -> str:
        return expression(rng, rng.randrange(1, 4))

    def inner() -> str:
        return "".join(block(rng, depth - 1) for _ in range(rng.randrange(1, 3)))

    if depth <= 0:
        return rng.choice((f"{{{{ {value()} }}}}", "text", "text " * 50))
    match rng.randrange(12):
        case 0 | 1:
            over = rng.choice((value(), "range(100000)", "range(1000)", "messages", "x"))
            return f"{{% for x in {over} %}}{inner()}{{% endfor %}}"
        case 2:
            return f"{{% set {rng.choice(('x', 'y', 'ns.v'))} = {value()} %}}{inner()}"
        case 3:
            name = rng.choice(("x", "y"))
            return f"{{% set {name} %}}{inner()}{{{{ {name} }}}}{{% endset %}}{inner()}"
        case 4:
            return f"{{% macro m(x) %}}{inner()}{{{{ m({value()}) }}}}{inner()}{{% endmacro %}}{{{{ m({value()}) }}}}"
        case 5:
            return f"{{% if {value()} %}}{inner()}{{% else %}}{inner()}{{% endif %}}"
        case 6:
            return f"{{% filter {_filled(rng, rng.choice(FILTERS), 1)} %}}{inner()}{{% endfilter %}}"
        case 7:
            doubled = rng.choice(
                ("x ~ x", "x + x", "[x, x]", "[x] + [x]", "x * 2", "(x, x)", "{'a': x, 'b': x}", "x|join(x)")
            )
            growing = doubled.replace("x", "ns.v")
            return f"{{% for i in range(100) %}}{{% set ns.v = {growing} %}}{{% endfor %}}{{{{ ns.v }}}}"
        case 8:
            return f"{{% generation %}}{inner()}{{% endgeneration %}}"
        case 9:
            return f"{{% call m({value()}) %}}{inner()}{{% endcall %}}"
        case 10:
            return f"{{% set ns = namespace(v={value()}) %}}{inner()}"
        case _:
            return f"{{{{ {value()} }}}}"


def template(rng: random.Random) -> str:
    """A complete template with the variables `messages`, `long`, `x`, `d` and `bos_token`."""
    start = "{% set ns = namespace(v='ab') %}{% set y = 'y' %}" if rng.random() < 0.8 else ""
    return start + "".join(block(rng, rng.randrange(1, 5)) for _ in range(rng.randrange(1, 4)))
