"""espeak-ng through ctypes: existing voices only, exact word times, one sound per voice and text."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines import espeak
from data_pipelines.espeak import Voice, synthesise

SENTENCE = "what comes after, three"


def parameters(variant: str) -> set[str]:
    text = (espeak.data_directory() / "voices" / "!v" / variant).read_text(errors="replace")
    lines = [line.split("//")[0].strip() for line in text.splitlines()]
    return {line for line in lines if line and not line.startswith(("name", "language"))}


def test_unknown_variant_is_refused_and_not_the_base_voice():
    with pytest.raises(ValueError, match="no variant 'nosuch'"):
        Voice(variant="nosuch")


def test_unknown_language_is_refused():
    with pytest.raises(ValueError, match="no language 'en-gb'"):
        Voice(accent="en-gb")


@pytest.mark.parametrize("values", [{"pitch": 100}, {"pitch": -1}, {"rate": 79}, {"rate": 451}])
def test_pitch_and_rate_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="must lie in"):
        Voice(**values)


def test_splits_are_large_enough_and_share_no_variant():
    train, heldout = espeak.split_variants("train"), espeak.split_variants("heldout")
    assert len(train) >= 40
    assert len(heldout) >= 8
    assert not {*train} & {*heldout}
    assert {*train, *heldout} == {"", *espeak.variants()}


def test_no_heldout_variant_resembles_a_training_one():
    for heldout in espeak.split_variants("heldout"):
        for train in espeak.split_variants("train"):
            if train:
                own, other = parameters(heldout), parameters(train)
                assert len(own & other) / len(own | other) < 0.25, (heldout, train)


@pytest.mark.parametrize("variant", espeak.HELD_OUT_VARIANTS)
def test_no_heldout_variant_is_a_caricature(variant):
    lines = [line.split() for line in parameters(variant) if line.startswith("formant")]
    formants = {int(words[1]): int(words[2]) for words in lines}
    assert all(65 <= formants.get(number, 100) <= 135 for number in (1, 2, 3))
    assert all(formants.get(number, 100) > 0 for number in range(1, 7))


def test_every_variant_sounds_different_from_the_base_voice_and_every_other():
    names = ("", *espeak.variants())
    sounds = [hashlib.sha256(synthesise("seven", Voice(variant=name)).samples).digest() for name in names]
    assert len({*sounds}) == len(names)


def test_repeated_calls_give_the_same_samples():
    voice = Voice(accent="en-us", variant="whisper")
    first = synthesise("say seven", voice)
    synthesise.cache_clear()
    synthesise("something else", voice)
    again = synthesise("say seven", voice)
    assert first is not again
    np.testing.assert_array_equal(first.samples, again.samples)


def test_another_process_gives_the_same_samples():
    program = (
        "import hashlib; from data_pipelines.espeak import Voice, synthesise; synthesise('hello', Voice());"
        "print(hashlib.sha256(synthesise('say seven', Voice(accent='en-029', variant='f2')).samples).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    mine = synthesise("say seven", Voice(accent="en-029", variant="f2")).samples
    assert other == hashlib.sha256(mine).hexdigest()


def test_words_are_the_words_of_the_text_in_order_and_inside_the_sound():
    speech = synthesise("tell me twenty-one things, don't stop", Voice())
    assert [word.text for word in speech.words] == ["tell", "me", "twenty-one", "things,", "don't", "stop"]
    ends = [0]
    for word in speech.words:
        assert ends[-1] <= word.start < word.end <= len(speech.samples)
        ends.append(word.end)


def test_words_run_together_are_one():
    speech = synthesise("we are in the garden most of the time", Voice())
    assert [word.text for word in speech.words] == ["we", "are", "in the", "garden", "most of", "the", "time"]


def test_a_word_is_heard_where_its_times_say():
    """The gap that a comma makes is silent, and the words around it are not."""
    for variant in ("", "f2", "m3", "Annie"):
        speech = synthesise(SENTENCE, Voice(variant=variant))
        after, three = speech.words[2:]
        energy = np.square(speech.samples)
        middle = (after.end + three.start) // 2
        assert energy[middle - 160 : middle + 160].mean() < 1e-2 * energy[three.start : three.end].mean()
        assert energy[after.start : after.end].mean() > 0.05 * energy[three.start : three.end].mean()


def test_the_end_of_speech_is_the_end_of_what_is_audible():
    for variant in ("", "f2", "klatt3", "zac"):
        speech = synthesise("say seven", Voice(variant=variant))
        loudest = max(np.square(speech.samples[i : i + 160]).mean() for i in range(0, len(speech.samples), 160))
        rest = speech.samples[speech.end :]
        assert rest.size == 0 or np.square(rest).mean() < 1e-4 * loudest
        assert np.square(speech.samples[speech.end - 160 : speech.end]).mean() >= 0.9e-4 * loudest


def test_pitch_and_rate_do_what_they_say():
    slow, fast = (synthesise("what comes after three", Voice(rate=rate)) for rate in (120, 240))
    assert slow.end > 1.5 * fast.end

    def loudest_pitch_hz(pitch: int) -> float:
        samples = synthesise("moon", Voice(pitch=pitch)).samples
        middle = samples[len(samples) // 3 : 2 * len(samples) // 3]
        correlation = np.correlate(middle, middle, "full")[len(middle) - 1 :]
        lag = 40 + int(np.argmax(correlation[40:320]))
        return 16_000 / lag

    assert loudest_pitch_hz(80) > 1.2 * loudest_pitch_hz(30)


def test_nothing_to_say_is_an_error():
    with pytest.raises(ValueError, match="no text"):
        synthesise("  ", Voice())


def test_cached_samples_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        synthesise("seven", Voice()).samples[0] = 1.0


def test_a_word_keeps_its_last_sound_when_its_neighbour_is_announced_early():
    speech = synthesise("will it rain on thursday", Voice(accent="en-gb-x-rp", variant="Demonic", pitch=60, rate=140))
    will, _, rain, on, _ = speech.words
    assert will.end - will.start > 0.3 * 16_000
    assert rain.end - rain.start > 0.25 * 16_000
    assert rain.end == on.start
