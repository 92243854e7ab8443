"""The flow head: what it learns from, what it draws, what is fed back, and that every part of it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOICE, randomised, rows_of, tiny_layout, tiny_model, tiny_session

from tml.batch import OwnAudio
from tml.config import (
    AudioOutConfig,
    DataConfig,
    Experiment,
    FlowConfig,
    FlowSolver,
    MeshConfig,
    MtpConfig,
    OptimConfig,
    TrainConfig,
    VideoConfig,
)
from tml.mesh import make_mesh
from tml.model import flow_head, transformer
from tml.params import init_params, spec_leaves
from tml.train_step import init_state, make_gradients, make_train_step, to_devices

MODEL = tiny_model(audio_out=VOICE)


def test_a_model_without_a_voice_has_no_parameter_of_one() -> None:
    paths = [path for path, _ in spec_leaves(transformer.specs(tiny_model()))]
    voiced = [path for path, _ in spec_leaves(transformer.specs(MODEL))]
    assert not any("own_audio" in path or "audio_out" in path for path in paths)
    assert [path for path in voiced if "own_audio" not in path and "audio_out" not in path] == paths


def test_the_head_has_the_parameters_that_its_sizes_say() -> None:
    flow, values, d_model = VOICE.flow, 6, MODEL.d_model
    blocks = flow.num_blocks * (3 + 1 + 1) * flow.width**2
    outside = flow.width * (d_model + 2 * values) + (2 + 2) * flow.width**2 + d_model
    assert sum(spec.size for _, spec in spec_leaves(flow_head.specs(MODEL))) == blocks + outside


def test_before_the_first_step_the_error_is_that_of_no_velocity() -> None:
    params = init_params(flow_head.specs(MODEL), jax.random.key(0))
    rng = np.random.default_rng(0)
    own = OwnAudio(
        mels_BPY=(2 * rng.standard_normal((40, 8, 6))).astype(np.float16),
        places_BP=np.tile(np.arange(1, 9, dtype=np.int32), (40, 1)),
        seeds_BP=rng.integers(0, 2**32, (40, 8), np.uint32),
    )
    h_BSD = rng.standard_normal((40, 9, 16)).astype(np.float32)
    error = jax.jit(lambda p, h, o: flow_head.loss(p, h, o, MODEL, MeshConfig()))(params, h_BSD, own)
    assert float(error.count) == 320
    assert float(error.total / error.count) == pytest.approx(np.square(own.mels_BPY, dtype=float).mean() + 1, rel=0.03)


def test_a_loss_with_room_for_a_part_takes_what_is_there_or_a_fair_part_of_it() -> None:
    rng = np.random.default_rng(0)
    params = randomised(init_params(flow_head.specs(MODEL), jax.random.key(0)))
    h_BSD = rng.standard_normal((8, 50, 16)).astype(np.float32)

    def loss(num_here: int, share: float):
        places = np.zeros((8, 40), np.int32)
        places[:, :num_here] = np.arange(1, num_here + 1)
        own = OwnAudio(
            mels_BPY=np.random.default_rng(1).standard_normal((8, 40, 6)).astype(np.float16),
            places_BP=places,
            seeds_BP=np.random.default_rng(2).integers(0, 2**32, (8, 40), np.uint32),
        )
        flow = dataclasses.replace(VOICE.flow, loss_share=share)
        cfg = dataclasses.replace(MODEL, audio_out=dataclasses.replace(VOICE, flow=flow))
        return jax.jit(lambda p, h, o: flow_head.loss(p, h, o, cfg, MeshConfig()))(params, h_BSD, own)

    whole, fits = loss(8, 1.0), loss(8, 0.25)
    assert float(fits.count) == float(whole.count) == 64
    np.testing.assert_allclose(fits.total, whole.total, rtol=1e-5)
    whole, part = loss(40, 1.0), loss(40, 0.25)
    assert float(part.count) == float(whole.count) == 320
    np.testing.assert_allclose(part.total, whole.total, rtol=0.2)
    assert part.total != whole.total


def test_times_lie_one_in_each_part_and_draws_follow_from_the_seed_alone() -> None:
    flow = FlowConfig(width=8, num_draws=4, condition_dropout=0.25)
    seeds = np.arange(3_000, dtype=np.uint32)
    draws = flow_head.draw(jnp.asarray(seeds), 5, flow)
    assert (np.floor(np.asarray(draws.time_nR) * 4) == np.arange(4)[None]).all()
    assert np.asarray(draws.drops_nR).mean() == pytest.approx(0.25, abs=0.02)
    assert np.asarray(draws.noise_nRY).std() == pytest.approx(1.0, abs=0.01)
    alone = flow_head.draw(jnp.asarray(seeds[7:8]), 5, flow)
    jax.tree.map(lambda one, many: np.testing.assert_array_equal(one[0], many[7]), alone, draws)


def test_guidance_leads_away_from_what_no_condition_gives() -> None:
    flow = FlowConfig(width=8, num_blocks=2, num_steps=1, solver=FlowSolver.EULER, condition_dropout=0.1)
    plain = tiny_model(audio_out=dataclasses.replace(VOICE, flow=flow, log_floor=-1e4))
    params = randomised(init_params(flow_head.specs(plain), jax.random.key(0)))
    h_BD = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    keys_B = jax.random.split(jax.random.key(3), 4)

    def sampled(h_BD: np.ndarray, guidance: float) -> np.ndarray:
        guided = dataclasses.replace(plain.audio_out, flow=dataclasses.replace(flow, guidance=guidance))
        cfg = dataclasses.replace(plain, audio_out=guided)
        return np.asarray(flow_head.sample(params, jnp.asarray(h_BD), keys_B, cfg), np.float32)

    nothing = np.tile(np.asarray(params["no_condition"])[None], (4, 1))
    with_it, without = sampled(h_BD, 1.0), sampled(nothing, 1.0)
    np.testing.assert_allclose(sampled(h_BD, 3.0), without + 3 * (with_it - without), rtol=0.02, atol=0.05)
    assert np.abs(with_it - without).max() > 0.5


def test_what_is_fed_back_is_the_nearest_level_of_the_averaged_frames() -> None:
    own = AudioOutConfig(frames_per_position=4, num_mels=7, feedback_levels=16)
    mels = (1.5 * np.random.default_rng(0).standard_normal((500, 28))).astype(np.float16)
    logs = mels.reshape(500, 4, 7).astype(np.float64).mean(axis=1) * own.log_deviation + own.log_mean
    place = (logs - own.log_floor) / (own.feedback_high - own.log_floor) * 15
    expected = np.clip(np.rint(place), 0, 15)
    found = np.asarray(flow_head.feedback_levels(jnp.asarray(mels), own)).astype(float)
    sure = np.abs(np.abs(place - np.floor(place)) - 0.5) > 0.01
    np.testing.assert_array_equal(found[sure], expected[sure])
    np.testing.assert_allclose(found, expected, atol=1)
    assert set(np.unique(found)) == set(range(16))


def test_training_hears_its_own_samples_in_the_share_that_the_config_asks_for() -> None:
    layout = tiny_layout(MODEL)
    batch = rows_of(MODEL, layout, [[tiny_session(MODEL, 20, seed)] for seed in range(4)], 400)
    params = jax.tree.map(jnp.asarray, randomised(init_params(transformer.specs(MODEL), jax.random.key(0))))
    here_BP = batch.own.places_BP > 0

    def heard(share: float) -> tuple[np.ndarray, np.ndarray]:
        model = dataclasses.replace(MODEL, audio_out=dataclasses.replace(VOICE, feedback_sampled=share))

        def both(params, batch):
            h_BSD = transformer.hidden(params, batch, model, MeshConfig()).h_BSD
            return h_BSD, flow_head.own_samples(params["audio_out"], h_BSD, batch.own, model, MeshConfig())

        return jax.device_get(jax.jit(both)(params, batch))

    (h_BSD, all_said), (_, half_said) = heard(1.0), heard(0.5)
    assert here_BP.sum() > 100
    is_said = {
        name: (mels != batch.own.mels_BPY).any(axis=-1) for name, mels in (("all", all_said), ("half", half_said))
    }
    np.testing.assert_array_equal(is_said["all"], here_BP)
    assert 0.35 < is_said["half"][here_BP].mean() < 0.65
    np.testing.assert_array_equal(half_said[is_said["half"]], all_said[is_said["half"]])
    # Every sample is one that the head draws from the state at the position before.
    rows, columns = np.nonzero(here_BP)
    seeds = batch.own.seeds_BP[rows, columns]
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.fold_in(jax.random.key(seed), flow_head.OWN_SAMPLES))[1])
    h_nD = jnp.asarray(h_BSD)[rows, batch.own.places_BP[rows, columns] - 1]
    again = jax.jit(lambda h, k: flow_head.sample(params["audio_out"], h, k, MODEL))(h_nD, keys(jnp.asarray(seeds)))
    np.testing.assert_allclose(all_said[here_BP].astype(float), np.asarray(again, float), rtol=2e-3, atol=2e-3)


def test_the_loss_is_of_the_true_sound_after_what_was_heard() -> None:
    layout = tiny_layout(MODEL)
    batch = rows_of(MODEL, layout, [[tiny_session(MODEL, 8, seed)] for seed in range(2)], 160)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def grads(share: float) -> tuple[list[np.ndarray], float]:
        model = dataclasses.replace(MODEL, audio_out=dataclasses.replace(VOICE, feedback_sampled=share))
        experiment = Experiment(name="heard", model=model, data=DataConfig(row_slots=160, rows_per_batch=2))
        params = randomised(init_params(transformer.specs(model), jax.random.key(0)))
        found, sums, _ = jax.jit(make_gradients(experiment, mesh))(params, to_devices(batch, mesh))
        return found, float(sums["loss_audio"].total)

    def by_hand(params, rows):
        """The same loss with what is heard put in the rows, and the true sound in the target."""
        model = dataclasses.replace(MODEL, audio_out=dataclasses.replace(VOICE, feedback_sampled=1.0))
        first = transformer.hidden(params, rows, model, MeshConfig()).h_BSD
        said = flow_head.own_samples(params["audio_out"], first, rows.own, model, MeshConfig())
        heard = rows.replace(own=rows.own.replace(mels_BPY=said))
        second = transformer.hidden(params, heard, MODEL, MeshConfig()).h_BSD
        return flow_head.loss(params["audio_out"], second, rows.own, MODEL, MeshConfig()).total

    (true_grads, true_loss), (said_grads, said_loss) = grads(0.0), grads(1.0)
    assert said_loss != pytest.approx(true_loss, rel=1e-4)
    params = randomised(init_params(transformer.specs(MODEL), jax.random.key(0)))
    assert said_loss == pytest.approx(float(jax.jit(by_hand)(params, to_devices(batch, mesh))), rel=1e-5)
    assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(said_grads))
    assert any((one != other).any() for one, other in zip(*map(jax.tree.leaves, (true_grads, said_grads)), strict=True))


def test_a_batch_without_the_stream_that_the_model_expects_is_an_error() -> None:
    plain, plain_batch = (
        tiny_model(),
        rows_of(tiny_model(), tiny_layout(tiny_model()), [[tiny_session(tiny_model(), 4)]], 80),
    )
    batch = rows_of(MODEL, tiny_layout(MODEL), [[tiny_session(MODEL, 4)]], 120)
    blind = tiny_model(video=VideoConfig())
    blind_batch = rows_of(blind, tiny_layout(blind), [[tiny_session(blind, 4)]], 80)
    for model, rows, message in (
        (plain, blind_batch, r"has eyes, but the batch holds no image tiles \(model.video.max_tiles_per_turn = 2\)"),
        (blind, plain_batch, "has no eyes, but the batch holds image tiles"),
        (MODEL, plain_batch, "has a voice, but the batch holds no own audio"),
        (plain, batch, "has no voice, but the batch holds own audio"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                lambda rows, model=model: transformer.apply(
                    init_params(transformer.specs(model), jax.random.key(0)), rows, model
                ),
                rows,
            )


def test_after_two_updates_every_parameter_has_a_gradient_and_both_losses_are_logged() -> None:
    model = tiny_model(
        num_layers=2, global_layers=(1,), audio_out=VOICE, video=VideoConfig(), mtp=MtpConfig(num_blocks=1)
    )
    layout = tiny_layout(model)
    sessions = [[tiny_session(model, 8, seed)] for seed in range(4)]
    batch = rows_of(model, layout, sessions, 160)
    experiment = Experiment(
        name="voice",
        model=model,
        data=DataConfig(row_slots=160, rows_per_batch=4),
        optim=OptimConfig(warmup_steps=1, peak_lr=1e-2),
        train=TrainConfig(num_steps=8),
    )
    mesh = make_mesh(experiment.mesh, jax.devices()[:1])
    step, state = make_train_step(experiment, mesh), init_state(jax.random.key(0), experiment, mesh)
    rows = to_devices(batch, mesh)
    losses = []
    for _ in range(2):
        state, metrics = step(state, rows)
        losses.append(float(metrics["loss_audio"].total / metrics["loss_audio"].count))
    assert float(metrics["loss_audio"].count) == (batch.own.places_BP > 0).sum() > 20
    assert float(metrics["loss_text"].count) > 0
    assert losses[1] < losses[0]
    grads, _, _ = jax.jit(make_gradients(experiment, mesh))(state.params, rows)
    for (path, _), grad in zip(spec_leaves(transformer.specs(model)), jax.tree.leaves(grads), strict=True):
        assert np.any(grad) or "router_bias" in path, path
