"""Devices that are not here, for which the real TPU and GPU compilers can compile all the same."""

import os

import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

H100_SXM = """
platform_name: "CUDA"
device_description_str: "sm_90"
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
"""
"""Figures of an H100 SXM, as openxla keeps them under xla/backends/gpu/target_config/specs."""


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


def h100() -> SingleDeviceSharding:
    """One absent H100."""
    pytest.importorskip("jax_plugins.xla_cuda12", reason="compiling for GPU needs jax-cuda12-plugin")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100_SXM, topology="1x1x1")
    return SingleDeviceSharding(topology.devices[0])
