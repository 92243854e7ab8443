"""Strict everywhere: shapes and types are checked at every call, rank and dtype promotion are errors."""

import atexit
import os
import shutil
import sys
import tempfile
from importlib.metadata import version

# Eight virtual devices; and the compiler's fastest way: no LLVM optimisation, which takes five times as long as all
# else that tests do, and no emission through MLIR, which takes as long as the rest of a compilation.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    # Newer compilers emit one way only, and end a process at a flag that they do not know.
    *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
)
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# What one worker or app has compiled, the others read, as long as the suite runs.
if "TML_TESTS_COMPILED" not in os.environ:
    compiled = os.environ["TML_TESTS_COMPILED"] = tempfile.mkdtemp(prefix="tml-tests-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{compiled}/xla")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
    if sys.dont_write_bytecode:
        # Apps that tests start would parse all of jax, each anew, where nobody compiled it on installation.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = f"{compiled}/bytecode"
if "PYTHONPYCACHEPREFIX" in os.environ:
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]

from jaxtyping import install_import_hook

install_import_hook(["tml", "data_pipelines"], "beartype.beartype")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
