"""Writes outputs in the folder layout of Full-Duplex-Bench v1, so that its public scorer runs on them.

    smooth_turn_taking/0/input.wav          the user's sound
                        /output.wav         the model's, equally long
                        /output.json        {"text": ..., "chunks": [{"text": ..., "timestamp": [s, e]}, ...]}
                        /turn_taking.json   [{"text": "[TURN-TAKING]", "timestamp": [end, end]}]
    pause_handling/0/                       pause.json, a [PAUSE] for each; the sample ends with the last pause
    user_interruption/0/                    interrupt.json; output.json begins where the interruption ends
    backchannel/0/
    tml_export.json                         by which the next evaluation knows what it may replace (tml.whole_folder)

Sessions become samples: one a request, one a paused request, one an interruption, one a story. Names of
samples are numbers, because the scorer of backchannels skips all others; it knows 55 of them, by when people nodded
in its own recordings, so that more stories are left out, and its divergence from people says nothing about ours. In
place of transcripts of the sound, `output.json` holds the emitted words. The layout is that of v1_v1.5/ in
github.com/DanielLin94144/Full-Duplex-Bench (commit d7336bd), whose scorers read exactly these files.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from tml.codec.waveform import decode_clip
from tml.duplex.scores import behaviour_of
from tml.duplex.trace import Trace
from tml.session import Behaviour, ExpectationKind, Session, Stream
from tml.whole_folder import Kind, refuse_others, whole_folder

TURN_TAKING, PAUSES, INTERRUPTIONS, BACKCHANNELS = (
    "smooth_turn_taking",
    "pause_handling",
    "user_interruption",
    "backchannel",
)
MAX_BACKCHANNELS = 55
"""Samples of which the public scorer knows when people nodded; it breaks at the next one."""

SCORED = r"[^/]+/\d+/(rating|latency_intervals|content_tag|general_split)\.json"
"""What the public scorer adds to the samples."""


def check_place(root: Path) -> None:
    """Raises ValueError unless the folder is empty, not there, or an earlier writing, scored or not."""
    refuse_others(root, Kind.FULL_DUPLEX_BENCH, ValueError, SCORED)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A part of a session as the benchmark wants it.

    Attributes:
        task: its folder.
        start: first sample of the session that belongs to it.
        end: one past the last.
        said_from: words emitted earlier are left out.
        annotations: the task's own file, by name; times are seconds from `start`.
    """

    task: str
    start: int
    end: int
    said_from: int
    annotations: dict[str, Any] = field(default_factory=dict)


def write_samples(
    root: Path | str, sessions: Sequence[Session], traces: Sequence[Trace], own_sounds: Sequence[np.ndarray]
) -> dict[str, int]:
    """Writes the samples that the sessions hold in place of earlier ones; returns how many there are of each task.

    Args:
        root: the folder in which the tasks' folders are made.
        sessions: that were made for a behaviour; those of other behaviours than the four hold no sample.
        traces: what was emitted in each.
        own_sounds: what the model sounded like in each, at the session's rate, as long as the session.

    Raises:
        ValueError: a sound has another length than its session, or the lists have; or the folder holds something
            that is no earlier writing.
    """
    counts: Counter[str] = Counter()
    # Whole, and in the place of nothing but earlier ones: the public scorer averages over all that it finds.
    with whole_folder(Path(root), Kind.FULL_DUPLEX_BENCH, ValueError, SCORED) as staging:
        for session, trace, own in zip(sessions, traces, own_sounds, strict=True):
            if len(own) != session.num_samples:
                raise ValueError(
                    f"session {session.session_id} has {session.num_samples} samples, the model's sound {len(own)}"
                )
            for sample in samples_of(session):
                if sample.task == BACKCHANNELS and counts[BACKCHANNELS] == MAX_BACKCHANNELS:
                    continue
                folder = staging / sample.task / str(counts[sample.task])
                _write(folder, session, trace, own, sample)
                counts[sample.task] += 1
    return dict(counts)


def samples_of(session: Session) -> Iterator[Sample]:
    """The samples that a session holds."""
    rate, behaviour = session.sample_rate_hz, behaviour_of(session)
    answers = [e for e in session.expectations if e.kind is ExpectationKind.ANSWER]
    if behaviour is Behaviour.TURN_TAKING:
        for i, asked in enumerate(answers):
            end = answers[i + 1].start if i + 1 < len(answers) else session.num_samples
            over_s = (asked.end - asked.start) / rate
            note = [{"text": "[TURN-TAKING]", "timestamp": [over_s, over_s]}]
            yield Sample(
                task=TURN_TAKING,
                start=asked.start,
                end=end,
                said_from=asked.start,
                annotations={"turn_taking.json": note},
            )
    elif behaviour is Behaviour.PAUSE_HANDLING:
        for asked in answers:
            pauses = [p for p in session.expectations if p.tag == "pause" and asked.start <= p.start < asked.end]
            if pauses:
                spans = [[(p.start - asked.start) / rate, (p.end - asked.start) / rate] for p in pauses]
                note = [{"text": "[PAUSE]", "timestamp": span} for span in spans]
                yield Sample(
                    task=PAUSES,
                    start=asked.start,
                    end=pauses[-1].end,
                    said_from=asked.start,
                    annotations={"pause.json": note},
                )
    elif behaviour is Behaviour.INTERRUPTION:
        yield from _interruptions(session)
    elif behaviour is Behaviour.BACKCHANNEL and any(e.kind is ExpectationKind.NOD for e in session.expectations):
        yield Sample(task=BACKCHANNELS, start=0, end=session.num_samples, said_from=0)


def _interruptions(session: Session) -> Iterator[Sample]:
    for stop in session.expectations:
        if stop.kind is ExpectationKind.STOP:
            note = {
                "context": _words(session, 0, stop.start),
                "interrupt": _words(session, stop.start, stop.end),
                "timestamp": [stop.start / session.sample_rate_hz, stop.end / session.sample_rate_hz],
            }
            yield Sample(
                task=INTERRUPTIONS,
                start=0,
                end=session.num_samples,
                said_from=stop.end,
                annotations={"interrupt.json": [note]},
            )


def _words(session: Session, start: int, end: int) -> str:
    return " ".join(word.text for word in session.user_words if start <= word.start < end)


def _write(folder: Path, session: Session, trace: Trace, own: np.ndarray, sample: Sample) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rate, span = session.sample_rate_hz, slice(sample.start, sample.end)
    heard = session.audio.get(Stream.USER_AUDIO)
    user = np.zeros(session.num_samples, np.float32) if heard is None else decode_clip(heard, rate)
    soundfile.write(folder / "input.wav", user[span], rate, subtype="PCM_16")
    soundfile.write(folder / "output.wav", own[span], rate, subtype="PCM_16")
    begin_s, end_s = sample.start / rate, sample.end / rate
    chunks: list[dict[str, Any]] = [
        {"text": word.text, "timestamp": [word.start_s - begin_s, min(word.end_s, end_s) - begin_s]}
        for word in trace.words
        if sample.said_from / rate <= word.start_s < end_s
    ]
    output = {"text": " ".join(chunk["text"] for chunk in chunks), "chunks": chunks}
    for name, content in {"output.json": output, **sample.annotations}.items():
        (folder / name).write_text(json.dumps(content, indent=4) + "\n")
