"""Input embeddings: tokens, dMel audio frames, hMLP image tiles and own audio, one vector a position."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int16, Int32, UInt8

from tml.codec.video import normalise_tiles
from tml.config import MeshConfig, ModelConfig, Remat, VideoConfig
from tml.microturn import Kind
from tml.model.flow_head import feedback_levels
from tml.ops.collectives import index_along, sum_over
from tml.ops.norm import rms_norm
from tml.ops.projection import project
from tml.params import PyTree, Update, param, scale


def specs(cfg: ModelConfig) -> dict[str, PyTree]:
    """The parameters of the embeddings; a model without eyes has no video tower, one without a voice no own audio."""
    sizes = {"D": cfg.d_model, "V": cfg.vocab_size, "M": cfg.audio.num_mels, "Q": cfg.audio.num_levels}
    tree: dict[str, PyTree] = {
        "tokens": {
            "table": param("V D", sizes, fan_in="D", update=Update.EMBEDDING),
            "norm": scale("D", sizes),
        },
        "audio": {
            "table": param("M Q D", sizes, fan_in="D", update=Update.EMBEDDING, smooth_axis="Q"),
            "norm": scale("D", sizes),
        },
    }
    if cfg.video.max_tiles_per_turn:
        tree["video"] = _video_specs(cfg.video, cfg.d_model)
    if cfg.has_voice:
        own = {"D": cfg.d_model, "M": cfg.audio_out.num_mels, "Q": cfg.audio_out.feedback_levels}
        tree["own_audio"] = {
            "table": param("M Q D", own, fan_in="D", update=Update.EMBEDDING, smooth_axis="Q"),
            "norm": scale("D", own),
        }
    return tree


def _video_specs(video: VideoConfig, d_model: int) -> dict[str, PyTree]:
    widths_in, width = [], 3
    for fold, out in zip(video.fold_px, video.fold_dims, strict=True):
        widths_in.append(width * fold * fold)
        width = out
    widths_in.append(width * video.frames_per_tile)
    tree = {}
    for index, (inner, outer) in enumerate(zip(widths_in, (*video.fold_dims, d_model), strict=True)):
        sizes = {"I": inner, "O": outer}
        tree[f"fold_{index}"] = {"matrix": param("I O", sizes, fan_in="I"), "norm": scale("O", sizes)}
    return tree


def embed(
    params: Mapping[str, PyTree],
    tokens_BS: Int32[Array, "B S"],
    kinds_BS: UInt8[Array, "B S"],
    levels_BSM: UInt8[Array, "B S M"],
    tiles_BP: Int16[Array, "B P f h w 3"],
    tile_index_BS: Int32[Array, "B S"],
    cfg: ModelConfig,
    mesh: MeshConfig,
) -> Float[Array, "B S D"]:
    """One vector for every position, by its kind (see `tml.batch.Batch` for the arguments)."""
    dtype = compute_dtype(cfg)
    x_BSD = rms_norm(token_rows(params, tokens_BS, cfg, mesh), params["tokens"]["norm"], cfg.norm_eps)
    audio_BSD = embed_audio(params["audio"], levels_BSM, cfg.norm_eps, dtype)
    x_BSD = jnp.where((kinds_BS == Kind.AUDIO)[:, :, None], audio_BSD, x_BSD)
    if "video" in params and tiles_BP.shape[1]:
        make = functools.partial(embed_tiles, video=cfg.video, eps=cfg.norm_eps, dtype=dtype)
        # What is between its folds, kept through all layers, is gigabytes; making it anew takes a thousandth of a step.
        video_BPD = (make if cfg.remat is Remat.NONE else jax.checkpoint(make))(params["video"], tiles_BP)
        video_BSD = jnp.take_along_axis(video_BPD, tile_index_BS[:, :, None], axis=1)
        x_BSD = jnp.where((kinds_BS == Kind.TILE)[:, :, None], video_BSD, x_BSD)
    return x_BSD


def token_rows(
    params: Mapping[str, PyTree], tokens_BS: Int32[Array, "B S"], cfg: ModelConfig, mesh: MeshConfig
) -> Float[Array, "B S D"]:
    """The tokens' rows of the table, not normed."""
    return look_up(params["tokens"]["table"].astype(compute_dtype(cfg)), tokens_BS, mesh)


def look_up(table_VD: Float[Array, "v D"], tokens_BS: Int32[Array, "B S"], mesh: MeshConfig) -> Float[Array, "B S D"]:
    """Rows of a table of which each device along `tensor` holds a part of the vocabulary."""
    if mesh.tensor == 1:
        return table_VD[tokens_BS]
    place_BS = tokens_BS - index_along("tensor", mesh) * table_VD.shape[0]
    is_here_BS = (place_BS >= 0) & (place_BS < table_VD.shape[0])
    part_BSD = jnp.where(is_here_BS[:, :, None], table_VD[jnp.where(is_here_BS, place_BS, 0)], 0)
    return sum_over(part_BSD, ("tensor",), mesh)


def embed_audio(
    params: Mapping[str, PyTree], levels_BSM: UInt8[Array, "B S M"], eps: float, dtype: jnp.dtype
) -> Float[Array, "B S D"]:
    """The dMel embedding (Bai et al. 2024): one table row a channel and level, summed over channels, normed.

    The sum is a matmul with one-hot levels: a gather of M rows a position is eight times slower here.
    """
    one_hot = jax.nn.one_hot(levels_BSM, params["table"].shape[1], dtype=dtype)
    return rms_norm(project(one_hot, params["table"].astype(dtype), num_summed=2), params["norm"], eps)


def put_own_audio(
    x_BSD: Float[Array, "B S D"],
    params: Mapping[str, PyTree],
    kinds_BS: UInt8[Array, "B S"],
    mels_BPY: Float16[Array, "B P Y"],
    slots_BP: Int32[Array, "B P"],
    cfg: ModelConfig,
) -> Float[Array, "B S D"]:
    """Puts the embedding of own audio where it stands: its averaged frames, quantised, through a table of their own.

    Args:
        x_BSD: the other inputs.
        params: of the embeddings.
        kinds_BS: `microturn.Kind`: what stands at OWN_AUDIO before is replaced.
        mels_BPY: the mels.
        slots_BP: where each stands; those outside [0, S) stand nowhere.
        cfg: the model.
    """
    levels_BPM = feedback_levels(mels_BPY, cfg.audio_out)
    own_BPD = embed_audio(params["own_audio"], levels_BPM, cfg.norm_eps, x_BSD.dtype)
    num_slots = x_BSD.shape[1]
    slots_BP = jnp.where((slots_BP >= 0) & (slots_BP < num_slots), slots_BP, num_slots)
    x_BSD = jnp.where((kinds_BS == Kind.OWN_AUDIO)[:, :, None], jnp.zeros_like(x_BSD), x_BSD)
    return x_BSD.at[jnp.arange(x_BSD.shape[0])[:, None], slots_BP].add(own_BPD, mode="drop")


def embed_tiles(
    params: Mapping[str, PyTree],
    tiles_BP: Int16[Array, "B P f h w 3"],
    video: VideoConfig,
    eps: float,
    dtype: jnp.dtype,
) -> Float[Array, "B P D"]:
    """hMLP: folds space into depth step by step, then time; RMSNorm and exact GELU after all but the last."""
    num_rows, num_tiles = tiles_BP.shape[:2]
    x = normalise_tiles(tiles_BP).astype(dtype).reshape(num_rows * num_tiles, *tiles_BP.shape[2:])
    for index, fold in enumerate(video.fold_px):
        layer = params[f"fold_{index}"]
        count, frames, height, width, depth = x.shape
        x = x.reshape(count, frames, height // fold, fold, width // fold, fold, depth).transpose(0, 1, 2, 4, 3, 5, 6)
        x = x.reshape(*x.shape[:4], -1) @ layer["matrix"].astype(dtype)
        x = jax.nn.gelu(rms_norm(x, layer["norm"], eps), approximate=False)
    last = params[f"fold_{len(video.fold_px)}"]
    x = x.reshape(num_rows, num_tiles, -1) @ last["matrix"].astype(dtype)
    return rms_norm(x, last["norm"], eps)


def compute_dtype(cfg: ModelConfig) -> jnp.dtype:
    """The dtype of activations."""
    return jnp.dtype(cfg.compute_dtype.value)
