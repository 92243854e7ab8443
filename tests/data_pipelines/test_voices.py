"""Voices of every make: who may train, what they share, and the real programs from Debian (slow)."""

from pathlib import Path

import numpy as np
import pytest

from data_pipelines import debian, espeak, festival, flite, voices
from data_pipelines.festival import FestivalVoice
from data_pipelines.flite import FliteVoice
from data_pipelines.speech import Speaker, audible_span, warp

RATE = 16_000


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_espeak_voices_are_drawn_from_their_split_only(split):
    rng = np.random.default_rng(0)
    drawn = [voices.draw_speaker("espeak", split, rng) for _ in range(300)]
    assert {voice.variant for voice in drawn} <= {*espeak.split_variants(split)}
    assert len({voice.name for voice in drawn}) > 100
    assert {voice.accent for voice in drawn} == {*espeak.ACCENTS}


@pytest.mark.parametrize("maker", ["flite", "festival"])
def test_makers_without_held_out_voices_say_so(maker):
    rng = np.random.default_rng(0)
    drawn = {voices.draw_speaker(maker, "train", rng, Path("/nowhere")).name for _ in range(200)}
    assert len(drawn) > 30
    with pytest.raises(ValueError, match="none in split heldout; use espeak"):
        voices.draw_speaker(maker, "heldout", rng)


def test_unknown_makers_and_voices_are_refused():
    with pytest.raises(ValueError, match="'piper' is not one of espeak, flite, festival"):
        voices.draw_speaker("piper", "train", np.random.default_rng(0))
    with pytest.raises(ValueError, match="flite has no voice 'x'; it has kal"):
        FliteVoice(voice="x", cache=Path("/nowhere"))
    with pytest.raises(ValueError, match="festival has no voice 'x'; it has kal"):
        FestivalVoice(voice="x", cache=Path("/nowhere"))


@pytest.mark.parametrize("text", ["", "  ", 'say "seven"', "a \\ b", "two\nlines"])
def test_festival_refuses_what_its_commands_cannot_hold(text):
    with pytest.raises(ValueError, match="festival cannot say"):
        FestivalVoice(voice="kal", cache=Path("/nowhere")).say(text)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_warp_moves_a_tone_by_its_factor(factor):
    tone = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE).astype(np.float32)
    warped = warp(tone, factor)
    assert len(warped) == pytest.approx(RATE / factor, abs=2)
    spectrum = np.abs(np.fft.rfft(warped * np.hanning(len(warped))))
    assert np.argmax(spectrum) * RATE / len(warped) == pytest.approx(1000 * factor, abs=2)


def test_a_library_is_in_the_package_that_debian_names_after_it():
    assert debian.package_of_library("libasound.so.2") == "libasound2"
    assert debian.package_of_library("libFLAC.so.12") == "libflac12"
    assert debian.package_of_library("libmpg123.so.0") == "libmpg123-0"
    assert debian.package_of_library("libvorbis.so.0") == "libvorbis0a"
    assert debian.package_of_library("libestbase.so.2.5") == "libestools2.5"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def check(make, names) -> None:
    """Every voice speaks, each time alike, each unlike the others, and stops when it has spoken."""
    sounds = {}
    for name in names:
        voice = make(name, 1.0, 1.0)
        assert isinstance(voice, Speaker)
        said = voice.say("say seven")
        assert 0.3 * RATE < said.end - said.start < 1.2 * RATE
        assert audible_span(said.samples[said.end :], audible_db=-1.0)[1] == 0 or (
            np.abs(said.samples[said.end :]).max() < 0.05 * np.abs(said.samples).max()
        )
        sounds[name] = said.samples
    flite._run.cache_clear()
    festival._run.cache_clear()
    for name in reversed(names):
        make(name, 1.0, 1.0).say("what comes after three")
        np.testing.assert_array_equal(make(name, 1.0, 1.0).say("say seven").samples, sounds[name])
    assert len({samples.tobytes() for samples in sounds.values()}) == len(names)
    plain, high = (make(names[0], 1.0, factor).say("say seven") for factor in (1.0, 1.1))
    assert (high.end - high.start) == pytest.approx((plain.end - plain.start) / 1.1, abs=480)
    slow = make(names[0], 1.2, 1.0).say("say seven")
    assert slow.end - slow.start > 1.1 * (plain.end - plain.start)


@pytest.mark.slow
def test_flite_speaks(cache):
    check(lambda name, stretch, warp: FliteVoice(voice=name, cache=cache, stretch=stretch, warp=warp), flite.VOICES)
    assert b"Carnegie Mellon" in voices.licences(("flite",), cache)["licences/libflite1.txt"]


@pytest.mark.slow
def test_festival_speaks(cache):
    check(
        lambda name, stretch, warp: FestivalVoice(voice=name, cache=cache, stretch=stretch, warp=warp),
        tuple(festival.VOICES),
    )
    with pytest.raises(ValueError, match=r"failed to say 'seven'.*unbound variable"):
        festival._process(cache).say_with("voice_nobody", 1.0, "seven")
    assert len(voices.licences(("festival",), cache)) == len(festival.PACKAGES)
