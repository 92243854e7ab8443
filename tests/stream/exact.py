"""Compiler options for tests that hold programs against each other bit for bit."""

import os

EXACT = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ["XLA_FLAGS"] else {}
"""With the usual emitters: the tests' fast way rounds a loop's body otherwise than the same step alone. The command
that compiles everything as in use stands in the README."""
