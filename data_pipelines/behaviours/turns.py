"""Turn taking, pause handling, interruption and backchannels: who speaks when."""

from data_pipelines.behaviours import requests
from data_pipelines.behaviours.cast import Axis, Cast
from data_pipelines.behaviours.requests import Request
from data_pipelines.behaviours.stage import Stage
from data_pipelines.behaviours.vocabulary import (
    OWN_NOD,
    STOPPERS,
    STORY_ENDS,
    STORY_OPENERS,
    STORY_SUBJECTS,
    USER_NODS,
)
from data_pipelines.mixing import seconds
from tml.session import ExpectationKind

_WINDOW_S = 2.0
"""No other answer is due so long after a request."""

_LONGEST_EXCHANGE_S = 9.5
"""A slow request with two pauses, and an answer of five words."""


def turn_taking(stage: Stage, cast: Cast) -> int:
    """Requests without pauses; the model answers when the user has finished. Returns the session's length."""
    return _conversation(stage, cast, pausing=False)


def pause_handling(stage: Stage, cast: Cast) -> int:
    """Requests with a pause or two inside; the model stays silent in them. Returns the session's length."""
    return _conversation(stage, cast, pausing=True)


def _conversation(stage: Stage, cast: Cast, *, pausing: bool) -> int:
    config, limit = cast.config, seconds(cast.config.max_session_s - _LONGEST_EXCHANGE_S)
    place = cast.samples(0.2, 1.0)
    if cast.chance(config.negative_fraction):
        while place < limit and cast.chance(0.8):
            place = requests.distract(stage, cast, place) + seconds(_WINDOW_S) + cast.samples(0.1, 0.6)
        length = max(place, seconds(6.0))
        if not stage.expectations:
            stage.expect_silence(0, length, "noise")
        return length
    for _ in range(cast.number(2, 4)):
        if place > limit:
            break
        long = cast.chance(0.25)
        request = requests.count_up(cast, cast.number(3, 5)) if long else requests.draw_short(cast, alone=not pausing)
        pauses_s = _draw_pauses(cast, request) if pausing else {}
        end = requests.ask(stage, cast, place, request, pauses_s)
        requests.answer(stage, cast, request, place, end)
        place = max(stage.own_end, end + seconds(_WINDOW_S)) + cast.samples(*config.gap_range_s)
    return place


def _draw_pauses(cast: Cast, request: Request) -> dict[int, float]:
    """One pause, or sometimes two, behind parts of a request."""
    places = list(range(len(request.parts) - 1))
    wanted = 2 if len(places) > 1 and cast.chance(0.3) else 1
    chosen = cast.rng.choice(places, wanted, replace=False)
    return {int(i): float(cast.rng.uniform(*cast.config.pause_range_s)) for i in sorted(chosen)}


def interruption(stage: Stage, cast: Cast) -> int:
    """The user speaks over the model, which stops and answers the new request. Returns the session's length."""
    config = cast.config
    start = cast.samples(0.2, 0.8)
    first = requests.count_up(cast, cast.number(7, 9))
    end = requests.ask(stage, cast, start, first)
    lines = stage.say_slowly(first.answer, end + seconds(config.delay_s), seconds(config.word_s))
    stage.expect(ExpectationKind.SAY, end, end + seconds(_WINDOW_S), "one", "begins")
    begun = lines[0].start + cast.samples(1.0, 3.2)
    if cast.chance(config.negative_fraction):
        # Nobody interrupts: the model says all of it.
        stage.expect(ExpectationKind.GO_ON, lines[0].start, lines[-1].start, tag="uninterrupted")
        return stage.own_end + cast.samples(0.8, 1.4)
    second = requests.draw_short(cast, alone=False)
    stop = cast.one(STOPPERS)
    turn_end = stage.hear(begun, cast.says(f"{stop} {second.text}"))
    stage.fall_silent(begun + seconds(config.react_s), begun + seconds(config.cut_s))
    stage.expect(ExpectationKind.STOP, begun, turn_end, tag=stop)
    requests.answer(stage, cast, second, begun, turn_end)
    return turn_end + seconds(_WINDOW_S) + cast.samples(0.4, 1.0)


def backchannel(stage: Stage, cast: Cast) -> int:
    """Nods on either side: the model's in a story of the user, the user's while the model goes on counting."""
    return _story(stage, cast) if cast.chance(0.6) else _nodded_at(stage, cast)


def _story(stage: Stage, cast: Cast) -> int:
    """Announced, a story gets a nod behind every sentence, never inside one; otherwise it gets none."""
    place = cast.samples(0.2, 0.8)
    announced = not cast.chance(max(cast.config.negative_fraction, 0.25))
    if announced:
        end = stage.hear(place, cast.says(cast.one(STORY_OPENERS)))
        place = end + cast.samples(0.3, 0.6)
        stage.expect(ExpectationKind.SILENCE, 0, place, tag="opening")
    for _ in range(cast.number(2, 3)):
        if place > seconds(cast.config.max_session_s - 5.0):
            break
        subject, ending = cast.pair(STORY_SUBJECTS, STORY_ENDS, Axis.WORDING)
        end = place
        if cast.chance(0.4):
            middle = stage.hear(place, cast.says(subject))
            pause = middle + cast.samples(0.4, 0.7)
            stage.expect(ExpectationKind.SILENCE, middle, pause, tag="pause")
            end = stage.hear(pause, cast.says(ending))
        else:
            end = stage.hear(place, cast.says(f"{subject} {ending}"))
        gap = cast.samples(1.1, 1.6)
        if announced:
            stage.say(OWN_NOD, end + seconds(cast.config.delay_s))
            stage.expect(ExpectationKind.NOD, end, end + gap, OWN_NOD, "story")
        else:
            stage.expect(ExpectationKind.SILENCE, place, end + gap, tag="statement")
        place = end + gap
    return place + cast.samples(0.0, 0.6)


def _nodded_at(stage: Stage, cast: Cast) -> int:
    """The model counts aloud; the user nods once or twice, and it goes on."""
    config = cast.config
    start = cast.samples(0.2, 0.8)
    request = requests.count_up(cast, cast.number(7, 9))
    end = requests.ask(stage, cast, start, request)
    lines = requests.answer(stage, cast, request, start, end)
    nod = lines[0].start + cast.samples(0.8, 1.6)
    for _ in range(cast.number(1, 2)):
        nod_end = stage.hear(nod, cast.says(cast.one(USER_NODS)))
        until = min(nod_end + seconds(config.window_s), lines[-1].start)
        stage.expect(ExpectationKind.GO_ON, nod, until, tag="nodded_at")
        nod = nod_end + cast.samples(0.8, 1.2)
    return stage.own_end + cast.samples(0.8, 1.4)
