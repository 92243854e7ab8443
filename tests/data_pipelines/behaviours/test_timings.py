"""What is particular to a behaviour: when it happens, and that words alone do not give it away."""

import functools
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from performances import RATE, both_splits, sessions_of, sound, task_of

from data_pipelines import espeak
from data_pipelines.behaviours.calls import TOOLS
from data_pipelines.behaviours.cast import Axis, BehaviourConfig, Cast, held_out_pairs
from data_pipelines.behaviours.stage import Stage, call
from data_pipelines.behaviours.vocabulary import AFFIXES, CUES, DIGITS, NEW_AFFIXES, SECONDS, TIMED_WORDS
from data_pipelines.speech import audible_span
from data_pipelines.voices import DEFAULT_CACHE
from tml.session import Behaviour, ExpectationKind, Stream

KIND = ExpectationKind


def said(session) -> str:
    return " ".join(word.text for word in session.user_words)


def of_kind(session, *kinds):
    return [item for item in session.expectations if item.kind in kinds]


def cast_of(novel: frozenset = frozenset(), seed: int = 0) -> Cast:
    return Cast(
        rng=np.random.default_rng(seed),
        speaker=espeak.Voice(),
        novel=novel,
        config=BehaviourConfig(),
        split="train",
        cache=DEFAULT_CACHE,
    )


@functools.cache
def tones() -> dict[str, Counter]:
    """By kind of tone, how often each way of saying the same occurs, told by what it asks for."""
    found: dict[str, Counter] = defaultdict(Counter)
    for index in range(60):
        session = task_of(Behaviour.TONE).session("train", index)
        for item in of_kind(session, KIND.ANSWER):
            words = [w.text for w in session.user_words if item.start <= w.start < item.end]
            last = {"emphasis": words[-2:], "pause": words[-3:]}.get(item.tag)
            found[item.tag][item.text if last is None else str(last.index(item.text))] += 1
            found[f"{item.tag}: {words[-1]}"][item.text] += 1
    return dict(found)


def test_pauses_lie_inside_requests_and_last_what_they_should():
    pauses = 0
    for session in both_splits(Behaviour.PAUSE_HANDLING):
        answers = of_kind(session, KIND.ANSWER)
        for item in of_kind(session, KIND.SILENCE):
            if item.tag == "pause":
                pauses += 1
                assert 0.4 * RATE - 1 <= item.end - item.start <= 1.2 * RATE + 1
                assert any(answer.start < item.start and item.end < answer.end for answer in answers)
    assert pauses > 20


def test_pauses_are_silent_in_quiet_sessions():
    for session in both_splits(Behaviour.PAUSE_HANDLING):
        if session.meta["noise"] == "none":
            user = sound(session, Stream.USER_AUDIO)
            for item in of_kind(session, KIND.SILENCE):
                if item.tag == "pause":
                    assert not user[item.start : item.end].any()


def test_an_interrupted_model_falls_silent_and_was_speaking():
    stops = 0
    for session in both_splits(Behaviour.INTERRUPTION):
        own = sound(session, Stream.OWN_AUDIO)
        for stop in of_kind(session, KIND.STOP):
            stops += 1
            assert own[stop.start - RATE : stop.start].any()
            assert not own[stop.start + round(0.6 * RATE) : stop.end].any()
            cut = stop.start + audible_span(own[stop.start : stop.end])[1]
            assert np.abs(own[max(cut - 4, 0) : cut]).max() < 0.1
    assert stops > 10


def test_nods_follow_sentences_of_announced_stories_only():
    announced = 0
    for session in both_splits(Behaviour.BACKCHANNEL):
        nods = of_kind(session, KIND.NOD)
        if nods:
            announced += 1
            assert "story" in said(session)
            assert {event.text for event in session.texts_of(Stream.OWN_TEXT)} == {"okay"}
            assert len(session.texts_of(Stream.OWN_TEXT)) == len(nods)
        elif not session.texts_of(Stream.OWN_TEXT):
            assert "story" not in said(session)
    assert announced >= 3


def test_timed_words_come_when_they_were_asked_for():
    delays = Counter()
    for session in both_splits(Behaviour.TIMED):
        due = of_kind(session, KIND.SAY)
        request = [item for item in session.expectations if item.tag == "request"]
        for repeat, item in enumerate(due, 1):
            (word,) = [w for w in SECONDS if re.search(rf"(in|every) {w} seconds", said(session))][:1]
            wanted = request[0].end + repeat * DIGITS.index(word) * RATE
            assert (item.start + item.end) / 2 == pytest.approx(wanted, abs=2)
            events = [e for e in session.texts_of(Stream.OWN_TEXT) if item.start < e.start <= item.end]
            assert 0 <= min(e.start for e in events) - wanted < 0.23 * RATE
            delays[word] += 1
    assert len(delays) == 4


def test_replies_to_cues_overlap_the_list_and_near_words_get_none():
    overlapping = near = 0
    for session in both_splits(Behaviour.CUED):
        for event in session.texts_of(Stream.OWN_TEXT):
            overlapping += any(w.start < event.end and event.start < w.end for w in session.user_words)
        if of_kind(session, KIND.SAY):
            near += bool({*CUES.values()} & {word.text for word in session.user_words})
            asked = re.search(r"when I say (\w+) say (\w+)", said(session))
            assert {item.text for item in of_kind(session, KIND.SAY)} == {asked[2]}
            listed = said(session)[asked.end() :].split()
            assert listed.count(asked[1]) == len(of_kind(session, KIND.SAY))
    assert overlapping > 5
    assert near > 5


def test_repetition_overlaps_the_next_word():
    overlapping, total = 0, 0
    for session in both_splits(Behaviour.SIMULTANEOUS):
        for event in session.texts_of(Stream.OWN_TEXT):
            total += 1
            overlapping += any(w.start < event.end and event.start < w.end for w in session.user_words)
    assert overlapping > total / 2 > 20


@pytest.mark.parametrize("kind", ["pitch", "rate", "emphasis", "pause"])
def test_the_words_alone_do_not_tell_the_tone(kind):
    """For each sentence both answers occur, about equally often: from the text the best guess is one half."""
    ways = tones()[kind]
    assert len(ways) == 2
    assert min(ways.values()) / ways.total() > 0.25
    if kind in ("pitch", "rate"):
        sentences = [counts for name, counts in tones().items() if name.startswith(f"{kind}: ")]
        assert len(sentences) == 3
        assert all(len(counts) == 2 for counts in sentences)


def test_tone_is_in_the_sound():
    """A stressed word is louder than its neighbour; what is said fast is shorter."""
    lengths, stressed = {"fast": [], "slow": []}, []
    for session in both_splits(Behaviour.TONE):
        user = sound(session, Stream.USER_AUDIO)
        for item in of_kind(session, KIND.ANSWER):
            words = [w for w in session.user_words if item.start <= w.start < item.end]
            if item.tag == "emphasis":
                loud = {w.text: np.sqrt(np.mean(np.square(user[w.start : w.end]))) for w in words[-2:]}
                stressed.append(max(loud, key=loud.get) == item.text)
            if item.tag == "rate":
                lengths[item.text].append(item.end - item.start)
    assert max(lengths["fast"]) < min(lengths["slow"])
    assert np.mean(stressed) > 0.85


def test_a_delegation_is_talked_over_until_its_result_is_said():
    endings = set()
    for session in both_splits(Behaviour.DELEGATION):
        calls = session.texts_of(Stream.ACTION)
        chunks = session.texts_of(Stream.BACKGROUND)
        if not calls:
            assert not chunks
            continue
        assert calls[0].text == call("delegate", {})
        assert chunks[0].start >= calls[0].start + RATE
        for item in of_kind(session, KIND.SAY):
            endings.add(item.tag)
            if item.tag in ("result", "chunks"):
                assert chunks[-1].text == f"result {item.text.split()[-1]}"
                assert item.start == chunks[-1].start
            elif item.tag == "failure":
                assert [chunk.text for chunk in chunks] == ["failed"]
            else:
                assert [c.text for c in calls] == [call("delegate", {}), call("cancel", {})]
                late = [e for e in session.texts_of(Stream.OWN_TEXT) if e.start > chunks[-1].start]
                assert not late
    assert {"result", "chunks"} <= endings


def test_tools_are_called_while_the_count_goes_on():
    calls = 0
    for session in both_splits(Behaviour.TOOLS):
        own = session.texts_of(Stream.OWN_TEXT)
        assert [event.text for event in own] == list(DIGITS[1:])
        for event in session.texts_of(Stream.ACTION):
            calls += 1
            assert own[0].start < event.start <= own[-1].end + RATE
    assert calls > 15


def test_pairs_of_the_splits_are_disjoint_and_show_everything_on_both_sides():
    for firsts, others in ((("a", "b"), DIGITS[:4]), (SECONDS, TIMED_WORDS), (tuple(CUES), DIGITS[:4])):
        train, heldout = (
            {cast_of(novel, seed).pair(firsts, others, Axis.TIME) for seed in range(400)}
            for novel in (frozenset(), frozenset([Axis.TIME]))
        )
        assert not train & heldout
        assert len(train) + len(heldout) == len(firsts) * len(others)
        assert {first for first, _ in train} == {*firsts}
        assert {other for _, other in train} == {*others}
        assert len(heldout) == len(held_out_pairs(len(firsts), len(others)))


def test_held_out_wordings_use_words_that_train_in_ways_that_do_not():
    assert not {*AFFIXES} & {*NEW_AFFIXES}
    words = {word for pair in AFFIXES for part in pair for word in part.split()}
    assert {word for pair in NEW_AFFIXES for part in pair for word in part.split()} <= words


PAIRS = {
    Behaviour.PROACTIVE: r"the (\w+) turns (\w+)",
    Behaviour.TIMED: r"(?:in|every) (\w+) seconds say (\w+)",
    Behaviour.CUED: r"when I say (\w+) say (\w+)",
    Behaviour.TONE: r"I want (\w+) (\w+)",
    Behaviour.DELEGATION: r"find the (\w+) of (\w+)",
    Behaviour.TOOLS: r"please (make it|paint it|draw a|erase the|volume|channel) (\w+)",
}
"""How what a request pairs is said."""


@pytest.mark.parametrize("behaviour", PAIRS)
def test_held_out_pairs_never_occur_in_training_sessions(behaviour):
    train, heldout = (
        {pair for session in sessions_of(behaviour, split) for pair in re.findall(PAIRS[behaviour], said(session))}
        for split in ("train", "heldout")
    )
    assert len(train) > 2
    assert len(heldout) > 1
    assert not train & heldout


def test_held_out_requests_have_held_out_wordings_alone():
    """What stands around `when I say X say Y`, in both splits."""
    around = {
        split: {
            match.groups()
            for session in sessions_of(Behaviour.CUED, split)
            if (match := re.match(r"(.*?) ?when I say \w+ say \w+(?: (please))?", said(session)))
        }
        for split in ("train", "heldout")
    }
    known, new = ({(before, behind or None) for before, behind in pairs} for pairs in (AFFIXES, NEW_AFFIXES))
    assert len(around["train"]) > 2
    assert around["train"] <= known
    assert len(around["heldout"]) > 1
    assert around["heldout"] <= new


def test_every_tool_and_every_value_of_its_argument_trains_and_a_pair_of_each_kind_is_held_out():
    for forms, _, values in TOOLS:
        held = held_out_pairs(len(forms), len(values))
        trained = {(i, j) for i in range(len(forms)) for j in range(len(values))} - held
        assert held
        assert {i for i, _ in trained} == {*range(len(forms))}
        assert {j for _, j in trained} == {*range(len(values))}


def test_where_objects_are_held_out_only_pairs_of_shape_and_colour_are_waited_for():
    tags = {
        split: {e.tag for s in sessions_of(Behaviour.PROACTIVE, split) for e in s.expectations if e.kind is KIND.SAY}
        for split in ("train", "heldout")
    }
    assert tags == {"train": {"turns", "anything", "changes"}, "heldout": {"turns"}}


def test_the_model_waits_until_it_has_finished_and_stops_in_the_middle_of_a_word():
    stage = Stage(200)
    first = stage.say("seven", 100)
    second = stage.say("two", 200)
    assert first.start == 3_200
    assert second.start % 3_200 == 0
    assert first.end <= second.start < first.end + 3_200
    stage.fall_silent(second.start, first.start + 4_000)
    (line,) = stage.lines
    assert line.end == first.start + 4_000
    assert line.words[-1].end <= line.end
    assert np.abs(line.samples[-3:]).max() < 0.01


def test_silence_is_expected_around_windows():
    stage = Stage(200)
    stage.expect_silence(0, 100, "x", [(60, 80), (10, 20)])
    assert [(e.start, e.end) for e in stage.expectations] == [(0, 10), (21, 60), (81, 100)]
    stage.expectations.clear()
    stage.expect_silence(50, 100, "x", [(10, 60), (90, 120)])
    assert [(e.start, e.end) for e in stage.expectations] == [(61, 90)]
