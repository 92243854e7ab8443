"""What vocoding own sound costs and loses: time of a turn, distance of log-mels beside librosa's, words understood.

Run: python -m tests.bench.bench_vocoder [--sentences=25] [--look_ahead_frames=0] [--num_iterations=32]
Word error rates are Whisper tiny.en's (the extra `referee`) of espeak sentences, train and held-out voices in turn:
of the sound itself, and of its mels vocoded turn by turn, which is the ceiling of what any flow head can reach.
"""

import argparse
import time

import librosa
import numpy as np

from data_pipelines.espeak import draw_voice
from tests.bench.referee import Referee, error_rate
from tml.codec import audio, own_sound
from tml.codec.griffin_lim import GriffinLim
from tml.codec.vocoder import vocode
from tml.config import AudioOutConfig, ModelConfig, VocoderConfig

SENTENCES = """the morning train leaves the station at seven
please open the window before you start
she bought three apples and a loaf of bread
my brother works in a small shop near the river
we should meet again next week to talk about it
the weather will be cold and windy tomorrow
can you tell me where the library is
he finished the book in less than two days
the children played in the garden all afternoon
turn left at the corner and walk to the bridge
i would like a cup of coffee with milk
the meeting was moved to thursday morning
nobody knew the answer to the last question
the old house on the hill is for sale
they watched a film about the history of music
put the blue box on top of the green one
the price of oil has gone up again
our team won the game by a single point
she speaks four languages and plays the piano
wait until the light turns green and then go
the doctor asked him to rest for a week
there are seven days in a week and twelve months in a year
i forgot my keys on the kitchen table
the ship crossed the ocean in nine days
draw a circle and write your name below it""".splitlines()
POSITIONS = 4


def distance_db(sound: np.ndarray, reference: np.ndarray, model: ModelConfig) -> float:
    """Mean distance of log-mels, in decibels, where the reference is not silent."""
    size, cfg = min(len(sound), len(reference)), own_sound.frame_config(model)
    ours, theirs = (np.maximum(audio.log_mels(x[:size], cfg), -3.0) for x in (sound, reference))
    return 20 * float(np.abs(ours - theirs)[theirs.max(axis=1) > -1.5].mean())


def main() -> None:
    """Prints one line of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=len(SENTENCES))
    parser.add_argument("--look_ahead_frames", type=int, default=0)
    parser.add_argument("--num_iterations", type=int, default=32)
    given = parser.parse_args()
    vocoding = VocoderConfig(num_iterations=given.num_iterations, look_ahead_frames=given.look_ahead_frames)
    model = ModelConfig(audio_out=AudioOutConfig(frames_per_position=4, vocoder=vocoding))
    vocoder, rng = GriffinLim(model), np.random.default_rng(7)
    turn = POSITIONS * model.audio.hop_samples
    seconds, lost, lost_by_librosa, truth, vocoded = [], [], [], [], []
    referee = Referee()
    for number, text in enumerate(SENTENCES[: given.sentences]):
        said = draw_voice("train" if number % 2 else "heldout", rng).say(text).samples
        sound = np.pad(said, (turn // 2, turn - len(said) % turn + turn)).astype(np.float32)
        mels = own_sound.own_mels(sound, model)
        begun = time.perf_counter()
        found = vocode(vocoder, mels, POSITIONS)
        seconds.append((time.perf_counter() - begun) * POSITIONS / len(mels))
        lost.append(distance_db(found[vocoder.delay_samples :], sound, model))
        bins = vocoder.bin_magnitudes(mels).T
        theirs = librosa.griffinlim(bins, n_iter=60, hop_length=200, n_fft=800, center=False, random_state=0)
        lost_by_librosa.append(distance_db(theirs[600:].astype(np.float32), sound, model))
        truth.append((text, referee.hear(said)))
        vocoded.append((text, referee.hear(found)))
    print(
        f"vocoder: {1e3 * np.median(seconds):.1f} ms a turn of {turn / 16:.0f} ms (slowest sentence's mean "
        f"{1e3 * max(seconds):.1f}), {vocoder.delay_samples / 16:.1f} ms late; log-mels {np.mean(lost):.2f} dB off, "
        f"librosa's whole utterance of 60 iterations {np.mean(lost_by_librosa):.2f} dB"
    )
    for name, pairs in (("the sound", truth), ("its mels vocoded", vocoded)):
        rate = error_rate(pairs)
        print(f"WER of {name}: {rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}] of {rate.words} words")


if __name__ == "__main__":
    main()
