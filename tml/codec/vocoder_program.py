"""A neural vocoder as an exported program: any network that jax can export, without its code.

A folder holds `vocoder.json`, with `delay_samples` and the mels that it wants, and two programs of `jax.export`:

    init.stablehlo      () -> state                                            a list of arrays
    step.stablehlo      (state, mels float32 [F, M]) -> (state, samples)       as many samples as F frames cover

Mels are log10 of mel magnitudes, F the frames of one micro-turn. `save_program` writes such a folder.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Float16, Float32

from tml.codec.own_sound import frame_config
from tml.config import AudioOutConfig, ModelConfig, VocoderKind

MARKER = "vocoder.json"
STEP, INIT = "step.stablehlo", "init.stablehlo"
FILES = (MARKER, INIT, STEP)
FOLDER = "vocoder"
"""Where a program lies in the folder of a model that was exported with it."""


class VocoderProgram:
    """A vocoder (`tml.codec.vocoder.Vocoder`) from a folder."""

    def __init__(self, model: ModelConfig) -> None:
        """Reads the folder that the config names.

        Raises:
            ValueError: there is no such program, or it is for other mels.
        """
        folder, self._own = Path(model.audio_out.vocoder.program), model.audio_out
        try:
            marker = json.loads((folder / MARKER).read_text())
            programs = [export.deserialize(bytearray((folder / name).read_bytes())) for name in (INIT, STEP)]
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model.audio_out.vocoder.program = {str(folder)!r} is no vocoder: {error}; name a folder that "
                f"tml.codec.vocoder_program.save_program wrote"
            ) from error
        wanted, found = described(model), marker["mels"]
        if wanted != found:
            raise ValueError(f"the vocoder in {folder} is for mels {found}, the model makes {wanted}; name another one")
        self.delay_samples = int(marker["delay_samples"])
        self._init, self._step = (jax.jit(program.call) for program in programs)

    def init_state(self) -> Any:
        """The program's own state before the first frame."""
        return self._init()

    def step(self, state: Any, mels: Float16[np.ndarray, "T Y"]) -> tuple[Any, Float32[np.ndarray, " n"]]:
        """As many samples as the positions cover, `delay_samples` late."""
        logs = mels.astype(np.float32).reshape(-1, self._own.num_mels)
        state, samples = self._step(state, logs * np.float32(self._own.log_deviation) + np.float32(self._own.log_mean))
        return state, np.asarray(samples)


def carry(own: AudioOutConfig, model_folder: Path) -> AudioOutConfig:
    """Copies the program that a voice names, if it does, beside an exported model; returns the voice with that place.

    Raises:
        ValueError: there is no such program.
    """
    if own.vocoder.kind is not VocoderKind.PROGRAM:
        return own
    folder = Path(own.vocoder.program)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"model.audio_out.vocoder.program = {str(folder)!r} is no vocoder: it has no {missing[0]}")
    (model_folder / FOLDER).mkdir(exist_ok=True)
    for name in FILES:
        shutil.copyfile(folder / name, model_folder / FOLDER / name)
    return _placed(own, FOLDER)


def carried(own: AudioOutConfig, model_folder: Path) -> AudioOutConfig:
    """The voice of a model, with the place in its folder to which `carry` copies the program, if it names one."""
    return _placed(own, str(model_folder / FOLDER)) if own.vocoder.kind is VocoderKind.PROGRAM else own


def _placed(own: AudioOutConfig, program: str) -> AudioOutConfig:
    return replace(own, vocoder=replace(own.vocoder, program=program))


def described(model: ModelConfig) -> dict[str, int | float]:
    """What a vocoder must know of the mels."""
    cfg = frame_config(model)
    return {
        "sample_rate_hz": cfg.sample_rate_hz,
        "hop_samples": cfg.hop_samples,
        "window_samples": cfg.window_samples,
        "num_mels": cfg.num_mels,
        "max_hz": cfg.max_hz,
    }


def save_program(
    folder: Path,
    init: Callable[[], list[jax.Array]],
    step: Callable[[list[jax.Array], jax.Array], tuple[list[jax.Array], jax.Array]],
    frames_per_turn: int,
    delay_samples: int,
    model: ModelConfig,
) -> None:
    """Exports a vocoder for the mels of a model.

    Args:
        folder: where it goes.
        init: gives the first state.
        step: as at the top of this file.
        frames_per_turn: F.
        delay_samples: as of `Vocoder`.
        model: whose mels it is for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = jax.eval_shape(init)
    mels = jax.ShapeDtypeStruct((frames_per_turn, model.audio_out.num_mels), jnp.float32)
    (folder / INIT).write_bytes(export.export(jax.jit(init))().serialize())
    (folder / STEP).write_bytes(export.export(jax.jit(step))(state, mels).serialize())
    marker = {"delay_samples": delay_samples, "mels": described(model)}
    (folder / MARKER).write_text(json.dumps(marker, indent=1) + "\n")
