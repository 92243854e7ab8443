"""The backbone equals `transformers`' Inkling on CPU: logits and every gradient, on text, sound and pictures."""

import copy
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from inkling_oracle import NUM_SLOTS, inkling_model, inputs_of, oracle_logits, oracle_of, tensors_of, tree_of
from transformers.models.inkling import modeling_inkling

from tml import checkpoint
from tml.codec.video import CLIP_MEAN, CLIP_STD
from tml.export.inkling_import import import_folder
from tml.microturn import Kind
from tml.model import embed, transformer
from tml.params import abstract_params

MODEL = inkling_model()


@functools.cache
def compared() -> tuple[modeling_inkling.InklingForConditionalGeneration, dict]:
    """The oracle, and our parameters as they come from a checkpoint that it was imported into."""
    oracle = oracle_of(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        oracle.save_pretrained(f"{folder}/in")
        import_folder(Path(f"{folder}/in"), Path(f"{folder}/run"))
        return oracle, checkpoint.restore(Path(f"{folder}/run"))[1]


@functools.cache
def our_logits():
    return jax.jit(lambda params, batch: transformer.apply(params, batch, MODEL).logits_BSV)


def test_the_oracle_has_every_parameter_and_every_kind_of_layer() -> None:
    _, params = compared()
    wanted = jax.tree.map(lambda leaf: leaf.shape, abstract_params(transformer.specs(MODEL)))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == wanted
    assert len(set(transformer.layer_kinds(MODEL))) == 3
    assert MODEL.attention.log_scaling_floor < NUM_SLOTS
    assert max(MODEL.attention.window, MODEL.attention.global_extent) < NUM_SLOTS


@pytest.mark.parametrize(
    "kinds", [(Kind.TOKEN,), (Kind.TOKEN, Kind.AUDIO), (Kind.TOKEN, Kind.AUDIO, Kind.TILE)], ids=len
)
def test_logits_equal(kinds: tuple[Kind, ...]) -> None:
    oracle, params = compared()
    batch = inputs_of(MODEL, kinds)
    with torch.no_grad():
        wanted = oracle_logits(oracle, batch).numpy()
    ours = np.asarray(our_logits()(params, batch))
    assert ours.shape == wanted.shape == (1, NUM_SLOTS, 37)
    assert wanted.std() > 0.1
    np.testing.assert_allclose(ours, wanted, atol=1e-4)


def test_every_gradient_equals() -> None:
    oracle, params = compared()
    batch = inputs_of(MODEL, (Kind.TOKEN, Kind.AUDIO, Kind.TILE))
    weights = np.random.default_rng(2).standard_normal((1, NUM_SLOTS, 37)).astype(np.float32) / NUM_SLOTS
    oracle.zero_grad()
    (oracle_logits(oracle, batch) * torch.from_numpy(weights)).sum().backward()
    slopes = copy.deepcopy(oracle)
    grads = {name: values.grad for name, values in oracle.named_parameters()}
    with torch.no_grad():
        for name, values in slopes.state_dict().items():
            values.copy_(grads.get(name, torch.zeros_like(values)))
    wanted = tree_of(tensors_of(slopes), MODEL)
    ours = jax.jit(jax.grad(lambda p, b: jnp.sum(transformer.apply(p, b, MODEL).logits_BSV * weights)))(params, batch)
    for (path, our_grad), grad in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(wanted), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        largest = np.abs(grad).max()
        assert largest > 1e-5 or "router_bias" in name, name
        np.testing.assert_allclose(our_grad, grad, rtol=1e-3, atol=1e-4 * max(largest, 1.0), err_msg=name)


def test_rows_of_sound_and_of_pictures_equal() -> None:
    oracle, params = compared()
    batch = inputs_of(MODEL, (Kind.AUDIO, Kind.TILE))
    float32 = jnp.dtype("float32")
    sound = embed.embed_audio(params["embed"]["audio"], jnp.asarray(batch.levels_BSM), 1e-6, float32)
    pictures = embed.embed_tiles(params["embed"]["video"], jnp.asarray(batch.tiles_BP), MODEL.video, 1e-6, float32)
    pixels = (batch.tiles_BP[0] / 255.0 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    with torch.no_grad():
        wanted = oracle.model.audio_tower(torch.from_numpy(batch.levels_BSM.astype(np.int64))).last_hidden_state
        seen = oracle.model.vision_tower(torch.from_numpy(pixels.astype(np.float32))).last_hidden_state
    np.testing.assert_allclose(sound, wanted.numpy(), atol=1e-5)
    np.testing.assert_allclose(pictures[0], seen.numpy()[:, 0], atol=1e-5)
