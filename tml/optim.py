"""Optimizers and schedules as optax chains: AdamW, or Muon for the layers' matrices with Adam for the rest."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32, Int32

from tml.config import OptimConfig, Optimizer, Schedule
from tml.params import STACK_AXES, ParamSpec, PyTree, Update, map_specs

LearningRate = Callable[[Int32[Array, ""]], Float32[Array, ""]]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan et al. 2024, "Muon")."""
NEWTON_SCHULZ_STEPS = 5
MATCHED_RMS = 0.2
"""Root mean square of a Muon update, as large as AdamW's (Liu et al. 2025, "Muon is scalable", equation 4)."""


def learning_rate(optim: OptimConfig, num_steps: int) -> LearningRate:
    """The schedule: linear warm-up that reaches `peak_lr` in its last step, then cosine, or constant and linear (WSD).

    Both end at `peak_lr * final_lr_ratio` one step after the last. The decay of WSD never begins
    inside the warm-up.

    Args:
        optim: peak, warm-up and shape.
        num_steps: steps of the whole run.

    Returns:
        A function of the number of updates made so far.
    """
    warmup, final = optim.warmup_steps, optim.final_lr_ratio
    decay_start = warmup
    if optim.schedule is Schedule.WSD:
        decay_start = max(warmup, num_steps - round(optim.decay_fraction * num_steps))
    decay_steps = max(1, num_steps - decay_start)

    def cosine(progress: jax.Array) -> jax.Array:
        return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    def linear(progress: jax.Array) -> jax.Array:
        return 1.0 - progress

    fall = cosine if optim.schedule is Schedule.WARMUP_COSINE else linear

    def rate(count: Int32[Array, ""]) -> Float32[Array, ""]:
        made = jnp.asarray(count).astype(jnp.float32)
        rise = jnp.minimum(1.0, (made + 1.0) / max(1, warmup))
        progress = jnp.clip((made - decay_start) / decay_steps, 0.0, 1.0)
        return optim.peak_lr * rise * (final + (1.0 - final) * fall(progress))

    return rate


def make_optimizer(optim: OptimConfig, num_steps: int, specs: PyTree) -> optax.GradientTransformation:
    """Clips by the global norm, updates every parameter by its class, and scales by the schedule.

    | class     | AdamW             | Muon                      |
    |-----------|-------------------|---------------------------|
    | MATRIX    | Adam, decay       | Muon, decay               |
    | EMBEDDING | Adam, decay       | Adam * adam_lr_ratio, decay likewise |
    | VECTOR    | Adam              | Adam * adam_lr_ratio      |
    | BALANCE   | not moved         | not moved                 |

    The decay is multiplied by the learning rate, so it follows the schedule (decoupled, as in
    Loshchilov and Hutter 2019).
    """
    adam = strict(optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps))
    decay = optax.add_decayed_weights(optim.weight_decay)
    ratio = 1.0 if optim.optimizer is Optimizer.ADAMW else optim.adam_lr_ratio
    matrix = adam if optim.optimizer is Optimizer.ADAMW else scale_by_muon(optim.muon_momentum, specs)
    by_class = {
        Update.MATRIX.value: optax.chain(matrix, decay),
        Update.EMBEDDING.value: optax.chain(adam, decay, optax.scale(ratio)),
        Update.VECTOR.value: optax.chain(adam, optax.scale(ratio)),
        Update.BALANCE.value: optax.set_to_zero(),
    }
    return optax.chain(
        optax.clip_by_global_norm(optim.max_grad_norm),
        optax.partition(by_class, map_specs(lambda spec: spec.update.value, specs)),
        optax.scale_by_learning_rate(learning_rate(optim, num_steps)),
    )


def strict(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets optax raise a float to an int count although dtype promotion is strict everywhere else."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        with jax.numpy_dtype_promotion("standard"):
            return transform.update(updates, state, params)

    return optax.GradientTransformation(transform.init, update)


class MuonState(NamedTuple):
    """The momentum of every matrix."""

    momentum: PyTree


def scale_by_muon(beta: float, specs: PyTree) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, with the root mean square of an Adam update.

    Args:
        beta: decay of the momentum.
        specs: the parameters; only their axes are read, so leaves masked by `optax.partition` do no harm.
    """

    def init(params: PyTree) -> MuonState:
        return MuonState(momentum=jax.tree.map(jnp.zeros_like, params))

    def update(updates: PyTree, state: MuonState, params: PyTree = None) -> tuple[PyTree, MuonState]:
        momentum = jax.tree.map(lambda m, g: beta * m + (1.0 - beta) * g, state.momentum, updates)
        ahead = jax.tree.map(lambda m, g: beta * m + (1.0 - beta) * g, momentum, updates)
        return map_specs(_orthogonalise_leaf, specs, ahead), MuonState(momentum=momentum)

    return optax.GradientTransformation(init, update)


def _orthogonalise_leaf(spec: ParamSpec, update: PyTree) -> PyTree:
    if spec.update is not Update.MATRIX:
        return update
    matrices, restore = as_matrices(spec, update)
    rows, columns = matrices.shape[1:]
    return restore(orthogonalise(matrices) * (MATCHED_RMS * math.sqrt(max(rows, columns))))


def as_matrices(
    spec: ParamSpec, values: Float32[Array, "..."]
) -> tuple[Float32[Array, "n i o"], Callable[[jax.Array], jax.Array]]:
    """Views a parameter as a stack of matrices, summed axes by the others; also returns the way back."""
    places = range(len(spec.axes))
    stacked = [place for place in places if spec.axes[place] in STACK_AXES]
    summed = [place for place in places if spec.axes[place] in spec.sum_axes]
    others = [place for place in places if place not in stacked and place not in summed]
    order = [*stacked, *summed, *others]
    ordered_shape = tuple(spec.shape[place] for place in order)
    sizes = [math.prod(spec.shape[place] for place in group) for group in (stacked, summed, others)]

    def restore(matrices: jax.Array) -> jax.Array:
        return matrices.reshape(ordered_shape).transpose(tuple(np.argsort(order).tolist()))

    return values.transpose(order).reshape(sizes), restore


def orthogonalise(matrices: Float32[Array, "n i o"]) -> Float32[Array, "n i o"]:
    """Moves every singular value of every matrix to about 1 by Newton–Schulz iterations.

    The iterations run on the wide orientation, as matmuls of the small side only where possible:
    on CPU that is twice as fast as `vmap` over `optax.contrib.scale_by_muon`.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.swapaxes(1, 2) if is_tall else matrices
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True))
    x = x / (norm + 1e-8)
    identity = jnp.eye(x.shape[1], dtype=x.dtype)[None]
    linear, cubic, quintic = NEWTON_SCHULZ

    def iterate(_: jax.Array | int, x: jax.Array) -> jax.Array:
        gram = jnp.einsum("nij,nkj->nik", x, x)
        return (linear * identity + cubic * gram + quintic * (gram @ gram)) @ x

    # A loop, not unrolled: the program compiles in half the time and runs as fast.
    x = jax.lax.fori_loop(0, NEWTON_SCHULZ_STEPS, iterate, x)
    return x.swapaxes(1, 2) if is_tall else x
