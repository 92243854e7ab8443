"""What somebody else put into a folder that is about to be replaced."""

from collections.abc import Callable
from pathlib import Path

MAX_NAMED = 3
"""So many files are named."""


def files_of(folder: Path) -> list[str]:
    """Relative paths of everything in a folder but folders; a link to a folder counts."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def foreign_files(folder: Path, is_own: Callable[[str], object]) -> str:
    """Names the first few files whose relative paths are not the owner's, for an error; empty if there are none."""
    foreign = [name for name in files_of(folder) if not is_own(name)]
    more = f" and {len(foreign) - MAX_NAMED} more" if len(foreign) > MAX_NAMED else ""
    return ", ".join(foreign[:MAX_NAMED]) + more
