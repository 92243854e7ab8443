"""Streaming is training: the same numbers turn by turn, in any slot, with nothing seen too early."""

import dataclasses
from functools import cache as once

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import EXACT
from tiny import randomised, rows_of, tiny_layout, tiny_model, tiny_session

from tml.config import Boundary, Control, Modality, SlotScheme, StreamConfig
from tml.microturn import EncodedText
from tml.model import cache, transformer
from tml.params import init_params
from tml.session import Stream
from tml.stream import engine
from tml.stream.inputs import TurnInputs, join_sessions, session_inputs

NUM_TURNS = 12
KNOBS = [
    {},
    pytest.param({"boundary": Boundary.NONE}, marks=pytest.mark.slow),
    {"control": Control.IMPLICIT, "order": (Modality.TEXT, Modality.VIDEO, Modality.AUDIO)},
    {"turn_ms": 400},
    pytest.param({"turn_ms": 50}, marks=pytest.mark.slow),
    pytest.param({"turn_ms": 1000, "max_text_in_per_turn": 16}, marks=pytest.mark.slow),
]
FIXED = [
    {"slots": SlotScheme.FIXED, "control": Control.EXPLICIT},
    # Those with a voice are in test_speaking.
    pytest.param({"slots": SlotScheme.FIXED, "control": Control.IMPLICIT}, marks=pytest.mark.slow),
]
forward = jax.jit(lambda params, batch: transformer.apply(params, batch, tiny_model()).logits_BSV)


@once
def built(seed: int = 0, temperature: float = 0.0, num_slots: int = 1, **turn):
    model = tiny_model()
    layout = tiny_layout(model, **turn)
    stream = StreamConfig(max_positions=256, temperature=temperature)
    params = randomised(init_params(transformer.specs(model), jax.random.key(seed)))
    step = engine.make_step(model, layout, stream)
    run = jax.jit(lambda p, s, x: engine.scan_turns(step, p, s, x), compiler_options=EXACT)
    return model, layout, params, step, engine.init_state(model, layout, stream, num_slots), run


def inputs_of(model, layout, *sessions) -> TurnInputs:
    found = [session_inputs(layout, session, model) for session in sessions]
    return join_sessions(found, max(len(inputs.counts_B) for inputs in found))


def with_outputs(session, outputs, layout):
    """The session as it would be recorded had the model's outputs been its own text."""
    special = layout.special
    texts = [event for event in session.texts if event.stream not in (Stream.OWN_TEXT, Stream.ACTION)]
    for turn, (tokens, count) in enumerate(zip(outputs.tokens_BO[:, 0], outputs.counts_B[:, 0], strict=True)):
        stream, run = Stream.OWN_TEXT, []
        for token in tokens[:count].tolist():
            if token == special.action:
                stream = Stream.ACTION
            elif token == special.end_of_text and stream is Stream.ACTION:
                texts.append(event_at(turn, stream, run, layout))
                stream, run = Stream.OWN_TEXT, []
            elif token not in (special.listen, special.speak, special.end_of_text):
                run.append(token)
        if run:
            texts.append(event_at(turn, Stream.OWN_TEXT, run, layout))
    return dataclasses.replace(session, texts=tuple(sorted(texts, key=lambda event: event.start)))


def event_at(turn: int, stream: Stream, tokens: list[int], layout) -> EncodedText:
    return EncodedText(stream=stream, start=(turn + 1) * layout.clock.turn_samples, tokens=tuple(tokens))


@pytest.mark.parametrize("knobs", [*KNOBS, *FIXED], ids=str)
def test_scan_equals_separate_steps_bitwise_and_neither_recompiles(knobs: dict) -> None:
    model, layout, params, step, state, run = built(**knobs)
    inputs = inputs_of(model, layout, tiny_session(model, NUM_TURNS))
    turns = inputs.counts_B.shape[0]
    _, scanned = run(params, state, inputs)
    jitted = jax.jit(step, donate_argnums=1, compiler_options=EXACT)
    state = jax.tree.map(jnp.copy, state)  # the state is donated
    singles = []
    for turn in range(turns):
        state, outputs = jitted(params, state, jax.tree.map(lambda leaf, turn=turn: jnp.asarray(leaf[turn]), inputs))
        singles.append(outputs)
    assert jitted._cache_size() == 1
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *singles)
    jax.tree.map(np.testing.assert_array_equal, scanned, stacked)
    assert len(np.unique(stacked.tokens_BO)) > 3


@pytest.mark.parametrize("knobs", [*KNOBS[:3], *FIXED], ids=str)
def test_a_stream_equals_the_training_forward_of_what_it_said(knobs: dict) -> None:
    model, layout, params, _, state, run = built(**knobs)
    session = tiny_session(model, NUM_TURNS)
    inputs = inputs_of(model, layout, session)
    streamed_state, outputs = run(params, state, inputs)
    outputs = jax.tree.map(np.asarray, outputs)
    said = with_outputs(session, outputs, layout)
    # The last output would be heard after the recording; extend it so that the layout can place everything.
    said = dataclasses.replace(said, num_samples=said.num_samples + layout.clock.turn_samples)
    said = dataclasses.replace(said, levels_TM=np.concatenate([said.levels_TM, said.levels_TM[:4]]))
    batch = rows_of(model, layout, [[said]], 256)
    turn_starts = layout.lay_out(layout.contents(said)).turn_starts
    assert int(streamed_state.decode.num_positions_B[0]) == turn_starts[len(outputs.counts_B)]
    log_probs = np.asarray(jax.nn.log_softmax(forward(params, batch), axis=-1))[0]
    spoken = np.flatnonzero(batch.target_kinds_BS[0] > 0)
    expected_tokens = np.concatenate(
        [t[:c] for t, c in zip(outputs.tokens_BO[:, 0], outputs.counts_B[:, 0], strict=True)]
    )
    spoken = spoken[: len(expected_tokens)]
    np.testing.assert_array_equal(batch.targets_BS[0, spoken], expected_tokens)
    streamed = np.concatenate([p[:c] for p, c in zip(outputs.log_probs_BO[:, 0], outputs.counts_B[:, 0], strict=True)])
    np.testing.assert_allclose(log_probs[spoken, expected_tokens], streamed, atol=1e-4)


@pytest.mark.parametrize(("width", "apart"), [(7, False), (1, True)])
def test_appending_any_chunks_equals_the_training_forward(width: int, apart: bool) -> None:
    model, layout, params, *_ = built()
    batch = rows_of(model, layout, [[tiny_session(model, NUM_TURNS)]], 120)
    size = int((batch.segment_ids_BS > 0).sum())
    expected = forward(params, batch)
    append = jax.jit(lambda p, s, x: cache.append(p, s, x, model))
    rng, first = np.random.default_rng(0), 0
    state = cache.init_state(model, 1, 256, width, apart)
    while first < size:
        count = min(int(rng.integers(0, width + 1)), size - first)
        place = np.minimum(first + np.arange(width), 119)
        slots = cache.Slots(
            tokens_BW=batch.tokens_BS[:, place],
            kinds_BW=batch.kinds_BS[:, place],
            levels_BWM=batch.levels_BSM[:, place],
            tiles_BP=batch.tiles_BP,
            tile_index_BW=batch.tile_index_BS[:, place],
            counts_B=np.array([count], np.int32),
        )
        state, logits = append(params, state, slots)
        np.testing.assert_allclose(logits[0, :count], expected[0, first : first + count], atol=1e-4)
        first += count


@pytest.mark.parametrize("knobs", [{}, *FIXED], ids=str)
def test_a_session_is_the_same_in_any_slot_whatever_the_others_do(knobs: dict) -> None:
    model, layout, params, _, state, run = built(num_slots=3, **knobs)
    session, others = tiny_session(model, NUM_TURNS), [tiny_session(model, NUM_TURNS, seed) for seed in (5, 6)]
    idle = jax.tree.map(np.zeros_like, inputs_of(model, layout, session))

    def beside(*columns: TurnInputs) -> TurnInputs:
        return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *columns)

    mine = inputs_of(model, layout, session)
    theirs = [inputs_of(model, layout, other) for other in others]
    _, alone = run(params, state, beside(mine, idle, idle))
    _, last = run(params, state, beside(idle, idle, mine))
    _, busy = run(params, state, beside(theirs[0], mine, theirs[1]))
    for name in ("tokens_BO", "counts_B", "log_probs_BO"):
        np.testing.assert_array_equal(getattr(alone, name)[:, 0], getattr(last, name)[:, 2])
        np.testing.assert_array_equal(getattr(alone, name)[:, 0], getattr(busy, name)[:, 1])
        np.testing.assert_array_equal(getattr(alone, name)[:, 1], 0)


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        *FIXED,
        {"turn_ms": 50},
        pytest.param({"turn_ms": 1000}, marks=pytest.mark.slow),
        pytest.param(
            {"boundary": Boundary.NONE, "order": (Modality.VIDEO, Modality.TEXT, Modality.AUDIO)},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_nothing_that_comes_in_after_a_turn_moves_its_output(knobs: dict) -> None:
    model, layout, params, _, state, run = built(**knobs)
    turn_samples = layout.clock.turn_samples
    session = tiny_session(model, min(max(NUM_TURNS * turn_samples // 3_200, 4), 2 * NUM_TURNS))
    turns = layout.clock.num_turns(session.num_samples)
    _, before = run(params, state, join_sessions([session_inputs(layout, session, model)], turns))
    for turn in (0, turns // 3, turns - 3):
        heard, end = (turn + 1) * layout.clock.frames_per_turn, (turn + 1) * turn_samples
        changed = dataclasses.replace(
            session,
            levels_TM=np.concatenate([session.levels_TM[:heard], (session.levels_TM[heard:] + 1) % 4]),
            texts=tuple(event for event in session.texts if event.start < end),
            tiles_P=np.where((session.tile_samples_P < end)[:, None, None, None, None], session.tiles_P, 9),
        )
        _, moved = run(params, state, join_sessions([session_inputs(layout, changed, model)], turns))
        np.testing.assert_array_equal(before.log_probs_BO[: turn + 1], moved.log_probs_BO[: turn + 1])
        assert np.any(before.log_probs_BO[turn + 1 :] != moved.log_probs_BO[turn + 1 :])


def test_outputs_follow_the_grammar_also_when_sampled() -> None:
    model, layout, params, _, state, run = built(temperature=3.0)
    inputs = inputs_of(model, layout, tiny_session(model, NUM_TURNS))
    _, outputs = run(params, state, inputs)
    special, seen = layout.special, set()
    for tokens, count in zip(np.asarray(outputs.tokens_BO[:, 0]), np.asarray(outputs.counts_B[:, 0]), strict=True):
        turn = tokens[:count].tolist()
        acted = 0
        while turn[0] == special.action:
            end = turn.index(special.end_of_text)
            acted += end + 1
            turn = turn[end + 1 :]
        assert acted <= layout.turn.max_action_per_turn
        seen.add(turn[0])
        if turn[0] == special.listen:
            assert len(turn) == 1
        else:
            assert turn[0] == special.speak
            assert turn.index(special.end_of_text) == len(turn) - 1 <= layout.turn.max_text_out_per_turn + 1
    assert seen == {special.listen, special.speak}
