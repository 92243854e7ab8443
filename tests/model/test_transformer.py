"""The network: stages, packing, causality, expert back-ends, balance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised, rows_of, tiny_layout, tiny_model, tiny_session

from tml.config import ComputeDtype, MatmulBackend, ModelConfig, Remat
from tml.model import transformer
from tml.params import init_params, map_specs, spec_leaves


def params_of(model: ModelConfig):
    return randomised(init_params(transformer.specs(model), jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=2)
def run(params, batch, model: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Logits and load; one program a model and a shape, for all tests."""
    outputs = transformer.apply(params, batch, model)
    return outputs.logits_BSV, outputs.expert_load_LE


def logits_of(params, batch, model) -> np.ndarray:
    return np.asarray(run(params, batch, model)[0])


@pytest.mark.parametrize(
    ("layers", "dense", "global_layers", "expected"),
    [
        (44, 2, tuple(range(7, 44, 6)), [1, 1, 7]),
        (42, 2, tuple(range(5, 42, 6)), [1, 1, 1, 1, 1, 1, 6]),
        (4, 0, (), [4]),
        (5, 1, (2, 4), [1, 2]),
    ],
)
def test_stages_cover_the_stack_in_order(layers: int, dense: int, global_layers: tuple, expected: list[int]) -> None:
    model = ModelConfig(num_layers=layers, num_dense_layers=dense, global_layers=global_layers)
    stages = transformer.layer_stages(model)
    assert [stage.repeats for stage in stages] == expected
    assert tuple(kind for stage in stages for _ in range(stage.repeats) for kind in stage.kinds) == (
        transformer.layer_kinds(model)
    )


def test_scanned_groups_equal_single_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    layout = tiny_layout(model)
    batch = rows_of(model, layout, [[tiny_session(model, 8)]], 100)
    params = params_of(model)
    scanned = logits_of(params, batch, model)
    singles = tuple(transformer.Stage((kind,), 1) for kind in transformer.layer_kinds(model))
    first, group = params["stages"][0], params["stages"][1]
    unstacked = [[jax.tree.map(lambda leaf, r=r: leaf[r : r + 1], layer)] for r in range(2) for layer in group]
    monkeypatch.setattr(transformer, "layer_stages", lambda cfg: singles)
    np.testing.assert_allclose(logits_of({**params, "stages": [first, *unstacked]}, batch, model), scanned, atol=1e-5)


def test_a_packed_row_equals_each_segment_alone() -> None:
    model = tiny_model()
    layout = tiny_layout(model)
    sessions = [tiny_session(model, turns, seed) for seed, turns in enumerate([6, 7, 9])]
    params = params_of(model)
    rows = [sessions, *([session] for session in sessions)]
    packed, *alone = logits_of(params, rows_of(model, layout, rows, 280), model)
    first = 0
    for index, session in enumerate(sessions):
        size = layout.lay_out(layout.contents(session)).num_slots
        np.testing.assert_allclose(packed[first : first + size], alone[index][:size], atol=1e-5)
        first += size


def test_nothing_after_a_position_moves_it() -> None:
    model = tiny_model()
    layout = tiny_layout(model)
    batch = rows_of(model, layout, [[tiny_session(model, 10)]], 100)
    params = params_of(model)
    before = logits_of(params, batch, model)
    changed = dataclasses.replace(
        batch,
        tokens_BS=np.where(np.arange(100)[None] > 50, 13, batch.tokens_BS),
        levels_BSM=np.where((np.arange(100) > 50)[None, :, None], 1, batch.levels_BSM).astype(np.uint8),
    )
    after = logits_of(params, changed, model)
    np.testing.assert_array_equal(after[:, :51], before[:, :51])
    assert np.abs(after[:, 51:] - before[:, 51:]).max() > 1e-3


# A dense layer, then twice two sliding ones and a global one.
RUNS = {"num_layers": 7, "num_dense_layers": 1, "global_layers": (3, 6)}


@functools.partial(jax.jit, static_argnums=2)
@jax.value_and_grad
def value_and_grads(params, batch, model: ModelConfig) -> jax.Array:
    return jnp.mean(jnp.square(transformer.apply(params, batch, model).logits_BSV))


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        pytest.param({}, {"remat": Remat.LAYER}, marks=pytest.mark.slow),
        (RUNS, {"moe": dataclasses.replace(tiny_model().moe, backend=MatmulBackend.DENSE)}),
        (RUNS, {"remat": Remat.EXPERTS, "row_parts": 2}),
        (RUNS, {"scan_layers": False}),
        (RUNS, {"scan_layers": False, "remat": Remat.LAYER}),
    ],
    ids=["recomputed", "dense", "loops over equal layers, in parts of rows", "written out", "written out, recomputed"],
)
def test_equal_value_and_gradients_whichever_way_it_runs(shape: dict, changes: dict) -> None:
    model = dataclasses.replace(tiny_model(), **shape)
    batch = rows_of(model, tiny_layout(model), [[tiny_session(model, 6)], [tiny_session(model, 5, 3)]], 64)
    params = params_of(model)

    value, grads = value_and_grads(params, batch, model)
    value_2, grads_2 = value_and_grads(params, batch, dataclasses.replace(model, **changes))
    np.testing.assert_allclose(value, value_2, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), grads, grads_2)
    names = [name for name, _ in spec_leaves(transformer.specs(model))]
    dead = [name for name, grad in zip(names, jax.tree.leaves(grads), strict=True) if not np.any(grad)]
    assert all("router_bias" in name for name in dead), dead


@pytest.mark.parametrize(("remat", "num_routers"), [(Remat.NONE, 3), (Remat.EXPERTS, 2)])
def test_layers_are_a_loop_or_written_out(remat: Remat, num_routers: int) -> None:
    looped = dataclasses.replace(tiny_model(), **RUNS, remat=remat)
    batch = rows_of(looped, tiny_layout(looped), [[tiny_session(looped, 6)]], 64)
    specs = map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), transformer.specs(looped))
    programs = [
        str(jax.make_jaxpr(transformer.apply, static_argnums=2)(specs, batch, model))
        for model in (looped, dataclasses.replace(looped, scan_layers=False))
    ]
    assert [program.count("top_k[") for program in programs] == [num_routers, 6]


def test_load_counts_only_real_positions_and_the_bias_follows_it() -> None:
    model = tiny_model()
    batch = rows_of(model, tiny_layout(model), [[tiny_session(model, 6)]], 64)
    params = params_of(model)
    _, load = run(params, batch, model)
    real = int((batch.segment_ids_BS > 0).sum())
    np.testing.assert_array_equal(np.asarray(load).sum(axis=1), [2.0 * real] * 4)
    made_up = jnp.asarray([[4.0, 0, 2, 2], [1, 1, 1, 1], [0, 0, 0, 8], [3, 1, 0, 0]])
    moved = transformer.move_router_bias(params, made_up, model)
    rate = np.float32(model.moe.balance_rate)
    steps = [
        np.asarray(new["mlp"]["router_bias"] - old["mlp"]["router_bias"]) / rate
        for new, old in zip(moved["stages"][1], params["stages"][1], strict=True)
    ]
    np.testing.assert_allclose(np.round(steps[0], 2), [[-1, 1, 0, 0], [1, 1, 1, -1]], atol=0.02)
    np.testing.assert_allclose(np.round(steps[1], 2), [[0, 0, 0, 0], [-1, 0, 1, 1]], atol=0.02)


def test_bfloat16_stays_near_float32() -> None:
    model = tiny_model()
    batch = rows_of(model, tiny_layout(model), [[tiny_session(model, 6)]], 64)
    params = init_params(transformer.specs(model), jax.random.key(0))
    exact = logits_of(params, batch, model)
    rounded = logits_of(params, batch, dataclasses.replace(model, compute_dtype=ComputeDtype.BFLOAT16))
    assert np.corrcoef(exact.ravel(), rounded.ravel())[0, 1] > 0.99
