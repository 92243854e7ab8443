"""The absl apps, one per job: `python -m launch.NAME --help`."""
