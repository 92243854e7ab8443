"""Metrics: pooled means, and sinks that survive being killed."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from small_disk import small_disk
from tensorboardX.proto import event_pb2

from tml.metrics import (
    JsonLines,
    Mean,
    PlainConsole,
    RichConsole,
    TensorBoard,
    Window,
    duration,
    read_json_lines,
    short_name,
    short_number,
)


def mean(total: float, count: float) -> Mean:
    return Mean(total=np.float32(total), count=np.float32(count))


def test_a_window_pools_means_and_keeps_the_last_of_the_rest():
    window = Window()
    assert window.add({"loss": mean(6, 3), "lr": np.float32(0.25), "none": mean(0, 0)}) == {"loss": 2.0, "lr": 0.25}
    window.add({"loss": mean(2, 1), "lr": np.float32(0.5), "none": mean(0, 0)})
    assert window.take() == {"loss": 2.0, "lr": 0.5}
    assert window.take() == {}


def test_a_step_that_is_not_finite_stays_visible():
    window = Window()
    window.add({"loss": mean(2, 1)})
    window.add({"loss": mean(math.nan, 1)})
    assert math.isnan(window.take()["loss"])


def test_json_lines_survive_a_torn_line(tmp_path: Path):
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonLines(path)
    sink.write(1, {"train/loss": 2.5})
    sink.write(2, {"train/loss": math.inf})
    sink.close()
    whole = path.read_text()
    with path.open("a") as file:
        file.write('{"step": 3, "train/lo')
    assert [line["step"] for line in read_json_lines(path)] == [1, 2]
    resumed = JsonLines(path)
    assert path.read_text() == whole
    resumed.write(3, {"train/loss": 1.0})
    resumed.close()
    lines = list(read_json_lines(path))
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 2.5), (2, None), (3, 1.0)]
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_line_of_nothing_but_a_torn_write_is_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step"' + " " * 5000)
    JsonLines(path).close()
    assert path.read_text() == ""


def test_a_bad_line_in_the_middle_is_an_error(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"line 2 is not JSON"):
        list(read_json_lines(path))


def test_tensorboard_writes_events_that_can_be_read_back(tmp_path: Path):
    sink = TensorBoard(tmp_path, start_step=0)
    sink.write(7, {"train/loss": 0.5})
    sink.write(8, {"train/loss": 0.25})
    sink.close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    data, position, points = path.read_bytes(), 0, []
    while position < len(data):  # a record is: length (8 bytes), its crc (4), the event, its crc (4)
        (length,) = struct.unpack_from("<Q", data, position)
        event = event_pb2.Event.FromString(data[position + 12 : position + 12 + length])
        points += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        position += length + 16
    assert points == [(7, "train/loss", 0.5), (8, "train/loss", 0.25)]


def test_a_full_disk_is_an_error_of_tensorboard_and_not_a_wait(tmp_path: Path):
    sink = TensorBoard(tmp_path, start_step=0)
    with small_disk(100), pytest.raises(OSError, match="File too large"):
        sink.write(1, {f"train/{number}": 1.0 for number in range(50)})


def test_plain_console_prints_one_line_a_step(capsys: pytest.CaptureFixture):
    PlainConsole(400).write(10, {"train/loss_text": 1.23456, "throughput/tokens_per_s": 12_345.6})
    assert capsys.readouterr().out == "step 10/400  text 1.235  tokens/s 12.3k\n"


def test_rich_console_draws_on_a_terminal(capsys: pytest.CaptureFixture):
    console = RichConsole(400)
    console.write(10, {"train/loss": 1.5, "throughput/eta_s": 65.0})
    console.write(10, {"eval/loss": 2.5})
    console.close()
    drawn = capsys.readouterr().out
    assert "10/400" in drawn
    assert "1m05s left" in drawn
    assert "eval loss 2.5" in drawn


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00123456, "0.001235"), (9999.0, "9999"), (12_345.0, "12.3k"), (2.5e12, "2.5T"), (math.nan, "nan")],
)
def test_short_numbers(value: float, text: str):
    assert short_number(value) == text


def test_names_and_durations():
    assert short_name("train/loss_text") == "text"
    assert short_name("train/loss") == "loss"
    assert short_name("eval/accuracy_speak") == "eval acc speak"
    assert short_name("throughput/mfu") == "mfu"
    assert [duration(5.0), duration(184.9), duration(3_725.0)] == ["5s", "3m04s", "1h02m"]
