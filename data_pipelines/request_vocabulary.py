"""What is asked in the request task, and what is said that asks for nothing.

A request type is one form of sentence, with or without a word that changes. There are 33 types,
81 requests and one-word answers to each. No request begins another one, so that silence after a
part of a request never means that it is over.
"""

from dataclasses import dataclass

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, kw_only=True)
class RequestType:
    """One form of request.

    Attributes:
        tag: its name in expectations and breakdowns.
        requests: (what is said, the answer) pairs, equally likely.
        weight: how often the type is asked, relative to the others.
    """

    tag: str
    requests: tuple[tuple[str, str], ...]
    weight: float


def _fill(form: str, answers: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((form.format(word), answer) for word, answer in answers.items())


_OPPOSITES = {"hot": "cold", "up": "down", "left": "right", "wet": "dry", "big": "small", "day": "night"}
_COLOURS = {"grass": "green", "snow": "white", "coal": "black", "the sky": "blue"}
_SOUNDS = {"dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack"}
_LEGS = {"dog": "four", "spider": "eight", "bird": "two", "bee": "six"}

_FIXED = {
    "days": ("how many days are in a week", "seven"),
    "fingers": ("how many fingers are on one hand", "five"),
    "triangle": ("how many sides has a triangle", "three"),
    "hello": ("hello", "hello"),
    "goodbye": ("goodbye", "goodbye"),
    "thanks": ("thank you", "welcome"),
    "there": ("are you there", "yes"),
    "hear": ("can you hear me", "yes"),
    "sleep": ("do you ever sleep", "no"),
    "pigs": ("can pigs fly", "no"),
    "morning": ("good morning", "morning"),
    "good_night": ("good night", "night"),
    "coldest": ("which season is the coldest", "winter"),
    "warmest": ("which season is the warmest", "summer"),
    "fish": ("where do fish live", "water"),
    "bees": ("what do bees make", "honey"),
    "clouds": ("what falls from clouds", "rain"),
    "frozen": ("what is frozen water", "ice"),
    "moon": ("what shines at night", "moon"),
    "sun": ("what shines by day", "sun"),
    "puppy": ("what do you call a young dog", "puppy"),
    "name": ("what is your name", "echo"),
    "lock": ("what opens a lock", "key"),
    "read": ("what do we read", "book"),
    "time": ("what tells the time", "clock"),
}

REQUEST_TYPES: tuple[RequestType, ...] = (
    RequestType(tag="digit", requests=tuple((word, word) for word in DIGITS), weight=6.0),
    RequestType(tag="say", requests=tuple((f"say {word}", word) for word in DIGITS), weight=4.0),
    RequestType(
        tag="after",
        requests=tuple((f"what comes after {DIGITS[i]}", DIGITS[i + 1]) for i in range(9)),
        weight=5.0,
    ),
    RequestType(
        tag="before",
        requests=tuple((f"what comes before {DIGITS[i + 1]}", DIGITS[i]) for i in range(9)),
        weight=5.0,
    ),
    RequestType(tag="opposite", requests=_fill("what is the opposite of {}", _OPPOSITES), weight=3.0),
    RequestType(tag="colour", requests=_fill("what colour is {}", _COLOURS), weight=2.0),
    RequestType(tag="sound", requests=_fill("what does a {} say", _SOUNDS), weight=2.0),
    RequestType(tag="legs", requests=_fill("how many legs has a {}", _LEGS), weight=2.0),
    *(RequestType(tag=tag, requests=(request,), weight=0.7) for tag, request in _FIXED.items()),
)

STATEMENTS: tuple[str, ...] = (
    "the book is on the table",
    "we went home early",
    "my sister likes old songs",
    "it was raining all afternoon",
    "the train leaves from platform twelve",
    "he forgot his umbrella again",
    "they painted the kitchen yellow",
    "I will be back later",
    "nobody answered the door",
    "the soup needs more salt",
    "her brother works in a garage",
    "our neighbours bought a boat",
)
"""English that asks for nothing."""

FOREIGN: tuple[tuple[str, str], ...] = (
    ("de", "wir gehen heute in den Garten"),
    ("de", "das Wetter ist wirklich schlecht"),
    ("fr", "le train part dans une heure"),
    ("fr", "ma soeur habite en ville"),
    ("es", "mañana vamos a la playa"),
    ("es", "la puerta está cerrada"),
    ("it", "oggi fa molto caldo"),
    ("it", "il libro è sul tavolo"),
    ("nl", "de fiets staat buiten"),
    ("pl", "jutro jedziemy nad morze"),
    ("ru", "мы идём домой пешком"),
    ("ru", "книга лежит на столе"),
    ("sv", "vi ska åka till staden"),
    ("tr", "yarın okula gideceğiz"),
    ("cs", "zítra pojedeme na hory"),
    ("fi", "huomenna menemme kauppaan"),
)
"""(Language of espeak-ng, sentence) that asks for nothing, in other languages."""
