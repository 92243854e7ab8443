"""The network of the reference run, `experiments/duplex_tiny.py`, with random values: as exact at its sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_speaking import assert_same_slot, beside
from tiny import randomised, tiny_layout, tiny_session

from experiments.duplex_tiny import get_config
from tml.config import from_config_dict
from tml.model import transformer
from tml.params import init_params
from tml.stream import engine
from tml.stream.inputs import join_sessions, session_inputs

NUM_TURNS, NUM_SLOTS, MINE = 8, 8, 5
EXPERIMENT = from_config_dict(get_config())

pytestmark = pytest.mark.slow


def test_a_session_is_the_same_in_any_of_eight_slots_and_scanned_or_stepped() -> None:
    model = EXPERIMENT.model
    layout = tiny_layout(model, boundary=EXPERIMENT.turn.boundary)
    params = randomised(init_params(transformer.specs(model), jax.random.key(0)))
    step = engine.make_step(model, layout, EXPERIMENT.stream)
    scan = jax.jit(lambda params, state, inputs: engine.scan_turns(step, params, state, inputs)[1])

    def first(numbers: list[int]) -> engine.StreamState:
        return engine.init_state(model, layout, EXPERIMENT.stream, NUM_SLOTS, numbers=numbers)

    sessions = [tiny_session(model, NUM_TURNS, seed) for seed in range(NUM_SLOTS)]
    mine, *others = [join_sessions([session_inputs(layout, one, model)], NUM_TURNS) for one in sessions]
    idle = jax.tree.map(np.zeros_like, mine)
    state = first([MINE, *range(10, 17)])
    alone = jax.device_get(scan(params, state, beside(mine, *[idle] * 7)))
    assert alone.own.speaks_B[:, 0].any()
    for slot in (0, 3, 7):
        numbers = list(range(10, 17))
        numbers.insert(slot, MINE)
        inputs = beside(*others[:slot], mine, *others[slot:])
        assert_same_slot(alone, 0, jax.device_get(scan(params, first(numbers), inputs)), slot)

    jitted, singles = engine.jit_step(step), []
    for turn in range(NUM_TURNS):
        now = jax.tree.map(lambda leaf, turn=turn: jnp.asarray(leaf[turn]), beside(mine, *[idle] * 7))
        state, single = jitted(params, state, now)
        singles.append(jax.device_get(single))
    jax.tree.map(np.testing.assert_array_equal, alone, jax.tree.map(lambda *leaves: np.stack(leaves), *singles))
