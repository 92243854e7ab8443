"""One step of training, pure: (TrainState, Batch) -> (TrainState, metrics), jitted with the state donated."""

from collections.abc import Callable
from dataclasses import fields

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int32

from tml.batch import Batch
from tml.config import Experiment
from tml.mesh import ROW_AXES, batch_sharding, param_sharding, replicated
from tml.metrics import Mean
from tml.microturn import Kind
from tml.model import transformer
from tml.objective import objective, objective_ahead, total_weight
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
        `num_skipped`, and with experts `load_cv` and `load_max_over_mean`.
    """
    model = experiment.model
    specs = transformer.specs(model)
    num_steps = experiment.train.num_steps
    optimizer = make_optimizer(experiment.optim, num_steps, specs)
    rate = learning_rate(experiment.optim, num_steps)
    accumulate = _make_accumulate(experiment, mesh)
    balance = _balance_metrics if model.num_dense_layers < model.num_layers else _no_metrics

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, sums, load_LE = accumulate(state.params, batch)
        grad_norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums["loss"].total)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            params = transformer.move_router_bias(params, load_LE, model)
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
            **balance(load_LE),
        }
        after = TrainState(step=state.step + 1, params=params, opt_state=opt_state, num_skipped=num_skipped)
        return after, metrics

    state_shardings = shardings_of(abstract_state(experiment, mesh))
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, batch_sharding(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
    )


def make_eval_step(experiment: Experiment, mesh: Mesh) -> EvalStep:
    """Builds the evaluation of one batch: the metrics of the objective, without any update."""

    def eval_step(params: PyTree, batch: Batch) -> dict[str, Mean]:
        outputs = transformer.apply(params, batch, experiment.model)
        return objective(outputs.logits_BSV, batch, total_weight(batch), experiment.loss)[1]

    params_sharding = param_sharding(transformer.specs(experiment.model), mesh)
    return jax.jit(eval_step, in_shardings=(params_sharding, batch_sharding(mesh)), out_shardings=replicated(mesh))


def _make_accumulate(experiment: Experiment, mesh: Mesh) -> Callable[[PyTree, Batch], tuple[PyTree, Sums, jax.Array]]:
    """Builds the function that returns gradients, metric sums and expert load of a whole batch."""
    num_parts = experiment.train.grad_accum_steps
    loss_ahead = _loss_ahead if experiment.model.mtp.num_blocks else _no_loss

    def part(params: PyTree, rows: Batch, weight: jax.Array) -> tuple[PyTree, Sums, jax.Array]:
        def loss_of(params: PyTree) -> tuple[jax.Array, tuple[Sums, jax.Array]]:
            outputs = transformer.apply(params, rows, experiment.model)
            with jax.named_scope("objective"):
                loss, metrics = objective(outputs.logits_BSV, rows, weight, experiment.loss)
            more_loss, more_metrics = loss_ahead(params, outputs.hidden_BSD, rows, weight, experiment)
            return loss + more_loss, ({**metrics, **more_metrics}, outputs.expert_load_LE)

        grads, (metrics, load_LE) = jax.grad(loss_of, has_aux=True)(params)
        return grads, metrics, load_LE

    def whole(params: PyTree, batch: Batch) -> tuple[PyTree, Sums, jax.Array]:
        return part(params, batch, total_weight(batch))

    def in_parts(params: PyTree, batch: Batch) -> tuple[PyTree, Sums, jax.Array]:
        weight = total_weight(batch)
        parts = jax.tree.map(lambda rows: _split_rows(rows, num_parts, mesh), batch)
        sums = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(part, params, jax.tree.map(lambda rows: rows[0], parts), weight),
        )

        def add(sums: PyTree, rows: Batch) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, sums, part(params, rows, weight)), None

        return jax.lax.scan(add, sums, parts)[0]

    return whole if num_parts == 1 else in_parts


def _loss_ahead(
    params: PyTree, hidden_BSD: jax.Array, rows: Batch, weight: jax.Array, experiment: Experiment
) -> tuple[jax.Array, Sums]:
    """The loss of multi-token prediction."""
    logits = transformer.apply_ahead(params, hidden_BSD, rows, experiment.model)
    with jax.named_scope("objective"):
        return objective_ahead(logits, rows, weight, experiment.loss)


def _no_loss(
    params: PyTree, hidden_BSD: jax.Array, rows: Batch, weight: jax.Array, experiment: Experiment
) -> tuple[jax.Array, Sums]:
    return jnp.float32(0.0), {}


def _split_rows(rows_B: jax.Array, num_parts: int, mesh: Mesh) -> jax.Array:
    """Adds a leading axis of parts. Every device splits the rows it holds, so none of them moves."""
    parts = rows_B.reshape(rows_B.shape[0] // num_parts, num_parts, *rows_B.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(None, ROW_AXES)))


def _tokens(batch: Batch) -> dict[str, Mean]:
    is_real_BS = (batch.kinds_BS != Kind.PAD).astype(jnp.float32)
    real, one = jnp.sum(is_real_BS), jnp.float32(1.0)
    return {"tokens": Mean(total=real, count=one), "fill": Mean(total=real, count=jnp.float32(is_real_BS.size))}


def _balance_metrics(load_LE: Float32[Array, "L E"]) -> Metrics:
    """Spread of the experts' load: standard deviation and maximum over the mean, averaged and worst over layers."""
    mean_L = jnp.maximum(jnp.mean(load_LE, axis=1), 1e-6)
    return {
        "load_cv": jnp.mean(jnp.std(load_LE, axis=1) / mean_L),
        "load_max_over_mean": jnp.max(jnp.max(load_LE, axis=1) / mean_L),
    }


def _no_metrics(load_LE: Float32[Array, "L E"]) -> Metrics:
    return {}


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """Places this process's rows of a batch as its part of the global batch."""
    sharding = batch_sharding(mesh)
    columns = {f.name: jax.make_array_from_process_local_data(sharding, getattr(batch, f.name)) for f in fields(Batch)}
    return Batch(**columns)
