"""Devices that are not here, for which the real TPU and GPU compilers can compile all the same."""

import os

import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tml.plan.chips import GPUS


def tpu(topology: str) -> SingleDeviceSharding:
    """One core of an absent TPU slice, for example v5p:2x2x1."""
    pytest.importorskip("libtpu", reason="compiling for TPU needs the package libtpu")
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_ACCELERATOR_TYPE="v5p-8",
        TPU_WORKER_HOSTNAMES="localhost",
    )
    return SingleDeviceSharding(topologies.get_topology_desc(topology, "tpu").devices[0])


def gpu(name: str) -> SingleDeviceSharding:
    """One absent GPU, as the planner describes it."""
    pytest.importorskip("jax_plugins.xla_cuda12", reason="compiling for GPU needs jax-cuda12-plugin")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    target = GPUS[name].target_config()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    return SingleDeviceSharding(topology.devices[0])
