"""Training on a mesh of 8 virtual devices: gradients against one device, and the collectives of the compiled step."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from made_up import made_up_batch, made_up_experiment
from tiny import randomised

from tml.batch import Batch
from tml.config import (
    AttentionConfig,
    AudioOutConfig,
    Experiment,
    ExpertDispatch,
    FlowConfig,
    LossConfig,
    MatmulBackend,
    MeshConfig,
    MtpConfig,
    OptimConfig,
    Optimizer,
    Remat,
    VideoConfig,
)
from tml.mesh import batch_sharding, copy_axes, make_mesh, param_sharding, split_axes
from tml.microturn import Kind
from tml.model import expert_dispatch, transformer
from tml.ops.collectives import PACK_LANES, with_next
from tml.ops.grouped_matmul import tpu_kernels
from tml.params import PyTree, init_params, spec_leaves
from tml.train_step import abstract_state, make_gradients, make_train_step, to_devices

OWN_SLOTS = (5, 6, 7, 8, 9, 15, 16, 17, 24)
GATHERED, RING, RAGGED = ExpertDispatch.GATHERED_WEIGHTS, ExpertDispatch.RING, ExpertDispatch.RAGGED_ALL_TO_ALL


def an_experiment(
    mesh: MeshConfig, dispatch: ExpertDispatch = GATHERED, block: int = 0, row_parts: int = 1, **moe
) -> Experiment:
    """A sliding dense and a global mixture layer, with eyes, a voice and blocks ahead; the vocabulary has padding."""
    plain = made_up_experiment()
    model = dataclasses.replace(
        plain.model,
        num_layers=2,
        num_dense_layers=1,
        global_layers=(1,),
        d_model=16,
        unpadded_vocab_size=30,
        mup_width_multiplier=2.0,
        row_parts=row_parts,
        remat=Remat.EXPERTS if row_parts > 1 else Remat.NONE,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=13, global_extent=20, rel_rank=2),
        moe=dataclasses.replace(plain.model.moe, dispatch=dispatch, capacity_factor=8.0, **moe),
        mtp=MtpConfig(num_blocks=2, global_blocks=(1,)),
        video=VideoConfig(tile_px=4, fold_px=(2, 2), fold_dims=(8, 12), max_tiles_per_turn=1),
        audio_out=AudioOutConfig(
            frames_per_position=2,
            num_mels=3,
            feedback_levels=4,
            flow=FlowConfig(width=16, num_blocks=1, num_draws=2, condition_dropout=0.3),
        ),
    )
    return dataclasses.replace(
        plain,
        model=model,
        mesh=mesh,
        loss=LossConfig(z_loss_weight=1e-2, mtp_weight=0.7, audio_weight=0.6, vocab_block=block),
    )


def a_batch(experiment: Experiment) -> Batch:
    batch = made_up_batch(experiment, 0)
    drawn = np.random.default_rng(5)
    video, rows = experiment.model.video, batch.tokens_BS.shape[0]
    shape = (rows, 2, video.frames_per_tile, video.tile_px, video.tile_px, 3)
    batch.kinds_BS[:, [4, 21]] = Kind.TILE
    batch.tile_index_BS[:, 21] = 1
    assert batch.own is not None
    # Rows speak at some of these slots: at borders of a sequence that is split by 2 and 4, and in its last part.
    for row in range(rows):
        slots = np.flatnonzero(drawn.random(len(OWN_SLOTS)) < 0.7)
        places = np.array(OWN_SLOTS)[slots]
        batch.kinds_BS[row, places] = Kind.OWN_AUDIO
        batch.own.places_BP[row, : len(places)] = places
    batch.own.mels_BPY[:] = drawn.standard_normal(batch.own.mels_BPY.shape)
    batch.own.seeds_BP[:] = drawn.integers(0, 2**32, batch.own.seeds_BP.shape)
    tokens = batch.tokens_BS % experiment.model.num_logits
    targets = batch.targets_BS % experiment.model.num_logits
    return batch.replace(tiles_BP=drawn.integers(-1, 256, shape).astype(np.int16), tokens_BS=tokens, targets_BS=targets)


@functools.cache
def some_params(num_layers: int) -> PyTree:
    model = an_experiment(MeshConfig()).model
    model = dataclasses.replace(model, num_layers=num_layers, global_layers=tuple(range(1, num_layers)))
    return jax.device_get(randomised(init_params(transformer.specs(model), jax.random.key(0))))


def gradients_of(experiment: Experiment) -> tuple[PyTree, dict[str, float], np.ndarray, int]:
    mesh = make_mesh(experiment.mesh, jax.devices()[: experiment.mesh.num_devices])
    params = jax.device_put(
        some_params(experiment.model.num_layers), param_sharding(transformer.specs(experiment.model), mesh)
    )
    found = jax.jit(make_gradients(experiment, mesh))(params, to_devices(a_batch(experiment), mesh))
    grads, sums, load = jax.device_get(found)
    means = {name: float(mean.total) / max(float(mean.count), 1.0) for name, mean in sums.items()}
    return grads, means, load.copies_E, int(load.num_dropped.sum())


def test_what_follows_a_device_is_what_follows_in_the_row() -> None:
    rows = np.random.default_rng(0).standard_normal((2, 8, 3)).astype(np.float32)
    for context in (1, 2, 4):
        for num_slots in (1, 3, 5):
            sizes = MeshConfig(context=context)
            mesh = make_mesh(sizes, jax.devices()[:context])
            split = PartitionSpec(None, "context")
            longer = jax.shard_map(
                functools.partial(with_next, num_slots=num_slots, fill=7, mesh=sizes),
                mesh=mesh, in_specs=split, out_specs=split, check_vma=False,
            )  # fmt: skip
            padded = np.pad(rows, ((0, 0), (0, num_slots), (0, 0)), constant_values=7)
            local = 8 // context
            parts = [padded[:, start : start + local + num_slots] for start in range(0, 8, local)]
            np.testing.assert_array_equal(jax.jit(longer)(rows), np.concatenate(parts, axis=1))


@functools.cache
def reference() -> tuple[PyTree, dict[str, float], np.ndarray, int]:
    """Every expert on every token, on one device, in float32."""
    return gradients_of(an_experiment(MeshConfig(), backend=MatmulBackend.DENSE))


def assert_equals_the_reference(experiment: Experiment) -> None:
    grads, means, load, num_dropped = gradients_of(experiment)
    expected, expected_means, expected_load, _ = reference()
    assert num_dropped == 0
    np.testing.assert_array_equal(load, expected_load)
    assert means.keys() == expected_means.keys()
    for name, value in expected_means.items():
        np.testing.assert_allclose(means[name], value, rtol=1e-4, err_msg=name)
    names = [name for name, _ in spec_leaves(transformer.specs(experiment.model))]
    for name, found, wanted in zip(names, jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert np.any(wanted) or "router_bias" in name, f"{name} has no gradient: it proves nothing"
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=2e-5 * np.abs(wanted).max() + 1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("dispatch", "sizes", "block", "row_parts"),
    [
        (RING, {"replica": 2, "fsdp": 2, "expert": 2}, 10, 2),
        (RAGGED, {"expert": 2, "context": 2, "tensor": 2}, 0, 1),
    ],
)
def test_gradients_equal_those_of_one_device(
    dispatch: ExpertDispatch, sizes: dict[str, int], block: int, row_parts: int
) -> None:
    assert_equals_the_reference(an_experiment(MeshConfig(**sizes), dispatch, block, row_parts))


@pytest.mark.parametrize(
    "remat",
    [Remat.EXPERTS, pytest.param(Remat.NONE, marks=pytest.mark.slow)],
)
def test_gradients_by_the_kernels_of_tpus_equal_those_of_one_device(
    remat: Remat, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreted = tpu_kernels(unit=8, interpret=True)
    monkeypatch.setattr(expert_dispatch, "kernels_of", lambda backend, usual_rows: interpreted)
    experiment = an_experiment(MeshConfig(fsdp=2, expert=4), RING, 10, backend=MatmulBackend.TPU)
    model = dataclasses.replace(experiment.model, remat=remat)
    assert_equals_the_reference(dataclasses.replace(experiment, model=model))


@pytest.mark.slow
@pytest.mark.parametrize("remat", [Remat.NONE, Remat.EXPERTS])
def test_layers_written_out_on_a_mesh_equal_the_loop(remat: Remat) -> None:
    experiment = an_experiment(MeshConfig(fsdp=2, expert=2), RING)
    model = dataclasses.replace(experiment.model, num_layers=3, global_layers=(1, 2), remat=remat)
    looped, written_out = (
        gradients_of(dataclasses.replace(experiment, model=dataclasses.replace(model, scan_layers=scan)))
        for scan in (True, False)
    )
    np.testing.assert_array_equal(written_out[2], looped[2])
    for found, wanted in zip(jax.tree.leaves(written_out[0]), jax.tree.leaves(looped[0]), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=2e-5 * np.abs(wanted).max() + 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", list(ExpertDispatch))
@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 8},
        {"expert": 4, "fsdp": 2},
        {"expert": 4, "context": 2},
        {"expert": 2, "context": 4},
        {"fsdp": 2, "context": 2, "tensor": 2},
        {"replica": 2, "fsdp": 2, "expert": 2},
        {"replica": 2, "expert": 4},
        {"fsdp": 2, "expert": 2, "context": 2},
        {"fsdp": 4, "tensor": 2},
    ],
    ids=lambda sizes: " ".join(f"{axis}{size}" for axis, size in sizes.items()),
)
def test_gradients_equal_those_of_one_device_on_every_mesh(dispatch: ExpertDispatch, sizes: dict[str, int]) -> None:
    experiment = an_experiment(MeshConfig(**sizes), dispatch, 10)
    remat = Remat.LAYER if "context" in sizes else Remat.NONE
    assert_equals_the_reference(
        dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, remat=remat))
    )


COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter)(?:-start)?\(")


def collectives_of(experiment: Experiment) -> list[tuple[str, list[tuple[int, ...]], bool]]:
    """Kind, shapes and place (in a scan or not) of the collectives of the compiled train step."""
    mesh = make_mesh(experiment.mesh, jax.devices()[: experiment.mesh.num_devices])
    batch = jax.tree.map(
        lambda rows, sharding: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=sharding),
        made_up_batch(experiment, 0),
        batch_sharding(mesh),
    )
    step = make_train_step(experiment, mesh).lower(abstract_state(experiment, mesh), batch)
    found = []
    for line in step.compile().as_text().splitlines():
        match = COLLECTIVE.search(line)
        if match:
            shapes = [
                tuple(int(size) for size in shape.split(",") if size)
                for shape in re.findall(r"\w+\[([\d,]*)\]", match[1])
            ]
            found.append((match[2], shapes, "while/body" in line))
    return found


def test_weights_are_gathered_in_their_layer_and_gradients_leave_by_reduce_scatter() -> None:
    plain = made_up_experiment(
        mesh=MeshConfig(fsdp=4, expert=2), optim=OptimConfig(optimizer=Optimizer.ADAMW, warmup_steps=2)
    )
    # Sizes that no two dimensions share, so that a shape tells which parameter it is; those of some travel alone.
    attention = dataclasses.replace(plain.model.attention, num_heads=4, head_dim=32)
    model = dataclasses.replace(plain.model, num_layers=3, d_model=48, vocab_size=384, attention=attention)
    experiment = dataclasses.replace(plain, model=model)
    collectives = collectives_of(experiment)
    specs = dict(spec_leaves(transformer.specs(model)))
    split = {path: spec for path, spec in specs.items() if copy_axes(spec, experiment.mesh) == ()}
    alone = {"unembed", "embed/tokens/table", "stages/0/0/attention/q", "stages/0/0/mlp/gate_up"}
    assert alone <= split.keys()

    found = {(kind, shape, in_scan) for kind, shapes, in_scan in collectives for shape in shapes}
    reduced = {shape for kind, shape, _ in found if kind == "all-reduce"}
    num_devices = experiment.mesh.num_devices
    for path, spec in split.items():
        is_layer = path.startswith("stages")
        whole = spec.shape[1:] if is_layer else spec.shape
        parts = tuple(
            size // experiment.mesh.product(axes)
            for size, axes in zip(spec.shape, split_axes(spec, experiment.mesh), strict=True)
        )
        part = parts[1:] if is_layer else parts
        assert not reduced & {spec.shape, whole, parts, part}, path
        assert not is_layer or ("all-gather", spec.shape, False) not in found, path
    for path in alone:
        is_layer = path.startswith("stages")
        shape = split[path].shape[1:] if is_layer else split[path].shape
        if path.endswith("gate_up"):
            # Experts come from one axis, and behind them their model dimension from the other.
            joined, part = (*shape[:2], math.prod(shape[2:])), (shape[0] // 2, math.prod(shape[1:]) // 4)
        else:
            others = math.prod(shape) // model.d_model
            joined, part = (model.d_model, others), (model.d_model // num_devices, others)
        assert ("all-gather", joined, is_layer) in found, path
        assert ("reduce-scatter", part, is_layer) in found, path
    # The rest of a layer travels in one message, as does the rest outside: nothing is left to travel by itself.
    packed = [
        shape for kind, shape, in_scan in found if kind == "all-gather" and in_scan and shape[1:] == (PACK_LANES,)
    ]
    assert packed
    sizes = {(len(shape), kind) for kind, shape, _ in found if kind == "reduce-scatter"}
    assert all(rank > 1 for rank, _ in sizes), "no vector is scattered by itself"
