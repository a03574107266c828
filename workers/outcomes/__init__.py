"""What is on the results and dead-letter streams: read, replayed, trimmed."""
