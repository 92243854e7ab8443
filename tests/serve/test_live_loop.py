"""The loop keeps time whatever the background does; what comes back stands where training would have it."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from local_servers import WAIT_S, ChatServer, tool_server, wait_until
from small_model import small_model, small_sound

from tml.calls import Call
from tml.codec.encode import encode_session
from tml.codec.waveform import decode_clip
from tml.export.bundle import Model
from tml.microturn import Kind
from tml.serve.background import Background, Limits
from tml.serve.endpoint import Endpoint, open_endpoint
from tml.serve.live_loop import Pace, run_session
from tml.session import Stream
from tml.stream import engine
from tml.stream.inputs import session_inputs
from tml.stream.live import LiveSession
from tml.stream.outputs import Said, read_session

TURN_SAMPLES, CHUNK = 3_200, 320
DELEGATE, CANCEL = Call(name="delegate").spelt(), Call(name="cancel").spelt()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return small_model(tmp_path_factory.mktemp("loop"))


class ScriptedReader:
    """Reads a model's turns, and puts calls in place of what the model, which knows none, calls at random."""

    def __init__(self, live: LiveSession, calls: dict[int, str]) -> None:
        self._reader, self._calls = live._reader, calls

    def read(self, tokens: Sequence[int]) -> Said:
        said = self._reader.read(tokens)
        return dataclasses.replace(said, actions=(self._calls[said.turn],) if said.turn in self._calls else ())


def session_of(model: Model, calls: dict[int, str] | None = None) -> LiveSession:
    config = model.experiment
    live = LiveSession(model.params, config.model, model.layout, config.stream, model.tokenizer)
    if calls is not None:
        live._reader = ScriptedReader(live, calls)
    return live


def background(model: Model, server: ChatServer, name: str) -> Background:
    endpoint = Endpoint(url=server.url, model=name)
    open_worker = functools.partial(open_endpoint, endpoint, model.layout.clock)
    return Background((), open_worker, Limits(timeout_s=WAIT_S))


def test_ticks_go_on_while_the_worker_works_and_its_words_go_in_later(model: Model, chat_server: ChatServer) -> None:
    """The worker answers only when turn 12 is done: a loop that waited for it would never get there."""
    live, ticks = session_of(model, {2: DELEGATE}), []
    with background(model, chat_server, "gated") as behind:
        for tick in run_session(live, small_sound(20 * TURN_SAMPLES), CHUNK, behind):
            ticks.append(tick)
            if tick.result.said.turn == 12:
                chat_server.release()
                wait_until(lambda: behind._news.qsize() >= 4)
    assert [tick.result.said.turn for tick in ticks] == list(range(20))
    assert [tick.num_in_flight for tick in ticks] == [0] * 2 + [1] * 11 + [0] * 7
    assert [tick.result.said.turn for tick in ticks if tick.came_back] == [13]
    assert ticks[13].came_back == ("result it is late now",)
    record = live.record("late")
    [event] = record.texts_of(Stream.BACKGROUND)
    assert (event.text, event.start) == ("result it is late now", 13 * TURN_SAMPLES)
    heard = decode_clip(record.audio[Stream.USER_AUDIO], 16_000)[: 20 * TURN_SAMPLES]
    np.testing.assert_array_equal(heard, small_sound(20 * TURN_SAMPLES))


def test_in_real_time_ticks_stay_on_the_clock_of_the_sound(model: Model, chat_server: ChatServer) -> None:
    """The worker never answers; a loop that waited for it would be as far behind as its time is long."""
    live = session_of(model, {2: DELEGATE})
    with background(model, chat_server, "gated") as behind:
        ticks = list(run_session(live, small_sound(10 * TURN_SAMPLES), CHUNK, behind, Pace.REAL_TIME))
    assert [tick.due_s for tick in ticks] == pytest.approx([0.2 * (turn + 1) for turn in range(10)])
    assert [tick.num_in_flight for tick in ticks] == [0] * 2 + [1] * 8
    assert all(0 <= tick.behind_s < WAIT_S / 2 for tick in ticks), [tick.behind_s for tick in ticks]


def test_what_comes_back_together_goes_in_one_message_after_another(model: Model) -> None:
    """As in training: each begins behind a marker of its own, in the turn after the last token of the one before."""
    live, call = session_of(model), Call(name="light", arguments={"colour": "red"}).spelt()
    with Background() as behind:
        for _ in range(2):
            behind.act(call, lambda: live.record("x"))
        ticks = list(run_session(live, small_sound(24 * TURN_SAMPLES), CHUNK, behind))
    first, second = live.record("both").texts_of(Stream.BACKGROUND)[:2]
    assert first.text == second.text == "failed: there is no tool light"
    room = model.layout.turn.max_text_in_per_turn - 1
    turns = -(-len(model.tokenizer.encode(first.text)) // room)
    assert turns > 1
    assert (first.start, second.start) == (0, turns * TURN_SAMPLES)
    assert [tick.result.said.turn for tick in ticks if first.text in tick.came_back] == [0, turns]


def test_after_a_cancel_nothing_comes_back(model: Model, chat_server: ChatServer) -> None:
    live = session_of(model, {1: DELEGATE, 3: CANCEL})
    with background(model, chat_server, "gated") as behind:
        ticks = []
        for tick in run_session(live, small_sound(8 * TURN_SAMPLES), CHUNK, behind):
            ticks.append(tick)
            if tick.result.said.turn == 2:
                wait_until(lambda: bool(chat_server.requests()))
            if tick.result.said.turn == 3:
                chat_server.release()
    assert [tick.num_in_flight for tick in ticks] == [0, 1, 1, 0, 0, 0, 0, 0]
    assert not any(tick.came_back for tick in ticks)
    assert live.record("cancelled").texts_of(Stream.BACKGROUND) == ()
    assert behind.notices[0] == "task 1: cancelled by the model"


def test_a_cancel_ends_a_result_that_is_still_going_in(model: Model, chat_server: ChatServer) -> None:
    live, words = session_of(model, {1: DELEGATE, 4: CANCEL}), "it is seven"
    with background(model, chat_server, "fast") as behind:
        for tick in run_session(live, small_sound(9 * TURN_SAMPLES), CHUNK, behind):
            if tick.result.said.turn == 2:
                wait_until(lambda: behind._news.qsize() >= 4 or behind.num_in_flight == 0)
    tokens = model.tokenizer.encode(f"result {words}")
    room = model.layout.turn.max_text_in_per_turn - 1
    # It came back in turn 3, and the model cancelled in turn 4.
    assert len(tokens) > 2 * room
    [event] = live.record("cut").texts_of(Stream.BACKGROUND)
    assert model.tokenizer.encode(event.text) == tokens[: 2 * room]
    left = model.tokenizer.decode(tokens[2 * room :])
    assert behind.notices[-1] == f"dropped, as the model cancelled while it went in: {left!r}"


def test_the_worker_hears_what_the_session_heard_until_then(model: Model, chat_server: ChatServer) -> None:
    live = session_of(model, {3: DELEGATE})
    records = []
    with background(model, chat_server, "fast") as behind:
        act = behind.act
        behind.act = lambda payload, record: (records.append(record), act(payload, record))[1]
        for _ in run_session(live, small_sound(6 * TURN_SAMPLES), CHUNK, behind):
            pass
    early, late = records[0](), live.record("live")
    assert early.num_samples == (4 + 2) * TURN_SAMPLES
    assert [event for event in late.texts if event.start <= 4 * TURN_SAMPLES][: len(early.texts)] == [*early.texts]
    assert early.texts_of(Stream.ACTION)[-1].text == DELEGATE


def test_what_comes_back_stands_where_training_would_have_it(model: Model, chat_server: ChatServer) -> None:
    num_turns, config = 10, model.experiment
    live = session_of(model, {1: DELEGATE})
    with background(model, chat_server, "fast") as behind:
        ticks = []
        for tick in run_session(live, small_sound(num_turns * TURN_SAMPLES), CHUNK, behind):
            ticks.append(tick)
            if tick.result.said.turn == 2:
                wait_until(lambda: behind._news.qsize() >= 4 or behind.num_in_flight == 0)
    record = live.record("woven")
    heard = (Stream.USER_AUDIO, Stream.BACKGROUND)
    record = dataclasses.replace(
        record,
        texts=tuple(event for event in record.texts if event.stream in heard),
        streams=tuple(stream for stream in record.streams if stream in heard),
    )
    inputs = session_inputs(model.layout, encode_session(record, config.model, model.tokenizer), config.model)
    inputs = jax.tree.map(lambda leaf: leaf[:num_turns], inputs)
    marked = (inputs.tokens_BW == model.layout.special.background) & (inputs.kinds_BW == Kind.TOKEN)
    assert 0 < np.flatnonzero(marked.any(axis=(1, 2)))[0] <= 3
    step = engine.make_step(config.model, model.layout, config.stream)
    state = engine.init_state(config.model, model.layout, config.stream, 1)
    run = jax.jit(lambda params, state, inputs: engine.scan_turns(step, params, state, inputs))
    _, outputs = run(model.params, state, inputs)
    said = read_session(outputs, 0, num_turns, model.layout, model.tokenizer)
    assert [turn.tokens for turn in said] == [tick.result.said.tokens for tick in ticks]


def test_nonsense_that_the_model_calls_comes_back_as_failures_and_ends_nothing(model: Model) -> None:
    """The small model's own actions, which it makes at random."""
    live = session_of(model)
    with Background((tool_server(),), limits=Limits(start_timeout_s=WAIT_S)) as behind:
        ticks = list(run_session(live, small_sound(12 * TURN_SAMPLES), CHUNK, behind))
    acted = [action for tick in ticks for action in tick.result.said.actions]
    came_back = [text for tick in ticks for text in tick.came_back]
    assert acted
    assert came_back
    assert all(text.startswith("failed: ") for text in came_back)
    assert len(ticks) == 12


def test_sound_comes_in_pieces_of_a_turn_at_most(model: Model) -> None:
    live = session_of(model)
    for chunk in (0, TURN_SAMPLES + 1):
        with pytest.raises(ValueError, match=r"are not in 1\.\.3200"):
            next(run_session(live, small_sound(TURN_SAMPLES), chunk))
    shown = []
    ticks = list(run_session(live, small_sound(2 * TURN_SAMPLES), TURN_SAMPLES, before=shown.append))
    assert (len(ticks), shown) == (2, [0, TURN_SAMPLES])
