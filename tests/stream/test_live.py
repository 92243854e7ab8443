"""Live sessions: the same turns however the sound arrives, the same numbers as a recording, nothing lost."""

import dataclasses

import jax
import numpy as np
import pytest
from exact import EXACT
from small_model import small_model, small_sound

from tml.codec.encode import encode_session
from tml.export.bundle import Model
from tml.mesh import make_mesh
from tml.session import Session, Stream, session_from_bytes, session_to_bytes
from tml.stream import engine
from tml.stream.inputs import TurnInputs, session_inputs
from tml.stream.live import LiveSession, SessionFullError, TurnResult, _compiled_step
from tml.stream.outputs import Said, read_session

NUM_TURNS, TURN_SAMPLES = 8, 3_200
TYPED = "seven, then eight or nine"


@pytest.fixture(scope="module", autouse=True)
def live_steps_are_exact():
    """What a live session remembers is held against the same turns in one program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "jit_step", lambda step: jax.jit(step, donate_argnums=1, compiler_options=EXACT))
        _compiled_step.cache_clear()
        yield
    _compiled_step.cache_clear()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return small_model(tmp_path_factory.mktemp("live"))


def live_session(model: Model, **stream) -> LiveSession:
    config = dataclasses.replace(model.experiment.stream, **stream)
    return LiveSession(model.params, model.experiment.model, model.layout, config, model.tokenizer)


def pushed(live: LiveSession, samples: np.ndarray, chunk: int) -> list[TurnResult]:
    return [turn for first in range(0, len(samples), chunk) for turn in live.push(samples[first : first + chunk])]


def inputs_of(record: Session, model: Model) -> TurnInputs:
    """The input halves of a record's turns, but for the silence at its end."""
    heard = (Stream.USER_AUDIO, Stream.USER_TEXT, Stream.BACKGROUND)
    record = dataclasses.replace(
        record,
        texts=tuple(event for event in record.texts if event.stream in heard),
        streams=tuple(stream for stream in record.streams if stream in heard),
    )
    config = model.experiment.model
    inputs = session_inputs(model.layout, encode_session(record, config, model.tokenizer), config)
    return jax.tree.map(lambda leaf: leaf[:NUM_TURNS], inputs)


@pytest.fixture(scope="module")
def scanned(model: Model):
    """Runs turns in one program, as the evaluation runs them: inputs to state and outputs."""
    config = model.experiment
    step = engine.make_step(config.model, model.layout, config.stream)
    state = engine.init_state(config.model, model.layout, config.stream, 1)
    run = jax.jit(lambda params, state, inputs: engine.scan_turns(step, params, state, inputs), compiler_options=EXACT)
    return lambda inputs: run(model.params, state, inputs)


@pytest.fixture(scope="module")
def sound() -> np.ndarray:
    return small_sound(NUM_TURNS * TURN_SAMPLES + 100)


@pytest.fixture(scope="module")
def whole(model: Model, sound: np.ndarray) -> tuple[LiveSession, list[Said]]:
    """All of the sound at once, with text typed before it."""
    live = live_session(model)
    live.type_text(TYPED)
    return live, [turn.said for turn in live.push(sound)]


@pytest.mark.parametrize("chunk", [16, 320, 333], ids=["1 ms", "20 ms", "333 samples"])
def test_any_chunks_give_the_same_turns(
    model: Model, sound: np.ndarray, whole: tuple[LiveSession, list[Said]], chunk: int
) -> None:
    live = live_session(model)
    live.type_text(TYPED)
    turns = pushed(live, sound, chunk)
    assert [turn.said for turn in turns] == whole[1]
    assert all(turn.compute_s > 0 for turn in turns)
    assert live.num_compilations == 1
    assert live.record("same") == whole[0].record("same")
    jax.tree.map(np.testing.assert_array_equal, live._state.decode, whole[0]._state.decode)


def test_parameters_from_a_mesh_do_not_compile_again(
    model: Model, sound: np.ndarray, whole: tuple[LiveSession, list[Said]]
) -> None:
    mesh = make_mesh(model.experiment.mesh, jax.devices()[:1])
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    live = live_session(dataclasses.replace(model, params=jax.device_put(model.params, replicated)))
    live.type_text(TYPED)
    assert [turn.said for turn in live.push(sound)] == whole[1]
    assert live.num_compilations == 1


def test_the_turns_equal_those_of_the_recording(model: Model, whole: tuple[LiveSession, list[Said]], scanned) -> None:
    live, said = whole
    assert [one.turn for one in said] == list(range(NUM_TURNS))
    assert [one.emitted_s for one in said] == pytest.approx([0.2 * (turn + 1) for turn in range(NUM_TURNS)])
    assert len({token for one in said for token in one.tokens}) > 3
    inputs = inputs_of(live.record("again"), model)
    state, outputs = scanned(inputs)
    assert read_session(outputs, 0, NUM_TURNS, model.layout, model.tokenizer) == said
    jax.tree.map(np.testing.assert_array_equal, state.decode, live._state.decode)


def test_typed_text_goes_in_with_the_next_turns(model: Model, sound: np.ndarray, scanned) -> None:
    live = live_session(model)
    half_way = 3 * TURN_SAMPLES + 1_000
    before = live.push(sound[:half_way])
    live.type_text(TYPED)
    live.type_text("wait", Stream.BACKGROUND)
    after = live.push(sound[half_way:])
    record = live.record("typed")
    typed = [event for event in record.texts if event.stream in (Stream.USER_TEXT, Stream.BACKGROUND)]
    assert [(event.stream.value, event.text, event.start) for event in typed] == [
        ("user_text", TYPED, 3 * TURN_SAMPLES),
        ("background", "wait", 3 * TURN_SAMPLES),
    ]
    tokens, special = model.tokenizer.encode(TYPED), model.layout.special
    assert len(tokens) > 4
    inputs = inputs_of(record, model)
    counts = inputs.counts_B[:, 0]
    plain = int(counts[0])
    heard = [inputs.tokens_BW[turn, 0, plain : counts[turn]].tolist() for turn in range(NUM_TURNS)]
    assert heard[:3] == [[], [], []]
    assert heard[3] == [special.user_text, *tokens[:3]]
    assert heard[4] == [special.user_text, *tokens[3:6]]
    _, outputs = scanned(inputs)
    said = read_session(outputs, 0, NUM_TURNS, model.layout, model.tokenizer)
    assert said == [turn.said for turn in before + after]


def test_text_that_is_taken_back_does_not_go_in_and_is_not_in_the_record(
    model: Model, sound: np.ndarray, scanned
) -> None:
    live, tokens = live_session(model), model.tokenizer.encode(TYPED)
    live.type_text(TYPED)
    live.type_text("wait", Stream.BACKGROUND)
    before = live.push(sound[:TURN_SAMPLES])
    assert live.drop_waiting(Stream.USER_TEXT) == model.tokenizer.decode(tokens[3:])
    assert live.drop_waiting(Stream.USER_TEXT) == ""
    after = live.push(sound[TURN_SAMPLES:])
    record = live.record("taken back")
    assert [model.tokenizer.encode(text.text) for text in record.texts_of(Stream.USER_TEXT)] == [tokens[:3]]
    assert [text.text for text in record.texts_of(Stream.BACKGROUND)] == ["wait"]
    _, outputs = scanned(inputs_of(record, model))
    said = read_session(outputs, 0, NUM_TURNS, model.layout, model.tokenizer)
    assert said == [turn.said for turn in before + after]


def test_a_record_of_text_that_is_cut_inside_a_character_holds_no_more_than_went_in(
    model: Model, sound: np.ndarray
) -> None:
    text = "é°é°é°é°"
    tokens = model.tokenizer.encode(text)
    assert len(tokens) == 2 * len(text), "the tokenizer knows only bytes of these"
    live = live_session(model)
    live.type_text(text)
    live.push(sound[:TURN_SAMPLES])
    live.drop_waiting(Stream.USER_TEXT)
    (read,) = live.record("cut").texts_of(Stream.USER_TEXT)
    assert model.tokenizer.encode(read.text) == tokens[:2]


def test_text_for_which_there_are_no_turns_is_not_in_the_record(model: Model, sound: np.ndarray) -> None:
    live = live_session(model)
    live.type_text(TYPED)
    live.type_text(TYPED)
    live.push(sound[:TURN_SAMPLES])
    tokens = model.tokenizer.encode(TYPED)
    assert 9 < len(tokens) < 18
    # One turn, and the two of silence.
    (read,) = live.record("cut").texts_of(Stream.USER_TEXT)
    assert model.tokenizer.encode(read.text) == tokens[:9]
    laid_out = inputs_of(live.record("cut"), model).tokens_BW[:3, 0]
    assert [turn.tolist()[-4:] for turn in laid_out] == [
        [model.layout.special.user_text, *tokens[first : first + 3]] for first in (0, 3, 6)
    ]
    assert [event.text for event in live.recording().texts if event.stream is Stream.USER_TEXT] == [TYPED, TYPED]


def test_the_record_is_a_session(whole: tuple[LiveSession, list[Said]], sound: np.ndarray) -> None:
    live, said = whole
    record = live.record("a session", {"licence": "none"})
    assert session_from_bytes(session_to_bytes(record)) == record
    assert record.meta == {"licence": "none"}
    assert record.num_samples == (NUM_TURNS + 2) * TURN_SAMPLES
    spoken = [(event.start, event.text) for event in record.texts_of(Stream.OWN_TEXT)]
    assert spoken == [(round(one.emitted_s * 16_000), one.text.strip()) for one in said if one.text.strip()]
    acted = [event.text for event in record.texts_of(Stream.ACTION)]
    assert acted == [action for one in said for action in one.actions]
    assert spoken
    assert acted


def test_a_session_that_outgrows_its_positions_loses_nothing(
    model: Model, sound: np.ndarray, whole: tuple[LiveSession, list[Said]]
) -> None:
    live = live_session(model, max_positions=80)
    live.type_text(TYPED)
    with pytest.raises(SessionFullError, match=r"may pass stream.max_positions = 80; raise it or start") as caught:
        live.push(sound)
    done = [turn.said for turn in caught.value.results]
    assert 1 < len(done) < NUM_TURNS
    assert done == whole[1][: len(done)]
    with pytest.raises(SessionFullError) as again:
        live.push(sound[:0])
    assert again.value.results == []
    assert live.record("full").num_samples == (len(done) + 2) * TURN_SAMPLES


def test_sound_that_is_no_number_is_refused_whole(model: Model, sound: np.ndarray) -> None:
    live = live_session(model)
    broken = sound[:5_000].copy()
    broken[4_000] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        live.push(broken)
    assert [turn.said.turn for turn in live.push(sound[:TURN_SAMPLES])] == [0]
