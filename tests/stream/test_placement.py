"""Devices that share a model give what one device gives: the same tokens, in any slot, with caches split by heads."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny import VOICE, randomised, tiny_layout, tiny_model, tiny_session

from tml.config import MatmulBackend, ModelConfig, StreamConfig
from tml.mesh import param_sharding
from tml.model import transformer
from tml.params import init_params
from tml.stream import engine
from tml.stream.inputs import join_sessions, session_inputs
from tml.stream.placement import check_backend, served_params, stream_mesh

NUM_TURNS = 6


def wide_model(**changes) -> ModelConfig:
    """One that eight devices can share; with padding in its vocabulary."""
    model = tiny_model(vocab_size=48, unpadded_vocab_size=43, **changes)
    attention = dataclasses.replace(model.attention, num_heads=16, num_kv_heads=8)
    return dataclasses.replace(model, attention=attention)


@functools.cache
def program(model: ModelConfig, stream: StreamConfig):
    """Parameters and a program that runs turns; compiling one takes longer than all that is done with it."""
    params = randomised(init_params(transformer.specs(model), jax.random.key(0)))
    step = engine.make_step(model, tiny_layout(model), stream)
    return params, jax.jit(lambda p, s, x: engine.scan_turns(step, p, s, x))


@functools.cache
def streamed(model: ModelConfig, stream: StreamConfig, *order: int) -> engine.TurnOutputs:
    layout = tiny_layout(model)
    params, run = program(model, stream)
    sessions = [session_inputs(layout, tiny_session(model, NUM_TURNS, seed), model) for seed in order]
    state = engine.init_state(model, layout, stream, len(order))
    _, outputs = run(params, state, join_sessions(sessions, NUM_TURNS))
    return jax.tree.map(np.asarray, outputs)


@pytest.mark.parametrize("backend", [MatmulBackend.BLOCKED, MatmulBackend.DENSE])
@pytest.mark.parametrize("tensor", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_devices_that_share_a_model_say_what_one_device_says(tensor: int, backend: MatmulBackend) -> None:
    model = wide_model()
    stream = StreamConfig(max_positions=128, backend=MatmulBackend.BLOCKED)
    alone = streamed(model, stream, 0, 1, 2)
    shared = streamed(model, dataclasses.replace(stream, tensor=tensor, backend=backend), 0, 1, 2)
    assert len(np.unique(alone.tokens_BO)) > 3
    np.testing.assert_array_equal(shared.tokens_BO, alone.tokens_BO)
    np.testing.assert_array_equal(shared.counts_B, alone.counts_B)
    np.testing.assert_allclose(shared.log_probs_BO, alone.log_probs_BO, atol=1e-4)


def test_devices_that_share_a_voice_sound_as_one_device_does() -> None:
    model, stream = wide_model(audio_out=VOICE), StreamConfig(max_positions=128)
    alone = streamed(model, stream, 0, 1)
    shared = streamed(model, dataclasses.replace(stream, tensor=2), 0, 1)
    assert 0 < alone.own.speaks_B.sum() < alone.own.speaks_B.size
    np.testing.assert_array_equal(shared.tokens_BO, alone.tokens_BO)
    np.testing.assert_array_equal(shared.own.speaks_B, alone.own.speaks_B)
    mels, expected = (np.asarray(found.own.mels_BTY, np.float32) for found in (shared, alone))
    np.testing.assert_allclose(mels, expected, rtol=2e-3, atol=2e-3)


def test_a_session_is_the_same_in_any_slot_also_with_experts_by_kernel() -> None:
    model, stream = wide_model(), StreamConfig(max_positions=128, tensor=8, backend=MatmulBackend.DENSE)
    first, other = streamed(model, stream, 0, 1, 2), streamed(model, stream, 3, 4, 0)
    for name in ("tokens_BO", "counts_B", "log_probs_BO"):
        np.testing.assert_array_equal(getattr(first, name)[:, 0], getattr(other, name)[:, 2])


def test_a_served_step_takes_parameters_and_state_where_the_compiler_wants_them() -> None:
    model, stream = wide_model(), StreamConfig(max_positions=64, tensor=8)
    layout, mesh = tiny_layout(model), stream_mesh(model, stream)
    step, state = engine.make_step(model, layout, stream), engine.init_state(model, layout, stream, 2)
    (inputs,) = [session_inputs(layout, tiny_session(model, NUM_TURNS), model)]
    inputs = jax.tree.map(lambda leaf: np.concatenate([leaf[0], leaf[0]]), inputs)
    params = init_params(transformer.specs(model), jax.random.key(0))
    compiled = engine.jit_served_step(step, mesh, model, state).lower(served_params(model), state, inputs).compile()
    places = compiled.input_formats[0]
    placed = [jax.device_put(tree, place) for tree, place in zip((params, state, inputs), places, strict=True)]
    after, outputs = compiled(*placed)
    jax.block_until_ready(after)
    expected = engine.jit_step(step)(
        jax.device_put(params, param_sharding(transformer.specs(model), mesh)), state, inputs
    )
    np.testing.assert_array_equal(outputs.tokens_BO, expected[1].tokens_BO)
    np.testing.assert_array_equal(outputs.tokens_BO[0], outputs.tokens_BO[1])
    caches = after.decode.layers[-1][-1].k_LBTKH
    assert caches.sharding.shard_shape(caches.shape)[3] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor": 3}, "stream.tensor = 3 does not divide model.attention.num_kv_heads = 8"),
        ({"tensor": 2}, "stream.tensor = 2, but there are 8 devices; set stream.tensor=8"),
        ({"tensor": 8, "backend": MatmulBackend.TPU}, "a kernel for tpu, not for cpu"),
    ],
)
def test_what_cannot_be_shared_is_said_at_once(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream_mesh(wide_model(), StreamConfig(**changes), jax.devices())


def test_kernels_are_for_their_platform() -> None:
    check_backend(MatmulBackend.GPU, "cuda")
    check_backend(MatmulBackend.BLOCKED, "cpu")
    with pytest.raises(ValueError, match=r"stream\.backend = gpu"):
        check_backend(MatmulBackend.GPU, "tpu")
