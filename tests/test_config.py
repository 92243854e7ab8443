"""The configuration: flags change it, mistakes are one clear line, and it survives JSON."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import app
from tml.config import (
    AttentionBackend,
    AttentionConfig,
    DataConfig,
    Experiment,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    Schedule,
    SourceConfig,
    TrainConfig,
    check_platform,
    config_hash,
    difference,
    from_config_dict,
    from_json,
    to_config_dict,
    to_json,
    to_mapping,
)

ROOT = Path(__file__).parents[1]
QUICKSTART = "--config=experiments/quickstart.py"


def experiment() -> Experiment:
    return Experiment(
        name="x",
        model=ModelConfig(num_layers=6, global_layers=(2, 5)),
        data=DataConfig(sources={"speech": SourceConfig(path="somewhere", weight=2.0)}),
        optim=OptimConfig(schedule=Schedule.WARMUP_COSINE),
    )


def test_a_config_dict_and_json_give_the_experiment_back():
    assert from_config_dict(to_config_dict(experiment())) == experiment()
    assert from_json(to_json(experiment())) == experiment()


def test_what_flags_change_arrives_in_the_dataclasses():
    config = to_config_dict(experiment())
    config.optim.peak_lr = 1e-4
    config.model.global_layers = (5,)
    config.data.sources.speech.weight = 3.0
    config.optim.schedule = "wsd"
    changed = from_config_dict(config)
    assert changed.optim.peak_lr == 1e-4
    assert changed.model.global_layers == (5,)
    assert changed.data.sources["speech"].weight == 3.0
    assert changed.optim.schedule is Schedule.WSD
    paths = [path for path, _, _ in difference(to_mapping(experiment()), to_mapping(changed))]
    assert paths == ["data.sources.speech.weight", "model.global_layers", "optim.peak_lr", "optim.schedule"]


def test_a_config_dict_takes_no_new_keys():
    config = to_config_dict(experiment())
    with pytest.raises(AttributeError):
        config.optim.peek_lr = 1.0


def test_the_hash_depends_on_every_value_and_on_nothing_else():
    assert config_hash(experiment()) == config_hash(from_json(to_json(experiment())))
    changed = dataclasses.replace(experiment(), seed=1)
    assert config_hash(changed) != config_hash(experiment())
    program = "from tests.test_config import *; print(config_hash(experiment()))"
    other = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == config_hash(experiment())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OptimConfig(peak_lr=0.0), r"optim.peak_lr = 0.0 must be greater than 0"),
        (lambda: OptimConfig(b2=1.5), r"optim.b2 = 1.5 must lie between 0 and 1"),
        (lambda: AttentionConfig(num_heads=6, num_kv_heads=4), r"num_heads = 6 is not a multiple .* = 4; .* is 8"),
        (lambda: ModelConfig(global_layers=(9,)), r"names layers \[9\].*gives layers 0 to 3"),
        (
            lambda: Experiment(name="x", mesh=MeshConfig(fsdp=3)),
            r"rows_per_batch = 8 is not a multiple of .* = 3; the nearest valid value is 9",
        ),
        (
            lambda: Experiment(name="x", train=TrainConfig(num_steps=10), optim=OptimConfig(warmup_steps=10)),
            r"warmup_steps = 10 leaves nothing of train.num_steps = 10",
        ),
        (lambda: LossConfig(heard_weight=float("inf")), r"loss.heard_weight = inf must be 0 or greater, and finite"),
        (
            lambda: Experiment(name="x", model=ModelConfig(row_parts=3)),
            r"rows_per_batch = 8 .* model.row_parts \(3\) = 3; .* is 9; or set model.row_parts = 1",
        ),
        (lambda: from_json('{"name": "x", "modle": {}}'), r"unknown key config.modle; did you mean model"),
        (
            lambda: from_json('{"name": "x", "optim": {"schedule": "wsdd"}}'),
            r"config.optim.schedule = 'wsdd' is not one of .*did you mean wsd\?",
        ),
        (lambda: from_json('{"name": 3}'), r"config.name = 3 is int, but must be str"),
        (lambda: from_json('{"name": "x", "seed": true}'), r"config.seed = True is bool, but must be int"),
        (lambda: from_json('{"name": "x", "data": {"sources": 4}}'), r"config.data.sources = 4 must be a group"),
        (lambda: from_json('{"seed": 1}'), r"config lacks name, which Experiment needs"),
        (lambda: from_json("seed"), r"Expecting value"),
    ],
)
def test_impossible_values_are_refused_with_both_values(build, message: str):
    with pytest.raises(ValueError, match=message):
        build()


def launch(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing; name an experiment, as in --config=experiments/quickstart.py"),
        (
            ["--config=experimnts/quickstart.py"],
            "there is no config file experimnts/quickstart.py; did you mean experiments/quickstart.py",
        ),
        ([QUICKSTART, "--config.optim.peek_lr=1"], "unknown key config.optim.peek_lr; did you mean peak_lr"),
        ([QUICKSTART, "--config.num_layers=3"], "unknown key config.num_layers; did you mean config.model.num_layers?"),
        ([QUICKSTART, "--config.train.num_steps=1.5"], "config.train.num_steps = '1.5' is not a whole number"),
        ([QUICKSTART, "--config.optim.peak_lr=fast"], "config.optim.peak_lr = 'fast' is not a number"),
        ([QUICKSTART, "--config.turn.turn_ms=130"], "turn.turn_ms = 130 is not a multiple of the audio hop, 50 ms"),
        ([QUICKSTART, "--config.data.sources.other.weight=1"], "names 'other'; only the config file can add"),
        ([QUICKSTART, "--config.data.sources.request.weight=1"], "names 'request'; did you mean \"requests\"?"),
        ([QUICKSTART, "--config.train.num_steps.x=1"], "config.train.num_steps is a single value"),
        ([QUICKSTART, "--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
        ([QUICKSTART, "more"], "unknown arguments ['more']"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_code_2(arguments: list[str], message: str):
    code, out, err = launch(*arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_misspelt_config_file_proposes_every_config_once():
    code, _, err = launch("--config=experiments/quikstart.py")
    assert code == 2
    assert "there is no config file experiments/quikstart.py; did you mean experiments/quickstart.py" in err
    proposed = re.findall(r"\S+\.py", err.partition("did you mean")[2])
    assert len(proposed) == len(set(proposed))
    assert "__init__" not in err


def test_where_no_config_is_known_none_is_proposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    missing = OSError("Attempted ['x']:\n  absent/x.py\n    [Errno 2] No such file or directory: 'absent/x.py'")
    assert app._readable(missing) == "there is no config file absent/x.py"


def test_a_run_folder_keeps_its_model_and_data(tmp_path: Path):
    same = [QUICKSTART, f"--workdir={tmp_path}", "--config.text.tokenizer=nowhere", "--config.optim.warmup_steps=10"]
    code, out, err = launch(*same, "--config.train.num_steps=1000", "--config.model.dense_dim=96")
    assert code == 1
    assert "error: nowhere: there is no such tokenizer" in err
    assert err.count("\n") == 1
    assert '"dense_dim": 96' in out
    assert not (tmp_path / "config.json").exists(), "a command that is refused writes nothing"
    text, _, line = out.rpartition("config ")
    written = from_json(text)
    assert line == f"{config_hash(written)}, run folder {tmp_path}\n"
    assert (written.text.tokenizer, written.train.num_steps) == ("nowhere", 1000)
    (tmp_path / "config.json").write_text(text)

    code, _, err = launch(*same, "--config.model.dense_dim=64")
    assert code == 1
    assert f"{tmp_path} belongs to another run: model.dense_dim was 96, is 64; choose another --workdir" in err
    assert err.count("\n") == 1
    free = ("train.num_steps=1234", "model.row_parts=1", "model.remat=layer", "model.moe.block_rows=64")
    code, _, err = launch(*same, "--config.model.dense_dim=96", *(f"--config.{change}" for change in free))
    assert "error: nowhere: there is no such tokenizer" in err, "the number of steps, and ways to the same, may change"
    assert (tmp_path / "config.json").read_text() == text

    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    code, _, err = launch(*same, "--config.model.dense_dim=96", "--config.train.init_from=elsewhere")
    assert code == 1
    assert "train.init_from was '', is 'elsewhere', but" in err
    assert "goes on from its own checkpoint" in err
    (tmp_path / "config.json").write_text(text.replace('"init_from": ""', '"init_from": "elsewhere"'))
    for origin in ("", "elsewhere", str(ROOT / "elsewhere")):
        _, _, err = launch(*same, "--config.model.dense_dim=96", f"--config.train.init_from={origin}")
        assert "error: nowhere: there is no such tokenizer" in err, "where it began, by any name, or left out"


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_kernel_for_another_platform_is_refused(platform: str) -> None:
    model = ModelConfig(attention=AttentionConfig(backend=AttentionBackend.GPU))
    with pytest.raises(
        ValueError, match=rf"model.attention.backend = 'gpu' runs on gpu, but the devices are {platform}"
    ):
        check_platform(model, platform)
    check_platform(model, "cuda")
