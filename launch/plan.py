"""Says before a launch whether a run fits a pod, how fast it will go and what limits it, without the pod.

python -m launch.plan --config=experiments/interaction_1b.py --topology=v5p:2x2x2

The real step is compiled by the real compiler for the topology that is named, and estimated from the compiled
program. Topologies: v5p:XxYxZ, v5e:XxY, v6e:XxY, tpu7x:XxYxZ (chips), and h100, h200 or b200:1xHOSTSxGPUS.
Needs the extra `plan`: pip install 'tml-interaction[plan]'.
"""

import json
import os
from pathlib import Path

from absl import app, flags

from launch.app import define_config, read_experiment, run_app

_CONFIG = define_config()
_TOPOLOGY = flags.DEFINE_string("topology", "", "Pod, as v5p:8x8x8 or h100:1x64x8.")
_SLICES = flags.DEFINE_integer("slices", 1, "TPU slices of this topology, joined by a network.", lower_bound=1)
_TOKENS = flags.DEFINE_float("tokens", 0.0, "Tokens of the run, for its days; the config's steps by default.")
_JSON = flags.DEFINE_string("json", "", "File for all numbers.")
_HLO = flags.DEFINE_string("hlo", "", "File for the compiled program's text; the devices' places go beside it, .json.")


def main(argv: list[str]) -> int:
    """Compiles, estimates, prints."""
    if not _TOPOLOGY.value:
        raise app.UsageError("--topology is missing; name a pod, as in --topology=v5p:8x8x8")
    experiment = read_experiment(_CONFIG)
    os.environ["JAX_PLATFORMS"] = "cpu"  # jax reads it when it is imported; nothing runs here but compilers
    from tml.plan.plan import plan_train_step
    from tml.plan.report import table
    from tml.plan.topology import open_topology

    topology = open_topology(_TOPOLOGY.value, _SLICES.value)
    plan, compiled, mesh = plan_train_step(experiment, topology)
    numbers = plan.numbers(_TOKENS.value or experiment.train.num_steps * plan.tokens_per_step)
    print(table(numbers))
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(numbers, indent=2))
    if _HLO.value:
        Path(_HLO.value).write_text(compiled.text)
        coords = topology.fabric(list(mesh.devices.flat)).coords.tolist()
        Path(f"{_HLO.value}.json").write_text(json.dumps({"mesh": dict(mesh.shape), "coords": coords}))
    return 0


if __name__ == "__main__":
    run_app(main)
