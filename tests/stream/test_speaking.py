"""A session with a voice: own sound is the same streamed and trained, in any slot, unmoved by what comes later."""

import dataclasses
from functools import cache as once

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_engine import with_outputs
from tiny import VOICE, randomised, rows_of, tiny_layout, tiny_model, tiny_session

from tml.config import Boundary, Control, Feedback, MeshConfig, SlotScheme, StreamConfig
from tml.microturn import EncodedSession, Layout, Target
from tml.model import flow_head, head, transformer
from tml.params import init_params
from tml.stream import engine
from tml.stream.inputs import TurnInputs, join_sessions, session_inputs
from tml.stream.speaking import sound_keys

NUM_TURNS, NUM_SLOTS = 10, 8
MODEL = tiny_model(audio_out=VOICE)
FIXED = {"slots": SlotScheme.FIXED, "control": Control.IMPLICIT}
KNOBS = [
    {},
    {"control": Control.IMPLICIT},
    FIXED,
    {"boundary": Boundary.NONE, "feedback": Feedback.NONE},  # as in experiments/duplex_tiny.py
    # Those without a voice are in test_engine.
    pytest.param({"slots": SlotScheme.FIXED, "control": Control.EXPLICIT}, marks=pytest.mark.slow),
    pytest.param({"turn_ms": 400}, marks=pytest.mark.slow),
    pytest.param({"turn_ms": 50}, marks=pytest.mark.slow),
]
SEED, MINE = 3, 5


@once
def some_params():
    return jax.device_get(randomised(init_params(transformer.specs(MODEL), jax.random.key(0))))


def with_feedback(feedback: Feedback):
    return dataclasses.replace(MODEL, audio_out=dataclasses.replace(VOICE, feedback=feedback))


@once
def hidden(feedback: Feedback):
    model = with_feedback(feedback)
    return jax.jit(lambda params, batch: transformer.hidden(params, batch, model, MeshConfig()).h_BSD)


@once
def program(temperature: float, feedback: Feedback, **turn):
    """The layout, the engine's configuration, the step, and one program that runs turns."""
    model, layout = with_feedback(feedback), tiny_layout(MODEL, **turn)
    stream = StreamConfig(max_positions=640, temperature=temperature)
    step = engine.make_step(model, layout, stream)
    return layout, stream, step, jax.jit(lambda params, state, inputs: engine.scan_turns(step, params, state, inputs))


def runner(num_slots: int, numbers: list[int], temperature: float = 1.0, feedback: Feedback = Feedback.SOUND, **turn):
    """The layout, a function that runs turns in one program, the step and the first state."""
    layout, stream, step, run = program(temperature, feedback, **turn)
    state = engine.init_state(MODEL, layout, stream, num_slots, seed=SEED, numbers=numbers)
    return layout, lambda inputs: jax.device_get(run(some_params(), state, inputs)[1]), step, state


def inputs_of(layout: Layout, session: EncodedSession, num_turns: int = NUM_TURNS) -> TurnInputs:
    return join_sessions([session_inputs(layout, session, MODEL)], num_turns)


def beside(*columns: TurnInputs) -> TurnInputs:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *columns)


def assert_same_slot(left, left_slot: int, right, right_slot: int) -> None:
    leaves = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    for one, other in leaves:
        np.testing.assert_array_equal(one[:, left_slot], other[:, right_slot])


def said_aloud(session: EncodedSession, outputs, layout: Layout) -> EncodedSession:
    """The session as it would be recorded had the model's words and sound been its own."""
    said = with_outputs(session, outputs, layout)
    frames, num_turns = layout.clock.frames_per_turn, len(outputs.counts_B)
    mels = np.zeros(((num_turns + 1) * frames, MODEL.audio_out.values_per_position), np.float16)
    audible = np.zeros(len(mels), bool)
    mels[frames:] = outputs.own.mels_BTY[:, 0].reshape(-1, mels.shape[1])
    audible[frames:] = np.repeat(outputs.own.speaks_B[:, 0], frames)
    return dataclasses.replace(
        said,
        num_samples=(num_turns + 1) * layout.clock.turn_samples,
        levels_TM=np.concatenate([said.levels_TM, said.levels_TM])[: len(mels)],
        own_mels_TY=mels,
        own_audible_T=audible,
    )


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_speech_streamed_equals_separate_steps_bitwise_and_the_training_forward_of_itself(knobs: dict) -> None:
    session = tiny_session(MODEL, NUM_TURNS)
    for number in range(20):
        layout, run, step, state = runner(1, [number], **knobs)
        turns = session.num_samples // layout.clock.turn_samples
        inputs = inputs_of(layout, session, turns)
        outputs = run(inputs)
        if 1 < outputs.own.speaks_B.sum() < turns:
            break  # with implicit control few sessions listen
    key = state.keys_B2[0]  # the state is donated
    jitted, singles, now = engine.jit_step(step), [], state
    for turn in range(turns):
        now, single = jitted(some_params(), now, jax.tree.map(lambda leaf, turn=turn: jnp.asarray(leaf[turn]), inputs))
        singles.append(jax.device_get(single))
    assert jitted._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, outputs, jax.tree.map(lambda *leaves: np.stack(leaves), *singles))

    speaks_U = outputs.own.speaks_B[:, 0]
    assert 1 < speaks_U.sum() < turns
    assert not outputs.own.mels_BTY[~speaks_U, 0].any()
    batch = rows_of(MODEL, layout, [[said_aloud(session, outputs, layout)]], 640)
    count = int(speaks_U.sum()) * layout.own_positions_per_turn
    mels = outputs.own.mels_BTY[speaks_U, 0].reshape(count, -1)
    np.testing.assert_array_equal(batch.own.mels_BPY[0, :count], mels)

    found = hidden(knobs.get("feedback", Feedback.SOUND))(some_params(), batch)
    logits = head.unembed(jnp.asarray(some_params()["unembed"]), found, MODEL)
    log_probs = jax.nn.log_softmax(logits, axis=-1)[0]
    tokens = np.concatenate([t[:c] for t, c in zip(outputs.tokens_BO[:, 0], outputs.counts_B[:, 0], strict=True)])
    streamed = np.concatenate([p[:c] for p, c in zip(outputs.log_probs_BO[:, 0], outputs.counts_B[:, 0], strict=True)])
    kinds = batch.target_kinds_BS[0]
    spoken = np.flatnonzero((kinds > 0) & (kinds != Target.AUDIO))[: len(tokens)]
    np.testing.assert_array_equal(batch.targets_BS[0, spoken], tokens)
    np.testing.assert_allclose(np.asarray(log_probs)[spoken, tokens], streamed, atol=1e-4)

    # From the training forward the head draws the mels that were streamed.
    before = batch.own.places_BP[0, :count] - 1
    keys = sound_keys(key, jnp.asarray(before + 1))
    of_voice = jax.tree.map(jnp.asarray, some_params()["audio_out"])
    again = flow_head.sample(of_voice, found[0, before], keys, MODEL)
    np.testing.assert_allclose(np.asarray(again, np.float32), mels.astype(np.float32), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "knobs", [{}, {"feedback": Feedback.NONE}, pytest.param(FIXED, marks=pytest.mark.slow)], ids=str
)
def test_a_session_sounds_the_same_in_any_of_eight_slots_whatever_the_others_do(knobs: dict) -> None:
    session = tiny_session(MODEL, NUM_TURNS)
    layout, run_first, _, _ = runner(NUM_SLOTS, [MINE, *range(10, 17)], **knobs)
    mine = inputs_of(layout, session)
    idle = jax.tree.map(np.zeros_like, mine)
    others = [inputs_of(layout, tiny_session(MODEL, NUM_TURNS, seed)) for seed in range(1, NUM_SLOTS)]
    alone = run_first(beside(mine, *[idle] * 7))
    assert alone.own.speaks_B[:, 0].any()
    assert not alone.own.speaks_B[:, 1:].any()
    assert not alone.own.mels_BTY[:, 1:].any()
    assert_same_slot(alone, 0, run_first(beside(mine, *others)), 0)
    for slot in (3, 7):
        numbers = list(range(10, 17))
        numbers.insert(slot, MINE)
        _, run, _, _ = runner(NUM_SLOTS, numbers, **knobs)
        assert_same_slot(alone, 0, run(beside(*others[:slot], mine, *others[slot:])), slot)


def test_other_numbers_and_only_they_draw_other_sound() -> None:
    session = tiny_session(MODEL, NUM_TURNS)
    layout, run, _, _ = runner(2, [MINE, 6], temperature=0.0)
    mine = inputs_of(layout, session)
    outputs = run(beside(mine, mine))
    first = np.flatnonzero(outputs.own.speaks_B[:, 0])[0]
    assert outputs.own.speaks_B[first, 1]
    assert (outputs.own.mels_BTY[first, 0] != outputs.own.mels_BTY[first, 1]).mean() > 0.5


@pytest.mark.parametrize("knobs", KNOBS[:5], ids=str)
def test_no_sound_is_moved_by_what_comes_in_after_its_turn(knobs: dict) -> None:
    layout, run, _, _ = runner(1, [MINE], **knobs)
    session = tiny_session(MODEL, NUM_TURNS)
    plain = run(inputs_of(layout, session))
    for turn in (0, 4, 8):
        after = (turn + 1) * layout.clock.frames_per_turn
        changed = dataclasses.replace(
            session,
            levels_TM=np.concatenate([session.levels_TM[:after], (session.levels_TM[after:] + 1) % 4]),
            texts=tuple(e for e in session.texts if e.start < (turn + 1) * layout.clock.turn_samples),
        )
        moved = run(inputs_of(layout, changed))
        for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(moved), strict=True):
            np.testing.assert_array_equal(one[: turn + 1], other[: turn + 1])
        assert np.any(plain.log_probs_BO[turn + 1 :] != moved.log_probs_BO[turn + 1 :])


@pytest.mark.parametrize("feedback", Feedback)
def test_in_training_no_state_before_a_mel_depends_on_it_and_those_after_it_do_if_it_is_fed_back(
    feedback: Feedback,
) -> None:
    layout = tiny_layout(MODEL)
    batch = rows_of(MODEL, layout, [[tiny_session(MODEL, NUM_TURNS)]], 200)
    place = int(batch.own.places_BP[0, 3])

    def states(mels: np.ndarray) -> np.ndarray:
        rows = batch.replace(own=batch.own.replace(mels_BPY=mels))
        return np.asarray(hidden(feedback)(some_params(), rows))[0]

    changed = batch.own.mels_BPY.copy()
    changed[0, 3] = -changed[0, 3] + 1
    before, after = states(batch.own.mels_BPY), states(changed)
    np.testing.assert_array_equal(before[:place], after[:place])
    moved = [bool((before[slot] != after[slot]).any()) for slot in (place, place + 1)]
    assert moved == [feedback is Feedback.SOUND] * 2
