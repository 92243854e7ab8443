"""Strict everywhere: shapes and types are checked at every call, rank and dtype promotion are errors."""

import os

# Eight virtual devices; and no LLVM optimisation, which takes five times as long as all else that tests do.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook(["tml", "data_pipelines"], "beartype.beartype")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
