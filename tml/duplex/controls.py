"""The controls of the duplex suite: what stands beside a number, to tell what it was learnt from.

| control          | the model                                             | applies to                 |
|------------------|-------------------------------------------------------|----------------------------|
| silence          | says and does nothing                                 | everything                 |
| swap             | hears and sees another session of the same behaviour  | behaviours of two sessions |
| blank_audio      | hears digital silence                                 | behaviours with user_audio |
| blank_video      | sees black pictures at the same times                 | behaviours with video      |
| blank_background | gets no result                                        | behaviours with background |
| text_only        | hears nothing, and reads the user's words as they end | tone                       |
| words_alone      | is none: the best fixed rule over words               | tone                       |

Blanked input is unlike anything in training; swapped input is not, and shares even the behaviour's rhythm.
"""

import enum
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from tml.duplex.scores import behaviour_of
from tml.duplex.trace import TimedWord, Trace, normalise
from tml.session import Behaviour, Expectation, ExpectationKind, Session, Stream, TextEvent, VideoFrame

GUESS_DELAY_S = 0.2
"""How long after a request `words_alone` guesses: a micro-turn."""


class Control(enum.StrEnum):
    """What stands beside the model's own number."""

    SILENCE = "silence"
    SWAP = "swap"
    BLANK_AUDIO = "blank_audio"
    BLANK_VIDEO = "blank_video"
    BLANK_BACKGROUND = "blank_background"
    TEXT_ONLY = "text_only"
    WORDS_ALONE = "words_alone"


_NEEDS = {
    Control.BLANK_AUDIO: Stream.USER_AUDIO,
    Control.BLANK_VIDEO: Stream.VIDEO,
    Control.BLANK_BACKGROUND: Stream.BACKGROUND,
}
STREAMED = (*_NEEDS, Control.TEXT_ONLY)
"""The controls for which the model has to be streamed once more."""


def applies(control: Control, sessions: Sequence[Session]) -> bool:
    """Whether a control says anything about sessions of one behaviour."""
    if control is Control.SILENCE:
        return True
    if control is Control.SWAP:
        return len(sessions) > 1
    if control in _NEEDS:
        return any(_NEEDS[control] in session.streams for session in sessions)
    return any(session.user_words and behaviour_of(session) is Behaviour.TONE for session in sessions)


def changed(session: Session, control: Control) -> Session:
    """What the model hears and sees in place of a session under one of `STREAMED`.

    The session itself, the same object, if it lacks what the control takes away.

    Raises:
        SessionError: a picture cannot be decoded.
    """
    if control is Control.TEXT_ONLY:
        return _typed(session)
    assert control in STREAMED, control
    taken = _NEEDS[control]
    if taken not in session.streams:
        return session
    if taken is Stream.VIDEO:
        return replace(session, frames=tuple(_black(frame) for frame in session.frames))
    return without(session, taken)


def without(session: Session, *streams: Stream) -> Session:
    """The session without some of its streams of sound and text; the words of a user who is not heard go too."""
    kept = {stream: clip for stream, clip in session.audio.items() if stream not in streams}
    return replace(
        session,
        streams=tuple(stream for stream in session.streams if stream not in streams),
        audio=kept,
        texts=tuple(event for event in session.texts if event.stream not in streams),
        user_words=session.user_words if Stream.USER_AUDIO in kept else (),
    )


def _typed(session: Session) -> Session:
    """The user's words as typed text, each at the sample where it ends."""
    words = tuple(
        TextEvent(stream=Stream.USER_TEXT, start=at, end=at, text=f" {word.text}" if i else word.text)
        for i, word in enumerate(sorted(session.user_words, key=lambda word: word.end))
        for at in [min(word.end, session.num_samples - 1)]
    )
    silent = without(session, Stream.USER_AUDIO)
    return replace(
        silent,
        streams=tuple(dict.fromkeys((*silent.streams, *(word.stream for word in words)))),
        texts=tuple(sorted((*silent.texts, *words), key=lambda event: event.start)),
    )


def _black(frame: VideoFrame) -> VideoFrame:
    """A black picture of the same size, at the same time."""
    with Image.open(io.BytesIO(frame.data)) as picture:
        size = picture.size
    file = io.BytesIO()
    Image.new("RGB", size).save(file, format="PNG")
    return VideoFrame(sample=frame.sample, data=file.getvalue())


def donors(sessions: Sequence[Session]) -> list[int | None]:
    """By session, the index of the one of the same behaviour that it is swapped with; None if there is none.

    It is the next longer one, so that its input lasts; the longest takes the one before it. An output depends on no
    later input, so what the model put out for the donor is what it would put out if it heard it here.
    """
    found: list[int | None] = [None] * len(sessions)
    for behaviour in dict.fromkeys(map(behaviour_of, sessions)):
        same = [i for i, session in enumerate(sessions) if behaviour_of(session) is behaviour]
        same.sort(key=lambda i: (sessions[i].duration_s, i))
        for place, i in enumerate(same):
            if len(same) > 1:
                found[i] = same[place + 1] if place + 1 < len(same) else same[place - 1]
    return found


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A request with the words that were heard in it."""

    session: int
    end_s: float
    tag: str
    answer: str
    words: tuple[str, ...]


def best_guesses(sessions: Sequence[Session]) -> list[Trace]:
    """What somebody says who reads the words of every request, but hears nothing of how they are said.

    For each type of request (the tag of its expectation) that is the best of all fixed rules: always the same answer,
    or always the k-th word from the start or the end, chosen with the answers known. So a model that has learnt
    nothing but words cannot be expected to be better.
    """
    asked = [
        _asked(number, session, item)
        for number, session in enumerate(sessions)
        for item in session.expectations
        if item.kind is ExpectationKind.ANSWER
    ]
    said: list[list[TimedWord]] = [[] for _ in sessions]
    for tag in dict.fromkeys(one.tag for one in asked):
        same = [one for one in asked if one.tag == tag]
        longest = max(len(one.words) for one in same)
        rules: list[list[str]] = [[answer] * len(same) for answer in sorted({one.answer for one in same})]
        rules += [[_word(one, k) for one in same] for k in range(-longest, longest)]
        best = max(rules, key=lambda said: sum(word == one.answer for word, one in zip(said, same, strict=True)))
        for one, word in zip(same, best, strict=True):
            at_s = one.end_s + GUESS_DELAY_S
            said[one.session] += [TimedWord(start_s=at_s, end_s=at_s + GUESS_DELAY_S, text=word)] if word else []
    return [Trace(words=tuple(sorted(words, key=lambda word: word.start_s))) for words in said]


def _asked(number: int, session: Session, item: Expectation) -> _Asked:
    heard = (word.text for word in session.user_words if item.start <= word.start < item.end)
    return _Asked(
        session=number,
        end_s=item.end / session.sample_rate_hz,
        tag=item.tag,
        answer=" ".join(normalise(item.text)),
        words=tuple(normalise(" ".join(heard))),
    )


def _word(one: _Asked, k: int) -> str:
    """The k-th word of a request, from its end if k is negative; empty if it is shorter."""
    return one.words[k] if -len(one.words) <= k < len(one.words) else ""
