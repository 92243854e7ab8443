"""Writes the newest checkpoint of a run for others: as a bundle of ours, or in Inkling's Hugging Face layout.

    python -m launch.export --workdir=runs/quickstart --out=exports/quickstart
    python -m launch.export --workdir=runs/inkling --format=hf --out=exports/inkling

A bundle holds parameters, config and tokenizer, and streams without the run. The Hugging Face layout
is that of the published Inkling checkpoints, which transformers, SGLang and vLLM read.
"""

import enum
from pathlib import Path

from absl import app, flags

from launch.app import prepare_jax, run_app


class Format(enum.Enum):
    """What is written."""

    BUNDLE = "bundle"
    HF = "hf"


_WORKDIR = flags.DEFINE_string("workdir", "", "Run folder.")
_OUT = flags.DEFINE_string("out", "", "Folder that is written; an older export there is replaced.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to export; the newest by default.")
_FORMAT = flags.DEFINE_enum("format", Format.BUNDLE.value, [f.value for f in Format], "What is written.")
_STORED_AS = flags.DEFINE_enum(
    "stored_as",
    "as_imported",
    ["as_imported", "float32", "bfloat16"],
    "With --format=hf: the dtype of the tensors; as_imported is that of the folder they came from, or float32.",
)


def main(argv: list[str]) -> int:
    """Writes the chosen format, and says how large it is."""
    if not _WORKDIR.value or not _OUT.value:
        raise app.UsageError("--workdir and --out are needed, as in --workdir=runs/quickstart --out=exports/quickstart")
    prepare_jax()
    workdir, out = Path(_WORKDIR.value), Path(_OUT.value)
    done = (_export_hf if Format(_FORMAT.value) is Format.HF else _export_bundle)(workdir, out)
    size_mb = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    print(f"{out}: {done}, {size_mb:.1f} MB")
    return 0


def _export_bundle(workdir: Path, out: Path) -> str:
    """Restores, writes, reads back."""
    from tml.export import bundle

    model = bundle.open_model(workdir, _STEP.value)
    bundle.save(model, out)
    bundle.load(out)
    return f"{model.experiment.name}, written and read back"


def _export_hf(workdir: Path, out: Path) -> str:
    """Reads and writes a tensor at a time; what was read is checked before the folder gets its name."""
    from tml.export.inkling_export import StoredAs, export_folder

    reader = export_folder(workdir, out, _STEP.value, StoredAs(_STORED_AS.value))
    return f"{reader.experiment.name} at step {reader.step} in the layout of Inkling"


if __name__ == "__main__":
    run_app(main)
