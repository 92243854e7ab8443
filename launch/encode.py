"""Encodes the data of an experiment: tokenizer, levels and tokens, rows. What is done already is not done again.

    python -m launch.encode --config=experiments/quickstart.py

trains the tokenizer when `text.train_vocab_size` asks for it and `text.tokenizer` is not there, encodes
every source beside its records, and lays it out. It ends with a summary of each source: records, hours,
what was quarantined (listed in `quarantine.jsonl` beside the encoded records), and how full the rows are.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from launch.app import define_config, read_experiment, run_app
from launch.progress import Progress
from tml.config import Experiment, SourceConfig

if TYPE_CHECKING:
    from tml.codec.text import Tokenizer

_CONFIG = define_config()
_NUM_WORKERS = flags.DEFINE_integer("num_workers", os.cpu_count() or 1, "Processes that encode.", lower_bound=1)


def main(argv: list[str]) -> int:
    """Encodes every source of the experiment and prints what there is."""
    experiment = read_experiment(_CONFIG)
    sources = {**_by_path(experiment.data.eval_sources.values()), **_by_path(experiment.data.sources.values())}
    if not sources:
        raise ValueError(f"experiment {experiment.name} names no data; set data.sources or data.eval_sources")
    tokenizer = _tokenizer(experiment)
    for source in sources.values():
        _encode(source, experiment, tokenizer)
    _summarise("data", experiment.data.sources, experiment, tokenizer, shuffle=True)
    _summarise("held out", experiment.data.eval_sources, experiment, tokenizer, shuffle=False)
    return 0


def _by_path(sources: Iterable[SourceConfig]) -> dict[str, SourceConfig]:
    return {source.path: source for source in sources}


def _tokenizer(experiment: Experiment) -> "Tokenizer":
    """Loads the tokenizer, or trains it on the texts of the training sources."""
    from data_pipelines.encoding import texts_of
    from tml.codec.text import Tokenizer, tokenizer_file, train_tokenizer

    text = experiment.text
    if not text.tokenizer:
        raise ValueError("text.tokenizer is empty; name a tokenizer, or a directory in which to train one")
    place = Path(text.tokenizer)
    if text.train_vocab_size == 0 or place.is_file() or tokenizer_file(place):
        tokenizer = Tokenizer.load(text.tokenizer)
        origin = "is there"
    else:
        paths = _by_path(experiment.data.sources.values())
        texts = (piece for path in paths for piece in texts_of(path))
        tokenizer = train_tokenizer(texts, text.train_vocab_size, place)
        origin = "trained"
    print(f"tokenizer {text.tokenizer}: {origin}, {tokenizer.vocab_size} tokens, {tokenizer.fingerprint()}", flush=True)
    return tokenizer


def _encode(source: SourceConfig, experiment: Experiment, tokenizer: "Tokenizer") -> None:
    from data_pipelines.encoding import encode_dataset, is_complete
    from data_pipelines.loader import encoded_place, open_source

    path = source.path
    _warn_of_other_turns(path, experiment.turn.turn_ms)
    place = encoded_place(source, experiment, tokenizer)
    was_complete, begun = is_complete(place), time.monotonic()
    encoded = encode_dataset(
        path,
        experiment.model,
        tokenizer,
        max_quarantined_fraction=experiment.data.max_quarantined_fraction,
        num_workers=_NUM_WORKERS.value,
        progress=Progress(path, "records"),
    )
    state = "encoded before" if was_complete else f"encoded in {time.monotonic() - begun:.1f} s"
    begun = time.monotonic()
    open_source(path, source, experiment, tokenizer)
    print(f"{path}: {len(encoded)} records {state}, laid out in {time.monotonic() - begun:.1f} s", flush=True)


def _warn_of_other_turns(path: str, turn_ms: int) -> None:
    """Says so if a data set was made for other micro-turns, within which its answers would begin too soon."""
    from data_pipelines.records import read_manifest

    settings = json.loads(read_manifest(path).meta.get("settings", "{}"))
    made_for = settings.get("turn_ms", turn_ms)
    if made_for % turn_ms:
        print(
            f"warning: {path} was made for micro-turns of {made_for} ms, turn.turn_ms is {turn_ms}: some of what is "
            f"said in it would be due before what it answers; make it with --turn_ms={turn_ms}",
            flush=True,
        )


def _summarise(
    title: str,
    sources: Mapping[str, SourceConfig],
    experiment: Experiment,
    tokenizer: "Tokenizer",
    *,
    shuffle: bool,
) -> None:
    from data_pipelines.loader import RowLoader

    if not sources:
        return
    loader = RowLoader(sources, experiment, tokenizer, shuffle=shuffle)
    print("\n".join([f"{title}:", *(f"  {line}" for line in loader.summary_lines())]), flush=True)


if __name__ == "__main__":
    run_app(main)
