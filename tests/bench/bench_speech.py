"""How well the own speech of a model is understood: word error rates of Whisper tiny.en (the extra `referee`).

Run: python -m tests.bench.bench_speech --model=runs/duplex_tiny --data=data/duplex_tiny/test [--num_sessions=60]

Of the first sessions with four own words or more: what the model said in the streaming engine, against the words it
emitted; and the recorded own sound through the same mels and vocoder, which is the ceiling of any model. Sessions in
which Spanish is said are left out: the recogniser knows English alone.
"""

import argparse
from pathlib import Path

import numpy as np

from data_pipelines.records import iter_sessions
from launch.app import prepare_jax
from tests.bench.referee import RATE_HZ, Referee, error_rate
from tml.codec.encode import encode_session
from tml.codec.waveform import resample
from tml.duplex.player import Player
from tml.export.bundle import Model, open_model
from tml.session import Session, Stream
from tml.stream.own_voice import OwnVoice

LEAST_WORDS = 4
LOUD = 0.02


def vocoded(session: Session, model: Model) -> np.ndarray:
    """The recorded own sound of a session through the model's mels and vocoder, turn by turn, at the model's rate."""
    mels_TY = encode_session(session, model.experiment.model, model.tokenizer).own_mels_TY
    assert mels_TY is not None
    size = model.layout.own_positions_per_turn
    voice = OwnVoice(model.experiment.model, size)
    # What a turn says is heard in the next one, so the first turn's hops are never said.
    for first in range(size, len(mels_TY) - size + 1, size):
        voice.say(mels_TY[first : first + size])
    clock = model.layout.clock
    return voice.heard(session.num_samples * clock.sample_rate_hz // session.sample_rate_hz)


def audible(sound: np.ndarray, rate_hz: int) -> np.ndarray:
    """From 0.2 s before the first loud sample to 0.2 s behind the last: long silence misleads recognisers."""
    loud = np.flatnonzero(np.abs(sound) > LOUD)
    if not len(loud):
        return sound
    margin = rate_hz // 5
    return sound[max(0, int(loud[0]) - margin) : int(loud[-1]) + margin]


def main() -> None:
    """Prints both error rates with their intervals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="run folder or bundle of a model with a voice")
    parser.add_argument("--data", type=Path, required=True, help="sessions with own_audio")
    parser.add_argument("--num_sessions", type=int, default=60)
    flags = parser.parse_args()
    prepare_jax()
    referee, model = Referee(), open_model(flags.model)
    config, sessions = model.experiment, []
    for session in iter_sessions(flags.data):
        is_spanish = any(item.tag == "spanish" for item in session.expectations)
        is_long = len(session.texts_of(Stream.OWN_TEXT)) >= LEAST_WORDS
        if is_long and not is_spanish and Stream.OWN_AUDIO in session.audio:
            sessions.append(session)
        if len(sessions) == flags.num_sessions:
            break
    player = Player(model.params, config.model, model.layout, config.stream, model.tokenizer, num_slots=8)
    own_hz = model.layout.clock.sample_rate_hz
    pairs: dict[str, list[tuple[str, str]]] = {"model": [], "recorded mels, vocoded": []}
    for session, played in zip(sessions, player.play(sessions), strict=True):
        words = " ".join(event.text.strip() for event in session.texts_of(Stream.OWN_TEXT))
        emitted = "".join(said.text for said in played.said).strip()
        heard = {
            "model": (emitted, player.own_sound(session, played), session.sample_rate_hz),
            "recorded mels, vocoded": (words, vocoded(session, model), own_hz),
        }
        for name, (text, sound, rate_hz) in heard.items():
            pairs[name].append((text, referee.hear(audible(resample(sound, rate_hz, RATE_HZ), RATE_HZ))))
    for text, transcript in pairs["model"][:3]:
        print(f"  said {text!r}, heard {transcript!r}")
    for name, texts in pairs.items():
        rate = error_rate(texts)
        print(
            f"{name}: word error rate {rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}], {rate.words} words in "
            f"{len(texts)} sessions"
        )


if __name__ == "__main__":
    main()
