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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
import scipy.ndimage

from tml.codec import audio
from tml.codec.encode import encode_session
from tml.codec.text import Tokenizer
from tml.codec.waveform import decode_clip, resample
from tml.config import EvaluationConfig, ModelConfig, StreamConfig
from tml.duplex.rates import Rate
from tml.duplex.trace import normalise
from tml.microturn import Clock, EncodedSession, Layout
from tml.params import PyTree
from tml.session import ExpectationKind, Session, Stream, TextEvent
from tml.stream import engine
from tml.stream.engine import TurnOutputs
from tml.stream.inputs import TurnInputs, join_sessions, session_inputs
from tml.stream.outputs import Said, read_session
from tml.stream.placement import place_params

ENVELOPE_S = 0.025
"""Width of the window over which the envelope of speech is taken."""

POSITIONS_STEP = 128
"""Caches hold a multiple of so many positions, so that sets of about the same length share a compiled program."""


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
    params: Mapping[str, PyTree],
    sessions: Sequence[Session],
    model: ModelConfig,
    layout: Layout,
    stream: StreamConfig,
    evaluation: EvaluationConfig,
    tokenizer: Tokenizer,
    conditions: Iterable[Condition] = tuple(Condition),
) -> Report:
    """Streams every session, and the first of them under every control, and scores what was said.

    Raises:
        ValueError: there is no session.
    """
    if not sessions:
        raise ValueError("there is no session to evaluate")
    encoded = [encode_session(session, model, tokenizer) for session in sessions]
    sounds, rate_hz = [heard(session, model) for session in sessions], model.audio.sample_rate_hz
    runner = _Runner(params, model, layout, stream, evaluation.num_slots, tokenizer, encoded)
    scores, said_of = {}, {}
    for condition in conditions:
        most = len(sessions) if condition is Condition.SPEECH else min(len(sessions), evaluation.max_control_sessions)
        if condition is Condition.SWAPPED and most == 1:
            continue  # there is none to swap with
        changed = [
            replace(one, levels_TM=audio.session_frames(sound, model.audio))
            for one, sound in zip(encoded[:most], condition_sounds(sounds[:most], condition, rate_hz), strict=True)
        ]
        said_of[condition] = runner.run(changed)
        scores[condition] = score(sessions[:most], said_of[condition], evaluation.answer_window_s)
    answers = Counter(e.text for session in sessions for e in session.expectations if e.text)
    return Report(
        num_sessions=len(sessions),
        chance=max(answers.values()) / sum(answers.values()) if answers else math.nan,
        scores=scores,
        said=said_of.get(Condition.SPEECH, ()),
    )


class _Runner:
    """Runs sessions through one compiled program, `num_slots` side by side."""

    def __init__(
        self,
        params: Mapping[str, PyTree],
        model: ModelConfig,
        layout: Layout,
        stream: StreamConfig,
        num_slots: int,
        tokenizer: Tokenizer,
        sessions: Sequence[EncodedSession],
    ) -> None:
        # One device takes them where they are.
        self._params = params if stream.tensor == 1 else place_params(params, model, stream)
        self._model, self._layout, self._tokenizer = model, layout, tokenizer
        self._stream, self._num_slots = stream, min(num_slots, len(sessions))
        self._num_turns = max(layout.clock.num_turns(session.num_samples) for session in sessions)
        slots_in = max(int(session_inputs(layout, session, model).counts_B.sum()) for session in sessions)
        # Most turns put out one or two tokens; what none can pass is for a session that talks without end.
        likely = slots_in + max(2 + layout.own_positions_per_turn, layout.min_slots_out) * self._num_turns
        self._most_positions = slots_in + layout.max_slots_out * self._num_turns
        self._make_room(-(-likely // POSITIONS_STEP) * POSITIONS_STEP)

    def _make_room(self, max_positions: int) -> None:
        """Builds the program for caches of that size, which cost in every turn whether they are full or not."""
        self._max_positions = max_positions
        stream = replace(self._stream, max_positions=max_positions)
        self._state = engine.init_state(self._model, self._layout, stream, self._num_slots)
        step = engine.make_step(self._model, self._layout, stream)
        self._run = jax.jit(lambda params, state, inputs: engine.scan_turns(step, params, state, inputs))

    def run(self, sessions: Sequence[EncodedSession]) -> list[list[Said]]:
        """What was said in each session, turn by turn. A session draws by its number, in any slot and company."""
        said: list[list[Said]] = []
        for first in range(0, len(sessions), self._num_slots):
            group = list(sessions[first : first + self._num_slots])
            idle = [group[0]] * (self._num_slots - len(group))
            columns = [session_inputs(self._layout, session, self._model) for session in group + idle]
            outputs = self._outputs(join_sessions(columns, self._num_turns), range(first, first + self._num_slots))
            for slot, session in enumerate(group):
                turns = self._layout.clock.num_turns(session.num_samples)
                said.append(read_session(outputs, slot, turns, self._layout, self._tokenizer))
        return said

    def _outputs(self, inputs: TurnInputs, numbers: Sequence[int]) -> TurnOutputs:
        """Streams one group; anew, in caches that hold anything, if a session has said more than is likely."""
        keys_B2 = engine.session_keys(numbers)
        state, outputs = self._run(self._params, replace(self._state, keys_B2=keys_B2), inputs)
        if int(np.max(state.decode.num_positions_B)) > self._max_positions:
            self._make_room(self._most_positions)
            _, outputs = self._run(self._params, replace(self._state, keys_B2=keys_B2), inputs)
        return outputs


def heard(session: Session, model: ModelConfig) -> np.ndarray:
    """The sound of `user_audio` at the model's rate; silence if the session has none."""
    clip = session.audio.get(Stream.USER_AUDIO)
    if clip is None:
        return np.zeros(session.num_samples * model.audio.sample_rate_hz // session.sample_rate_hz, np.float32)
    samples = decode_clip(clip, session.sample_rate_hz)
    return resample(samples, session.sample_rate_hz, model.audio.sample_rate_hz)


def condition_sounds(
    sounds: Sequence[np.ndarray], condition: Condition, sample_rate_hz: int, seed: int = 0
) -> list[np.ndarray]:
    """The sounds of all sessions under a condition; each keeps its length."""
    if condition is Condition.SPEECH:
        return list(sounds)
    if condition is Condition.BLANKED:
        return [np.zeros_like(sound) for sound in sounds]
    if condition is Condition.SWAPPED:
        return [np.resize(other, len(sound)) for sound, other in zip(sounds, [*sounds[1:], sounds[0]], strict=True)]
    rng = np.random.default_rng(seed)
    return [envelope_noise(sound, rng, sample_rate_hz) for sound in sounds]


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
