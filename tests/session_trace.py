"""The trace of a session's own streams: the best that a model could have emitted."""

from tml.duplex.trace import TimedCall, TimedWord, Trace, normalise
from tml.microturn import Clock
from tml.session import Session, Stream


def trace_of_session(session: Session, clock: Clock) -> Trace:
    """What a model would have emitted that says and does what the session's own streams hold."""

    def emitted_s(sample: int) -> float:
        return clock.emission_s(clock.output_turn_of(sample * clock.sample_rate_hz // session.sample_rate_hz))

    return Trace(
        words=tuple(
            TimedWord(start_s=emitted_s(event.start), end_s=event.end / session.sample_rate_hz, text=word)
            for event in session.texts_of(Stream.OWN_TEXT)
            for word in normalise(event.text)
        ),
        calls=tuple(
            TimedCall(at_s=emitted_s(event.start), payload=event.text) for event in session.texts_of(Stream.ACTION)
        ),
    )
