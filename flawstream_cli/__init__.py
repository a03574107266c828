"""The `flawstream` command. It may import every other room; none imports it."""
