"""Quickstart: spoken requests with one-word answers, learnt from scratch on two cores.

Question: does a tiny interaction model learn, from synthetic speech alone, to answer a spoken
request at the right moment, in micro-turns of 200 ms?

Cost: to be measured.
Expected: to be measured.

Command, after `data/quickstart` has been prepared (see the README):

    python -m launch.train --config=experiments/quickstart.py --workdir=runs/quick
"""

from ml_collections import ConfigDict

from tml.config import DataConfig, EvaluationConfig, Experiment, SourceConfig, TextConfig, to_config_dict


def get_config() -> ConfigDict:
    """The experiment, as flags may change it."""
    return to_config_dict(
        Experiment(
            name="quickstart",
            text=TextConfig(tokenizer="data/quickstart/tokenizer", train_vocab_size=512),
            data=DataConfig(
                sources={"requests": SourceConfig(path="data/quickstart/train")},
                eval_sources={"requests": SourceConfig(path="data/quickstart/heldout")},
            ),
            evaluation=EvaluationConfig(sessions="data/quickstart/heldout"),
        )
    )
