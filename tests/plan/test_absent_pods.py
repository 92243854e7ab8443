"""Programs of known cost, compiled for real topologies that are not there. Needs the extra `plan`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tml.plan.cost import MATMUL
from tml.plan.estimate import Estimate, estimate
from tml.plan.hlo import parse
from tml.plan.topology import Topology, open_topology

LAYERS, ROWS, WIDTH = 5, 32_768, 4_096
"""So many rows that multiplying is what takes time, also where libtpu cuts matmuls in two to hide their gathers."""
WHOLE_GATHERS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
"""Has libtpu leave them whole."""

pytestmark = pytest.mark.slow


def planned(topology: Topology, **options: str) -> Estimate:
    """A scan of matmuls with its gradient: rows split over all devices, weights too, gathered in each layer."""
    devices = np.array(topology.devices)
    mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))

    def loss(w_LDD: jax.Array, x_BD: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_LDD)[0])

    def place(shape: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    args = place((LAYERS, WIDTH, WIDTH), None, "data"), place((ROWS, WIDTH), "data")
    compiled = jax.jit(jax.grad(loss)).lower(*args).compile({**topology.compiler_options, **options})
    return estimate(parse(compiled.as_text()), topology.fabric(list(devices)))


@pytest.mark.parametrize(("name", "package"), [("v5p:2x2x2", "libtpu"), ("h100:1x1x8", "jax_cuda12_plugin")])
def test_a_scan_of_matmuls_on_a_pod(name: str, package: str):
    pytest.importorskip(package)
    topology = open_topology(name)
    found = planned(topology)
    matmuls = [line for line in found.lines if line.flops]
    # Forward, and the gradient of the input in all layers but the first, of the weights in all; XLA may do one more.
    once = 2 * ROWS * WIDTH * WIDTH / 8
    flops = sum(line.flops for line in matmuls)
    assert 3 * LAYERS - 1 <= flops / once <= 3 * LAYERS
    seconds = sum(line.core_seconds for line in matmuls)
    assert 1.0 <= seconds / (flops / topology.chip.peak_flops_per_s) < 1.3
    assert MATMUL in found.by_category()
    gathered = planned(topology, **(WHOLE_GATHERS if topology.chip.is_tpu else {})).by_category()["all-gather"]
    # Each device receives what it lacks of every layer's weights, forward and backward.
    assert gathered.transfer_bytes == pytest.approx(2 * LAYERS * 2 * WIDTH * WIDTH * 7 / 8, rel=0.01)
    assert found.lower_seconds <= found.seconds
    assert not found.unknown


def test_two_slices_are_joined_by_the_network():
    pytest.importorskip("libtpu")
    topology = open_topology("v5p:2x2x1", num_slices=2)
    assert topology.num_chips == 8
    coords = topology.fabric(list(topology.devices)).coords
    assert sorted(set(coords[:, 0].tolist())) == [0, 1]


def test_slices_of_gpus_are_in_the_name():
    pytest.importorskip("jax_cuda12_plugin")
    topology = open_topology("h100:2x1x4")
    assert (topology.num_slices, topology.num_chips) == (2, 8)


@pytest.mark.parametrize(
    ("name", "chips", "wraps"),
    [
        ("v5p:8x8x8", 512, (True, True, True)),
        ("v6e:16x16", 256, (True, True)),
        ("tpu7x:4x8x8", 256, (True, True, True)),
        ("v5e:4x4", 16, (False, False)),
        ("v5p:2x4x4", 32, (False, False, False)),
    ],
)
def test_topologies_have_their_chips_and_rings(name: str, chips: int, wraps: tuple[bool, ...]):
    pytest.importorskip("libtpu")
    topology = open_topology(name)
    assert topology.num_chips == chips
    assert topology.wraps == wraps
    coords = topology.fabric(list(topology.devices)).coords
    assert len(np.unique(coords, axis=0)) == chips
