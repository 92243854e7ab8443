"""A session as a picture and as text: who spoke when, on the sample clock, with the grid of micro-turns.

Sessions of a data set and sessions that were streamed look the same. Words stand where they begin;
words that would overlap move to another line.
"""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tml.codec.waveform import decode_clip
from tml.microturn import Clock
from tml.session import ExpectationKind, Session, SessionError, Stream, TextEvent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH_IN, _LEFT_IN, _RIGHT_IN = 14.0, 1.25, 0.25
_TITLE_IN, _AXIS_IN, _LINE_IN, _WAVE_IN, _GAP_IN = 0.45, 0.42, 0.2, 0.5, 0.12
_LABEL_SHIFT_IN = 0.03
_TITLE_LETTERS = 115
_PANEL_S, _MAX_PANELS, _MAX_LABEL = 12.0, 40, 56
_DPI, _FONT_POINTS = 110, 8.5
COLOURS = {
    Stream.USER_AUDIO: "#33658a",
    Stream.VIDEO: "#5b5f97",
    Stream.SYSTEM: "#6b705c",
    Stream.USER_TEXT: "#2a7f9e",
    Stream.BACKGROUND: "#8a5a83",
    Stream.OWN_TEXT: "#b5500b",
    Stream.OWN_AUDIO: "#b5500b",
    Stream.ACTION: "#9b2226",
}
_QUIET = (ExpectationKind.SILENCE, ExpectationKind.STOP, ExpectationKind.NO_ACTION)
_EXPECTATION_COLOURS = {kind: "#5c677d" if kind in _QUIET else "#4f772d" for kind in ExpectationKind}
NAMES = {
    Stream.USER_AUDIO: "user",
    Stream.VIDEO: "video",
    Stream.SYSTEM: "system",
    Stream.USER_TEXT: "user text",
    Stream.BACKGROUND: "background",
    Stream.OWN_TEXT: "own text",
    Stream.OWN_AUDIO: "own audio",
    Stream.ACTION: "action",
}


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """A labelled span of a lane, in seconds."""

    start_s: float
    end_s: float
    label: str
    colour: str


@dataclass(frozen=True, kw_only=True)
class _Lane:
    """One horizontal band: marks, and perhaps a waveform or pictures."""

    name: str
    colour: str
    marks: tuple[_Mark, ...] = ()
    samples: np.ndarray | None = None
    pictures: tuple[tuple[float, bytes], ...] = field(default=(), repr=False)


def timeline_text(session: Session, clock: Clock) -> str:
    """The session as text: a line about it, then one line for every tick in which something begins.

    Example:
        request-7: 6.4 s at 16000 Hz, user_audio, own_text
        tick   4    0.8 s  user: say
        tick  12    2.4 s  own text: seven
    """
    rate = session.sample_rate_hz
    said: dict[int, dict[str, list[str]]] = {}

    def add(sample: int, name: str, text: str) -> None:
        tick = sample * clock.sample_rate_hz // rate // clock.turn_samples
        said.setdefault(tick, {}).setdefault(name, []).append(text)

    for word in session.user_words:
        add(word.start, NAMES[Stream.USER_AUDIO], word.text)
    for frame in session.frames:
        add(frame.sample, NAMES[Stream.VIDEO], "frame")
    for event in session.texts:
        add(event.start, NAMES[event.stream], " ".join(event.text.split()))
    for item in session.expectations:
        if item.kind is ExpectationKind.ANSWER:
            add(item.end, "expected", item.text)
        else:
            what = " ".join(filter(None, (item.kind.value.replace("_", " "), item.text)))
            add(item.start, "expected", f"{what} for {(item.end - item.start) / rate:.1f} s")
    streams = ", ".join(stream.value for stream in session.streams)
    lines = [f"{session.session_id}: {session.duration_s:.1f} s at {rate} Hz, {streams}"]
    for tick, names in sorted(said.items()):
        begins_s = tick * clock.turn_samples / clock.sample_rate_hz
        what = " | ".join(f"{name}: {_counted(texts)}" for name, texts in names.items())
        lines.append(f"tick {tick:4d} {begins_s:6.1f} s  {what}")
    return "\n".join(lines)


def _counted(texts: list[str]) -> str:
    return f"{len(texts)} frames" if set(texts) == {"frame"} and len(texts) > 1 else " ".join(texts)


def draw_timeline(session: Session, path: Path | str, clock: Clock) -> None:
    """Draws the session as a PNG: lanes of sound, pictures and text over seconds, with the grid of ticks.

    Sessions longer than 12 s continue on further panels below.

    Raises:
        SessionError: sound or pictures that cannot be decoded.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    duration_s = max(session.duration_s, clock.turn_samples / clock.sample_rate_hz)
    num_panels = min(math.ceil(duration_s / _PANEL_S - 1e-9), _MAX_PANELS)
    tick_s = clock.turn_samples / clock.sample_rate_hz
    panel_s = math.ceil(duration_s / num_panels / tick_s - 1e-9) * tick_s
    starts_s = [i * panel_s for i in range(num_panels)]
    lanes = _lanes(session)
    figure = Figure(figsize=(_WIDTH_IN, 1.0), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    panels = [_place_panel(figure, lanes, start_s, panel_s) for start_s in starts_s]
    height_in = _TITLE_IN + sum(sum(panel.heights) + _AXIS_IN for panel in panels)
    figure.set_size_inches(_WIDTH_IN, height_in)
    figure.text(
        0.15 / _WIDTH_IN, 1 - 0.2 / height_in, _title(session), fontsize=10.5, fontweight="bold", va="center", ha="left"
    )
    top_in = _TITLE_IN
    for panel in panels:
        tall_in = sum(panel.heights)
        axes = figure.add_axes(
            (
                _LEFT_IN / _WIDTH_IN,
                1 - (top_in + tall_in) / height_in,
                (_WIDTH_IN - _LEFT_IN - _RIGHT_IN) / _WIDTH_IN,
                tall_in / height_in,
            )
        )
        _draw_panel(axes, panel, lanes, session, clock)
        top_in += tall_in + _AXIS_IN
    figure.savefig(path, format="png")


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """A span of time: for each lane its height in inches, and each mark with its line and label position."""

    start_s: float
    length_s: float
    heights: list[float]
    placed: list[list[tuple[_Mark, int, float]]]

    @property
    def inches_per_s(self) -> float:
        """How wide a second is."""
        return (_WIDTH_IN - _LEFT_IN - _RIGHT_IN) / self.length_s


def _title(session: Session) -> str:
    facts = [f"{key} {value}" for key, value in session.meta.items() if value]
    text = "  ·  ".join([session.session_id, f"{session.duration_s:.1f} s", *facts])
    return text if len(text) <= _TITLE_LETTERS else text[: _TITLE_LETTERS - 1] + "…"


def _lanes(session: Session) -> list[_Lane]:
    rate = session.sample_rate_hz

    def seconds(words: Iterable[tuple[str, int, int]], colour: str) -> tuple[_Mark, ...]:
        return tuple(_Mark(start_s=a / rate, end_s=b / rate, label=text, colour=colour) for text, a, b in words)

    def texts(stream: Stream) -> tuple[_Mark, ...]:
        return seconds(((_label(e), e.start, e.end) for e in session.texts_of(stream)), COLOURS[stream])

    lanes: list[_Lane] = []
    for stream in Stream:
        heard = ((word.text, word.start, word.end) for word in session.user_words)
        marks = seconds(heard, COLOURS[stream]) if stream is Stream.USER_AUDIO else texts(stream)
        clip = session.audio.get(stream)
        pictures = tuple((f.sample / rate, f.data) for f in session.frames) if stream is Stream.VIDEO else ()
        if marks or clip or pictures:
            samples = decode_clip(clip, rate) if clip else None
            lanes.append(
                _Lane(name=NAMES[stream], colour=COLOURS[stream], marks=marks, samples=samples, pictures=pictures)
            )
    expected = tuple(
        _Mark(
            start_s=item.start / rate,
            end_s=item.end / rate,
            label=" ".join(filter(None, (item.kind.value, item.text, f"({item.tag})" if item.tag else ""))),
            colour=_EXPECTATION_COLOURS[item.kind],
        )
        for item in session.expectations
    )
    if expected or not lanes:
        lanes.append(_Lane(name="expected", colour=_EXPECTATION_COLOURS[ExpectationKind.ANSWER], marks=expected))
    return lanes


def _label(event: TextEvent) -> str:
    text = " ".join(event.text.split())
    return text if len(text) <= _MAX_LABEL else text[: _MAX_LABEL - 1] + "…"


def _place_panel(figure: "Figure", lanes: Sequence[_Lane], start_s: float, length_s: float) -> _Panel:
    """Gives every mark of a panel a line on which its label overlaps no other."""
    inches_per_s = (_WIDTH_IN - _LEFT_IN - _RIGHT_IN) / length_s
    heights, placed = [], []
    for lane in lanes:
        line_ends: list[float] = []
        lane_placed: list[tuple[_Mark, int, float]] = []
        for mark in sorted(lane.marks, key=lambda mark: mark.start_s):
            if mark.start_s >= start_s + length_s or max(mark.end_s, mark.start_s + 1e-6) <= start_s:
                continue
            label_s = (_text_width_in(figure, mark.label) + _LABEL_SHIFT_IN + 0.05) / inches_per_s
            begin = max(mark.start_s, start_s)
            at = max(start_s, min(begin, start_s + length_s - label_s))
            end = max(at + label_s, min(mark.end_s, start_s + length_s))
            line = next((i for i, taken in enumerate(line_ends) if taken <= at + 1e-9), len(line_ends))
            line_ends[line : line + 1] = [end]
            lane_placed.append((mark, line, at))
        body = _WAVE_IN if lane.samples is not None or lane.pictures else 0.0
        heights.append(body + _LINE_IN * max(len(line_ends), 0 if body else 1) + _GAP_IN)
        placed.append(lane_placed)
    return _Panel(start_s=start_s, length_s=length_s, heights=heights, placed=placed)


def _text_width_in(figure: "Figure", text: str) -> float:
    from matplotlib.font_manager import FontProperties

    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    width, _, _ = renderer.get_text_width_height_descent(text, FontProperties(size=_FONT_POINTS), False)
    return width / _DPI


def _draw_panel(axes: "Axes", panel: _Panel, lanes: Sequence[_Lane], session: Session, clock: Clock) -> None:
    end_s, total = panel.start_s + panel.length_s, sum(panel.heights)
    axes.set_xlim(panel.start_s, end_s)
    axes.set_ylim(total, 0)
    tick_s = clock.turn_samples / clock.sample_rate_hz
    first, last = math.ceil(panel.start_s / tick_s - 1e-9), math.floor(end_s / tick_s + 1e-9)
    axes.vlines([k * tick_s for k in range(first, last + 1)], 0, total, color="#e4e6eb", linewidth=0.6, zorder=0)
    if end_s > session.duration_s:
        axes.axvspan(session.duration_s, end_s, color="#f3f4f6", zorder=0)
    centres, top = [], 0.0
    for lane, height, marks in zip(lanes, panel.heights, panel.placed, strict=True):
        axes.axhspan(top, top + height, color=lane.colour, alpha=0.05, linewidth=0, zorder=0)
        axes.axhline(top + height, color="#c9ccd3", linewidth=0.6, zorder=1)
        for mark, line, at in marks:
            label_at = at + _LABEL_SHIFT_IN / panel.inches_per_s
            _draw_mark(axes, mark, label_at, top + _GAP_IN / 2 + _LINE_IN * line, end_s)
        middle = top + height - _GAP_IN / 2 - _WAVE_IN / 2
        if lane.samples is not None:
            _draw_wave(axes, lane, middle, panel, session.sample_rate_hz)
        if lane.pictures:
            _draw_pictures(axes, lane, middle, panel)
        centres.append(top + height / 2)
        top += height
    axes.set_yticks(centres, [lane.name for lane in lanes], fontsize=9.5)
    for label, lane in zip(axes.get_yticklabels(), lanes, strict=True):
        label.set_color(lane.colour)
    axes.tick_params(axis="y", length=0, pad=6)
    axes.set_xticks(range(math.ceil(panel.start_s - 1e-9), math.floor(end_s + 1e-9) + 1))
    axes.tick_params(axis="x", labelsize=8.5, length=3, color="#8b8f98")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")
    for side in axes.spines.values():
        side.set_color("#c9ccd3")


def _draw_mark(axes: "Axes", mark: _Mark, at: float, top: float, end_s: float) -> None:
    base = top + _LINE_IN - 0.03
    axes.plot([mark.start_s, min(mark.end_s, end_s)], [base, base], color=mark.colour, linewidth=1.6, alpha=0.75)
    axes.plot([mark.start_s, mark.start_s], [base - 0.08, base], color=mark.colour, linewidth=1.2)
    axes.text(
        at,
        base - 0.035,
        mark.label,
        fontsize=_FONT_POINTS,
        color=mark.colour,
        va="bottom",
        ha="left",
        clip_on=True,
        parse_math=False,
    )


def _draw_wave(axes: "Axes", lane: _Lane, middle: float, panel: _Panel, rate: int) -> None:
    """The lowest and the highest sample of each column of pixels."""
    assert lane.samples is not None
    loudest = max(float(np.abs(lane.samples).max(initial=0.0)), 1e-4)
    piece = lane.samples[int(panel.start_s * rate) : int((panel.start_s + panel.length_s) * rate)]
    if not len(piece):
        return
    columns = min(int(_WIDTH_IN * _DPI), len(piece))
    edges = np.linspace(0, len(piece), columns + 1).astype(int)[:-1]
    times = panel.start_s + edges / rate
    half = _WAVE_IN / 2 / loudest
    low, high = np.minimum.reduceat(piece, edges), np.maximum.reduceat(piece, edges)
    axes.fill_between(
        times, middle - high * half, middle - low * half, color=lane.colour, alpha=0.8, linewidth=0.3, zorder=2
    )


def _draw_pictures(axes: "Axes", lane: _Lane, middle: float, panel: _Panel) -> None:
    """A line for every frame, and as many frames as fit side by side."""
    from PIL import Image

    inches_per_s, free = panel.inches_per_s, panel.start_s
    for time_s, data in lane.pictures:
        if not panel.start_s <= time_s < panel.start_s + panel.length_s:
            continue
        axes.plot([time_s] * 2, [middle - _WAVE_IN / 2, middle + _WAVE_IN / 2], color=lane.colour, linewidth=0.8)
        try:
            picture = Image.open(io.BytesIO(data))
        except OSError as error:
            raise SessionError(f"the video frame at {time_s:.2f} s cannot be decoded: {error}") from error
        with picture:
            wide_s = _WAVE_IN * picture.width / picture.height / inches_per_s
            if time_s < free or time_s + wide_s > panel.start_s + panel.length_s:
                continue
            pixels = np.asarray(picture.convert("RGB").resize((round(64 * picture.width / picture.height), 64)))
        extent = (time_s, time_s + wide_s, middle + _WAVE_IN / 2, middle - _WAVE_IN / 2)
        axes.imshow(pixels, extent=extent, aspect="auto", zorder=3)
        free = time_s + wide_s + 0.02 / inches_per_s
