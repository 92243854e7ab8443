"""Times of collectives against the formulas of the scaling book, and every notation of groups."""

import numpy as np
import pytest
from compile_programs import V5P, cube

from tml.plan.chips import CHIPS, Chip
from tml.plan.hlo import parse_instruction
from tml.plan.links import Fabric, replica_groups, transfer

LINK = V5P.link_bytes_per_s


def collective(opcode: str, groups: str):
    return parse_instruction(
        f"  %c = f32[8]{{0}} {opcode}(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['axis_0'=8] {'axis_0':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_groups_are_read(text: str, expected: list[list[int]]):
    assert replica_groups(collective("all-gather", text), 8).tolist() == expected


def test_an_unknown_notation_is_an_error():
    with pytest.raises(ValueError, match="notation that is not known"):
        replica_groups(collective("all-gather", "{{0,1},{2}}"), 8)


def test_a_ring_gathers_over_both_its_directions():
    ring, shard_bytes = cube((8, 1, 1), wrap=True), 1e9
    found = transfer(collective("all-gather", "[1,8]<=[8]"), shard_bytes, ring)
    assert found.seconds == pytest.approx(7 * shard_bytes / (2 * LINK), rel=1e-3)
    assert found.num_bytes == 7 * shard_bytes
    line = transfer(collective("all-gather", "[1,8]<=[8]"), shard_bytes, cube((8, 1, 1)))
    assert line.seconds == pytest.approx(2 * found.seconds, rel=1e-3)


def test_three_axes_gather_three_times_as_fast():
    everything = f"[1,{8**3}]<=[{8**3}]"
    one = transfer(collective("all-gather", "[64,8]<=[512]"), 1e9 / 8, cube((8, 8, 8), wrap=True))
    three = transfer(collective("all-gather", everything), 1e9 / 512, cube((8, 8, 8), wrap=True))
    assert one.seconds / three.seconds == pytest.approx(3, rel=0.15)


def test_all_reduce_is_a_scatter_and_a_gather():
    torus = cube((4, 4, 4), wrap=True)
    gather = transfer(collective("all-gather", "[1,64]<=[64]"), 1e9 / 64, torus)
    scatter = transfer(collective("reduce-scatter", "[1,64]<=[64]"), 1e9, torus)
    reduce = transfer(collective("all-reduce", "[1,64]<=[64]"), 1e9, torus)
    assert scatter.seconds == pytest.approx(gather.seconds)
    assert reduce.seconds == pytest.approx(2 * gather.seconds)


def test_all_to_all_takes_a_quarter_of_a_gather_on_a_ring():
    # Scaling book, "all-to-alls": V / (4 W) against V / W, for an array of V bytes in all and W both ways.
    ring, operand = cube((8, 1, 1), wrap=True), 1e9
    exchange = transfer(collective("all-to-all", "[1,8]<=[8]"), operand, ring)
    gather = transfer(collective("all-gather", "[1,8]<=[8]"), operand, ring)
    assert exchange.seconds / gather.seconds == pytest.approx(1 / 4 * 8 / 7, rel=1e-3)


def test_groups_that_interleave_share_their_links():
    ring = cube((8, 1, 1), wrap=True)
    near = transfer(collective("all-gather", "[1,8]<=[8]"), 1e9, ring)
    every_second = transfer(collective("all-gather", "[2,4]<=[4,2]T(1,0)"), 1e9, ring)
    assert every_second.seconds / near.seconds == pytest.approx(3 / 7 * 2, rel=1e-3)


def test_a_step_to_a_neighbour_takes_one_link():
    pairs = "source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}"
    step = parse_instruction(f"  %p = f32[8]{{0}} collective-permute(%x), channel_id=1, {pairs}")
    assert transfer(step, 1e9, cube((8, 1, 1), wrap=True)).seconds == pytest.approx(1e9 / LINK, rel=1e-3)
    assert transfer(step, 1e9, cube((8, 1, 1))).seconds == pytest.approx(7e9 / LINK, rel=1e-3)


def test_hosts_of_gpus_share_the_network():
    h100 = CHIPS["h100"]
    coords = np.array([(host, gpu) for host in range(4) for gpu in range(8)])
    fabric = Fabric(h100, coords, ())
    inside = transfer(collective("all-gather", "[4,8]<=[32]"), 1e9, fabric)
    assert inside.seconds == pytest.approx(7e9 / h100.link_bytes_per_s, rel=1e-3)
    across = transfer(collective("all-gather", "[1,32]<=[32]"), 1e9, fabric)
    assert across.network_seconds == pytest.approx(24e9 / (8 * h100.network_bytes_per_s))
    alone = transfer(collective("all-gather", "[8,4]<=[4,8]T(1,0)"), 1e9, fabric)
    assert alone.seconds == pytest.approx(3e9 / h100.network_bytes_per_s)


@pytest.mark.parametrize("chip", [V5P, CHIPS["tpu7x"]], ids=lambda chip: chip.name)
def test_slices_share_the_network(chip: Chip):
    inner = np.repeat(cube((2, 2, 1)).coords, chip.devices_per_chip, axis=0)
    coords = np.concatenate([inner + np.array([number, 0, 0, 0]) for number in range(2)])
    fabric = Fabric(chip, coords, (False,) * 3)
    # Every device sends 1 GB, those of one chip over its network together.
    seconds = 1e9 * chip.devices_per_chip / chip.network_bytes_per_s
    groups = f"[{len(inner)},2]<=[2,{len(inner)}]T(1,0)"
    assert transfer(collective("all-reduce", groups), 1e9, fabric).seconds == pytest.approx(seconds)
    assert transfer(collective("all-to-all", groups), 2e9, fabric).seconds == pytest.approx(seconds)
    pairs = ",".join(f"{{{device},{device + len(inner)}}}" for device in range(len(inner)))
    step = parse_instruction(f"  %p = f32[8]{{0}} collective-permute(%x), source_target_pairs={{{pairs}}}")
    assert transfer(step, 1e9, fabric).seconds == pytest.approx(seconds)
