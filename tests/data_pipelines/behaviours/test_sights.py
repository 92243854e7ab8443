"""Films: what is counted and waited for can be seen where it is expected, and distractors are there."""

import io
import itertools

import numpy as np
import pytest
from performances import NUM_PER_SPLIT, RATE, both_splits, task_of
from PIL import Image

from data_pipelines.behaviours import sights
from data_pipelines.behaviours.cast import held_out_pairs
from data_pipelines.behaviours.drawing import (
    FRAME_SAMPLES,
    HEIGHT_PX,
    RGB,
    WIDTH_PX,
    Actor,
    bouncing,
    changing,
    draw,
    drifting,
    film,
    flashing,
    inside,
    standing,
)
from data_pipelines.behaviours.vocabulary import COLOURS, SHAPES
from tml.codec.video import group_frames, tiles_of_frames
from tml.config import VideoConfig
from tml.session import Behaviour, ExpectationKind, Session

KIND = ExpectationKind


def pixels(frame) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(frame.data)).convert("RGB")).astype(int)


def near(picture: np.ndarray, colour: str) -> int:
    """How many pixels have about that colour."""
    return int((np.abs(picture - RGB[colour]).max(axis=-1) <= 20).sum())


def test_frames_come_five_times_a_second_and_fill_the_session():
    for session in both_splits(Behaviour.COUNTING):
        samples = [frame.sample for frame in session.frames]
        assert samples[0] < FRAME_SAMPLES
        assert set(np.diff(samples)) == {FRAME_SAMPLES}
        assert samples[-1] + FRAME_SAMPLES >= session.num_samples
        assert pixels(session.frames[0]).shape == (HEIGHT_PX, WIDTH_PX, 3)


def test_two_frames_take_one_tile():
    (session, *_) = both_splits(Behaviour.PROACTIVE)
    frames = np.stack([pixels(frame) for frame in session.frames[:4]]).astype(np.uint8)
    assert len(tiles_of_frames(frames, VideoConfig())) == 2
    samples = [frame.sample for frame in session.frames]
    groups = group_frames(samples, [(HEIGHT_PX, WIDTH_PX)] * len(samples), session.num_samples, RATE, VideoConfig())
    assert all(group.last - group.first == 2 for group in groups[:-1])


def test_every_counted_bounce_is_at_the_floor_in_the_frame_of_its_event():
    """Above row 30 hang the lamp and the resting ball; only a ball on the floor (or a drifting triangle) is lower."""
    events, rests = [], []
    for session in both_splits(Behaviour.COUNTING):
        bounces = [e.start for e in session.expectations if e.kind is KIND.SAY and e.tag == "bounces"]
        for frame in session.frames:
            low = bool((pixels(frame)[30].max(axis=-1) > 70).any())
            if frame.sample in bounces:
                events.append(low)
            elif bounces and frame.sample < bounces[0] - 2 * FRAME_SAMPLES:
                rests.append(low)
    assert len(events) > 10
    assert all(events)
    assert np.mean(rests) < 0.4


def test_every_counted_flash_begins_in_the_frame_of_its_event():
    flashes = 0
    for session in both_splits(Behaviour.COUNTING):
        frames = {frame.sample: frame for frame in session.frames}
        for event in (e for e in session.expectations if e.kind is KIND.SAY and e.tag == "flashes"):
            change = np.abs(pixels(frames[event.start]) - pixels(frames[event.start - FRAME_SAMPLES])).max(axis=-1)
            assert (change > 50).sum() > 50
            flashes += 1
    assert flashes > 10


def test_the_count_is_the_number_of_events():
    numbers = set()
    for session in both_splits(Behaviour.COUNTING):
        events = [e for e in session.expectations if e.kind is KIND.SAY]
        counts = [e for e in session.expectations if e.kind is KIND.COUNT]
        if counts:
            numbers.add(len(events))
            assert counts[0].text == events[-1].text
            assert [e.text for e in events] == ["one", "two", "three", "four", "five", "six", "seven", "eight"][
                : len(events)
            ]
    assert len(numbers) >= 5


def test_the_colour_that_is_waited_for_appears_when_it_is_expected():
    checked = 0
    for session in both_splits(Behaviour.PROACTIVE):
        for item in (e for e in session.expectations if e.kind is KIND.SAY):
            before = [f for f in session.frames if item.start - 3 * FRAME_SAMPLES <= f.sample < item.start]
            now = next(f for f in session.frames if f.sample == item.start)
            # The watched shape has a radius of 8 pixels or more, the other one less than 6.
            assert near(pixels(now), item.text) - max(near(pixels(f), item.text) for f in before) > 60
            checked += 1
    assert checked >= 8


def test_a_rival_may_turn_the_colour_without_being_meant():
    found = 0
    # In training half of the sessions wait for something else.
    further = [task_of(Behaviour.PROACTIVE).session("heldout", NUM_PER_SPLIT + i) for i in range(NUM_PER_SPLIT)]
    for session in [*both_splits(Behaviour.PROACTIVE), *further]:
        due = min((e.start for e in session.expectations if e.kind is KIND.SAY), default=session.num_samples)
        silent = [e for e in session.expectations if e.kind is KIND.SILENCE and e.tag in ("not_yet", "never")]
        spans = [e for e in silent if e.start < due]
        words = [word.text for word in session.user_words]
        if "turns" not in words or "anything" in words:
            continue
        colour = words[words.index("turns") + 1]
        found += any(
            near(pixels(f), colour) > 20 for f in session.frames for span in spans if span.start <= f.sample < span.end
        )
    assert found >= 2


def pairs_shown(session: Session, seen: list[Actor]) -> set[tuple[int, int]]:
    """(Shape, colour) of all that a session's frames show."""
    frames = range(len(session.frames))
    return {(SHAPES.index(actor.shape), COLOURS.index(actor.colour(i))) for actor in seen for i in frames}


def test_a_held_out_pair_is_shown_in_training_only_where_no_pair_is_waited_for(monkeypatch):
    seen = []
    monkeypatch.setattr(sights, "film", lambda actors, *rest: seen.append(actors) or film(actors, *rest))
    held_out = held_out_pairs(len(SHAPES), len(COLOURS))
    waiting, others = set(), set()
    for index in range(60):
        session = task_of(Behaviour.PROACTIVE).session("train", index)
        words = {word.text for word in session.user_words}
        shown = pairs_shown(session, seen[-1])
        if "turns" in words and "anything" not in words:
            waiting |= shown
        elif words & {"anything", "changes"}:
            others |= shown
    assert waiting == {*itertools.product(range(len(SHAPES)), range(len(COLOURS)))} - held_out
    assert others >= held_out


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
def test_shapes_are_as_large_as_their_radius(shape):
    rows, columns = np.nonzero(inside(shape, 8.0, (20.0, 19.0)))
    assert 14 <= rows.max() - rows.min() + 1 <= 17
    assert 14 <= columns.max() - columns.min() + 1 <= 17
    with pytest.raises(ValueError, match="'star' is not one of"):
        inside("star", 8.0, (20.0, 19.0))


def test_a_ball_is_on_the_floor_at_its_bounces_only():
    place = bouncing([5, 9, 14], 10.0, 35.0, 18.0)
    heights = [place(frame)[0] for frame in range(20)]
    assert [frame for frame, y in enumerate(heights) if y == 35.0] == [5, 9, 14]
    assert heights[0] == heights[-1] == 17.0
    assert min(heights) >= 17.0


def test_lamps_and_colours_change_on_their_frames():
    lamp = flashing([3, 7], 2, "red")
    assert [lamp(frame) for frame in range(9)] == [
        "grey", "grey", "grey", "red", "red", "grey", "grey", "red", "red",
    ]  # fmt: skip
    colour = changing([(0, "red"), (4, "blue")])
    assert (colour(3), colour(4), colour(99)) == ("red", "blue", "blue")


def test_drifting_stays_inside():
    place = drifting((10.0, 10.0), (1.5, -1.1), 4.0)
    places = np.array([place(frame) for frame in range(200)])
    assert places.min() >= 4.0
    assert places[:, 0].max() <= HEIGHT_PX - 5
    assert places[:, 1].max() <= WIDTH_PX - 5
    assert np.ptp(places[:, 0]) > 25


def test_a_film_is_the_same_every_time():
    actor = Actor(shape="circle", radius_px=5.0, place=standing(20.0, 20.0), colour=changing([(0, "red")]))
    one, other = (film([actor], 16_000, 100, (9, 9, 9)) for _ in range(2))
    assert one == other
    assert len(one) == 5
    assert tuple(draw([actor], 0, (9, 9, 9))[20, 20]) == RGB["red"]
