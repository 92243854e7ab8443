"""Word error rates by hand; what Whisper hears is measured by `tests.bench.bench_vocoder`."""

import pytest
from referee import error_rate, spoken_words, word_errors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Seven, then 8!", "seven then eight"),
        ("It's 21 o'clock.", "it's twenty one o'clock"),
        ("115 people", "one hundred and fifteen people"),
        ("1000", "one zero zero zero"),
        ("", ""),
    ],
)
def test_words_are_compared_as_they_sound(text: str, words: str) -> None:
    assert spoken_words(text) == words.split()


@pytest.mark.parametrize(
    ("expected", "heard", "errors"),
    [("a b c", "a b c", 0), ("a b c", "a c", 1), ("a b c", "a x c d", 2), ("a", "", 1), ("", "a b", 2)],
)
def test_word_errors_are_the_fewest_changes(expected: str, heard: str, errors: int) -> None:
    assert word_errors(expected.split(), heard.split()) == errors


def test_the_rate_is_over_all_words_with_an_interval_over_utterances() -> None:
    found = error_rate([("one two three four", "one two three")] * 10 + [("five six", "five six")] * 10)
    assert (found.errors, found.words) == (10, 60)
    assert found.low < found.value < found.high
    with pytest.raises(ValueError, match="needs expected words"):
        error_rate([("", "one")])
