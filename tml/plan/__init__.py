"""What a step will cost on a pod that is not there: compiled for it, read from the scheduled HLO, and estimated."""
