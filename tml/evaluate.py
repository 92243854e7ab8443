"""The behavioural evaluation: sessions through the streaming engine, scored against their expectations.

Every number stands beside its controls: the same sessions with the sound blanked, swapped for
another session's, and replaced by noise with the envelope of the speech (timing can be read from
energy alone, so only the accuracy shows that words were understood).

Responded = any word emitted within the answer window after the request's end; correct = the first words in
it are the answer's; take-over = any word emitted inside a pause; premature = any word emitted during the
request, in a pause or not; latency = emission of the first word minus the request's end.
"""

import enum
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.ndimage

from tml.codec.waveform import decode_clip, encode_clip, resample
from tml.config import EvaluationConfig
from tml.duplex.player import Player
from tml.duplex.rates import Rate
from tml.duplex.trace import normalise
from tml.microturn import Clock
from tml.session import ExpectationKind, Session, Stream, TextEvent
from tml.stream.outputs import Said

ENVELOPE_S = 0.025
"""Width of the window over which the envelope of speech is taken."""


class Condition(enum.StrEnum):
    """What the model hears in place of a session's sound."""

    SPEECH = "speech"
    BLANKED = "blanked"
    SWAPPED = "swapped"
    ENVELOPE_NOISE = "envelope noise"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one condition gave.

    Attributes:
        responded: requests answered by any word inside the window.
        correct: requests whose first words inside the window were those of the answer.
        takeover: pauses inside requests during which a word was said.
        premature: requests during which, pauses or not, a word was said.
        false_alarm: other spans of expected silence in which a word was said.
        latencies_s: of every response.
        correct_by_tag: `correct` by request type.
    """

    responded: Rate
    correct: Rate
    takeover: Rate
    premature: Rate
    false_alarm: Rate
    latencies_s: tuple[float, ...]
    correct_by_tag: Mapping[str, Rate] = field(default_factory=dict)

    @property
    def median_latency_s(self) -> float:
        """Median over responses; not a number when there was none."""
        return float(np.median(self.latencies_s)) if self.latencies_s else math.nan


@dataclass(frozen=True, kw_only=True)
class Report:
    """The evaluation of one set of sessions.

    Attributes:
        num_sessions: sessions streamed; the controls stream the first `max_control_sessions` of them.
        chance: accuracy of always answering with the commonest answer.
        scores: by condition.
        said: what was said in every session under SPEECH, turn by turn.
    """

    num_sessions: int
    chance: float
    scores: Mapping[Condition, Scores]
    said: Sequence[Sequence[Said]]


def evaluate(
    player: Player,
    sessions: Sequence[Session],
    evaluation: EvaluationConfig,
    conditions: Sequence[Condition] = tuple(Condition),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Streams every session, and the first of them under every control, and scores what was said.

    Args:
        player: the model.
        sessions: one or more.
        evaluation: how many sessions the controls stream, and how long an answer counts.
        conditions: what the model hears.
        progress: called with the micro-turns done and the micro-turns to do.

    Raises:
        ValueError: there is no session, or one that expects more than answers and silence.
    """
    if not sessions:
        raise ValueError("there is no session to evaluate")
    kinds = {item.kind for session in sessions for item in session.expectations}
    if unknown := sorted(kinds - {ExpectationKind.ANSWER, ExpectationKind.SILENCE}):
        raise ValueError(
            f"the sessions expect {', '.join(unknown)}, not only answers and silence; evaluate them with --suite=duplex"
        )
    few = sessions[: evaluation.max_control_sessions]
    streamed = {condition: sessions if condition is Condition.SPEECH else few for condition in conditions}
    if len(few) == 1:
        streamed.pop(Condition.SWAPPED, None)  # there is none to swap with
    total = sum(player.num_turns(session) for some in streamed.values() for session in some)
    scores, said_of, done = {}, {}, 0
    for condition, some in streamed.items():

        def show(turns: int, before: int = done) -> None:
            progress(before + turns, total)

        played = player.play(heard_instead(some, condition), show)
        done += sum(map(player.num_turns, some))
        said_of[condition] = [one.said for one in played]
        scores[condition] = score(some, said_of[condition], evaluation.answer_window_s)
    answers = Counter(e.text for session in sessions for e in session.expectations if e.text)
    return Report(
        num_sessions=len(sessions),
        chance=max(answers.values()) / sum(answers.values()) if answers else math.nan,
        scores=scores,
        said=said_of.get(Condition.SPEECH, ()),
    )


def heard_instead(sessions: Sequence[Session], condition: Condition) -> list[Session]:
    """The sessions with the sound of `user_audio` that the model hears under a condition."""
    if condition is Condition.SPEECH:
        return list(sessions)
    rates_hz = [session.sample_rate_hz for session in sessions]
    if condition is Condition.SWAPPED:
        others = [*sessions[1:], sessions[0]]
        sounds = [resample(heard(one), one.sample_rate_hz, rate) for one, rate in zip(others, rates_hz, strict=True)]
    else:
        sounds = [heard(session) for session in sessions]
    rng = np.random.default_rng(0)
    changed = []
    for session, sound in zip(sessions, sounds, strict=True):
        if condition is Condition.BLANKED:
            sound = np.zeros_like(sound)
        elif condition is Condition.ENVELOPE_NOISE:
            sound = envelope_noise(sound, rng, session.sample_rate_hz)
        clip = encode_clip(np.resize(sound, session.num_samples), session.sample_rate_hz)
        streams = tuple(dict.fromkeys((*session.streams, Stream.USER_AUDIO)))
        changed.append(replace(session, streams=streams, audio={**session.audio, Stream.USER_AUDIO: clip}))
    return changed


def heard(session: Session) -> np.ndarray:
    """The sound of `user_audio` at the session's rate; silence if the session has none."""
    clip = session.audio.get(Stream.USER_AUDIO)
    return np.zeros(session.num_samples, np.float32) if clip is None else decode_clip(clip, session.sample_rate_hz)


def envelope_noise(sound: np.ndarray, rng: np.random.Generator, sample_rate_hz: int) -> np.ndarray:
    """White noise with the short-time energy of a sound."""
    width = int(ENVELOPE_S * sample_rate_hz)
    power = scipy.ndimage.uniform_filter1d(np.square(sound, dtype=np.float64), width, mode="constant")
    noise = rng.standard_normal(len(sound))
    return (noise * np.sqrt(np.maximum(power, 0.0))).astype(np.float32)


def words_of(said: Sequence[Said]) -> list[tuple[float, str]]:
    """Normalised words with the time at which each was emitted."""
    return [(turn.emitted_s, word) for turn in said for word in normalise(turn.text)]


def score(sessions: Sequence[Session], said: Sequence[Sequence[Said]], answer_window_s: float) -> Scores:
    """Holds what was said against the expectations of the sessions."""
    hits: Counter[str] = Counter()
    cases: Counter[str] = Counter()
    by_tag: dict[str, list[bool]] = defaultdict(list)
    latencies = []
    for session, turns in zip(sessions, said, strict=True):
        words = words_of(turns)
        for expected in session.expectations:
            start, end = (sample / session.sample_rate_hz for sample in (expected.start, expected.end))
            if expected.kind is ExpectationKind.ANSWER:
                inside = [(at, word) for at, word in words if end < at <= end + answer_window_s]
                wanted = normalise(expected.text)
                correct = bool(inside) and [word for _, word in inside[: len(wanted)]] == wanted
                cases["request"] += 1
                hits["responded"] += bool(inside)
                hits["correct"] += correct
                hits["premature"] += any(start < at <= end for at, _ in words)
                by_tag[expected.tag].append(correct)
                latencies += [inside[0][0] - end] if inside else []
            else:
                name = "pause" if expected.tag == "pause" else "silence"
                cases[name] += 1
                hits[name] += any(start <= at < end for at, _ in words)
    return Scores(
        responded=Rate(hits=hits["responded"], cases=cases["request"]),
        correct=Rate(hits=hits["correct"], cases=cases["request"]),
        takeover=Rate(hits=hits["pause"], cases=cases["pause"]),
        premature=Rate(hits=hits["premature"], cases=cases["request"]),
        false_alarm=Rate(hits=hits["silence"], cases=cases["silence"]),
        latencies_s=tuple(latencies),
        correct_by_tag={tag: Rate(hits=sum(marks), cases=len(marks)) for tag, marks in sorted(by_tag.items())},
    )


def with_said(session: Session, said: Sequence[Said], clock: Clock) -> Session:
    """The session with the model's own words in place of the recorded ones, for a picture."""
    rate = session.sample_rate_hz
    texts = [event for event in session.texts if event.stream is not Stream.OWN_TEXT]
    for turn in said:
        start = int(turn.emitted_s * rate)
        if turn.text.strip() and start < session.num_samples:
            end = min(start + clock.turn_samples * rate // clock.sample_rate_hz, session.num_samples)
            texts.append(TextEvent(stream=Stream.OWN_TEXT, start=start, end=end, text=turn.text.strip()))
    streams: tuple[Stream, ...] = tuple(stream for stream in session.streams if stream is not Stream.OWN_TEXT)
    if any(event.stream is Stream.OWN_TEXT for event in texts):
        streams = (*streams, Stream.OWN_TEXT)
    return replace(session, texts=tuple(sorted(texts, key=lambda event: event.start)), streams=streams)


def report_table(report: Report) -> str:
    """The report as text: a row a condition, 95 % intervals in brackets."""
    header = ("heard", "responded", "accuracy", "pause take-over", "premature", "false alarms", "median latency")
    rows: list[tuple[str, ...]] = [header]
    for condition, scores in report.scores.items():
        rates = (scores.responded, scores.correct, scores.takeover, scores.premature, scores.false_alarm)
        latency = f"{scores.median_latency_s:.2f} s" if scores.latencies_s else "-"
        rows.append((condition.value, *map(_cell, rates), latency))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(f"{report.num_sessions} sessions; always the commonest answer would be right {report.chance:.3f}")
    return "\n".join(lines)


def _cell(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.value:.3f} [{low:.3f}, {high:.3f}]" if rate.cases else "-"


def report_json(report: Report) -> dict[str, Any]:
    """The report as plain values, for a file."""

    def plain(rate: Rate) -> dict[str, Any]:
        known = rate.cases > 0
        return {
            "value": rate.value if known else None,
            "interval": rate.interval if known else None,
            "cases": rate.cases,
        }

    conditions = {
        condition.value: {
            "responded": plain(scores.responded),
            "accuracy": plain(scores.correct),
            "pause_takeover": plain(scores.takeover),
            "premature": plain(scores.premature),
            "false_alarms": plain(scores.false_alarm),
            "median_latency_s": scores.median_latency_s if scores.latencies_s else None,
            "accuracy_by_type": {tag: plain(rate) for tag, rate in scores.correct_by_tag.items()},
        }
        for condition, scores in report.scores.items()
    }
    chance = None if math.isnan(report.chance) else report.chance
    return {"num_sessions": report.num_sessions, "chance_accuracy": chance, "conditions": conditions}


def said_json(session: Session, said: Sequence[Said]) -> dict[str, Any]:
    """What was expected and what was said in one session, in seconds, as plain values for a line of a file."""
    rate = session.sample_rate_hz
    expected = [
        {"kind": e.kind.value, "start_s": e.start / rate, "end_s": e.end / rate, "text": e.text, "tag": e.tag}
        for e in session.expectations
    ]
    spoken = [{"emitted_s": turn.emitted_s, "text": turn.text.strip()} for turn in said if turn.text.strip()]
    return {"session": session.session_id, "meta": dict(session.meta), "expected": expected, "said": spoken}
