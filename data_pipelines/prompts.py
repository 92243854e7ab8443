"""Human speech: the telephone prompts of Asterisk, in five languages, from Debian.

One speaker a language, except that English and Spanish are the same person. She is the human test:
nothing she says is ever trained on. The other languages may be trained on as things to stay silent at.

The 16 kHz G.722 files are used: they hold sound up to 8 kHz, the wav files (8 kHz) end at 4 kHz.
"""

import functools
import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines import debian, mixing
from data_pipelines.request_session import SPLITS, RequestTaskConfig, Turn, arrange, compose
from data_pipelines.request_vocabulary import DIGITS
from data_pipelines.speech import SAMPLE_RATE_HZ, Speech, Utterance, speech_of
from tml.session import Session

LANGUAGES = ("en", "es", "fr", "it", "ru")
TEST_LANGUAGES = ("en", "es")
"""Spoken by the person whose digits are the human test; they never train."""

LICENCES = {
    "en": "CC-BY-SA-3.0, recorded by Allison Smith",
    "es": "CC-BY-SA-3.0, recorded by Allison Smith",
    "fr": "CC-BY-SA-3.0, recorded by June Wallack",
    "it": "CC-BY-3.0, recorded by Carlo Flora",
    "ru": "CC-BY-3.0, provided by Maxim Topal",
}
"""By language, as the packages' copyright files state them."""

_HELD_OUT_PERCENT = 15


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One recorded clip.

    Attributes:
        key: its name in the transcripts, such as `digits/7`.
        language: two letters.
        speaker: the folder that holds the recordings of one person.
        transcript: what is said.
        path: the sound file.
    """

    key: str
    language: str
    speaker: str
    transcript: str
    path: Path


def packages(language: str) -> tuple[str, str]:
    """The Debian packages with the transcripts and with the sound.

    Raises:
        ValueError: there are no prompts in that language.
    """
    if language not in LANGUAGES:
        raise ValueError(f"there are no prompts in {language!r}, only in {', '.join(LANGUAGES)}")
    return f"asterisk-core-sounds-{language}", f"asterisk-core-sounds-{language}-g722"


def licences(language: str, cache: Path | str) -> dict[str, bytes]:
    """The licence files to keep beside anything made from the prompts of a language."""
    found: dict[str, bytes] = {}
    for package in packages(language):
        found |= debian.licence_files(package, debian.unpack(package, cache))
    return found


@functools.cache
def read_prompts(language: str, cache: Path) -> tuple[Prompt, ...]:
    """Every clip of a language that has a sound file and a transcript of words, ordered by key.

    Raises:
        ValueError: there are no prompts in that language, or the packages cannot be had.
    """
    words, sounds = packages(language)
    table = debian.unpack(words, cache) / "usr" / "share" / "doc" / words / f"core-sounds-{language}.txt.gz"
    roots = sorted((debian.unpack(sounds, cache) / "usr" / "share" / "asterisk" / "sounds").iterdir())
    if len(roots) != 1 or not table.is_file():
        raise ValueError(
            f"{words} does not hold one voice and its transcripts; remove it from {cache} to fetch it again"
        )
    transcripts = dict(parse_transcripts(gzip.decompress(table.read_bytes()).decode("utf-8")))
    return tuple(
        Prompt(key=key, language=language, speaker=roots[0].name, transcript=transcripts[key], path=path)
        for key in sorted(transcripts)
        if (path := roots[0] / f"{key}.g722").is_file()
    )


def parse_transcripts(text: str) -> Iterator[tuple[str, str]]:
    """(Key, words) of every line `key: words` that is speech; `;` begins a comment, `[…]` and `(…)` are no speech."""
    for line in text.splitlines():
        key, colon, words = line.partition(":")
        words = re.sub(r"\[[^]]*\]|\([^)]*\)|<[^>]*>", " ", words)
        if colon and not line.startswith(";") and re.search(r"\w", words):
            yield key.strip(), " ".join(words.split())


@functools.lru_cache(maxsize=256)
def read_sound(prompt: Prompt) -> Speech:
    """The clip at 16 kHz.

    Raises:
        ValueError: PyAV is not installed, or the file cannot be decoded.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError("av is not installed, so G.722 cannot be read; pip install -e '.[data]'") from error
    try:
        with av.open(str(prompt.path), format="g722") as container:
            rate_hz = container.streams.audio[0].rate
            frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{prompt.path} cannot be decoded as G.722: {error}") from error
    if not frames or rate_hz != SAMPLE_RATE_HZ or frames[0].dtype != np.int16:
        raise ValueError(f"{prompt.path} is not 16-bit sound at {SAMPLE_RATE_HZ} Hz")
    return speech_of(np.concatenate(frames).astype(np.float32) / 32768)


def digit_prompts(cache: Path) -> tuple[Prompt, ...]:
    """The ten isolated English digits, zero to nine: one recording of each.

    Raises:
        ValueError: the packages cannot be had, or lack one.
    """
    by_key = {prompt.key: prompt for prompt in read_prompts("en", cache)}
    found = tuple(by_key[f"digits/{i}"] for i in range(10) if f"digits/{i}" in by_key)
    if tuple(prompt.transcript.lower().strip(".") for prompt in found) != DIGITS:
        raise ValueError(f"the English prompts hold the digits {[p.transcript for p in found]}, not {list(DIGITS)}")
    return found


@functools.cache
def silence_prompts(language: str, split: str, cache: Path) -> tuple[Prompt, ...]:
    """Prompts of three words and more to stay silent at; a clip is in one split only.

    Raises:
        ValueError: the language is one of the human test, or there are no prompts in it.
    """
    if language in TEST_LANGUAGES:
        raise ValueError(f"the {language} prompts are the human test and never train; use another of {LANGUAGES}")

    def held_out(prompt: Prompt) -> bool:
        return zlib.crc32(f"{language}/{prompt.key}".encode()) % 100 < _HELD_OUT_PERCENT

    return tuple(
        prompt
        for prompt in read_prompts(language, cache)
        if len(prompt.transcript.split()) >= 3 and held_out(prompt) == (split == "heldout")
    )


@dataclass(frozen=True, kw_only=True)
class HumanDigitTask:
    """Sessions with one human digit each: ten distinct recordings, in many levels and kinds of light noise.

    Attributes:
        seed: of the data set.
        cache: where packages are unpacked.
        config: the shape of the sessions.
    """

    seed: int
    cache: Path
    config: RequestTaskConfig = field(default_factory=lambda: RequestTaskConfig(length_range_s=(4.0, 6.0)))

    def session(self, split: str, index: int) -> Session:
        """Session `index`, with digit `index` mod 10.

        Raises:
            ValueError: the split is not `heldout`; this speaker never trains.
        """
        if split != "heldout":
            raise ValueError(f"human digits are for testing, split heldout, not {split!r}")
        rng = np.random.default_rng([self.seed, 2, index])
        prompt = digit_prompts(self.cache)[index % 10]
        turn = Turn(utterance=utterance(prompt), tag="human_digit", answer=DIGITS[index % 10])
        turns, num_samples = arrange(lambda: turn, 1, self.config, rng)
        surroundings = mixing.draw_surroundings(rng, quiet_probability=0.5, snr_range_db=(20.0, 40.0))
        return compose(
            f"human-digits-{self.seed}-{index:06d}",
            turns,
            num_samples,
            surroundings=surroundings,
            config=self.config,
            rng=rng,
            meta=_origin([prompt]),
        )


@dataclass(frozen=True, kw_only=True)
class HumanSilenceTask:
    """Sessions of human speech in languages other than the test speaker's: nothing is asked of the model.

    Attributes:
        seed: of the data set.
        cache: where packages are unpacked.
        languages: each session draws one.
        max_clip_s: longer clips are cut there.
        config: the shape of the sessions.
    """

    seed: int
    cache: Path
    languages: tuple[str, ...] = ("fr", "it", "ru")
    max_clip_s: float = 5.0
    config: RequestTaskConfig = field(default_factory=RequestTaskConfig)

    def session(self, split: str, index: int) -> Session:
        """Session `index` of a split.

        Raises:
            ValueError: there is no such split, or a language is one of the human test.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        rng = np.random.default_rng([self.seed, 3 + SPLITS.index(split), index])
        language = self.languages[int(rng.integers(len(self.languages)))]
        prompts = silence_prompts(language, split, self.cache)
        used: list[Prompt] = []

        def draw() -> Turn:
            used.append(prompts[int(rng.integers(len(prompts)))])
            return Turn(utterance=utterance(used[-1], self.max_clip_s), tag=f"human_{language}")

        turns, num_samples = arrange(draw, 1 + int(rng.integers(self.config.max_utterances)), self.config, rng)
        return compose(
            f"human-{language}-{split}-{self.seed}-{index:06d}",
            turns,
            num_samples,
            surroundings=mixing.draw_surroundings(rng),
            config=self.config,
            rng=rng,
            meta=_origin(used[: len(turns)]),
        )


def utterance(prompt: Prompt, max_clip_s: float = float("inf")) -> Utterance:
    """A prompt from its first audible sample on, cut after `max_clip_s`."""
    speech = read_sound(prompt)
    end = min(speech.end, speech.start + round(min(max_clip_s, 3600.0) * SAMPLE_RATE_HZ))
    return Utterance(samples=speech.samples[speech.start : end], pauses=(), words=())


def _origin(prompts: list[Prompt]) -> dict[str, str]:
    return {
        "maker": "human",
        "voice": f"human:{prompts[0].speaker}",
        "recordings": " ".join(prompt.key for prompt in prompts),
        "transcript": " / ".join(prompt.transcript for prompt in prompts),
        "licence": LICENCES[prompts[0].language],
    }
