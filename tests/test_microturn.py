import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tml.config import AudioConfig, Boundary, Control, MicroTurnConfig, Modality
from tml.microturn import (
    SPECIAL_TOKEN_NAMES,
    Clock,
    EncodedSession,
    EncodedText,
    Kind,
    Layout,
    Segment,
    SpecialTokens,
    Target,
    cut_at_turns,
)
from tml.session import SessionError, Stream

SPECIAL = SpecialTokens(**{name: number for number, name in enumerate(SPECIAL_TOKEN_NAMES)})
MARKERS = {Stream.SYSTEM: SPECIAL.system, Stream.USER_TEXT: SPECIAL.user_text, Stream.BACKGROUND: SPECIAL.background}
TURN, HOP, MAX_TILES = 12, 4, 3
NUM_SAMPLES = 100
FIRST_TOKEN, FIRST_OWN_TOKEN = 1_000, 2_000

LAYOUTS = [
    Layout(
        clock=Clock(turn_samples=TURN, hop_samples=HOP, sample_rate_hz=60),
        turn=MicroTurnConfig(
            boundary=boundary,
            control=control,
            order=order,
            max_text_in_per_turn=text_in,
            max_text_out_per_turn=text_out,
            max_action_per_turn=40,
        ),
        special=SPECIAL,
        max_tiles_per_turn=MAX_TILES,
    )
    for boundary, control, text_in, text_out, order in [
        (Boundary.TICK, Control.EXPLICIT, 5, 2, tuple(Modality)),
        (Boundary.NONE, Control.EXPLICIT, 16, 8, (Modality.VIDEO, Modality.TEXT, Modality.AUDIO)),
        (Boundary.TICK, Control.IMPLICIT, 2, 3, (Modality.TEXT, Modality.AUDIO, Modality.VIDEO)),
        (Boundary.NONE, Control.IMPLICIT, 4, 1, tuple(Modality)),
    ]
]
ROOMY = dataclasses.replace(
    LAYOUTS[0], turn=dataclasses.replace(LAYOUTS[0].turn, max_text_in_per_turn=99, max_text_out_per_turn=99)
)
layouts = st.sampled_from(LAYOUTS)


def encoded_session(texts: list[tuple[Stream, int, int]], tile_samples: list[int]) -> EncodedSession:
    """A session of (stream, start, number of tokens) events whose tokens count up, own text apart from the rest."""
    numbers, own = itertools.count(FIRST_TOKEN), itertools.count(FIRST_OWN_TOKEN)
    events = [
        EncodedText(
            stream=stream,
            start=start,
            tokens=tuple(itertools.islice(own if stream is Stream.OWN_TEXT else numbers, count)),
        )
        for stream, start, count in sorted(texts, key=lambda item: item[1])
    ]
    return EncodedSession(
        session_id="s",
        num_samples=NUM_SAMPLES,
        levels_TM=np.zeros((NUM_SAMPLES // HOP, 1), np.uint8),
        texts=tuple(events),
        tiles_P=np.zeros((len(tile_samples), 2, 1, 1, 3), np.int16),
        tile_samples_P=np.array(sorted(tile_samples), np.int64),
    )


def events(min_start: int = 0, streams: tuple[Stream, ...] = (*MARKERS, Stream.OWN_TEXT, Stream.ACTION)):
    event = st.tuples(st.sampled_from(streams), st.integers(min_start, NUM_SAMPLES - 1), st.integers(0, 4))
    return st.lists(event, max_size=8)


def tiles(min_sample: int = 0):
    return st.lists(st.integers(min_sample, NUM_SAMPLES - 1), max_size=4).filter(
        lambda samples: max(np.bincount(np.array(samples, int) // TURN), default=0) <= MAX_TILES
    )


def lay_out(layout: Layout, encoded: EncodedSession) -> Segment:
    """Lays a session out; draws that hold more text than their turns are thrown away."""
    try:
        return layout.lay_out(layout.contents(encoded))
    except SessionError:
        assume(False)
        raise


def turns_of(segment: Segment) -> list[slice]:
    return [slice(start, end) for start, end in itertools.pairwise(segment.turn_starts.tolist())]


def read_inputs(layout: Layout, segment: Segment, turn: slice, at: int, held: dict[str, list]) -> int:
    tokens, kinds = segment.tokens[turn].tolist(), segment.kinds[turn].tolist()
    for modality in layout.turn.order:
        first = at
        if modality is Modality.TEXT:
            at = read_text_in(tokens, at, held)
            continue
        at += layout.clock.frames_per_turn if modality is Modality.AUDIO else kinds.count(Kind.TILE)
        token, kind = (SPECIAL.audio, Kind.AUDIO) if modality is Modality.AUDIO else (SPECIAL.tile, Kind.TILE)
        assert all(pair == (token, kind) for pair in zip(tokens[first:at], kinds[first:at], strict=True))
        held["tiles"] += segment.source[turn][first:at].tolist() if modality is Modality.VIDEO else []
    return at


def read_text_in(tokens: list[int], at: int, held: dict[str, list]) -> int:
    streams = []
    while stream := next((stream for stream, marker in MARKERS.items() if marker == tokens[at]), None):
        streams.append(stream)
        at += 1
        while FIRST_TOKEN <= tokens[at] < FIRST_OWN_TOKEN:
            held["text_in"].append((stream, tokens[at]))
            at += 1
    assert streams == [stream for stream in MARKERS if stream in streams], "streams of text in are in their order, once"
    return at


def parse_turn(layout: Layout, segment: Segment, turn: slice) -> dict[str, list]:
    """Reads one turn in the documented order; fails where it departs from it."""
    tokens, kinds = segment.tokens[turn].tolist(), segment.kinds[turn].tolist()
    held: dict[str, list] = {"tiles": [], "text_in": [], "actions": [], "own": []}
    at = int(layout.turn.boundary is Boundary.TICK)
    assert not at or (tokens[0], kinds[0]) == (SPECIAL.tick, Kind.TOKEN)
    at = read_inputs(layout, segment, turn, at, held)
    assert set(kinds[at:]) == {Kind.TOKEN}
    held["first_out"] = [turn.start + at]
    while tokens[at] == SPECIAL.action:
        end = tokens.index(SPECIAL.end_of_text, at)
        held["actions"].append(tokens[at + 1 : end])
        at = end + 1
    if layout.turn.control is Control.EXPLICIT:
        control = tokens[at]
        assert control in (SPECIAL.listen, SPECIAL.speak)
        at += 1
        if control == SPECIAL.listen:
            assert at == len(tokens)
            return held
    while tokens[at] >= FIRST_OWN_TOKEN:
        held["own"].append(tokens[at])
        at += 1
    assert tokens[at] == SPECIAL.end_of_text
    assert at == len(tokens) - 1
    assert held["own"] or layout.turn.control is Control.IMPLICIT
    return held


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
        assert turn.stop - content["first_out"][0] <= layout.max_slots_out
        assert turn.stop > content["first_out"][0]


@settings(deadline=None, max_examples=100)
@given(layout=layouts, texts=events(), tile_samples=tiles())
def test_targets_are_the_next_output_token_of_the_same_turn(layout, texts, tile_samples):
    segment = lay_out(layout, encoded_session(texts, tile_samples))
    for turn in turns_of(segment):
        first_out = parse_turn(layout, segment, turn)["first_out"][0]
        for position in range(turn.start, turn.stop):
            if first_out - 1 <= position < turn.stop - 1:
                assert segment.targets[position] == segment.tokens[position + 1]
                assert segment.target_kinds[position] != Target.NONE
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
        if held["own"]:
            expected += [Target.SPEAK] * explicit + [Target.TEXT] * (len(held["own"]) + 1)
        else:
            expected.append(Target.LISTEN)
        kinds = segment.target_kinds[held["first_out"][0] - 1 : turn.stop - 1].tolist()
        assert kinds == expected


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
    segment = LAYOUTS[0].lay_out(LAYOUTS[0].contents(encoded), first_frame=50)
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
    assert frames.tolist() == list(range(50, 59))


def test_a_layout_without_output_is_the_input_half():
    encoded = encoded_session([(Stream.USER_TEXT, 13, 2), (Stream.OWN_TEXT, 26, 1)], [12])
    for layout in LAYOUTS:
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
