"""What the disk does to safetensors is an error with a path and a reason."""

from pathlib import Path

import numpy as np
import pytest
from small_disk import small_disk

from tml.export.tensor_folder import open_tensors, save_tensors

TENSORS = {"a": np.ones(5_000, np.float32), "b": np.zeros((), np.float32)}


def test_what_is_saved_can_be_opened(tmp_path: Path) -> None:
    save_tensors(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with open_tensors(tmp_path / "x.safetensors", "") as stored:
        assert stored.metadata() == {"format": "pt"}
        for name, values in TENSORS.items():
            np.testing.assert_array_equal(stored.get_tensor(name), values)


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    message = r"x\.safetensors cannot be written \(.*File too large.*\); make room, or write elsewhere"
    with small_disk(10_000), pytest.raises(OSError, match=message):
        save_tensors(TENSORS, tmp_path / "x.safetensors")
    with pytest.raises(OSError, match=r"gone/x\.safetensors cannot be written \(.*No such file or directory"):
        save_tensors(TENSORS, tmp_path / "gone" / "x.safetensors")


@pytest.mark.parametrize("share", [0, 0.001, 0.5])
def test_a_file_that_is_cut_off_is_damaged(share: float, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_tensors(TENSORS, file)
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged \(.*\); copy it again"):
        open_tensors(file, "copy it again")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors"):
        open_tensors(tmp_path / "x.safetensors", "")
