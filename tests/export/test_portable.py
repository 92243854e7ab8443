"""Portable programs: in a fresh process without this package they say what the engine's network says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from small_disk import small_disk
from small_model import small_model

from tml.export import portable
from tml.export.bundle import Model
from tml.export.portable import PortableError
from tml.model import cache
from tml.stream.inputs import TurnInputs

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("portable_program.py")
BUCKET = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return small_model(tmp_path_factory.mktemp("model"), max_positions=64)


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "portable"
    portable.save(model, out, buckets=(BUCKET,))
    return out


def calls_of(model: Model) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Two micro-turns: input slots, then two output tokens; the second session is idle in some of them."""
    rng = np.random.default_rng(0)
    width, cfg = model.layout.max_slots_in, model.experiment.model
    shapes = jax.eval_shape(lambda: portable._no_inputs(cfg, model.layout, BUCKET))
    calls = []
    for turn in range(2):
        kinds = rng.integers(1, 3, (BUCKET, width)).astype(np.uint8)
        append = {
            "tokens_BW": rng.integers(0, cfg.vocab_size, (BUCKET, width)).astype(np.int32),
            "kinds_BW": kinds,
            "levels_BWM": rng.integers(0, cfg.audio.num_levels, shapes.levels_BWM.shape).astype(np.uint8),
            "tiles_BP": np.zeros(shapes.tiles_BP.shape, np.int16),
            "tile_index_BW": np.zeros((BUCKET, width), np.int32),
            "counts_B": np.array([width, 3 - 3 * turn], np.int32),
        }
        calls.append(("append", append))
        for _ in range(2):
            tokens = rng.integers(0, cfg.vocab_size, BUCKET).astype(np.int32)
            calls.append(("decode", {"tokens_B": tokens, "active_B": np.array([True, turn == 0])}))
    return calls


def test_a_fresh_process_without_the_package_says_the_same(model: Model, folder: Path, tmp_path: Path) -> None:
    calls = calls_of(model)
    flat = {f"{i}/{name}_b{BUCKET}/{key}": value for i, (name, call) in enumerate(calls) for key, value in call.items()}
    np.savez(tmp_path / "inputs.npz", **flat)
    command = [sys.executable, "-S", str(PROGRAM), str(folder), str(tmp_path / "inputs.npz"), str(tmp_path / "out.npz")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path != str(ROOT))}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    found = np.load(tmp_path / "out.npz")

    cfg = model.experiment.model
    state = cache.init_state(cfg, BUCKET, model.experiment.stream.max_positions, model.layout.max_slots_in)
    for i, (name, call) in enumerate(calls):
        arrays = {key: jnp.asarray(value) for key, value in call.items()}
        if name == "append":
            slots, last_B = TurnInputs(**arrays).slots(), np.maximum(call["counts_B"] - 1, 0)
            active_B = call["counts_B"] > 0
        else:
            slots = cache.slots_of(arrays["tokens_B"][:, None], arrays["active_B"].astype(jnp.int32), cfg)
            last_B, active_B = np.zeros(BUCKET, int), call["active_B"]
        state, logits_BWV = jax.jit(cache.append, static_argnums=3)(model.params, state, slots, cfg)
        wanted_BV = np.asarray(logits_BWV)[np.arange(BUCKET), last_B]
        assert active_B.any()
        np.testing.assert_allclose(found[str(i)][active_B], wanted_BV[active_B], rtol=1e-5, atol=1e-5)
    assert np.ptp(found["0"]) > 0.1


def test_the_manifest_states_everything(model: Model, folder: Path) -> None:
    manifest = json.loads((folder / portable.MARKER).read_text())
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
    assert {each["file"] for each in manifest["programs"]} | {"params.safetensors"} == manifest["sha256"].keys()
    weights = safetensors.numpy.load_file(folder / manifest["weights"])
    for program in manifest["programs"]:
        params = {e["name"] for e in program["arguments"] if e["name"].startswith("params/")}
        assert params == (set() if program["name"] == "init" else {f"params/{path}" for path in weights})
        assert program["bucket"] == BUCKET
    leaves = jax.tree.leaves(model.params)
    assert {path.split("/")[0] for path in weights} == set(model.params)
    assert sum(values.size for values in weights.values()) == sum(leaf.size for leaf in leaves)


def test_another_folder_is_not_written_over(model: Model, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(PortableError, match=r"holds files, but no tml_export.json, .*; name another --out"):
        portable.save(model, tmp_path, buckets=(1,))


def test_a_file_that_somebody_put_beside_programs_is_not_deleted(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "portable"
    portable.save(model, out, buckets=())
    portable.save(model, out, buckets=())
    (out / "notes.md").write_text("mine")
    with pytest.raises(PortableError, match=r"holds notes\.md, which no export of tml wrote; name another --out"):
        portable.save(model, out, buckets=())
    assert (out / "notes.md").read_text() == "mine"


def test_a_full_disk_is_no_traceback(model: Model, tmp_path: Path) -> None:
    with small_disk(2_000), pytest.raises(OSError, match=r"params.safetensors cannot be written \(.*File too large"):
        portable.save(model, tmp_path / "portable", buckets=())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_bucket_is_written(model: Model, tmp_path: Path) -> None:
    portable.save(model, tmp_path / "portable")
    manifest = json.loads((tmp_path / "portable" / portable.MARKER).read_text())
    assert [(each["name"], each["bucket"]) for each in manifest["programs"]] == [
        (name, bucket) for bucket in (1, 8, 16) for name in ("init", "append", "decode")
    ]
