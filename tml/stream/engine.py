"""One micro-turn of B live sessions: append what came in, then decode what goes out until every session is done.

    step(params, state, inputs) -> state, outputs        fixed shapes, donated state

The output half is a small grammar, the one that `tml.microturn` lays out for training: actions,
then [listen] or [speak], own text, [end of text]. Tokens that cannot stand at a place are never chosen.
With fixed slots, [pad] tokens fill it up (`tml.stream.padding`).
A session that speaks with a voice goes on with its own audio (`tml.stream.speaking`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import layout as memory
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from tml.config import Control, MatmulBackend, MeshConfig, ModelConfig, StreamConfig
from tml.mesh import param_partition, param_sharding
from tml.microturn import Layout
from tml.model import cache, head, transformer
from tml.model.cache import DecodeState, Slots, slots_of
from tml.ops.norm import rms_norm
from tml.params import Leaf, PyTree
from tml.stream.inputs import TurnInputs
from tml.stream.padding import padding_counts, padding_slots
from tml.stream.placement import stream_mesh
from tml.stream.speaking import Spoken, speak

CONTROL, TEXT, ACTION, DONE = range(4)
"""Phases of the output half: at its start or after an action, in own text, in an action's payload, over."""

StepFunction = Callable[[PyTree, "StreamState", TurnInputs], tuple["StreamState", "TurnOutputs"]]


@flax.struct.dataclass
class StreamState:
    """Everything B live sessions remember.

    Attributes:
        decode: the network's state.
        keys_B2: data of the random key of each session; its samples do not depend on its slot.
    """

    decode: DecodeState
    keys_B2: Leaf


@flax.struct.dataclass
class TurnOutputs:
    """What B sessions put out in one micro-turn.

    Attributes:
        tokens_BO: output tokens, in order (control tokens included); 0 after the last.
        counts_B: number of output tokens.
        log_probs_BO: log-probability that the model gave each of them, for who learns from what was sampled.
        own: own audio; None without a voice.
    """

    tokens_BO: Leaf
    counts_B: Leaf
    log_probs_BO: Leaf
    own: Spoken | None = None


def init_state(
    model: ModelConfig,
    layout: Layout,
    stream: StreamConfig,
    num_slots: int,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> StreamState:
    """The state of `num_slots` sessions that have not begun.

    Args:
        model: the model.
        layout: the layout of micro-turns.
        stream: the cache's size.
        num_slots: sessions side by side.
        seed: of everything they draw.
        numbers: a number a session, by which it draws, so that it draws the same in any slot; else that of its slot.
    """
    apart = stream.backend is MatmulBackend.BLOCKED
    decode = cache.init_state(model, num_slots, stream.max_positions, layout.max_slots_at_once, apart)
    numbers = range(num_slots) if numbers is None else numbers
    assert len(numbers) == num_slots, f"{len(numbers)} numbers for {num_slots} slots"
    return StreamState(decode=decode, keys_B2=session_keys(numbers, seed))


def session_keys(numbers: Sequence[int], seed: int = 0) -> UInt32[Array, "B 2"]:
    """Data of the random keys of sessions, by their numbers: `StreamState.keys_B2`."""
    numbers_B = jnp.array(numbers, jnp.int32)
    return jax.random.key_data(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), numbers_B))


def partition(state: StreamState) -> StreamState:
    """How devices that share a model split the state of its sessions."""
    return StreamState(decode=cache.partition(state.decode), keys_B2=PartitionSpec())


def place_state(state: StreamState, model: ModelConfig, stream: StreamConfig) -> StreamState:
    """Puts a state on the devices that share the model, as `placement.place_params` puts parameters."""
    if stream.tensor == 1:
        return jax.device_put(state, jax.local_devices()[0])
    mesh = stream_mesh(model, stream)
    return jax.device_put(state, jax.tree.map(lambda entry: NamedSharding(mesh, entry), partition(state)))


def make_step(
    model: ModelConfig, layout: Layout, stream: StreamConfig, devices: Sequence[jax.Device] | None = None
) -> StepFunction:
    """Builds the step for a model and a layout; jit it with the state donated (`jit_step`).

    Args:
        model: the model.
        layout: how micro-turns are laid out.
        stream: the engine's configuration.
        devices: those that share the model, where `stream.tensor` is more than 1; the first ones here by default.
    """
    step = _make_part(model, layout, stream)
    if stream.tensor == 1:
        return step
    mesh = stream_mesh(model, stream, devices)
    params_partition = param_partition(transformer.specs(model.streamed), MeshConfig(tensor=stream.tensor))

    def step_on_mesh(params: PyTree, state: StreamState, inputs: TurnInputs) -> tuple[StreamState, TurnOutputs]:
        whole, split = PartitionSpec(), partition(state)
        in_specs, out_specs = (params_partition, split, whole), (split, whole)
        return jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(
            params, state, inputs
        )

    return step_on_mesh


def _make_part(model: ModelConfig, layout: Layout, stream: StreamConfig) -> StepFunction:
    """The step of one of the devices that share the model: all of them choose the same tokens from whole logits."""
    mesh = MeshConfig(tensor=stream.tensor)
    allowed_PV = jnp.asarray(allowed_tokens(layout, model.num_logits))
    choose = _likeliest if stream.temperature == 0 else _sampler(stream.temperature)
    special, turn = layout.special, layout.turn
    not_words = jnp.array([special.listen, special.speak, special.end_of_text])
    speak_closes = _speak_closes(layout)
    closes_text = special.speak if speak_closes else special.end_of_text

    # Elsewhere a part costs a reading of the model's weights; here, a product with all of the caches.
    width = layout.textless_slots_in if stream.backend is MatmulBackend.BLOCKED else layout.max_slots_in

    def head_input(params: PyTree, x_BQD: jax.Array) -> jax.Array:
        with jax.named_scope("head"):
            return rms_norm(x_BQD, params["norm"], model.norm_eps)

    def feed(params: PyTree, state: DecodeState, slots: Slots, wanted_BQ: jax.Array) -> tuple[DecodeState, jax.Array]:
        """The state after the slots, and the heads' inputs at those that are wanted of each session."""
        state, x_BWD = cache.feed(params, state, slots, model, mesh, stream.backend)
        return state, head_input(params, jnp.take_along_axis(x_BWD, wanted_BQ[:, :, None], axis=1))

    def step(params: PyTree, state: StreamState, inputs: TurnInputs) -> tuple[StreamState, TurnOutputs]:
        num_rows = inputs.counts_B.shape[0]
        with jax.named_scope("turn_in"):
            slots = inputs.slots()
            decode, x_BD = cache.feed_in_parts(params, state.decode, slots, width, model, mesh, stream.backend)
            h_BD = head_input(params, x_BD[:, None])[:, 0]
        phase_B = jnp.where(inputs.counts_B > 0, CONTROL, DONE).astype(jnp.int32)
        zero_B = jnp.zeros(num_rows, jnp.int32)
        outputs = TurnOutputs(
            tokens_BO=jnp.zeros((num_rows, layout.max_tokens_out), jnp.int32),
            counts_B=zero_B,
            log_probs_BO=jnp.zeros((num_rows, layout.max_tokens_out), jnp.float32),
        )

        def unfinished(carry: tuple[Any, ...]) -> Bool[Array, ""]:
            return jnp.any(carry[2] != DONE)

        def emit(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            decode, h_BD, phase_B, said_B, acted_B, outputs = carry
            with jax.named_scope("head"):
                logits_BV = head.logits(params, h_BD[:, None], model, mesh)[:, 0]
            over_B = ((phase_B == TEXT) & (said_B >= turn.max_text_out_per_turn)) | (
                (phase_B == ACTION) & (acted_B >= turn.max_action_per_turn - 1)
            )
            can_act_B = (phase_B != CONTROL) | (acted_B <= turn.max_action_per_turn - 2)
            allowed_BV = allowed_PV[phase_B] & (
                can_act_B[:, None] | (jnp.arange(model.num_logits) != special.action)[None]
            )
            masked_BV = jnp.where(allowed_BV, logits_BV, -jnp.inf)
            closer = jnp.where(phase_B == TEXT, closes_text, special.end_of_text) if speak_closes else closes_text
            token_B = jnp.where(over_B, closer, choose(masked_BV, state.keys_B2, decode.num_positions_B))
            active_B = phase_B != DONE
            outputs = _record(outputs, token_B, active_B, logits_BV)
            slots = slots_of(token_B[:, None], active_B.astype(jnp.int32), model)
            decode, next_B1D = feed(params, decode, slots, jnp.zeros_like(token_B)[:, None])
            # Sessions that have said all their words wait here for the others, and then go on from their last position.
            h_BD = jnp.where(active_B[:, None], next_B1D[:, 0], h_BD)
            acting_B = (phase_B == ACTION) | ((phase_B == CONTROL) & (token_B == special.action))
            acted_B = acted_B + acting_B.astype(jnp.int32)
            speaking_B = active_B & ~acting_B & ~jnp.isin(token_B, not_words)
            said_B = said_B + speaking_B.astype(jnp.int32)
            phase_B = _next_phase(phase_B, token_B, layout)
            return decode, h_BD, phase_B, said_B, acted_B, outputs

        with jax.named_scope("turn_out"):
            carry = (decode, h_BD, phase_B, zero_B, zero_B, outputs)
            decode, h_BD, _, _, acted_B, outputs = jax.lax.while_loop(unfinished, emit, carry)
        if layout.max_padding_out:
            with jax.named_scope("turn_padding"):
                num_words_B, speaks_B = outputs.counts_B - acted_B, _holds(outputs, special.speak)
                counts_B, last_B = padding_counts(num_words_B, speaks_B, layout)
                padding = padding_slots(counts_B, layout, model)
                decode, last_B1D = feed(params, decode, padding, last_B[:, None])
                h_BD = jnp.where((counts_B > 0)[:, None], last_B1D[:, 0], h_BD)
        if model.has_voice:
            speaks_B = _holds(outputs, special.speak)
            decode, own = speak(params, decode, h_BD, speaks_B, state.keys_B2, feed, layout, model)
            outputs = replace(outputs, own=own)
        return replace(state, decode=decode), outputs

    return step


def _speak_closes(layout: Layout) -> bool:
    """Whether [speak] stands behind own text, as it does with a voice and implicit control."""
    return layout.own_positions_per_turn > 0 and layout.turn.control is Control.IMPLICIT


def _holds(outputs: TurnOutputs, token: int) -> Bool[Array, "B"]:
    is_there_BO = jnp.arange(outputs.tokens_BO.shape[1])[None] < outputs.counts_B[:, None]
    return jnp.any((outputs.tokens_BO == token) & is_there_BO, axis=1)


def jit_step(step: StepFunction) -> StepFunction:
    """Compiles a step; the state is donated, so that its caches are updated in place."""
    return jax.jit(step, donate_argnums=1)


def jit_served_step(step: StepFunction, mesh: Mesh, model: ModelConfig, state: StreamState) -> jax.stages.Wrapped:
    """Compiles a step ahead of time, for parameters and state in the memory layouts that the compiler wants.

    Else what the network reads as one matrix, but stores as an array of more dimensions, would be laid out anew
    whenever it is read. Lower it for shapes, compile, and put parameters and state where `input_formats` says.

    Args:
        step: the step.
        mesh: the devices that share the model.
        model: the model.
        state: the state, or its shapes.
    """

    def free(sharding: NamedSharding) -> memory.Format:
        return memory.Format(memory.Layout.AUTO, sharding)

    whole = NamedSharding(mesh, PartitionSpec())
    params_format = jax.tree.map(free, param_sharding(transformer.specs(model), mesh))
    state_format = jax.tree.map(lambda entry: free(NamedSharding(mesh, entry)), partition(state))
    return jax.jit(
        step,
        donate_argnums=1,
        in_shardings=(params_format, state_format, whole),
        out_shardings=(state_format, whole),
    )


def allowed_tokens(layout: Layout, num_logits: int) -> np.ndarray:
    """Which tokens may come next in each phase: bool [phases, V]."""
    special = layout.special
    allowed_PV = np.zeros((4, num_logits), bool)
    allowed_PV[[TEXT, ACTION]] = True
    allowed_PV[np.ix_([TEXT, ACTION], sorted(vars(special).values()))] = False
    allowed_PV[[TEXT, ACTION], special.end_of_text] = True
    if layout.turn.control is Control.IMPLICIT:
        allowed_PV[CONTROL] = allowed_PV[TEXT]
        if _speak_closes(layout):
            allowed_PV[[CONTROL, TEXT], special.speak] = True
            allowed_PV[TEXT, special.end_of_text] = False
    else:
        allowed_PV[CONTROL, [special.listen, special.speak]] = True
    allowed_PV[CONTROL, special.action] = True
    allowed_PV[DONE, special.pad] = True
    return allowed_PV


def _next_phase(phase_B: jax.Array, token_B: jax.Array, layout: Layout) -> Int32[Array, "B"]:
    special = layout.special
    ended_B = token_B == special.end_of_text
    closed_B = ended_B | (token_B == special.speak) if _speak_closes(layout) else ended_B
    over_B = closed_B | (token_B == special.listen)
    after_control = jnp.where(over_B, DONE, jnp.where(token_B == special.action, ACTION, TEXT))
    after_text = jnp.where(closed_B, DONE, TEXT)
    after_action = jnp.where(ended_B, CONTROL, ACTION)
    branches = [phase_B == CONTROL, phase_B == TEXT, phase_B == ACTION]
    return jnp.select(branches, [after_control, after_text, after_action], DONE).astype(jnp.int32)


def _record(outputs: TurnOutputs, token_B: jax.Array, active_B: jax.Array, logits_BV: jax.Array) -> TurnOutputs:
    width = outputs.tokens_BO.shape[1]
    here_BO = (jnp.arange(width)[None] == outputs.counts_B[:, None]) & active_B[:, None]
    log_prob_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV, axis=-1), token_B[:, None], axis=1)
    return TurnOutputs(
        tokens_BO=jnp.where(here_BO, token_B[:, None], outputs.tokens_BO),
        counts_B=outputs.counts_B + active_B.astype(jnp.int32),
        log_probs_BO=jnp.where(here_BO, log_prob_B, outputs.log_probs_BO),
    )


def _likeliest(logits_BV: Float32[Array, "B V"], *_: jax.Array) -> Int32[Array, "B"]:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def _sampler(temperature: float) -> Callable[..., Int32[Array, "B"]]:
    def sample(logits_BV: jax.Array, keys_B2: jax.Array, positions_B: jax.Array) -> jax.Array:
        keys_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys_B2), positions_B)
        return jax.vmap(jax.random.categorical)(keys_B, logits_BV / temperature).astype(jnp.int32)

    return sample


def scan_turns(
    step: StepFunction, params: Mapping[str, PyTree], state: StreamState, inputs: TurnInputs
) -> tuple[StreamState, TurnOutputs]:
    """Runs the step over a leading axis of turns, in one program: inputs [U, B, ...] to outputs [U, B, ...]."""

    def body(state: StreamState, turn: TurnInputs) -> tuple[StreamState, TurnOutputs]:
        return step(params, state, turn)

    return jax.lax.scan(body, state, inputs)
