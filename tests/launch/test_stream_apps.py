"""The apps that export, stream and evaluate, run as a user runs them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from PIL import Image
from small_model import RATE_HZ, small_model, small_session, small_sound

from data_pipelines.record_writer import SessionWriter
from tml.checkpoint import Checkpoints
from tml.export import bundle
from tml.mesh import make_mesh
from tml.train_step import init_state

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, a bundle, sounds and sessions."""
    root = tmp_path_factory.mktemp("apps")
    model = small_model(root / "run")
    bundle.save(model, root / "bundle")
    one_device = make_mesh(model.experiment.mesh, jax.devices()[:1])
    state = init_state(jax.random.key(0), model.experiment, one_device)
    with Checkpoints(root / "run") as checkpoints:
        checkpoints.save(replace(state, params=model.params), model.experiment)
    (root / "heard").mkdir()
    soundfile.write(root / "in.wav", small_sound(2 * RATE_HZ + 77), RATE_HZ, subtype="PCM_16")
    shutil.copy(root / "in.wav", root / "heard" / "own.wav")
    (root / "broken.wav").write_bytes(b"RIFF, and then nothing that is sound")
    with SessionWriter(root / "heldout", name="heldout", num_shards=1, meta={"licence": "CC0"}) as writer:
        for number in range(3):
            writer.write(small_session(number, 1.2))
    return root


def run(app: str, *flags: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"launch.{app}", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_export_writes_the_newest_checkpoint_as_a_bundle(folder: Path) -> None:
    done = run("export", "--workdir=run", "--out=exports/small", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "exports/small: small, " in done.stdout
    assert "written and read back" in done.stdout
    exported, wanted = bundle.load(folder / "exports" / "small"), bundle.load(folder / "bundle")
    assert exported.experiment == wanted.experiment
    jax.tree.map(np.testing.assert_array_equal, exported.params, wanted.params)


@pytest.mark.parametrize(
    ("stop", "code", "message"), [(signal.SIGINT, 130, "error: interrupted\n"), (signal.SIGTERM, 75, "")]
)
def test_a_stream_that_is_stopped_writes_what_was_said_until_then(
    folder: Path, stop: signal.Signals, code: int, message: str
) -> None:
    command = [sys.executable, "-u", "-m", "launch.stream", "--model=bundle", "--wav=in.wav", "--out=stopped"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, "--pace=real_time", "--tail_s=120", "--type_text=seven or eight"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert any(" tick " in line for line in process.stdout)
        process.send_signal(stop)
        rest, errors = process.communicate(timeout=200)
    assert process.returncode == code, errors
    assert errors == message
    assert "wrote stopped/transcript.json, stopped/timeline.png" in rest
    transcript = json.loads((folder / "stopped" / "transcript.json").read_text())
    assert transcript["said"]
    assert 0 < len(transcript["ticks"]) < 400


def test_stream_writes_transcript_and_picture(folder: Path) -> None:
    told = "--system=" + 20 * "seven, then eight or nine, then one or two "
    flags = ("--model=bundle", "--wav=in.wav", "--type_text=seven or eight", "--out=out", told)
    done = run("stream", *flags, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "notice: the session ended before all of its system went in; what is missing: " in done.stdout
    assert "  end of tick " in done.stdout
    assert "in 21 ticks of 200 ms" in done.stdout
    assert "wrote out/transcript.json, out/timeline.png" in done.stdout
    transcript = json.loads((folder / "out" / "transcript.json").read_text())
    assert transcript["wav"] == "in.wav"
    assert transcript["programs_compiled"] == 1
    assert 0 < transcript["tick_p50_ms"] <= transcript["tick_p99_ms"] <= transcript["tick_max_ms"]
    assert transcript["real_time_factor"] > 0
    said = transcript["said"]
    assert said
    assert all(one["emitted_s"] == pytest.approx(0.2 * (one["tick"] + 1)) for one in said)
    assert said[-1]["tick"] <= 20
    with Image.open(folder / "out" / "timeline.png") as picture:
        assert picture.width > 300
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_a_sound_longer_than_a_session_may_usually_grow_is_streamed_whole(folder: Path) -> None:
    soundfile.write(folder / "long.wav", np.zeros(RATE_HZ * 30, np.float32), RATE_HZ)
    done = run("stream", "--model=bundle", "--wav=long.wav", "--out=long", "--tail_s=0", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "in 150 ticks" in done.stdout


def test_a_session_that_may_not_grow_so_far_ends_with_what_was_said_written(folder: Path) -> None:
    flags = ("--model=bundle", "--wav=in.wav", "--out=short", "--max_positions=60")
    text = "seven, then eight or nine, then one or two or three or four, then five or six"
    done = run("stream", *flags, f"--type_text={text}", folder=folder)
    assert done.returncode == 1, done.stdout
    assert "one more turn may pass stream.max_positions = 60" in done.stderr
    transcript = json.loads((folder / "short" / "transcript.json").read_text())
    assert 0 < len(transcript["ticks"]) < 21
    [notice] = transcript["notices"]
    assert notice.startswith("the session ended before all of its user_text went in")


def test_evaluate_prints_a_table_and_writes_its_report(folder: Path) -> None:
    done = run(
        "evaluate", "--model=bundle", "--sessions=heldout", "--max_sessions=2", "--out=report", "--pictures=1",
        folder=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "streaming 2 of 3 sessions of heldout, and their controls" in done.stdout
    for condition in ("speech", "blanked", "swapped", "envelope noise"):
        assert f"\n{condition}  " in done.stdout
    report = json.loads((folder / "report" / "report.json").read_text())
    assert (report["model"], report["sessions"], report["num_sessions"]) == ("bundle", "heldout", 2)
    assert report["conditions"]["speech"]["pause_takeover"]["cases"] == 2
    assert [path.name for path in (folder / "report").glob("*.png")] == ["small-0.png"]
    lines = [json.loads(line) for line in (folder / "report" / "sessions.jsonl").read_text().splitlines()]
    assert [line["session"] for line in lines] == ["small-0", "small-1"]
    assert {expected["kind"] for line in lines for expected in line["expected"]} == {"answer", "silence"}
    assert all(said["text"] and said["emitted_s"] > 0 for line in lines for said in line["said"])


@pytest.mark.parametrize(
    ("app", "flags", "message"),
    [
        ("export", ("--workdir=run",), "--workdir and --out are needed"),
        ("export", ("--workdir=nowhere", "--out=x"), "nowhere is neither a bundle"),
        ("stream", ("--model=bundle", "--out=x"), "--model, --wav and --out are needed"),
        ("stream", ("--model=bundle", "--step=3", "--wav=in.wav", "--out=x"), "is a bundle, which holds one step"),
        ("stream", ("--model=bundle", "--wav=no.wav", "--out=x"), "no.wav: there is no such file"),
        ("stream", ("--model=bundle", "--wav=broken.wav", "--out=x"), "broken.wav: cannot be decoded as sound"),
        (
            "stream",
            ("--model=bundle", "--wav=heard/own.wav", "--out=heard"),
            "--wav=heard/own.wav would be written over",
        ),
        ("evaluate", (), "--model is missing"),
        ("evaluate", ("--model=bundle", "--out=in.wav"), "--out=in.wav is a file; name a folder"),
        ("export", ("--workdir=bundle", "--out=x", "--stored_as=bfloat16"), "--stored_as is of --format=hf"),
        ("evaluate", ("--model=bundle",), "--sessions is missing"),
        ("evaluate", ("--model=bundle", "--sessions=nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_a_non_zero_exit(
    folder: Path, app: str, flags: tuple[str, ...], message: str
) -> None:
    done = run(app, *flags, folder=folder)
    assert done.returncode in (1, 2), done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert not (folder / "x").exists()
