"""Writes a data set as a TensorFlow Datasets data set, which TFDS reads without TensorFlow and without this package.

python -m launch.export_tfds --source=data/requests-train --data_dir=data/tfds
"""

import time

from absl import app, flags

from launch.app import output_folder, run_app

FLAGS = flags.FLAGS
flags.DEFINE_string("source", None, "Directory of the data set.")
flags.DEFINE_string("data_dir", None, "Root of TFDS data sets; the new one gets its own directory in it.")
flags.DEFINE_bool("overwrite", False, "Replace a TFDS data set that is there.")


def main(_: list[str]) -> int:
    """Writes it, reads it back and prints where it is."""
    if not FLAGS.source or not FLAGS.data_dir:
        raise app.UsageError("--source names a data set and --data_dir where the TFDS data set goes")
    output_folder("data_dir", FLAGS.data_dir)
    from data_pipelines.tfds_builder import TfdsRecords, write_tfds  # slow to import

    begun = time.monotonic()
    directory = write_tfds(FLAGS.source, FLAGS.data_dir, overwrite=FLAGS.overwrite)
    records = TfdsRecords(directory)
    print(f"{directory}: {len(records)} {records.kind.value}, split {records.split}, {time.monotonic() - begun:.1f} s")
    print(f"read it with tfds.builder_from_directory({str(directory)!r}).as_data_source(split={records.split!r})")
    return 0


if __name__ == "__main__":
    run_app(main)
