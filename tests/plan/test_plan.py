"""Plans of a tiny experiment, compiled for eight virtual devices that are taken for a cube of v5p."""

import json
from dataclasses import replace

import jax
import pytest
from compile_programs import V5P, cube
from jax.sharding import Mesh
from made_up import made_up_experiment

from tml.config import MeshConfig, Remat, StreamConfig
from tml.flops import row_flops
from tml.model import transformer
from tml.params import count_params
from tml.plan.decode import plan_decode_step
from tml.plan.estimate import estimate
from tml.plan.hlo import parse
from tml.plan.program import Compiled, hbm_of_report, refused_memory
from tml.plan.report import decode_table, search_line, train_table
from tml.plan.search import all_meshes, candidates, rank, search
from tml.plan.topology import Topology, open_topology
from tml.plan.train import TrainPlan, plan_train_step


class CubeTopology(Topology):
    """Eight virtual devices in the places of a cube."""

    def fabric(self, devices):
        return replace(cube(), coords=cube().coords[[device.id for device in devices]])


@pytest.fixture(scope="module")
def topology() -> Topology:
    return CubeTopology(name="v5p:2x2x2", num_slices=1, chip=V5P, devices=jax.devices(), wraps=(False,) * 3)


@pytest.fixture(scope="module")
def plan(topology: Topology) -> TrainPlan:
    return plan_train_step(made_up_experiment(mesh=MeshConfig(fsdp=8)), topology)


def test_the_train_step_is_compiled_and_estimated(plan: TrainPlan):
    numbers = plan.numbers(num_tokens=1e6)
    assert numbers["fits"]
    assert 0 < numbers["step_seconds_lower"] <= numbers["step_seconds_estimate"] < 1
    assert 0 < numbers["mfu_estimate"] <= numbers["mfu_bound"] < 1
    assert numbers["rows_per_chip"] == 2
    assert numbers["hbm_bytes_per_chip"] > numbers["state_bytes_per_chip"]
    steps = 1e6 / (16 * 32)
    assert numbers["days_of_run"] == pytest.approx(steps * numbers["step_seconds_estimate"] / 86_400)
    assert numbers["chip_hours_of_run"] == pytest.approx(24 * 8 * numbers["days_of_run"])
    json.dumps(numbers)


def test_every_model_flop_is_in_the_program(plan: TrainPlan):
    model, data = plan.experiment.model, plan.experiment.data
    expected = data.rows_per_batch * row_flops(transformer.specs(model), model, data.row_slots)
    assert plan.model_flops_per_step == expected
    found = sum(line.flops for line in plan.estimated.lines) * 8
    # Blocks of experts are padded and attention computes what is masked, so the program does more; never less.
    assert expected * 0.95 < found < 30 * expected


def test_state_bytes_are_those_of_the_shardings(plan: TrainPlan):
    num_params = count_params(transformer.specs(plan.experiment.model))
    whole = plan.least_state_bytes * 8
    # Parameters and the momentum or the two moments of each, and a few counters.
    assert 8 * num_params < whole < 12.1 * num_params
    assert plan.least_state_bytes < plan.state_bytes < whole


def test_the_table_says_what_matters(plan: TrainPlan):
    text = train_table(plan.numbers(num_tokens=1e6))
    for words in ("8 chips", "mesh fsdp=8", ": fits", "MFU", "category", "largest costs", "not in these numbers"):
        assert words in text


def test_a_mesh_that_crosses_slices_by_another_axis_is_refused(topology: Topology):
    with pytest.raises(
        ValueError, match=r"replica = 1 is not a multiple of the 2 slices.*nearest.*'replica': 2, 'fsdp': 4"
    ):
        plan_train_step(made_up_experiment(mesh=MeshConfig(fsdp=8)), replace(topology, num_slices=2))


def test_what_the_compiler_refuses_does_not_fit(plan: TrainPlan):
    memory = replace(plan.memory, is_refused=True, temporary_bytes=2 * V5P.hbm_bytes)
    refused = replace(plan, memory=memory, estimated=None)
    numbers = refused.numbers(num_tokens=1e6)
    assert not numbers["fits"]
    assert numbers["step_seconds_estimate"] is None
    assert "DOES NOT FIT" in train_table(numbers)
    assert "does not fit" in search_line(numbers)
    assert rank([refused, plan]) == [plan, refused]


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (104.18G) "
            "exceeds available HBM (95.74G).",
            104.18 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.5M of 95.74G hbm.", 512.5 * 2**20),
    ],
)
def test_a_refusal_for_want_of_memory_says_how_much_was_wanted(message: str, wanted: float, topology: Topology):
    memory = refused_memory(message, topology)
    assert memory is not None
    assert memory.is_refused
    assert memory.temporary_bytes == pytest.approx(wanted)
    assert refused_memory(message.replace("RESOURCE_EXHAUSTED", "INTERNAL"), topology) is None


def test_hbm_is_what_the_report_of_the_compiler_says():
    report = (
        "Memory Space: default (color=0)\nTotal bytes: 6451254368 (6.01GiB)\n  cumulative_size; size\n\n"
        "Memory Space: vmem (color=1)\nTotal bytes: 33554432 (32.00MiB)\n"
    )
    assert hbm_of_report(report) == 6_451_254_368
    assert hbm_of_report(report.replace("default (color=0)", "vmem (color=1)")) is None


def test_a_micro_turn_is_compiled_and_estimated(topology: Topology):
    made_up = made_up_experiment()
    model = replace(made_up.model, attention=replace(made_up.model.attention, num_kv_heads=2))
    experiment = replace(made_up, model=model, stream=StreamConfig(max_positions=64, tensor=2))
    pair = replace(topology, devices=topology.devices[:2])
    kept: list[tuple[Compiled, Mesh]] = []
    plan = plan_decode_step(experiment, pair, 4, 9, keep=lambda *program: kept.append(program))
    ((compiled, mesh),) = kept
    often, program = plan.numbers(), parse(compiled.text)
    # The loop over output positions counts as often as the plan says.
    seconds = [estimate(program, pair.fabric(list(mesh.devices.flat)), count).seconds for count in (1, 2, 9)]
    assert often["step_seconds_estimate"] == pytest.approx(seconds[2])
    assert seconds[2] - seconds[0] == pytest.approx(8 * (seconds[1] - seconds[0]))
    assert seconds[1] > 1.3 * seconds[0]
    assert often["mesh"]["tensor"] == 2
    assert often["experts_read_per_layer"] == pytest.approx(4 * (1 - 0.5**4))
    assert "micro-turn" in decode_table(often)
    assert "of 4, if all are as likely" in decode_table(often)
    assert f"starting {often['operations']:,.0f} operations" in decode_table(often)
    # One layer, sliding: no cache grows.
    assert often["cache_bytes_per_session_minute"] == 0
    # So many sessions more, and the chip is full.
    each = (plan.memory.total_bytes - plan.param_bytes) / 4
    assert often["most_sessions"] * each + plan.param_bytes <= V5P.hbm_bytes
    with pytest.raises(ValueError, match=r"set stream\.tensor=8"):
        plan_decode_step(experiment, topology, 4, 9)


def test_meshes_of_a_search_use_every_device():
    meshes = all_meshes(16, num_slices=2)
    assert len(set(meshes)) == len(meshes)
    assert all(mesh.replica == 2 for mesh in meshes)
    assert {mesh.fsdp * mesh.expert * mesh.context * mesh.tensor for mesh in meshes} == {8}
    assert meshes[0] == MeshConfig(replica=2, fsdp=8)


def test_a_search_proposes_only_what_divides(topology: Topology):
    found = list(candidates(made_up_experiment(), topology, ["mesh", "remat", "rows"]))
    assert {variant.model.remat for variant in found} == set(Remat)
    assert {variant.data.rows_per_batch for variant in found} == {8, 16, 32, 64}
    # Four experts, so `expert` is at most 4; two heads, so `tensor` is at most 2.
    assert max(variant.mesh.expert for variant in found) == 4
    assert max(variant.mesh.tensor for variant in found) <= 2
    # A search that ends early has tried more than one of each.
    first = found[:8]
    assert min(len({each(variant) for variant in first}) for each in (
        lambda variant: variant.mesh, lambda variant: variant.model.remat, lambda variant: variant.data.rows_per_batch,
    )) > 1  # fmt: skip
    # Rows that do not fall into as many parts are no variant, and end no search.
    halved = made_up_experiment(model=replace(made_up_experiment().model, row_parts=2))
    alone = replace(topology, devices=jax.devices()[:1])
    assert {variant.data.rows_per_batch for variant in candidates(halved, alone, ["rows"])} == {2, 4, 8}
    with pytest.raises(ValueError, match="cannot vary 'width'"):
        next(candidates(made_up_experiment(), topology, ["width"]))


def test_a_search_goes_on_behind_what_does_not_compile(topology: Topology):
    good, failed = made_up_experiment(mesh=MeshConfig(fsdp=8)), []
    bad = replace(good, mesh=MeshConfig(fsdp=4))
    found = list(search(iter([bad, good]), topology, 2, lambda variant, error: failed.append((variant, str(error)))))
    assert [plan.experiment for plan in found] == [good]
    [(variant, why)] = failed
    assert variant is bad
    assert "needs 4 devices, but there are 8" in why


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v7x:2x2x2", "unknown chip .v7x."),
        ("v5p:8x8", "must give 3 sizes, chips along the axes of a slice, as in v5p:8x8x8"),
        ("v6e:4x4x4", "must give 2 sizes, chips along the axes of a slice, as in v6e:16x16"),
        ("h100:8", "slices x hosts x GPUs"),
    ],
)
def test_a_wrong_topology_names_the_way_out(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        open_topology(name)
    with pytest.raises(ValueError, match="the flag is for TPUs"):
        open_topology("h100:1x2x8", num_slices=2)
