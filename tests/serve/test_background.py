"""The background against real processes: an endpoint and tool servers that are fast, slow, broken, late or wrong."""

import base64
import dataclasses
import functools
import io
import json
import threading
import time

import numpy as np
import pytest
import soundfile
from local_servers import WAIT_S, ChatServer, all_said, tool_server, wait_until
from PIL import Image
from small_model import small_session

from tml.calls import Call
from tml.codec.waveform import decode_clip
from tml.config import AudioConfig, MicroTurnConfig
from tml.microturn import Clock
from tml.serve.background import Background, Limits
from tml.serve.conversation import Media
from tml.serve.endpoint import Endpoint, open_endpoint
from tml.session import Session, Stream, TextEvent, VideoFrame

CLOCK = Clock.of(MicroTurnConfig(), AudioConfig())
DELEGATE, CANCEL = Call(name="delegate").spelt(), Call(name="cancel").spelt()


@functools.cache
def conversation() -> Session:
    """Sound, pictures, and words with their times."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 3, 3), 200, np.uint8)).save(file, format="PNG")
    return dataclasses.replace(
        small_session(3),
        streams=(Stream.USER_AUDIO, Stream.OWN_AUDIO, Stream.VIDEO, Stream.OWN_TEXT),
        audio={
            Stream.USER_AUDIO: small_session(3).audio[Stream.USER_AUDIO],
            Stream.OWN_AUDIO: small_session(4).audio[Stream.USER_AUDIO],
        },
        texts=(TextEvent(stream=Stream.OWN_TEXT, start=16_000, end=19_200, text="one moment"),),
        frames=tuple(VideoFrame(sample=sample, data=file.getvalue()) for sample in (0, 8_000, 16_000)),
    )


def background(server: ChatServer | None, model: str = "fast", tools: tuple[str, ...] = (), **limits) -> Background:
    open_worker = None
    if server is not None:
        open_worker = functools.partial(open_endpoint, Endpoint(url=server.url, model=model), CLOCK)
    return Background(tools, open_worker, Limits(**{"timeout_s": 200.0, "start_timeout_s": WAIT_S, **limits}))


def test_the_worker_gets_the_whole_session_and_its_words_come_back(chat_server: ChatServer) -> None:
    with background(chat_server) as behind:
        behind.act(DELEGATE, conversation)
        assert "".join(all_said(behind)) == "result it is seven"
        assert behind.notices == []
    [request] = map(json.loads, chat_server.requests())
    system, user = request["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert "tools" not in request
    texts = [part["text"] for part in user["content"] if part["type"] == "text"]
    assert "tick    5    1.0 s  video: frame | own text: one moment" in texts[0]
    assert "expected" not in texts[0]
    assert texts[3:] == [f"What was seen at {seconds} s:" for seconds in (0.0, 0.5, 1.0)]
    sounds = [part["input_audio"] for part in user["content"] if part["type"] == "input_audio"]
    for sound, stream in zip(sounds, (Stream.USER_AUDIO, Stream.OWN_AUDIO), strict=True):
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(sound["data"])), dtype="float32")
        assert (sound["format"], rate) == ("wav", 16_000)
        np.testing.assert_array_equal(samples, decode_clip(conversation().audio[stream], 16_000))
    pictures = [part["image_url"]["url"] for part in user["content"] if part["type"] == "image_url"]
    seen = [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in pictures]
    assert seen == [frame.data for frame in conversation().frames]


def test_an_endpoint_gets_only_what_it_can_take(chat_server: ChatServer) -> None:
    for number, endpoint in enumerate(
        [
            Endpoint(url=chat_server.url, model="fast", media=()),
            Endpoint(url=chat_server.url, model="fast", media=(Media.FRAMES,), max_frames=2),
        ]
    ):
        with Background(open_worker=functools.partial(open_endpoint, endpoint, CLOCK)) as behind:
            behind.act(DELEGATE, conversation)
            all_said(behind)
            assert behind.notices == ([], ["task 1: 2 of 3 pictures are sent"])[number]
        content = json.loads(chat_server.requests()[number])["messages"][1]["content"]
        texts = [part["text"] for part in content if part["type"] == "text"]
        left_out = "Of 3 pictures these are 2, spread evenly."
        assert texts[1:] == ([], [left_out, "What was seen at 0.0 s:", "What was seen at 1.0 s:"])[number]


def test_a_slow_worker_leaves_the_stream_alone_until_it_knows(chat_server: ChatServer) -> None:
    with background(chat_server, "slow") as behind:
        begun = time.perf_counter()
        behind.act(DELEGATE, conversation)
        assert behind.take_all() == []
        assert all_said(behind) == ["result seven"]
        assert time.perf_counter() - begun > 1.5


def test_a_busy_endpoint_is_asked_again(chat_server: ChatServer) -> None:
    with background(chat_server, "busy") as behind:
        behind.act(DELEGATE, conversation)
        assert "".join(all_said(behind)) == "result it is seven"
    assert len(chat_server.requests()) == 2


def test_the_worker_uses_tools_and_sees_what_they_say(chat_server: ChatServer) -> None:
    with background(chat_server, "calculates", (tool_server(),)) as behind:
        behind.act(DELEGATE, conversation)
        said = all_said(behind)
        assert behind.notices == ["task 1: uses calculator"]
    assert said[0] == "searching"
    assert "".join(said[1:]) == "result it is 42"
    asked, again = map(json.loads, chat_server.requests())
    assert {tool["function"]["name"] for tool in asked["tools"]} == {"time", "calculator"}
    [calculator] = [tool["function"] for tool in asked["tools"] if tool["function"]["name"] == "calculator"]
    assert calculator["parameters"]["properties"]["expression"]["type"] == "string"
    call, answer = again["messages"][2:]
    assert call["tool_calls"][0]["function"] == {"name": "calculator", "arguments": '{"expression":"6*7"}'}
    assert answer == {"role": "tool", "tool_call_id": "call-1", "content": "42"}


def test_wrong_calls_of_the_worker_are_told_to_it(chat_server: ChatServer) -> None:
    with background(chat_server, "calls_wrongly", (tool_server(),), max_characters=10_000) as behind:
        behind.act(DELEGATE, conversation)
        said = all_said(behind)
    reasons = "".join(said[1:]).removeprefix("result ").split(" | ")
    starts = (
        "error: not JSON",
        "error: calculator: expression 3 is not of type 'string'",
        "error: arguments must be an object",
        "error: Error executing tool calculator: '1/0' has no value",
        "error: there is no tool teleport",
    )
    assert len(reasons) == len(starts)
    assert all(reason.startswith(start) for reason, start in zip(reasons, starts, strict=True)), reasons


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("broken", "failed: Error code: 500"),
        ("page", "failed: "),
        ("junk", "failed: "),
        ("odd", "failed: "),
        ("empty", "failed: the answer is empty"),
        ("withheld", "failed: the answer was withheld"),
        ("cut", "failed: the answer broke off"),
        ("calls_for_ever", "failed: no answer in 8 rounds of calls"),
    ],
)
def test_what_goes_wrong_there_comes_back_as_a_failure(chat_server: ChatServer, model: str, reason: str) -> None:
    with background(chat_server, model, (tool_server(),) if "calls" in model else ()) as behind:
        for _ in range(2):
            behind.act(DELEGATE, conversation)
            said = all_said(behind)
            assert said[-1].startswith(reason), said
            assert len(said[-1]) <= 130
        failed = [notice.split(":")[0] for notice in behind.notices if ": uses " not in notice]
        assert failed == ["task 1 failed", "task 2 failed"]


def test_an_endpoint_that_is_not_there_is_a_failure(chat_server: ChatServer) -> None:
    nowhere = dataclasses.replace(chat_server, url="http://127.0.0.1:9/v1")
    with background(nowhere) as behind:
        behind.act(DELEGATE, conversation)
        assert all_said(behind) == ["failed: Connection error."]


def test_a_session_that_cannot_be_made_is_a_failure(chat_server: ChatServer) -> None:
    def impossible() -> Session:
        raise ValueError("no sound")

    with background(chat_server) as behind:
        behind.act(DELEGATE, impossible)
        assert all_said(behind) == ["failed: no sound"]


def test_what_is_cancelled_does_not_come_back(chat_server: ChatServer) -> None:
    with background(chat_server, "gated") as behind:
        behind.act(DELEGATE, conversation)
        wait_until(lambda: bool(chat_server.requests()))
        behind.act(CANCEL, conversation)
        assert behind.num_in_flight == 0
        chat_server.release()
        behind.act(DELEGATE, conversation)
        assert "".join(all_said(behind)) == "result it is late now"
        assert behind.notices == ["task 1: cancelled by the model"]


def test_a_result_that_has_come_but_was_not_read_is_dropped_with_a_notice(chat_server: ChatServer) -> None:
    with background(chat_server) as behind:
        behind.act(DELEGATE, conversation)
        wait_until(lambda: behind._news.qsize() >= 3)
        behind.act(CANCEL, conversation)
        assert behind.take_all() == []
        cancelled, *dropped = behind.notices
        assert cancelled == "task 1: cancelled by the model"
        assert dropped
        assert all("task 1: dropped, too late: " in notice for notice in dropped)


def test_time_is_up_and_the_next_task_runs(chat_server: ChatServer) -> None:
    with background(chat_server, "gated", timeout_s=0.3) as behind:
        behind.act(DELEGATE, conversation)
        assert all_said(behind) == ["failed: no result in 0.3 s"]
        behind.act(DELEGATE, conversation)
        assert behind.num_in_flight == 1


def test_what_is_in_flight_at_the_end_is_named_and_cancelled(chat_server: ChatServer) -> None:
    with background(chat_server, "gated") as behind:
        behind.act(DELEGATE, conversation)
        wait_until(lambda: bool(chat_server.requests()))
    assert behind.notices == ["task 1 was still in flight when the session ended, and is cancelled"]
    chat_server.release()
    wait_until((chat_server.folder / "hung_up").exists)


def test_a_result_that_nobody_read_before_the_end_is_named(chat_server: ChatServer) -> None:
    with background(chat_server) as behind:
        behind.act(DELEGATE, conversation)
        wait_until(lambda: behind._news.qsize() >= 4)
    assert "dropped, since the session is over: 'result it is seven'" in behind.notices


def test_halves_of_surrogate_pairs_do_not_reach_the_tokenizer(chat_server: ChatServer) -> None:
    with background(chat_server, "surrogate") as behind:
        behind.act(DELEGATE, conversation)
        assert "".join(all_said(behind)) == "result odd ? thing"


def test_a_result_without_end_is_cut_off(chat_server: ChatServer) -> None:
    with background(chat_server, "endless", max_characters=50) as behind:
        behind.act(DELEGATE, conversation)
        said = "".join(all_said(behind))
        assert said.startswith("result 0 1 2 3")
        assert 50 <= len(said) < 100
        assert "task 1: cut off after 50 characters" in behind.notices
    wait_until((chat_server.folder / "hung_up").exists)


def test_several_delegations_say_which_they_are_and_can_be_cancelled_one_by_one(chat_server: ChatServer) -> None:
    with background(chat_server, "gated", max_delegations=2) as behind:
        for _ in range(3):
            behind.act(DELEGATE, conversation)
        assert behind.take_all() == ["failed: 2 in flight already"]
        behind.act(Call(name="cancel", arguments={"task": 1}).spelt(), conversation)
        assert behind.num_in_flight == 1
        chat_server.release()
        said = all_said(behind)
        assert said[0].startswith("task 2 result it")
        assert all(text.startswith("task 2 ") for text in said)


def test_an_endpoint_needs_an_address_and_a_model() -> None:
    with pytest.raises(ValueError, match="does not begin with http"):
        Endpoint(url="localhost:8000", model="x")
    with pytest.raises(ValueError, match="needs the name of a model"):
        Endpoint(url="http://localhost", model="")


def test_acting_and_taking_wait_for_nothing(chat_server: ChatServer) -> None:
    """The Session can be made only after both have returned."""
    may_be_made = threading.Event()

    def late() -> Session:
        assert may_be_made.wait(WAIT_S)
        return conversation()

    with background(chat_server) as behind:
        behind.act(DELEGATE, late)
        assert behind.take() is None
        assert behind.num_in_flight == 1
        may_be_made.set()
        assert "".join(all_said(behind)) == "result it is seven"


def test_a_cancel_of_one_task_ends_what_of_it_was_not_taken_or_is_going_in(chat_server: ChatServer) -> None:
    with background(chat_server, max_delegations=2) as behind:
        for _ in range(2):
            behind.act(DELEGATE, conversation)
        wait_until(lambda: behind._news.qsize() >= 8)
        first = behind.take()
        assert first is not None
        going, other = (1, 2) if first.startswith("task 1 ") else (2, 1)
        assert not behind.act(Call(name="cancel", arguments={"task": other}).spelt(), conversation)
        assert f"before it went in: 'task {other} " in behind.notices[-1]
        assert behind.act(Call(name="cancel", arguments={"task": going}).spelt(), conversation)
        assert behind.take() is None
