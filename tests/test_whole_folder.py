"""What is written whole takes the place of what it may replace, and of nothing else."""

import json
import os
import platform
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tml.whole_folder import MARKER, Kind, put_in_place, staged, whole_folder, write_whole


class OtherError(ValueError):
    """Told from what Python itself raises."""


def replaced(folder: Path, number: str, host: str = platform.node()) -> Path:
    return folder.with_name(f".{folder.name}.replaced-{host}-{number}")


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


@pytest.mark.parametrize("name", ["out", "out[1]", "o*", "out.partial"])
def test_only_what_dead_writers_left_of_this_very_folder_is_removed(tmp_path: Path, name: str) -> None:
    host = platform.node()
    kept = [
        *(f".{name}.{end}" for end in ("old", "new", "partial-mine", f"partial-other-{host}-0123abcd")),
        f".{name}-1.partial-{host}-0123abcd",
        ".out.partial-é",
    ]
    export(tmp_path / name)
    for neighbour in (*kept, f".{name}.partial-{host}-0123abcd", f".{name}.replaced-{host}-0123abcd"):
        add("precious")(tmp_path / neighbour)
    export(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, name])


def test_writers_at_once_do_not_mix(tmp_path: Path) -> None:
    with staged(tmp_path / "out", lambda: None) as one, staged(tmp_path / "out", lambda: None) as other:
        for staging in (one, other):
            add("first", "second")(staging)
            (staging / "of").write_text(staging.name)
        put_in_place(one, tmp_path / "out")
        put_in_place(other, tmp_path / "out")
    assert contents(tmp_path / "out") == {"first": "mine", "second": "mine", "of": other.name}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("is_good", [True, False])
def test_a_folder_whose_writer_ended_between_the_renames_comes_back(folder: Path, is_good: bool) -> None:
    if not is_good:
        add("notes.md")(folder)
    before = contents(folder)
    add("half")(replaced(folder, "89abcdef"))  # an earlier one, whose removal was not finished
    os.utime(folder)  # so that its own is the last that was renamed
    folder.rename(replaced(folder, "0123abcd", "another-host"))
    with pytest.raises(KeyboardInterrupt if is_good else OtherError), whole_folder(folder, Kind.HF, OtherError):
        raise KeyboardInterrupt
    assert contents(folder) == before
    if is_good:
        assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_what_was_put_aside_stays_where_the_place_is_refused(folder: Path) -> None:
    folder.rename(replaced(folder, "0123abcd"))
    add("notes.md")(folder)
    with pytest.raises(OtherError, match=f"holds files, but no {MARKER}"):
        export(folder)
    assert contents(replaced(folder, "0123abcd"))["vocoder/step.stablehlo"] == "old"


def test_what_a_live_writer_put_aside_is_not_put_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def beside_another(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            with staged(folder, lambda: None):
                assert not folder.exists()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", beside_another)
    export(folder)
    assert contents(folder)["vocoder/step.stablehlo"] == "new"
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_a_place_that_cannot_be_taken_gets_back_what_stood_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = contents(folder), Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(folder)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_the_place_keeps_its_permissions(folder: Path) -> None:
    folder.chmod(0o2770)
    export(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o2770


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "report.json", "é")
    assert (tmp_path / "report.json").read_bytes() == "é".encode()

    def fails(path: Path, target: Path) -> None:
        raise OSError("no room")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="no room"):
        write_whole(tmp_path / "report.json", "other")
    assert contents(tmp_path) == {"report.json": "é"}


def test_a_file_keeps_its_mode_and_a_link_or_device_is_written_to(tmp_path: Path) -> None:
    file, link = tmp_path / "report.json", tmp_path / "link"
    write_whole(file, "old")
    file.chmod(0o600)
    write_whole(file, "new")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    link.symlink_to(file)
    write_whole(link, "newer")
    write_whole(Path("/dev/null"), "nothing")
    assert link.is_symlink()
    assert file.read_text() == "newer"
    assert not Path("/dev/null").is_file()


def test_a_link_is_followed(folder: Path) -> None:
    link = folder.with_name("link")
    link.symlink_to(folder)
    for text in ("new", "newer"):
        export(link, text)
        assert link.is_symlink()
        assert contents(folder)["vocoder/step.stablehlo"] == text


def test_what_cannot_be_replaced_is_said_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"/proc is a mount point, which cannot be replaced; name a folder in it"):
        export(Path("/proc"))
    monkeypatch.chdir(folder / "vocoder")
    for name in (".", ".."):
        with pytest.raises(ValueError, match=r"out.* would be replaced, but is or holds the working directory"):
            export(Path(name))
    assert contents(folder)["vocoder/step.stablehlo"] == "old"
