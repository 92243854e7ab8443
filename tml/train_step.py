"""One step of training, pure: (TrainState, Batch) -> (TrainState, metrics), jitted with the state donated."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int32

from tml.batch import Batch
from tml.config import DATA_AXES, ROW_AXES, Experiment, MeshConfig, ModelConfig, check_platform
from tml.mesh import (
    batch_partition,
    batch_sharding,
    mesh_config,
    param_partition,
    param_sharding,
    replicated,
    row_part,
)
from tml.metrics import Mean
from tml.microturn import Kind
from tml.model import flow_head, head, transformer
from tml.model.moe import Load
from tml.objective import num_own, objective, objective_ahead, objective_of_audio, targets_ahead, total_weight
from tml.ops.collectives import sum_copies, sum_over
from tml.optim import learning_rate, make_optimizer
from tml.params import Leaf, PyTree, abstract_params, init_params

Sums = dict[str, Mean]
Metrics = dict[str, Mean | Float32[Array, ""] | Int32[Array, ""]]


@flax.struct.dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
        step: steps made (int32), which is also the position in the data: step k reads batch k.
        params: the parameters, router biases included.
        opt_state: moments and counts of the optimizer.
        num_skipped: steps (int32) that were not finite and changed nothing else.
    """

    step: Leaf
    params: PyTree
    opt_state: PyTree
    num_skipped: Leaf


@flax.struct.dataclass
class BatchWeight:
    """What a batch's losses are divided by.

    Attributes:
        targets: the weight of its tokens.
        own: its own audio positions; None without a voice.
    """

    targets: Leaf
    own: Leaf


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[PyTree, Batch], dict[str, Mean]]


def abstract_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without arrays. Moments live where their parameters live."""
    specs = transformer.specs(experiment.model)
    optimizer = make_optimizer(experiment.optim, experiment.train.num_steps, specs)
    counter = jax.ShapeDtypeStruct((), jnp.int32)
    param_shapes = abstract_params(specs)
    shapes = TrainState(
        step=counter,
        params=param_shapes,
        opt_state=jax.eval_shape(optimizer.init, param_shapes),
        num_skipped=counter,
    )
    params, everywhere = param_sharding(specs, mesh), replicated(mesh)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda leaf, sharding: leaf if isinstance(leaf, optax.MaskedNode) else sharding,
        shapes.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    # In the order of the fields.
    shardings = [everywhere, *jax.tree.leaves(params), *jax.tree.leaves(opt_state), everywhere]
    leaves, structure = jax.tree.flatten(shapes)
    placed = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for leaf, sharding in zip(leaves, shardings, strict=True)
    ]
    return jax.tree.unflatten(structure, placed)


def shardings_of(abstract: PyTree) -> PyTree:
    """The sharding of every leaf of a tree of `ShapeDtypeStruct`s."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def init_state(key: jax.Array, experiment: Experiment, mesh: Mesh) -> TrainState:
    """Draws the first state; every array is born on the devices where it will live."""
    specs = transformer.specs(experiment.model)
    return first_state(init_params(specs, key, param_sharding(specs, mesh)), experiment, mesh)


def first_state(params: PyTree, experiment: Experiment, mesh: Mesh) -> TrainState:
    """The state of a run that begins with these parameters: a new optimizer, no step made."""
    optimizer = make_optimizer(experiment.optim, experiment.train.num_steps, transformer.specs(experiment.model))
    shardings = shardings_of(abstract_state(experiment, mesh))
    return TrainState(
        step=jax.device_put(jnp.int32(0), shardings.step),
        params=params,
        opt_state=jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params),
        num_skipped=jax.device_put(jnp.int32(0), shardings.num_skipped),
    )


def make_train_step(experiment: Experiment, mesh: Mesh) -> TrainStep:
    """Builds the step.

    Rows of a batch are taken in `grad_accum_steps` parts, whose gradients add up to those of
    the whole. A loss or gradient that is not finite leaves parameters and moments as they were.

    Returns:
        The jitted step. Its metrics: `loss`, `loss_STREAM`, `accuracy_GROUP`, `tokens` (positions
        that are not padding), `fill` (their share), `grad_norm` (before clipping), `lr`,
        `num_skipped`, with multi-token prediction `loss_mtp`, with a voice `loss_audio`, and with experts `load_cv`,
        `load_max_over_mean` and `dropped_fraction` (of all copies, padding's included).

    Raises:
        ValueError: the model's kernels are for another platform than the mesh's.
    """
    model = experiment.model
    check_platform(model, mesh.devices.flat[0].platform)
    specs = transformer.specs(model)
    num_steps = experiment.train.num_steps
    optimizer = make_optimizer(experiment.optim, num_steps, specs)
    rate = learning_rate(experiment.optim, num_steps)
    gradients = make_gradients(experiment, mesh)
    balance = _balance_metrics if model.num_dense_layers < model.num_layers else _no_metrics

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, sums, load = gradients(state.params, batch)
        grad_norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums["loss"].total)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            params = transformer.move_router_bias(params, load.copies_E, model)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(is_finite, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
        num_skipped = state.num_skipped + (~is_finite).astype(jnp.int32)
        metrics: Metrics = {
            **sums,
            **_tokens(batch),
            "grad_norm": grad_norm,
            "lr": rate(state.step - state.num_skipped),
            "num_skipped": num_skipped,
            **balance(load, batch.tokens_BS.size * model.moe.num_experts_per_token),
        }
        after = TrainState(step=state.step + 1, params=params, opt_state=opt_state, num_skipped=num_skipped)
        return after, metrics

    state_shardings = shardings_of(abstract_state(experiment, mesh))
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, batch_sharding(mesh, model.has_voice)),
        out_shardings=(state_shardings, replicated(mesh)),
    )


def make_eval_step(experiment: Experiment, mesh: Mesh) -> EvalStep:
    """Builds the evaluation of one batch: the metrics of the objective, without any update.

    Raises:
        ValueError: the model's kernels are for another platform than the mesh's.
    """
    check_platform(experiment.model, mesh.devices.flat[0].platform)
    sizes = mesh_config(mesh)

    def evaluate(params: PyTree, rows: Batch) -> Sums:
        _, (metrics, _) = _loss(params, rows, BatchWeight(total_weight(rows), num_own(rows)), experiment, sizes)
        return sum_over(metrics, DATA_AXES, sizes)

    specs = transformer.specs(experiment.model)
    has_voice = experiment.model.has_voice
    in_specs = (param_partition(specs, sizes), batch_partition(has_voice))
    on_every_device = _on_every_device(evaluate, mesh, in_specs, P())
    in_shardings = (param_sharding(specs, mesh), batch_sharding(mesh, has_voice))
    return jax.jit(on_every_device, in_shardings=in_shardings, out_shardings=replicated(mesh))


def make_gradients(experiment: Experiment, mesh: Mesh) -> Callable[[PyTree, Batch], tuple[PyTree, Sums, Load]]:
    """Builds the function that returns gradients, metric sums and expert load of a whole batch; to be jitted.

    Rows are taken in `grad_accum_steps` parts. On a mesh it is one program of all devices (`shard_map`), in
    which every collective is written out: nothing is left to a partitioner.
    """
    sizes, num_parts = mesh_config(mesh), experiment.train.grad_accum_steps
    specs = transformer.specs(experiment.model)

    def part(params: PyTree, rows: Batch, weight: BatchWeight) -> tuple[PyTree, Sums, Load]:
        heard_BPY = _own_samples(params, rows, experiment.model, sizes)

        def loss_of(params: PyTree) -> tuple[jax.Array, tuple[Sums, Load]]:
            loss, aux = _loss(params, rows, weight, experiment, sizes, heard_BPY)
            # The devices along `tensor` have the same positions: each answers for its share (`tml.ops.collectives`).
            return loss if sizes.tensor == 1 else loss / sizes.tensor, aux

        grads, (metrics, load) = jax.grad(loss_of, has_aux=True)(params)
        return grads, metrics, load

    def in_parts(params: PyTree, batch: Batch, weight: BatchWeight) -> tuple[PyTree, Sums, Load]:
        parts = jax.tree.map(lambda rows: _split_rows(rows, num_parts), batch)
        sums = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(part, params, jax.tree.map(lambda rows: rows[0], parts), weight),
        )

        def add(sums: PyTree, rows: Batch) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, sums, part(params, rows, weight)), None

        return jax.lax.scan(add, sums, parts)[0]

    def whole(params: PyTree, batch: Batch) -> tuple[PyTree, Sums, Load]:
        # Own audio is whole along `context`: only rows are split.
        own = None if batch.own is None else sum_over(num_own(batch), ROW_AXES, sizes)
        weight = BatchWeight(sum_over(total_weight(batch), DATA_AXES, sizes), own)
        grads, metrics, load = (part if num_parts == 1 else in_parts)(params, batch, weight)
        with jax.named_scope("sum_over_devices"):
            metrics, load = sum_over((metrics, load), DATA_AXES, sizes)
            return sum_copies(grads, specs, sizes), metrics, load

    params = param_partition(specs, sizes)
    return _on_every_device(whole, mesh, (params, batch_partition(experiment.model.has_voice)), (params, P(), P()))


def _own_samples(params: PyTree, rows: Batch, model: ModelConfig, sizes: MeshConfig) -> jax.Array | None:
    """What training feeds back of own audio, where that is not the rows' own."""
    if rows.own is None or not model.audio_out.feedback_sampled:
        return None
    with jax.named_scope("own_samples"):
        h_BSD = transformer.hidden(params, rows, model, sizes).h_BSD
        return flow_head.own_samples(params["audio_out"], h_BSD, rows.own, model, sizes)


def _loss(
    params: PyTree,
    rows: Batch,
    weight: BatchWeight,
    experiment: Experiment,
    sizes: MeshConfig,
    heard_BPY: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Sums, Load]]:
    """The loss of some rows, with its metrics and the load of their experts."""
    model, cfg = experiment.model, experiment.loss
    found = transformer.hidden(params, rows, model, sizes, heard_BPY)
    with jax.named_scope("objective"):
        losses = head.token_losses(params, found.h_BSD, rows.targets_BS, cfg.vocab_block, model, sizes)
        loss, metrics = objective(losses, rows, weight.targets, cfg)
    if rows.own is not None:
        with jax.named_scope("audio_objective"):
            error = flow_head.loss(params["audio_out"], found.h_BSD, rows.own, model, sizes)
            loss_audio, metrics_audio = objective_of_audio(error, weight.own, cfg)
        loss, metrics = loss + loss_audio, {**metrics, **metrics_audio}
    if not found.ahead:
        return loss, (metrics, found.load)
    with jax.named_scope("mtp_objective"):
        ahead = targets_ahead(rows, len(found.ahead), sizes)
        h_BSD = jnp.concatenate(found.ahead)
        losses = head.token_losses(params, h_BSD, ahead.targets_BS, cfg.vocab_block, model, sizes)
        loss_ahead, metrics_ahead = objective_ahead(losses, ahead, len(found.ahead), weight.targets, cfg)
    return loss + loss_ahead, ({**metrics, **metrics_ahead}, found.load)


def _on_every_device(function: Callable, mesh: Mesh, in_specs: PyTree, out_specs: PyTree) -> Callable:
    """The program of one device on all devices of a mesh; on one device it is the whole program."""
    if mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _split_rows(rows_B: jax.Array, num_parts: int) -> jax.Array:
    """Adds a leading axis of parts. Every device splits the rows it holds, so none of them moves."""
    return rows_B.reshape(rows_B.shape[0] // num_parts, num_parts, *rows_B.shape[1:]).swapaxes(0, 1)


def _tokens(batch: Batch) -> dict[str, Mean]:
    is_real_BS = (batch.kinds_BS != Kind.PAD).astype(jnp.float32)
    real, one = jnp.sum(is_real_BS), jnp.float32(1.0)
    return {"tokens": Mean(total=real, count=one), "fill": Mean(total=real, count=jnp.float32(is_real_BS.size))}


def _balance_metrics(load: Load, num_copies: int) -> Metrics:
    """Spread of the experts' load: standard deviation and maximum over the mean, averaged and worst over layers."""
    load_LE = load.copies_E
    mean_L = jnp.maximum(jnp.mean(load_LE, axis=1), 1e-6)
    return {
        "load_cv": jnp.mean(jnp.std(load_LE, axis=1) / mean_L),
        "load_max_over_mean": jnp.max(jnp.max(load_LE, axis=1) / mean_L),
        "dropped_fraction": Mean(
            total=jnp.sum(load.num_dropped).astype(jnp.float32),
            count=jnp.float32(num_copies * load.num_dropped.shape[0]),
        ),
    }


def _no_metrics(load: Load, num_copies: int) -> Metrics:
    return {}


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """Places this process's rows (`mesh.row_part`) where its devices want them, as its part of the global batch."""
    part = row_part(mesh, jax.process_index())

    def place(rows_B: np.ndarray, sharding: NamedSharding) -> jax.Array:
        shape = (rows_B.shape[0] * part.count, *rows_B.shape[1:])
        group_rows = rows_B.shape[0] // len(part.groups)

        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "a batch has rows"
            first = part.groups.index((index[0].start or 0) // group_rows) * group_rows
            return rows_B[(slice(first, first + group_rows), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, piece)

    return jax.tree.map(place, batch, batch_sharding(mesh, batch.own is not None))
