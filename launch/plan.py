"""Says before a launch whether a run fits a pod, how fast it will go and what limits it, without the pod.

python -m launch.plan --config=experiments/interaction_1b.py --topology=v5p:2x2x2

The real step is compiled by the real compiler for the topology that is named, and estimated from the compiled
program. Topologies: v5p:XxYxZ, v5e:XxY, v6e:XxY, tpu7x:XxYxZ (chips), and h100, h200 or b200:1xHOSTSxGPUS.
--step=decode plans a micro-turn of live sessions on stream.tensor chips instead, with the experts' kernel that
stream.backend names; --search=mesh,remat,rows ranks variants.
Needs the extra `plan`: pip install -e '.[plan]'.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags

from launch.app import as_usage, define_config, read_experiment, run_app
from tml.plan.chips import read_topology
from tml.whole_folder import write_whole

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from tml.config import Experiment
    from tml.plan.program import Compiled
    from tml.plan.topology import Topology

_CONFIG = define_config()
_TOPOLOGY = flags.DEFINE_string("topology", "", "Pod, as v5p:8x8x8 or h100:1x64x8.")
_NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "TPU slices of this topology, joined by a network.", lower_bound=1)
_STEP = flags.DEFINE_enum("step", "train", ["train", "decode"], "A train step, or a micro-turn of live sessions.")
_TOKENS = flags.DEFINE_float("tokens", 0.0, "Tokens of the run, for its days; the config's steps by default.")
_NUM_SESSIONS = flags.DEFINE_integer("num_sessions", 16, "Decode: live sessions.", lower_bound=1)
_OUTPUT_POSITIONS = flags.DEFINE_integer("output_positions", 8, "Decode: positions decoded in a turn.", lower_bound=1)
_SEARCH = flags.DEFINE_list("search", [], "What to vary, of mesh, remat, rows (a chip): ranks what fits.")
_SEARCH_LIMIT = flags.DEFINE_integer("search_limit", 8, "Most variants to compile in a search.", lower_bound=1)
_JSON = flags.DEFINE_string("json", "", "File for all numbers.")
_HLO = flags.DEFINE_string("hlo", "", "File for the compiled program's text; the devices' places go beside it, .json.")


def main(argv: list[str]) -> int:
    """Compiles, estimates, prints."""
    if not _TOPOLOGY.value:
        raise app.UsageError("--topology is missing; name a pod, as in --topology=v5p:8x8x8")
    _refuse_flags()
    experiment = read_experiment(_CONFIG)
    os.environ["JAX_PLATFORMS"] = "cpu"  # jax reads it when it is imported; nothing runs here but compilers
    from tml.plan.report import decode_table, train_table
    from tml.plan.search import check_varied
    from tml.plan.topology import open_topology

    with as_usage():
        read_topology(_TOPOLOGY.value)
        check_varied(_SEARCH.value)
    for file in filter(None, (_JSON.value, _HLO.value)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    topology = open_topology(_TOPOLOGY.value, _NUM_SLICES.value)
    if _SEARCH.value:
        return _search(experiment, topology)

    print(f"compiling the {_STEP.value} step of {experiment.name} for {topology.name}: minutes", flush=True)

    def keep(compiled: "Compiled", mesh: "Mesh") -> None:
        print(f"compiled in {compiled.compile_seconds:.0f} s", flush=True)
        _write_hlo(compiled, mesh, topology)

    if _STEP.value == "decode":
        from tml.plan.decode import plan_decode_step

        decode = plan_decode_step(experiment, topology, _NUM_SESSIONS.value, _OUTPUT_POSITIONS.value, keep)
        numbers = decode.numbers()
        print(decode_table(numbers))
    else:
        from tml.plan.train import plan_train_step

        plan = plan_train_step(experiment, topology, keep)
        numbers = plan.numbers(_TOKENS.value or plan.tokens_of_config)
        print(train_table(numbers))
    _write_json(numbers)
    return 0


def _refuse_flags() -> None:
    """Raises UsageError for flags that do not go together."""
    for flag, other, goes in (
        (_STEP, "--search, which plans train steps", bool(_SEARCH.value)),
        (_HLO, "--search", bool(_SEARCH.value)),
        (_TOKENS, "--step=decode", _STEP.value == "decode"),
        (_NUM_SESSIONS, "a train step", _STEP.value != "decode"),
        (_OUTPUT_POSITIONS, "a train step", _STEP.value != "decode"),
        (_SEARCH_LIMIT, "a plan without --search", not _SEARCH.value),
    ):
        if goes and flag.present:
            raise app.UsageError(f"--{flag.name} does not go with {other}; leave it out")
    files = [Path(file) for file in (_JSON.value, _HLO.value, _HLO.value and _places_file(_HLO.value)) if file]
    for number, file in enumerate(files):
        if file.is_dir():
            raise app.UsageError(f"{file} is a folder; name a file for --json and --hlo")
        if file in files[:number]:
            raise app.UsageError(f"--json and --hlo would both write {file}; name another file")


def _places_file(hlo: str) -> str:
    """Beside the program: where its devices stand."""
    return f"{hlo}.json"


def _search(experiment: "Experiment", topology: "Topology") -> int:
    from tml.plan.report import search_line
    from tml.plan.search import candidates, rank, search

    plans = []
    variants = candidates(experiment, topology, _SEARCH.value)
    failures = 0

    def failed(variant: "Experiment", error: Exception) -> None:
        nonlocal failures
        failures += 1
        mesh, why = "x".join(map(str, variant.mesh.shape)), str(error).strip().splitlines()[0]
        print(f"mesh {mesh}, {variant.model.remat}, {variant.data.rows_per_batch} rows: FAILED, {why}", flush=True)

    for plan in search(variants, topology, _SEARCH_LIMIT.value, failed):
        print(search_line(plan.numbers(_TOKENS.value or plan.tokens_of_config)), flush=True)
        plans.append(plan)
        _write_json([one.numbers(_TOKENS.value or one.tokens_of_config) for one in rank(plans)])
    if failures and not plans:
        raise ValueError(f"none of the {failures} variants of {experiment.name} that were tried compiles")
    if not plans:
        raise ValueError(f"no variant of {experiment.name} holds its state on {topology.name}; name a larger topology")
    ranked = [plan.numbers(_TOKENS.value or plan.tokens_of_config) for plan in rank(plans)]
    print("\nranked")
    if next(variants, None) is not None:
        print("(there are more variants, for a larger --search_limit)")
    for numbers in ranked:
        print(search_line(numbers))
    _write_json(ranked)
    return 0


def _write_json(numbers: Any) -> None:
    if _JSON.value:
        write_whole(Path(_JSON.value), json.dumps(numbers, indent=2))


def _write_hlo(compiled: "Compiled", mesh: "Mesh", topology: "Topology") -> None:
    if _HLO.value:
        write_whole(Path(_HLO.value), compiled.text)
        coords = topology.fabric(list(mesh.devices.flat)).coords.tolist()
        places = {"topology": topology.name, "wraps": topology.wraps, "mesh": dict(mesh.shape), "coords": coords}
        write_whole(Path(_places_file(_HLO.value)), json.dumps(places))


if __name__ == "__main__":
    run_app(main)
