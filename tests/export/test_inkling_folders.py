"""Folders of Inkling in and out: the same bytes come back, `transformers` loads them, what does not fit is refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from inkling_oracle import drawn_folder, inkling_model, inputs_of, oracle_logits, oracle_of
from small_disk import small_disk
from transformers import InklingForConditionalGeneration

from tml import checkpoint
from tml.checkpoint import CheckpointError
from tml.config import AttentionConfig, ModelConfig, MtpChain, MtpConfig, VideoConfig
from tml.export import inkling_import, inkling_layout
from tml.export.bundle import by_path
from tml.export.inkling_export import StoredAs, export_folder
from tml.export.inkling_import import import_folder
from tml.export.tensor_folder import INDEX, SINGLE
from tml.microturn import Kind
from tml.whole_folder import MARKER

MODEL = inkling_model()


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors.numpy.load_file(file)
    return found


def assert_same_bytes(left: Path, right: Path) -> None:
    ours, theirs = tensors_in(left), tensors_in(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape), name
        assert ours[name].tobytes() == theirs[name].tobytes(), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network as `transformers` saves it, in shards."""
    folder = tmp_path_factory.mktemp("saved")
    oracle_of(MODEL).save_pretrained(folder, max_shard_size="60KB")
    assert (folder / INDEX).is_file()
    return folder


@pytest.fixture(scope="module")
def imported(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("imported") / "run"
    import_folder(saved, workdir)
    return workdir


def test_what_is_exported_is_what_was_imported(saved: Path, imported: Path, tmp_path: Path) -> None:
    export_folder(imported, tmp_path / "out", max_shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert_same_bytes(saved, tmp_path / "out")
    before, after = (InklingForConditionalGeneration.from_pretrained(folder) for folder in (saved, tmp_path / "out"))
    batch = inputs_of(MODEL, (Kind.TOKEN, Kind.AUDIO, Kind.TILE))
    with torch.no_grad():
        assert torch.equal(oracle_logits(before.eval(), batch), oracle_logits(after.eval(), batch))


@pytest.mark.parametrize(
    "model",
    [
        inkling_model(num_dense_layers=0, global_layers=()),
        inkling_model(num_dense_layers=5, global_layers=tuple(range(5))),
        inkling_model(unpadded_vocab_size=0, attention=AttentionConfig(log_scaling_rate=0.0), video=VideoConfig()),
    ],
    ids=[
        "sparse and sliding",
        "dense and global",
        "no eyes, no padding, no log-length scaling",
    ],
)
def test_other_shapes_come_back_too(model: ModelConfig, tmp_path: Path) -> None:
    folder = drawn_folder(model, tmp_path / "in")
    import_folder(folder, tmp_path / "run")
    export_folder(tmp_path / "run", tmp_path / "out")
    assert_same_bytes(folder, tmp_path / "out")


@pytest.mark.parametrize("chain", list(MtpChain))
def test_multi_token_prediction_comes_back_too(chain: MtpChain, tmp_path: Path) -> None:
    """The names and shapes are written here by hand, as published (backbone.md, 20 tensors a block)."""
    model = inkling_model(mtp=MtpConfig(num_blocks=2, global_blocks=(1,), chain=chain))
    folder = drawn_folder(model, tmp_path / "in")
    d, ffn = model.d_model, model.dense_dim
    layer = {
        "attn.wq_du.weight": (32, d), "attn.wk_dv.weight": (16, d), "attn.wv_dv.weight": (16, d),
        "attn.wr_du.weight": (16, d), "attn.wo_ud.weight": (d, 32), "attn.q_norm.weight": (8,),
        "attn.k_norm.weight": (8,), "attn.k_sconv.weight": (16, 1, 4), "attn.v_sconv.weight": (16, 1, 4),
        "attn_norm.weight": (d,), "attn_sconv.weight": (d, 1, 4), "mlp_norm.weight": (d,),
        "mlp_sconv.weight": (d, 1, 4), "mlp.w13_dn.weight": (2 * ffn, d), "mlp.w2_md.weight": (d, ffn),
        "mlp.global_scale": (1,),
    }  # fmt: skip
    wanted = {"chain_norm.weight": (d,)} if chain is MtpChain.NORMED else {}
    for number, extent in enumerate((model.attention.window, model.attention.global_extent)):
        block = f"layers.{number}."
        wanted |= {f"{block}{name}.weight": (d,) for name in ("hidden_norm", "embed_norm")}
        wanted |= {f"{block}input_proj.weight": (d, 2 * d)}
        wanted |= {f"{block}transformer_block.{name}": shape for name, shape in layer.items()}
        wanted |= {f"{block}transformer_block.attn.rel_logits_proj.proj": (4, extent)}
    found = {name: values.shape for name, values in tensors_in(folder).items()}
    prefix = "model.mtp."
    assert {name.removeprefix(prefix): found[name] for name in found if name.startswith(prefix)} == wanted
    assert import_folder(folder, tmp_path / "run").model.mtp == model.mtp
    export_folder(tmp_path / "run", tmp_path / "out")
    assert_same_bytes(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mtp_config"] == {
        "num_nextn_predict_layers": 2,
        "local_layer_ids": [0],
        "chain_hidden_post_norm": chain is MtpChain.NORMED,
    }


def test_tensors_and_config_must_agree_about_multi_token_prediction(tmp_path: Path) -> None:
    with_blocks, without = (
        drawn_folder(inkling_model(mtp=mtp), tmp_path / name)
        for name, mtp in (("with", MtpConfig(num_blocks=1)), ("without", MtpConfig()))
    )
    configs = [(folder / "config.json").read_text() for folder in (with_blocks, without)]
    for folder, config in zip((with_blocks, without), reversed(configs), strict=True):
        (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"holds model.mtp.chain_norm.weight \(16,\), which its config.json does not"):
        import_folder(with_blocks, tmp_path / "run")
    missing = r"model.mtp.chain_norm.weight has shape none: .*; a checkpoint without .* num_nextn_predict_layers = 0"
    with pytest.raises(ValueError, match=missing):
        import_folder(without, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_tensor_keeps_the_dtype_it_had(tmp_path: Path) -> None:
    names = inkling_layout.names(MODEL)
    half = {name: np.dtype(ml_dtypes.bfloat16) for name in names if not name.endswith(("sconv.weight", ".bias"))}
    folder = drawn_folder(MODEL, tmp_path / "in", half | {names[0]: np.dtype(np.float16)})
    import_folder(folder, tmp_path / "run")
    export_folder(tmp_path / "run", tmp_path / "out")
    assert_same_bytes(folder, tmp_path / "out")


def test_other_dtypes_can_be_asked_for(saved: Path, imported: Path, tmp_path: Path) -> None:
    export_folder(imported, tmp_path / "out", stored_as=StoredAs.BFLOAT16)
    before = tensors_in(saved)
    for name, values in tensors_in(tmp_path / "out").items():
        is_exact = name.endswith(("sconv.weight", "mlp.gate.bias", "mlp.gate.global_scale"))
        assert values.dtype == (np.float32 if is_exact else ml_dtypes.bfloat16), name
        np.testing.assert_array_equal(values, before[name].astype(values.dtype))


def stated_dtypes(folder: Path) -> dict[str, str]:
    """What config.json says that tensors are stored in, at its top and in its sections."""
    config = json.loads((folder / "config.json").read_text())
    groups = {"": config, **{f"{name}.": group for name, group in config.items() if isinstance(group, dict)}}
    keys = ("dtype", "torch_dtype")
    return {f"{name}{key}": group[key] for name, group in groups.items() for key in keys if key in group}


@pytest.mark.parametrize(
    "stated",
    [(), ("dtype",), ("torch_dtype", "text_config.torch_dtype", "audio_config.dtype"), ("vision_config.torch_dtype",)],
)
def test_config_json_names_the_dtype_that_is_stored(stated: tuple[str, ...], tmp_path: Path) -> None:
    half = dict.fromkeys(inkling_layout.names(MODEL), np.dtype(ml_dtypes.bfloat16))
    folder = drawn_folder(MODEL, tmp_path / "in", half)
    config = json.loads((folder / "config.json").read_text())
    for path in stated:
        group, _, key = path.rpartition(".")
        (config[group] if group else config)[key] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    import_folder(folder, tmp_path / "run")
    for stored_as in StoredAs:
        export_folder(tmp_path / "run", tmp_path / "out", stored_as=stored_as)
        found = stated_dtypes(tmp_path / "out")
        if stored_as is StoredAs.AS_IMPORTED:
            assert found == dict.fromkeys(stated, "bfloat16")
        else:
            top = set() if {"dtype", "torch_dtype"} & set(stated) else {"dtype"}
            assert found == dict.fromkeys({*stated, *top}, stored_as.value)


def test_text_files_beside_the_weights_are_carried_along(tmp_path: Path) -> None:
    folder = drawn_folder(MODEL, tmp_path / "in")
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text(name)
    (folder / "modeling.py").write_text("raise SystemExit")
    experiment = import_folder(folder, tmp_path / "run")
    assert Path(experiment.text.tokenizer).read_text() == "tokenizer.json"
    export_folder(tmp_path / "run", tmp_path / "out")
    kept = {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"}
    assert kept == {"tokenizer.json", "chat_template.jinja", "config.json", INDEX, MARKER}
    assert set(json.loads((tmp_path / "out" / MARKER).read_text())["files"]) > kept - {MARKER}
    import_folder(tmp_path / "out", tmp_path / "again")
    export_folder(tmp_path / "again", tmp_path / "out2")
    for name in kept:
        assert (tmp_path / "out2" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_an_import_is_a_checkpoint_like_any_other(saved: Path, imported: Path) -> None:
    experiment, params = checkpoint.restore(imported)
    assert replace(experiment.model, moe=MODEL.moe) == MODEL
    found = by_path(params, experiment)
    theirs = tensors_in(saved)["model.llm.layers.2.mlp.experts.w2_weight"]
    np.testing.assert_array_equal(found["stages/1/1/mlp/down"][0], theirs.swapaxes(1, 2))


def test_the_same_import_again_changes_nothing(saved: Path, imported: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in imported.rglob("*")}
    import_folder(saved, imported)
    assert {path: path.stat().st_mtime_ns for path in imported.rglob("*")} == before
    with pytest.raises(CheckpointError, match="holds a checkpoint of step 0 already; name another --workdir"):
        import_folder(drawn_folder(MODEL, tmp_path / "other"), imported)
    with pytest.raises(CheckpointError, match="max_tiles_per_turn was 1, is 2; name another --workdir"):
        import_folder(saved, imported, max_tiles_per_turn=2)
    assert {path: path.stat().st_mtime_ns for path in imported.rglob("*")} == before


def test_a_damaged_checkpoint_is_not_exported(imported: Path, tmp_path: Path) -> None:
    run = shutil.copytree(imported, tmp_path / "run")
    file = max((run / "checkpoints" / "0" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"checkpoint .*/run/checkpoints/0 is damaged \("):
        export_folder(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def without(folder: Path, name: str) -> None:
    tensors = tensors_in(folder)
    del tensors[name]
    safetensors.numpy.save_file(tensors, folder / SINGLE)


def added(folder: Path, name: str, values: np.ndarray) -> None:
    safetensors.numpy.save_file({**tensors_in(folder), name: values}, folder / SINGLE)


def indexed(folder: Path, file: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.llm.norm.weight": file}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: without(d, "model.llm.norm.weight"), r"norm.weight has shape none: it is missing, .* \(16,\)"),
        (lambda d: added(d, "model.llm.norm.weight", np.ones(3, np.float32)), r"shape \(3,\), .* asks for \(16,\)"),
        (lambda d: added(d, "lm_head.weight", np.ones(3, np.float32)), r"holds lm_head.weight \(3,\), which its"),
        (lambda d: added(d, "model.llm.norm.weight", np.ones(16, np.uint8)), "norm.weight is stored in U8, can be"),
        (lambda d: (d / SINGLE).rename(d / "pytorch_model.bin"), "only config.json, pytorch_model.bin; .*pickles"),
        (lambda d: (d / SINGLE).write_bytes(b"{}"), "model.safetensors is damaged"),
        (lambda d: indexed(d, "../secret.safetensors"), "names '../secret.safetensors', which is no safetensors file"),
        (lambda d: indexed(d, "gone.safetensors"), "gone.safetensors is missing, but .* names it"),
        (lambda d: (d / INDEX).write_text("[]"), "is no index of shards"),
        (lambda d: (d / "config.json").unlink(), "config.json is missing"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
    ],
    ids=["missing", "shape", "unknown", "dtype", "pickle", "damaged", "escape", "shard", "index", "config", "json"],
)
def test_what_does_not_fit_is_refused_and_nothing_is_made(change, message: str, tmp_path: Path) -> None:
    folder = drawn_folder(MODEL, tmp_path / "in")
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        import_folder(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_export_writes_over_nothing_else(imported: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(ValueError, match=r"holds files, but no tml_export.json, .*; name another --out"):
        export_folder(imported, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["letter.txt"], r"holds letter.txt, and no inkling/stored.json, so no import began there; name another"),
        (["config.json"], "holds config.json, and no inkling/stored.json"),
        (["inkling/checkpoints/8/manifest"], "holds inkling/checkpoints/8/manifest, and no inkling/stored.json"),
        (
            ["inkling/stored.json", "inkling/model.safetensors"],
            "holds inkling/model.safetensors, which no import",
        ),
        (["inkling/stored.json", "config.json", "data.json"], "holds data.json, which no import writes"),
    ],
)
def test_an_import_begins_in_no_folder_of_others(names: list[str], message: str, saved: Path, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("dear reader")
    with pytest.raises(CheckpointError, match=message):
        import_folder(saved, tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {*names}
    assert all((tmp_path / name).read_text() == "dear reader" for name in names)


def test_a_download_is_not_imported_over_itself(saved: Path, tmp_path: Path) -> None:
    download = shutil.copytree(saved, tmp_path / "inkling")
    for workdir in (tmp_path, download):
        with pytest.raises(CheckpointError, match=r"and no inkling/stored.json, so no import began there"):
            import_folder(download, workdir)
    assert_same_bytes(saved, download)


def test_the_download_that_a_run_came_from_is_not_written_over(saved: Path, imported: Path, tmp_path: Path) -> None:
    download = shutil.copytree(saved, tmp_path / "download")
    (download / "README.md").write_text("of others")
    with pytest.raises(ValueError, match=r"no export of tml, or one of an older version; name another --out"):
        export_folder(imported, download)
    assert (download / "README.md").read_text() == "of others"
    assert_same_bytes(saved, download)


def test_a_full_disk_is_no_traceback(imported: Path, tmp_path: Path) -> None:
    with small_disk(20_000), pytest.raises(OSError, match=r"model-00001-of-.* cannot be written \(.*File too large"):
        export_folder(imported, tmp_path / "out", max_shard_bytes=40_000)
    assert not list(tmp_path.iterdir())


def program(name: str, *arguments: Path | str) -> str:
    """The output of a program beside this file."""
    command = [sys.executable, str(Path(__file__).with_name(name)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_memory_holds_less_than_three_expert_stacks(saved: Path, tmp_path: Path) -> None:
    model = replace(
        inkling_model(num_layers=9, num_dense_layers=1, global_layers=(), d_model=64),
        moe=replace(MODEL.moe, num_experts=64, expert_dim=512),
    )
    folder = drawn_folder(model, tmp_path / "in")
    tensors = tensors_in(folder)
    stack_bytes = tensors["model.llm.layers.3.mlp.experts.w13_weight"].nbytes
    all_bytes = sum(values.nbytes for values in tensors.values())
    assert all_bytes > 12 * stack_bytes
    output = program("import_program.py", "measured", saved, folder, tmp_path)
    grown = {what: int(number) for what, number in map(str.split, output.splitlines())}
    assert grown["import"] < 3 * stack_bytes
    assert grown["export"] < 3 * stack_bytes
    assert grown["all"] > 0.8 * all_bytes
    assert_same_bytes(folder, tmp_path / "out")


@pytest.mark.slow
def test_killed_at_any_moment_the_same_commands_give_the_same_folder(saved: Path, tmp_path: Path) -> None:
    ends = program("import_program.py", "killed", saved, tmp_path).splitlines()
    assert ends == ["killed"] * 4 + ["exit 0"]
    folders = sorted(tmp_path.glob("*/out"))
    assert len(folders) == len(ends)
    for folder in folders:
        assert_same_bytes(saved, folder)
        assert sorted(path.name for path in folder.parent.iterdir()) == ["out", "run"]
        assert [
            path.name for path in (folder.parent / "run" / inkling_import.KEEPSAKE).parent.glob("checkpoints/*")
        ] == ["0"]
