"""Debian packages as a source of data: downloaded and unpacked into a folder, never installed."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

_TIMEOUT_S = 900


def unpack(package: str, cache: Path | str) -> Path:
    """Downloads a package and unpacks it to `cache`/packages/`package`, unless that is there already.

    The system's package lists are used; if the download fails with them (there are none, or they are
    old), fresh lists are fetched into the cache. Nothing outside the cache changes, and no rights are needed.

    Returns:
        The root of the unpacked tree.

    Raises:
        ValueError: this is not a Debian system, or apt cannot download the package.
    """
    cache = Path(cache).absolute()
    place = cache / "packages" / package
    if place.is_dir():
        return place
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise ValueError(
                f"{tool} is not on this machine; {package} comes from Debian: prepare it on Debian or Ubuntu, "
                f"or unpack the package into {place} yourself"
            )
    work = cache / "packages" / f".{package}.partial-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        archive = _download(package, cache, work)
        _run(["dpkg-deb", "-x", str(archive), str(work / "tree")], work)
        (work / "tree").rename(place)
    except OSError:
        # Another process was faster.
        if not place.is_dir():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return place


def licence_files(package: str, tree: Path) -> dict[str, bytes]:
    """The copyright files of an unpacked package by the name to keep them under.

    Raises:
        ValueError: the package has none.
    """
    files = sorted((tree / "usr" / "share" / "doc").glob("*/copyright"))
    if not files:
        raise ValueError(f"{package} in {tree} has no copyright file, so its data cannot be passed on")
    return {f"licences/{path.parent.name}.txt": path.read_bytes() for path in files}


def _download(package: str, cache: Path, work: Path) -> Path:
    """The .deb file, with the system's package lists or else with lists of our own."""
    try:
        _run(["apt-get", *_sandbox(), "download", package], work)
    except ValueError:
        own = _own_lists(cache)
        _run(["apt-get", *own, *_sandbox(), "update"], work)
        _run(["apt-get", *own, *_sandbox(), "download", package], work)
    (archive,) = work.glob("*.deb")
    return archive


def _sandbox() -> list[str]:
    # As root, apt would download as another user, who cannot write into the cache.
    return ["-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=2"]


def _own_lists(cache: Path) -> list[str]:
    lists, archives = cache / "apt" / "lists", cache / "apt" / "cache"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    (archives / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    return ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={archives}", "-o", "Debug::NoLocking=true"]


def _run(command: Sequence[str], directory: Path) -> None:
    """Runs a command; what it wrote is in the error if it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"`{' '.join(command)}` took longer than {_TIMEOUT_S} s") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        raise ValueError(f"`{' '.join(command)}` failed: {' '.join(said) or f'code {done.returncode}'}")


_PACKAGES_OF_LIBRARIES = {
    "libestbase": "libestools{version}",
    "libeststring": "libestools{version}",
    "libpulse-simple": "libpulse{version}",
    "libvorbis": "libvorbis{version}a",
}
"""Libraries whose package is not named after them, as Debian does otherwise."""


def library_directories(files: Sequence[Path], cache: Path | str) -> list[Path]:
    """Folders with the shared libraries that `files` need and this system lacks, unpacked from Debian.

    Args:
        files: programs or libraries from unpacked packages; their own folders come first in the result.
        cache: where packages are unpacked.

    Raises:
        ValueError: a library cannot be had.
    """
    cache = Path(cache).absolute()
    folders = list(dict.fromkeys(path.parent for path in files))
    asked: set[str] = set()
    while missing := _missing_libraries([*files, *(f for d in folders for f in d.glob("lib*.so*"))], folders):
        wanted = {package_of_library(name) for name in missing} - asked
        if not wanted:
            raise ValueError(f"{files[0].name} needs {', '.join(sorted(missing))}, which {sorted(asked)} do not hold")
        for package in sorted(wanted):
            tree = _unpack_library(package, cache)
            folders += sorted({path.parent for path in tree.rglob("lib*.so*") if path.parent not in folders})
        asked |= wanted
    return folders


def package_of_library(soname: str) -> str:
    """The package of a shared library by Debian's rule: `libfoo.so.2` is in `libfoo2`, `libmp3.so.2` in `libmp3-2`."""
    stem, _, version = soname.partition(".so.")
    if stem in _PACKAGES_OF_LIBRARIES:
        return _PACKAGES_OF_LIBRARIES[stem].format(version=version)
    return f"{stem}{'-' if stem[-1].isdigit() else ''}{version}".lower()


def _unpack_library(package: str, cache: Path) -> Path:
    try:
        return unpack(package, cache)
    except ValueError as error:
        # Since 2024 libraries built with 64-bit time have this suffix.
        try:
            return unpack(f"{package}t64", cache)
        except ValueError:
            raise error from None


def _missing_libraries(files: Sequence[Path], folders: Sequence[Path]) -> set[str]:
    path = ":".join(str(folder) for folder in folders)
    done = subprocess.run(
        ["ldd", *map(str, files)], capture_output=True, text=True, env={**os.environ, "LD_LIBRARY_PATH": path}
    )
    return {line.split()[0] for line in done.stdout.splitlines() if line.rstrip().endswith("not found")}
