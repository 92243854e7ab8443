"""Exports the newest checkpoint of a run: to stream here, as portable programs, or in Inkling's published layout.

    python -m launch.export --workdir=runs/quickstart --out=exports/quickstart
    python -m launch.export --workdir=runs/quickstart --format=stablehlo --out=exports/portable
    python -m launch.export --workdir=runs/inkling --format=hf --out=exports/inkling

bundle: parameters, config and tokenizer in one folder, for launch.stream and launch.evaluate.
stablehlo: programs for CPU, CUDA and TPU, which jax runs without this package; portable.json lists their arguments.
  A reader needs jax and flatbuffers (jax.export asks for it) and, for the weights, safetensors.
hf: the Hugging Face layout of the published Inkling checkpoints, which transformers, SGLang and vLLM read.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from absl import app, flags

from launch.app import FLAGS, output_folder, prepare_jax, run_app
from tml.whole_folder import Kind

_WORKDIR = flags.DEFINE_string("workdir", "", "Run folder, or a bundle.")
_OUT = flags.DEFINE_string(
    "out", "", "Folder of the export; an older one of this format is replaced, all else is refused."
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to export; the newest by default.")
_FORMAT = flags.DEFINE_enum_class("format", Kind.BUNDLE, Kind, "What is written.")
_STORED_AS = flags.DEFINE_enum(
    "stored_as",
    "as_imported",
    ["as_imported", "float32", "bfloat16"],
    "With --format=hf: the dtype of the tensors; as_imported is that of the folder they came from, or float32.",
)


def main(argv: list[str]) -> int:
    """Restores, writes, says what was written."""
    if not _WORKDIR.value or not _OUT.value:
        raise app.UsageError("--workdir and --out are needed, as in --workdir=runs/quickstart --out=exports/quickstart")
    if _FORMAT.value is not Kind.HF and FLAGS["stored_as"].present:
        raise app.UsageError(f"--stored_as is of --format=hf; {_FORMAT.value} is stored in float32")
    out = output_folder("out", _OUT.value)
    prepare_jax()
    what = WRITERS[_FORMAT.value](Path(_WORKDIR.value), _STEP.value, out)
    size_mb = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    print(f"{out}: {what}, {size_mb:.1f} MB")
    return 0


def _write_bundle(workdir: Path, step: int | None, out: Path) -> str:
    from tml.export import bundle

    model = bundle.open_model(workdir, step)
    bundle.save(model, out)
    bundle.load(out)
    return f"{model.experiment.name}, written and read back"


def _write_stablehlo(workdir: Path, step: int | None, out: Path) -> str:
    from tml.export import bundle, portable

    model = bundle.open_model(workdir, step)
    portable.save(model, out)
    return f"{model.experiment.name} for {', '.join(portable.PLATFORMS)} and {portable.BUCKETS} sessions"


def _write_hf(workdir: Path, step: int | None, out: Path) -> str:
    """Reads and writes a tensor at a time; what was read is checked before the folder gets its name."""
    from tml.export.inkling_export import StoredAs, export_folder

    reader = export_folder(workdir, out, step, StoredAs(_STORED_AS.value))
    return f"{reader.experiment.name} at step {reader.step} in the layout of Inkling"


WRITERS: Mapping[Kind, Callable[[Path, int | None, Path], str]] = {
    Kind.BUNDLE: _write_bundle,
    Kind.STABLEHLO: _write_stablehlo,
    Kind.HF: _write_hf,
}
"""For every format: (run folder, step, folder to write) to what was written."""


if __name__ == "__main__":
    run_app(main)
