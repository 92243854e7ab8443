"""`launch.stream` with a background, run as a user runs it: a real endpoint, a real tool server, real time."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from small_model import RATE_HZ, small_model, small_sound

from tml.config import VideoConfig
from tml.export import bundle

ROOT = Path(__file__).parents[2]
SERVE = ROOT / "tests" / "serve"
VIDEO = VideoConfig(tile_px=4, fold_px=(2, 2), fold_dims=(6, 10), max_tiles_per_turn=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a model with eyes, a sound, pictures."""
    root = tmp_path_factory.mktemp("background")
    bundle.save(small_model(root / "run", video=VIDEO), root / "bundle")
    soundfile.write(root / "in.wav", small_sound(2 * RATE_HZ), RATE_HZ, subtype="PCM_16")
    (root / "pictures").mkdir()
    for number in range(6):
        Image.fromarray(np.full((4, 3, 3), 40 * number, np.uint8)).save(root / "pictures" / f"{number}.png")
    return root


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    command = [sys.executable, str(SERVE / "chat_server.py"), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def stream(folder: Path, *flags: str, app: Sequence[str] = ("-m", "launch.stream")) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *app, "--model=bundle", "--wav=in.wav", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_a_session_with_a_background_keeps_time_and_shows_what_came_back(folder: Path, endpoint: str) -> None:
    """The random model calls nonsense, which comes back as failures; both servers are there all the time."""
    tools = f"env PYTHONPATH={ROOT} {sys.executable} -m launch.tool_server --canvas={folder}/canvas.svg"
    done = stream(
        folder, "--out=out", f"--worker={endpoint}", "--worker_model=fast", f"--tools={tools}", "--pictures=pictures",
        "--background_timeout_s=300",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    transcript = json.loads((folder / "out" / "transcript.json").read_text())
    ticks = transcript["ticks"]
    assert [tick["tick"] for tick in ticks] == list(range(20))
    assert [tick["due_s"] for tick in ticks] == pytest.approx([0.2 * (tick + 1) for tick in range(20)])
    assert all(tick["done_s"] >= tick["due_s"] for tick in ticks)
    assert 0 < transcript["behind_p50_ms"] <= transcript["behind_max_ms"]
    assert any(said["actions"] for said in transcript["said"])
    came_back = [text for tick in ticks for text in tick["came_back"]]
    assert came_back
    assert all(text.startswith("failed: ") for text in came_back)
    assert " <- failed: " in done.stdout
    assert "tools: time, calculator, draw\n" in done.stdout
    assert "\nnotice: refused " in done.stdout
    assert (folder / "canvas.svg").read_text().startswith("<svg")
    assert transcript["programs_compiled"] == 1


def test_what_is_delegated_reaches_the_endpoint_and_its_answer_comes_back(
    folder: Path, endpoint: str, tmp_path: Path
) -> None:
    flags = (f"--worker={endpoint}", "--worker_model=fast", "--pictures=pictures", "--worker_frames=1", "--tail_s=4")
    done = stream(folder, "--out=asked", *flags, app=[str(ROOT / "tests" / "launch" / "delegating_program.py")])
    assert done.returncode == 0, done.stderr
    request = json.loads((tmp_path / "request-0.json").read_text())
    assert request["model"] == "fast"
    parts = request["messages"][1]["content"]
    assert [part["type"] for part in parts if part["type"] != "text"] == ["input_audio", "image_url"]
    transcript = json.loads((folder / "asked" / "transcript.json").read_text())
    assert next(tick["tick"] for tick in transcript["ticks"] if tick["in_flight"]) == 3
    came_back = "".join(text for tick in transcript["ticks"] for text in tick["came_back"])
    assert came_back == "result it is seven"
    assert transcript["notices"][0].startswith("task 1: 1 of ")


def test_without_a_background_calls_are_only_shown(folder: Path) -> None:
    (folder / "many").mkdir()
    for number in range(12):
        shutil.copyfile(folder / "pictures" / f"{number % 6}.png", folder / "many" / f"{number:02}.png")
    done = stream(folder, "--out=alone", "--tail_s=0", "--pictures=many")
    assert done.returncode == 0, done.stderr
    transcript = json.loads((folder / "alone" / "transcript.json").read_text())
    assert "behind_p50_ms" not in transcript
    # Five a second, for two seconds of sound.
    assert transcript["notices"] == ["2 pictures were due after the end of the sound; give it a longer --tail_s"]
    assert not any(tick["came_back"] for tick in transcript["ticks"])


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--worker=localhost",), 2, "the worker's address 'localhost' does not begin with http"),
        (("--worker=http://localhost",), 2, "the worker at http://localhost needs the name of a model"),
        (("--worker=http://x", "--worker_model=y", "--worker_sends=smell"), 2, "--worker_sends = ['smell'] is not of"),
        (("--worker_model=y",), 2, "name one by --worker"),
        (("--tools=no-such-command",), 1, "the tool server 'no-such-command' does not start"),
        (("--pictures=nowhere",), 1, "nowhere: there is no such folder, or no picture in it"),
    ],
)
def test_a_background_that_cannot_be_had_is_one_line(
    folder: Path, flags: tuple[str, ...], code: int, message: str
) -> None:
    done = stream(folder, "--out=x", *flags)
    assert done.returncode == code, done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
    assert not (folder / "x").exists()
