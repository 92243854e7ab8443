"""The duplex evaluation: judge-free scores of every behaviour, on emitted words and calls with their times."""
