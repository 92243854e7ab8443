"""Counting from video and proactive video: the model speaks because of what it sees."""

from data_pipelines.behaviours import requests
from data_pipelines.behaviours.cast import Axis, Cast, held_out_pairs
from data_pipelines.behaviours.drawing import (
    FRAME_SAMPLES,
    HEIGHT_PX,
    WIDTH_PX,
    Actor,
    bouncing,
    changing,
    drifting,
    film,
    flashing,
    standing,
)
from data_pipelines.behaviours.requests import Request
from data_pipelines.behaviours.stage import Stage
from data_pipelines.behaviours.vocabulary import COLOURS, DIGITS, SHAPES
from data_pipelines.mixing import seconds
from tml.session import ExpectationKind

MAX_COUNT = 8
_EVENTS = ("bounces", "flashes")
_FLASH_FRAMES = 2
_WATCHES = {
    "turns": "tell me when the {shape} turns {colour}",
    "anything": "tell me when anything turns {colour}",
    "changes": "tell me when the {shape} changes",
}
"""What may be waited for. Where objects are held out, only a pair of shape and colour: the rest teaches its halves, and
may show any pair, as none is asked for."""


def counting(stage: Stage, cast: Cast) -> int:
    """`count the bounces`: a number aloud behind each, while a lamp may flash too, or the other way round.

    Returns the session's length.
    """
    config = cast.config
    start = cast.samples(0.2, 0.6)
    asked = not cast.chance(config.negative_fraction)
    wanted = cast.one(_EVENTS)
    first_frame = int(cast.rng.integers(FRAME_SAMPLES))
    begun = start
    if asked:
        request = Request(tag=wanted, parts=(cast.worded(f"count the {wanted}"),), answer=())
        begun = requests.ask(stage, cast, start, request)
    begin = -(-(begun + seconds(0.3) - first_frame) // FRAME_SAMPLES) + cast.number(2, 4)
    number = cast.number(1, MAX_COUNT)
    events = _draw_events(cast, begin, number, 4, 6 if number < MAX_COUNT - 1 else 5)
    other = _draw_events(cast, begin + cast.number(0, 3), cast.number(1, 5), 4, 8) if cast.chance(0.5) else []
    length = first_frame + max(events[-1], *other[-1:], begin) * FRAME_SAMPLES + seconds(config.window_s + 0.6)
    length = max(length, seconds(6.0))
    bounces, flashes = (events, other) if wanted == "bounces" else (other, events)
    stage.frames = _bouncing_film(cast, bounces, flashes, length, first_frame)
    at = [first_frame + frame * FRAME_SAMPLES for frame in events]
    if not asked:
        stage.expect_silence(0, length, "not_asked")
        return length
    stage.expect_silence(begun, at[0], "nothing_yet")
    for count, sample in enumerate(at, 1):
        # The tile of an event is complete with the frame behind it, so one micro-turn more than the delay is fair.
        stage.say(DIGITS[count], sample + seconds(config.delay_s + 0.1))
        stage.expect(ExpectationKind.SAY, sample, sample + seconds(config.window_s), DIGITS[count], wanted)
    stage.expect(ExpectationKind.COUNT, begun, length, DIGITS[number], wanted)
    return length


def _draw_events(cast: Cast, first: int, number: int, shortest: int, longest: int) -> list[int]:
    """Frames of events with between `shortest` and `longest` frames from one to the next."""
    frames = [first]
    for _ in range(number - 1):
        frames.append(frames[-1] + cast.number(shortest, longest))
    return frames


def _bouncing_film(cast: Cast, bounces: list[int], flashes: list[int], length: int, first_frame: int) -> list:
    """A ball and a lamp side by side, and sometimes a square that drifts behind them."""
    left = cast.chance(0.5)
    ball_x, lamp_x = (10.0, 28.0) if left else (28.0, 10.0)
    radius, floor = float(cast.rng.uniform(4.0, 5.5)), float(cast.rng.uniform(33.0, 35.0))
    actors = [
        Actor(
            shape="circle",
            radius_px=radius,
            place=bouncing(bounces, ball_x + _wobble(cast), floor - radius, cast.rng.uniform(17.0, 20.0)),
            colour=changing([(0, cast.one(COLOURS))]),
            shift=_shift(cast),
        ),
        Actor(
            shape="square",
            radius_px=float(cast.rng.uniform(5.0, 6.5)),
            place=standing(14.0 + _wobble(cast), lamp_x + _wobble(cast)),
            colour=flashing(flashes, _FLASH_FRAMES, cast.one(("white", *COLOURS))),
            shift=_shift(cast),
        ),
    ]
    if cast.chance(0.3):
        actors.insert(0, _drifter(cast, cast.one(COLOURS)))
    return film(actors, length, first_frame, _ground(cast))


def proactive(stage: Stage, cast: Cast) -> int:
    """`tell me when the circle turns green`: its colour when it does, and nothing when something else does.

    Returns the session's length.
    """
    config = cast.config
    start = cast.samples(0.2, 0.6)
    watch = "turns" if Axis.OBJECT in cast.novel or cast.chance(0.5) else cast.one(("anything", "changes"))
    is_pair = watch == "turns"
    shape, colour = cast.pair(SHAPES, COLOURS, Axis.OBJECT) if is_pair else (cast.one(SHAPES), cast.one(COLOURS))
    other = cast.one([name for name in SHAPES if name != shape])
    own_colours, other_colours = (_colours_of(cast, name, is_pair=is_pair) for name in (shape, other))
    asked = not cast.chance(config.negative_fraction / 2)
    first_frame = int(cast.rng.integers(FRAME_SAMPLES))
    begun = start
    if asked:
        text = _WATCHES[watch].format(shape=shape, colour=colour)
        request = Request(tag=watch, parts=(cast.worded(text),), answer=(colour,))
        begun = requests.ask(stage, cast, start, request)
    begin = -(-(begun + seconds(0.3) - first_frame) // FRAME_SAMPLES)
    comes = not cast.chance(max(config.negative_fraction, 0.2))
    changes, event = _draw_changes(cast, colour, own_colours, begin, comes=comes, first=watch == "changes")
    last = changes[-1][0]
    # Another shape may turn the colour that is waited for: that is not what was asked.
    rest = [name for name in other_colours if name != colour]
    rivals = [(0, cast.one(rest))]
    if cast.chance(0.5):
        is_same = watch != "anything" and colour in other_colours and cast.chance(0.7)
        rivals.append((begin + cast.number(3, 12), colour if is_same else cast.one(rest)))
    tail = seconds(config.window_s) + cast.samples(0.6, 1.6)
    length = max(first_frame + last * FRAME_SAMPLES + tail, seconds(6.0))
    stage.frames = _turning_film(cast, (shape, changes), (other, rivals), length, first_frame)
    windows = []
    if event is not None and asked:
        sample = first_frame + event * FRAME_SAMPLES
        windows.append((sample, sample + seconds(config.window_s)))
        stage.say(colour, sample + seconds(config.delay_s + 0.1))
        stage.expect(ExpectationKind.SAY, *windows[0], colour, watch)
    tag = "not_asked" if not asked else "not_yet" if windows else "never"
    stage.expect_silence(begun, length, tag, windows)
    return length


def _colours_of(cast: Cast, shape: str, *, is_pair: bool) -> list[str]:
    """What a shape may turn.

    In training, where a pair is waited for, no shape shows a colour whose pair is held out: it would only ever be
    shown as what is not meant, and that is what would be learnt of it.
    """
    held = held_out_pairs(len(SHAPES), len(COLOURS)) if is_pair and Axis.OBJECT not in cast.novel else frozenset()
    return [colour for j, colour in enumerate(COLOURS) if (SHAPES.index(shape), j) not in held]


def _draw_changes(
    cast: Cast, colour: str, colours: list[str], begin: int, *, comes: bool, first: bool
) -> tuple[list[tuple[int, str]], int | None]:
    """Colours from frame 0 on, and the frame in which the one that is waited for comes, if it does.

    With `first` any change is waited for: there is none if it does not come, and it comes first if it does.
    """
    others = [name for name in colours if name != colour]
    shown = [(0, cast.one(others))]
    if first and not comes:
        return shown, None
    for _ in range(cast.number(1, 3)):
        frame = max(shown[-1][0] + 5, begin + 1) + cast.number(0, 4)
        shown.append((frame, cast.one([name for name in others if name != shown[-1][1]])))
    if not comes:
        return shown, None
    # It may come first, in the middle or last; behind it the shape keeps it for two frames or more.
    place = 1 if first else cast.number(1, len(shown) - 1)
    event = shown[place][0]
    shown[place] = (event, colour)
    return shown, event


def _turning_film(
    cast: Cast,
    watched: tuple[str, list[tuple[int, str]]],
    rival: tuple[str, list[tuple[int, str]]],
    length: int,
    first_frame: int,
) -> list:
    """The shape that is watched, big, and another one, smaller, each with its colours from frames on."""
    left = cast.chance(0.5)
    big_x, small_x = (12.0, 30.0) if left else (27.0, 9.0)
    (shape, changes), (other, rivals) = watched, rival
    actors = [
        Actor(
            shape=other,
            radius_px=float(cast.rng.uniform(4.5, 6.0)),
            place=drifting((cast.rng.uniform(8, 30), small_x), (cast.rng.uniform(-1.0, 1.0), 0.0), 7.0),
            colour=changing(rivals),
            shift=_shift(cast),
        ),
        Actor(
            shape=shape,
            radius_px=float(cast.rng.uniform(8.0, 10.0)),
            place=standing(HEIGHT_PX / 2 + _wobble(cast), big_x + _wobble(cast)),
            colour=changing(changes),
            shift=_shift(cast),
        ),
    ]
    return film(actors, length, first_frame, _ground(cast))


def _drifter(cast: Cast, colour: str) -> Actor:
    start = (float(cast.rng.uniform(5, HEIGHT_PX - 6)), float(cast.rng.uniform(5, WIDTH_PX - 6)))
    step = (float(cast.rng.uniform(-1.5, 1.5)), float(cast.rng.uniform(-1.5, 1.5)))
    return Actor(shape="triangle", radius_px=3.0, place=drifting(start, step, 4.0), colour=changing([(0, colour)]))


def _wobble(cast: Cast) -> float:
    return float(cast.rng.uniform(-1.5, 1.5))


def _shift(cast: Cast) -> tuple[int, int, int]:
    red, green, blue = (cast.number(-18, 18) for _ in range(3))
    return red, green, blue


def _ground(cast: Cast) -> tuple[int, int, int]:
    level = cast.number(8, 40)
    return level, level, level
