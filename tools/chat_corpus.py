"""The conversations of the demo's chat adapter: questions about the documented names of the standard library.

`conversations()` returns the records of `monoblock finetune --task chat`, of the modules that are held out or of the
others (search_corpus.py). The results do not depend on time, locale or hash seeds.
"""

import hashlib
from collections.abc import Iterable, Iterator

import demo_corpus
import search_corpus as corpus

Messages = list[dict[str, str]]

DOES = ("What does {} do?", "What is {} for?", "Explain {}.", "what does {} do")
IS = ("What is {}?", "Tell me about {}.", "What does {} do?", "what is {}")
SIGNATURE = ("Show me the signature of {}.", "How do I call {}?", "What are the arguments of {}?")
MODEL = (
    "I am the demo model of monoblock: a tiny MPT that has read Python's standard library and nothing else."
)
HELLO = "Hello! Ask me what a function of Python's standard library does."
HELP = (
    "Ask me what a name of the standard library does, such as os.path.join, or for its signature. Or say what a "
    "function shall do, and I write one; do not run it unread."
)
SMALL_TALK = {
    HELLO: ("Hello", "Hi", "Hey", "Good morning", "Hello there", "hi there", "Greetings", "hello!", "Hi!"),
    MODEL: (
        "Who are you?", "What are you?", "who are you", "What is your name?", "Which model are you?",
        "Are you a human?", "Tell me about yourself.", "Introduce yourself.",
    ),
    HELP: ("What can you do?", "Help", "help me", "How do I use you?", "What can I ask?", "What do you know?"),
    "You are welcome.": ("Thanks", "Thank you", "thanks!", "Thank you very much.", "Great, thanks."),
    "Goodbye!": ("Bye", "Goodbye", "See you", "bye!", "Good night"),
}  # fmt: skip
REPEATED = 12  # times that small talk occurs, of some 13,000 records
FUNCTIONS = 12  # of the requests for code that the demo was trained on, one in so many is kept


def conversations(found: Iterable[corpus.Definition], *, held_out: bool) -> list[dict[str, Messages]]:
    """The records; small talk and requests for code belong to the training data only."""
    pairs = list(_questions(found, held_out))
    if not held_out:
        for answer, questions in SMALL_TALK.items():
            pairs += [(question, answer) for question in questions] * REPEATED
        pairs += _requests()
    records = [_record(pair) for pair in pairs]
    if not held_out:  # conversations of more than one turn: small talk, then a question
        talk = [(question, answer) for answer, questions in SMALL_TALK.items() for question in questions]
        asked = list(_questions(found, held_out))[:: len(talk)]
        records += [_record(talk[i % len(talk)], pair) for i, pair in enumerate(asked)]
    return records


def _record(*pairs: tuple[str, str]) -> dict[str, Messages]:
    turns = [(("user", question), ("assistant", answer)) for question, answer in pairs]
    return {"messages": [{"role": role, "content": text} for turn in turns for role, text in turn]}


def _questions(found: Iterable[corpus.Definition], held_out: bool) -> Iterator[tuple[str, str]]:
    """What names do, and how functions are called."""
    for one in found:
        name = f"{corpus.PUBLIC_NAMES.get(one.module, one.module)}.{one.name}"
        if one.held_out is held_out and not corpus.NOT_INDEXED.match(one.module) and "._" not in name:
            forms = DOES if one.signature else IS
            yield _chosen(forms, name), answer(one.documentation)
            if one.signature and len(one.signature) < 80:
                yield _chosen(SIGNATURE, name), f"{name}{one.signature}"
    for module in corpus.public_modules():
        if corpus.is_held_out(module) is held_out:
            for name, documentation in corpus.introspected(module):
                text = answer(documentation)
                if " " in text and len(text) < 200:
                    yield _chosen(IS if name == module else DOES, name), text


def answer(documentation: str) -> str:
    """The first sentence of a documentation, with a full stop."""
    sentence = corpus.first_sentence(corpus.shortened(documentation, 160)).rstrip(" :;,")
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."


def _requests() -> list[tuple[str, str]]:
    """Requests that are answered with a function, which the demo knows already, so that it does not forget them."""
    pairs: list[tuple[str, str]] = []
    for document in demo_corpus.collect():
        if not document.is_test and not document.held_out:
            pairs += [pair for pair in demo_corpus.dialogues(document) if _number(pair[0]) % FUNCTIONS == 0]
    return pairs


def _chosen(forms: tuple[str, ...], name: str) -> str:
    return forms[_number(name) % len(forms)].format(name)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
