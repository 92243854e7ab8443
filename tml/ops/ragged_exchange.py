"""Rows to the devices of their experts and back: a ragged all-to-all whose pieces land where the matmul wants them.

Every device holds E/G experts of a group of G. A row sent to an expert lands in that expert's part of
the receiver's buffer, which is laid out as `grouped_matmul.BlockPlan` lays it out (parts padded to
whole blocks), so the receiver sorts nothing. The buffer has a fixed size; what exceeds it is not sent.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from tml.params import Leaf

AXIS = "expert"
"""The mesh axis of the group."""


@flax.struct.dataclass
class Pieces:
    """One direction of an exchange, as `jax.lax.ragged_all_to_all` wants it: pieces ordered by the device they go to.

    Attributes:
        starts: first row of every piece here.
        sizes: rows of every piece.
        landings: first row of every piece on the device it goes to.
        received_sizes: rows of every piece that arrives, ordered by the device it comes from.
    """

    starts: Leaf
    sizes: Leaf
    landings: Leaf
    received_sizes: Leaf


@flax.struct.dataclass
class Exchange:
    """Both directions, and what the receiver's buffer then holds.

    Attributes:
        there: from rows sorted by expert to the devices of the experts.
        back: the way back.
        expert_of_block: which of this device's experts each block of the buffer belongs to, or how many these are.
        num_dropped: rows of this device that found no room.
        num_sent_rows: rows before the exchange.
        num_buffer_rows: rows of the receiver's buffer.
    """

    there: Pieces
    back: Pieces
    expert_of_block: Leaf
    num_dropped: Leaf
    num_sent_rows: int = flax.struct.field(pytree_node=False)
    num_buffer_rows: int = flax.struct.field(pytree_node=False)


def plan_exchange(
    counts_GE: Int32[Array, "G E"], index: Int32[Array, ""], block_rows: int, num_blocks: int, num_sent_rows: int
) -> Exchange:
    """Plans the exchange of the device at place `index`; every device plans from the same counts.

    Args:
        counts_GE: rows of every device for every expert.
        index: place of this device in the group.
        block_rows: rows of a block.
        num_blocks: blocks of the receiver's buffer.
        num_sent_rows: rows that this device holds, sorted by expert.
    """
    num_devices, num_experts = counts_GE.shape
    num_local = num_experts // num_devices
    buffer_rows = num_blocks * block_rows
    blocks_GE = (-(-jnp.sum(counts_GE, axis=0) // block_rows)).reshape(num_devices, num_local)
    last_block_GE = jnp.cumsum(blocks_GE, axis=1)
    part_E = ((last_block_GE - blocks_GE) * block_rows).reshape(-1)
    landings_GE = part_E[None] + jnp.cumsum(counts_GE, axis=0) - counts_GE
    sizes_GE = jnp.clip(buffer_rows - landings_GE, 0, counts_GE)
    starts_GE = jnp.cumsum(counts_GE, axis=1) - counts_GE

    def here(of_GE: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(of_GE, index, keepdims=False)

    def arriving(of_GE: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(of_GE, index * num_local, num_local, axis=1).reshape(-1)

    block = jnp.arange(num_blocks, dtype=jnp.int32)
    expert = jnp.sum((block[:, None] >= here(last_block_GE)[None]).astype(jnp.int32), axis=1)
    sizes_E, received = here(sizes_GE), arriving(sizes_GE)
    return Exchange(
        there=Pieces(
            starts=here(starts_GE),
            sizes=sizes_E,
            landings=jnp.minimum(here(landings_GE), buffer_rows),
            received_sizes=received,
        ),
        back=Pieces(
            starts=jnp.minimum(arriving(landings_GE), buffer_rows),
            sizes=received,
            landings=arriving(starts_GE),
            received_sizes=sizes_E,
        ),
        expert_of_block=expert,
        num_dropped=jnp.sum(here(counts_GE) - sizes_E),
        num_sent_rows=num_sent_rows,
        num_buffer_rows=buffer_rows,
    )


@jax.custom_vjp
def send(rows: Float[Array, "r D"], exchange: Exchange) -> Float[Array, "c D"]:
    """Rows sorted by expert to the buffers of their experts' devices; zeros where nothing lands."""
    return exchange_pieces(rows, exchange.there, exchange.num_buffer_rows)


@jax.custom_vjp
def bring_back(rows: Float[Array, "c D"], exchange: Exchange) -> Float[Array, "r D"]:
    """Rows of the buffer to where they were sent from; zeros for what was dropped."""
    return exchange_pieces(rows, exchange.back, exchange.num_sent_rows)


def _send_fwd(rows: jax.Array, exchange: Exchange) -> tuple[jax.Array, Exchange]:
    return send(rows, exchange), exchange


def _bring_back_fwd(rows: jax.Array, exchange: Exchange) -> tuple[jax.Array, Exchange]:
    return bring_back(rows, exchange), exchange


# Each direction is the other's transpose.
send.defvjp(_send_fwd, lambda exchange, grad: (bring_back(grad, exchange), None))
bring_back.defvjp(_bring_back_fwd, lambda exchange, grad: (send(grad, exchange), None))


def exchange_pieces(rows: Float[Array, "r D"], pieces: Pieces, num_out_rows: int) -> Float[Array, "c D"]:
    """One ragged all-to-all: native, except on CPU, for which XLA has none (chosen by what it is compiled for)."""
    native = functools.partial(native_exchange, num_out_rows=num_out_rows)
    emulated = functools.partial(emulated_exchange, num_out_rows=num_out_rows)
    return jax.lax.platform_dependent(rows, pieces, cpu=emulated, default=native)


def native_exchange(rows: jax.Array, pieces: Pieces, num_out_rows: int) -> jax.Array:
    """The collective of TPUs and GPUs."""
    out = jnp.zeros((num_out_rows, *rows.shape[1:]), rows.dtype)
    return jax.lax.ragged_all_to_all(
        rows, out, pieces.starts, pieces.sizes, pieces.landings, pieces.received_sizes, axis_name=AXIS
    )


def emulated_exchange(rows: jax.Array, pieces: Pieces, num_out_rows: int) -> jax.Array:
    """The same from a dense all-to-all: a whole buffer for every receiver, of which the received ones are added up."""
    num_devices = jax.lax.axis_size(AXIS)
    place = jnp.arange(rows.shape[0], dtype=jnp.int32)
    is_in_RP = (place[:, None] >= pieces.starts[None]) & (place[:, None] < (pieces.starts + pieces.sizes)[None])
    is_sent_R = jnp.any(is_in_RP, axis=1)
    piece_R = jnp.argmax(is_in_RP, axis=1).astype(jnp.int32)
    device_R = piece_R // (pieces.starts.shape[0] // num_devices)
    landing_R = jnp.where(is_sent_R, pieces.landings[piece_R] + place - pieces.starts[piece_R], num_out_rows)
    buffers = jnp.zeros((num_devices, num_out_rows, *rows.shape[1:]), rows.dtype)
    buffers = buffers.at[device_R, landing_R].set(rows, mode="drop")
    return jnp.sum(jax.lax.all_to_all(buffers, AXIS, split_axis=0, concat_axis=0, tiled=True), axis=0)
