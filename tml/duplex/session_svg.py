"""One session as inline SVG: what came in, what the model did and what was expected, on the grid of micro-turns."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from tml.codec.waveform import decode_clip
from tml.duplex.judge import Outcome
from tml.duplex.scores import is_good
from tml.microturn import Clock
from tml.session import Expectation, Session, Stream
from tml.timeline import COLOURS, NAMES

PX_PER_S = 96.0
LEFT_PX = 92.0
_LINE_PX, _WAVE_PX, _PICTURE_PX, _GAP_PX, _AXIS_PX = 15.0, 34.0, 34.0, 6.0, 18.0
_CHAR_PX = 6.3
"""Mean width of a character at the font's size; labels are kept apart by it."""
_COLUMN_PX = 2.0
_GOOD, _BAD, _RECORDED = "#2d7d46", "#c0392b", "#7a7f87"
_LONGEST_LABEL = 60


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A labelled span of a lane, in seconds.

    Attributes:
        start_s: where it begins.
        end_s: where it ends.
        label: what stands beside it.
        colour: of both.
        note: what a reader sees who points at it.
    """

    start_s: float
    end_s: float
    label: str
    colour: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One horizontal band: sound or pictures above, labelled marks below."""

    name: str
    colour: str
    marks: tuple[Mark, ...] = ()
    sound: np.ndarray | None = None
    pictures: tuple[tuple[float, bytes], ...] = ()


def session_svg(
    session: Session, recorded: Session, judged: Sequence[tuple[Expectation, Sequence[Outcome]]], clock: Clock
) -> str:
    """Draws a session.

    Args:
        session: with the model's own words, calls and sound, and the results that it was given.
        recorded: the session of the data set.
        judged: what was expected, and what came of it.
        clock: of the micro-turns.
    """
    lanes = lanes_of(session, recorded, judged)
    height = _AXIS_PX + sum(_height(lane) for lane in lanes)
    width = LEFT_PX + session.duration_s * PX_PER_S + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="session" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" data-left="{LEFT_PX:g}" data-scale="{PX_PER_S:g}">'
    ]
    parts += _grid(session.duration_s, height, clock)
    top = _AXIS_PX
    for lane in lanes:
        parts += _lane(lane, top, width, session.sample_rate_hz)
        top += _height(lane)
    parts.append(f'<line class="cursor" x1="{LEFT_PX:g}" x2="{LEFT_PX:g}" y1="0" y2="{height:.0f}"/></svg>')
    return "".join(parts)


def lanes_of(
    session: Session, recorded: Session, judged: Sequence[tuple[Expectation, Sequence[Outcome]]]
) -> list[Lane]:
    """The lanes of a session, from what came in to what was expected; streams that hold nothing have none.

    Lanes of text that the model may put out are there in any case: an empty one says that it said nothing.
    """
    rate = session.sample_rate_hz
    lanes: list[Lane] = []
    for stream in Stream:
        colour = COLOURS[stream]
        if stream is Stream.USER_AUDIO:
            spans = [(word.start, word.end, word.text) for word in session.user_words]
        else:
            spans = [(event.start, event.end, " ".join(event.text.split())) for event in session.texts_of(stream)]
        marks = tuple(Mark(start_s=a / rate, end_s=b / rate, label=text, colour=colour) for a, b, text in spans)
        clip = session.audio.get(stream)
        pictures = tuple((f.sample / rate, f.data) for f in session.frames) if stream is Stream.VIDEO else ()
        if marks or clip is not None or pictures or stream in (Stream.OWN_TEXT, Stream.ACTION):
            sound = None if clip is None else decode_clip(clip, rate)
            lanes.append(Lane(name=_name(stream), colour=colour, marks=marks, sound=sound, pictures=pictures))
    own = (*recorded.texts_of(Stream.OWN_TEXT), *recorded.texts_of(Stream.ACTION))
    marks = tuple(
        Mark(start_s=event.start / rate, end_s=event.end / rate, label=event.text, colour=_RECORDED) for event in own
    )
    lanes.append(Lane(name="recorded", colour=_RECORDED, marks=marks))
    lanes.append(Lane(name="expected", colour=_GOOD, marks=tuple(_expected(item, came, rate) for item, came in judged)))
    return lanes


def _name(stream: Stream) -> str:
    return NAMES[stream].replace("own", "model")


def _expected(item: Expectation, came: Sequence[Outcome], rate: int) -> Mark:
    good = all(map(is_good, came))
    what = " ".join(filter(None, (item.kind.value.replace("_", " "), item.text)))
    found = ", ".join(
        f"{o.metric} {'yes' if o.hit else 'no'}" + (f" after {o.latency_s:.2f} s" if o.latency_s is not None else "")
        for o in came
    )
    start_s, end_s = item.start / rate, item.end / rate
    return Mark(
        start_s=start_s,
        end_s=end_s,
        label=f"{'✓' if good else '✗'} {what}",
        colour=_GOOD if good else _BAD,
        note=f"{start_s:.2f} to {end_s:.2f} s: {what}{f' ({item.tag})' if item.tag else ''}: {found}",
    )


def _body_px(lane: Lane) -> float:
    return _WAVE_PX if lane.sound is not None else _PICTURE_PX if lane.pictures else 0.0


def _height(lane: Lane) -> float:
    lines = max((line for _, line in _placed(lane.marks)), default=-1) + 1
    return _body_px(lane) + _LINE_PX * max(lines, 0 if _body_px(lane) else 1) + _GAP_PX


def _label(mark: Mark) -> str:
    return mark.label if len(mark.label) <= _LONGEST_LABEL else mark.label[: _LONGEST_LABEL - 1] + "…"


def _written(text: str) -> str:
    """Text as SVG holds it; an untrained model may put out what no document may hold."""
    return escape("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text))


def _placed(marks: Sequence[Mark]) -> list[tuple[Mark, int]]:
    """Every mark with a line on which neither it nor its label touches another."""
    ends: list[float] = []
    placed: list[tuple[Mark, int]] = []
    for mark in sorted(marks, key=lambda mark: mark.start_s):
        end = max(mark.start_s + (len(_label(mark)) * _CHAR_PX + 6) / PX_PER_S, mark.end_s)
        line = next((i for i, taken in enumerate(ends) if taken <= mark.start_s), len(ends))
        ends[line : line + 1] = [end]
        placed.append((mark, line))
    return placed


def _x(time_s: float) -> float:
    return LEFT_PX + time_s * PX_PER_S


def _grid(duration_s: float, height: float, clock: Clock) -> list[str]:
    """A line a micro-turn, and a labelled one a second."""
    turn_s = clock.turn_samples / clock.sample_rate_hz
    ticks = "".join(f"M{_x(k * turn_s):.1f} {_AXIS_PX:g}V{height:.0f}" for k in range(int(duration_s / turn_s) + 1))
    seconds = "".join(
        f'<text class="axis" x="{_x(float(second)):.1f}" y="12">{second} s</text>'
        for second in range(int(duration_s) + 1)
    )
    whole = "".join(f"M{_x(float(second)):.1f} {_AXIS_PX - 4:g}V{height:.0f}" for second in range(int(duration_s) + 1))
    return [f'<path class="tick" d="{ticks}"/>', f'<path class="second" d="{whole}"/>', seconds]


def _lane(lane: Lane, top: float, width: float, rate_hz: int) -> list[str]:
    body, height = _body_px(lane), _height(lane)
    parts = [
        f'<rect x="0" y="{top:.1f}" width="{width:.0f}" height="{height:.1f}" fill="{lane.colour}" opacity="0.06"/>',
        f'<text class="lane" x="6" y="{top + height / 2 + 4:.1f}" fill="{lane.colour}">{escape(lane.name)}</text>',
    ]
    if lane.sound is not None:
        parts.append(_wave(lane.sound, lane.colour, top + _GAP_PX / 2 + body / 2, rate_hz))
    parts += _pictures(lane.pictures, top + _GAP_PX / 2)
    for mark, line in _placed(lane.marks):
        y = top + body + _GAP_PX / 2 + _LINE_PX * line
        length = max((mark.end_s - mark.start_s) * PX_PER_S, 1.5)
        note = f"<title>{_written(mark.note or f'{mark.start_s:.2f} s: {mark.label}')}</title>"
        parts.append(
            f'<g fill="{mark.colour}"><rect x="{_x(mark.start_s):.1f}" y="{y + _LINE_PX - 3:.1f}" width="{length:.1f}" '
            f'height="2"/><text x="{_x(mark.start_s) + 2:.1f}" y="{y + _LINE_PX - 5:.1f}">'
            f"{_written(_label(mark))}</text>{note}</g>"
        )
    return parts


def _wave(sound: np.ndarray, colour: str, middle: float, rate_hz: int) -> str:
    """The lowest and the highest sample of each column of pixels, scaled to the loudest."""
    columns = max(int(len(sound) / rate_hz * PX_PER_S / _COLUMN_PX), 1)
    edges = np.linspace(0, len(sound), min(columns, len(sound)) + 1).astype(int)[:-1]
    half = _WAVE_PX / 2 / max(float(np.abs(sound).max(initial=0.0)), 1e-4)
    lows, highs = np.minimum.reduceat(sound, edges) * half, np.maximum.reduceat(sound, edges) * half
    path = "".join(
        f"M{_x(edge / rate_hz):.0f} {middle - high - 0.3:.1f}V{middle - low + 0.3:.1f}"
        for edge, low, high in zip(edges.tolist(), lows.tolist(), highs.tolist(), strict=True)
    )
    return f'<path d="{path}" stroke="{colour}" stroke-width="1.4" fill="none"/>'


def _pictures(pictures: Sequence[tuple[float, bytes]], top: float) -> list[str]:
    """A stroke for every frame, and as many of the frames as fit side by side."""
    parts: list[str] = []
    free = 0.0
    for time_s, data in pictures:
        x = _x(time_s)
        parts.append(f'<path d="M{x:.1f} {top:.1f}v{_PICTURE_PX:g}" stroke="{COLOURS[Stream.VIDEO]}" opacity="0.5"/>')
        if x >= free:
            kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
            code = base64.b64encode(data).decode()
            parts.append(
                f'<image x="{x:.1f}" y="{top:.1f}" width="{_PICTURE_PX:g}" height="{_PICTURE_PX:g}" '
                f'href="data:image/{kind};base64,{code}"/>'
            )
            free = x + _PICTURE_PX + 2
    return parts
