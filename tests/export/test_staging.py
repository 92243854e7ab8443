"""An export takes the place of an untouched export of its kind, and of nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tml.export.staging import MARKER, Kind, whole_folder


class OtherError(ValueError):
    """Told from what Python itself raises."""


def export(folder: Path, text: str = "new", kind: Kind = Kind.HF) -> None:
    with whole_folder(folder, kind, OtherError) as staging:
        (staging / "vocoder").mkdir()
        for name in ("model.safetensors.index.json", "vocoder/step.stablehlo"):
            (staging / name).write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    export(tmp_path / "out", "old")
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_an_export_names_its_files(folder: Path) -> None:
    assert json.loads((folder / MARKER).read_text()) == {
        "format": 1,
        "kind": "hf",
        "files": ["model.safetensors.index.json", "vocoder/step.stablehlo"],
    }


def test_an_untouched_export_is_replaced(folder: Path) -> None:
    (folder / "empty").mkdir()
    for _ in range(2):
        export(folder)
        assert (folder / "vocoder" / "step.stablehlo").read_text() == "new"
        assert sorted(path.name for path in folder.iterdir()) == [
            "model.safetensors.index.json",
            MARKER,
            "vocoder",
        ]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(tmp_path / "out")
    assert (tmp_path / "out" / MARKER).is_file()


def add(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("mine")

    return change


def mark(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / MARKER).write_text(json.dumps(json.loads((folder / MARKER).read_text()) | changes))

    return change


REFUSED = [
    (lambda d: (d / MARKER).unlink(), rf"holds files, but no {MARKER}, so it is no export of tml, or one of an older"),
    (add("notes.md"), r"holds notes\.md, which no export of tml wrote"),
    (add(".git/HEAD"), r"holds \.git/HEAD, which"),
    (add("vocoder/mine.json"), r"holds vocoder/mine\.json, which"),
    (add("a", "b", "c", "d", "e"), "holds a, b, c and 2 more, which"),
    (lambda d: (d / "link").symlink_to(d.parent), "holds link, which"),
    (mark(kind="bundle"), "is an export of kind bundle, not hf"),
    (mark(format=2), rf"{MARKER} cannot be read \(.*format 2, this code reads 1"),
    (mark(files=None), rf"{MARKER} cannot be read \("),
    (lambda d: (d / MARKER).write_text("[]"), rf"{MARKER} cannot be read \("),
    (lambda d: (d / MARKER).write_text("{"), rf"{MARKER} cannot be read \("),
]


@pytest.mark.parametrize(
    ("change", "message"),
    REFUSED,
    ids=["no marker", "added", "git", "deep", "many", "link", "kind", "format", "files", "list", "json"],
)
def test_anything_else_is_refused_and_stays(change: Callable[[Path], None], message: str, folder: Path) -> None:
    change(folder)
    before = contents(folder)
    with pytest.raises(OtherError, match=rf"{message}.*; name another --out, or empty this folder"):
        export(folder)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_what_is_put_there_while_it_is_written_stays(folder: Path) -> None:
    with pytest.raises(OtherError, match=r"holds notes\.md"), whole_folder(folder, Kind.HF, OtherError):
        add("notes.md")(folder)
    assert (folder / "notes.md").read_text() == "mine"
    assert (folder / "vocoder" / "step.stablehlo").read_text() == "old"
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
