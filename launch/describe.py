"""Says what is in a data set: hours, streams, speakers, tokens per stream, what cannot be read, and a sample.

    python -m launch.describe --data=data/quickstart/train --sample=3 --png=sample.png
    python -m launch.describe --data=data/quickstart/train --config=experiments/quickstart.py

With --config the tokens of each stream are counted, with the experiment's tokenizer and audio frames. --sample=N
prints the timeline of session N tick by tick; --png=FILE draws it.
"""

from pathlib import Path

from absl import app, flags

from launch.app import define_config, read_experiment, run_app
from launch.progress import Progress
from tml.config import AudioConfig, MicroTurnConfig
from tml.microturn import Clock

_CONFIG = define_config()
_DATA = flags.DEFINE_string("data", "", "Directory of a data set of sessions or documents.")
_SAMPLE = flags.DEFINE_integer("sample", None, "Session whose timeline is shown; 0 if only --png is given.")
_PNG = flags.DEFINE_string("png", "", "Where the picture of that timeline goes.")


def main(argv: list[str]) -> int:
    """Prints the description of the data set, then the sample."""
    if not _DATA.value:
        raise app.UsageError("--data is missing; name a data set, as in --data=data/quickstart/train")
    from data_pipelines.description import describe
    from tml.codec.text import Tokenizer

    clock, tokenizer, audio = Clock.of(MicroTurnConfig(), AudioConfig()), None, None
    if _CONFIG.value is not None:
        experiment = read_experiment(_CONFIG)
        audio = experiment.model.audio
        clock = Clock.of(experiment.turn, audio)
        tokenizer = Tokenizer.load(experiment.text.tokenizer)
    description = describe(_DATA.value, tokenizer, audio, Progress(_DATA.value, "records"))
    print("\n".join(description.lines()))
    if _SAMPLE.value is not None or _PNG.value:
        _show_sample(_SAMPLE.value or 0, clock)
    return 0


def _show_sample(index: int, clock: Clock) -> None:
    from data_pipelines.records import RecordKind, RecordSource, read_session
    from tml.timeline import draw_timeline, timeline_text

    source = RecordSource(_DATA.value)
    if source.manifest.kind is not RecordKind.SESSIONS:
        raise ValueError(f"{_DATA.value} holds {source.manifest.kind.value}; only sessions have a timeline")
    if not 0 <= index < len(source):
        raise ValueError(f"--sample={index} is outside the data set, which has sessions 0 to {len(source) - 1}")
    session = read_session(source, index)
    print(f"\n{timeline_text(session, clock)}")
    if _PNG.value:
        Path(_PNG.value).parent.mkdir(parents=True, exist_ok=True)
        draw_timeline(session, _PNG.value, clock)
        print(f"picture: {_PNG.value}")


if __name__ == "__main__":
    run_app(main)
