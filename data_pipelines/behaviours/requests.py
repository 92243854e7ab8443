"""Requests that the model answers at once, which several behaviours share."""

from dataclasses import dataclass

from data_pipelines.behaviours.cast import Cast
from data_pipelines.behaviours.stage import Line, Stage
from data_pipelines.behaviours.vocabulary import DIGITS, SAYABLE
from data_pipelines.mixing import seconds
from data_pipelines.speech import Utterance, utter
from tml.session import ExpectationKind

_PATIENCE_S = 2.0
"""How long silence is due behind what asks for nothing."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request and its answer.

    Attributes:
        tag: its name in expectations.
        parts: what is asked; there may be a pause between two parts.
        answer: the words that are due.
        slowly: whether they are said one by one, as one counts.
    """

    tag: str
    parts: tuple[str, ...]
    answer: tuple[str, ...]
    slowly: bool = False

    @property
    def text(self) -> str:
        """What is asked, in one piece."""
        return " ".join(self.parts)


def draw_short(cast: Cast, *, alone: bool = True) -> Request:
    """A request with an answer of one word; `alone` allows a digit by itself, which asks for its echo."""
    kind = cast.number(0 if alone else 1, 5)
    if kind == 0:
        digit = cast.one(DIGITS)
        return Request(tag="digit", parts=(digit,), answer=(digit,))
    if kind <= 3:
        word = cast.one(SAYABLE)
        before, behind = cast.wording()
        parts = (*filter(None, (before,)), "say", f"{word} {behind}".strip())
        return Request(tag="say", parts=parts, answer=(word,))
    place = cast.number(0, 8)
    return Request(tag="after", parts=("what comes", "after", DIGITS[place]), answer=(DIGITS[place + 1],))


def count_up(cast: Cast, last: int) -> Request:
    """A request to count aloud from one to `last`."""
    before, behind = cast.wording()
    parts = (*filter(None, (before,)), "count", "to", f"{DIGITS[last]} {behind}".strip())
    return Request(tag="count_up", parts=parts, answer=DIGITS[1 : last + 1], slowly=True)


def ask(stage: Stage, cast: Cast, start: int, request: Request, pauses_s: dict[int, float] | None = None) -> int:
    """The user asks, with pauses behind some parts (by index); silence is due until the end, which is returned."""
    pieces: list[str] = []
    lengths: list[float] = []
    for i, part in enumerate(request.parts):
        if i and (pauses_s or {}).get(i - 1):
            lengths.append((pauses_s or {})[i - 1])
            pieces.append(part)
        elif i:
            pieces[-1] += f" {part}"
        else:
            pieces.append(part)
    spoken: Utterance = utter(cast.speaker, pieces, lengths)
    end = stage.hear(start, spoken)
    stage.expect(ExpectationKind.SILENCE, start, end, tag="request")
    for first, last in spoken.pauses:
        stage.expect(ExpectationKind.SILENCE, start + first, start + last, tag="pause")
    return end


def answer(stage: Stage, cast: Cast, request: Request, start: int, end: int) -> list[Line]:
    """The model answers a request that was asked in [start, end); the answer is expected."""
    after = end + seconds(cast.config.delay_s)
    text = " ".join(request.answer)
    stage.expect(ExpectationKind.ANSWER, start, end, text, request.tag)
    if request.slowly:
        return stage.say_slowly(request.answer, after, seconds(cast.config.word_s))
    return [stage.say(text, after)]


def distract(stage: Stage, cast: Cast, start: int) -> int:
    """The user says something that asks for nothing; silence is due during it and some time after."""
    tag, spoken = cast.distraction()
    end = stage.hear(start, spoken)
    stage.expect(ExpectationKind.SILENCE, start, end + seconds(_PATIENCE_S), tag=tag)
    return end
