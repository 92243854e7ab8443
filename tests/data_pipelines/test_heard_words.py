"""Heard words stand where they end, never on an output's place, and change nothing that the model sees."""

import dataclasses
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.heard_words import with_heard_words
from tml.config import MicroTurnConfig
from tml.microturn import SPECIAL_TOKEN_NAMES, Clock, EncodedSession, EncodedText, Kind, Layout, SpecialTokens, Target
from tml.session import Stream

HOP, FRAMES, NUM_TURNS = 10, 4, 6
NUM_SAMPLES = HOP * FRAMES * NUM_TURNS
FIRST_TOKEN = 100


def layout(frames: int = FRAMES) -> Layout:
    return Layout(
        clock=Clock(turn_samples=HOP * frames, hop_samples=HOP, sample_rate_hz=200),
        turn=MicroTurnConfig(),
        special=SpecialTokens(**{name: number for number, name in enumerate(SPECIAL_TOKEN_NAMES)}),
        max_tiles_per_turn=0,
    )


def encoded(words: list[tuple[int, int]], own_starts: list[int] = []) -> EncodedSession:  # noqa: B006
    """A session of (end, number of tokens) words of the user, whose tokens count up, and of own words."""
    numbers = itertools.count(FIRST_TOKEN)
    heard = [
        EncodedText(stream=Stream.USER_AUDIO, start=end, tokens=tuple(itertools.islice(numbers, count)))
        for end, count in sorted(words)
    ]
    own = [EncodedText(stream=Stream.OWN_TEXT, start=start, tokens=(50,)) for start in sorted(own_starts)]
    return EncodedSession(
        session_id="s",
        num_samples=NUM_SAMPLES,
        levels_TM=np.zeros((NUM_SAMPLES // HOP, 1), np.uint8),
        texts=(*heard, *own),
        tiles_P=np.zeros((0, 2, 1, 1, 3), np.int16),
        tile_samples_P=np.zeros(0, np.int64),
    )


def targets_by_frame(session: EncodedSession, frames: int = FRAMES) -> dict[int, int]:
    """The heard token at each audio frame that has one."""
    plain = layout(frames).lay_out(layout(frames).contents(session))
    segment = with_heard_words(plain, session, layout(frames).clock)
    heard = segment.target_kinds == Target.HEARD
    for field in ("tokens", "kinds", "source", "turn_starts"):
        np.testing.assert_array_equal(getattr(segment, field), getattr(plain, field))
    for field in ("targets", "target_kinds"):
        np.testing.assert_array_equal(getattr(segment, field)[~heard], getattr(plain, field)[~heard])
    assert (segment.kinds[heard] == Kind.AUDIO).all()
    return dict(zip(segment.source[heard].tolist(), segment.targets[heard].tolist(), strict=True))


def test_a_word_is_due_in_the_frame_in_which_it_ends():
    # Frame 1 holds samples 10 to 19: a word that ends before sample 20 has been heard whole by its end.
    assert targets_by_frame(encoded([(20, 1)])) == {1: FIRST_TOKEN}
    assert targets_by_frame(encoded([(21, 1)])) == {2: FIRST_TOKEN}
    assert targets_by_frame(encoded([(0, 1)])) == {0: FIRST_TOKEN}


def test_the_last_frame_of_a_turn_is_left_to_the_output():
    assert targets_by_frame(encoded([(40, 1)])) == {4: FIRST_TOKEN}


def test_tokens_of_a_word_follow_one_another_and_push_the_next_word():
    assert targets_by_frame(encoded([(30, 2), (40, 1)])) == {2: 100, 4: 101, 5: 102}


def test_what_finds_no_place_before_the_end_is_left_out():
    assert targets_by_frame(encoded([(NUM_SAMPLES - 15, 3)])) == {NUM_SAMPLES // HOP - 2: 100}


def test_turns_of_one_frame_hear_nothing():
    assert targets_by_frame(encoded([(20, 1)]), frames=1) == {}


@settings(deadline=None)
@given(
    words=st.lists(st.tuples(st.integers(0, NUM_SAMPLES), st.integers(1, 3)), max_size=12),
    own_starts=st.lists(st.integers(0, NUM_SAMPLES - 60), max_size=3),
)
def test_tokens_keep_their_order_and_are_never_early(words, own_starts):
    session = encoded(words, own_starts)
    found = targets_by_frame(session)
    assert list(found.values()) == list(range(FIRST_TOKEN, FIRST_TOKEN + len(found)))
    assert all(frame % FRAMES != FRAMES - 1 for frame in found)
    first_tokens = {event.tokens[0]: event.start for event in session.texts if event.stream is Stream.USER_AUDIO}
    for frame, token in found.items():
        if token in first_tokens:
            assert (frame + 1) * HOP >= first_tokens[token]
    lost = sum(count for _, count in words) - len(found)
    free_behind = [f for f in range(NUM_SAMPLES // HOP) if f % FRAMES != FRAMES - 1 and f > max(found, default=-1)]
    late = sum(count for end, count in words if end > NUM_SAMPLES - 2 * HOP)
    assert not lost or not free_behind or late


def test_without_words_the_segment_is_the_same():
    session = encoded([], [30])
    segment = layout().lay_out(layout().contents(session))
    assert with_heard_words(segment, session, layout().clock) is segment


def test_own_words_are_not_heard():
    session = dataclasses.replace(encoded([], [30]))
    segment = layout().lay_out(layout().contents(session))
    assert not (with_heard_words(segment, session, layout().clock).target_kinds == Target.HEARD).any()
