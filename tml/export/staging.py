"""A folder that is written whole or not at all: beside its place first, then put there in one rename.

Every export holds `tml_export.json`, which names its kind and its files. A folder is replaced only if it has one of
the same kind and holds nothing besides. So a download is never deleted, nor a file that somebody put into an export.
"""

import enum
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tml.foreign_files import files_of, foreign_files

MARKER, FORMAT = "tml_export.json", 1


class Kind(enum.StrEnum):
    """What a folder is exported as."""

    BUNDLE = "bundle"
    STABLEHLO = "stablehlo"
    HF = "hf"


@contextmanager
def whole_folder(folder: Path, kind: Kind, error: type[ValueError]) -> Iterator[Path]:
    """Hands out an empty folder to fill, and puts it in the place of `folder` when that is done.

    Args:
        folder: where it goes; an export of the same kind is replaced, if nobody put anything in it.
        kind: what is exported.
        error: what is raised.

    Raises:
        ValueError: the folder holds something else, before or after the new one is filled.
    """
    staging, retired = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    if retired.exists() and not folder.exists():
        # A process ended between the two renames.
        retired.rename(folder)
    _refuse_others(folder, kind, error)
    for left_over in (staging, retired):
        shutil.rmtree(left_over, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        content = {"format": FORMAT, "kind": kind, "files": files_of(staging)}
        (staging / MARKER).write_text(json.dumps(content, indent=1) + "\n")
        _refuse_others(folder, kind, error)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(retired)
    staging.rename(folder)
    shutil.rmtree(retired, ignore_errors=True)


def _refuse_others(folder: Path, kind: Kind, error: type[ValueError]) -> None:
    """Raises `error` unless the folder is empty, not there, or an untouched export of this kind."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    way_out = "name another --out, or empty this folder"
    if not (folder / MARKER).is_file():
        raise error(
            f"{folder} holds files, but no {MARKER}, so it is no export of tml, or one of an older version; {way_out}"
        )
    try:
        content = json.loads((folder / MARKER).read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this code reads {FORMAT}")
        found, listed = content["kind"], {MARKER, *content["files"]}
    except (KeyError, TypeError, ValueError) as reason:
        raise error(f"{folder / MARKER} cannot be read ({reason!r}); {way_out}") from reason
    if found != kind:
        raise error(f"{folder} is an export of kind {found}, not {kind}; {way_out}")
    others = foreign_files(folder, listed.__contains__)
    if others:
        raise error(f"{folder} holds {others}, which no export of tml wrote; {way_out}")
