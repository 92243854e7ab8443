import io
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from tml import timeline
from tml.codec.waveform import encode_clip
from tml.config import AudioConfig, MicroTurnConfig
from tml.microturn import Clock
from tml.session import Expectation, ExpectationKind, Session, Stream, TextEvent, VideoFrame, Word
from tml.timeline import draw_timeline, timeline_text

CLOCK = Clock.of(MicroTurnConfig(), AudioConfig())


def session(seconds: float = 3.0, rate: int = 16_000, **changes) -> Session:
    size = int(seconds * rate)
    sound = np.sin(np.arange(size) / 20).astype(np.float32) * np.linspace(0, 0.5, size, dtype=np.float32)
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(picture, "PNG")
    fields = {
        "session_id": "request-7",
        "sample_rate_hz": rate,
        "num_samples": size,
        "streams": (Stream.USER_AUDIO, Stream.VIDEO, Stream.USER_TEXT, Stream.OWN_TEXT, Stream.ACTION),
        "audio": {Stream.USER_AUDIO: encode_clip(sound, rate)},
        "frames": tuple(VideoFrame(sample=i * rate // 10, data=picture.getvalue()) for i in range(2)),
        "texts": (
            TextEvent(stream=Stream.USER_TEXT, start=rate // 2, end=rate // 2, text="costs $5\nor $6"),
            TextEvent(stream=Stream.ACTION, start=2 * rate, end=2 * rate, text='{"call": 1}'),
            TextEvent(stream=Stream.OWN_TEXT, start=2 * rate + 1, end=2 * rate + 2_000, text="seven"),
        ),
        "expectations": (
            Expectation(kind=ExpectationKind.SILENCE, start=rate, end=rate + 8_000 * rate // 16_000, tag="pause"),
            Expectation(kind=ExpectationKind.ANSWER, start=0, end=int(1.7 * rate), text="seven", tag="digit"),
        ),
        "user_words": (
            Word(text="say", start=rate // 4, end=rate // 2),
            Word(text="seven", start=rate, end=2 * rate),
        ),
        "meta": {
            "voice": "en+f3",
        },
    }
    result = Session(**{**fields, **changes})
    result.check()
    return result


@pytest.mark.parametrize("rate", [16_000, 8_000])
def test_text_has_one_line_for_each_tick_with_something_in_it(rate):
    assert timeline_text(session(rate=rate), CLOCK).splitlines() == [
        f"request-7: 3.0 s at {rate} Hz, user_audio, video, user_text, own_text, action",
        "tick    0    0.0 s  video: 2 frames",
        "tick    1    0.2 s  user: say",
        "tick    2    0.4 s  user text: costs $5 or $6",
        "tick    5    1.0 s  user: seven | expected: silence for 0.5 s",
        "tick    8    1.6 s  expected: seven",
        'tick   10    2.0 s  action: {"call": 1} | own text: seven',
    ]


def pixels_of(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def dark_blues(pixels):
    """Pixels of the colour of the user's lane."""
    return int((np.abs(pixels.astype(int) - (0x33, 0x65, 0x8A)).max(axis=-1) < 60).sum())


def test_picture_grows_with_the_session_and_shows_what_is_in_it(tmp_path):
    for name, seconds in (("short", 3.0), ("long", 25.0)):
        draw_timeline(session(seconds), tmp_path / f"{name}.png", CLOCK)
    short, long = pixels_of(tmp_path / "short.png"), pixels_of(tmp_path / "long.png")
    assert short.shape[1] == long.shape[1] == 1_540
    assert long.shape[0] > 2 * short.shape[0]
    assert (short == (200, 30, 30)).all(axis=-1).sum() > 1_000, "the first frame is shown"
    silent = session(
        3.0, audio={}, user_words=(), streams=(Stream.VIDEO, Stream.USER_TEXT, Stream.OWN_TEXT, Stream.ACTION)
    )
    draw_timeline(silent, tmp_path / "silent.png", CLOCK)
    assert dark_blues(short) > 10_000 > dark_blues(pixels_of(tmp_path / "silent.png"))


def test_a_session_with_nothing_in_it_can_be_drawn(tmp_path):
    empty = Session(session_id="empty", sample_rate_hz=16_000, num_samples=0, streams=())
    draw_timeline(empty, tmp_path / "empty.png", CLOCK)
    assert pixels_of(tmp_path / "empty.png").shape[1] == 1_540
    assert timeline_text(empty, CLOCK) == "empty: 0.0 s at 16000 Hz, "


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 9.9), st.floats(0, 2), st.text("abcW ", min_size=1, max_size=20)), max_size=25))
def test_labels_never_overlap(words):
    marks = tuple(
        timeline._Mark(start_s=start, end_s=start + length, label=text, colour="black")
        for start, length, text in sorted(words)
    )
    figure = Figure(figsize=(14, 1), dpi=timeline._DPI)
    FigureCanvasAgg(figure)
    panel = timeline._place_panel(figure, [timeline._Lane(name="own text", colour="black", marks=marks)], 0.0, 10.0)
    spans: dict[int, list[tuple[float, float]]] = {}
    for mark, line, at in panel.placed[0]:
        width_s = timeline._text_width_in(figure, mark.label) / panel.inches_per_s
        assert at + width_s <= 10.0 + 1e-6, "labels end inside the panel"
        spans.setdefault(line, []).append((at, at + width_s))
    assert sum(map(len, spans.values())) == len(marks)
    for line in spans.values():
        assert all(end <= start + 1e-9 for (_, end), (start, _) in itertools.pairwise(line))
