"""Our data sets as TensorFlow Datasets, and back, without TensorFlow: each record is one feature of bytes.

    data/tfds/tml_records/requests-train/1.0.0/
      dataset_info.json  features.json  metadata.json
      tml_records-train.array_record-00000-of-00001

What a record holds is ours (`tml.session`, `data_pipelines.documents`), so that TFDS need not know of
sound or pictures. `metadata.json` carries the manifest of the source.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data_pipelines.records import RecordError, RecordKind, RecordSource
from tml.foreign_files import foreign_files
from tml.session import Session, SessionError, session_from_bytes
from tml.whole_folder import put_in_place, staged

FEATURE = "record"
"""The name of the only feature."""
_VERSION = "1.0.0"
OWN_FILES = re.compile(r"(dataset_info|features|metadata)\.json|LICENSE|tml_records-.*\.array_record-\d+-of-\d+")
"""What TFDS writes; a directory that holds anything else is not replaced."""


class TmlRecords(tfds.core.GeneratorBasedBuilder):
    """A TFDS data set of one of ours, in the same order, under its name as configuration.

    Example:
        builder = TmlRecords(source_dir="data/requests-train", data_dir="data/tfds", file_format="array_record")
        builder.download_and_prepare()
    """

    VERSION = tfds.core.Version(_VERSION)
    RELEASE_NOTES: Mapping[str, str] = {_VERSION: "One feature of bytes."}

    def __init__(self, *, source_dir: Path | str, **options: Any) -> None:
        self._source = RecordSource(source_dir)
        name = self._source.manifest.name
        if "/" in name or name in ("", ".", ".."):
            raise ValueError(f"{source_dir} has the name {name!r}, which cannot be a directory's; make it with another")
        config = tfds.core.BuilderConfig(name=name, version=_VERSION, description=f"The data set {name}.")
        super().__init__(config=config, **options)

    def _info(self) -> tfds.core.DatasetInfo:
        manifest = self._source.manifest
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{manifest.kind.value} of {manifest.name}, one a record, in the schema of the package tml",
            features=tfds.features.FeaturesDict({FEATURE: tfds.features.Tensor(shape=(), dtype=np.object_)}),
            disable_shuffling=True,
            license=manifest.meta.get("licence"),
            metadata=tfds.core.MetadataDict(
                kind=manifest.kind.value,
                name=manifest.name,
                num_records=manifest.num_records,
                identity=manifest.identity,
                split=self._split,
                meta=dict(manifest.meta),
            ),
        )

    @property
    def _split(self) -> str:
        return self._source.manifest.meta.get("split", "train")

    def _split_generators(self, dl_manager: Any) -> Mapping[str, Iterator[tuple[int, dict[str, bytes]]]]:
        del dl_manager  # nothing is downloaded
        return {self._split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, bytes]]]:
        for index in range(len(self._source)):
            yield index, {FEATURE: self._source[index]}


def write_tfds(source_dir: Path | str, data_dir: Path | str, *, overwrite: bool = False) -> Path:
    """Writes a data set of ours as a TFDS data set under `data_dir` and returns its own directory.

    Its one split is what the manifest's meta calls `split`, or else `train`.

    Raises:
        FileNotFoundError: there is no data set at `source_dir`.
        ValueError: the TFDS data set exists, and `overwrite` is False or there are other files in it.
        RecordError: a record cannot be read.
    """
    with _silence():
        directory = Path(_builder(source_dir, data_dir).data_dir)

        def check() -> None:
            if directory.exists() and not overwrite:
                raise ValueError(
                    f"{directory} exists; name another --data_dir, remove it, or overwrite it (--overwrite)"
                )
            others = foreign_files(directory, OWN_FILES.fullmatch)
            if others:
                raise ValueError(f"{directory} holds {others}, which TFDS did not write; nothing was replaced")

        with staged(directory, check) as staging:
            builder = _builder(source_dir, staging)
            builder.download_and_prepare(download_dir=f"{staging}/downloads")
            check()
            put_in_place(Path(builder.data_dir), directory)
    return directory


def _builder(source_dir: Path | str, data_dir: Path | str) -> TmlRecords:
    return TmlRecords(source_dir=source_dir, data_dir=str(data_dir), file_format="array_record")


class TfdsRecords:
    """Random access to what `write_tfds` wrote, through `as_data_source`.

    Example:
        records = TfdsRecords("data/tfds/tml_records/requests-train/1.0.0")
        session = records.session(0)

    Raises:
        ValueError: not a TFDS data set of ours, or a file of it does not hold what the metadata says.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        try:
            builder = tfds.builder_from_directory(str(directory))
            metadata = dict(builder.info.metadata or {})
            self.kind = RecordKind(metadata["kind"])
            self.name, self.split = str(metadata["name"]), str(metadata["split"])
            self.identity, wanted = str(metadata["identity"]), int(metadata["num_records"])
            self.meta: Mapping[str, str] = dict(metadata["meta"])
        except (tfds.core.DatasetNotFoundError, OSError, KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{directory} is not a TFDS data set that write_tfds made: {reason}") from error
        try:
            self._source = builder.as_data_source(split=self.split)
        except Exception as error:  # TFDS and array_record raise errors of their own making
            raise ValueError(f"{directory} cannot be read: {str(error).splitlines()[0]}") from error
        if len(self) != wanted:
            raise ValueError(f"{directory} holds {len(self)} records, its metadata says {wanted}")
        if wanted:
            # The reader counts what TFDS wrote down, not what is there; a file that ends early shows at its end.
            self[wanted - 1]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bytes:
        """The bytes of one record.

        Raises:
            RecordError: it cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.directory}")
        try:
            found = self._source[index][FEATURE]
        except Exception as error:  # array_record raises RuntimeError and IndexError of its own making
            raise RecordError(str(self.directory), index, f"unreadable: {str(error).splitlines()[0]}") from error
        if not isinstance(found, bytes):
            raise RecordError(str(self.directory), index, "unreadable: its file ends before it")
        return found

    def session(self, index: int) -> Session:
        """One session. Raises RecordError when the record cannot be read as a session."""
        data = self[index]
        try:
            return session_from_bytes(data)
        except SessionError as error:
            raise RecordError(str(self.directory), index, str(error)) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps TFDS from printing its own progress."""
    tfds.disable_progress_bar()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
