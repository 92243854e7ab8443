"""The bundles of a kernel in the last schedule of the TPU's compiler, for an absent v5p.

Importing it says where the compiler, which is loaded by the first compilation, leaves its schedules.
"""

import os
import re
import tempfile
from pathlib import Path

DUMP = Path(tempfile.mkdtemp(prefix="llo-"))
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true"

from collections.abc import Callable

import jax

from tests.absent_targets import tpu

jax.config.update("jax_platforms", "cpu")
BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(\S\S)?\s*:([ >]*)")


def compile_for_v5p(function: Callable, *arrays: jax.ShapeDtypeStruct) -> None:
    """Compiles a function of such arrays; leaves the schedules in DUMP."""
    device = tpu("v5p:2x2x1")
    placed = [jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device) for array in arrays]
    jax.jit(function).lower(*placed).compile()


def pieces(kernel: str) -> list[tuple[int, int]]:
    """Loop depth and bundles of every straight piece of a kernel's last schedule."""
    (path,) = (p for p in DUMP.glob(f"*{kernel}*-final_bundles.txt") if "schedule-analysis" not in p.name)
    found = [[0, 0]]
    for line in path.read_text().splitlines():
        bundle = BUNDLE.match(line)
        if bundle:
            depth = bundle[2].count(">")
            if bundle[1] or depth != found[-1][0]:
                found.append([depth, 0])
            found[-1][1] += 1
    return [(depth, bundles) for depth, bundles in found]


def is_on_one_core(kernel: str) -> bool:
    """Whether a kernel runs on the first of a v5p's two cores alone."""
    (path,) = DUMP.glob(f"*-{kernel}*-02-original.txt")
    return "PrimaryCoreRegion" in path.read_text()


def clear() -> None:
    """Removes the schedules of the last program."""
    for path in DUMP.iterdir():
        path.unlink()
