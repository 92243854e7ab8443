"""Writes the newest checkpoint of a run as a bundle: parameters, config and tokenizer in one folder.

python -m launch.export --workdir=runs/quickstart --out=exports/quickstart
"""

from pathlib import Path

from absl import app, flags

from launch.app import prepare_jax, run_app

_WORKDIR = flags.DEFINE_string("workdir", "", "Run folder.")
_OUT = flags.DEFINE_string("out", "", "Folder of the bundle; an older bundle there is replaced.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to export; the newest by default.")


def main(argv: list[str]) -> int:
    """Restores, writes, reads back."""
    if not _WORKDIR.value or not _OUT.value:
        raise app.UsageError("--workdir and --out are needed, as in --workdir=runs/quickstart --out=exports/quickstart")
    prepare_jax()
    from tml.export import bundle

    model = bundle.open_model(Path(_WORKDIR.value), _STEP.value)
    bundle.save(model, Path(_OUT.value))
    bundle.load(Path(_OUT.value))
    size_mb = sum(file.stat().st_size for file in Path(_OUT.value).rglob("*") if file.is_file()) / 1e6
    print(f"{_OUT.value}: {model.experiment.name}, {size_mb:.1f} MB, written and read back")
    return 0


if __name__ == "__main__":
    run_app(main)
