"""Delegation and tools: what the model does while it goes on speaking.

A delegation hands the conversation itself to the background model, so its call has no arguments.
"""

from data_pipelines.behaviours import requests
from data_pipelines.behaviours.cast import Axis, Cast
from data_pipelines.behaviours.requests import Request
from data_pipelines.behaviours.stage import Stage, call
from data_pipelines.behaviours.vocabulary import (
    CANCELS,
    COLOURS,
    DIGITS,
    LOOK_UPS,
    SHAPES,
    SUBJECTS,
    USER_NODS,
    WAITING,
)
from data_pipelines.mixing import seconds
from tml.calls import CANCEL, DELEGATE, FAILED, RESULT, SEARCHING
from tml.session import ExpectationKind

TOOLS: tuple[tuple[dict[str, str], str, tuple[str, ...]], ...] = (
    ({"light": "make it {}", "paint": "paint it {}"}, "colour", COLOURS),
    ({"draw": "draw a {}", "erase": "erase the {}"}, "shape", SHAPES),
    ({"volume": "volume {}", "channel": "channel {}"}, "level", DIGITS[1:6]),
)
"""Tools that take the same argument, each with how the user asks for it; the argument's name and values.
A value that is held out for one of them trains with the other."""

_CALL_WINDOW_S = 1.4
_USE_WINDOW_S = 2.4
_PHRASE_GAP_S = 0.2


def delegation(stage: Stage, cast: Cast) -> int:
    """`find the price of bread`: delegate, talk on, and say the result when it is there. Returns the length."""
    config = cast.config
    start = cast.samples(0.2, 0.6)
    if cast.chance(config.negative_fraction):
        # What the model knows itself, it answers itself.
        request = requests.draw_short(cast, alone=False)
        end = requests.ask(stage, cast, start, request)
        requests.answer(stage, cast, request, start, end)
        length = end + seconds(3.5)
        stage.expect(ExpectationKind.NO_ACTION, 0, length, tag="known")
        return length
    subject, thing = cast.pair(SUBJECTS, LOOK_UPS, Axis.OBJECT)
    text = cast.worded(f"find the {subject} of {thing}")
    end = requests.ask(stage, cast, start, Request(tag="delegation", parts=(text,), answer=()))
    due = end + seconds(config.delay_s)
    called = stage.do(DELEGATE, {}, due)
    stage.expect(
        ExpectationKind.ACTION, end, end + seconds(_CALL_WINDOW_S), call(DELEGATE, {}), f"delegate {subject} {thing}"
    )
    arrival = called + cast.samples(*config.result_range_s)
    ending = cast.one(("result", "result", "result", "result", "chunks", "chunks", "failure", "cancelled"))
    if ending == "cancelled":
        return _cancelled(stage, cast, called, arrival)
    _wait(stage, called, arrival)
    stage.expect(ExpectationKind.GO_ON, called + seconds(0.4), arrival, tag="waiting")
    if ending == "failure":
        stage.deliver(arrival, FAILED)
        said = "sorry"
    else:
        digit = cast.one(DIGITS)
        final = arrival
        if ending == "chunks":
            stage.deliver(arrival, SEARCHING)
            final = arrival + cast.samples(0.6, 1.4)
            _wait(stage, stage.own_end + seconds(_PHRASE_GAP_S), final)
            stage.expect(ExpectationKind.GO_ON, arrival, final, tag="waiting")
        stage.deliver(final, f"{RESULT} {digit}")
        arrival, said = final, f"it is {digit}"
    stage.say(said, arrival + seconds(config.delay_s))
    answered = arrival + seconds(_USE_WINDOW_S)
    stage.expect(ExpectationKind.SAY, arrival, answered, said, ending)
    stage.expect(ExpectationKind.NO_ACTION, end + seconds(_CALL_WINDOW_S), answered, tag="once")
    return max(answered, stage.own_end) + cast.samples(0.4, 1.0)


def _wait(stage: Stage, after: int, until: int) -> None:
    """The model says what fills the time, in turn; it begins nothing once the result is there."""
    place = after
    while stage.border(place) < until:
        line = stage.say(WAITING[len(stage.lines) % len(WAITING)], place)
        place = line.end + seconds(_PHRASE_GAP_S)


def _cancelled(stage: Stage, cast: Cast, called: int, arrival: int) -> int:
    """The user thinks better of it: the model cancels, and says nothing of a result that comes too late."""
    config = cast.config
    begun = called + cast.samples(0.8, 1.6)
    end = stage.hear(begun, cast.says(cast.one(CANCELS)))
    _wait(stage, called, begun + seconds(config.react_s))
    stage.do(CANCEL, {}, end + seconds(config.delay_s))
    stage.expect(ExpectationKind.GO_ON, called + seconds(0.4), begun, tag="waiting")
    stage.expect(ExpectationKind.ACTION, end, end + seconds(_CALL_WINDOW_S), call(CANCEL, {}), "cancel")
    stage.say("okay", end + seconds(config.delay_s))
    stage.expect(ExpectationKind.SAY, end, end + seconds(_CALL_WINDOW_S), "okay", "cancel")
    late = max(arrival, end + seconds(_CALL_WINDOW_S)) + cast.samples(0.2, 0.6)
    stage.deliver(late, f"{RESULT} {cast.one(DIGITS)}")
    stage.expect(ExpectationKind.SILENCE, late, late + seconds(2.0), tag="late_result")
    return late + seconds(2.0)


def tools(stage: Stage, cast: Cast) -> int:
    """The model counts aloud; the user asks for something to be done, and it is, while the count goes on."""
    config = cast.config
    start = cast.samples(0.2, 0.6)
    request = requests.count_up(cast, 9)
    end = requests.ask(stage, cast, start, request)
    lines = requests.answer(stage, cast, request, start, end)
    place = lines[0].start + cast.samples(0.6, 1.2)
    last = lines[-1].start
    windows: list[tuple[int, int]] = []
    if cast.chance(config.negative_fraction):
        spoken = cast.says(cast.one(USER_NODS)) if cast.chance(0.5) else cast.says(f"I said {cast.one(COLOURS)}")
        stage.hear(place, spoken)
        stage.expect(ExpectationKind.GO_ON, place, last, tag="not_asked")
        stage.expect(ExpectationKind.NO_ACTION, 0, stage.own_end, tag="not_asked")
        return stage.own_end + cast.samples(0.8, 1.2)
    for _ in range(cast.number(1, 2)):
        forms, argument, values = cast.one(TOOLS)
        name, value = cast.pair(tuple(forms), values, Axis.OBJECT)
        spoken = cast.says(f"please {forms[name].format(value)}")
        if place + len(spoken.samples) + seconds(0.6) > last:
            break
        asked = stage.hear(place, spoken)
        stage.do(name, {argument: value}, asked + seconds(config.delay_s))
        windows.append((asked, asked + seconds(_CALL_WINDOW_S)))
        stage.expect(ExpectationKind.ACTION, *windows[-1], call(name, {argument: value}), name)
        stage.expect(ExpectationKind.GO_ON, place, min(windows[-1][1], last), tag=name)
        place = windows[-1][1] + cast.samples(0.1, 0.4)
    length = max(stage.own_end, stage.user_end) + cast.samples(1.5, 2.0)
    for first, until in zip([0, *(w[1] + 1 for w in windows)], [*(w[0] for w in windows), length], strict=True):
        stage.expect(ExpectationKind.NO_ACTION, first, until, tag="between")
    return length
