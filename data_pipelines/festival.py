"""festival as a process: two diphone voices and a statistical one, each from recordings of a human.

The program comes from Debian with the libraries it needs and is unpacked, not installed.
"""

import functools
import os
import shutil
import subprocess
import tempfile
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.signal
import soundfile
from jaxtyping import Float32, Int16

from data_pipelines import debian
from data_pipelines.speech import SAMPLE_RATE_HZ, Speech, speech_of, to_clock, warp

VOICES = {"kal": "voice_kal_diphone", "ked": "voice_ked_diphone", "slt": "voice_cmu_us_slt_arctic_hts"}
"""Two American men and an American woman, by festival's names for them."""

PACKAGES = (
    "festival",
    "festlex-cmu",
    "festlex-poslex",
    "festvox-kallpc16k",
    "festvox-kdlpc16k",
    "festvox-us-slt-hts",
)

_DONE = "tml-done"
_SAY = """(define (tml_say voice stretch words file)
  (eval (list voice))
  (Parameter.set 'Duration_Stretch stretch)
  (let ((utt (eval (list 'Utterance 'Text words))))
    (utt.synth utt)
    (utt.save.wave utt file 'riff)))
"""
_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class FestivalVoice:
    """A voice of festival.

    Attributes:
        voice: one of `VOICES`.
        stretch: how much longer than usual sounds last; the statistical voice does not heed it.
        warp: by what factor pitch and formants are higher, and sounds shorter.
        cache: where Debian packages are unpacked.
    """

    voice: str
    cache: Path
    stretch: float = 1.0
    warp: float = 1.0

    def __post_init__(self) -> None:
        if self.voice not in VOICES:
            raise ValueError(f"festival has no voice {self.voice!r}; it has {', '.join(VOICES)}")

    @property
    def maker(self) -> str:
        """The program the voice comes from."""
        return "festival"

    @property
    def name(self) -> str:
        """`festival:voice@stretch/warp`."""
        return f"festival:{self.voice}@{self.stretch:g}/{self.warp:g}"

    def say(self, text: str) -> Speech:
        """The text spoken; festival's word times are not read.

        Raises:
            ValueError: festival cannot be had or fails, or the text holds a quote or a backslash.
        """
        if not text.strip() or set('"\\\n') & set(text):
            raise ValueError(f"festival cannot say {text!r}: it must have words, and no quotes, backslashes or lines")
        samples, rate_hz = _run(self.cache, self.voice, self.stretch, text)
        return speech_of(warp(_without_offset(to_clock(samples, rate_hz)), self.warp))


def _without_offset(samples: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """The sound above 50 Hz: the diphone voices leave a constant behind their last sound, which is no speech."""
    sections = scipy.signal.butter(2, 50, "highpass", fs=SAMPLE_RATE_HZ, output="sos")
    return scipy.signal.sosfilt(sections, samples).astype(np.float32)


class _Process:
    """festival, waiting for commands on its standard input; it ends when that is closed."""

    def __init__(self, cache: Path) -> None:
        trees = [debian.unpack(package, cache) for package in PACKAGES]
        program = trees[0] / "usr" / "bin" / "festival"
        libraries = debian.library_directories([program], cache)
        self._folder = tempfile.mkdtemp(prefix="tml-festival-")
        self._process = subprocess.Popen(
            [str(program), "--datadir", str(_merged_data(trees, cache)), "--pipe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self._folder,
            env={**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, libraries[1:])), "HOME": self._folder},
        )
        weakref.finalize(self, _close, self._process, self._folder)
        self._command(_SAY)

    def say_with(self, function: str, stretch: float, text: str) -> tuple[Int16[np.ndarray, " n"], int]:
        """Samples and their rate, by the voice that the Scheme function of that name makes current."""
        path = Path(self._folder) / "said.wav"
        path.unlink(missing_ok=True)
        heard = self._command(f'(tml_say \'{function} {stretch:g} "{text}" "{path}")\n')
        if not path.is_file():
            raise ValueError(f"festival failed to say {text!r} with {function}: {' '.join(heard.split())}")
        samples, rate_hz = soundfile.read(path, dtype="int16")
        return samples, rate_hz

    def _command(self, command: str) -> str:
        """Sends a command and waits until it is done; returns what festival printed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(_TIMEOUT_S, self._process.kill)
        timer.start()
        try:
            # After an error festival goes on with the next command, so the mark is printed in any case.
            self._process.stdin.write(f'{command}(begin (format t "\\n{_DONE}\\n") (fflush nil))\n')
            self._process.stdin.flush()
            lines: list[str] = []
            for line in self._process.stdout:
                if line.strip() == _DONE:
                    return "".join(lines)
                lines.append(line)
        except BrokenPipeError as error:
            raise ValueError(f"festival ended with code {self._process.poll()}") from error
        finally:
            timer.cancel()
        raise ValueError(f"festival ended with code {self._process.wait()}: {' '.join(''.join(lines).split())}")


def _close(process: subprocess.Popen, folder: str) -> None:
    process.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def _merged_data(trees: list[Path], cache: Path) -> Path:
    """One data directory with what every package adds to it."""
    place = cache / "festival-data"
    if not place.is_dir():
        work = Path(tempfile.mkdtemp(prefix=".festival-data-", dir=cache))
        for tree in trees:
            shutil.copytree(tree / "usr" / "share" / "festival", work, dirs_exist_ok=True)
        try:
            work.rename(place)
        except OSError:
            # Another process was faster.
            shutil.rmtree(work)
    return place


@functools.cache
def _process(cache: Path) -> _Process:
    return _Process(cache)


@functools.lru_cache(maxsize=8192)
def _run(cache: Path, voice: str, stretch: float, text: str) -> tuple[Int16[np.ndarray, " n"], int]:
    return _process(cache).say_with(VOICES[voice], stretch, text)
