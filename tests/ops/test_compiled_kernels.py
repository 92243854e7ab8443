"""The kernels through the real compilers of targets that are not here, and the costs that they state."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from absent_targets import gpu, tpu

from tml.config import AttentionBackend, MatmulBackend
from tml.ops.attention import attend
from tml.ops.expert_rows import multiply_sorted
from tml.ops.grouped_matmul import LAYER_KERNELS, grouped_matmul, kernels_of
from tml.ops.sorted_copies import sort_copies

SLOTS, HEADS, KV_HEADS, HEAD_DIM, RANK = 1_024, 4, 2, 128, 16
TARGETS = {
    "v5p": (lambda: tpu("v5p:2x2x1"), "tpu", None),
    "v5e": (lambda: tpu("v5e:2x2"), "tpu", None),
    "v6e": (lambda: tpu("v6e:2x2"), "tpu", None),
    "h100": (lambda: gpu("h100"), "gpu", {"xla_gpu_autotune_level": 0}),
    "b200": (lambda: gpu("b200"), "gpu", {"xla_gpu_autotune_level": 0}),
}


def shapes_of_attention(extent: int, sharding=None) -> list[jax.ShapeDtypeStruct]:
    shapes = [
        (1, SLOTS, HEADS, HEAD_DIM),
        (1, SLOTS, KV_HEADS, HEAD_DIM),
        (1, SLOTS, KV_HEADS, HEAD_DIM),
        (1, SLOTS, HEADS, RANK),
        (RANK, extent),
    ]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    return [*arrays, jax.ShapeDtypeStruct((1, SLOTS), jnp.int32, sharding=sharding)]


def forward_and_backward(function: Callable, *arrays):
    *arrays, integers = arrays
    out, vjp = jax.vjp(lambda *a: function(*a, integers), *arrays)
    return out, vjp(out)


@pytest.mark.slow
@pytest.mark.parametrize("window", [128, None])
@pytest.mark.parametrize("target", TARGETS)
def test_attention_compiles_without_a_square_of_slots(target: str, window: int | None) -> None:
    device, backend, options = TARGETS[target]
    arrays = shapes_of_attention(128 if window else 256, device())
    run = jax.jit(
        lambda *a: forward_and_backward(lambda *b: attend(*b, window, AttentionBackend(backend)), *a),
    )
    memory = run.lower(*arrays).compile(compiler_options=options).memory_analysis()
    assert memory.temp_size_in_bytes < HEADS * SLOTS * SLOTS * 2


@pytest.mark.slow
def test_the_way_back_over_rows_of_32768_fits_the_memory_of_a_core() -> None:
    shapes = [(1, 32_768, 4, 128), (1, 32_768, 1, 128), (1, 32_768, 1, 128), (1, 32_768, 4, RANK), (RANK, 1_024)]
    sharding = tpu("v5p:2x2x1")
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    segments = jax.ShapeDtypeStruct((1, 32_768), jnp.int32, sharding=sharding)
    run = jax.jit(lambda *a: forward_and_backward(lambda *b: attend(*b, None, AttentionBackend.TPU), *a))
    run.lower(*arrays, segments).compile()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_grouped_matmul_compiles(target: str) -> None:
    device, backend, options = TARGETS[target]
    sharding = device()
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype in (((1_000, 256), jnp.bfloat16), ((4, 256, 384), jnp.bfloat16), ((4,), jnp.int32))
    ]
    run = jax.jit(
        lambda *a: forward_and_backward(lambda x, w, sizes: grouped_matmul(x, w, sizes, MatmulBackend(backend)), *a)
    )
    # Beyond the gradients themselves: no expert's product for every row.
    memory = run.lower(*arrays).compile(compiler_options=options).memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 1_000 * 384 * 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("target", TARGETS)
def test_experts_over_sorted_rows_compile(target: str, dtype: jnp.dtype) -> None:
    device, backend, options = TARGETS[target]
    sharding = device()
    shapes = ((1_000, 256), (1_000, 2), (4, 256, 2 * 384), (4, 256, 384))
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in shapes]
    experts = jax.ShapeDtypeStruct((1_000, 2), jnp.int32, sharding=sharding)

    def run(x, gates, gate_up, down, experts):
        plan, gate_R = sort_copies(experts, gates, 4, 1_500)
        return multiply_sorted(kernels_of(MatmulBackend(backend)), None, None, x, gate_R, gate_up, down, plan, ())

    jax.jit(lambda *a: forward_and_backward(run, *a)).lower(*arrays, experts).compile(compiler_options=options)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_layer_of_a_stack_is_read_where_it_is(target: str) -> None:
    device, backend, options = TARGETS[target]
    sharding = device()
    shapes = (((96, 256), jnp.bfloat16), ((3, 8, 2, 256, 384), jnp.bfloat16), ((), jnp.int32), ((8,), jnp.int32))
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    run = jax.jit(functools.partial(LAYER_KERNELS[MatmulBackend(backend)], usual_groups=5.0))
    memory = run.lower(*arrays).compile(compiler_options=options).memory_analysis()
    # Not even one expert of one layer is cut out.
    assert memory.temp_size_in_bytes < 2 * 2 * 256 * 384


def stated_flops(function: Callable, *arrays) -> list[int]:
    """The FLOPs that every Pallas call of a function states, in order."""

    def calls(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                yield eqn.params["cost_estimate"].flops
            else:
                for value in eqn.params.values():
                    inner = getattr(value, "jaxpr", value)
                    yield from calls(inner) if hasattr(inner, "eqns") else ()

    return list(calls(jax.make_jaxpr(function)(*arrays).jaxpr))


def test_attention_on_tpu_states_what_it_computes() -> None:
    stated = stated_flops(
        lambda *a: forward_and_backward(lambda *b: attend(*b, 512, AttentionBackend.TPU), *a), *shapes_of_attention(512)
    )
    # One tile of 640 keys for each of 8 blocks of 128 queries, and a strip of 768 distances.
    tile, strip = 128 * 640 * HEAD_DIM, 128 * 768 * (RANK + 16)
    assert stated == [2 * HEADS * 8 * (2 * tile + strip), 2 * HEADS * 8 * (5 * tile + 3 * strip)]


def test_attention_on_gpu_states_what_it_computes() -> None:
    stated = stated_flops(
        lambda *a: forward_and_backward(lambda *b: attend(*b, None, AttentionBackend.GPU), *a),
        *shapes_of_attention(128),
    )
    # 16 blocks of 64: block i meets i + 1, and the bias reaches the nearest three at most.
    visited, near = sum(range(1, 17)), 1 + 2 + 14 * 3
    pair, strip = 64 * 64 * HEAD_DIM, 64 * 128 * RANK
    expected = [
        2 * visited * pair + near * strip,
        3 * visited * pair + 3 * near * strip,
        4 * visited * pair + near * strip,
    ]
    assert stated == [2 * HEADS * flops for flops in expected]
