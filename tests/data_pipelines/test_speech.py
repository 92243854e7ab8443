"""Audible spans, and speech with silences in it."""

import numpy as np
import pytest

from data_pipelines.espeak import Voice
from data_pipelines.speech import Speech, audible_span, speech_of, utter


def tone(num_samples: int, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(np.arange(num_samples) * 0.3)).astype(np.float32)


def test_audible_span_of_a_tone_between_silences():
    samples = np.concatenate([np.zeros(800, np.float32), tone(1600), np.zeros(1000, np.float32)])
    assert audible_span(samples) == (800, 2400)


def test_audible_span_leaves_out_what_is_40_db_lower():
    samples = np.concatenate([tone(1600), tone(1600, 0.5 * 10 ** (-45 / 20))])
    assert audible_span(samples) == (0, 1600)
    assert audible_span(samples, audible_db=-50.0) == (0, 3200)


def test_audible_span_of_silence_is_empty_and_no_speech():
    silence = np.zeros(500, np.float32)
    assert audible_span(silence) == (0, 0)
    with pytest.raises(ValueError, match="silent"):
        speech_of(silence)


def test_utter_puts_exact_silence_between_parts():
    said = utter(Voice(variant="f2"), ["what comes after", "three"], [0.75])
    ((start, end),) = said.pauses
    assert end - start == 12_000
    assert not said.samples[start:end].any()
    assert [word.text for word in said.words] == ["what", "comes", "after", "three"]
    assert said.words[2].end <= start
    assert said.words[3].start >= end
    assert audible_span(said.samples[:start])[1] == start
    assert audible_span(said.samples) == (0, len(said.samples))


class Recorded:
    """A voice without word times."""

    maker, name = "tone", "tone"

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> Speech:
        self.said.append(text)
        return speech_of(np.concatenate([np.zeros(320, np.float32), tone(160 * len(text)), np.zeros(480, np.float32)]))


def test_utter_says_parts_one_by_one_without_word_times():
    said = utter(Recorded(), ["say", "seven"], [0.5])
    assert len(said.samples) == 160 * 3 + 8000 + 160 * 5
    assert said.pauses == ((480, 8480),)
    assert said.words == ()


def test_utter_wants_a_pause_between_any_two_parts():
    with pytest.raises(ValueError, match="3 parts need 2 pauses"):
        utter(Voice(), ["a", "b", "c"], [0.5])


def test_utter_refuses_a_comma_inside_a_part():
    with pytest.raises(ValueError, match="must not hold a comma"):
        utter(Voice(), ["yes, please", "now"], [0.5])
