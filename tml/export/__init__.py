"""Bundles: what leaves a run to be streamed or served elsewhere."""
