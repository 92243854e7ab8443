"""A voice beside the published layout: it comes back, transformers reads the rest, and halves of it are refused."""

import dataclasses
import io
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inkling_oracle import inkling_model
from PIL import Image
from small_disk import small_disk
from small_model import small_model, small_sound
from tiny import VOICE
from transformers import InklingForConditionalGeneration

from tml import checkpoint
from tml.checkpoint_pieces import ParamsReader, Piece, PiecewiseArray, write_params
from tml.codec.own_sound import frame_config
from tml.codec.text import TOKENIZER_FILES
from tml.codec.vocoder_program import save_program
from tml.config import (
    AudioConfig,
    Control,
    Experiment,
    MicroTurnConfig,
    ModelConfig,
    MtpConfig,
    MtpEmbedding,
    VideoConfig,
    VocoderConfig,
    VocoderKind,
)
from tml.export import interaction_head
from tml.export.bundle import Model, open_model
from tml.export.inkling_export import export_folder
from tml.export.inkling_import import import_folder
from tml.export.interaction_head import DESCRIPTION, WEIGHTS
from tml.model import transformer
from tml.params import spec_leaves
from tml.stream.live import LiveSession, TurnResult

EXPERIMENT = Experiment(
    name="voiced", model=inkling_model(audio_out=VOICE), turn=MicroTurnConfig(turn_ms=400, control=Control.IMPLICIT)
)


def one_piece(values: np.ndarray):
    yield Piece((0,) if values.ndim else (), values)


def write_run(run: Path, experiment: Experiment) -> None:
    rng, arrays = np.random.default_rng(0), {}
    for path, spec in spec_leaves(transformer.specs(experiment.model)):
        values = rng.standard_normal(spec.shape).astype(np.float32)
        arrays[path] = PiecewiseArray(spec.shape, spec.shape, partial(one_piece, values))
    write_params(run, experiment, arrays)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run folder with a voice, and its export."""
    root = tmp_path_factory.mktemp("voiced")
    write_run(root / "run", EXPERIMENT)
    export_folder(root / "run", root / "out")
    return root / "run", root / "out"


def test_a_voice_comes_back_with_its_layout_of_micro_turns(exported: tuple[Path, Path], tmp_path: Path) -> None:
    run, out = exported
    found = import_folder(out, tmp_path / "again")
    assert (found.model.audio_out, found.turn) == (EXPERIMENT.model.audio_out, EXPERIMENT.turn)
    (_, before), (_, after) = checkpoint.restore(run), checkpoint.restore(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, before, after)
    export_folder(tmp_path / "again", tmp_path / "out")
    for name in (WEIGHTS, DESCRIPTION):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize("tokenizer", TOKENIZER_FILES.values())
def test_a_tower_that_inkling_cannot_name_stands_beside_and_comes_back_with_the_tokenizer(
    tokenizer: str, tmp_path: Path
) -> None:
    video = VideoConfig(tile_px=8, fold_px=(2, 4), fold_dims=(5, 7), max_tiles_per_turn=1)
    experiment = Experiment(name="eyes", model=inkling_model(video=video))
    write_run(tmp_path / "run", experiment)
    (tmp_path / "run" / "tokenizer").mkdir()
    (tmp_path / "run" / "tokenizer" / tokenizer).write_text("{}")
    export_folder(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / tokenizer).read_text() == "{}"
    found = import_folder(tmp_path / "out", tmp_path / "again")
    assert Path(found.text.tokenizer).read_text() == "{}"
    assert found.model.video == video
    (_, before), (_, after) = checkpoint.restore(tmp_path / "run"), checkpoint.restore(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("kind", [VocoderKind.PROGRAM, pytest.param(VocoderKind.GRIFFIN_LIM, marks=pytest.mark.slow)])
def test_an_export_alone_streams_as_the_run_did_though_it_hears_and_sees_unlike_others(
    kind: VocoderKind, tmp_path: Path
) -> None:
    audio = AudioConfig(num_mels=8, num_levels=4, hop_samples=640, window_samples=1_280, level_low=-6.0)
    video = VideoConfig(tile_px=4, fold_px=(2, 2), fold_dims=(64, 64), max_tiles_per_turn=3)
    voice = dataclasses.replace(VOICE, window_samples=640)
    model = small_model(tmp_path, VOICE, video)
    network = dataclasses.replace(model.experiment.model, audio=audio, audio_out=voice)
    if kind is VocoderKind.PROGRAM:
        vocoder = VocoderConfig(kind=kind, program=str(tmp_path / "program"))
        save_means(tmp_path / "program", network, model.layout.clock.turn_samples)
        network = dataclasses.replace(network, audio_out=dataclasses.replace(voice, vocoder=vocoder))
    experiment = dataclasses.replace(model.experiment, model=network)
    write_run(tmp_path / "run", experiment)
    model.tokenizer.save(tmp_path / "run" / "tokenizer")
    export_folder(tmp_path / "run", tmp_path / "out")
    before = _streamed(open_model(tmp_path / "run"))
    for name in ("run", "program"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    found = import_folder(tmp_path / "out", tmp_path / "again")
    assert import_folder(tmp_path / "out", tmp_path / "again") == found
    shutil.rmtree(tmp_path / "out")
    assert (found.stream, found.model.video) == (experiment.stream, video)
    after = _streamed(open_model(tmp_path / "again"))
    assert [turn.said for turn in before] == [turn.said for turn in after]
    np.testing.assert_array_equal([turn.sound for turn in before], [turn.sound for turn in after])
    assert len({token for turn in before for token in turn.said.tokens}) > 3
    assert any(turn.mels is not None for turn in before)
    assert any(np.any(turn.sound) for turn in before)


def save_means(folder: Path, model: ModelConfig, turn_samples: int) -> None:
    """A vocoder that repeats the mean of each frame for its hop."""

    hop_samples = frame_config(model).hop_samples

    def step(state: list[jax.Array], logs: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        return state, jnp.repeat(jnp.mean(logs, axis=1), hop_samples)

    save_program(folder, lambda: [jnp.int32(0)], step, turn_samples // hop_samples, delay_samples=0, model=model)


def _streamed(model: Model) -> list[TurnResult]:
    """Six turns of noise, and in the first of them a picture of three tiles."""
    config = model.experiment
    live = LiveSession(model.params, config.model, model.layout, config.stream, model.tokenizer)
    pixels = np.random.default_rng(0).integers(0, 255, (4, 8, 3), np.uint8)
    for _ in range(config.model.video.frames_per_tile):
        live.show(png(pixels))
    return live.push(small_sound(6 * model.layout.clock.turn_samples))


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_transformers_reads_the_rest(exported: tuple[Path, Path]) -> None:
    _, found = InklingForConditionalGeneration.from_pretrained(exported[1], output_loading_info=True)
    assert not found["missing_keys"]
    assert not [name for name in found["unexpected_keys"] if "audio_out" in name or "own_audio" in name]


def test_half_a_voice_is_refused(exported: tuple[Path, Path], tmp_path: Path) -> None:
    for number, name in enumerate((WEIGHTS, DESCRIPTION)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file in exported[1].iterdir():
            if file.name != name:
                (folder / file.name).write_bytes(file.read_bytes())
        with pytest.raises(ValueError, match=r"both are needed, or neither"):
            import_folder(folder, tmp_path / f"run-{number}")


def test_a_voice_of_another_size_is_refused(exported: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for file in exported[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    text = (folder / DESCRIPTION).read_text()
    (folder / DESCRIPTION).write_text(text.replace('"num_mels": 3', '"num_mels": 4'))
    with pytest.raises(ValueError, match=r"data_in has shape \(6, 8\)"):
        import_folder(folder, tmp_path / "run")


def test_a_head_that_is_cut_off_is_damaged(exported: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported[1], tmp_path / "in")
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is damaged \(.*\); export it again"):
        import_folder(folder, tmp_path / "run")


def test_a_full_disk_is_no_traceback(exported: tuple[Path, Path], tmp_path: Path) -> None:
    reader, specs = ParamsReader(exported[0]), interaction_head.head_specs(EXPERIMENT.model)
    with small_disk(1_000), pytest.raises(OSError, match=rf"{WEIGHTS} cannot be written \(.*File too large"):
        interaction_head._write_weights(tmp_path, reader, specs)


def test_what_training_goes_on_with_comes_back(tmp_path: Path) -> None:
    model = inkling_model(mtp=MtpConfig(num_blocks=1, embedding=MtpEmbedding.INPUT))
    model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, balance_rate=0.02))
    write_run(tmp_path / "run", Experiment(name="trained", model=model))
    export_folder(tmp_path / "run", tmp_path / "out")
    found = import_folder(tmp_path / "out", tmp_path / "again").model
    assert (found.mtp, found.moe.balance_rate) == (model.mtp, 0.02)


def test_an_older_description_has_what_imports_took_then(exported: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported[1], tmp_path / "in")
    described = json.loads((folder / DESCRIPTION).read_text())
    del described["mtp_embedding"], described["balance_rate"]
    (folder / DESCRIPTION).write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"cannot be read: .* lacks balance_rate, .*; export it again"):
        import_folder(folder, tmp_path / "run")
    (folder / DESCRIPTION).write_text(json.dumps(described | {"format": 2}))
    found = import_folder(folder, tmp_path / "run").model
    assert (found.audio_out, found.mtp.embedding, found.moe.balance_rate) == (VOICE, MtpEmbedding.RAW, 1e-3)
    (folder / DESCRIPTION).write_text(json.dumps(described | {"format": 1}))
    with pytest.raises(ValueError, match="format 1, this code reads 2 and 3; export it again"):
        import_folder(folder, tmp_path / "run")


def test_a_model_without_a_voice_writes_no_such_files(tmp_path: Path) -> None:
    write_run(tmp_path / "run", Experiment(name="silent", model=inkling_model()))
    export_folder(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out" / WEIGHTS).exists()
    assert not (tmp_path / "out" / DESCRIPTION).exists()


def test_a_layout_of_micro_turns_comes_back_without_a_voice(tmp_path: Path) -> None:
    silent = dataclasses.replace(EXPERIMENT, model=inkling_model())
    write_run(tmp_path / "run", silent)
    export_folder(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out" / WEIGHTS).exists()
    assert import_folder(tmp_path / "out", tmp_path / "again").turn == silent.turn
    export_folder(tmp_path / "again", tmp_path / "out2")
    assert (tmp_path / "out2" / DESCRIPTION).read_bytes() == (tmp_path / "out" / DESCRIPTION).read_bytes()
