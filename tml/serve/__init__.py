"""What surrounds live sessions: the loop that keeps time, the background model and its tools."""
