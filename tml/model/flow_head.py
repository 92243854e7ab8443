"""The flow head: from the backbone's state to the mel of the next own audio position, and what of it is fed back.

    velocity(x_t, t | h) = out(modulated(blocks(data_in x_t)))         an MLP whose norms are scaled and shifted
    block: x = x + gate * mlp_out(silu(mlp_in(norm(x) (1 + scale) + shift)))
    scale, shift, gate = modulate(silu(condition h + time))            zero in the beginning, as is `out`

Source: Li et al. 2024 ("Autoregressive image generation without vector quantization"), with the flow-matching loss.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Float32, Int32, UInt8

from tml.batch import OwnAudio
from tml.config import AudioOutConfig, Feedback, FlowConfig, MeshConfig, ModelConfig
from tml.metrics import Mean
from tml.ops.collectives import gather_params, index_along
from tml.ops.flow_matching import flow_error, integrate
from tml.ops.projection import project
from tml.params import Init, PyTree, Update, param

SLOWEST_PERIOD = 10_000.0
"""Ratio of the slowest to the fastest sine of time (Vaswani et al. 2017); time runs from 0 to `TIME_RANGE`."""
TIME_RANGE = 1_000.0
OWN_SAMPLES = 0x0_5A3
"""Folded into a position's seed, so that what training hears there does not draw what its loss draws."""
FIXED_POINT = 1_024
"""Mels are averaged as whole multiples of 1 / 1024, so that no program can round a level otherwise than another."""


def specs(cfg: ModelConfig) -> dict[str, PyTree]:
    """The parameters of the head; none of them for a model without a voice."""
    flow, values = cfg.audio_out.flow, cfg.audio_out.values_per_position
    width = flow.width

    def matrix(inner: int, outer: int, update: Update = Update.MATRIX, init: Init = Init.NORMAL) -> PyTree:
        return param("I O", {"I": inner, "O": outer}, fan_in="I", update=update, init=init)

    block = {
        "modulate": matrix(width, 3 * width, init=Init.ZEROS),
        "mlp_in": matrix(width, width),
        "mlp_out": matrix(width, width),
    }
    tree: dict[str, PyTree] = {
        "condition": param("D O", {"D": cfg.d_model, "O": width}, fan_in="D"),
        "time_in": matrix(width, width),
        "time_out": matrix(width, width),
        "data_in": matrix(values, width, Update.EMBEDDING),
        "blocks": [block] * flow.num_blocks,
        "modulate": matrix(width, 2 * width, init=Init.ZEROS),
        "out": matrix(width, values, Update.EMBEDDING, Init.ZEROS),
    }
    if flow.condition_dropout:
        tree["no_condition"] = param("D", {"D": cfg.d_model}, init=Init.ZEROS, update=Update.VECTOR)
    return tree


def velocity(
    params: Mapping[str, PyTree],
    x_nY: Float32[Array, "n Y"],
    time_n: Float32[Array, "n"],
    condition_nO: Float[Array, "n O"],
    eps: float,
) -> Float32[Array, "n Y"]:
    """The velocity of n points.

    Args:
        params: of the head, whole.
        x_nY: the points.
        time_n: where on their lines they are, 0 to 1.
        condition_nO: `condition` times the state of the backbone.
        eps: of the norms.
    """
    dtype = condition_nO.dtype
    weights = jax.tree.map(lambda leaf: leaf.astype(dtype), dict(params))
    time_nO = jax.nn.silu(project(_waves(time_n, weights["time_in"].shape[0]).astype(dtype), weights["time_in"]))
    told_nO = jax.nn.silu(condition_nO + project(time_nO, weights["time_out"]))
    x = project(x_nY.astype(dtype), weights["data_in"])
    for block in weights["blocks"]:
        scale, shift, gate = jnp.split(project(told_nO, block["modulate"]), 3, axis=-1)
        hidden = project(_normed(x, eps) * (1 + scale) + shift, block["mlp_in"])
        x = x + gate * project(jax.nn.silu(hidden), block["mlp_out"])
    scale, shift = jnp.split(project(told_nO, weights["modulate"]), 2, axis=-1)
    return project(_normed(x, eps) * (1 + scale) + shift, weights["out"], out_dtype=jnp.float32)


def _normed(x: jax.Array, eps: float) -> jax.Array:
    x_f32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    return (x_f32 * scale).astype(x.dtype)


def _waves(time_n: jax.Array, width: int) -> Float32[Array, "n O"]:
    """Sines and cosines of time."""
    rates = np.exp(-math.log(SLOWEST_PERIOD) * np.arange(width // 2) / (width // 2)).astype(np.float32)
    angles = TIME_RANGE * time_n[:, None] * rates[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Draws(NamedTuple):
    """What is drawn for positions in training.

    Attributes:
        time_nR: R times, one in each of R equal parts of [0, 1].
        noise_nRY: where the lines begin.
        drops_nR: which draws do without the condition.
    """

    time_nR: jax.Array
    noise_nRY: jax.Array
    drops_nR: jax.Array


def draw(seeds_n: jax.Array, num_values: int, flow: FlowConfig) -> Draws:
    """The draws of positions, from a seed each: no matter where, and in what company, they are computed."""
    count = flow.num_draws

    def of_one(seed: jax.Array) -> Draws:
        for_time, for_noise, for_drops = jax.random.split(jax.random.key(seed), 3)
        places = jnp.arange(count, dtype=jnp.float32) + jax.random.uniform(for_time, (count,))
        noise = jax.random.normal(for_noise, (count, num_values))
        return Draws(places / count, noise, jax.random.bernoulli(for_drops, flow.condition_dropout, (count,)))

    return jax.vmap(of_one)(seeds_n)


def loss(
    params: Mapping[str, PyTree], h_BSD: Float[Array, "B S D"], own: OwnAudio, cfg: ModelConfig, mesh: MeshConfig
) -> Mean:
    """The flow-matching error of this device's own audio positions: its sum, and their number.

    Args:
        params: of the head; on a mesh this device's parts.
        h_BSD: `Hidden.h_BSD`; slots may be split over `context`.
        own: the rows' own audio, whole along the slots.
        cfg: the model.
        mesh: sizes of the axes.
    """
    params = gather_params(params, specs(cfg), mesh, h_BSD.dtype)
    num_rows, num_slots, _ = h_BSD.shape
    own, is_here_BP, slots_BP = _here(own, num_slots, mesh)
    flow, num_values = cfg.audio_out.flow, own.mels_BPY.shape[2]
    chosen_n = _chosen(is_here_BP.reshape(-1), own.seeds_BP.reshape(-1), flow.loss_share)
    count = chosen_n.shape[0]
    places_n = (jnp.arange(num_rows, dtype=jnp.int32)[:, None] * num_slots + slots_BP).reshape(-1)[chosen_n]
    h_nD = h_BSD.reshape(num_rows * num_slots, -1)[places_n]
    is_here_n = is_here_BP.reshape(-1)[chosen_n]
    draws = draw(own.seeds_BP.reshape(-1)[chosen_n], num_values, flow)
    shape = (count, flow.num_draws, flow.width)
    condition = jnp.broadcast_to(_condition(params, h_nD)[:, None], shape)
    if flow.condition_dropout:
        nothing_O = _condition(params, params["no_condition"].astype(h_nD.dtype)[None])
        condition = jnp.where(draws.drops_nR[:, :, None], nothing_O[None], condition)
    mels_nY = own.mels_BPY.reshape(-1, num_values)[chosen_n].astype(jnp.float32)
    data = jnp.broadcast_to(mels_nY[:, None], draws.noise_nRY.shape)

    def field(x: jax.Array, time: jax.Array) -> jax.Array:
        flat = velocity(
            params, x.reshape(-1, num_values), time.reshape(-1), condition.reshape(-1, flow.width), cfg.norm_eps
        )
        return flat.reshape(x.shape)

    error_n = jnp.mean(flow_error(field, data, draws.noise_nRY, draws.time_nR), axis=1)
    num_here = jnp.sum(is_here_BP.astype(jnp.float32))
    total = jnp.sum(jnp.where(is_here_n, error_n, 0.0))
    return Mean(total=total * num_here / jnp.maximum(jnp.sum(is_here_n.astype(jnp.float32)), 1.0), count=num_here)


def _chosen(is_here_n: jax.Array, seeds_n: jax.Array, share: float) -> Int32[Array, "k"]:
    """Which positions the loss is taken at: what is there first, in the order of its seeds, so at random."""
    size = is_here_n.shape[0]
    if share == 1:
        return jnp.arange(size, dtype=jnp.int32)
    last = jnp.uint32(2**32 - 1)
    order_n = jnp.argsort(jnp.where(is_here_n, jnp.minimum(seeds_n, last - 1), last))
    return order_n[: math.ceil(share * size)].astype(jnp.int32)


def _here(own: OwnAudio, num_slots: int, mesh: MeshConfig) -> tuple[OwnAudio, jax.Array, jax.Array]:
    """The own audio that this device's slots predict, which of it is real, and the slots; as many as slots at most."""
    first = index_along("context", mesh) * num_slots
    slots_BP = own.places_BP - 1 - first
    if mesh.context > 1:
        # Places ascend and zeros come last, so what is before this device's slots comes first.
        is_before_BP = (own.places_BP > 0) & (slots_BP < 0)
        start_B1 = jnp.sum(is_before_BP.astype(jnp.int32), axis=1, keepdims=True)
        most = min(own.places_BP.shape[1], num_slots)
        take_BP = start_B1 + jnp.arange(most, dtype=jnp.int32)[None]
        is_there_BP = take_BP < own.places_BP.shape[1]
        take_BP = jnp.where(is_there_BP, take_BP, 0)
        own = OwnAudio(
            mels_BPY=jnp.take_along_axis(own.mels_BPY, take_BP[:, :, None], axis=1),
            places_BP=jnp.where(is_there_BP, jnp.take_along_axis(own.places_BP, take_BP, axis=1), 0),
            seeds_BP=jnp.take_along_axis(own.seeds_BP, take_BP, axis=1),
        )
        slots_BP = own.places_BP - 1 - first
    is_here_BP = (own.places_BP > 0) & (slots_BP >= 0) & (slots_BP < num_slots)
    return own, is_here_BP, jnp.where(is_here_BP, slots_BP, 0)


def _condition(params: Mapping[str, PyTree], h_nD: jax.Array) -> jax.Array:
    return project(h_nD, params["condition"].astype(h_nD.dtype))


def sample(
    params: Mapping[str, PyTree], h_BD: Float[Array, "B D"], keys_B: jax.Array, cfg: ModelConfig
) -> Float16[Array, "B Y"]:
    """The mel of the next own audio position of B sessions, in float16: what is heard is what is fed back.

    Args:
        params: of the head.
        h_BD: the state at the position before, as `Hidden.h_BSD`.
        keys_B: a random key a session.
        cfg: the model.
    """
    own, flow = cfg.audio_out, cfg.audio_out.flow
    noise_BY = jax.vmap(lambda key: jax.random.normal(key, (own.values_per_position,)))(keys_B)
    condition_BO = _condition(params, h_BD)

    def field(x_BY: jax.Array, time_B: jax.Array) -> jax.Array:
        return velocity(params, x_BY, time_B, condition_BO, cfg.norm_eps)

    def guided(x_BY: jax.Array, time_B: jax.Array) -> jax.Array:
        nothing_BD = jnp.broadcast_to(params["no_condition"].astype(h_BD.dtype), h_BD.shape)
        nothing_BO = _condition(params, nothing_BD)
        without = velocity(params, x_BY, time_B, nothing_BO, cfg.norm_eps)
        return without + flow.guidance * (field(x_BY, time_B) - without)

    with jax.named_scope("flow_sample"):
        found_BY = integrate(
            field if flow.guidance == 1 else guided, flow.noise_scale * noise_BY, flow.num_steps, flow.solver
        )
        return jnp.maximum(found_BY, (own.log_floor - own.log_mean) / own.log_deviation).astype(jnp.float16)


def own_samples(
    params: Mapping[str, PyTree], h_BSD: Float[Array, "B S D"], own: OwnAudio, cfg: ModelConfig, mesh: MeshConfig
) -> Float16[Array, "B P Y"]:
    """Own audio of which a share (`feedback_sampled`) is what the model says there itself, after the true sound.

    Like the loss, it has room for a part of the positions (`loss_share`); the others keep the true sound.

    Args:
        params: of the head; on a mesh this device's parts.
        h_BSD: `Hidden.h_BSD` of a forward pass over the true sound, with all slots here.
        own: the rows' own audio.
        cfg: the model.
        mesh: sizes of the axes; `context` is 1.
    """
    params = gather_params(params, specs(cfg), mesh, h_BSD.dtype)
    num_rows, num_slots, _ = h_BSD.shape
    mels_nY, seeds_n = own.mels_BPY.reshape(-1, own.mels_BPY.shape[2]), own.seeds_BP.reshape(-1)
    keys_n2 = jax.vmap(lambda seed: jax.random.split(jax.random.fold_in(jax.random.key(seed), OWN_SAMPLES)))(seeds_n)
    is_said_n = jax.vmap(lambda key: jax.random.bernoulli(key, cfg.audio_out.feedback_sampled))(keys_n2[:, 0])
    is_said_n &= own.places_BP.reshape(-1) > 0
    chosen_k = _chosen(is_said_n, seeds_n, cfg.audio_out.flow.loss_share)
    rows_B1 = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    slots_n = (rows_B1 * num_slots + jnp.maximum(own.places_BP - 1, 0)).reshape(-1)
    h_kD = h_BSD.reshape(num_rows * num_slots, -1)[slots_n[chosen_k]]
    said_kY = sample(params, h_kD, keys_n2[chosen_k, 1], cfg)
    heard_kY = jnp.where(is_said_n[chosen_k][:, None], said_kY, mels_nY[chosen_k])
    return mels_nY.at[chosen_k].set(heard_kY).reshape(own.mels_BPY.shape)


def feedback_levels(mels: Float16[Array, "*n Y"], own: AudioOutConfig) -> UInt8[Array, "*n M"]:
    """What is fed back of own audio: its frames averaged, at the nearest of `feedback_levels` levels, in integers.

    Without feedback (`Feedback.NONE`) every level is the lowest.
    """
    if own.feedback is Feedback.NONE:
        return jnp.zeros((*mels.shape[:-1], own.num_mels), jnp.uint8)
    fixed = jnp.round(mels.astype(jnp.float32) * FIXED_POINT).astype(jnp.int32)
    sums = jnp.sum(fixed.reshape(*mels.shape[:-1], own.frames_per_position, own.num_mels), axis=-2)
    starts = jnp.asarray(_level_starts(own)).reshape((1,) * (sums.ndim) + (-1,))
    return jnp.sum((sums[..., None] >= starts).astype(jnp.uint8), axis=-1, dtype=jnp.uint8)


def _level_starts(own: AudioOutConfig) -> np.ndarray:
    """The smallest sum of frames, in fixed point, that has each level but the lowest."""
    centres = np.linspace(own.log_floor, own.feedback_high, own.feedback_levels)
    between = ((centres[:-1] + centres[1:]) / 2 - own.log_mean) / own.log_deviation
    return np.ceil(between * FIXED_POINT * own.frames_per_position).astype(np.int32)
