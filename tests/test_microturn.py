import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from turns import (
    FIRST_TOKEN,
    FIXED,
    LAYOUTS,
    MARKERS,
    NUM_SAMPLES,
    ROOMY,
    SPECIAL,
    TURN,
    VOICED,
    encoded_session,
    events,
    lay_out,
    layouts,
    parse_turn,
    tiles,
    turns_of,
)

from tml.config import AudioConfig, Boundary, Control, MicroTurnConfig, SlotScheme
from tml.microturn import Clock, EncodedText, Kind, Target, cut_at_turns
from tml.session import SessionError, Stream


@settings(deadline=None, max_examples=100)
@given(layout=layouts, texts=events(), tile_samples=tiles())
def test_every_turn_holds_its_slots_in_the_documented_order(layout, texts, tile_samples):
    encoded = encoded_session(texts, tile_samples)
    segment = lay_out(layout, encoded)
    turns = turns_of(segment)
    assert len(turns) == -(-NUM_SAMPLES // TURN)
    assert segment.num_slots == segment.turn_starts[-1]
    held = [parse_turn(layout, segment, turn) for turn in turns]
    audio = segment.source[segment.kinds == Kind.AUDIO]
    assert audio.tolist() == list(range(len(turns) * layout.clock.frames_per_turn))
    seen = [(turn, tile) for turn, content in enumerate(held) for tile in content["tiles"]]
    assert seen == [(sample // TURN, tile) for tile, sample in enumerate(sorted(tile_samples))]
    for turn, content in zip(turns, held, strict=True):
        assert content["first_out"][0] - turn.start <= layout.max_slots_in
        assert content["first_out"][0] - turn.start >= layout.min_slots_in
        assert layout.min_slots_out <= turn.stop - content["first_out"][0] <= layout.max_slots_out
        assert turn.stop > content["first_out"][0]
        if layout.turn.slots is SlotScheme.FIXED:
            come_and_go = len(content["tiles"]) + sum(len(payload) + 2 for payload in content["actions"])
            assert turn.stop - turn.start - come_and_go == layout.min_slots_in + layout.min_slots_out


@settings(deadline=None, max_examples=100)
@given(layout=layouts, texts=events(), tile_samples=tiles())
def test_targets_are_the_next_output_token_of_the_same_turn(layout, texts, tile_samples):
    segment = lay_out(layout, encoded_session(texts, tile_samples))
    for turn in turns_of(segment):
        first_out = parse_turn(layout, segment, turn)["first_out"][0]
        for position in range(turn.start, turn.stop):
            is_output = first_out - 1 <= position < turn.stop - 1
            if is_output and segment.kinds[position + 1] == Kind.OWN_AUDIO:
                assert (segment.targets[position], segment.target_kinds[position]) == (0, Target.AUDIO)
            elif is_output and segment.tokens[position + 1] != layout.special.pad:
                assert segment.targets[position] == segment.tokens[position + 1]
                assert segment.target_kinds[position] not in (Target.NONE, Target.AUDIO)
            else:
                assert (segment.targets[position], segment.target_kinds[position]) == (0, Target.NONE)


@settings(deadline=None, max_examples=100)
@given(layout=layouts, texts=events(), tile_samples=tiles())
def test_target_kinds_name_the_stream(layout, texts, tile_samples):
    segment = lay_out(layout, encoded_session(texts, tile_samples))
    explicit = layout.turn.control is Control.EXPLICIT
    for turn in turns_of(segment):
        held = parse_turn(layout, segment, turn)
        expected = [Target.ACTION] * sum(len(payload) + 2 for payload in held["actions"])
        voice = layout.own_positions_per_turn
        if held["speaks"]:
            end = [Target.SPEAK] if voice and not explicit else [Target.TEXT]
            expected += [Target.SPEAK] * explicit + [Target.TEXT] * len(held["own"]) + end + [Target.AUDIO] * voice
        else:
            expected.append(Target.LISTEN)
        kinds = segment.target_kinds[held["first_out"][0] - 1 : turn.stop - 1]
        assert kinds[kinds != Target.NONE].tolist() == expected
        assert len(kinds) == len(expected) or layout.turn.slots is SlotScheme.FIXED


@settings(deadline=None)
@given(texts=events(streams=(Stream.OWN_TEXT,)))
def test_a_word_is_in_the_output_that_is_heard_when_it_is_said(texts):
    encoded = encoded_session(texts, [])
    segment = lay_out(ROOMY, encoded)
    for number, turn in enumerate(turns_of(segment)):
        emitted = (number + 1) * TURN
        assert ROOMY.clock.emission_s(number) == emitted / 60
        for token in parse_turn(ROOMY, segment, turn)["own"]:
            start = next(event.start for event in encoded.texts if token in event.tokens)
            if start < TURN:
                assert number == 0
            else:
                assert emitted <= start < emitted + TURN
            assert number == ROOMY.clock.output_turn_of(start)


@settings(deadline=None, max_examples=100)
@given(layout=layouts, texts=events(streams=(Stream.OWN_TEXT,)))
def test_own_text_that_spills_stays_in_order_and_waits_only_for_full_turns(layout, texts):
    encoded = encoded_session(texts, [])
    segment = lay_out(layout, encoded)
    own = [parse_turn(layout, segment, turn)["own"] for turn in turns_of(segment)]
    limit = layout.turn.max_text_out_per_turn
    assert [token for said in own for token in said] == [token for event in encoded.texts for token in event.tokens]
    place = {token: turn for turn, said in enumerate(own) for token in said}
    for event in encoded.texts:
        due = layout.clock.output_turn_of(event.start)
        for token in event.tokens:
            assert place[token] >= due
            assert all(len(own[turn]) == limit for turn in range(due, place[token]))


@settings(deadline=None, max_examples=100)
@given(layout=layouts, texts=events(streams=tuple(MARKERS)))
def test_text_in_comes_whole_in_order_and_as_early_as_there_is_room(layout, texts):
    encoded = encoded_session(texts, [])
    segment = lay_out(layout, encoded)
    turns = [parse_turn(layout, segment, turn)["text_in"] for turn in turns_of(segment)]
    place = {token: turn for turn, content in enumerate(turns) for _, token in content}
    for stream in MARKERS:
        sent = [token for event in encoded.texts if event.stream is stream for token in event.tokens]
        assert [token for content in turns for s, token in content if s is stream] == sent
    limit = layout.turn.max_text_in_per_turn
    used = [len(content) + len({stream for stream, _ in content}) for content in turns]
    assert max(used) <= limit
    for event in encoded.texts:
        for token in event.tokens:
            due = event.start // TURN
            assert place[token] >= due
            # A turn in which it waited had no room for one token more; a new stream needs a marker, too.
            for turn in range(due, place[token]):
                marker = event.stream not in {stream for stream, _ in turns[turn]}
                assert used[turn] + marker + 1 > limit


@settings(deadline=None, max_examples=100)
@given(layout=layouts, texts=events(), tile_samples=tiles(), last_turn=st.integers(0, 7), later=st.data())
def test_nothing_before_the_end_of_a_turn_depends_on_what_comes_in_after_it(
    layout, texts, tile_samples, last_turn, later
):
    end = (last_turn + 1) * TURN
    # Own text and actions of turn k are what is heard during the turn after it.
    outputs = (Stream.OWN_TEXT, Stream.ACTION)
    known = [event for event in texts if event[1] < (end + TURN if event[0] in outputs else end)]
    other_in = later.draw(events(end, tuple(MARKERS)))
    other_out = later.draw(events(min(end + TURN, NUM_SAMPLES - 1), outputs)) if end + TURN < NUM_SAMPLES else []
    other_tiles = [sample for sample in tile_samples if sample < end] + later.draw(tiles(end))
    whole = encoded_session(texts, tile_samples)
    # The same tokens for the same events, whatever follows them.
    tokens = {
        id(event): tokens for event, tokens in zip(sorted(texts, key=lambda item: item[1]), whole.texts, strict=True)
    }
    kept = [tokens[id(event)] for event in known]
    new = [
        EncodedText(stream=stream, start=start, tokens=(5_000,) * count)
        for stream, start, count in other_in + other_out
    ]
    changed = dataclasses.replace(
        encoded_session([], other_tiles), texts=tuple(sorted([*kept, *new], key=lambda event: event.start))
    )
    before, after = lay_out(layout, whole), lay_out(layout, changed)
    size = before.turn_starts[last_turn + 1]
    assert after.turn_starts[last_turn + 1] == size
    for name in ("tokens", "kinds", "source", "targets", "target_kinds"):
        np.testing.assert_array_equal(getattr(after, name)[:size], getattr(before, name)[:size])


def test_one_session_by_hand():
    encoded = encoded_session([(Stream.USER_TEXT, 13, 2), (Stream.OWN_TEXT, 26, 1), (Stream.ACTION, 30, 1)], [12])
    encoded = dataclasses.replace(encoded, num_samples=30)
    segment = LAYOUTS[0].lay_out(LAYOUTS[0].contents(encoded))
    s, audio = SPECIAL, [SPECIAL.audio] * 3
    first = [s.tick, *audio, s.listen]
    second = [s.tick, *audio, s.tile, s.user_text, 1_000, 1_001]
    answer = [s.action, 1_002, s.end_of_text, s.speak, 2_000, s.end_of_text]
    assert segment.tokens.tolist() == [*first, *second, *answer, *first]
    assert segment.turn_starts.tolist() == [0, 5, 19, 24]
    assert segment.targets.tolist() == [0, 0, 0, s.listen, 0, *[0] * 7, *answer, 0, 0, 0, 0, s.listen, 0]
    nothing, tile = Target.NONE, [Kind.TILE]
    speaking = [Target.ACTION] * 3 + [Target.SPEAK, Target.TEXT, Target.TEXT]
    listening = [nothing] * 3 + [Target.LISTEN, nothing]
    assert segment.target_kinds.tolist() == [*listening, *[nothing] * 7, *speaking, nothing, *listening]
    token, sound = [Kind.TOKEN], [Kind.AUDIO] * 3
    assert segment.kinds.tolist() == [*token, *sound, *token, *token, *sound, *tile, *token * 9, *token, *sound, *token]
    frames = segment.source[segment.kinds == Kind.AUDIO]
    assert frames.tolist() == list(range(9))


def test_fixed_slots_by_hand():
    texts = [(Stream.USER_TEXT, 13, 2), (Stream.OWN_TEXT, 26, 1)]
    encoded = dataclasses.replace(encoded_session(texts, [12]), num_samples=30, own_audible_T=np.zeros(25, bool))
    explicit, implicit = (dataclasses.replace(FIXED[number], own_positions_per_turn=3) for number in (0, 2))
    s, pad, audio = explicit.special, [99], [SPECIAL.audio] * 3
    segment = explicit.lay_out(explicit.contents(encoded))
    silence = [s.tick, *audio, *pad * 5, s.listen, *pad * 6]
    typed = [s.tick, *audio, s.tile, s.user_text, 1_000, 1_001, *pad * 2]
    answer = [s.speak, 2_000, s.end_of_text, *pad, *audio]
    assert segment.tokens.tolist() == [*silence, *typed, *answer, *silence]
    # The last input, [speak] and the word have the next token as target; the position before own audio has its mel.
    last = 16 + len(typed) - 1
    assert np.flatnonzero(segment.targets).tolist() == [8, last, last + 1, last + 2, 33 + 8]
    assert segment.targets[[8, last, last + 1, last + 2]].tolist() == [s.listen, *answer[:3]]
    assert np.flatnonzero(segment.target_kinds == Target.AUDIO).tolist() == [last + 4, last + 5, last + 6]
    assert segment.source[segment.kinds == Kind.OWN_AUDIO].tolist() == [6, 7, 8]
    segment = implicit.lay_out(implicit.contents(dataclasses.replace(encoded, texts=encoded.texts[1:])))
    silence = [s.tick, *pad * 2, *audio, s.end_of_text, *pad * 6]
    assert segment.tokens.tolist() == [
        *silence, s.tick, *pad * 2, *audio, s.tile, 2_000, s.speak, *pad * 2, *audio, *silence
    ]  # fmt: skip


def test_a_layout_without_output_is_the_input_half():
    encoded = encoded_session([(Stream.USER_TEXT, 13, 2), (Stream.OWN_TEXT, 26, 1)], [12])
    for layout in [*LAYOUTS, *VOICED, *FIXED]:
        contents = dataclasses.replace(layout.contents(encoded), out=np.zeros((0, 3), np.int32))
        inputs, whole = layout.lay_out(contents), layout.lay_out(layout.contents(encoded))
        for short, full in zip(turns_of(inputs), turns_of(whole), strict=True):
            first_out = parse_turn(layout, whole, full)["first_out"][0]
            np.testing.assert_array_equal(inputs.tokens[short], whole.tokens[full.start : first_out])
        assert (inputs.target_kinds == Target.NONE).all()


def test_a_turn_that_listens_is_one_token():
    quiet = encoded_session([], [])
    for layout, listening in zip(LAYOUTS, [SPECIAL.listen] * 2 + [SPECIAL.end_of_text] * 2, strict=True):
        segment = layout.lay_out(layout.contents(quiet))
        size = (layout.turn.boundary is Boundary.TICK) + 3 + 1
        assert np.diff(segment.turn_starts).tolist() == [size] * 9
        assert segment.tokens[segment.turn_starts[1:] - 1].tolist() == [listening] * 9
        assert (segment.target_kinds == Target.LISTEN).sum() == 9


@pytest.mark.parametrize(
    ("texts", "tile_samples", "message"),
    [
        ([], [13, 14, 15, 23], "4 tiles in one turn.*max_tiles_per_turn = 3"),
        ([(Stream.SYSTEM, 0, 37)], [], "text in does not fit in its 9 turns.*max_text_in_per_turn = 5"),
        ([(Stream.OWN_TEXT, 0, 19)], [], "own text does not fit in its 9 turns.*max_text_out_per_turn = 2"),
        ([(Stream.OWN_TEXT, 96, 5)], [], "own text does not fit"),
        ([(Stream.ACTION, 14, 20), (Stream.ACTION, 15, 17)], [], "41 tokens of actions.*max_action_per_turn = 40"),
    ],
)
def test_what_does_not_fit_is_an_error(texts, tile_samples, message):
    with pytest.raises(SessionError, match=f"session s.*{message}"):
        LAYOUTS[0].contents(encoded_session(texts, tile_samples))


JUST_FITS = [[(Stream.SYSTEM, 0, 36)], [(Stream.OWN_TEXT, 0, 18)], [(Stream.OWN_TEXT, 96, 4)]]


@pytest.mark.parametrize("texts", [*JUST_FITS, [(Stream.ACTION, 14, 19), (Stream.ACTION, 15, 17)]])
def test_what_just_fits_is_laid_out(texts):
    encoded = encoded_session(texts, [13, 14, 15])
    segment = LAYOUTS[0].lay_out(LAYOUTS[0].contents(encoded))
    wanted = sum(len(event.tokens) for event in encoded.texts)
    assert (segment.tokens >= FIRST_TOKEN).sum() == wanted


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=20), max_slots=st.integers(9, 30))
def test_cutting_never_splits_a_turn_and_fills_the_rows(sizes, max_slots):
    turn_starts = np.cumsum([0, *sizes]).astype(np.int32)
    parts = cut_at_turns(turn_starts, max_slots)
    starts = set(turn_starts.tolist())
    assert parts[0][0] == 0
    assert parts[-1][1] == turn_starts[-1]
    for start, end in parts:
        assert {start, end} <= starts
        assert 0 < end - start <= max_slots
    for (_, end), (start, _) in itertools.pairwise(parts):
        assert start == end
        next_turn = turn_starts[np.searchsorted(turn_starts, end) + 1]
        assert next_turn - max(s for s, e in parts if e == end) > max_slots


def test_a_turn_longer_than_a_row_is_an_error():
    with pytest.raises(SessionError, match=r"takes 8 slots, data\.row_slots is 7"):
        cut_at_turns(np.array([0, 3, 11], np.int32), 7)


def test_a_document_is_learnt_from_its_marker_to_its_end():
    segment = LAYOUTS[0].lay_out_document([7_000, 7_001])
    row = [SPECIAL.document, 7_000, 7_001, SPECIAL.end_of_text]
    assert segment.tokens.tolist() == row
    assert segment.targets.tolist() == [*row[1:], 0]
    assert segment.target_kinds.tolist() == [Target.DOCUMENT] * 3 + [Target.NONE]
    assert segment.kinds.tolist() == [Kind.TOKEN] * 4
    assert segment.turn_starts.tolist() == [0, 4]


@pytest.mark.parametrize("turn_ms", [50, 100, 200, 1_000])
def test_the_clock(turn_ms):
    clock = Clock.of(MicroTurnConfig(turn_ms=turn_ms), AudioConfig())
    turn_samples = 16 * turn_ms
    assert (clock.turn_samples, clock.frames_per_turn) == (turn_samples, turn_ms // 50)
    assert [clock.num_turns(n) for n in (0, 1, turn_samples, turn_samples + 1)] == [0, 1, 1, 2]
    assert [clock.turn_of(n) for n in (0, turn_samples - 1, turn_samples)] == [0, 0, 1]
    assert [clock.output_turn_of(n) for n in (0, turn_samples, 2 * turn_samples - 1, 2 * turn_samples)] == [0, 0, 0, 1]
    assert clock.emission_s(0) == turn_ms / 1000
