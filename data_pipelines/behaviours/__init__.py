"""Generators of sessions, one for every behaviour that interaction data must teach."""
