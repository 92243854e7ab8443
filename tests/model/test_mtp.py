"""Multi-token prediction equals `transformers`' MtpModel: names, logits and every gradient; packing; what streams."""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from inkling_oracle import NUM_SLOTS, drawn_folder, inkling_model, inputs_of, oracle_config, tensors_of, tree_of
from tiny import randomised, rows_of, tiny_layout, tiny_model, tiny_session
from transformers import InklingForConditionalGeneration, masking_utils, modeling_layers
from transformers.cache_utils import MtpCache

from tml import checkpoint
from tml.config import MeshConfig, ModelConfig, MtpChain, MtpConfig, MtpEmbedding
from tml.export.inkling_import import import_folder
from tml.microturn import Kind
from tml.model import head, transformer
from tml.params import init_params

BLOCKS = MtpConfig(num_blocks=3, global_blocks=(1,))
NETWORK = {"num_layers": 3, "num_dense_layers": 1, "global_layers": (1,)}
"""As many layers as blocks: `MtpModel.from_pretrained` takes a block whose number is beyond the layers for block 0."""
CHAINS = {chain: inkling_model(**NETWORK, mtp=replace(BLOCKS, chain=chain)) for chain in MtpChain}


@pytest.fixture(autouse=True)
def sliding_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the oracle's sliding blocks a sliding mask.

    transformers (5.23 and 5.24) has `create_causal_mask` in `LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING["hybrid_sliding"]`,
    so its sliding blocks would see everything, where `InklingTextModel` gives the layers of that name
    `create_sliding_window_causal_mask`.
    """
    kinds = masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING["hybrid_sliding"]
    monkeypatch.setitem(kinds, "sliding_attention", masking_utils.create_sliding_window_causal_mask)


@functools.cache
def compared(chain: MtpChain) -> tuple[InklingForConditionalGeneration, modeling_layers.MtpModel, dict]:
    """Drawn tensors as the oracle's network, as its blocks, and as ours after an import.

    `MtpModel.from_pretrained` refuses to begin while a tensor that it knows is missing, so the names are its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        drawn_folder(CHAINS[chain], Path(f"{folder}/in"))
        main = InklingForConditionalGeneration.from_pretrained(f"{folder}/in", attn_implementation="eager")
        blocks = modeling_layers.MtpModel.from_pretrained(main)
        import_folder(Path(f"{folder}/in"), Path(f"{folder}/run"))
        return main.eval(), blocks.eval(), checkpoint.restore(Path(f"{folder}/run"))[1]


def oracle_ahead(main, blocks, batch, embedding: MtpEmbedding) -> list[torch.Tensor]:
    """Logits of every block over the whole row; the last k + 1 of block k are told zeros and mean nothing."""
    ids = torch.from_numpy(batch.tokens_BS.astype(np.int64))
    inputs = {"input_ids": ids}
    is_sound = torch.from_numpy(batch.kinds_BS == Kind.AUDIO)
    if is_sound.any():
        inputs["audio_input_ids"] = torch.from_numpy(batch.levels_BSM[batch.kinds_BS == Kind.AUDIO][None].astype(int))
    hidden = main(**inputs, output_hidden_states=True).hidden_states[-1]
    told = blocks.embed_tokens(ids)
    if embedding is MtpEmbedding.INPUT:
        sound = main.model.audio_tower(torch.from_numpy(batch.levels_BSM.astype(int))).last_hidden_state
        told = torch.where(is_sound[:, :, None], sound, main.get_input_embeddings()(ids))
    cache, positions, found = MtpCache(config=main.config.get_mtp_config()), torch.arange(NUM_SLOTS)[None], []
    for number in range(len(blocks.layers)):
        told = torch.nn.functional.pad(told[:, 1:], (0, 0, 0, 1))
        hidden = blocks.forward_layer(number, hidden, positions + number + 1, cache, inputs_embeds=told)
        found.append(blocks._project_to_logits(hidden))
    return found


def our_ahead(params, batch, model: ModelConfig) -> list[jax.Array]:
    found = transformer.hidden(params, batch, model, MeshConfig())
    return [head.unembed(params["unembed"], h_BSD, model) for h_BSD in found.ahead]


@pytest.mark.parametrize("embedding", list(MtpEmbedding))
@pytest.mark.parametrize("chain", list(MtpChain))
def test_logits_equal(chain: MtpChain, embedding: MtpEmbedding) -> None:
    main, blocks, params = compared(chain)
    batch = inputs_of(CHAINS[chain], (Kind.TOKEN, Kind.AUDIO))
    model = replace(CHAINS[chain], mtp=replace(CHAINS[chain].mtp, embedding=embedding))
    assert max(model.attention.window, model.attention.log_scaling_floor) < NUM_SLOTS
    with torch.no_grad():
        wanted = oracle_ahead(main, blocks, batch, embedding)
    ours = jax.jit(functools.partial(our_ahead, model=model))(params, batch)
    assert len(ours) == len(wanted) == 3
    for number, (found, logits) in enumerate(zip(ours, wanted, strict=True)):
        counted = slice(0, NUM_SLOTS - 1 - number)
        assert logits[:, counted].std() > 0.1
        np.testing.assert_allclose(found[:, counted], logits[:, counted].numpy(), atol=1e-4)


def grad_of(values: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(values) if values.grad is None else values.grad


def published_grads(main, blocks, model: ModelConfig) -> dict[str, np.ndarray]:
    """Gradients under the published names, which `transformers` gives them itself.

    The blocks' layers are put into a network of as many dense layers, as it has no way to save an MtpModel.
    """
    layers = replace(model, num_layers=3, num_dense_layers=3, global_layers=model.mtp.global_blocks, mtp=MtpConfig())
    whole, stack = (InklingForConditionalGeneration(oracle_config(each)) for each in (model, layers))
    with torch.no_grad():
        for copied, values in zip(whole.parameters(), main.parameters(), strict=True):
            copied.copy_(grad_of(values))
        # The blocks look tokens up in a copy of the table.
        whole.get_input_embeddings().weight += grad_of(blocks.embed_tokens.weight)
        for layer, block in zip(stack.model.language_model.layers, blocks.layers, strict=True):
            for copied, values in zip(layer.parameters(), block.mtp_block.parameters(), strict=True):
                copied.copy_(grad_of(values))
    grads = tensors_of(whole)
    prefix = "model.llm.layers."
    for name, values in tensors_of(stack).items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            grads[f"model.mtp.layers.{number}.transformer_block.{rest}"] = values
    for number, block in enumerate(blocks.layers):
        for ours, theirs in (("hidden_norm", block.hnorm), ("embed_norm", block.enorm), ("input_proj", block.eh_proj)):
            grads[f"model.mtp.layers.{number}.{ours}.weight"] = grad_of(theirs.weight).numpy()
    grads["model.mtp.chain_norm.weight"] = grad_of(blocks.shared_post_norm.weight).numpy()
    return grads


def test_every_gradient_equals() -> None:
    main, blocks, params = compared(MtpChain.NORMED)
    model = CHAINS[MtpChain.NORMED]
    batch = inputs_of(model, (Kind.TOKEN, Kind.AUDIO))
    weights = np.random.default_rng(2).standard_normal((3, 1, NUM_SLOTS, model.num_logits)).astype(np.float32)
    for number in range(3):
        weights[number, :, NUM_SLOTS - 1 - number :] = 0.0
    main.zero_grad()
    blocks.zero_grad()
    logits = torch.stack(oracle_ahead(main, blocks, batch, MtpEmbedding.RAW))
    (logits * torch.from_numpy(weights / NUM_SLOTS)).sum().backward()
    wanted = tree_of(published_grads(main, blocks, model), model)

    def loss(params, batch) -> jax.Array:
        return jnp.sum(jnp.stack(our_ahead(params, batch, model)) * weights) / NUM_SLOTS

    ours = jax.jit(jax.grad(loss))(params, batch)
    for (path, our_grad), grad in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(wanted), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        largest = np.abs(grad).max()
        assert largest > 1e-5 or "router_bias" in name or "video" in name, name
        np.testing.assert_allclose(our_grad, grad, rtol=1e-3, atol=1e-4 * max(largest, 1.0), err_msg=name)


@pytest.mark.parametrize("embedding", list(MtpEmbedding))
def test_a_packed_row_equals_each_segment_alone(embedding: MtpEmbedding) -> None:
    model = tiny_model(**NETWORK, mtp=replace(BLOCKS, embedding=embedding))
    layout = tiny_layout(model)
    sessions = [tiny_session(model, turns, seed) for seed, turns in enumerate([6, 7, 9])]
    params = randomised(init_params(transformer.specs(model), jax.random.key(0)))

    @jax.jit
    def ahead(params, batch) -> jax.Array:
        return jnp.stack(transformer.hidden(params, batch, model, MeshConfig()).ahead)

    found = ahead(params, rows_of(model, layout, [sessions, *([session] for session in sessions)], 280))
    packed, alone = found[:, :1], found[:, 1:]
    first = 0
    for index, session in enumerate(sessions):
        size = layout.lay_out(layout.contents(session)).num_slots
        for number in range(3):
            counted = size - 1 - number
            np.testing.assert_allclose(
                packed[number, 0, first : first + counted], alone[number, index, :counted], atol=1e-5
            )
        first += size


def test_without_blocks_the_network_is_as_before() -> None:
    with_blocks, without = transformer.specs(tiny_model(mtp=BLOCKS)), transformer.specs(tiny_model())
    assert {name: tree for name, tree in with_blocks.items() if name != "mtp"} == without
    assert transformer.specs(tiny_model(mtp=BLOCKS).streamed) == without


def test_blocks_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"global_blocks names blocks \[3\], but model.mtp.num_blocks = 3"):
        replace(BLOCKS, global_blocks=(1, 3))
    with pytest.raises(ValueError, match="names a block twice"):
        replace(BLOCKS, global_blocks=(1, 1))
