"""A folder that takes another's place when it is whole, and not before."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `folder` on leaving without an error.

    Killed at any moment, it leaves the older folder, or the new one, or none, with what was left
    over beside it under a hidden name that the next call sweeps away.
    """
    staging, retired = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for left_over in (staging, retired):
        shutil.rmtree(left_over, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    if folder.exists():
        folder.rename(retired)
    staging.rename(folder)
    shutil.rmtree(retired, ignore_errors=True)
