"""Where live sessions run: the devices that share one model, and what each of them holds."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tml.config import MatmulBackend, MeshConfig, ModelConfig, StreamConfig
from tml.mesh import make_mesh, param_sharding
from tml.model import embed, transformer
from tml.params import ParamSpec, PyTree, Update, map_specs


def stream_mesh(model: ModelConfig, stream: StreamConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the devices that share a model.

    All of them work on the same tokens, each with its part of every expert: whichever experts are chosen, all read
    the same number of bytes. Split by experts, each layer would wait for the device whose experts are asked for most.

    Args:
        model: the model.
        stream: how many devices share it.
        devices: as many devices; the first ones of this process by default.

    Raises:
        ValueError: the model cannot be split so, the devices are too few or too many, or its kernel is not for them.
    """
    sizes = {
        "model.attention.num_kv_heads": model.attention.num_kv_heads,
        "model.attention.num_heads": model.attention.num_heads,
        "model.moe.expert_dim": model.moe.expert_dim,
        "model.dense_dim": model.dense_dim,
        "model.vocab_size": model.vocab_size,
    }
    for name, size in sizes.items():
        if size % stream.tensor:
            raise ValueError(
                f"stream.tensor = {stream.tensor} does not divide {name} = {size}; "
                f"the nearest that does is {math.gcd(size, stream.tensor)}"
            )
    devices = jax.local_devices()[: stream.tensor] if devices is None else devices
    if len(devices) != stream.tensor:
        raise ValueError(
            f"stream.tensor = {stream.tensor}, but there are {len(devices)} devices; set stream.tensor={len(devices)}"
        )
    check_backend(stream.backend, devices[0].platform)
    return make_mesh(MeshConfig(tensor=stream.tensor), devices)


def check_backend(backend: MatmulBackend, platform: str) -> None:
    """Checks that a platform has the kernel for experts of live sessions.

    Raises:
        ValueError: the kernel is written for another platform.
    """
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    if backend in (MatmulBackend.TPU, MatmulBackend.GPU) and backend.value != platform:
        raise ValueError(f"stream.backend = {backend.value} is a kernel for {backend.value}, not for {platform}")


def place_params(params: PyTree, model: ModelConfig, stream: StreamConfig) -> PyTree:
    """Puts parameters, in the dtypes of `served_params`, on the devices that share them.

    Where there is one, it is the first of this process.
    """
    params = jax.tree.map(lambda leaf, served: leaf.astype(served.dtype), params, served_params(model))
    if stream.tensor == 1:
        (device, *_) = jax.local_devices()
        check_backend(stream.backend, device.platform)
        return jax.device_put(params, device)
    return jax.device_put(params, param_sharding(transformer.specs(model.streamed), stream_mesh(model, stream)))


def served_params(model: ModelConfig) -> PyTree:
    """Parameters as a server keeps them: matrices and vocabulary tables in the compute dtype, the rest in float32."""
    dtype = embed.compute_dtype(model)

    def shape_of(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        is_large = spec.update is Update.MATRIX or "V" in spec.axes
        return jax.ShapeDtypeStruct(spec.shape, dtype if is_large else jnp.float32)

    return map_specs(shape_of, transformer.specs(model.streamed))
