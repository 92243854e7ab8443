"""The bundle: what was saved comes back, what is damaged is refused, and half of one is none."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from small_disk import small_disk
from small_model import small_model
from tiny import VOICE

from tml.checkpoint_pieces import Piece, PiecewiseArray, write_params
from tml.config import MtpConfig, VocoderConfig, VocoderKind
from tml.export import bundle
from tml.export.bundle import BundleError, Model
from tml.model import transformer
from tml.params import init_params
from tml.whole_folder import Kind, whole_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(model: Model, tmp_path: Path) -> Path:
    bundle.save(model, tmp_path / "bundle")
    return tmp_path / "bundle"


def changed_marker(folder: Path, **changes: object) -> None:
    marker = json.loads((folder / bundle.MARKER).read_text())
    (folder / bundle.MARKER).write_text(json.dumps({**marker, **changes}))


def test_everything_comes_back_bit_for_bit(model: Model, folder: Path) -> None:
    for found in (bundle.load(folder), bundle.open_model(folder)):
        assert found.experiment == model.experiment
        assert found.tokenizer.fingerprint() == model.tokenizer.fingerprint()
        assert found.layout == model.layout
        assert jax.tree.structure(found.params) == jax.tree.structure(model.params)
        for left, right in zip(jax.tree.leaves(found.params), jax.tree.leaves(model.params), strict=True):
            assert left.dtype == right.dtype == np.float32
            np.testing.assert_array_equal(left, right)


def test_blocks_of_multi_token_prediction_stay_in_the_run(model: Model, tmp_path: Path) -> None:
    trained = replace(
        model.experiment, model=replace(model.experiment.model, mtp=MtpConfig(num_blocks=2, global_blocks=(1,)))
    )
    params = init_params(transformer.specs(trained.model), jax.random.key(0))
    assert params.keys() - model.params.keys() == {"mtp"}
    sources = {
        path: PiecewiseArray(leaf.shape, leaf.shape, lambda leaf=leaf: iter([Piece((0,) if leaf.ndim else (), leaf)]))
        for path, leaf in bundle.by_path(params, trained).items()
    }
    write_params(tmp_path / "run", trained, sources)
    model.tokenizer.save(tmp_path / "run" / "tokenizer")
    opened = bundle.open_model(tmp_path / "run")
    assert opened.experiment == model.experiment
    assert jax.tree.structure(opened.params) == jax.tree.structure(model.params)
    np.testing.assert_array_equal(opened.params["unembed"], params["unembed"])
    bundle.save(opened, tmp_path / "bundle")
    assert bundle.load(tmp_path / "bundle").experiment.model.mtp.num_blocks == 0


def test_a_newer_bundle_takes_the_place_of_an_older_one(model: Model, folder: Path) -> None:
    newer = replace(model, params=jax.tree.map(lambda leaf: leaf + 1, model.params))
    bundle.save(newer, folder)
    np.testing.assert_array_equal(bundle.load(folder).params["norm"], model.params["norm"] + 1)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_vocoders_program_is_in_the_bundle(model: Model, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.mkdir()
    for name in ("vocoder.json", "init.stablehlo", "step.stablehlo"):
        (program / name).write_text(name)
    own = replace(VOICE, vocoder=VocoderConfig(kind=VocoderKind.PROGRAM, program=str(program)))
    experiment = bundle.with_voice(model.experiment, own)
    params = init_params(transformer.specs(experiment.model), jax.random.key(0))
    bundle.save(replace(model, experiment=experiment, params=params), tmp_path / "bundle")
    shutil.rmtree(program)
    (tmp_path / "bundle").rename(tmp_path / "elsewhere")
    found = Path(bundle.load(tmp_path / "elsewhere").experiment.model.audio_out.vocoder.program)
    assert found == tmp_path / "elsewhere" / "vocoder"
    assert (found / "step.stablehlo").read_text() == "step.stablehlo"
    (found / "step.stablehlo").write_text("other")
    with pytest.raises(BundleError, match="is damaged"):
        bundle.load(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"is no vocoder: it has no vocoder\.json"):
        bundle.save(replace(model, experiment=experiment, params=params), tmp_path / "third")
    assert not list(tmp_path.glob(".*third*"))


def test_a_bundle_that_was_put_aside_when_the_process_ended_is_kept(model: Model, folder: Path) -> None:
    folder.rename(folder.with_name(f".{folder.name}.replaced-host-0123abcd"))
    with pytest.raises(KeyboardInterrupt), whole_folder(folder, Kind.BUNDLE, BundleError):
        raise KeyboardInterrupt
    assert bundle.load(folder).experiment == model.experiment
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", [bundle.PARAMS, bundle.CONFIG, "tokenizer/tokenizer.json"])
def test_flipped_bits_are_damage(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    place = data.rindex(b"8") if name != bundle.PARAMS else len(data) // 2
    data[place] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name}.* is damaged: export it again"):
        bundle.load(folder)


@pytest.mark.parametrize("name", [bundle.PARAMS, bundle.CONFIG, "tokenizer/tokenizer.json"])
def test_a_file_that_lacks_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleError, match=rf"{name}.* export it again"):
        bundle.load(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}'])
def test_a_marker_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / bundle.MARKER).write_text(text)
    with pytest.raises(BundleError, match=rf"{bundle.MARKER}.* is damaged: export it again"):
        bundle.load(folder)


def test_a_config_of_another_version_is_named(folder: Path) -> None:
    config = json.loads((folder / bundle.CONFIG).read_text())
    (folder / bundle.CONFIG).write_text(json.dumps({**config, "gone": 1}))
    marker = json.loads((folder / bundle.MARKER).read_text())
    digests = {**marker["sha256"], bundle.CONFIG: bundle.digest(folder / bundle.CONFIG)}
    changed_marker(folder, sha256=digests)
    with pytest.raises(BundleError, match=rf"{bundle.CONFIG} was written by another version .* config.gone"):
        bundle.load(folder)


def test_another_format_is_refused(folder: Path) -> None:
    changed_marker(folder, format=2)
    with pytest.raises(BundleError, match="has bundle format 2, this code reads 1; export it again"):
        bundle.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors | {"norm": jnp.ones(3)}, r"norm has shape \(3,\), its config wants \(16,\)"),
        (lambda tensors: {k: v for k, v in tensors.items() if k != "norm"}, r"norm has shape None"),
        (lambda tensors: tensors | {"left/over": jnp.ones(3)}, "holds left/over, which its config does not know"),
    ],
    ids=["shape", "missing", "left over"],
)
def test_parameters_that_do_not_fit_the_config_are_refused(folder: Path, change, message: str) -> None:
    tensors = change(safetensors.numpy.load_file(folder / bundle.PARAMS))
    safetensors.numpy.save_file({name: np.asarray(values) for name, values in tensors.items()}, folder / bundle.PARAMS)
    digests = json.loads((folder / bundle.MARKER).read_text())["sha256"]
    changed_marker(folder, sha256=digests | {bundle.PARAMS: bundle.digest(folder / bundle.PARAMS)})
    with pytest.raises(BundleError, match=message):
        bundle.load(folder)


def test_a_folder_that_is_no_bundle_is_neither_read_nor_written_over(model: Model, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(BundleError, match=r"neither a bundle \(no bundle.json\) nor a run folder \(no checkpoints\)"):
        bundle.open_model(tmp_path)
    with pytest.raises(BundleError, match=r"holds files, but no tml_export.json, .*; name another --out"):
        bundle.save(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_file_that_somebody_put_into_a_bundle_is_not_deleted(model: Model, folder: Path) -> None:
    (folder / "notes.md").write_text("mine")
    with pytest.raises(BundleError, match=r"holds notes\.md, which no export of tml wrote; name another --out"):
        bundle.save(model, folder)
    assert (folder / "notes.md").read_text() == "mine"
    assert bundle.load(folder).experiment == model.experiment


def test_a_full_disk_leaves_what_was_there(model: Model, folder: Path) -> None:
    with small_disk(2_000), pytest.raises(OSError, match=rf"{bundle.PARAMS} cannot be written \(.*File too large"):
        bundle.save(model, folder)
    assert bundle.load(folder).experiment == model.experiment
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_killed_at_any_moment_it_leaves_a_whole_bundle_or_none(model: Model, folder: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    for number in range(24):
        shutil.copytree(folder, copies / str(number))
    program = [sys.executable, str(Path(__file__).with_name("killed_program.py")), str(copies)]
    ran = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    ends = [line.split(maxsplit=1)[1] for line in ran.stdout.splitlines()]
    assert len(ends) == 24
    assert ends[-1] == "exit 0"
    assert ends.count("killed") > 8
    old, found = np.asarray(model.params["norm"]), []
    for number in range(24):
        copy = copies / str(number)
        if copy.exists():
            found.append(float(np.mean(np.round(bundle.load(copy).params["norm"] - old, 3))))
        else:
            found.append(math.nan)
            bundle.save(model, copy)
            assert bundle.load(copy).experiment == model.experiment
    known = [value for value in found if value == value]
    assert known == sorted(known)
    assert set(known) == {0.0, 1.0}
    assert len(known) >= 23
