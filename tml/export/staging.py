"""A folder that is written whole or not at all: beside its place first, then put there in one rename."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path, marker: str, error: type[ValueError]) -> Iterator[Path]:
    """Hands out an empty folder to fill, and puts it in the place of `folder` when that is done.

    Args:
        folder: where it goes; one with the same marker is replaced.
        marker: the file by which a folder of this kind is known.
        error: what is raised.

    Raises:
        ValueError: the folder holds something else.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / marker).is_file():
        kind = marker.partition(".")[0]
        raise error(f"{folder} holds files that are not a {kind}; name an empty or a new folder")
    staging, retired = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    if retired.exists() and not folder.exists():
        # A process ended between the two renames.
        retired.rename(folder)
    for left_over in (staging, retired):
        shutil.rmtree(left_over, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(retired)
    staging.rename(folder)
    shutil.rmtree(retired, ignore_errors=True)
