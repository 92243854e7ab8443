"""Multi-token prediction equals `transformers`' MtpModel: names, logits and every gradient; packing; what streams."""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from inkling_oracle import NUM_SLOTS, drawn_folder, inkling_model, inputs_of
from transformers import InklingForConditionalGeneration, masking_utils, modeling_layers
from transformers.cache_utils import MtpCache

from tml import checkpoint
from tml.config import MeshConfig, ModelConfig, MtpChain, MtpConfig, MtpEmbedding
from tml.export.inkling_import import import_folder
from tml.microturn import Kind
from tml.model import transformer

BLOCKS = MtpConfig(num_blocks=3, global_blocks=(1,))
CHAINS = {chain: inkling_model(mtp=replace(BLOCKS, chain=chain)) for chain in MtpChain}


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
    return [transformer.unembed(params["unembed"], h_BSD, model) for h_BSD in found.ahead]


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
