"""Packages unpacked without being installed."""

import pytest

from data_pipelines import debian


def test_an_unpacked_package_is_used_without_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    place = tmp_path / "packages" / "there"
    place.mkdir(parents=True)
    assert debian.unpack("there", tmp_path) == place


def test_no_apt_is_an_error_that_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"apt-get is not on this machine.*unpack the package into .*packages/flite"):
        debian.unpack("flite", tmp_path)


def test_a_failing_command_says_what_it_said(tmp_path):
    (tmp_path / "broken.deb").write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=r"dpkg-deb -x broken.deb tree` failed: .*broken.deb"):
        debian._run(["dpkg-deb", "-x", "broken.deb", "tree"], tmp_path)


def test_licences_are_kept_under_the_package_name(tmp_path):
    doc = tmp_path / "usr/share/doc/some-words"
    doc.mkdir(parents=True)
    with pytest.raises(ValueError, match="no copyright file"):
        debian.licence_files("some-words", tmp_path)
    (doc / "copyright").write_text("CC0")
    assert debian.licence_files("some-words", tmp_path) == {"licences/some-words.txt": b"CC0"}


@pytest.mark.slow
def test_a_package_is_downloaded_and_unpacked_once(tmp_path):
    tree = debian.unpack("asterisk-core-sounds-en", tmp_path)
    assert (tree / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz").is_file()
    assert [path.name for path in (tmp_path / "packages").iterdir()] == ["asterisk-core-sounds-en"]
    assert b"Allison Smith" in next(iter(debian.licence_files("x", tree).values()))


@pytest.mark.slow
def test_a_package_that_does_not_exist_is_an_error_after_fresh_lists(tmp_path):
    with pytest.raises(ValueError, match="Unable to locate package tml-no-such-package"):
        debian.unpack("tml-no-such-package", tmp_path)
    assert not list((tmp_path / "packages").iterdir())
