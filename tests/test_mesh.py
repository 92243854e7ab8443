"""The mesh: order of devices, what each axis splits, and errors that name a mesh that fits."""

import math
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from made_up import made_up_experiment

from tml.config import MeshConfig
from tml.config.mesh import Split, fits, meshes_of, nearest_mesh
from tml.mesh import RowPart, activation_partition, copy_axes, make_mesh, partition, row_part
from tml.params import ParamSpec, param


def device_of_slice(number: int, slice_index: int, platform: str = "fake") -> mock.Mock:
    """What the construction of a mesh reads of a device."""
    return mock.Mock(
        spec=jax.Device, id=number, slice_index=slice_index, process_index=0, platform=platform, device_kind="fake"
    )


def spec(layout: str, **sizes: int) -> ParamSpec:
    return param(layout, sizes, fan_in=layout.split()[0])


def test_slices_lie_along_replica():
    # In the order of no slice: the mesh sorts them.
    devices = [device_of_slice(number, number % 2) for number in range(8)]
    mesh = make_mesh(MeshConfig(replica=4, fsdp=2), devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices).reshape(4, 2)
    np.testing.assert_array_equal(slices, [[0, 0], [0, 0], [1, 1], [1, 1]])
    with pytest.raises(
        ValueError, match=r"replica = 1 is not a multiple of the 2 slices.* is {'replica': 2, 'fsdp': 4"
    ):
        make_mesh(MeshConfig(fsdp=8), devices)


def test_a_mesh_that_is_named_for_slices_lies_across_them():
    splits = [Split("rows", 4, ("replica", "fsdp"))]
    found = nearest_mesh(MeshConfig(fsdp=4, tensor=2), 8, splits, num_slices=2)
    assert found == MeshConfig(replica=2, fsdp=2, tensor=2)
    devices = [device_of_slice(number, number // 4) for number in range(8)]
    with pytest.raises(ValueError, match=r"needs 4 devices, but there are 8; .* is {'replica': 2, 'fsdp': 2, "):
        make_mesh(MeshConfig(fsdp=4), devices, splits)
    odd = [Split("rows", 3, ("replica", "fsdp", "expert", "context")), Split("heads", 1, ("tensor",))]
    with pytest.raises(ValueError, match=r"no mesh of 16 devices fits as long as rows = 3$"):
        make_mesh(MeshConfig(fsdp=4), [*devices, *devices], odd)


def test_hosts_of_gpus_are_no_slices():
    devices = [device_of_slice(number, number // 2, "gpu") for number in range(8)]
    mesh = make_mesh(MeshConfig(fsdp=4, expert=2), devices)
    assert [device.id for device in mesh.devices.flat] == [*range(8)]


def test_a_mesh_for_another_number_of_devices_names_one_that_fits():
    experiment = made_up_experiment()
    with pytest.raises(ValueError, match=r"needs 16 devices, but there are 8; .* of 8 devices is .*'tensor': 1"):
        make_mesh(MeshConfig(fsdp=16), jax.devices()[:8], experiment.splits)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 2}, r"num_kv_heads = 1 is not a multiple of mesh.tensor \(2\) = 2; the nearest valid value is 2; "),
        ({"expert": 8}, r"num_experts = 4 is not a multiple of mesh.expert \(8\) = 8; .* 'expert': 4, 'context': 1"),
        ({"context": 3}, r"row_slots = 32 is not a multiple of mesh.context \(3\) = 3; .*; no mesh of 3 devices fits"),
        ({"fsdp": 16, "context": 2}, r"d_model = 16 is not a multiple of mesh.fsdp \(16\) \* .* = 32; "),
        (
            {"tensor": 3},
            r"num_heads = 2 .* is 3; .*num_kv_heads = 1 .* is 3; .*expert_dim = 8 .*vocab_size = 32 .* no mesh of 3",
        ),
    ],
)
def test_every_split_dimension_must_divide(sizes: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        made_up_experiment(mesh=MeshConfig(**sizes))


def test_the_nearest_mesh_fits_and_changes_least():
    splits = [Split("rows", 12, ("replica", "fsdp", "expert")), Split("heads", 4, ("tensor",))]
    found = nearest_mesh(MeshConfig(fsdp=8, tensor=2), 16, splits)
    assert found == MeshConfig(fsdp=4, tensor=4)
    assert sum(1 for _ in meshes_of(16)) == math.comb(4 + 4, 4)
    assert all(mesh.num_devices == 16 for mesh in meshes_of(16))
    assert not fits(MeshConfig(fsdp=8), splits)


def test_a_parameter_uses_an_axis_once_and_all_that_are_free():
    mesh = MeshConfig(replica=2, fsdp=4, expert=2, context=2, tensor=2)
    dense, stack = spec("D Z F", D=64, Z=2, F=8), spec("E D Z F", E=8, D=64, Z=2, F=8)
    assert partition(dense, mesh) == P(("fsdp", "expert", "context"), None, "tensor")
    assert partition(stack, mesh) == P("expert", ("fsdp", "context"), None, "tensor")
    assert copy_axes(dense, mesh) == copy_axes(stack, mesh) == ("replica",)
    assert copy_axes(spec("J X", J=2, X=4), mesh) == ("replica", "fsdp", "expert", "context", "tensor")
    # The image tower is split where its widths allow.
    assert partition(spec("I O", I=75, O=128), mesh) == P(None, ("fsdp", "expert", "context"))
    with pytest.raises(ValueError, match=r"has D = 24, which mesh.fsdp \* .* = 16 does not divide.* product is 8"):
        partition(spec("D F", D=24, F=8), mesh)


def test_activations_are_split_by_rows_and_along_the_sequence():
    assert activation_partition("BSD") == P(("replica", "fsdp", "expert"), "context", None)


def grid_of(processes: list[list[int]], **sizes: int) -> mock.Mock:
    """A mesh of which `processes` says who owns each device, a row a row group."""
    devices = np.vectorize(lambda owner: mock.Mock(process_index=owner), otypes=[object])(processes)
    return mock.Mock(spec=jax.sharding.Mesh, devices=devices, shape=MeshConfig(**sizes).shape)


def test_processes_that_share_rows_load_the_same_part():
    # Groups 0 and 2 lie on processes 0 and 1, which split their sequences; 1 and 3 on processes 2 and 3.
    mesh = grid_of([[0, 1], [2, 3], [0, 1], [2, 3]], fsdp=4, context=2)
    parts = [row_part(mesh, process) for process in range(4)]
    assert parts[0] == parts[1] == RowPart(index=0, count=2, groups=(0, 2))
    assert parts[2] == parts[3] == RowPart(index=1, count=2, groups=(1, 3))
    with pytest.raises(ValueError, match=r"2 processes rows that overlap in part .*0: \(0, 1\), 1: \(1, 2\)"):
        row_part(grid_of([[0, 0], [0, 1], [1, 1]], fsdp=3, context=2), 0)
