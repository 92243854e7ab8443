"""Layouts of every kind, drawn sessions, and a reader of turns in the documented order; for tests of the layout."""

import dataclasses
import itertools

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from tml.config import Boundary, Control, MicroTurnConfig, Modality, SlotScheme
from tml.microturn import SPECIAL_TOKEN_NAMES, Clock, EncodedSession, EncodedText, Kind, Layout, Segment, SpecialTokens
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
FIXED = [
    dataclasses.replace(
        layout,
        turn=dataclasses.replace(layout.turn, slots=SlotScheme.FIXED),
        special=dataclasses.replace(SPECIAL, pad=99),
        own_positions_per_turn=own,
    )
    for layout, own in zip(LAYOUTS, [0, TURN // HOP, 0, TURN // HOP], strict=True)
]
VOICED = [dataclasses.replace(layout, own_positions_per_turn=TURN // HOP) for layout in (LAYOUTS[0], LAYOUTS[2])]
AUDIBLE = np.arange(NUM_SAMPLES // HOP) % 10 == 7
"""Hops whose own audio can be heard, also in turns without a word."""
ROOMY = dataclasses.replace(
    LAYOUTS[0], turn=dataclasses.replace(LAYOUTS[0].turn, max_text_in_per_turn=99, max_text_out_per_turn=99)
)
layouts = st.sampled_from([*LAYOUTS, *VOICED, *FIXED])


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
        own_mels_TY=np.zeros((NUM_SAMPLES // HOP, 1), np.float16),
        own_audible_T=AUDIBLE,
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
            if layout.turn.slots is SlotScheme.FIXED:
                first, at = at, first + layout.turn.max_text_in_per_turn
                assert tokens[first:at] == [layout.special.pad] * (at - first)
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
    held["first_out"] = [turn.start + at]
    while tokens[at] == SPECIAL.action:
        end = tokens.index(SPECIAL.end_of_text, at)
        held["actions"].append(tokens[at + 1 : end])
        at = end + 1
    first_word, voice = at, layout.own_positions_per_turn
    at, held["speaks"] = read_words(layout, tokens, at, held)
    own = voice * len(held["speaks"])
    if layout.turn.slots is SlotScheme.FIXED:
        control = layout.turn.control is Control.EXPLICIT
        first, at = at, first_word + control + layout.turn.max_text_out_per_turn + 1 + voice - own
        assert tokens[first:at] == [layout.special.pad] * (at - first)
    assert set(kinds[held["first_out"][0] - turn.start : at]) == {Kind.TOKEN}
    assert (tokens[at:], kinds[at:]) == ([SPECIAL.audio] * own, [Kind.OWN_AUDIO] * own)
    return held


def read_words(layout: Layout, tokens: list[int], at: int, held: dict[str, list]) -> tuple[int, list[bool]]:
    """Control and own text; returns their end, and something if the turn speaks."""
    explicit, voice = layout.turn.control is Control.EXPLICIT, layout.own_positions_per_turn > 0
    if explicit:
        assert tokens[at] in (SPECIAL.listen, SPECIAL.speak)
        at += 1
        if tokens[at - 1] == SPECIAL.listen:
            return at, []
    while tokens[at] >= FIRST_OWN_TOKEN:
        held["own"].append(tokens[at])
        at += 1
    if voice and not explicit and tokens[at] == SPECIAL.speak:
        return at + 1, [True]
    assert tokens[at] == SPECIAL.end_of_text
    assert held["own"] or voice or not explicit
    assert not held["own"] or not voice or explicit
    return at + 1, [True] * (explicit or bool(held["own"]))
