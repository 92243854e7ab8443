"""Own sound on its way from a session to rows: in its turns, in its place on the clock, of nobody in silence."""

from dataclasses import replace

import numpy as np
import pytest
from small_sets import encode_all, make_session

from data_pipelines.encoded import HeaderError, codec_header, encoded_directory
from data_pipelines.encoding import encode_dataset
from data_pipelines.loader import RowLoader
from data_pipelines.record_writer import SessionWriter
from data_pipelines.records import RecordKind
from tml.codec.encode import encode_session
from tml.codec.own_sound import own_mels, silent_position
from tml.codec.waveform import decode_clip, encode_clip
from tml.config import AudioOutConfig, DataConfig, Experiment, FlowConfig, ModelConfig, SourceConfig
from tml.microturn import Kind, Layout, Target
from tml.session import Session, SessionError, Stream, TextEvent

VOICE = AudioOutConfig(frames_per_position=2, num_mels=10, flow=FlowConfig(width=8, num_blocks=1))
RATE_HZ, TURN, HOP = 16_000, 3_200, 800


def a_session(number: int, turns_with_sound: tuple[int, ...] = (4, 5, 9), words: tuple[int, ...] = (4,)) -> Session:
    """Twelve turns and a half; own sound fills the first half of some turns of the clock, words begin in some."""
    size, rng = 12 * TURN + TURN // 2, np.random.default_rng(number)
    own = np.zeros(size, np.float32)
    for turn in turns_with_sound:
        own[turn * TURN : turn * TURN + TURN // 2] = 0.3 * rng.standard_normal(TURN // 2)
    heard = encode_clip(0.1 * rng.standard_normal(size).astype(np.float32), RATE_HZ)
    texts = tuple(
        TextEvent(stream=Stream.OWN_TEXT, start=turn * TURN + 9, end=turn * TURN + 99, text="seven") for turn in words
    )
    return Session(
        session_id=f"own-{number}",
        sample_rate_hz=RATE_HZ,
        num_samples=size,
        streams=(Stream.USER_AUDIO, Stream.OWN_AUDIO, *((Stream.OWN_TEXT,) if texts else ())),
        audio={Stream.USER_AUDIO: heard, Stream.OWN_AUDIO: encode_clip(own, RATE_HZ)},
        texts=texts,
    )


@pytest.fixture(scope="module")
def voiced(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Experiment:
    root = tmp_path_factory.mktemp("voiced") / "own"
    with SessionWriter(root, name="own", num_shards=1) as writer:
        for number in range(9):
            writer.write(a_session(number))
    experiment = Experiment(
        name="voiced",
        model=ModelConfig(vocab_size=tokenizer.vocab_size, audio_out=VOICE),
        data=DataConfig(
            sources={"own": SourceConfig(path=str(root))}, row_slots=80, rows_per_batch=2, segments_per_epoch=9
        ),
    )
    encode_all(experiment, tokenizer)
    return experiment


def test_output_k_says_what_is_heard_during_the_turn_after_it(voiced: Experiment, tokenizer) -> None:
    layout, session = Layout.of(voiced.turn, voiced.model, tokenizer.special), a_session(3, words=(2, 4))
    encoded = encode_session(session, voiced.model, tokenizer)
    segment = layout.lay_out(layout.contents(encoded))
    for turn, (start, end) in enumerate(zip(segment.turn_starts[:-1], segment.turn_starts[1:], strict=True)):
        own = start + np.flatnonzero(segment.kinds[start:end] == Kind.OWN_AUDIO)
        # Sound of turn 4 or 5 is that of output 3 or 4; the word at 2 is said in output 1, without sound.
        if turn not in (1, 3, 4, 8):
            assert not len(own)
            assert segment.tokens[end - 1] == tokenizer.special.listen
            continue
        assert own.tolist() == list(range(end - 4, end))
        assert segment.tokens[own[0] - 1] == tokenizer.special.end_of_text
        assert (segment.target_kinds[own - 1] == Target.AUDIO).all()
        assert segment.target_kinds[end - 1] == Target.NONE
        assert segment.source[own].tolist() == list(range((turn + 1) * 4, (turn + 1) * 4 + 4))
    samples = decode_clip(session.audio[Stream.OWN_AUDIO], RATE_HZ)
    np.testing.assert_array_equal(encoded.own_mels_TY, own_mels(samples, voiced.model))


def test_sound_after_a_turn_moves_nothing_of_that_turn_s_output(voiced: Experiment, tokenizer) -> None:
    layout, session = Layout.of(voiced.turn, voiced.model, tokenizer.special), a_session(3)
    samples = decode_clip(session.audio[Stream.OWN_AUDIO], RATE_HZ).copy()
    samples[6 * TURN :] = 0.2
    clips = {**session.audio, Stream.OWN_AUDIO: encode_clip(samples, RATE_HZ)}
    before, after = (encode_session(each, voiced.model, tokenizer) for each in (session, replace(session, audio=clips)))
    one, other = (layout.lay_out(layout.contents(each)) for each in (before, after))
    end = one.turn_starts[5]
    for name in ("tokens", "kinds", "source", "target_kinds"):
        np.testing.assert_array_equal(getattr(one, name)[:end], getattr(other, name)[:end])
    np.testing.assert_array_equal(before.own_mels_TY[: 6 * 4], after.own_mels_TY[: 6 * 4])


def test_rows_hold_the_mels_of_their_sessions_and_seeds_of_their_own(voiced: Experiment, tokenizer) -> None:
    loader = RowLoader(voiced.data.sources, voiced, tokenizer)
    batch = loader.rows(range(6))
    kinds, own = batch.kinds_BS, batch.own
    num_found = 0
    for row in range(6):
        places = own.places_BP[row][own.places_BP[row] > 0]
        np.testing.assert_array_equal(np.flatnonzero(kinds[row] == Kind.OWN_AUDIO), places)
        assert not own.places_BP[row, len(places) :].any()
        assert (batch.target_kinds_BS[row, places - 1] == Target.AUDIO).all()
        assert not batch.loss_weights_BS[row, places - 1].any()
        num_found += len(places)
    assert num_found > 40
    everything = {
        encoded.own_mels_TY[place].tobytes()
        for encoded in (encode_session(a_session(number), voiced.model, tokenizer) for number in range(9))
        for turn in (4, 5, 9)
        for place in range(turn * 4, turn * 4 + 4)
    }
    here = own.mels_BPY[own.places_BP > 0]
    assert {mel.tobytes() for mel in here} <= everything
    assert len({mel.tobytes() for mel in here}) > 0.8 * len(here) / 2
    assert len(np.unique(own.seeds_BP)) > 0.99 * own.seeds_BP.size
    again = RowLoader(voiced.data.sources, voiced, tokenizer).rows(range(3, 6))
    np.testing.assert_array_equal(again.own.seeds_BP, own.seeds_BP[3:])
    np.testing.assert_array_equal(again.own.mels_BPY, own.mels_BPY[3:])


def test_words_without_the_sound_of_them_are_an_error_and_a_session_that_only_listens_is_silent(tokenizer) -> None:
    model = ModelConfig(vocab_size=tokenizer.vocab_size, audio_out=VOICE)
    with pytest.raises(SessionError, match=r"own_text but no own_audio.*frames_per_position = 0"):
        encode_session(make_session(1), model, tokenizer)
    assert encode_session(make_session(1), replace(model, audio_out=AudioOutConfig()), tokenizer).own_mels_TY is None
    listener = a_session(1, words=())
    listener = replace(
        listener, audio={Stream.USER_AUDIO: listener.audio[Stream.USER_AUDIO]}, streams=(Stream.USER_AUDIO,)
    )
    encoded = encode_session(listener, model, tokenizer)
    assert not encoded.own_audible_T.any()
    np.testing.assert_array_equal(encoded.own_mels_TY, np.tile(silent_position(VOICE), (50, 1)))


def test_records_that_were_encoded_without_a_voice_are_refused(voiced: Experiment, tokenizer) -> None:
    silent = replace(voiced, model=replace(voiced.model, audio_out=AudioOutConfig()))
    path = voiced.data.sources["own"].path
    encode_dataset(path, silent.model, tokenizer, max_quarantined_fraction=0.0)
    places = [
        encoded_directory(path, codec_header(RecordKind.SESSIONS, each.model, tokenizer.fingerprint()))
        for each in (voiced, silent)
    ]
    assert places[0] != places[1]
    finer = replace(voiced, model=replace(voiced.model, audio_out=replace(VOICE, num_mels=12)))
    with pytest.raises(FileNotFoundError, match=r"run launch\.encode first"):
        RowLoader(finer.data.sources, finer, tokenizer)
    header = codec_header(RecordKind.SESSIONS, voiced.model, tokenizer.fingerprint())
    from data_pipelines.encoded import EncodedSource

    with pytest.raises(HeaderError, match=r"audio_out.frames_per_position = 0, this run has 2"):
        EncodedSource(places[1], header)
    without = encode_session(a_session(1), silent.model, tokenizer)
    with pytest.raises(SessionError, match="encoded without own audio, but this layout has a voice"):
        Layout.of(voiced.turn, voiced.model, tokenizer.special).contents(without)
