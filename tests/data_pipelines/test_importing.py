import json

import pytest

from data_pipelines.documents import read_document
from data_pipelines.importing import FailedFilesError, check_failures, import_documents
from data_pipelines.records import RecordSource


def test_texts_of_a_folder_become_documents_and_bad_files_are_listed(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("one text")
    (tmp_path / "in" / "deep" / "b.jsonl").write_text(
        json.dumps({"text": "two"}) + "\n" + json.dumps({"text": "three"})
    )
    (tmp_path / "in" / "latin.txt").write_bytes("\u00e9".encode("latin-1"))
    (tmp_path / "in" / "blank.txt").write_text(" ")
    with pytest.raises(FailedFilesError, match="2 of 4 files failed") as caught:
        import_documents(tmp_path / "in", tmp_path / "set", name="set")
    assert len(caught.value.failures) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    seen = []
    summary = import_documents(
        tmp_path / "in",
        tmp_path / "set",
        name="set",
        max_failed_fraction=0.5,
        progress=lambda done, total: seen.append((done, total)),
    )
    source = RecordSource(tmp_path / "set")
    assert [read_document(source, i).text for i in range(len(source))] == ["one text", "two", "three"]
    assert summary.records == 3
    assert seen[-1] == (4, 4)
    reasons = {failure.file.rsplit("/", 1)[1]: failure.reason for failure in summary.failures}
    assert "not UTF-8" in reasons["latin.txt"]
    assert "no text" in reasons["blank.txt"]


def test_the_fraction_that_may_fail(tmp_path):
    with pytest.raises(ValueError, match="max_failed_fraction = 1"):
        check_failures([], 3, 1.0)
    with pytest.raises(FailedFilesError, match="no files"):
        import_documents(tmp_path, tmp_path / "set", name="set")
