"""The apps that prepare speech: exit codes, one-line errors, and what they write."""

import json
import subprocess
import sys

import pytest

from data_pipelines.records import iter_sessions, read_manifest


def run(module: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", f"launch.{module}", *flags], capture_output=True, text=True)


def test_synthesize_writes_a_data_set_and_does_not_write_over_it(tmp_path):
    flags = (f"--out={tmp_path}/set", "--task=dialogue", "--num_sessions=2", "--num_workers=1", "--augment=channel")
    done = run("synthesize", *flags)
    assert done.returncode == 0, done.stderr
    assert "2 sessions" in done.stdout
    manifest = read_manifest(tmp_path / "set")
    assert manifest.name == "set"
    assert manifest.meta["task"] == "dialogue"
    assert manifest.meta["augment"] == "channel"
    assert "licence" in manifest.meta
    assert len(list(iter_sessions(tmp_path / "set"))) == 2
    again = run("synthesize", *flags)
    assert again.returncode == 1
    assert again.stderr.count("\n") == 1
    assert "exists and is not empty" in again.stderr


def test_a_mixture_of_behaviours_is_made_by_the_hour(tmp_path):
    flags = (f"--out={tmp_path}/set", "--task=duplex", "--hours=0.02", "--shares=tone:0,counting:9", "--split=heldout")
    done = run("synthesize", *flags, "--held_out=voice,time")
    assert done.returncode == 0, done.stderr
    sessions = list(iter_sessions(tmp_path / "set"))
    assert sum(session.duration_s for session in sessions) == pytest.approx(72, rel=0.3)
    assert {session.meta["held_out"] for session in sessions} == {"time voice"}
    settings = json.loads(read_manifest(tmp_path / "set").meta["settings"])
    assert settings["shares"]["counting"] == 9.0
    assert settings["shares"]["tone"] == 0.0


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("synthesize", ("--task=requests",), "--out names the directory"),
        ("synthesize", ("--out=x", "--voices=piper"), "must name some of espeak, flite, festival"),
        ("synthesize", ("--out=x", "--voices=flite", "--split=heldout"), "none in split heldout"),
        ("synthesize", ("--out=x", "--task=tone", "--shares=tone:1"), "--shares goes with --task=duplex"),
        ("synthesize", ("--out=x", "--task=duplex", "--shares=tones:1"), "--shares has 'tones:1'; write NAME:NUMBER"),
        ("synthesize", ("--out=x", "--task=duplex", "--held_out=voices"), "must name some of voice, wording"),
        ("synthesize", ("--out=x", "--task=cued", "--turn_ms=400"), "turn_ms = 400 must be at most 200 for behaviours"),
        ("synthesize", ("--out=x", "--hours=1", "--num_sessions=3"), "leave one out"),
        ("synthesize", ("--out=x", "--human=0.5"), "go with the behaviours"),
        ("prompts", (), "--out names the directory"),
    ],
)
def test_bad_flags_are_one_line_and_a_non_zero_exit(module, flags, message):
    done = run(module, *flags)
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr


@pytest.mark.parametrize("module", ["synthesize", "prompts"])
def test_help_names_every_flag(module):
    done = run(module, "--help")
    assert done.returncode == 0
    assert "--out" in done.stdout
    assert "--seed" in done.stdout


@pytest.mark.slow
def test_prompts_prepares_the_human_sets_with_their_licences(tmp_path):
    flags = (f"--out={tmp_path}/human", f"--cache={tmp_path}/cache", "--num_silence=20", "--num_silence_heldout=10")
    done = run("prompts", *flags, "--num_digits=20")
    assert done.returncode == 0, done.stderr
    assert "digits: 20 sessions" in done.stdout
    for name, count in (("digits", 20), ("silence-train", 20), ("silence-heldout", 10)):
        manifest = read_manifest(tmp_path / "human" / name)
        assert manifest.num_records == count
        assert "CC-BY" in manifest.meta["licence"]
        assert list((tmp_path / "human" / name / "licences").glob("asterisk-core-sounds-*.txt"))
