"""TimeSpeak-style, CueSpeak-style and simultaneous speech: words that are due at a time, at a cue, at a lag."""

from data_pipelines.behaviours import requests
from data_pipelines.behaviours.cast import Axis, Cast
from data_pipelines.behaviours.requests import Request
from data_pipelines.behaviours.stage import Stage
from data_pipelines.behaviours.vocabulary import (
    COLOURS,
    CUES,
    DIGITS,
    FILLERS,
    SECONDS,
    SPANISH,
    TIMED_WORDS,
)
from data_pipelines.mixing import seconds
from tml.session import ExpectationKind

_STATEMENT_PROBABILITY = 0.25


def timed(stage: Stage, cast: Cast) -> int:
    """`in three seconds say go`, `every two seconds say go`. Returns the session's length."""
    config = cast.config
    start = cast.samples(0.2, 0.8)
    if cast.chance(config.negative_fraction):
        end = stage.hear(start, cast.says(f"I said {cast.one(TIMED_WORDS)} {cast.one(SECONDS)} seconds before"))
        length = end + seconds(5.0)
        stage.expect_silence(start, length, "statement")
        return length
    delay_word, word = cast.pair(SECONDS, TIMED_WORDS, Axis.TIME)
    delay = seconds(float(DIGITS.index(delay_word)))
    often = delay_word in ("two", "three") and cast.chance(0.5)
    text = f"{'every' if often else 'in'} {delay_word} seconds say {word}"
    request = Request(tag="every" if often else "in", parts=(cast.worded(text),), answer=(word,))
    end = requests.ask(stage, cast, start, request)
    tolerance = seconds(config.time_tolerance_s)
    windows = []
    for repeat in range(1, (3 if delay_word == "three" else 4) if often else 2):
        due = end + repeat * delay
        stage.say(word, due)
        windows.append((due - tolerance, due + tolerance))
        stage.expect(ExpectationKind.SAY, *windows[-1], word, request.tag)
    # Before the next repetition would be due.
    length = windows[-1][1] + cast.samples(0.5, 0.9)
    stage.expect_silence(end, length, "early_or_late", windows)
    if cast.chance(_STATEMENT_PROBABILITY):
        # Somebody talks in between; the time is due all the same.
        _, spoken = cast.distraction()
        place = end + cast.samples(0.4, 0.8)
        if place + len(spoken.samples) < length:
            stage.hear(place, spoken)
    return length


def cued(stage: Stage, cast: Cast) -> int:
    """`when I say apple say red`, then a list that goes on while the model speaks. Returns the session's length."""
    config = cast.config
    place = cast.samples(0.2, 0.8)
    cue, reply = cast.pair(tuple(CUES), COLOURS, Axis.OBJECT)
    asked = not cast.chance(config.negative_fraction)
    if asked:
        request = Request(tag="cue", parts=(cast.worded(f"when I say {cue} say {reply}"),), answer=(reply,))
        place = requests.ask(stage, cast, place, request) + cast.samples(0.7, 1.1)
    cues_left = cast.number(1, 3)
    since = 2
    begun, windows = place, []
    for _ in range(cast.number(5, 7)):
        if place > seconds(config.max_session_s - 3.0):
            break
        is_cue = since >= 2 and cues_left > 0 and cast.chance(0.5)
        word = cue if is_cue else _other_word(cast, cue)
        end = stage.hear(place, cast.says(word))
        if is_cue and asked:
            stage.say(reply, end + seconds(config.delay_s))
            windows.append((end, end + seconds(config.window_s)))
            stage.expect(ExpectationKind.SAY, *windows[-1], reply, "cue")
        since = 0 if is_cue else since + 1
        cues_left -= is_cue
        place = end + cast.samples(0.35, 0.7)
    length = place + seconds(config.window_s)
    stage.expect_silence(begun, length, "no_cue" if asked else "not_asked", windows)
    return length


def _other_word(cast: Cast, cue: str) -> str:
    """A word that is not the cue: one that sounds like it, another cue, or one that is never a cue."""
    kind = cast.number(0, 2)
    if kind == 0:
        return CUES[cue]
    return cast.one(FILLERS if kind == 1 else [word for word in CUES if word != cue])


def simultaneous(stage: Stage, cast: Cast) -> int:
    """The user says digits; the model says each after a while, as it is or in Spanish, while the next is said."""
    config = cast.config
    place = cast.samples(0.2, 0.8)
    kind = "nothing" if cast.chance(config.negative_fraction) else "spanish" if cast.chance(0.3) else "repeat"
    if kind != "nothing":
        text = "repeat after me" if kind == "repeat" else "say it in spanish"
        request = Request(tag=kind, parts=(cast.worded(text),), answer=())
        place = requests.ask(stage, cast, place, request) + cast.samples(0.7, 1.0)
    begun = place
    words = tuple(SPANISH) if kind == "spanish" else DIGITS if kind == "repeat" else FILLERS
    previous: list[str] = []
    for _ in range(cast.number(5, 8)):
        if place > seconds(config.max_session_s - 3.0):
            break
        word = cast.one([word for word in words if word not in previous[-2:]])
        previous.append(word)
        end = stage.hear(place, cast.says(word))
        if kind != "nothing":
            said = SPANISH[word] if kind == "spanish" else word
            stage.say(said, end + seconds(config.delay_s))
            stage.expect(ExpectationKind.SAY, end, end + seconds(config.window_s), said, kind)
        place = end + cast.samples(0.3, 0.6)
    length = place + seconds(config.window_s)
    if kind == "nothing":
        stage.expect_silence(begun, length, "not_asked")
    return length
