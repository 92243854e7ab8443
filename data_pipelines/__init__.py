"""Recordings to Session records (offline), Session records to batches (online). Imports only floors 0 to 2 of tml."""
