"""Folders and files that are written whole or not at all: under a hidden name beside their place, which they then take.

    .NAME.partial-HOST-0123abcd     a folder being written, locked by its writer; when that has died, the next writer on
                                    this host removes it (some file systems tell other hosts nothing of locks)
    .NAME.replaced-HOST-0123abcd    what was at NAME, until the new one is there; put back if its writer died before

`staged` and `put_in_place` are for folders that know by themselves what belongs to them. Others hold `tml_export.json`,
which names their kind and their files (`whole_folder`). Such a folder is replaced only if it has one of the same kind
and holds nothing besides. So a download is never deleted, nor a file that somebody put into an export.
"""

import contextlib
import enum
import fcntl
import json
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tml.foreign_files import files_of, foreign_files

MARKER, FORMAT = "tml_export.json", 1
PARTIAL, REPLACED = "partial", "replaced"
HOST, ANY_HOST = re.escape(platform.node()), ".*"


class Kind(enum.StrEnum):
    """What a folder is exported as."""

    BUNDLE = "bundle"
    STABLEHLO = "stablehlo"
    HF = "hf"
    FULL_DUPLEX_BENCH = "full_duplex_bench"


@contextmanager
def whole_folder(folder: Path, kind: Kind, error: type[ValueError], also: str = "") -> Iterator[Path]:
    """Hands out an empty folder to fill, and puts it in the place of `folder` when that is done.

    Args:
        folder: where it goes; an export of the same kind is replaced, if nobody put anything in it.
        kind: what is exported.
        error: what is raised.
        also: a pattern of files that belong to such an export though it did not write them.

    Raises:
        ValueError: the folder holds something else, before or after the new one is filled; or it cannot be replaced.
    """
    with staged(folder, lambda: refuse_others(folder, kind, error, also)) as staging:
        yield staging
        content = {"format": FORMAT, "kind": kind, "files": files_of(staging)}
        (staging / MARKER).write_text(json.dumps(content, indent=1) + "\n")
        refuse_others(folder, kind, error, also)
        put_in_place(staging, folder)


def refuse_others(folder: Path, kind: Kind, error: type[ValueError], also: str = "") -> None:
    """Raises `error` unless the folder is empty, not there, or an untouched export of this kind."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
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
    others = foreign_files(folder, lambda name: name in listed or re.fullmatch(also, name))
    if others:
        raise error(f"{folder} holds {others}, which no export of tml wrote; {way_out}")


@contextmanager
def staged(folder: Path, check: Callable[[], None]) -> Iterator[Path]:
    """Hands out a hidden folder beside `folder`, which is removed at the end unless `put_in_place` took it.

    Args:
        folder: where it will go; links are followed.
        check: raises where the folder must not be replaced. It is called before anything is made or removed.

    Raises:
        ValueError: the folder cannot be replaced, whatever is in it.
    """
    folder = folder.resolve()
    _refuse_unmovable(folder)
    _put_back(folder)
    check()
    folder.parent.mkdir(parents=True, exist_ok=True)
    for path in (*_beside(folder, PARTIAL, HOST), *_beside(folder, REPLACED, HOST)):
        with _lock(path, wait=False) as is_mine:
            if is_mine:
                shutil.rmtree(path, ignore_errors=True)
    with contextlib.ExitStack() as locks:
        staging = _claimed(folder, locks)
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def put_in_place(staging: Path, folder: Path) -> None:
    """Renames a finished folder to its place; what is there goes, once the new one stands there.

    The owner and the permissions of the place stay, as far as this process may set them.
    """
    folder = folder.resolve()
    if not folder.exists():
        staging.rename(folder)
        return
    place, replaced = folder.stat(), _hidden(folder, REPLACED)
    for owner in ((-1, place.st_gid), (place.st_uid, -1)):
        with contextlib.suppress(OSError):
            os.chown(staging, *owner)
    with contextlib.suppress(OSError):
        staging.chmod(stat.S_IMODE(place.st_mode))
    with _lock(folder, wait=False):  # the lock goes with what is replaced: nobody puts that back meanwhile
        try:
            folder.rename(replaced)
            staging.rename(folder)
        except BaseException:
            if replaced.exists() and not folder.exists():
                replaced.rename(folder)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def write_whole(file: Path, text: str) -> None:
    """Writes one file of text, which is there as a whole or as it was before; links and devices are written to."""
    if file.is_symlink() or (file.exists() and not file.is_file()):
        file.write_text(text, encoding="utf-8")
        return
    unfinished = _hidden(file, PARTIAL)
    try:
        unfinished.write_text(text, encoding="utf-8")
        if file.exists():
            shutil.copymode(file, unfinished)
        unfinished.replace(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _refuse_unmovable(folder: Path) -> None:
    if os.path.ismount(folder):
        raise ValueError(f"{folder} is a mount point, which cannot be replaced; name a folder in it")
    if folder.exists() and Path.cwd().is_relative_to(folder):
        raise ValueError(f"{folder} would be replaced, but is or holds the working directory; name another folder")


def _put_back(folder: Path) -> None:
    """Gives a folder its place back whose writer ended between the two renames: the one that was renamed last."""
    left = []
    for path in _beside(folder, REPLACED, ANY_HOST):
        with contextlib.suppress(FileNotFoundError):
            left.append((path.stat().st_ctime_ns, path))
    for _, path in sorted(left, reverse=True):
        with _lock(path, wait=False) as is_mine:
            if is_mine and not folder.exists():
                path.rename(folder)


def _claimed(folder: Path, locks: contextlib.ExitStack) -> Path:
    """A new hidden folder, locked. Another writer may have swept it away before it was: then another one."""
    while True:
        staging = _hidden(folder, PARTIAL)
        staging.mkdir()
        locks.enter_context(_lock(staging, wait=True))
        if staging.exists():
            return staging


def _hidden(place: Path, what: str) -> Path:
    return place.with_name(f".{place.name}.{what}-{platform.node()}-{secrets.token_hex(4)}")


def _beside(place: Path, what: str, host: str) -> list[Path]:
    """What `_hidden` may have named; `host` is a pattern."""
    name = re.compile(rf"\.{re.escape(place.name)}\.{what}-{host}-[0-9a-f]{{8}}")
    found = place.parent.iterdir() if place.parent.is_dir() else ()
    return sorted(path for path in found if name.fullmatch(path.name))


@contextmanager
def _lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds a folder as long as this process lives; False where another one does, or where there are no locks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
