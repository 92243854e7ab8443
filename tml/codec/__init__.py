"""Waveform, pixels and text to model inputs and back; shared by data preparation and streaming."""
