"""One file per question; each defines `get_grid()` for `launch.sweep`."""
