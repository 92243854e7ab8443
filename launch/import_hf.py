"""Imports a Hugging Face checkpoint of the Inkling family as the first checkpoint of a run folder.

    python -m launch.import_hf --hf_dir=downloads/Inkling-Small --workdir=runs/inkling_small
    python -m launch.train --config=experiments/mine.py --config.train.init_from=runs/inkling_small

Reads config.json and safetensors, a few rows of a tensor at a time; no pickle, and no code of the
folder's own. Blocks of multi-token prediction come along (`config.model.mtp`). What the backbone cannot be is refused.
Killed in the middle, the same command begins anew.
"""

from pathlib import Path

from absl import app, flags

from launch.app import output_folder, prepare_jax, run_app

_HF_DIR = flags.DEFINE_string("hf_dir", "", "Folder with config.json and safetensors.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Run folder that is made.")
_MAX_TILES_PER_TURN = flags.DEFINE_integer(
    "max_tiles_per_turn",
    None,
    "Image tiles that one micro-turn may hold, if the checkpoint has an image tower; 1 where it does not say.",
    lower_bound=1,
)


def main(argv: list[str]) -> int:
    """Imports, and says what came in."""
    if not _HF_DIR.value or not _WORKDIR.value:
        raise app.UsageError("--hf_dir and --workdir are needed, as in --hf_dir=downloads/X --workdir=runs/x")
    workdir = output_folder("workdir", _WORKDIR.value)
    prepare_jax()
    from tml.export.inkling_import import import_folder
    from tml.flops import param_table, param_table_text
    from tml.model import transformer

    model = import_folder(Path(_HF_DIR.value), workdir, _MAX_TILES_PER_TURN.value).model
    print(param_table_text(param_table(transformer.specs(model), model)))
    print(f"{workdir}: imported; a run starts from it with --config.train.init_from={workdir}")
    return 0


if __name__ == "__main__":
    run_app(main)
