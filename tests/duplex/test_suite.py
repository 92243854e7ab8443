"""The whole suite: a random model over synthesised sessions, its controls, its ceiling, its table and its page."""

import base64
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
from random_player import delegations, random_player, sessions_of

from tml.codec.waveform import decode_clip
from tml.duplex.controls import Control
from tml.duplex.html_report import as_played, html_report
from tml.duplex.player import Played
from tml.duplex.rates import Rate
from tml.duplex.scores import HEADLINES, LOW_IS_GOOD, judged
from tml.duplex.session_svg import LEFT_PX, PX_PER_S, session_svg
from tml.duplex.suite import SuiteReport, bars_table, cell, run_suite, session_json, suite_json, suite_table
from tml.duplex.trace import TimedWord, Trace
from tml.session import Behaviour, Session, Stream, session_from_bytes, session_to_bytes
from tml.stream.outputs import Said

SHOWN = (Behaviour.COUNTING, Behaviour.TONE)


def some_sessions() -> list[Session]:
    """Two of video, two of tone, and one delegation, which has nothing to be swapped with."""
    return [*(session for behaviour in SHOWN for session in sessions_of(behaviour)), delegations()[0]]


@pytest.fixture(scope="module")
def progress() -> list[tuple[int, int]]:
    return []


@pytest.fixture(scope="module")
def report(progress) -> SuiteReport:
    return run_suite(
        random_player(),
        some_sessions(),
        max_control_sessions=1,
        progress=lambda done, total: progress.append((done, total)),
    )


def test_every_behaviour_is_scored_under_every_control_that_applies(report):
    assert list(report.scores) == [Behaviour.COUNTING, Behaviour.TONE, Behaviour.DELEGATION]
    under = {control: set(found) for control, found in report.controls.items()}
    assert under == {
        Control.SILENCE: {*SHOWN, Behaviour.DELEGATION},
        Control.SWAP: set(SHOWN),
        Control.BLANK_AUDIO: {*SHOWN, Behaviour.DELEGATION},
        Control.BLANK_VIDEO: {Behaviour.COUNTING},
        Control.BLANK_BACKGROUND: {Behaviour.DELEGATION},
        Control.TEXT_ONLY: {Behaviour.TONE},
        Control.WORDS_ALONE: {Behaviour.TONE},
    }
    assert report.scores[Behaviour.COUNTING].num_sessions == 2
    assert report.controls[Control.SWAP][Behaviour.COUNTING].num_sessions == 2
    assert report.controls[Control.BLANK_VIDEO][Behaviour.COUNTING].num_sessions == 1


def test_the_ceiling_is_one_and_silence_is_nothing(report):
    for behaviour, found in report.ceiling.items():
        assert found.macro == 1.0
        for metric, rate in found.rates.items():
            assert rate.value == float(metric not in LOW_IS_GOOD), (behaviour, metric)
    for found in report.controls[Control.SILENCE].values():
        assert not any(rate.hits for rate in found.rates.values())


def test_controls_change_what_the_model_says(report):
    sessions = some_sessions()
    assert any(trace.words for trace in report.traces)
    assert report.control_traces[Control.SWAP][0] == report.traces[1]
    assert report.control_traces[Control.SWAP][1] == report.traces[0]
    for control in (Control.BLANK_AUDIO, Control.BLANK_VIDEO):
        assert report.control_traces[control][0] != report.traces[0]
    assert Stream.BACKGROUND in sessions[4].streams
    # A model that never asks for results hears the same without them.
    assert report.control_traces[Control.BLANK_BACKGROUND][4] == report.traces[4]


def test_progress_ends_when_everything_is_done(progress, report):
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    (total,) = {total for _, total in progress}
    assert progress[-1] == (total, total)


def test_the_table_has_a_line_a_headline_and_a_column_a_control(report):
    header, *lines, mean = suite_table(report).splitlines()
    names = ["behaviour", "sessions", "metric", "model", *(control.value for control in Control)]
    assert header.split() == [*names, "ceiling", "latency", "learnt"]
    first = [line for line in lines if not line.startswith(" ")]
    assert [line.split()[:3] for line in first] == [
        ["counting", "2", "within_one"], ["tone", "2", "correct"], ["delegation", "1", "used"],
    ]  # fmt: skip
    assert [line.split()[0] for line in lines if line not in first] == ["on_time", "on_time", "right_call", "went_on"]
    tone = first[1]
    of_tone = [report.scores, *(report.controls[control] for control in (Control.SILENCE, Control.SWAP))]
    assert all(cell(scores[Behaviour.TONE].rate("correct")) in tone for scores in of_tone)
    assert all(line.split()[-1] in ("yes", "no") for line in first)
    assert mean.startswith("macro average 0.")
    assert cell(Rate(hits=0, cases=0)) == "-"


def test_bars_stand_beside_their_controls(report):
    rate = Rate(hits=18, cases=20)
    near, far = (with_rates(report, rate, Rate(hits=hits, cases=20)) for hits in (14, 0))
    header, line = bars_table(far).splitlines()
    assert header.split() == ["behaviour", "metric", "bar", "found", "reached", "clear", "of", "controls"]
    assert line.split() == ["counting", "within_one", ">=", "0.6", "0.900", "yes", "yes"]
    assert bars_table(near).splitlines()[1].split()[-2:] == ["yes", "no"]
    plain = [suite_json(some) for some in (near, far)]
    assert [(one["bars_reached"], one["bars_clear"], len(one["bars"])) for one in plain] == [(1, 0, 1), (1, 1, 1)]
    delegation, *_ = [one for one in suite_json(report)["bars"] if one["behaviour"] == "delegation"]
    assert (delegation["metric"], delegation["compared"], delegation["reached"]) == ("used", "used", False)


def test_json_holds_every_number_and_no_nan(report):
    plain = json.loads(json.dumps(suite_json(report), allow_nan=False))
    assert plain["num_sessions"] == 5
    assert plain["ceiling"]["macro_average"] == 1.0
    assert plain["controls"]["silence"]["behaviours"]["tone"]["metrics"]["correct"]["value"] == 0.0
    assert set(plain["learnt"]) == {"counting", "tone", "delegation"}
    line = session_json(report.sessions[0], report.traces[0], report.played[0], {"silence": Trace()})
    line = json.loads(json.dumps(line, allow_nan=False))
    assert line["controls"] == {"silence": {"words": [], "calls": []}}
    assert len(line["expected"]) == len(report.sessions[0].expectations)
    assert [text for _, text in line["emitted"]["words"]] == [word.text for word in report.traces[0].words]


def with_rates(report: SuiteReport, model: Rate, control: Rate) -> SuiteReport:
    """The report with the first headline of counting set, for the model and for silence, its only control."""
    metric = HEADLINES[Behaviour.COUNTING][0]
    model_scores = dataclasses.replace(report.scores[Behaviour.COUNTING], rates={metric: model})
    control_scores = dataclasses.replace(report.scores[Behaviour.COUNTING], rates={metric: control})
    return dataclasses.replace(
        report,
        scores={Behaviour.COUNTING: model_scores},
        controls={Control.SILENCE: {Behaviour.COUNTING: control_scores}},
    )


def test_learnt_means_clear_of_every_control(report):
    def learnt(model: Rate, control: Rate) -> bool | None:
        return with_rates(report, model, control).is_learnt(Behaviour.COUNTING)

    assert learnt(Rate(hits=18, cases=20), Rate(hits=0, cases=20)) is True
    assert learnt(Rate(hits=18, cases=20), Rate(hits=14, cases=20)) is False
    assert learnt(Rate(hits=18, cases=20), Rate(hits=0, cases=0)) is None
    assert learnt(Rate(hits=0, cases=0), Rate(hits=0, cases=20)) is None


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="there is no session to evaluate"):
        run_suite(random_player(), [])
    nameless = dataclasses.replace(sessions_of(Behaviour.TONE)[0], meta={})
    with pytest.raises(ValueError, match="was made for no behaviour"):
        run_suite(random_player(), [nameless])


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page(report) -> str:
    return html_report(report, random_player(), {"model": "<random>", "sessions": "made up"}, pictures=1)


def test_the_page_needs_no_other_file(page):
    parsed = _Page()
    parsed.feed(page)
    links = [value for _, attrs in parsed.found for key, value in attrs.items() if key in ("src", "href")]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "&lt;random&gt;" in page
    assert "<random>" not in page
    tags = [tag for tag, _ in parsed.found]
    assert tags.count("figure") == tags.count("audio") == tags.count("svg") == 3
    assert len(re.findall(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", page)) > 20


def test_the_page_plays_the_user_on_the_left_and_the_model_on_the_right(page, report):
    codes = re.findall(r'src="data:audio/flac;base64,([^"]+)"', page)
    session = report.sessions[0]
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(codes[0])), dtype="float32")
    assert samples.shape == (session.num_samples, 2)
    assert rate == session.sample_rate_hz
    np.testing.assert_allclose(samples[:, 0], decode_clip(session.audio[Stream.USER_AUDIO], rate), atol=1e-4)
    own = random_player().own_sound(session, report.played[0])
    assert np.abs(own).max() > 1e-3
    np.testing.assert_allclose(samples[:, 1], np.clip(own, -1, 1), atol=1e-4)


def test_timelines_are_drawn_on_the_grid_of_ticks(page, report):
    drawings = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    counting, tone, delegation = (
        {text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text") if text.get("class") == "lane"}
        for drawing in drawings
    )
    always = {"user", "model text", "model audio", "action", "recorded", "expected"}
    assert counting == always | {"video"}
    assert tone == delegation == always
    session = report.sessions[0]
    (ticks,) = [e.get("d") for e in drawings[0].iter() if e.get("class") == "tick"]
    places = [float(place) for place in re.findall(r"M([\d.]+) ", ticks)]
    assert len(places) == int(session.duration_s / 0.2) + 1
    assert places[5] == pytest.approx(LEFT_PX + PX_PER_S, abs=0.1)
    pictures = [e for e in drawings[0].iter() if e.tag.endswith("}image")]
    assert 5 < len(pictures) <= len(session.frames)


def test_a_session_is_drawn_with_what_was_said_called_and_answered():
    session, clock = delegations()[0], random_player().layout.clock
    event = session.texts_of(Stream.BACKGROUND)[0]
    said = [
        Said(turn=4, emitted_s=1.0, tokens=(), text=" a<b", actions=('{"name":"delegate"}',)),
        Said(turn=999, emitted_s=200.0, tokens=(), text="never", actions=()),
    ]
    played = Played(said=tuple(said), mels=(None, None), background=(event,))
    shown = as_played(session, played, clock, None)
    assert session_from_bytes(session_to_bytes(shown)) == shown
    assert [e.text for e in shown.texts_of(Stream.OWN_TEXT)] == ["a<b"]
    assert Stream.OWN_AUDIO not in shown.streams
    trace = Trace(words=(TimedWord(start_s=1.0, end_s=1.2, text="a"),))
    drawn = session_svg(shown, session, judged(session, trace), clock)
    text = " ".join(filter(None, (e.text for e in ElementTree.fromstring(drawn).iter())))
    for wanted in ("a<b", '{"name":"delegate"}', event.text, "background", "✗"):
        assert wanted in text
    assert "never" not in text
    assert math.isclose(float(re.search(r'data-scale="(\d+)"', drawn).group(1)), PX_PER_S)
