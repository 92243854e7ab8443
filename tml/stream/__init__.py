"""The streaming engine: one micro-turn for all its sessions at a time, with fixed shapes; pure, no input or output."""
