"""Imports and exports while its memory is measured, or killed again and again: tests/export/test_inkling_folders.py.

python tests/export/import_program.py measured SMALL IN FOLDER    prints by how many bytes memory grew at most
python tests/export/import_program.py killed IN FOLDER            FOLDER/0/out, FOLDER/1/out, … are made despite kills
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import safetensors.numpy

from tml.export import inkling_import, tensor_folder
from tml.export.inkling_export import export_folder
from tml.export.inkling_import import import_folder

PIECE_BYTES = 2**20
"""As small beside the model of the test as 64 MiB is beside the real one."""

MOMENTS = (0, 60, 112, 118, 500)
"""While reading, just before and after the checkpoint gets its name, while exporting, and after the end."""


def anonymous_bytes() -> int:
    """Memory in use, without what is mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


def growth(action: Callable[[], object]) -> int:
    """By how much an action raised the memory in use at most, looked at every 2 ms."""
    seen, is_done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.002):
            seen.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = action()
    seen.append(anonymous_bytes())
    is_done.set()
    watcher.join()
    del result
    return max(seen) - seen[0]


def measured(small: Path, folder: Path, copies: Path) -> None:
    """Works on a small folder first, so that every library has what it keeps."""
    inkling_import.PIECE_BYTES = PIECE_BYTES
    import_folder(small, copies / "small")
    export_folder(copies / "small", copies / "small_out", max_shard_bytes=PIECE_BYTES)
    print("import", growth(lambda: import_folder(folder, copies / "run")))
    print("export", growth(lambda: export_folder(copies / "run", copies / "out", max_shard_bytes=PIECE_BYTES)))
    print("all", growth(lambda: safetensors.numpy.load_file(folder / tensor_folder.SINGLE)))


def die_at(moment: int) -> None:
    """Kills this process at its n-th read of a tensor, write of a shard, or renaming from here."""
    left = moment

    def counted(function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*args, **kwargs)

        return call

    tensor_folder.TensorFolder.read = counted(tensor_folder.TensorFolder.read)
    safetensors.numpy.save_file = counted(safetensors.numpy.save_file)
    Path.rename = counted(Path.rename)


def killed(folder: Path, copies: Path) -> None:
    """Kills both commands at moments of theirs until they outlive one; after each kill they are run again."""
    for number, moment in enumerate(MOMENTS):
        place = copies / str(number)
        for each in (moment, None):
            child = os.fork()
            if child == 0:
                if each is not None:
                    die_at(each)
                import_folder(folder, place / "run")
                export_folder(place / "run", place / "out", max_shard_bytes=40_000)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert each is not None or status == 0, "nothing kills it the second time"
            if each is not None:
                print("killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}", flush=True)


def main() -> None:
    what, *arguments = sys.argv[1:]
    {"measured": measured, "killed": killed}[what](*map(Path, arguments))


if __name__ == "__main__":
    main()
