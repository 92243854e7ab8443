"""Channel augmentation against scipy's measurements and closed forms."""

import numpy as np
import pytest
import scipy.signal

from data_pipelines import augment
from data_pipelines.noise import NOISE_KINDS

RATE = 16_000


@pytest.fixture(scope="module")
def white() -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(4 * RATE)).astype(np.float32)


def response_db(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies and the measured magnitude response."""
    hz, power_in = scipy.signal.welch(before, RATE, nperseg=1024)
    _, power_out = scipy.signal.welch(after, RATE, nperseg=1024)
    return hz, 10 * np.log10(power_out / power_in + 1e-12)


@pytest.mark.parametrize("gain_db", [-20.0, 0.0, 6.0])
def test_gain_is_in_decibels(white, gain_db):
    changed = augment.gain(white, gain_db)
    assert changed.dtype == np.float32
    assert 20 * np.log10(changed.std() / white.std()) == pytest.approx(gain_db, abs=1e-3)


@pytest.mark.parametrize("kind", NOISE_KINDS)
@pytest.mark.parametrize("snr_db", [0.0, 20.0])
def test_noise_is_added_at_the_ratio(white, kind, snr_db):
    rng = np.random.default_rng(1)
    added = augment.add_noise(white, kind, snr_db, rng).astype(np.float64) - white
    assert 10 * np.log10(np.square(white).mean() / np.square(added).mean()) == pytest.approx(snr_db, abs=0.05)


def test_silence_has_no_ratio():
    with pytest.raises(ValueError, match="no signal-to-noise ratio"):
        augment.add_noise(np.zeros(100, np.float32), "white", 10.0, np.random.default_rng(0))


def test_telephone_band_cuts_what_lies_outside(white):
    hz, db = response_db(white, augment.band_limit(white, *augment.TELEPHONE_BAND_HZ))
    assert np.abs(db[(hz > 500) & (hz < 2800)]).max() < 1.0
    assert db[np.argmin(np.abs(hz - 300))] == pytest.approx(-3.0, abs=1.0)
    assert db[np.argmin(np.abs(hz - 3400))] == pytest.approx(-3.0, abs=1.0)
    assert db[hz > 6800].max() < -24
    assert db[(hz > 0) & (hz < 120)].max() < -20


def test_band_limit_is_the_butterworth_filter_of_scipy(white):
    sections = scipy.signal.butter(4, 4000, "lowpass", fs=RATE, output="sos")
    hz, wanted = scipy.signal.freqz_sos(sections, worN=512, fs=RATE)
    impulse = np.zeros(2048, np.float32)
    impulse[0] = 1.0
    measured = np.fft.rfft(augment.band_limit(impulse, 0.0, 4000.0), 1024)
    np.testing.assert_allclose(measured[:512], wanted, atol=1e-4)
    assert hz[1] == pytest.approx(RATE / 1024)


def test_an_open_band_changes_nothing(white):
    np.testing.assert_array_equal(augment.band_limit(white, 0.0, 8000.0), white)


@pytest.mark.parametrize("band", [(4000.0, 300.0), (-1.0, 300.0), (0.0, 9000.0)])
def test_an_impossible_band_is_refused(white, band):
    with pytest.raises(ValueError, match="must lie in 0 to 8000 Hz"):
        augment.band_limit(white, *band)


@pytest.mark.parametrize("reverberation_s", [0.1, 0.3])
def test_a_room_keeps_the_direct_sound_and_dies_away_by_60_db(reverberation_s):
    response = augment.room_response(np.random.default_rng(2), reverberation_s=reverberation_s, direct_db=6.0)
    assert response[0] == 1.0
    assert 10 * np.log10(np.square(response[1:].astype(np.float64)).sum()) == pytest.approx(-6.0, abs=1e-3)
    # Schroeder's backward integration of the tail behind the early reflections.
    tail = np.square(response[320:].astype(np.float64))
    decay_db = 10 * np.log10(np.cumsum(tail[::-1])[::-1] / tail.sum() + 1e-30)
    middle = (decay_db < -3) & (decay_db > -25)
    slope = np.polyfit(np.flatnonzero(middle) / RATE, decay_db[middle], 1)[0]
    assert -60 / slope == pytest.approx(reverberation_s, rel=0.25)


def test_reverberation_is_convolution_and_hears_nothing_early(white):
    response = augment.room_response(np.random.default_rng(3), reverberation_s=0.2, direct_db=3.0)
    short = white[:5000].copy()
    short[:1000] = 0.0
    heard = augment.reverberate(short, response)
    np.testing.assert_allclose(heard, np.convolve(short, response)[:5000], atol=1e-5)
    assert np.abs(heard[:1000]).max() < 1e-6


def test_mu_law_has_256_steps_and_the_noise_of_its_theory():
    samples = np.linspace(-1, 1, 100_001, dtype=np.float32)
    heard = augment.mu_law(samples)
    assert len(np.unique(heard)) == 255
    np.testing.assert_array_equal(augment.mu_law(heard), heard)
    loud = np.abs(samples) > 0.1
    # A step of the compander is ln(256) / 127 of the value plus 1 / 255: half of it is the largest error.
    bound = 0.5 * (np.abs(samples) + 1 / 255) * np.log(256) / 127
    assert (np.abs(heard - samples)[loud] <= 1.03 * bound[loud] + 1e-6).all()
    ratio_db = 10 * np.log10(np.square(samples).mean() / np.square(heard - samples).mean())
    assert 36 < ratio_db < 42


def test_a_finer_codec_is_closer_to_the_sound(white):
    errors = []
    for step_db in (0.25, 1.0, 4.0):
        heard = augment.coarse_spectrum(white, step_db)
        assert heard.shape == white.shape
        errors.append(10 * np.log10(np.square(heard - white).mean() / np.square(white).mean()))
    assert errors[0] < -35
    assert errors[0] + 6 < errors[1] < errors[2] - 6


def test_a_codec_drops_what_lies_60_db_lower():
    time_s = np.arange(RATE) / RATE
    quiet = 1e-4 * np.sin(2 * np.pi * 5000 * time_s)
    tone = (0.5 * np.sin(2 * np.pi * 500 * time_s) + quiet).astype(np.float32)
    heard = augment.coarse_spectrum(tone, 0.5)[4000:12_000]
    spectrum = np.abs(np.fft.rfft(heard * np.hanning(8000)))
    assert spectrum[2500] < 0.05 * 1e-4 * 8000 / 4
    assert spectrum[250] == pytest.approx(0.5 * 8000 / 4, rel=0.1)


@pytest.mark.parametrize("length", [1, 511, 512, 513, 3001])
def test_a_codec_keeps_every_length(white, length):
    assert augment.coarse_spectrum(white[:length], 2.0).shape == (length,)
    assert augment.band_limit(white[:length], 0.0, 4000.0).shape == (length,)


@pytest.mark.parametrize("slope_db", [-8.0, 8.0])
def test_tilt_rises_by_its_slope(white, slope_db):
    hz, db = response_db(white, augment.tilt(white, slope_db))
    assert db[(hz > 0) & (hz < 60)].mean() == pytest.approx(0.0, abs=0.5)
    assert db[hz > 7800].mean() == pytest.approx(slope_db, abs=0.5)
    assert db[np.argmin(np.abs(hz - 1000))] == pytest.approx(slope_db / 2, abs=0.8)


def test_the_channel_is_a_pure_function_of_its_random_numbers(white):
    white = white[:4000]
    kept = white.copy()
    heard = [augment.channel(white, np.random.default_rng(seed)) for seed in range(150)]
    again = [augment.channel(white, np.random.default_rng(seed)) for seed in range(150)]
    np.testing.assert_array_equal(white, kept)
    for one, other in zip(heard, again, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.shape == white.shape
        assert one.dtype == np.float32
        assert np.isfinite(one).all()
    unchanged = sum(np.array_equal(one, white) for one in heard)
    assert 5 <= unchanged <= 30


def test_silence_stays_silence_in_every_channel():
    for seed in range(20):
        assert not augment.channel(np.zeros(2000, np.float32), np.random.default_rng(seed)).any()
