"""tml trains interaction models: one transformer that hears, sees, reads, writes and speaks in 200 ms micro-turns."""
