"""What the runtime counts, logs and measures."""
